"""Problems of the feed-forward block: sizes and forms of the models that have one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bigkern.core.problem import Inputs, Problem
from bigkern.ops import layernorm_ffn as op


def layernorm_ffn(
    M: int,
    D: int,
    hidden: int,
    activation: str = "gelu",
    placement: str = "pre",
    norm: str = "layer",
    save: str = "preactivation",
    name: str = "",
) -> Problem:
    """Biases belong to LayerNorm, as they do in the models that use one or the other."""
    rows = 2 * hidden if activation in ("swiglu", "geglu") else hidden
    biases = norm == "layer"
    shapes: dict[str, tuple[int, ...]] = {
        "x": (M, D),
        "w1": (rows, D),
        "w2": (D, hidden),
        "norm_weight": (D,),
    }
    shapes |= {"b1": (rows,), "b2": (D,), "norm_bias": (D,)} if biases else {}
    options = {"activation": activation, "placement": placement, "norm": norm, "save": save}

    def ordered(inputs: Inputs) -> tuple[Any, ...]:
        names = ("x", "w1", "b1", "w2", "b2", "norm_weight", "norm_bias")
        return tuple(inputs.get(name) for name in names)

    def stock(inputs: Inputs) -> Tensor:
        x, w1, b1, w2, b2, weight, bias = ordered(inputs)

        def normalise(s: Tensor) -> Tensor:
            return F.layer_norm(s, (D,), weight, bias) if biases else F.rms_norm(s, (D,), weight, 1e-5)

        n = normalise(x) if placement == "pre" else x
        y = x + F.linear(_activate(F.linear(n, w1, b1), activation), w2, b2)
        return y if placement == "pre" else normalise(y)

    words = [name, f"{M}x{D}x{hidden}", activation, placement, "" if biases else norm]
    words += ["" if save == "preactivation" else f"save {save}"]
    return Problem(
        "layernorm_ffn",
        " ".join(filter(None, words)),
        shapes,
        op.layernorm_ffn,
        lambda inputs: (ordered(inputs), options),
        stock if save == "preactivation" else partial(checkpoint, stock, use_reentrant=False),
        flops=2 * M * D * (rows + hidden),
        elements=2 * M * D + D * (rows + hidden),
        parameters=tuple(name for name in shapes if name != "x"),
    )


def _activate(h: Tensor, activation: str) -> Tensor:
    if activation in ("swiglu", "geglu"):
        gate, up = h.chunk(2, dim=-1)
        return _activate(gate, "silu" if activation == "swiglu" else "gelu") * up
    if activation == "gelu_tanh":
        return F.gelu(h, approximate="tanh")
    return getattr(F, activation)(h)  # type: ignore[no-any-return]


def small() -> list[Problem]:
    return [
        layernorm_ffn(33, 64, 256),
        layernorm_ffn(63, 96, 160, "swiglu"),
        layernorm_ffn(17, 128, 192, "relu", "post"),
        layernorm_ffn(65, 64, 96, "swiglu", norm="rms", save="input"),
    ]


def thorough() -> list[Problem]:
    activations = ("gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu")
    return [
        *(layernorm_ffn(129, 256, 520, a, p) for a in activations for p in ("pre", "post")),
        layernorm_ffn(1024, 1024, 4096),
    ]


def typical() -> Problem:
    return layernorm_ffn(512, 768, 3072)
