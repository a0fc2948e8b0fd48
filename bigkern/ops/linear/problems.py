"""Problems of the linear op: the products around a Transformer's attention, and its output layer."""

from __future__ import annotations

import torch.nn.functional as F

from bigkern.core.problem import Inputs, Problem
from bigkern.ops import linear as op


def linear(M: int, N: int, K: int, transposed: bool = False, bias: bool = True, name: str = "") -> Problem:
    """A transposed weight lies as [K, N]."""
    shapes: dict[str, tuple[int, ...]] = {"x": (M, K), "w1": (K, N) if transposed else (N, K)}
    if bias:
        shapes["bias"] = (N,)

    def operands(inputs: Inputs) -> tuple[object, ...]:
        weight = inputs["w1"].t() if transposed else inputs["w1"]
        return inputs["x"], weight, inputs.get("bias")

    words = [name, f"{M}x{N}x{K}", "transposed" if transposed else ""]
    return Problem(
        "linear",
        " ".join(filter(None, words)),
        shapes,
        op.linear,
        lambda inputs: (operands(inputs), {}),
        lambda inputs: F.linear(*operands(inputs)),  # type: ignore[arg-type]
        flops=2 * M * N * K,
        elements=M * K + N * K + M * N,
        parameters=("w1", "bias") if bias else ("w1",),
    )


def small() -> list[Problem]:
    return [linear(65, 96, 63), linear(33, 129, 100, transposed=True), linear(7, 16, 1023, bias=False)]


def thorough() -> list[Problem]:
    return [linear(M, 768, 1000, transposed) for M in (1, 130, 2048) for transposed in (False, True)]


def typical() -> Problem:
    return linear(512, 768, 768)
