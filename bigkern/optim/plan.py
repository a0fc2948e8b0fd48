"""What one step of a group has in common with the next: its tensors, where they lie, who updates them.

    group -> buckets, one for each device, dtype, storage and sharding -> the op's lists -> one call each

A bucket's lists are gathered anew in each step and compared with the addresses that were packed, so that
nobody needs to tell the optimizer what has changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from operator import attrgetter, is_, itemgetter
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from bigkern.core import registry
from bigkern.ops.adam import ADAM, Packed
from bigkern.ops.adam.call import Adam, Lists
from bigkern.ops.adam.grad_norm import GRAD_NORM, GradNorm
from bigkern.optim.offload import Transfer
from bigkern.optim.options import Group
from bigkern.optim.shards import Layout, is_dtensor, is_lazy, raw
from bigkern.optim.states import State

Tensors = list[Tensor]

# The op's lists after params and grads, by their names in a state.
KEYS = (
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "step",
    "master",
    "exp_avg_scales",
    "exp_avg_sq_scales",
)


@dataclass
class Bucket:
    """The parameters of a group that the op takes in one call."""

    params: Tensors
    states: list[State]
    amsgrad: bool
    layout: Layout | None
    seed: int | None
    transfer: Transfer | None
    backend: registry.Backend | None = None
    _packed: Packed | None = None
    _packs_norm: bool = False
    _found: Tensor | None = None  # where the last lists' gradients lie
    _resolved_for: list[Any] | None = None  # the lists, as they were stored
    _keys: tuple[str, ...] = field(init=False)
    _wrapped: bool = field(init=False)

    def __post_init__(self) -> None:
        absent = () if self.amsgrad else ("max_exp_avg_sq",)
        self._keys = tuple(key for key in KEYS if key in self.states[0] and key not in absent)
        self._wrapped = any(is_dtensor(p) or p.is_complex() for p in self.params)

    @property
    def device(self) -> torch.device:
        """Where the step runs."""
        return self.params[0].device if self.transfer is None else torch.device("cpu")

    def lists(self) -> Lists | None:
        """The op's lists as they are now, or None where they are not what this bucket was made for."""
        grads: Any = [p.grad for p in self.params]
        if any(g is None for g in grads):
            return None
        found_as_they_are = self._packed is not None and not self._wrapped and self.transfer is None
        if not found_as_they_are and any(map(attrgetter("is_sparse"), grads)):
            return None
        if any(map(is_lazy if self._wrapped else Tensor.is_neg, grads)):  # only complex ones are conjugated
            return None
        params = self.params
        states = [list(map(itemgetter(k), self.states)) if k in self._keys else [] for k in KEYS]
        if self._wrapped:
            params, grads, *states = (list(map(raw, tensors)) for tensors in (params, grads, *states))
        if self.transfer is not None and not self.transfer.matches(params, grads):
            return None
        lists = Lists(params, grads, *states)
        return lists if self._still_right(lists) else None

    def _still_right(self, lists: Lists) -> bool:
        if self._packed is None:
            return self._resolved_for is None or self._resolved_for == _stored(lists)
        self._found = self._packed.find(self.where_it_runs(lists))
        return self._found is not None

    def grad_norm(self, lists: Lists) -> Tensor:
        """The norm of the gradients in ``lists``."""
        if self._packed is not None and self._packs_norm:
            return self._packed.grad_norm(cast(Tensor, self._found))
        return cast(Tensor, GRAD_NORM(GradNorm(lists.grads)))

    def resolve(self, lists: Lists, call: Adam) -> None:
        """Choose a backend, once; raises where none takes the call."""
        if self.backend is None:
            self.backend = ADAM.resolve(call)
            self._resolved_for = _stored(lists)

    def where_it_runs(self, lists: Lists) -> Lists:
        """The same lists, but for what the host has copies of."""
        if self.transfer is None:
            return lists
        params, grads = self.transfer.host
        return replace(lists, params=params, grads=grads)

    def update(self, lists: Lists, call: Adam, grads_change: bool) -> None:
        """One step of these parameters, by a call with the lists where it runs; ``resolve`` comes first."""
        if self.transfer is not None:
            self.transfer.fetch(lists.params, lists.grads)
        self._call(call)
        if self.transfer is not None:
            self.transfer.send_back(lists.params, lists.grads, grads_change)
        torch.autograd.graph.increment_version(self.params)

    def _call(self, call: Adam) -> None:
        backend = cast(registry.Backend, self.backend)
        if self._packed is None and backend.name in ("cuda", "cpu") and not registry.forced():
            self._pack(call, backend)
        if self._packed is None:
            backend.forward(call)
        else:
            self._packed.update(cast(Tensor, self._found), call)

    def _pack(self, lists: Lists, backend: registry.Backend) -> None:
        packed = Packed(lists)
        self._found = packed.find(lists)
        if self._found is not None:
            self._packed = packed
            by = GRAD_NORM.resolve(GradNorm(lists.grads))
            self._packs_norm = self.transfer is None and by.name == backend.name


def _stored(lists: Lists) -> list[Any]:
    """How everything is stored: what a backend was chosen by."""
    places = [(x.device, x.shape) for x in (*lists.params, *lists.grads)]
    return [*places, *((x.dtype, x.stride()) for tensors in lists.flat() for x in tensors)]


@dataclass
class Plan:
    """A group's buckets, until something about the group changes."""

    params: Tensors
    amsgrad: bool
    seed: int | None
    buckets: list[Bucket]
    idle: Tensors  # the group's parameters that have no gradient

    def lists(self, group: Group) -> list[Lists] | None:
        """The buckets' lists, or None where the plan no longer holds."""
        if self.amsgrad != group["amsgrad"] or self.seed != group.get("seed"):
            return None
        if not same(self.params, group["params"]) or any(p.grad is not None for p in self.idle):
            return None
        lists = [bucket.lists() for bucket in self.buckets]
        return None if any(bucket is None for bucket in lists) else cast(Any, lists)


def same(these: list[Any], those: list[Any]) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))


def plain(tensors: Iterable[Tensor]) -> bool:
    return set(map(type, tensors)) <= {Tensor, Parameter}


def gradient_problem(p: Tensor) -> str | None:
    """What is wrong with p's gradient, as torch puts it."""
    g = cast(Tensor, p.grad)
    if g.is_sparse:
        return "Adam does not support sparse gradients, please consider SparseAdam instead"
    for what, want, have in (
        ("shape", tuple(p.shape), tuple(g.shape)),
        ("dtype", p.dtype, g.dtype),
        ("device", p.device, g.device),
        ("layout", p.layout, g.layout),
    ):
        if want != have:
            return f"a gradient must have its parameter's {what} {want}, not {have}"
    return None
