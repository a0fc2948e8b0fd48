"""Adam and AdamW in plain torch: what every adam kernel must compute, in place, for each parameter.

    t    = t + 1
    g    = g / grad_scale                                       where a scale is given
    g    = -g                                                   with maximize
    p    = p (1 - lr weight_decay)   or   g = g + weight_decay p      decoupled (AdamW) or not (Adam)
    m    = m + (1 - beta1) (g - m)                              exp_avg
    v    = beta2 v + (1 - beta2) g^2                            exp_avg_sq
    vmax = max(vmax, v), which then takes v's place below       with amsgrad
    p    = p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

The math is fp32 (fp64 for fp64), rounded to the storage's dtype once, at the end. Where found_inf is not 0
nothing changes, t included.
"""

from __future__ import annotations

import torch
from torch import Tensor


def adam(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    lr_tensor: Tensor | None = None,
) -> None:
    """One step, in place; ``lr_tensor`` replaces ``lr``, and ``grads`` are left divided by ``grad_scale``."""
    if found_inf is not None and bool(found_inf != 0):
        return
    if lr_tensor is not None:
        lr = float(lr_tensor)
    for i, param in enumerate(params):
        wide = torch.promote_types(param.dtype, torch.float32)
        p, g, m, v = (x[i].to(wide) for x in (params, grads, exp_avgs, exp_avg_sqs))
        state_steps[i] += 1
        t = float(state_steps[i])
        if grad_scale is not None:
            g = g / grad_scale
            grads[i].copy_(g)
        if maximize:
            g = -g
        if decoupled:
            p = p * (1 - lr * weight_decay)
        else:
            g = g + weight_decay * p
        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        exp_avgs[i].copy_(m)
        exp_avg_sqs[i].copy_(v)
        if amsgrad:
            v = torch.maximum(max_exp_avg_sqs[i].to(wide), v)
            max_exp_avg_sqs[i].copy_(v)
        denominator = v.sqrt() / (1 - beta2**t) ** 0.5 + eps
        param.copy_(p - lr / (1 - beta1**t) * m / denominator)
