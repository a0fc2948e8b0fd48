"""A group's step as torch.optim takes it, where autograd or a tensor subclass needs torch's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.adam import adam

from bigkern.optim.options import Group

Tensors = list[Tensor]


def needs_torch(group: Group) -> str | None:
    """Why a group cannot be given to bigkern's op at all."""
    if group["differentiable"]:
        return "differentiable=True: autograd must see every operation"
    beta1, beta2 = group["betas"]
    numbers = (
        ("betas", beta1),
        ("betas", beta2),
        ("eps", group["eps"]),
        ("weight_decay", group["weight_decay"]),
    )
    return next((f"{name} is a Tensor" for name, value in numbers if isinstance(value, Tensor)), None)


def torch_step(optimizer: Any, group: Group) -> None:
    """torch's step, with the group's own foreach and fused."""
    lists: tuple[Tensors, Tensors, Tensors, Tensors, Tensors, Tensors] = ([], [], [], [], [], [])
    has_complex = optimizer._init_group(group, *lists)
    grad_scale, found_inf = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
    if not group["fused"]:
        if found_inf is not None and bool(found_inf):
            return
        if grad_scale is not None:
            for grad in lists[1]:
                grad.div_(grad_scale.to(grad.device))
        grad_scale = found_inf = None
    beta1, beta2 = group["betas"]
    adam(
        *lists,
        amsgrad=group["amsgrad"],
        has_complex=has_complex,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
        foreach=group["foreach"],
        capturable=group["capturable"],
        differentiable=group["differentiable"],
        fused=group["fused"],
        grad_scale=grad_scale,
        found_inf=found_inf,
        decoupled_weight_decay=group["decoupled_weight_decay"],
    )
