"""What the attention op is called with, forward and backward, what comes of it, and the checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bigkern.core.checks import MOST, check_dense, check_number, kind
from bigkern.core.dropout import check_dropout, drawn_key, dropout_key
from bigkern.core.library import DEBUG, narrowed
from bigkern.core.op import Call, Size

Causal = Literal[False, True, "none", "top_left", "bottom_right"]
Window = tuple[int | None, int | None]


@dataclass(slots=True)
class Attention(Call):
    """Queries, keys and values, and the rules by which scores come from them.

    Packed sequences lie behind each other in q ``[1, Hq, total, D]``, k and v, and have cumulative lengths.
    """

    q: Tensor  # [B, Hq, Sq, D]
    k: Tensor  # [B, Hkv, Sk, D]
    v: Tensor  # [B, Hkv, Sk, Dv]
    mask: Tensor | None  # bool, broadcastable to [B, Hq, Sq, Sk], True where the query may look
    bias: Tensor | None  # broadcastable to [B, Hq, Sq, Sk]
    alibi_slopes: Tensor | None  # [Hq] or [B, Hq] fp32
    sinks: Tensor | None  # [Hq] fp32
    dropout_key: Tensor | None  # two numbers below 2^32, int64 on the CPU
    cu_seqlens_q: Tensor | None  # [sequences + 1] int32
    cu_seqlens_k: Tensor | None
    scale: float
    causal: str  # "none", "top_left" or "bottom_right"
    window_left: int  # -1: unlimited
    window_right: int
    softcap: float  # 0: none
    dropout_p: float
    max_seqlen_q: Size  # of packed sequences; else Sq
    max_seqlen_k: Size


class Result(NamedTuple):
    o: Tensor  # [B, Hq, Sq, Dv]
    lse: Tensor  # [B, Hq, Sq] fp32 (fp64 for fp64)


@dataclass(slots=True)
class AttentionBackward(Attention):
    """The forward's call and its result, and their gradients; the fields here are first in the schema."""

    do: Tensor
    dlse: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor
    want_bias: bool

    @classmethod
    def of(
        cls, call: Any, do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, want_bias: bool
    ) -> AttentionBackward:
        """That of a forward's call, or of what was saved of it."""
        return cls(*(*Attention.flat(call), do, dlse, o, lse, want_bias))


class Gradients(NamedTuple):
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor  # empty unless want_bias


