"""What the linear op is called with, forward and backward, and what comes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from bigkern.core.checks import misfit_beside
from bigkern.core.op import Call


@dataclass(slots=True)
class Linear(Call):
    """``y = x @ weight.T + bias``. Judging the arguments is left to torch, whose function takes more."""

    x: Tensor  # [..., K]
    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]


class Result(NamedTuple):
    y: Tensor  # [..., N]


@dataclass(slots=True)
class LinearBackward(Call):
    dy: Tensor
    x: Tensor
    weight: Tensor
    want_x: bool
    want_weight: bool


class Gradients(NamedTuple):
    dx: Tensor | None
    dweight: Tensor | None


def bind(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Linear:
    return Linear(x, weight, bias)


def sizes(call: Linear) -> tuple[int, ...]:
    """M, N, K."""
    return math.prod(call.x.shape[:-1]), *call.weight.shape


def options(call: Linear) -> tuple[str, ...]:
    return () if call.weight.stride(1) == 1 else ("transposed",)


def misfit(x: Any, weight: Any, bias: Any) -> str | None:
    """Which argument torch cannot mean, what it was and what it must be."""
    for name, tensor in [("x", x), ("weight", weight), *([] if bias is None else [("bias", bias)])]:
        if (wrong := misfit_beside(name, tensor, x, "x")) is not None:
            return wrong
    if x.dim() == 0:
        return "x must be [..., K], not a scalar"
    if weight.dim() not in (1, 2) or weight.shape[-1] != x.shape[-1]:
        return f"weight must be [N, {x.shape[-1]}] to match x {tuple(x.shape)}, not {tuple(weight.shape)}"
    if bias is not None:
        return f"bias must be [{weight.shape[0]}] to match weight, not {tuple(bias.shape)}"
    return None
