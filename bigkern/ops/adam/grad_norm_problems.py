"""Problems of the norm of all gradients, which clipping needs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bigkern.core.problem import Call, Inputs, Problem
from bigkern.ops.adam import grad_norm as op
from bigkern.ops.adam.problems import Sizes, shapes_of


def grad_norm(sizes: Sizes) -> Problem:
    def call(inputs: Inputs) -> Call:
        return (list(inputs.values()),), {}

    def stock(inputs: Inputs) -> Tensor:
        wide = [torch.promote_types(g.dtype, torch.float32) for g in inputs.values()]
        return torch.nn.utils.get_total_norm([g.to(w) for g, w in zip(inputs.values(), wide, strict=True)])

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


def forms() -> list[Problem]:
    """Odd sizes, one empty, one that starts off any 16-byte boundary, one stored in another order."""
    sizes: Sizes = [(1,), (7,), (0,), (63,), (129,), (1023,), (9000,), (258,), (5, 9)]
    return [replace(grad_norm(sizes), views={"g_7": lambda g: g[1:], "g_8": Tensor.t})]


def small() -> list[Problem]:
    return [grad_norm([(1,), (7, 5), (4097,)])]


def thorough() -> list[Problem]:
    return [grad_norm([(1 << 20,), (1,), (1023, 7)]), grad_norm([(n,) for n in range(1, 500)])]


def grid() -> list[Problem]:
    lists: list[Sizes] = [[(64,)], [(768,)] * 20, [(768, 768)] * 2, [(768, 3072)] * 4]
    return [grad_norm(sizes) for sizes in lists]


def large() -> list[Problem]:
    lists: list[Sizes] = [[(4096, 4096)] * 8, [(768,)] * 200 + [(768, 3072)] * 48]
    return [grad_norm(sizes) for sizes in lists]


def typical() -> Problem:
    return grad_norm([(768, 768), (768,)])
