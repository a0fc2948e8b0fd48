"""Problems of the feed-forward block: sizes and forms of the models that have one."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bigkern.core.dropout import HIDDEN, OUTPUT, dropout_key, dropped
from bigkern.core.problem import Inputs, Problem
from bigkern.ops import layernorm_ffn as op
from bigkern.ops.layernorm_ffn.call import GATED
from bigkern.ops.layernorm_ffn.stock import activate

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu")
NORMS = ("layer", "rms", "none")
PLACEMENTS = ("pre", "post")
NAMES = ("x", "w1", "b1", "w2", "b2", "norm_weight", "norm_bias")
SEED = 5


def layernorm_ffn(
    M: int,
    D: int,
    hidden: int,
    activation: str = "gelu",
    placement: str = "pre",
    norm: str = "layer",
    save: str = "preactivation",
    name: str = "",
    *,
    biases: bool | None = None,
    residual: bool = True,
    dropout: float = 0.0,
    hidden_dropout: float = 0.0,
    without: Collection[str] = (),
    strided: Collection[str] = (),
) -> Problem:
    """Biases belong to LayerNorm unless asked for, as in the models that use one or the other.

    ``without`` names optional inputs that are left out, ``strided`` inputs that are every second number.
    """
    rows = 2 * hidden if activation in GATED else hidden
    absent = {name for name in NAMES if name in without}
    if not (norm == "layer" if biases is None else biases):
        absent |= {"b1", "b2", "norm_bias"}
    absent |= {"layer": set(), "rms": {"norm_bias"}, "none": {"norm_weight", "norm_bias"}}[norm]
    every = ((M, D), (rows, D), (rows,), (D, hidden), (D,), (D,), (D,))
    shapes = {n: shape for n, shape in zip(NAMES, every, strict=True) if n not in absent}
    strided = [n for n in shapes if n in strided]
    options: dict[str, Any] = {"activation": activation, "placement": placement, "norm": norm, "save": save}
    options |= {} if residual else {"residual": False}
    if dropout or hidden_dropout:
        options |= {"dropout_p": dropout, "hidden_dropout_p": hidden_dropout, "seed": SEED, "offset": 3}

    def ordered(inputs: Inputs) -> tuple[Any, ...]:
        return tuple(inputs.get(name) for name in NAMES)

    def normalise(s: Tensor, weight: Any, bias: Any) -> Tensor:
        if norm == "none":
            return s
        return F.layer_norm(s, (D,), weight, bias) if norm == "layer" else F.rms_norm(s, (D,), weight, 1e-5)

    def stock(inputs: Inputs) -> Tensor:
        x, w1, b1, w2, b2, *affine = ordered(inputs)
        key = dropout_key(max(dropout, hidden_dropout), SEED, 3)
        n = normalise(x, *affine) if placement == "pre" else x
        a = dropped(activate(F.linear(n, w1, b1), activation), key, hidden_dropout, HIDDEN)
        y = dropped(F.linear(a, w2, b2), key, dropout, OUTPUT)
        y = x + y if residual else y
        return y if placement == "pre" else normalise(y, *affine)

    words = [name, f"{M}x{D}x{hidden}", activation, placement, "" if norm == "layer" else norm]
    words += ["" if save == "preactivation" else f"save {save}", "" if residual else "no residual"]
    words += [f"dropout {dropout:g}, {hidden_dropout:g}" if dropout or hidden_dropout else ""]
    words += ["without " + ", ".join(sorted(absent)) if absent and (without or biases is not None) else ""]
    words += ["strided " + ", ".join(strided) if strided else ""]
    return Problem(
        "layernorm_ffn",
        " ".join(filter(None, words)),
        {n: (*shape[:-1], 2 * shape[-1]) if n in strided else shape for n, shape in shapes.items()},
        op.layernorm_ffn,
        lambda inputs: (ordered(inputs), options),
        stock if save == "preactivation" else partial(checkpoint, stock, use_reentrant=False),
        views={n: lambda t: t[..., ::2] for n in strided},
        flops=2 * M * D * (rows + hidden),
        elements=2 * M * D + D * (rows + hidden),
        parameters=tuple(name for name in shapes if name != "x"),
        kernels=("cpu", "cpu_library", "triton", "triton_library", "cuda"),
    )


def forms() -> list[Problem]:
    either = (True, False)
    sizes = ((1, 1, 1), (7, 7, 63), (9, 63, 7), (2, 129, 1023), (64, 33, 129))
    dropouts = ((0.3, 0.0), (0.0, 0.4), (0.25, 0.5))
    return [
        *(
            layernorm_ffn(9, 24, 40, a, p, n, biases=biases, residual=residual)
            for a, p, n in itertools.product(ACTIVATIONS, PLACEMENTS, NORMS)
            for biases, residual in itertools.product(either, either)
        ),
        *(
            layernorm_ffn(15, 24, 40, a, p, n, biases=True, residual=r, dropout=y, hidden_dropout=h)
            for a, p, n in itertools.product(("gelu", "relu", "swiglu"), PLACEMENTS, NORMS)
            for r, (y, h) in itertools.product(either, dropouts)
        ),
        *(layernorm_ffn(*size, a, p) for size in sizes for a in ("gelu", "swiglu") for p in PLACEMENTS),
        *(layernorm_ffn(40, 128, 512, a) for a in ("gelu", "swiglu")),
    ]


def drawn(draw: random.Random, largest: int) -> Problem:
    M, D, hidden = (draw.choice((1, 7, draw.randint(1, largest))) for _ in range(3))
    return layernorm_ffn(
        M,
        D,
        hidden,
        draw.choice(ACTIVATIONS),
        draw.choice(PLACEMENTS),
        draw.choice(NORMS),
        draw.choice(("preactivation", "input")),
        biases=True,
        residual=draw.random() < 0.7,
        dropout=draw.choice((0.0, 0.0, 0.1, 0.5)),
        hidden_dropout=draw.choice((0.0, 0.0, 0.2)),
        without=[name for name in ("b1", "b2", "norm_weight", "norm_bias") if draw.random() < 0.3],
        strided=[name for name in NAMES if draw.random() < 0.2],
    )


def small() -> list[Problem]:
    return [
        layernorm_ffn(33, 64, 256),
        layernorm_ffn(63, 96, 160, "swiglu"),
        layernorm_ffn(17, 128, 192, "relu", "post"),
        layernorm_ffn(65, 64, 96, "swiglu", norm="rms", save="input"),
    ]


def thorough() -> list[Problem]:
    return [
        *(layernorm_ffn(129, 256, 520, a, p) for a in ACTIVATIONS for p in PLACEMENTS),
        *(layernorm_ffn(129, 256, 520, a, dropout=0.1, hidden_dropout=0.2) for a in ("gelu", "swiglu")),
        layernorm_ffn(65, 256, 520, placement="post", dropout=0.1, hidden_dropout=0.2),
        layernorm_ffn(1024, 1024, 4096),
    ]


def grid() -> list[Problem]:
    widths = ((128, 2048), (512, 2048), (1024, 64))  # D, and the most rows that take a moment
    sizes = [(M, D, 4 * D) for D, most in widths for M in (8, 64, 512, 2048) if most >= M]
    gated = [(M, D, F * 2 // 3) for M, D, F in sizes if M * D * F <= 1 << 29]
    return [layernorm_ffn(*size) for size in sizes] + [layernorm_ffn(*size, "swiglu") for size in gated]


def large() -> list[Problem]:
    sizes = ((16384, 768, 3072), (8192, 4096, 14336), (65536, 1024, 4096))
    return [layernorm_ffn(*size, activation) for size in sizes for activation in ("gelu", "swiglu")]


def typical() -> Problem:
    return layernorm_ffn(512, 768, 3072)
