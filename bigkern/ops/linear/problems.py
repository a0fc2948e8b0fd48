"""Problems of the linear op: the products around a Transformer's attention, and its output layer."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bigkern.core.problem import Inputs, Problem
from bigkern.ops import linear as op


def linear(M: int, N: int, K: int, transposed: bool = False, bias: bool = True, name: str = "") -> Problem:
    """A transposed weight lies as [K, N]."""
    shapes: dict[str, tuple[int, ...]] = {"x": (M, K), "w1": (K, N) if transposed else (N, K)}
    shapes |= {"bias": (N,)} if bias else {}

    def operands(inputs: Inputs) -> tuple[Any, ...]:
        return inputs["x"], inputs["w1"], inputs.get("bias")

    words = [name, f"{M}x{N}x{K}", "transposed" if transposed else "", "" if bias else "no bias"]
    return Problem(
        "linear",
        " ".join(filter(None, words)),
        shapes,
        op.linear,
        lambda inputs: (operands(inputs), {}),
        lambda inputs: F.linear(*operands(inputs)),
        views={"w1": Tensor.t} if transposed else {},
        flops=2 * M * N * K,
        elements=M * K + N * K + M * N,
        parameters=("w1", "bias") if bias else ("w1",),
        kernels=("cpu",),
    )


def forms() -> list[Problem]:
    sizes = ((1, 1, 1), (3, 7, 5), (14, 32, 16), (33, 129, 63), (64, 100, 1023), (513, 65, 400))
    either = (False, True)
    return [linear(*size, t, bias) for size, t, bias in itertools.product(sizes, either, either)]


def drawn(draw: random.Random, largest: int) -> Problem:
    M, N, K = (draw.randint(1, most) for most in (largest, largest, 3 * largest))
    return linear(M, N, K, draw.random() < 0.5, draw.random() < 0.5)


def small() -> list[Problem]:
    return [linear(65, 96, 63), linear(33, 129, 100, transposed=True), linear(7, 16, 1023, bias=False)]


def thorough() -> list[Problem]:
    return [linear(M, 768, 1000, transposed) for M in (1, 130, 2048) for transposed in (False, True)]


def grid() -> list[Problem]:
    widths = [(N, K) for N in (96, 384, 1536) for K in (96, 384, 1536)]
    return [linear(M, N, K) for M in (16, 128, 1024, 4096) for N, K in widths if M * N * K < 1 << 32] + [
        linear(M, N, K, transposed=True) for M, N, K in ((128, 384, 1536), (1024, 1536, 384))
    ]


def typical() -> Problem:
    return linear(512, 768, 768)
