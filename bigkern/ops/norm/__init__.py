"""LayerNorm and RMSNorm, with the residual addition before them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigkern.ops.norm.backends import NORM


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""LayerNorm over the last dimensions, and the residual addition before it in the same pass.

    ``y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias``, ``s = drop(x) + residual``

    Args:
        x: ``[*, *normalized_shape]``; float32, bfloat16 or float16 (float64 runs on stock PyTorch).
        normalized_shape: the trailing dimensions that one mean and variance are taken over.
        weight: of shape ``normalized_shape``, or None for 1.
        bias: of shape ``normalized_shape``, or None for 0.
        eps: added to the variance.
        residual: x's shape and dtype, added to x first.
        dropout_p: probability in [0, 1) with which each element of x is dropped before the residual is
            added; the others are divided by ``1 - dropout_p``. Needs a residual; always active if positive.
        seed, offset: two non-negative ints that fix what is dropped, on every backend alike; without a
            seed torch's generator does.

    Returns:
        ``y`` of x's shape and dtype; with a residual ``(y, s)``, both differentiable.

    Saved for backward: s, weight, and one fp32 mean and one fp32 1 / deviation a row.

    Raises:
        TypeError: an argument is not a tensor, or a dtype does not fit.
        RuntimeError: shapes do not fit, as in :func:`torch.nn.functional.layer_norm`.
        ValueError: devices, eps, dropout_p, seed or offset do not fit.

    Source: Ba, Kiros and Hinton, Layer Normalization (2016).

    Example:
        >>> import torch, bigkern
        >>> x, r = torch.randn(2, 16, 64), torch.randn(2, 16, 64)
        >>> y, s = bigkern.layer_norm(x, (64,), torch.ones(64), torch.zeros(64), residual=r)
        >>> y.shape
        torch.Size([2, 16, 64])
    """
    if dropout_p == 0.0 and type(eps) is float and 0.0 <= eps < math.inf and _is_stocks("layer", x, residual):
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
        try:
            s = x if residual is None else x + residual
            y = torch.layer_norm(s, shape, weight, bias, eps)
            return y if residual is None else (y, s)
        except (RuntimeError, TypeError):
            pass  # torch refused: bind says why in the op's own words
    return _norm(x, normalized_shape, weight, bias, eps, residual, "layer", dropout_p, seed, offset)


def rms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""RMSNorm over the last dimensions, and the residual addition before it in the same pass.

    ``y = s / sqrt(mean(s^2) + eps) * weight``, ``s = drop(x) + residual``

    Args:
        x: ``[*, *normalized_shape]``; float32, bfloat16 or float16 (float64 runs on stock PyTorch).
        normalized_shape: the trailing dimensions that one mean square is taken over.
        weight: of shape ``normalized_shape``, or None for 1.
        eps: default as in torch: the machine epsilon of float32 (of float64 for float64).
        residual: x's shape and dtype, added to x first.
        dropout_p: probability in [0, 1) with which each element of x is dropped before the residual is
            added; the others are divided by ``1 - dropout_p``. Needs a residual; always active if positive.
        seed, offset: two non-negative ints that fix what is dropped, on every backend alike; without a
            seed torch's generator does.

    Returns:
        ``y`` of x's shape and dtype; with a residual ``(y, s)``, both differentiable.

    Saved for backward: s, weight, and one fp32 1 / root-mean-square a row.

    Raises:
        TypeError, RuntimeError, ValueError: as :func:`layer_norm`.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019).

    Example:
        >>> import torch, bigkern
        >>> bigkern.rms_norm(torch.randn(2, 16, 64), (64,), torch.ones(64)).shape
        torch.Size([2, 16, 64])
    """
    usual = eps is None or (type(eps) is float and 0.0 <= eps < math.inf)
    if dropout_p == 0.0 and usual and _is_stocks("rms", x, residual):
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
        try:
            s = x if residual is None else x + residual
            y = torch.rms_norm(s, shape, weight, eps)  # type: ignore[arg-type]
            return y if residual is None else (y, s)
        except (RuntimeError, TypeError):
            pass
    return _norm(x, normalized_shape, weight, None, eps, residual, "rms", dropout_p, seed, offset)


def _is_stocks(kind: str, x: Tensor, residual: Tensor | None) -> bool:
    """Whether stock is known to run calls like this one, to be asked first: a call may be short."""
    if type(x) is not Tensor:
        return False
    if residual is not None and (
        type(residual) is not Tensor or residual.shape != x.shape or residual.dtype != x.dtype
    ):
        return False
    return bool(NORM.stocks.have(kind, x.numel(), x.shape[-1], x.dtype, residual is None))


def _norm(x: Tensor, *others: Any) -> Tensor | tuple[Tensor, Tensor]:
    """In x's shape: where several dimensions are normalized the call's x has fewer."""
    candidate, call, needs_grad = NORM.decided(x, *others)
    if call.dropout_p == 0.0 and type(x) is Tensor:
        alone = call.residual is None
        NORM.stocks.learn(candidate.by_torch, call.kind, x.numel(), x.shape[-1], x.dtype, alone)
    y, total = NORM.run(candidate, call, needs_grad)
    if y.dim() != x.dim():
        y, total = y.view(x.shape), None if total is None else total.view(x.shape)
    return y if total is None else (y, total)
