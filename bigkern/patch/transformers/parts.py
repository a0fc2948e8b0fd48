"""Feed-forward blocks of transformers as one op: their parts, whether the op can stand in, and the call.

:mod:`bigkern.patch.transformers.blocks` says of each block which of its modules is which part.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import pytorch_utils
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation

from bigkern.core import registry
from bigkern.nn import LayerNorm
from bigkern.nn.frozen import FrozenFeedForward, explain_frozen
from bigkern.nn.linear import PLAIN
from bigkern.nn.transformer import activation_name, active, hooked
from bigkern.ops.layernorm_ffn.call import Activation, Norm, Placement
from bigkern.ops.layernorm_ffn.frozen import Weights
from bigkern.ops.linear import linear

ACTIVATIONS: dict[type, Activation] = {
    GELUActivation: "gelu",
    GELUTanh: "gelu_tanh",
    NewGELUActivation: "gelu_tanh",
    SiLUActivation: "silu",
}
MEASURED_FROM = 2  # rows: what `bigkern tune` measures reaches down to these
JOINING_FASTER_FROM = 512  # rows on a CPU: where gate and up must be joined first

GATED: dict[Activation | None, Activation] = {"silu": "swiglu", "gelu": "geglu"}


class Conv1D(pytorch_utils.Conv1D):
    """GPT-2's linear layer, whose weight lies transposed."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.t(), self.bias)

    def explain_op(self, tokens: int) -> tuple[str, registry.Explanation | None, str]:
        x = self.weight.new_empty(tokens, self.nx)
        return "linear", registry.explain("linear", x, self.weight.t(), self.bias), ""


LINEARS = (*PLAIN, pytorch_utils.Conv1D, Conv1D)  # whose forward is known


class FunctionalDropout:
    """A dropout that a layer has as a number, and no module."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.layer, self.name = layer, name

    @property
    def p(self) -> float:
        return cast(float, getattr(self.layer, self.name))

    @property
    def training(self) -> bool:
        return self.layer.training


class Parts(NamedTuple):
    """The modules of a feed-forward block, by what they are to :func:`bigkern.layernorm_ffn`."""

    up: nn.Module
    activation: Any
    down: nn.Module
    gate: nn.Module | None = None
    joined: bool = False  # the rows of up are those of gate and up
    hidden_dropout: nn.Module | FunctionalDropout | None = None
    dropout: nn.Module | FunctionalDropout | None = None
    norm: nn.Module | None = None
    norm_types: tuple[type, ...] = (nn.LayerNorm, LayerNorm)  # one of which the norm must be exactly
    kind: Norm = "layer"
    placement: Placement = "pre"
    residual: bool = False
    around: tuple[nn.Module, ...] = ()  # modules that hold the others and are called, too

    def linears(self) -> tuple[nn.Module, ...]:
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)

    def layers(self) -> tuple[nn.Module, ...]:
        """Those that have parameters."""
        return self.linears() if self.norm is None else (*self.linears(), self.norm)

    def dropouts(self) -> tuple[Any, ...]:
        return tuple(m for m in (self.hidden_dropout, self.dropout) if m is not None)

    def op_activation(self) -> Activation | None:
        name = ACTIVATIONS.get(type(self.activation)) or activation_name(self.activation)
        return GATED.get(name) if self.joined or self.gate is not None else name


# ---- whether the op can stand in -------------------------------------------------------------------


def unfit(x: Tensor, *parameters: Tensor | None) -> str | None:
    """Why kernels would not do with x and these parameters, or None if they would."""
    if not (x.is_cpu or x.is_cuda):
        return f"tensors are on {x.device.type}"
    for parameter in parameters:
        if parameter is None:
            continue
        if type(parameter) is not nn.Parameter and type(parameter) is not Tensor:
            return f"a parameter is a {type(parameter).__name__}"
        if parameter.dtype != x.dtype:
            return f"a parameter is {parameter.dtype}, the input {x.dtype}"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on"
    return None


def stock_reason(parts: Parts, x: Tensor) -> str | None:
    """Why the fused op cannot stand in for these parts on x, or None if it can."""
    parameters = [p for m in parts.layers() for p in (m.weight, getattr(m, "bias", None))]
    return other_block(parts) or unfit(x, *parameters)  # type: ignore[arg-type]


def freezing_reason(parts: Parts) -> str | None:
    """Why these parts' weights cannot be frozen, or None if they can."""
    weight = cast(Tensor, parts.up.weight)
    parameters = [p for m in parts.layers() for p in (m.weight, getattr(m, "bias", None))]
    return other_block(parts) or unfit(weight, *parameters)  # type: ignore[arg-type]


