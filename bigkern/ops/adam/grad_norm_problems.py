"""Problems of the norm of all gradients, which clipping needs."""

from __future__ import annotations

import torch
from torch import Tensor

from bigkern.core.problem import Call, Inputs, Problem
from bigkern.ops.adam import grad_norm as op
from bigkern.ops.adam.problems import Sizes, shapes_of


def grad_norm(sizes: Sizes) -> Problem:
    def call(inputs: Inputs) -> Call:
        return (list(inputs.values()),), {}

    def stock(inputs: Inputs) -> Tensor:
        return torch.nn.utils.get_total_norm(list(inputs.values()))

    count = sum(torch.Size(size).numel() for size in sizes)
    return Problem(
        "grad_norm",
        f"{len(sizes)} tensors",
        shapes_of("g", sizes),
        op.grad_norm,
        call,
        stock,
        elements=count,
        differentiable=False,
    )


def small() -> list[Problem]:
    return [grad_norm([(1,), (7, 5), (4097,)])]


def thorough() -> list[Problem]:
    return [grad_norm([(1 << 20,), (1,), (1023, 7)]), grad_norm([(n,) for n in range(1, 500)])]


def typical() -> Problem:
    return grad_norm([(768, 768), (768,)])
