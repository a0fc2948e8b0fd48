"""One AdamW step over a model's parameters, against torch's three ways of doing it and apex."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bigkern.benchmarks.harness import Bench, Case, Contestant
from bigkern.benchmarks.timing import Task
from bigkern.cli import problems
from bigkern.cli.problem import Inputs
from bigkern.optim import AdamW

Sizes = list[tuple[int, ...]]


def transformer(layers: int, width: int, vocabulary: int = 0) -> Sizes:
    """The parameter shapes of a GPT: twelve tensors a block."""
    block: Sizes = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return layers * block + ([(vocabulary, width)] if vocabulary else [])


def cases(bench: Bench) -> list[Case]:
    if bench.device.type == "cuda":
        sizes = {"GPT-2 small": transformer(12, 768, 50304)}
        sizes |= {} if bench.quick else {"GPT-2 large": transformer(36, 1280, 50304)}
    elif bench.quick:
        sizes = {"4 blocks of 256": transformer(4, 256)}
    else:
        sizes = {"4 blocks of 256": transformer(4, 256), "6 blocks of 768": transformer(6, 768)}
    return [_case(name, shapes) for name, shapes in sizes.items()]


def _case(name: str, sizes: Sizes) -> Case:
    count = sum(torch.Size(size).numel() for size in sizes)
    problem = problems.adam(sizes, f"{name}, {count / 1e6:.1f} M in {len(sizes)} tensors")
    gate = problems.adam(sizes[:12], "its first block")
    ours = _stepping("bigkern", partial(AdamW, **HYPER), lambda inputs: problem.explain(inputs).chosen)
    stock = [
        _stepping(f"adamw-{way}", partial(torch.optim.AdamW, **HYPER, **options), lambda inputs: "torch")
        for way, options in STOCK.items()
    ]
    return Case(problem, [ours, *stock, *_apex()], gate)


HYPER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
STOCK: dict[str, dict[str, Any]] = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def _stepping(
    name: str, make: Callable[[Any], torch.optim.Optimizer], backend: Callable[[Inputs], str]
) -> Contestant:
    """Steps of an optimizer on its own copies of the parameters, with gradients that stay."""

    def tasks(inputs: Inputs) -> dict[str, Task]:
        parameters = [torch.nn.Parameter(t.clone()) for n, t in inputs.items() if n.startswith("p_")]
        for parameter, gradient in zip(
            parameters, (t for n, t in inputs.items() if n.startswith("g_")), strict=True
        ):
            parameter.grad = gradient
        optimizer = make(parameters)
        return {"step": Task(lambda _: optimizer.step())}

    return Contestant(name, tasks, backend)


def _apex() -> list[Contestant]:
    try:
        from apex.optimizers import FusedAdam
    except ImportError:
        return []
    return [_stepping("apex", partial(FusedAdam, adam_w_mode=True, **HYPER), lambda inputs: "cuda")]
