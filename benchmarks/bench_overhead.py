"""What a call costs besides its kernel: microseconds on inputs too small to matter, functions and layers.

Whoever is chosen runs: the column ``backend`` says who.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigkern
from bigkern.benchmarks.harness import Bench, Case, Contestant
from bigkern.core.problem import Inputs, Problem
from bigkern.core.timing import Task
from bigkern.ops.attention.problems import attention
from bigkern.ops.layernorm_ffn.problems import layernorm_ffn
from bigkern.ops.linear.problems import linear
from bigkern.ops.norm.problems import norm

CALLS = 100  # a sample


def cases(bench: Bench) -> list[Case]:
    functions = [
        attention(1, 1, 2, 8),
        norm(2, 8),
        norm(2, 8, "rms"),
        linear(2, 8, 8),
        layernorm_ffn(2, 8, 8),
    ]
    return [
        *(_case(problem) for problem in functions),
        _case(_sdpa()),
        *(_case(_layer(bench, name, *sizes, **options)) for name, sizes, options in LAYERS),
        _optimizer(bench),
    ]


LAYERS: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("Linear", (8, 8), {}),
    ("LayerNorm", (8,), {}),
    ("RMSNorm", (8,), {}),
    ("BatchNorm2d", (8,), {}),
    ("LSTM", (8, 8), {}),
    ("GRU", (8, 8), {}),
    ("TransformerEncoderLayer", (8, 2, 16), {"dropout": 0.0, "batch_first": True}),
]


def _sdpa() -> Problem:
    def call(inputs: Inputs) -> Any:
        return tuple(inputs.values()), {}

    shapes = dict.fromkeys("qkv", (1, 1, 2, 8))
    ours, stock = bigkern.scaled_dot_product_attention, F.scaled_dot_product_attention
    label = "scaled_dot_product_attention 1x1x2x8"
    return Problem("attention", label, shapes, ours, call, lambda inputs: stock(*inputs.values()))


def _layer(bench: Bench, name: str, *sizes: int, **options: Any) -> Problem:
    """A layer of torch's and ours with the same weights, in training mode."""
    makers = getattr(torch.nn, name), getattr(bigkern.nn, name)
    stock, ours = (maker(*sizes, **options).to(bench.device) for maker in makers)
    ours.load_state_dict(stock.state_dict())
    shape = {"BatchNorm2d": (2, 8, 1, 1), "Linear": (2, 8)}.get(name, (3, 2, 8))
    label = f"nn.{name}"
    return Problem(
        "layer", label, {"x": shape}, _first(ours), lambda i: ((i["x"],), {}), lambda i: _first(stock)(i["x"])
    )


def _first(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        y = layer(x)
        return y[0] if isinstance(y, tuple) else y

    return call


def _case(problem: Problem) -> Case:
    def ours(inputs: Inputs) -> Callable[[], Any]:
        arguments, options = problem.arguments(inputs)
        return lambda: problem.public(*arguments, **options)

    def chosen(inputs: Inputs) -> str:
        return "" if problem.op == "layer" else problem.explain(inputs).chosen

    contestants = [
        _calling("bigkern", ours, problem.ours, chosen),
        _calling(
            "stock", lambda inputs: lambda: problem.stock(inputs), problem.stock, lambda inputs: "torch"
        ),
    ]
    # The ops' own tests and benchmarks hold them to the rule; here the two results are compared.
    return Case(problem, contestants, dtypes=(torch.float32,), judge=lambda dtype, device: {})


def _calling(
    name: str,
    prepare: Callable[[Inputs], Callable[[], Any]],
    function: Callable[[Inputs], Any],
    backend: Callable[[Inputs], str],
) -> Contestant:
    def tasks(inputs: Inputs) -> dict[str, Task]:
        call = prepare(inputs)
        wanted = [x for x in inputs.values() if x.requires_grad]
        upstream = torch.ones_like(call())

        def without_graph(_: Any) -> None:
            with torch.no_grad():
                for _ in range(CALLS):
                    call()

        def with_graph(_: Any) -> None:
            for _ in range(CALLS):
                call()

        def training(_: Any) -> None:
            for _ in range(CALLS):
                torch.autograd.grad(call(), wanted, upstream)

        found = {"call": without_graph, "call with graph": with_graph, "training": training}
        return {mode: Task(run, calls=CALLS) for mode, run in found.items()}

    return Contestant(name, tasks, backend, lambda inputs: {"output": function(inputs).detach()})


def _optimizer(bench: Bench) -> Case:
    """A step of one small parameter, as ``torch.optim.AdamW(fused=True)`` does it."""
    problem = Problem(
        "layer", "optim.AdamW.step", {"p": (8,), "g": (8,)}, _first, lambda i: ((), {}), lambda i: i["p"]
    )

    def stepping(name: str, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Contestant:
        def tasks(inputs: Inputs) -> dict[str, Task]:
            parameter = nn.Parameter(inputs["p"].detach().clone())
            parameter.grad = inputs["g"].detach().clone()
            optimizer = make([parameter])

            def steps(_: Any) -> None:
                for _ in range(CALLS):
                    optimizer.step()

            return {"call": Task(steps, calls=CALLS)}

        return Contestant(name, tasks)

    contestants = [
        stepping("bigkern", lambda params: bigkern.optim.AdamW(params)),
        stepping("stock", lambda params: torch.optim.AdamW(params, fused=True)),
    ]
    return Case(problem, contestants, dtypes=(torch.float32,), judge=lambda dtype, device: {})
