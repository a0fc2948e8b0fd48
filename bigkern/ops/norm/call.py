"""What the norm op is called with, forward and backward, and what comes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigkern.core.checks import check_dense_or_jagged, check_eps, check_tensor
from bigkern.core.checks import kind as kind_of
from bigkern.core.dropout import check_dropout, dropout_key
from bigkern.core.op import Call

LONG = 16384  # elements, beyond which a GPU does not keep a row in registers


@dataclass(slots=True)
class Norm(Call):
    """``y = norm(s) * weight + bias``, ``s = dropout(x) + residual``, norms of the last dimension."""

    x: Tensor  # [..., N]
    residual: Tensor | None  # as x
    weight: Tensor | None  # [N]
    bias: Tensor | None  # [N]
    eps: float
    kind: str  # "layer" or "rms"
    dropout_p: float
    dropout_key: Tensor | None  # None without a seed


class Result(NamedTuple):
    y: Tensor  # as x
    sum: Tensor | None  # s where there is a residual
    mean: Tensor | None  # [rows], of "layer"
    rstd: Tensor  # [rows]


@dataclass(slots=True)
class NormBackward(Call):
    dy: Tensor
    dsum: Tensor | None
    s: Tensor
    weight: Tensor | None
    mean: Tensor | None
    rstd: Tensor
    kind: str
    want_weight: bool
    want_bias: bool
    dropout_p: float
    dropout_key: Tensor | None


class Gradients(NamedTuple):
    ds: Tensor  # the residual's
    dx: Tensor | None  # what dropout lets through of it; None without dropout
    dweight: Tensor | None
    dbias: Tensor | None


def bind(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-5,
    residual: Tensor | None = None,
    kind: str = "layer",
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
) -> Norm:
    """Check a public call. Several normalized dimensions become one."""
    check_dense_or_jagged("x", x)
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, not {x.dtype}")
    shape = _checked_shape(normalized_shape)
    if not shape:
        raise RuntimeError("normalized_shape must have at least one dimension, not ()")
    if x.shape[-len(shape) :] != shape:
        raise RuntimeError(f"normalized_shape {shape} must end the shape of x, {tuple(x.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        check_tensor(name, tensor, x)
        if tensor.shape != shape:
            raise RuntimeError(f"{name} must have normalized_shape {shape}, not {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, not {tensor.dtype}")
    if residual is not None:
        check_tensor("residual", residual, x)
        if residual.dtype != x.dtype:
            raise TypeError(f"residual must have x's dtype {x.dtype}, not {residual.dtype}")
        if residual.shape != x.shape:
            raise RuntimeError(f"residual must have x's shape {tuple(x.shape)}, not {tuple(residual.shape)}")
    default = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if eps is None else eps
    eps = check_eps(default)
    dropout_p = check_dropout(dropout_p)
    if dropout_p > 0.0 and residual is None:
        raise ValueError("dropout_p needs a residual: it is what dropout(x) is added to")
    key = None if seed is None else dropout_key(dropout_p, seed, offset)
    if len(shape) > 1:
        x, residual = (None if t is None else t.flatten(-len(shape)) for t in (x, residual))  # type: ignore[assignment]
        weight, bias = (None if t is None else t.flatten() for t in (weight, bias))
    return Norm(x, residual, weight, bias, eps, kind, dropout_p, key)


def sizes(call: Norm) -> tuple[int, ...]:
    """Rows and columns."""
    return math.prod(call.x.shape[:-1]), call.x.shape[-1]


def options(call: Norm) -> tuple[str, ...]:
    words = (
        call.kind,
        call.residual is not None and "residual",
        call.dropout_p > 0.0 and "dropout",
        call.x.shape[-1] > LONG and "long",
    )
    return tuple(word for word in words if word)


def _checked_shape(normalized_shape: Any) -> tuple[int, ...]:
    if isinstance(normalized_shape, int | torch.SymInt):
        return (normalized_shape,)  # type: ignore[return-value]
    if not isinstance(normalized_shape, Sequence) or isinstance(normalized_shape, str | bytes):
        raise TypeError(
            f"normalized_shape must be an int or a sequence of ints, not {kind_of(normalized_shape)}"
        )
    for size in normalized_shape:
        if not isinstance(size, int | torch.SymInt):
            raise TypeError(f"normalized_shape must hold ints, not {kind_of(size)}")
    return tuple(normalized_shape)
