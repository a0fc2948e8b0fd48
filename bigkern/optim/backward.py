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

from bigkern.optim.options import several_processes
from bigkern.optim.shards import is_dtensor


def problem(p: Tensor) -> str | None:
    """Return why p cannot be stepped in the backward pass here.

    DistributedDataParallel, and whoever else reduces the gradients of plain parameters, does so after the
    hook, whether the model was wrapped before the optimizer was made or after. FSDP2 does it before.
    """
    if is_dtensor(p) or not several_processes():
        return None
    return (
        "in_backward must be False for plain parameters where several processes train, not True: it would"
        " step before DistributedDataParallel reduces the gradients; DTensors (FSDP2) may be stepped so"
    )


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
        if (reason := problem(p)) is not None:
            raise RuntimeError(reason)
        optimizer.step_parameter(index, position)
        p.grad = None
