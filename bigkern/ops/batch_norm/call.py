"""What the batch_norm op is called with, forward and backward, and what comes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bigkern.core.checks import (
    check_dense,
    check_eps,
    check_flag,
    check_number,
    check_tensor,
    check_written,
)
from bigkern.core.library import KERNEL_DTYPES
from bigkern.core.op import Call

Activation = Literal["relu"]


@dataclass(slots=True)
class BatchNorm(Call):
    """``y = relu((x - mean) / sqrt(var + eps) * weight + bias + residual)``."""

    x: Tensor  # [N, C, *]
    residual: Tensor | None  # as x
    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    mean: Tensor | None  # [C]; None in training, where x's own are used
    var: Tensor | None  # [C]; likewise
    eps: float
    relu: bool

    @property
    def training(self) -> bool:
        return self.mean is None


@dataclass(slots=True)
class Step(BatchNorm):
    """A public call, with the running statistics that training moves."""

    running_mean: Tensor | None  # [C]
    running_var: Tensor | None  # [C]
    momentum: float


class Result(NamedTuple):
    y: Tensor  # as x
    mean: Tensor | None  # [C], where x's own are used
    var: Tensor | None  # [C]; likewise


@dataclass(slots=True)
class BatchNormBackward(Call):
    dy: Tensor
    x: Tensor
    y: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float
    relu: bool
    training: bool
    want_residual: bool
    want_weight: bool
    want_bias: bool


class Gradients(NamedTuple):
    dx: Tensor
    dresidual: Tensor | None  # with a ReLU; else it is dy
    dweight: Tensor | None
    dbias: Tensor | None


def bind(
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
) -> Step:
    """Check a public call."""
    check_dense("x", x)
    check_flag("training", training)
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, not {x.dtype}")
    if x.dim() < 2:
        raise RuntimeError(f"x must be [N, C, *], not of shape {tuple(x.shape)}")
    if (running_mean is None) != (running_var is None) and training:
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    channels = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, tensor in channels.items():
        if tensor is not None:
            _check_channels(name, tensor, x)
            if training and name.startswith("running"):
                check_written(name, tensor)
        elif not training and name.startswith("running"):
            raise RuntimeError(f"{name} must be defined in evaluation mode")
    if residual is not None:
        check_tensor("residual", residual, x)
        if residual.dtype not in (*KERNEL_DTYPES, torch.float64):
            raise TypeError(f"residual must be floating point, not {residual.dtype}")
        if residual.shape != x.shape:
            raise RuntimeError(f"residual must have x's shape {tuple(x.shape)}, not {tuple(residual.shape)}")
    if training and x.shape[0] * math.prod(x.shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    check_number("momentum", momentum, "finite")
    eps = check_eps(eps)
    if activation is not None and activation != "relu":
        raise ValueError(f"activation must be None or 'relu', not {activation!r}")
    mean, var = (None, None) if training else (running_mean, running_var)
    moved = running_mean, running_var, momentum
    return Step(x, residual, weight, bias, mean, var, eps, activation == "relu", *moved)


def _check_channels(name: str, tensor: Any, x: Tensor) -> None:
    check_tensor(name, tensor, x)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, not {tensor.dtype}")
    if tensor.numel() != x.shape[1]:
        raise RuntimeError(
            f"{name} should contain {x.shape[1]} elements not {tensor.numel()}, as x has channels"
        )
    if tensor.dim() != 1:
        raise RuntimeError(f"{name} must have shape {(x.shape[1],)}, not {tuple(tensor.shape)}")


def sizes(call: BatchNorm) -> tuple[int, ...]:
    """Rows and channels."""
    C = call.x.shape[1]
    return call.x.numel() // max(C, 1), C


def options(call: BatchNorm) -> tuple[str, ...]:
    words = call.training and "statistics", call.residual is not None and "residual", call.relu and "relu"
    return tuple(word for word in words if word)
