"""Problems of frozen weights: a feed-forward block, and a stack of them, as a model in inference runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from bigkern.core.problem import Call, Inputs, Problem
from bigkern.ops.layernorm_ffn import frozen as op
from bigkern.ops.layernorm_ffn.call import GATED
from bigkern.ops.layernorm_ffn.frozen_call import FrozenWeight
from bigkern.ops.layernorm_ffn.stock import activate

Weights = op.Weights


def frozen(M: int, D: int, hidden: int, weights: Weights, activation: str = "gelu") -> Problem:
    """One pre-norm block: with LayerNorm and biases, or gated, with RMSNorm and none."""
    frozen_block = _frozen_block(weights, activation)

    def call(inputs: Inputs) -> Call:
        return frozen_block(inputs["x"], _weights(inputs, 0))

    def public(*arguments: Any, **options: Any) -> Tensor:
        return op.frozen_layernorm_ffn(*arguments, **options)

    return _problem(M, D, hidden, weights, activation, 1, public, call)


def stack(M: int, D: int, hidden: int, weights: Weights, activation: str, blocks: int) -> Problem:
    """So many blocks one after the other: their weights come from memory, not from a cache."""
    frozen_block = _frozen_block(weights, activation)

    def public(inputs: Inputs) -> Tensor:
        x = inputs["x"]
        for i in range(blocks):
            arguments, options = frozen_block(x, _weights(inputs, i))
            x = op.frozen_layernorm_ffn(*arguments, **options)
        return x

    return _problem(M, D, hidden, weights, activation, blocks, public, lambda inputs: ((inputs,), {}))


def stock(inputs: Inputs, activation: str, weights: Weights | None) -> Tensor:
    """The blocks on torch's functions; with the weights as they act once frozen, or as they were."""
    x, i = inputs["x"], 0
    while f"w1_{i}" in inputs:
        w1, b1, w2, b2, *affine = _weights(inputs, i)
        if weights is not None:
            w1, w2 = (_acting(w, weights) for w in (w1, w2))
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
    public: Callable[..., Tensor],
    call: Callable[[Inputs], Call],
) -> Problem:
    gated = activation in GATED
    rows = 2 * hidden if gated else hidden
    shapes: dict[str, tuple[int, ...]] = {"x": (M, D)}
    for i in range(blocks):
        shapes |= {f"w1_{i}": (rows, D), f"w2_{i}": (D, hidden), f"norm_{i}_weight": (D,)}
        shapes |= {} if gated else {f"b1_{i}": (rows,), f"b2_{i}": (D,), f"norm_{i}_bias": (D,)}
    several = f"{blocks} blocks of " if blocks > 1 else ""
    return Problem(
        "frozen_layernorm_ffn",
        f"{several}{M}x{D}x{hidden} {activation} {weights}",
        shapes,
        public,
        call,
        lambda inputs: stock(inputs, activation, weights),
        flops=2 * M * D * (rows + hidden) * blocks,
        differentiable=False,
    )


def _weights(inputs: Inputs, i: int) -> tuple[Any, ...]:
    names = (f"w1_{i}", f"b1_{i}", f"w2_{i}", f"b2_{i}", f"norm_{i}_weight", f"norm_{i}_bias")
    return tuple(inputs.get(name) for name in names)


def _frozen_block(weights: Weights, activation: str) -> Callable[[Tensor, tuple[Any, ...]], Call]:
    """The op's arguments for a block; each weight is frozen once, when it is first seen."""
    kept = WeakIdKeyDictionary()
    gated = activation in GATED

    def frozen_once(w: Tensor, gated: bool) -> FrozenWeight:
        if w not in kept:
            kept[w] = op.freeze_weight(w, weights, gated=gated)
        return kept[w]  # type: ignore[no-any-return]

    def arguments(x: Tensor, tensors: tuple[Any, ...]) -> Call:
        w1, b1, w2, b2, *affine = tensors
        options = {"activation": activation, "norm": "rms" if gated else "layer"}
        return (x, frozen_once(w1, gated), b1, frozen_once(w2, False), b2, *affine), options

    return arguments


def _acting(w: Tensor, weights: Weights) -> Tensor:
    """w as the frozen weight acts, in w's dtype."""
    values, scale, _ = op.freeze_weight(w.float(), weights)
    return values.to(w.dtype) if scale is None else (values.double() * scale[:, None]).to(w.dtype)


def small() -> list[Problem]:
    return [
        frozen(5, 64, 256, "int8"),
        frozen(33, 96, 160, "int8", "swiglu"),
        frozen(17, 64, 256, "packed"),
    ]


def thorough() -> list[Problem]:
    return [frozen(M, 1024, 4096, "int8", a) for M in (1, 16, 300) for a in ("gelu", "swiglu")]


def typical() -> Problem:
    return frozen(16, 768, 3072, "int8")
