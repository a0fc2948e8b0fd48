"""The problems of every op: what tests and doctor examine, env asks about, and the benchmarks measure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch

from bigkern.core import registry
from bigkern.core.device import is_gpu
from bigkern.core.problem import Inputs, Problem
from bigkern.core.tune import Plan
from bigkern.ops.adam import grad_norm_problems
from bigkern.ops.adam import problems as adam
from bigkern.ops.attention import decode_problems
from bigkern.ops.attention import problems as attention
from bigkern.ops.batch_norm import problems as batch_norm
from bigkern.ops.layernorm_ffn import frozen_problems
from bigkern.ops.layernorm_ffn import problems as layernorm_ffn
from bigkern.ops.linear import problems as linear
from bigkern.ops.norm import problems as norm
from bigkern.ops.recurrent import problems as recurrent

_MODULES: dict[str, ModuleType] = {
    "attention": attention,
    "decode_attention": decode_problems,
    "norm": norm,
    "batch_norm": batch_norm,
    "linear": linear,
    "layernorm_ffn": layernorm_ffn,
    "frozen_layernorm_ffn": frozen_problems,
    "recurrent": recurrent,
    "adam": adam,
    "grad_norm": grad_norm_problems,
}
OPS = tuple(_MODULES)


def forms(op: str) -> list[Problem]:
    """Every form of the call at small odd sizes, for the tests: the product of its options."""
    return list(_MODULES[op].forms())


def drawn(op: str, draw: random.Random, largest: int) -> Problem:
    """Any combination of what the op can do, at any size up to about ``largest``."""
    found: Problem = _MODULES[op].drawn(draw, largest)
    return found


def small(op: str) -> list[Problem]:
    """Small calls with odd sizes, for ``bigkern doctor``: seconds for all of them."""
    return list(_MODULES[op].small())


def proof(op: str) -> list[Problem]:
    """What a kernel has to pass on a GPU: sizes and options that choose other code in it, and the calls that
    are measured."""
    return [*small(op), *_MODULES[op].thorough(), *grid(op)]


def grid(op: str) -> list[Problem]:
    """The calls that ``bigkern tune`` measures: options that many use, sizes some four times apart."""
    return list(_MODULES[op].grid())


def large(op: str) -> list[Problem]:
    """What it measures on a GPU besides: calls as training and serving large models have them."""
    return list(_MODULES[op].large()) if hasattr(_MODULES[op], "large") else []


def plans(op: str, device: torch.device, dtypes: Sequence[torch.dtype]) -> list[Plan]:
    """What is to be measured, in these dtypes, forward and, where there is a gradient, in training."""
    declared: Any = registry.get(op)
    return [
        Plan(declared, problem.label, training, partial(bound, problem, dtype, device), _work(problem))
        for problem in (*grid(op), *(large(op) if is_gpu(device) else ()))
        for dtype in dtypes
        for training in ((False, True) if problem.differentiable and declared.gradient else (False,))
    ]


def _work(problem: Problem) -> float:
    return float(problem.flops or problem.elements)


def bound(problem: Problem, dtype: torch.dtype, device: torch.device) -> Any:
    """The call, in training where gradients are enabled."""
    training, made = torch.is_grad_enabled(), _inputs(problem, dtype, device)
    inputs = {name: t.detach().requires_grad_(t.requires_grad and training) for name, t in made.items()}
    arguments, options = problem.arguments(inputs)
    return registry.get(problem.op).bind(*arguments, **options, **problem.explain_options)


@lru_cache(maxsize=1)
def _inputs(problem: Problem, dtype: torch.dtype, device: torch.device) -> Inputs:
    return problem.make(dtype, device)


def typical(op: str) -> Problem:
    """The call that ``bigkern env`` asks about: of an ordinary size."""
    found: Problem = _MODULES[op].typical()
    return found
