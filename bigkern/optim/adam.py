"""Adam and AdamW as drop-in replacements of ``torch.optim``'s.

They *are* torch's classes: constructor, errors, parameter groups, hooks and state dicts are inherited. Only
the step differs (step.py), and what may be stored differs where it is asked for (states.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from bigkern.optim.options import Options
from bigkern.optim.step import Step


class Adam(Step):
    r"""Adam with the arguments, defaults, errors and state of :class:`torch.optim.Adam`, and some of its own.

    ``m = beta1 m + (1 - beta1) g``, ``v = beta2 v + (1 - beta2) g^2``,
    ``p = p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)``

    One kernel reads and writes each tensor once; the math is float32. State dicts are torch's and load both
    ways, in the middle of a run. With :class:`torch.amp.GradScaler`, unscaling and skipping happen inside
    the kernel. Parameters may be DTensors (FSDP2): each process updates what it holds.

    Bytes that a parameter takes, g included, and that a step moves for it:

    ================================================  =========  ========
    parameter, options                                stored     moved
    ================================================  =========  ========
    float32                                           16         28
    float32, ``state_dtype=torch.bfloat16``           12         20
    float32, ``state_dtype=torch.uint8``              10.03      16.06
    bfloat16, ``master_weights=True``,                16         28
    ``state_dtype=torch.float32``
    bfloat16, ``master_weights="remainder"``,         14         26
    ``state_dtype=torch.float32``
    bfloat16, ``master_weights="remainder"``,         10         18
    ``state_dtype=torch.bfloat16``
    bfloat16, ``stochastic_rounding=True``            8          14
    bfloat16, ``stochastic_rounding=True``,           6.03       10.06
    ``state_dtype=torch.uint8``
    ================================================  =========  ========

    ``in_backward`` takes away g's 4 or 2; ``offload`` leaves p and g on the device and nothing else.
    ``max_norm`` reads g once more. ``zero_grads`` writes it.

    Args:
        params: parameters, named parameters or groups. ``state_dtype``, ``master_weights`` and
            ``stochastic_rounding`` may differ by group.
        lr: learning rate, a number or a one-element tensor.
        betas: decay of the gradient's mean and of its square's.
        eps: added to the denominator.
        weight_decay: added to the gradient, times the parameter; with ``decoupled_weight_decay``, AdamW.
        amsgrad: divide by the largest second moment so far.
        foreach, maximize, capturable, differentiable, fused, decoupled_weight_decay: as torch's. ``foreach``
            and ``fused`` name paths of torch's, taken only where autograd (``differentiable``), tensor
            betas, tracing or a tensor subclass need torch's own; see :meth:`explain`.
        state_dtype: how m and v are stored. None: as the parameter, torch's way. ``torch.float32``;
            ``torch.bfloat16``, m rounded to nearest and v at random, because it would otherwise never
            shrink: at beta2 = 0.999 its decay is less than half of bfloat16's last place (so would m's be
            at a beta1 above 0.99: store it in float32 then); ``torch.uint8``, a code for each number and a
            float32 for each 256 (it is the dtype that ``state[p]["exp_avg"]`` then has).
        master_weights: for bfloat16 and float16 parameters. True: a float32 copy is updated, and the
            parameter is its rounding. "remainder": the same to the last bit, but for a bfloat16 parameter
            the 16 bits that its rounding took away are stored instead. Once there, masters are the truth:
            what is written into the parameters is overwritten by the next step.
        stochastic_rounding: round bfloat16 parameters without masters at random, up or down in proportion
            to the distances, so that updates of less than their last place are not lost, on average.
        seed: of that randomness; None: drawn from torch's CPU generator, or, where several processes train,
            0, because replicas must round alike. Groups, buckets and shards draw different bits from it.
            State dicts carry it.
        max_norm: clip by the norm of all gradients of all groups, as
            :func:`torch.nn.utils.clip_grad_norm_` before the step, but inside it; gradients stay as they
            were. The norm is then in :attr:`grad_norm`.
        zero_grads: leave zeros in the gradients.
        in_backward: update each parameter during the backward pass, as soon as its gradient is there, and
            free the gradient. ``step()`` updates whatever else has a gradient. Not for gradients that
            arrive later (accumulation), not with ``max_norm`` or GradScaler; where several processes train,
            for DTensors (FSDP2) alone: DistributedDataParallel reduces gradients too late.
        offload: keep m, v and masters in the CPU's memory; copy gradients and parameters there, step there,
            copy parameters back.

    float64 and complex parameters are stored as torch stores them, whatever is said here. Moments and
    masters that lie in memory in another order than their parameter, as after
    ``model.to(memory_format=torch.channels_last)``, are brought into its order in the next step.

    On a GPU the counts ``state["step"]`` live there, so every step can be captured in a CUDA graph and none
    waits for the device (but with ``offload``).

    Raises:
        ValueError, RuntimeError: as torch's class, naming the argument.
        ValueError: an option is not one of the above, or two do not go together: ``amsgrad`` with 8 bits,
            ``stochastic_rounding`` with masters, any with ``differentiable``.
        RuntimeError: from the backward pass, where ``in_backward`` finds itself in several processes.

    Source: Kingma and Ba, Adam (2015); :class:`torch.optim.Adam`; Dettmers et al., 8-bit Optimizers via
    Block-wise Quantization (2022); Zamirai et al., Revisiting BFloat16 Training (2020).

    Example:
        >>> import torch, bigkern
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = bigkern.optim.Adam(model.parameters(), lr=1e-3, state_dtype=torch.uint8, max_norm=1.0)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.grad_norm
        tensor(4.4721)
        >>> optimizer.state[model.weight]["exp_avg"].dtype
        torch.uint8
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        state_dtype: torch.dtype | None = None,
        master_weights: bool | str = False,
        stochastic_rounding: bool = False,
        seed: int | None = None,
        max_norm: float | None = None,
        zero_grads: bool = False,
        in_backward: bool = False,
        offload: bool = False,
    ) -> None:
        self._options = Options(
            state_dtype, master_weights, stochastic_rounding, seed, max_norm, zero_grads, in_backward, offload
        )
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )


class AdamW(Step, torch.optim.AdamW):
    r"""AdamW with the arguments, defaults, errors and state of :class:`torch.optim.AdamW`, and its own.

    As :class:`Adam`, but for the weight decay: ``p = p (1 - lr * weight_decay)`` before the update, and
    nothing added to the gradient.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused:
            as torch's class; see :class:`Adam`.
        state_dtype, master_weights, stochastic_rounding, seed, max_norm, zero_grads, in_backward, offload:
            see :class:`Adam`, which also says how many bytes each takes.

    Raises:
        ValueError, RuntimeError: as torch's class, naming the argument; as :class:`Adam`.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019);
    :class:`torch.optim.AdamW`.

    Example:
        >>> import torch, bigkern
        >>> model = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
        >>> optimizer = bigkern.optim.AdamW(model.parameters(), weight_decay=0.1, master_weights="remainder")
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
        >>> model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["master"].dtype
        torch.int16
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        master_weights: bool | str = False,
        stochastic_rounding: bool = False,
        seed: int | None = None,
        max_norm: float | None = None,
        zero_grads: bool = False,
        in_backward: bool = False,
        offload: bool = False,
    ) -> None:
        self._options = Options(
            state_dtype, master_weights, stochastic_rounding, seed, max_norm, zero_grads, in_backward, offload
        )
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
