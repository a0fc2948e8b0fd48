"""The Adam and AdamW update over lists of tensors, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bigkern.ops.adam.backends import ADAM
from bigkern.ops.adam.call import bind
from bigkern.ops.adam.packed import Packed

__all__ = ["ADAM", "Packed", "adam"]


def adam(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    masters: Sequence[Tensor] = (),
    exp_avg_scales: Sequence[Tensor] = (),
    exp_avg_sq_scales: Sequence[Tensor] = (),
    lr: float | Tensor = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    amsgrad: bool = False,
    maximize: bool = False,
    zero_grads: bool = False,
    max_norm: float | None = None,
    seed: int | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    grad_norm: Tensor | None = None,
) -> None:
    r"""One step of Adam, or of AdamW with ``decoupled``, over lists of tensors, in place.

    ``m = beta1 m + (1 - beta1) g``, ``v = beta2 v + (1 - beta2) g^2``,
    ``p = p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)``

    All tensors of all parameters are read and written once, in one pass. The math is float32 whatever
    the storage.

    Args:
        params: the parameters, any shapes; float32, bfloat16 or float16 on one device, stored densely
            in any order of dimensions (float64, complex and other layouts run on stock PyTorch).
        grads: g, like ``params``. With ``grad_scale`` they are divided by it in place.
        exp_avgs: m, like ``params`` in shape, and for kernels in strides (other orders run on stock
            PyTorch); of their dtype, float32, bfloat16, or uint8 codes (block-wise dynamic quantisation,
            see :mod:`bigkern.ops.adam.dynamic8`).
        exp_avg_sqs: v, likewise.
        max_exp_avg_sqs: the running maximum of v with ``amsgrad``, likewise; otherwise empty.
        state_steps: t, one float32 scalar tensor a parameter on its device; 1 is added to each.
        masters: empty, or for each bfloat16 or float16 parameter its value in float32, or, for
            bfloat16, in int16 the bits that rounding takes from it. The update reads the master, and
            ``params`` become its rounding.
        exp_avg_scales, exp_avg_sq_scales: with uint8 moments a float32 for each 256 elements, as they
            lie in memory; otherwise empty.
        lr: learning rate; a one-element tensor is read on its device, without waiting for a GPU.
        beta1, beta2: decay of m and v, in [0, 1).
        eps: added to the denominator.
        weight_decay: decay of the parameters: ``g + weight_decay * p`` takes g's place, or, where
            ``decoupled``, p is first multiplied by ``1 - lr * weight_decay``.
        amsgrad: divide by the largest v so far.
        maximize: ascend.
        zero_grads: leave zeros in ``grads``.
        max_norm, grad_norm: clip: the gradients are multiplied by
            ``min(1, max_norm / (grad_norm + 1e-6))`` on the way in. ``grad_norm`` is a one-element
            tensor, the norm of all gradients as they came: :func:`grad_norm`'s.
        seed: round v, and parameters without masters, at random where they are stored in bfloat16, up or
            down in proportion to the distances, so that small updates are not lost; m and what has a
            master are always rounded to nearest. Bits depend on seed, step and position alone.
        grad_scale: one-element tensor; the gradients are divided by it first.
        found_inf: one-element tensor; where it is not 0 nothing is changed.

    Raises:
        TypeError: an argument is not a tensor or not a list of them, or a dtype does not fit.
        ValueError: lengths, shapes, devices or hyper-parameters do not fit.

    Source: Kingma and Ba, Adam (2015); Loshchilov and Hutter, Decoupled Weight Decay Regularization
    (2019); Reddi et al., On the Convergence of Adam and Beyond (2018); Dettmers et al., 8-bit Optimizers
    via Block-wise Quantization (2022).

    Example:
        >>> import torch
        >>> from bigkern.ops.adam import adam
        >>> p, g = torch.ones(3), torch.ones(3)
        >>> adam([p], [g], [torch.zeros(3)], [torch.zeros(3)], [], [torch.tensor(0.0)], lr=0.5)
        >>> p
        tensor([0.5000, 0.5000, 0.5000])
    """
    call = bind(
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, masters, exp_avg_scales,
        exp_avg_sq_scales, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
        decoupled=decoupled, amsgrad=amsgrad, maximize=maximize, zero_grads=zero_grads, max_norm=max_norm,
        seed=seed, grad_scale=grad_scale, found_inf=found_inf, grad_norm=grad_norm,
    )  # fmt: skip
    with torch.no_grad():
        ADAM(call)
