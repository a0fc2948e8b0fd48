"""What the feed-forward block with frozen weights is called with, and what comes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bigkern.core.op import Call
from bigkern.ops.layernorm_ffn.call import GATED, check_block

FP8 = torch.float8_e4m3fn


class FrozenWeight(NamedTuple):
    """A weight ``[N, K]`` of a linear layer that will not change any more: see :func:`freeze_weight`."""

    values: Tensor
    scale: Tensor | None
    packed: Tensor | None


@dataclass(slots=True)
class FrozenLayernormFfn(Call):
    """``y = x + act(norm(x) @ w1.T + b1) @ w2.T + b2``, post-norm, or without a norm."""

    x: Tensor  # [..., D]
    w1: Tensor  # [F, D], gated [2F, D]
    w1_scale: Tensor | None  # [F], gated [2F]
    b1: Tensor | None
    w2: Tensor  # [D, F]
    w2_scale: Tensor | None  # [D]
    b2: Tensor | None
    norm_weight: Tensor | None  # [D]
    norm_bias: Tensor | None  # [D]
    w1_packed: Tensor | None  # in the order in which CPU kernels read it
    w2_packed: Tensor | None
    norm: str
    activation: str
    placement: str
    residual: bool
    eps: float


class FrozenResult(NamedTuple):
    y: Tensor  # [..., D]


def bind(
    x: Tensor,
    w1: FrozenWeight,
    b1: Tensor | None,
    w2: FrozenWeight,
    b2: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    norm: str = "layer",
    activation: str = "gelu",
    placement: str = "pre",
    residual: bool = True,
    eps: float = 1e-5,
) -> FrozenLayernormFfn:
    """Check the public function's arguments."""
    for name, weight in (("w1", w1), ("w2", w2)):
        if not isinstance(weight, FrozenWeight):
            raise TypeError(f"{name} must be a FrozenWeight, of freeze_weight, not {type(weight).__name__}")
    tensors = (x, w1.values, w1.scale, b1, w2.values, w2.scale, b2, norm_weight, norm_bias)
    words = (norm, activation, placement)
    call = FrozenLayernormFfn(*tensors, w1.packed, w2.packed, *words, residual, eps)
    check_block(call, weights_like_x=False)
    autocasting = torch.is_autocast_enabled(x.device.type)
    for name, (values, scale, _) in (("w1", w1), ("w2", w2)):
        if scale is None and values.dtype != x.dtype and not autocasting:
            raise TypeError(f"{name} must have x's dtype {x.dtype}, not {values.dtype}")
        if values.dtype == FP8 and x.is_cuda:
            check_fp8(x.device, f"{name}: weights")
    return call


def sizes(call: FrozenLayernormFfn) -> tuple[int, ...]:
    """Rows, D and F."""
    return math.prod(call.x.shape[:-1]), *call.w2.shape


def options(call: FrozenLayernormFfn) -> tuple[str, ...]:
    packed = call.w1_packed is not None or call.w2_packed is not None
    stored = str(call.w1.dtype).removeprefix("torch.")
    return tuple(word for word in (stored, packed and "packed", call.activation in GATED and "gated") if word)


def check_fp8(device: torch.device, name: str) -> None:
    """Refuse fp8 where no unit multiplies in it."""
    need = 'needs a GPU of compute capability 8.9 or higher; "int8" runs anywhere'
    if device.type != "cuda":
        raise ValueError(f'{name}="fp8" {need}; the device is {device}')
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise ValueError(f'{name}="fp8" {need}; {device} has {capability[0]}.{capability[1]}')
