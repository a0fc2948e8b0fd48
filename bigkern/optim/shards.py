"""Parameters as the op sees them: the local part of a DTensor, the real view of a complex tensor.

A DTensor's update is elementwise, so that every process updates what it holds. Only the norm of all
gradients needs the others: squares are summed over the mesh dimensions that the parameter is split over,
and not over those on which it is replicated.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor

from bigkern.core.library import lazily_negated

Layout = tuple[Any, tuple[Any, ...]]  # device mesh, placements


def is_dtensor(x: Tensor) -> bool:
    """Without importing what DTensors come from: where nobody has, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def layout_of(p: Tensor) -> Layout | None:
    """How a parameter is spread over processes; None where it is not."""
    return (cast(Any, p).device_mesh, tuple(cast(Any, p).placements)) if is_dtensor(p) else None


def raw(x: Tensor) -> Tensor:
    """What the op updates in x's place; shares x's memory."""
    if is_dtensor(x):
        x = cast(Any, x).to_local()
        x = x.wait() if hasattr(x, "wait") else x  # a result that is still on its way
    return torch.view_as_real(x) if x.is_complex() else x


def like(local: Tensor, p: Tensor) -> Tensor:
    """A tensor for each of raw(p)'s elements as part of a whole like p."""
    if not is_dtensor(p):
        return local
    whole = cast(Any, p)
    from_local = cast(Any, sys.modules["torch.distributed.tensor"]).DTensor.from_local
    where = whole.device_mesh, whole.placements
    return cast(Tensor, from_local(local, *where, run_check=False, shape=p.shape, stride=p.stride()))


def is_lazy(x: Tensor) -> bool:
    """Whether x, or this process's part of it, is lazily negated or conjugated."""
    return lazily_negated(cast(Any, x).to_local() if is_dtensor(x) else x)


def align_gradient(p: Tensor) -> None:
    """Give p's gradient p's own placements, and memory that holds the very numbers."""
    grad = cast(Any, p.grad)
    if is_dtensor(p) and grad.placements != cast(Any, p).placements:
        p.grad = grad = grad.redistribute(placements=cast(Any, p).placements)
    if is_lazy(grad):
        local = grad.to_local() if is_dtensor(p) else grad
        p.grad = like(local.resolve_conj().resolve_neg(), p)


def coordinate(layout: Layout | None) -> list[int]:
    """Where this process stands on the mesh dimensions that the parameter is split over."""
    if layout is None:
        return []
    mesh, placements = layout
    return [c for c, p in zip(mesh.get_coordinate() or [], placements, strict=False) if not p.is_replicate()]


def total_norm(norms: list[tuple[Layout | None, Tensor]]) -> Tensor:
    """The norm of everything, from the norms of the local parts; every process gets the same."""
    if not norms:
        return torch.zeros(())
    device = norms[0][1].device
    by_layout: dict[Layout | None, list[Tensor]] = {}
    for layout, norm in norms:
        by_layout.setdefault(layout, []).append(norm.to(device))
    parts = [_over_mesh(layout, _joined(parts)) for layout, parts in by_layout.items()]
    return _joined(parts)


def _joined(norms: list[Tensor]) -> Tensor:
    return norms[0] if len(norms) == 1 else cast(Tensor, torch.linalg.vector_norm(torch.stack(norms)))


def _over_mesh(layout: Layout | None, norm: Tensor) -> Tensor:
    if layout is None:
        return norm
    mesh, placements = layout
    square = norm.double().square()  # a square of fp32's largest numbers
    for dimension, placement in enumerate(placements):
        if not placement.is_replicate():
            torch.distributed.all_reduce(square, group=mesh.get_group(dimension))
    return square.sqrt().to(norm.dtype)
