"""Problems of frozen weights: a feed-forward block, and a stack of them, as a model in inference runs it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from bigkern.core.problem import Call, Inputs, Problem
from bigkern.ops.layernorm_ffn import frozen as op
from bigkern.ops.layernorm_ffn import frozen_reference as reference
from bigkern.ops.layernorm_ffn.call import GATED
from bigkern.ops.layernorm_ffn.frozen_call import FrozenWeight, bind
from bigkern.ops.layernorm_ffn.problems import ACTIVATIONS, NORMS, PLACEMENTS
from bigkern.ops.layernorm_ffn.stock import activate

Weights = op.Weights
KERNELS = {
    "packed": ("cpu", "cpu_library"),
    "int8": ("cpu", "cpu_library", "triton"),
    "fp8": ("triton",),
}


def frozen(
    M: int,
    D: int,
    hidden: int,
    weights: Weights,
    activation: str = "gelu",
    *,
    norm: str = "",
    biases: bool | None = None,
    **options: Any,
) -> Problem:
    """A pre-norm block, with LayerNorm and biases, or gated with RMSNorm and none, unless asked otherwise."""
    return _problem(M, D, hidden, weights, activation, 1, norm, biases, options)


def stack(M: int, D: int, hidden: int, weights: Weights, activation: str, blocks: int) -> Problem:
    """So many blocks one after the other: their weights come from memory, not from a cache."""
    return _problem(M, D, hidden, weights, activation, blocks, "", None, {})


def stock(inputs: Inputs, activation: str) -> Tensor:
    """The blocks on torch's functions, with the weights that were frozen."""
    x, i = inputs["x"], 0
    while f"w1_{i}" in inputs:
        w1, b1, w2, b2, *affine = _weights(inputs, i)
        D = x.shape[-1:]
        n = F.rms_norm(x, D, affine[0], 1e-5) if activation in GATED else F.layer_norm(x, D, *affine)
        x = x + F.linear(activate(F.linear(n, w1, b1), activation), w2, b2)
        i += 1
    return x


def _problem(
    M: int,
    D: int,
    hidden: int,
    weights: Weights,
    activation: str,
    blocks: int,
    norm: str,
    biases: bool | None,
    options: dict[str, Any],
) -> Problem:
    gated = activation in GATED
    rows = 2 * hidden if gated else hidden
    norm = norm or ("rms" if gated else "layer")
    biases = not gated if biases is None else biases
    words = [f"{blocks} blocks of" if blocks > 1 else "", f"{M}x{D}x{hidden} {activation} {weights}"]
    words += [
        "" if norm == ("rms" if gated else "layer") else norm,
        "" if biases != gated else f"biases {biases}",
    ]
    words += [f"{name} {value}" for name, value in options.items()]
    given = {"activation": activation, "norm": norm, **options}
    shapes: dict[str, tuple[int, ...]] = {"x": (M, D)}
    for i in range(blocks):
        shapes |= {f"w1_{i}": (rows, D), f"w2_{i}": (D, hidden)}
        shapes |= {f"norm_{i}_weight": (D,)} if norm != "none" else {}
        shapes |= {f"b1_{i}": (rows,), f"b2_{i}": (D,)} if biases else {}
        shapes |= {f"norm_{i}_bias": (D,)} if biases and norm == "layer" else {}
    kept = WeakIdKeyDictionary()  # each weight is frozen once, when it is first seen

    def frozen_once(w: Tensor, gated: bool) -> FrozenWeight:
        if w not in kept:
            kept[w] = _frozen(w, weights, gated)
        return kept[w]  # type: ignore[no-any-return]

    def block(x: Tensor, inputs: Inputs, i: int) -> Call:
        w1, b1, w2, b2, *affine = _weights(inputs, i)
        return (x, frozen_once(w1, gated), b1, frozen_once(w2, False), b2, *affine), given

    def through(one: Callable[..., Tensor], inputs: Inputs) -> Tensor:
        x = inputs["x"]
        for i in range(blocks):
            arguments, options = block(x, inputs, i)
            x = one(*arguments, **options)
        return x

    def by_reference(*arguments: Any, **options: Any) -> Tensor:
        return reference.frozen_layernorm_ffn(bind(*arguments, **options))

    one = blocks == 1
    return Problem(
        "frozen_layernorm_ffn",
        " ".join(filter(None, words)),
        shapes,
        op.frozen_layernorm_ffn if one else lambda inputs: through(op.frozen_layernorm_ffn, inputs),
        lambda inputs: block(inputs["x"], inputs, 0) if one else ((inputs,), {}),
        lambda inputs: through(by_reference, inputs),
        flops=2 * M * D * (rows + hidden) * blocks,
        differentiable=False,
        kernels=KERNELS[weights],
    )


