"""The update by torch's own optimizer functions: its fused one where that takes the tensors."""

from __future__ import annotations

import itertools

from torch.optim.adam import adam as torch_adam

from bigkern.core.library import lazily_negated
from bigkern.ops.adam import reference
from bigkern.ops.adam.call import Adam
from bigkern.ops.adam.layout import dense, same_layout


def adam(call: Adam) -> None:
    """What torch.optim has no word for is left to the reference."""
    beyond = call.masters or call.exp_avg_scales or call.zero_grads
    own = any(m.dtype != p.dtype for p, m in zip(call.params, call.exp_avgs, strict=True))
    if own or beyond or call.seed is not None or call.grad_norm is not None:
        reference.adam(call)
        return
    alike = (call.grads, call.exp_avgs, call.exp_avg_sqs, *([call.max_exp_avg_sqs] if call.amsgrad else []))
    lazy = any(map(lazily_negated, itertools.chain(call.params, *alike)))
    fused = not lazy and all(
        p.is_floating_point() and dense(p) and all(same_layout(p, x) for x in others)
        for p, *others in zip(call.params, *alike, strict=True)
    )
    grad_scale, found_inf = call.grad_scale, call.found_inf
    if not fused:
        if found_inf is not None and bool(found_inf):
            return
        if grad_scale is not None:
            for g in call.grads:
                g.div_(grad_scale.to(g.device))
        grad_scale = found_inf = None
    if found_inf is not None:
        found_inf = found_inf.reshape(())  # torch subtracts it from the 0-dim steps
    torch_adam(
        call.params,
        call.grads,
        call.exp_avgs,
        call.exp_avg_sqs,
        call.max_exp_avg_sqs,
        call.state_steps,
        foreach=False if fused or lazy else None,
        fused=fused,
        capturable=not fused and call.state_steps[0].device.type == "cuda",
        grad_scale=grad_scale,
        found_inf=found_inf,
        has_complex=any(p.is_complex() for p in call.params),
        decoupled_weight_decay=call.decoupled,
        amsgrad=call.amsgrad,
        beta1=call.beta1,
        beta2=call.beta2,
        lr=call.lr if call.lr_tensor is None else call.lr_tensor,
        weight_decay=call.weight_decay,
        eps=call.eps,
        maximize=call.maximize,
    )