def bind(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, causal: Causal = False,
    mask: Tensor | None = None, bias: Tensor | None = None, scale: float | None = None,
    window: Window | None = None, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None, dropout_p: float = 0.0, seed: int | None = None, offset: int = 0,
    return_lse: bool = False,
) -> Attention:  # fmt: skip
    """Check a public call.

    With cumulative lengths, q, k and v are packed, ``[total, H, D]``, and leave as ``[1, H, total, D]``.
    """
    q, k, v, bias = narrowed(q, k, v, bias)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    if packed:
        q, k, v = (_unpacked(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    check_tensors(q, k, v)
    (B, Hq, Sq, D), Sk = q.shape, k.shape[2]
    if packed:
        if mask is not None or bias is not None:
            raise ValueError(f"{'bias' if mask is None else 'mask'} cannot be given for packed sequences")
        cu_seqlens_q = cumulative("cu_seqlens_q", cu_seqlens_q, Sq, q)
        cu_seqlens_k = cumulative("cu_seqlens_k", cu_seqlens_k, Sk, q)
        if cu_seqlens_k.shape != cu_seqlens_q.shape:
            wanted, have = cu_seqlens_q.shape[0], cu_seqlens_k.shape[0]
            raise ValueError(f"cu_seqlens_k must have as many entries as cu_seqlens_q, {wanted}, not {have}")
        B = cu_seqlens_q.shape[0] - 1
        Sq = longest("max_seqlen_q", max_seqlen_q, cu_seqlens_q)
        Sk = longest("max_seqlen_k", max_seqlen_k, cu_seqlens_k)
    if mask is not None:
        check_beside("mask", mask, q, torch.bool, "a bool Tensor (an additive mask goes into bias)")
        mask = four_dimensional("mask", mask, (B, Hq, Sq, Sk))
    if bias is not None:
        check_beside("bias", bias, q, q.dtype, f"a Tensor of q's dtype {q.dtype}")
        bias = four_dimensional("bias", bias, (B, Hq, Sq, Sk))
    slopes = None if alibi_slopes is None else check_slopes(alibi_slopes, B, q)
    sinks = None if sinks is None else check_sinks(sinks, q)
    causal_rule, left, right = corner_and_window(causal, window)
    key = None if seed is None else dropout_key(dropout_p, seed, offset)
    return Attention(
        q, k, v, mask, bias, slopes, sinks, key, cu_seqlens_q, cu_seqlens_k, check_scale(scale, D),
        causal_rule, left, right, check_softcap(softcap), check_dropout(dropout_p), Sq, Sk,
    )  # fmt: skip


# ---- tensors ---------------------------------------------------------------------------------------


def _unpacked(name: str, x: Tensor) -> Tensor:
    check_dense(name, x)
    if x.dim() != 3:
        raise ValueError(f"{name} must be packed, 3 dimensions [total, H, D], not shape {tuple(x.shape)}")
    return x.transpose(0, 1).unsqueeze(0)


def check_tensors(
    q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str] = ("q", "k", "v"), paged: bool | None = None
) -> None:
    """One dtype, one device, and shapes that belong together; ``paged`` says it of a cache."""
    for name, x in zip(names, (q, k, v), strict=True):
        check_dense(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions [B, H, S, D], not shape {tuple(x.shape)}")
    dtype, device = q.dtype, q.device
    for name, x in zip(names[1:], (k, v), strict=True):
        if x.dtype != dtype:
            raise TypeError(f"{name} must have q's dtype {dtype}, not {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name} must be on q's device {device}, not {x.device}")
    if not dtype.is_floating_point:
        raise TypeError(f"q must be floating point, not {dtype}")
    (B, Hq, _Sq, D), (Bk, Hkv, Sk, Dk), (Bv, Hv, Sv, _Dv) = q.shape, k.shape, v.shape
    if D == 0:
        raise ValueError("q's head dimension must not be 0")
    if Dk != D or (Bk != B and not paged):
        wanted = f"[pages, Hkv, page_size, {D}]" if paged else f"[{B}, Hkv, Sk, {D}]"
        table = "" if paged is None else f" {'with' if paged else 'without'} a page_table"
        found = f"to match q {tuple(q.shape)}{table}, not {tuple(k.shape)}"
        raise ValueError(f"{names[1]} must be {wanted} {found}")
    if Bv != Bk or Hv != Hkv or Sv != Sk:
        wanted = f"[{Bk}, {Hkv}, {Sk}, Dv] to match {names[1]}"
        raise ValueError(f"{names[2]} must be {wanted}, not {tuple(v.shape)}")
    if Hkv == 0 or Hq % Hkv != 0:
        raise ValueError(f"q's head count {Hq} must be a multiple of {names[1]}'s and {names[2]}'s, {Hkv}")


def check_beside(name: str, x: Any, q: Tensor, dtype: torch.dtype | None, what: str) -> None:
    """A dense tensor of this dtype, or any floating point one, on q's device; ``what`` says so in words."""
    if not isinstance(x, Tensor) or not (x.is_floating_point() if dtype is None else x.dtype == dtype):
        raise TypeError(f"{name} must be {what}, not {kind(x)}")
    check_dense(name, x)
    if x.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, not {x.device}")


def four_dimensional(name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A view with 4 dimensions, each 1 or that of ``shape`` = [B, Hq, Sq, Sk]."""
    matches = all(have in (1, want) for have, want in zip(reversed(x.shape), reversed(shape), strict=False))
    if x.dim() > 4 or not matches:
        wanted = f"does not broadcast to [B, Hq, Sq, Sk] = {list(shape)}"
        raise ValueError(f"{name} of shape {tuple(x.shape)} {wanted}")
    return x if x.dim() == 4 else x[(None,) * (4 - x.dim())]


def check_sinks(sinks: Tensor, q: Tensor) -> Tensor:
    return _per_head("sinks", sinks, [q.shape[1:2]], q)


def check_slopes(alibi_slopes: Tensor, B: int, q: Tensor) -> Tensor:
    Hq = q.shape[1]
    slopes = _per_head("alibi_slopes", alibi_slopes, [(Hq,), (B, Hq)], q)
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes has no gradient: detach it, or write the slopes as a bias")
    return slopes


def _per_head(name: str, x: Tensor, shapes: Sequence[tuple[int, ...]], q: Tensor) -> Tensor:
    """Numbers of each query head, in float32 (float64 if q is)."""
    check_beside(name, x, q, None, "a floating point Tensor")
    if tuple(x.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} must have shape {wanted}, one number a query head, not {list(x.shape)}")
    return x.to(torch.promote_types(q.dtype, torch.float32)).contiguous()


# ---- packed sequences ------------------------------------------------------------------------------


def cumulative(name: str, x: Tensor | None, total: int, q: Tensor) -> Tensor:
    """Cumulative lengths: from 0 to ``total``, never falling. On a GPU looked at only with BIGKERN_DEBUG."""
    check_beside(name, x, q, torch.int32, "an int32 Tensor")
    assert x is not None
    if x.dim() != 1 or x.shape[0] == 0:
        raise ValueError(f"{name} must have shape [sequences + 1], not {list(x.shape)}")
    if may_look(x):
        ends = x.tolist()
        if ends[0] != 0 or ends[-1] != total:
            wanted = f"from 0 to {total}, the rows of {name[-1]}"
            raise ValueError(f"{name} must run {wanted}, not {ends[0]}..{ends[-1]}")
        if any(b < a for a, b in pairwise(ends)):
            raise ValueError(f"{name} must not fall, but it is {ends}")
    return x.contiguous()


def longest(name: str, given: int | None, cu_seqlens: Tensor) -> int:
    """The longest sequence's length, read from the device if it is not given."""
    if given is not None and (isinstance(given, bool) or not isinstance(given, int | torch.SymInt)):
        raise TypeError(f"{name} must be an int or None, not {kind(given)}")
    if given is not None and not 0 <= given <= MOST:
        raise ValueError(f"{name} must be within 0 and {MOST}, not {given}")
    if given is not None and not may_look(cu_seqlens):
        return given
    found = int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0
    if given is not None and given < found:
        raise ValueError(f"{name} must be at least {found}, the longest sequence there is, not {given}")
    return found if given is None else given


def may_look(x: Tensor) -> bool:
    """Whether reading a tensor's values costs no synchronisation, or is asked for."""
    return (x.is_cpu or DEBUG) and type(x) is Tensor and not torch.compiler.is_compiling()


# ---- numbers ---------------------------------------------------------------------------------------


def check_scale(scale: float | None, D: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(D)
    return check_number("scale", scale, "finite")


def check_softcap(softcap: float) -> float:
    return check_number("softcap", softcap, "finite and not negative (0: none)", 0.0)


def corner_and_window(causal: Causal, window: Window | None) -> tuple[str, int, int]:
    """The causal rule's name and the window (-1: unlimited); a causal window ends at the query's place."""
    rule = ("top_left" if causal else "none") if isinstance(causal, bool) else causal
    if not isinstance(rule, str) or rule not in ("none", "top_left", "bottom_right"):
        raise ValueError(f'causal must be False, True, "top_left" or "bottom_right", not {causal!r}')
    left, right = (None, None) if window is None else _window(window)
    if rule != "none":
        right = 0
    return rule, -1 if left is None else left, -1 if right is None else right


def _window(window: Window) -> Window:
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(f"window must be a pair (left, right) of numbers of keys, None: all; not {window!r}")
    for side in window:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
            raise TypeError(f"window must hold ints or None, not {side!r}")
        if side is not None and not 0 <= side <= MOST:
            raise ValueError(f"window must be within 0 and {MOST}, not {tuple(window)}; None means unlimited")
    return window[0], window[1]


# ---- dropout ---------------------------------------------------------------------------------------


def draw(call: Attention) -> None:
    """Where there is dropout and no seed was given, a key from torch's generator."""
    if call.dropout_key is None and call.dropout_p > 0.0:
        call.dropout_key = drawn_key()


# ---- what is measured ------------------------------------------------------------------------------


def sizes(call: Attention) -> tuple[int, ...]:
    """Heads of all sequences, queries and keys of the longest, and D."""
    B, H, _, D = call.q.shape
    sequences = B if call.cu_seqlens_q is None else len(call.cu_seqlens_q) - 1
    return sequences * H, call.max_seqlen_q, call.max_seqlen_k, D


def options(call: Attention) -> tuple[str, ...]:
    words = {
        "packed": call.cu_seqlens_q is not None,
        "causal": call.causal != "none",
        "window": call.window_left >= 0 or (call.causal == "none" and call.window_right >= 0),
        "grouped": call.q.shape[1] != call.k.shape[1],
        "masked": call.mask is not None,
        "bias": call.bias is not None,
        "softcap": call.softcap != 0.0,
        "alibi": call.alibi_slopes is not None,
        "sinks": call.sinks is not None,
        "dropout": call.dropout_p > 0.0,
        "wide": max(call.q.shape[3], call.v.shape[3]) > 128,
    }
    return tuple(word for word, used in words.items() if used)
