"""BatchNorm with the residual addition and the ReLU after it."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from bigkern.ops.batch_norm.backends import BATCH_NORM
from bigkern.ops.batch_norm.call import Activation as Activation
from bigkern.ops.batch_norm.call import bind


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: Activation | None = None,
) -> Tensor:
    r"""BatchNorm, and the residual addition and ReLU that follow it in a CNN, in the same pass.

    ``y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)``

    In training mean and biased variance are those of x over all dimensions but channels, and running
    statistics move towards mean and unbiased variance by ``momentum``; else they are the running ones.

    Args:
        x: ``[N, C, *]``, in any memory format; float32, bfloat16 or float16 (float64 runs on stock PyTorch).
        running_mean, running_var: ``[C]``, written in place in training, where both may be None.
        weight, bias: ``[C]``, x's dtype or float32; None for 1 and 0.
        training: whether the statistics are x's own.
        momentum: the part of the way that running statistics move.
        eps: added to the variance.
        residual: x's shape, added before the activation.
        activation: None or ``"relu"``.

    Returns:
        ``y`` of x's shape, dtype and memory format.

    Saved for backward: x, weight, fp32 mean and variance a channel; for a ReLU bias, from which its sign is
    computed again, or with a residual y, which the next layer keeps anyway. Stock saves y for every ReLU.

    Raises:
        TypeError: an argument is not a tensor, or a dtype does not fit.
        RuntimeError: shapes do not fit, or running statistics are missing, in torch's words.
        ValueError: one value per channel in training; devices, eps or activation do not fit.

    Source: Ioffe and Szegedy, Batch Normalization (2015); :func:`torch.nn.functional.batch_norm`.

    Example:
        >>> import torch
        >>> from bigkern.ops.batch_norm import batch_norm
        >>> x, shortcut = torch.randn(2, 4, 8, 16, 16).unbind(0)
        >>> batch_norm(x, None, None, training=True, residual=shortcut, activation="relu").shape
        torch.Size([4, 8, 16, 16])
    """
    call = bind(x, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation)
    y, mean, var = BATCH_NORM(call)
    if mean is not None and running_mean is not None and running_var is not None:
        count = x.numel() // x.shape[1]
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    return cast(Tensor, y)