def other_block(parts: Parts) -> str | None:
    """Why these parts do not make the block that the op computes, or None if they do."""
    norms = () if parts.norm is None else (parts.norm,)
    for layer in parts.linears():
        if type(layer) not in LINEARS:
            return f"a {type(layer).__name__} in the place of a linear layer"
    if parts.op_activation() is None:
        return "an activation that the op does not have"
    if any(type(dropout) not in (nn.Dropout, FunctionalDropout) for dropout in parts.dropouts()):
        return "a dropout is not a plain nn.Dropout"
    if any(active(dropout) >= 1.0 for dropout in parts.dropouts()):
        return "a dropout that drops everything"
    if any(type(norm) not in parts.norm_types for norm in norms):
        return f"the norm is a {type(parts.norm).__name__}"
    activations = (parts.activation,) if isinstance(parts.activation, nn.Module) else ()
    dropouts = [dropout for dropout in parts.dropouts() if isinstance(dropout, nn.Module)]
    if hooked(*parts.linears(), *dropouts, *norms, *activations, *parts.around):
        return "a hook watches a part of the feed-forward block"
    return None


def few_rows(x: Tensor, width: int, joins: bool) -> str | None:
    """Why the op would not fuse x of so few rows: a cheap question, asked before a look at the block."""
    least = JOINING_FASTER_FROM if joins else MEASURED_FROM
    if x.is_cpu and x.numel() < least * width and not registry.forced():
        return f"stock is faster below {least} rows"
    return None


def joining_reason(parts: Parts, x: Tensor) -> str | None:
    """Why gate and up are better left two weights, or None.

    Joining them is a copy: 2 F D elements read, written, and kept for the backward. On a CPU that is little
    beside the products of the rows from which on the op fuses at all. On a GPU, where products cost next to
    nothing, fusing saves as much traffic with 2 D rows. Like a backend's, this opinion ends where
    :func:`bigkern.use` is in force.
    """
    if parts.gate is None:
        return None
    D = x.shape[-1]
    if not x.is_cpu and x.numel() < 2 * D * D and not registry.forced():
        return f"joining gate and up costs more than fusing saves below {2 * D} rows"
    op, one = registry.get("layernorm_ffn"), parts._replace(gate=None)
    if op.resolve(op.bind(x, *operands(one), **options(one))).by_torch:
        return "stock PyTorch would run the op, and needs no joined weights"
    return None


def unfused(op: str, reason: str) -> registry.Explanation:
    """What to explain where the stock forward is the better choice."""
    return registry.Explanation(op, [registry.Choice("torch", True, reason)])


# ---- the call --------------------------------------------------------------------------------------


def operands(parts: Parts) -> tuple[Any, ...]:
    """The op's w1, b1, w2, b2, norm_weight and norm_bias."""
    up, down, gate, norm = cast(tuple[Any, ...], (parts.up, parts.down, parts.gate, parts.norm))
    w1, w2 = (
        linear.weight.t() if isinstance(linear, pytorch_utils.Conv1D) else linear.weight
        for linear in (up, down)
    )
    b1 = up.bias
    if gate is not None:
        w1 = torch.cat((gate.weight, w1))
        b1 = None if b1 is None else torch.cat((gate.bias, b1))
    affine = (None, None) if norm is None else (norm.weight, getattr(norm, "bias", None))
    return w1, b1, w2, down.bias, *affine


def options(parts: Parts) -> dict[str, Any]:
    """The op's keyword arguments."""
    eps = "eps" if parts.kind == "layer" else "variance_epsilon"
    return {
        "norm": "none" if parts.norm is None else parts.kind,
        "activation": parts.op_activation(),
        "placement": parts.placement,
        "residual": parts.residual,
        "eps": 0.0 if parts.norm is None else getattr(parts.norm, eps),
        "dropout_p": _rate(parts.dropout),
        "hidden_dropout_p": _rate(parts.hidden_dropout),
    }


def _rate(dropout: Any) -> float:
    return 0.0 if dropout is None else active(dropout)


class FrozenParts(nn.Module):
    """The linear layers of a block as frozen weights, gate and up joined; its norm stays where it is."""

    def __init__(self, parts: Parts, weights: Weights) -> None:
        super().__init__()
        w1, b1, w2, b2, *_ = operands(parts)
        if parts.gate is not None and b1 is not None:
            b1 = nn.Parameter(b1.detach())  # joined: a new one
        self._options = {name: v for name, v in options(parts).items() if "dropout" not in name}
        self._activation = self._options.pop("activation")
        self._rest = [parts.norm, *parts.dropouts()]  # in a list: they are registered elsewhere
        self.block = FrozenFeedForward(w1, b1, w2, b2, self._activation, weights)

    def forward(self, x: Tensor) -> Tensor:
        norm, *dropouts = self._rest
        if any(active(dropout) > 0.0 for dropout in dropouts):
            raise RuntimeError("a frozen block has no dropout: call eval()")
        affine = () if norm is None else (norm.weight, getattr(norm, "bias", None))
        return cast(Tensor, self.block(x, *affine, **self._options))

    def explain(self, tokens: int) -> registry.Explanation:
        """Of the block without its norm."""
        first, second = self.block.linear1, self.block.linear2
        like = torch.empty(0, device=first.weight.device) if first.bias is None else first.bias
        x = like.new_empty(tokens, first.in_features)
        return explain_frozen(x, first, second, self._activation)
