"""BatchNorm with the residual and ReLU after it, layers of ResNet-50, against eager and compiled torch."""

from __future__ import annotations

from bigkern.benchmarks.harness import Bench, Case, by_autograd, compiled, ours
from bigkern.core.problem import Problem
from bigkern.ops.batch_norm.problems import batch_norm


def cases(bench: Bench) -> list[Case]:
    """The stem, and the first and last layer of a block in each stage."""
    gpu = bench.device.type == "cuda"
    N = 128 if gpu else 8
    sizes = [(64, 56, False), (256, 56, True)]
    if not bench.quick:
        sizes += [(64, 112, False), (512, 28, True), (1024, 14, True), (2048, 7, True)]
    found = [_case(batch_norm(N, C, H, H, residual=residual), bench) for C, H, residual in sizes]
    return [*found, _case(batch_norm(N, 256, 56, 56, residual=True, training=False), bench)]


def _case(problem: Problem, bench: Bench) -> Case:
    contestants = [ours(problem), by_autograd("eager", problem.stock, "torch")]
    contestants += [] if bench.quick else compiled(problem, bench.device)
    return Case(problem, contestants, group="batch_norm")
