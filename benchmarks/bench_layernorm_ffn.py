"""The feed-forward block with its norm, against eager torch and torch.compile."""

from __future__ import annotations

from bigkern.benchmarks.harness import Bench, Case, by_autograd, compiled, ours
from bigkern.cli import problems
from bigkern.cli.problem import Problem


def cases(bench: Bench) -> list[Case]:
    if bench.device.type == "cuda":
        rows, widths = 16384, (1024,) if bench.quick else (768, 1024, 2048, 4096)
        found = [problems.layernorm_ffn(rows, D, 4 * D, a) for D in widths for a in ("gelu", "swiglu")]
        return [_case(problem, bench, problems.layernorm_ffn(512, 768, 3072, "gelu")) for problem in found]
    sizes = [(512, 256, 1024)] if bench.quick else [(2048, 256, 1024), (2048, 768, 3072)]
    activations = ("gelu",) if bench.quick else ("gelu", "swiglu")
    return [_case(problems.layernorm_ffn(*size, a), bench) for size in sizes for a in activations]


def _case(problem: Problem, bench: Bench, gate: Problem | None = None) -> Case:
    contestants = [ours(problem), by_autograd("eager", problem.stock, "torch")]
    contestants += [] if bench.quick else compiled(problem, bench.device)
    return Case(problem, contestants, gate)
