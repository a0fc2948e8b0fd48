"""What the feed-forward block is called with, forward and backward, and what comes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bigkern.core.checks import check_choice, check_dense, check_eps, check_flag, kind
from bigkern.core.dropout import check_dropout, drawn_key, dropout_key
from bigkern.core.library import plain
from bigkern.core.op import Call, Sum

Norm = Literal["layer", "rms", "none"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu"]
Placement = Literal["pre", "post"]
Save = Literal["preactivation", "input"]

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu")
GATED = {"swiglu": "silu", "geglu": "gelu"}  # gated activation -> what it applies to the gate


@dataclass(slots=True)
class LayernormFfn(Call):
    """``y = x + drop(drop(act(norm(x) @ w1.T + b1)) @ w2.T + b2)``, post-norm, or without a norm."""

    x: Tensor  # [..., D]
    w1: Tensor  # [F, D], gated [2F, D]
    b1: Tensor | None
    w2: Tensor  # [D, F]
    b2: Tensor | None
    norm_weight: Tensor | None  # [D]
    norm_bias: Tensor | None  # [D]
    dropout_key: Tensor | None  # until drawn None without a seed
    norm: str
    activation: str
    placement: str
    residual: bool
    eps: float
    dropout_p: float
    hidden_dropout_p: float
    save: str  # "nothing" where no backward can follow


class Result(NamedTuple):
    y: Tensor  # [..., D]
    s: Tensor | None  # [M, D], post: the norm's input
    mean: Tensor | None  # [M]
    rstd: Tensor | None  # [M]
    preactivation: Tensor | None  # [M, F], gated [M, 2F]


@dataclass(slots=True)
class LayernormFfnBackward(Call):
    dy: Tensor
    x: Tensor
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    dropout_key: Tensor | None
    s: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
    preactivation: Tensor | None  # without it the forward is computed again
    norm: str
    activation: str
    placement: str
    residual: bool
    eps: float
    dropout_p: float
    hidden_dropout_p: float
    wanted: list[bool]  # of each gradient
    w1_sum: Sum = None  # fp32: dw1 is added to it, and not returned
    w2_sum: Sum = None

    save = "preactivation"

    def forward(self) -> LayernormFfn:
        """The forward's call, which saves what a backward reads."""
        return LayernormFfn(*LayernormFfn.flat(self))


class Gradients(NamedTuple):
    dx: Tensor | None
    dw1: Tensor | None
    db1: Tensor | None
    dw2: Tensor | None
    db2: Tensor | None
    dnorm_weight: Tensor | None
    dnorm_bias: Tensor | None


OPERANDS = ("x", "w1", "b1", "w2", "b2", "norm_weight", "norm_bias")  # those that have gradients


def bind(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm: str = "layer",
    activation: str = "gelu",
    placement: str = "pre",
    residual: bool = True,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    hidden_dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    save: str = "preactivation",
) -> LayernormFfn:
    """Check the public function's arguments."""
    tensors = (x, w1, b1, w2, b2, norm_weight, norm_bias)
    words = (norm, activation, placement)
    call = LayernormFfn(*tensors, None, *words, residual, eps, dropout_p, hidden_dropout_p, save)
    check_block(call)
    check_choice("save", save, ("preactivation", "input"))
    call.dropout_p = check_dropout(dropout_p)
    call.hidden_dropout_p = check_dropout(hidden_dropout_p, "hidden_dropout_p")
    if seed is not None:
        call.dropout_key = dropout_key(max(call.dropout_p, call.hidden_dropout_p), seed, offset)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        call.save = "nothing"
    return call


def check_block(call: Any, weights_like_x: bool = True) -> None:
    """The operands of a call, of frozen weights too, fit each other and the block."""
    norm, activation = call.norm, call.activation
    check_choice("norm", norm, ("layer", "rms", "none"))
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("placement", call.placement, ("pre", "post"))
    check_flag("residual", call.residual)
    call.eps = check_eps(call.eps)
    if norm != "layer" and call.norm_bias is not None:
        raise ValueError(f"norm_bias must be None for norm={norm!r}")
    if norm == "none" and call.norm_weight is not None:
        raise ValueError("norm_weight must be None for norm='none'")
    x, w2 = call.x, call.w2
    operands = {name: getattr(call, name) for name in OPERANDS}
    for name, tensor in operands.items():
        if tensor is not None or name in ("x", "w1", "w2"):
            _check_tensor(name, tensor, x, weights_like_x or name not in ("w1", "w2"))
    if x.dim() == 0 or w2.dim() == 0:
        raise ValueError(f"x must be [..., D] and w2 [D, F], not {tuple(x.shape)} and {tuple(w2.shape)}")
    D, F = x.shape[-1], w2.shape[-1]
    rows = 2 * F if activation in GATED else F
    shapes = {"w2": (D, F), "w1": (rows, D), "b1": (rows,), "b2": (D,)}
    for name, shape in {**shapes, "norm_weight": (D,), "norm_bias": (D,)}.items():
        tensor = operands[name]
        if tensor is not None and tensor.shape != shape:
            given = f"x {tuple(x.shape)}, w2 {tuple(w2.shape)} and activation {activation}"
            raise ValueError(f"{name} must be {shape} to match {given}, not {tuple(tensor.shape)}")


def _check_tensor(name: str, tensor: Any, x: Any, like_x: bool) -> None:
    check_dense(name, tensor)
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, not {tensor.device}")
    if not like_x:
        return
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, not {tensor.dtype}")
    if tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name} must have x's dtype {x.dtype}, not {tensor.dtype}")


def draw(call: LayernormFfn) -> None:
    """Where there is dropout and no seed was given, a key from torch's generator."""
    if call.dropout_key is None and (call.dropout_p > 0.0 or call.hidden_dropout_p > 0.0):
        call.dropout_key = drawn_key()


def check_sums(weight_grads: Any, call: LayernormFfn) -> None:
    if not isinstance(weight_grads, tuple | list) or len(weight_grads) != 2:
        raise ValueError(f"weight_grads must be two tensors, for w1 and w2, not {weight_grads!r}")
    for i, (total, weight) in enumerate(zip(weight_grads, (call.w1, call.w2), strict=True)):
        name = f"weight_grads[{i}]"
        if not isinstance(total, Tensor) or total.dtype != torch.float32:
            raise ValueError(f"{name} must be a float32 tensor, not {kind(total)}")
        check_dense(name, total)
        if total.shape != weight.shape or total.device != weight.device or not total.is_contiguous():
            raise ValueError(f"{name} must be contiguous, {tuple(weight.shape)} and on {weight.device}")
    if not plain(*call.flat()[:7]):
        raise RuntimeError("weight_grads needs eager mode: no torch.compile, no transform of torch.func")


def sizes(call: LayernormFfn) -> tuple[int, ...]:
    """Rows, D and F."""
    return math.prod(call.x.shape[:-1]), *call.w2.shape


def options(call: LayernormFfn) -> tuple[str, ...]:
    drops = call.dropout_p > 0.0 or call.hidden_dropout_p > 0.0
    words = call.activation in GATED and "gated", drops and "dropout", call.save == "input" and "checkpoint"
    return tuple(word for word in words if word)
