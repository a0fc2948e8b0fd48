"""A parameter's state in each storage, and from one storage into another.

    step                                 fp32, 0-dim
    exp_avg, exp_avg_sq, max_exp_avg_sq  like the parameter, in the storage's dtype, or uint8 codes with
    exp_avg_scales, exp_avg_sq_scales    fp32, one for 256 codes as they lie in memory
    master                               fp32, or the int16 remainder of a bfloat16 parameter

Every conversion goes through fp32. What is already stored as asked is copied bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bigkern.core.library import lazily_negated
from bigkern.ops.adam.dynamic8 import blocks_of
from bigkern.ops.adam.layout import dense, same_layout
from bigkern.ops.adam.reference import decoded, encode, joined, shaped
from bigkern.optim.options import Storage
from bigkern.optim.shards import is_dtensor, like, raw

State = dict[str, Tensor]

SIGNED = {"exp_avg": True, "exp_avg_sq": False}
MOMENTS = (*SIGNED, "max_exp_avg_sq")
SCALES = {name: f"{name}_scales" for name in SIGNED}


def new(p: Tensor, storage: Storage) -> State:
    """The state of a parameter that no step has reached yet."""
    empty = _allocator(p, storage.offload)
    device = torch.device("cpu") if storage.offload else raw(p).device
    state = {"step": torch.zeros((), dtype=torch.float32, device=device)}
    for name in MOMENTS if storage.amsgrad else SIGNED:
        state[name] = empty(storage.moments).zero_()
    if storage.moments == torch.uint8:
        for name in SCALES.values():
            state[name] = torch.zeros(blocks_of(raw(p).numel()), device=device)
    if storage.master is not None:
        state["master"] = empty(storage.master).zero_()
        if storage.master == torch.float32:
            state["master"].copy_(p.detach())
    return state


def _allocator(p: Tensor, offload: bool) -> Callable[[torch.dtype], Tensor]:
    """Of tensors like p, of p's strides, where the storage keeps them."""

    def empty(dtype: torch.dtype) -> Tensor:
        if not offload:
            return torch.empty_like(p.detach(), dtype=dtype)
        return torch.empty_like(p.detach(), dtype=dtype, device="cpu", pin_memory=p.is_cuda)

    return empty


@torch.no_grad()
def align(state: State, p: Tensor, offload: bool) -> None:
    """Bring what lies in memory in another order than p, as after a change of p's format, into p's order."""
    local = raw(p)
    if not dense(local):
        return
    for name in (*MOMENTS, "master"):
        if name not in state:
            continue
        x = raw(state[name])
        if not same_layout(local, x) or lazily_negated(x):
            values = fp32_moment(state, name)
            state[name] = _allocator(p, offload)(state[name].dtype)
            _put(state, name, values)


def problem(saved: State, p: Tensor) -> str | None:
    """Why a saved state cannot be this parameter's."""
    missing = [name for name in ("step", *SIGNED) if name not in saved]
    if missing:
        return f"no {missing[0]}"
    for name in (*MOMENTS, "master"):
        if (x := saved.get(name)) is not None and x.shape != p.shape:
            return f"{name} of shape {tuple(x.shape)}, and the parameter has {tuple(p.shape)}"
    for name, scales in SCALES.items():
        if (x := saved.get(scales)) is not None and x.numel() != blocks_of(raw(saved[name]).numel()):
            return f"{scales} of shape {tuple(x.shape)} for {saved[name].numel()} elements"
    return None


def is_compact(saved: State) -> bool:
    """Whether a saved state holds what torch.optim's do not."""
    return "master" in saved or any(name in saved for name in SCALES.values())


@torch.no_grad()
def converted(saved: State, p: Tensor, storage: Storage) -> State:
    """A saved state, whatever its storage, in the storage asked for; shares no memory with it."""
    state = new(p, storage)
    state["step"].fill_(float(saved["step"]))
    for name in MOMENTS:
        if name not in state or name not in saved:
            continue
        if _as_asked(saved, name, state):
            _copy_bits(state, name, saved)
        else:
            _put(state, name, fp32_moment(saved, name))
    if storage.master is not None and "master" in saved:
        if saved["master"].dtype == storage.master:
            state["master"].copy_(saved["master"])
        else:
            _put_master(state["master"], p, fp32_master(saved, p))
    return state


def _as_asked(saved: State, name: str, state: State) -> bool:
    codes = state[name].dtype == torch.uint8
    same = saved[name].dtype == state[name].dtype and (SCALES.get(name) in saved) == codes
    return same and (not codes or same_layout(raw(saved[name]), raw(state[name])))


def _copy_bits(state: State, name: str, saved: State) -> None:
    for key in (name, SCALES.get(name)):
        if key in saved and key in state:
            state[key].copy_(saved[key])


def fp32_moment(saved: State, name: str) -> Tensor:
    """A moment as numbers: itself, or what its codes stand for."""
    x = saved[name]
    if SCALES.get(name) not in saved:
        return x
    return like(decoded(raw(x), saved[SCALES[name]].to(x.device), SIGNED[name]), x)


def fp32_master(saved: State, p: Tensor) -> Tensor:
    """The master itself, or the sum of the parameter and its remainder."""
    master = saved["master"]
    if master.dtype == torch.float32:
        return master
    local, remainder = raw(p.detach()), raw(master).to(p.device)
    return like(shaped(joined(local, remainder), local), p)


def _put(state: State, name: str, values: Tensor) -> None:
    if state[name].dtype != torch.uint8:
        state[name].copy_(values)
        return
    target = torch.empty_like(state[name], dtype=torch.float32).copy_(values)
    encode(raw(state[name]), state[SCALES[name]], raw(target), SIGNED[name])


def _put_master(master: Tensor, p: Tensor, values: Tensor) -> None:
    if master.dtype == torch.float32:
        master.copy_(values)
        return
    exact = torch.empty_like(p.detach(), dtype=torch.float32).copy_(values)
    difference = raw(exact).view(torch.int32) - raw(p.detach()).float().view(torch.int32)
    raw(master).copy_(difference.clamp(-(2**15), 2**15 - 1))  # all of it, wherever p is values' rounding


# ---- as others keep it -----------------------------------------------------------------------------


@torch.no_grad()
def as_torch(saved: State) -> State:
    """As torch.optim keeps it: step and moments, codes as the numbers that they stand for."""
    return {name: fp32_moment(saved, name) for name in ("step", *MOMENTS) if name in saved}


@torch.no_grad()
def as_whole(saved: State, p: Tensor) -> State:
    """What can be cut into other shards: codes and remainders of a DTensor as numbers."""
    if not is_dtensor(p) or not is_compact(saved):
        return saved
    whole = as_torch(saved)
    if "master" in saved:
        whole["master"] = fp32_master(saved, p)
    return whole