def _weights(inputs: Inputs, i: int) -> tuple[Any, ...]:
    names = (f"w1_{i}", f"b1_{i}", f"w2_{i}", f"b2_{i}", f"norm_{i}_weight", f"norm_{i}_bias")
    return tuple(inputs.get(name) for name in names)


def _frozen(w: Tensor, weights: Weights, gated: bool) -> FrozenWeight:
    """As freeze_weight does; also for float64, in the same 8 bits, and e4m3 where no GPU multiplies in it."""
    if w.dtype != torch.float64 and weights != "fp8":
        return op.freeze_weight(w, weights, gated=gated)
    if weights == "packed":
        return FrozenWeight(w, None, None)
    return FrozenWeight(*reference.quantised(w.float(), op.STORED[weights]), None)


def forms() -> list[Problem]:
    """Every combination; and from one token on, since each count of rows is another path through tiles."""
    kinds: tuple[Weights, ...] = ("packed", "int8", "fp8")
    return [
        *(
            frozen(5, 24, 40, w, a, norm=n, placement=p, biases=True)
            for w, a, n, p in itertools.product(kinds, ACTIVATIONS, NORMS, PLACEMENTS)
        ),
        *(
            frozen(M, 65, 130, w, "swiglu", norm="rms", biases=M % 2 == 0, residual=M % 3 > 0)
            for w, M in itertools.product(kinds, (1, 2, 7, 13, 14, 15, 31, 63, 129))
        ),
    ]


def drawn(draw: random.Random, largest: int) -> Problem:
    M, D, hidden = (draw.choice((1, 3, 8, 16, 17, 33, 64, 100, 127)) for _ in range(3))
    kinds: tuple[Weights, ...] = ("packed", "int8", "fp8")
    return frozen(
        min(M, largest),
        min(4 * D, largest),
        min(6 * hidden, largest),
        draw.choice(kinds),
        draw.choice(ACTIVATIONS),
        norm=draw.choice(NORMS),
        biases=draw.random() < 0.5,
        placement=draw.choice(PLACEMENTS),
        residual=draw.random() < 0.5,
    )


def small() -> list[Problem]:
    return [
        frozen(5, 64, 256, "int8"),
        frozen(33, 96, 160, "int8", "swiglu"),
        frozen(17, 64, 256, "packed"),
    ]


def thorough() -> list[Problem]:
    kinds: tuple[Weights, ...] = ("int8", "fp8")
    sizes = itertools.product(kinds, (1, 16, 300), ("gelu", "swiglu"))
    return [frozen(M, 1024, 4096, weights, activation) for weights, M, activation in sizes]


def grid() -> list[Problem]:
    sizes = [(M, D, 4 * D) for M in (1, 16, 256) for D in (256, 1024)]
    stored: tuple[Weights, ...] = ("packed", "int8")
    return [frozen(*size, weights) for weights in stored for size in sizes]


def large() -> list[Problem]:
    kinds: tuple[Weights, ...] = ("int8", "fp8")
    return [frozen(M, 4096, 14336, weights, "swiglu") for weights in kinds for M in (1, 16, 256, 4096)]


def typical() -> Problem:
    return frozen(16, 768, 3072, "int8")
