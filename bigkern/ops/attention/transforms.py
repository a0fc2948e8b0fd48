"""Attention under torch.func: vmap folds its dimension into the batch, grad runs the kernels' backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bigkern.core import registry
from bigkern.core.library import in_functorch
from bigkern.core.op import Call
from bigkern.ops.attention.call import Attention, AttentionBackward

RULES = ("mask", "bias", "alibi_slopes", "sinks", "dropout_key", "cu_seqlens_q", "cu_seqlens_k")


def refuses(call: Attention) -> registry.Reason:
    """Why a kernel cannot run inside the transforms that are in force, if there are any."""
    if not in_functorch():
        return None
    kinds = [level.key() for level in torch._C._functorch.get_interpreter_stack() or []]
    transforms = torch._C._functorch.TransformType
    if any(kind not in (transforms.Vmap, transforms.Grad) for kind in kinds):
        return "inside a torch.func transform other than vmap and grad"
    if kinds.count(transforms.Grad) > 1:
        return "inside torch.func.grad twice: a kernel's backward has no derivative there"
    if any(getattr(call, name) is not None for name in RULES):
        return "inside a torch.func transform with a mask, a bias or another tensor besides q, k and v"
    return None


def vmapped(op: Any, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, ...]:
    """A vmap rule for ``op``, which takes the fields of :class:`Attention` and returns (o, lse)."""
    call, dims = Attention.of_flat(*arguments), Attention.of_flat(*in_dims)
    return _unfolded(info.batch_size, op(*_folded(info.batch_size, dims, call, ("q", "k", "v")).flat()))


def vmapped_backward(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, ...]:
    """A vmap rule for the op's backward."""
    call, dims = AttentionBackward.of_flat(*arguments), AttentionBackward.of_flat(*in_dims)
    folded = _folded(info.batch_size, dims, call, ("do", "dlse", "q", "k", "v", "o", "lse"))
    *grads, dbias = torch.ops.bigkern.attention_backward(*folded.flat())
    results, unfolded_dims = _unfolded(info.batch_size, grads)
    return (*results, dbias), (*unfolded_dims, None)


def _folded(size: int, dims: Call, call: Call, names: tuple[str, ...]) -> Any:
    """The call with its tensors [B, ...] of a mapped dimension somewhere, or none, as [size * B, ...]."""
    folded = {}
    for name in names:
        dim, x = getattr(dims, name), getattr(call, name)
        if x is not None:
            x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            folded[name] = x.flatten(0, 1)
    return replace(call, **folded)  # type: ignore[type-var]


def _unfolded(size: int, results: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    unfolded = tuple(x.unflatten(0, (size, -1)) for x in results)
    return unfolded, (0,) * len(unfolded)
