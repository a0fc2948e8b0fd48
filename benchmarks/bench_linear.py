"""Linear layers of Transformers against eager torch and torch.compile."""

from __future__ import annotations

from bigkern.benchmarks.harness import Bench, Case, by_autograd, compiled, ours
from bigkern.core.problem import Problem
from bigkern.ops.linear.problems import linear


def cases(bench: Bench) -> list[Case]:
    if bench.quick:
        return [_case(linear(256, 768, 768), bench)]
    sizes = [
        linear(64, 768, 768),
        linear(128, 768, 768),
        linear(1024, 768, 768),
        linear(512, 2304, 768, transposed=True, name="GPT-2"),
        linear(1024, 1024, 1024),
        linear(512, 50257, 768, bias=False, name="GPT-2's logits"),
    ]
    return [_case(problem, bench) for problem in sizes]


def _case(problem: Problem, bench: Bench) -> Case:
    contestants = [ours(problem), by_autograd("eager", problem.stock, "torch")]
    contestants += [] if bench.quick else compiled(problem, bench.device)
    return Case(problem, contestants, group="linear")
