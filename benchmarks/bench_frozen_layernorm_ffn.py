"""Feed-forward blocks with frozen weights, few rows and many, against the blocks that they were made from.

The blocks of a case stand one after the other and do not fit into a cache together, as in a model.
"""

from __future__ import annotations

import torch

from bigkern.benchmarks.harness import Bench, Case, Contestant, by_autograd
from bigkern.core.problem import Inputs
from bigkern.ops.layernorm_ffn.frozen_problems import Weights, frozen, stack, stock


def cases(bench: Bench) -> list[Case]:
    kinds: tuple[Weights, ...] = ("int8", "fp8") if bench.device.type == "cuda" else ("packed", "int8")
    sizes = [(1024, 4096, "gelu", 8)]
    rows = [1, 64] if bench.quick else [1, 4, 16, 64, 256]
    if not bench.quick:
        sizes.append((2048, 8192, "swiglu", 2))
    return [_case(M, *size, weights) for size in sizes for weights in kinds for M in rows]


def _case(M: int, D: int, hidden: int, activation: str, blocks: int, weights: Weights) -> Case:
    problem = stack(M, D, hidden, weights, activation, blocks)
    one = frozen(M, D, hidden, weights, activation)

    def explained(inputs: Inputs) -> str:
        return one.explain(inputs).chosen

    def eager(inputs: Inputs) -> torch.Tensor:
        return stock(inputs, activation)

    plain = by_autograd("eager", eager, "torch")
    if weights != "packed":  # its results are another model's, and not to be compared
        plain = Contestant(plain.name, plain.tasks, plain.backend)
    contestants = [by_autograd("bigkern", problem.ours, explained), plain]
    gate = frozen(M, 256, 1024, weights, activation)
    return Case(problem, contestants, gate, (torch.float32, torch.bfloat16), weights)
