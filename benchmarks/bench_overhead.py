"""What a call costs besides its kernel: microseconds on inputs too small to matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bigkern.benchmarks.harness import Bench, Case, Contestant
from bigkern.benchmarks.timing import Task
from bigkern.core import registry
from bigkern.core.problem import Inputs, Problem
from bigkern.ops.adam.problems import adam
from bigkern.ops.attention.problems import attention
from bigkern.ops.layernorm_ffn.problems import layernorm_ffn
from bigkern.ops.norm.problems import norm

CALLS = 100  # a sample


def cases(bench: Bench) -> list[Case]:
    tiny = [
        attention(1, 1, 2, 8),
        norm(2, 8),
        layernorm_ffn(2, 8, 8),
        adam([(8,)], "1 tensor of 8"),
    ]
    return [_case(problem) for problem in tiny]


def _case(problem: Problem) -> Case:
    """``kernel`` is the chosen backend's bare function: what bigkern adds to it is bigkern's overhead."""
    contestants = [
        _calling("bigkern", _public, problem, lambda inputs: problem.explain(inputs).chosen),
        _calling("kernel", _kernel, problem, lambda inputs: problem.explain(inputs).chosen),
        _calling("stock", _stock, problem, lambda inputs: "torch"),
    ]
    return Case(problem, contestants, dtypes=(torch.float32,))


Prepared = Callable[[Problem, Inputs], Callable[[], Any]]


def _public(problem: Problem, inputs: Inputs) -> Callable[[], Any]:
    arguments, options = problem.arguments(inputs)
    if problem.op == "adam":
        from bigkern.ops.adam import adam

        return lambda: adam(*arguments, **options)
    return lambda: problem.public(*arguments, **options)


def _kernel(problem: Problem, inputs: Inputs) -> Callable[[], Any]:
    op = registry.get(problem.op)
    arguments, options = problem.arguments(inputs)
    with torch.no_grad():
        bound = op.bind(*arguments, **options)
        given = bound if isinstance(bound, tuple) else (bound,)
        forward = op.resolve(*given).forward
    return lambda: forward(*given)


def _stock(problem: Problem, inputs: Inputs) -> Callable[[], Any]:
    if problem.op == "adam":
        p, g, m, v, _, steps = problem.arguments(inputs)[0]
        return lambda: torch._fused_adamw_(
            p, g, m, v, [], steps, lr=1e-2, beta1=0.9, beta2=0.999, weight_decay=0.1, eps=1e-8,
            amsgrad=False, maximize=False,
        )  # fmt: skip
    return lambda: problem.stock(inputs)


def _calling(name: str, prepare: Prepared, problem: Problem, backend: Callable[[Inputs], str]) -> Contestant:
    def tasks(inputs: Inputs) -> dict[str, Task]:
        call = prepare(problem, inputs)

        def without_graph(_: Any) -> None:
            with torch.no_grad():
                for _ in range(CALLS):
                    call()

        def with_graph(_: Any) -> None:
            for _ in range(CALLS):
                call()

        found = {"call": Task(without_graph, calls=CALLS)}
        if problem.differentiable and name != "kernel":
            found["call with graph"] = Task(with_graph, calls=CALLS)
        return found

    return Contestant(name, tasks, backend)
