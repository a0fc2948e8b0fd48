"""The optimizer in the backward pass: each parameter is updated when its gradient is there, then freed of it.

torch calls a parameter's post-accumulate hook once a backward pass, after everything that the gradient sums
has been summed. Only the gradients between two hooks exist at the same time.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor


def attach(optimizer: Any, hooks: dict[Tensor, Any]) -> None:
    """Hook every parameter that has no hook yet; ``hooks`` remembers them."""
    reference = weakref.ref(optimizer)  # an optimizer that is thrown away must not go on stepping
    for index, group in enumerate(optimizer.param_groups):
        for position, p in enumerate(group["params"]):
            if p.requires_grad and p not in hooks:
                arrived = partial(_arrived, reference, index, position)
                hooks[p] = p.register_post_accumulate_grad_hook(arrived)


@torch.no_grad()
def _arrived(reference: weakref.ref[Any], index: int, position: int, p: Tensor) -> None:
    optimizer = reference()
    if optimizer is not None:
        optimizer.step_parameter(index, position)
        p.grad = None
