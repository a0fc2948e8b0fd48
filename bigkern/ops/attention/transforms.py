"""Attention under torch.func: vmap folds its dimension into the batch, grad runs the kernels' backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigkern.core import registry
from bigkern.core.library import in_functorch


def refuses(*rules: Any) -> registry.Reason:
    """Why a kernel cannot run inside the transforms that are in force, if there are any."""
    if not in_functorch():
        return None
    kinds = [level.key() for level in torch._C._functorch.get_interpreter_stack() or []]
    transforms = torch._C._functorch.TransformType
    if any(kind not in (transforms.Vmap, transforms.Grad) for kind in kinds):
        return "inside a torch.func transform other than vmap and grad"
    if kinds.count(transforms.Grad) > 1:
        return "inside torch.func.grad twice: a kernel's backward has no derivative there"
    if any(isinstance(rule, Tensor) for rule in rules):
        return "inside a torch.func transform with a mask, a bias or another tensor besides q, k and v"
    return None


def vmapped(op: Any, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, ...]:
    """A vmap rule for ``op(q, k, v, *rules) -> (o, lse)``."""
    q, k, v = _folded(info.batch_size, in_dims[:3], arguments[:3])
    return _unfolded(info.batch_size, op(q, k, v, *arguments[3:]))


def vmapped_backward(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, ...]:
    """A vmap rule for the op's backward."""
    tensors = _folded(info.batch_size, in_dims[:7], arguments[:7])
    *grads, dbias = torch.ops.bigkern.attention_backward(*tensors, *arguments[7:])
    results, dims = _unfolded(info.batch_size, grads)
    return (*results, dbias), (*dims, None)


def _folded(size: int, dims: Any, tensors: Any) -> list[Any]:
    """[B, ...] with a mapped dimension somewhere, or none, as [size * B, ...]."""
    folded = []
    for dim, x in zip(dims, tensors, strict=True):
        if x is not None:
            x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            x = x.flatten(0, 1)
        folded.append(x)
    return folded


def _unfolded(size: int, results: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    unfolded = tuple(x.unflatten(0, (size, -1)) for x in results)
    return unfolded, (0,) * len(unfolded)
