"""What the decode op is called with, and the checks of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bigkern.core.checks import check_dense, check_written, kind
from bigkern.core.op import Call
from bigkern.ops.attention.call import (
    Window,
    check_scale,
    check_slopes,
    check_softcap,
    check_tensors,
    corner_and_window,
    may_look,
    per_head,
)


@dataclass(slots=True)
class Decode(Call):
    """The newest queries of each sequence, and the cache of its keys and values, perhaps in pages."""

    q: Tensor  # [B, Hq, Sq, D]
    k_cache: Tensor  # [B, Hkv, S, D] or [pages, Hkv, page_size, D]
    v_cache: Tensor
    cache_seqlens: Tensor  # [B] int32, the keys of the queries themselves included
    page_table: Tensor | None  # [B, pages of a sequence] int32
    alibi_slopes: Tensor | None  # [Hq] or [B, Hq] fp32
    sinks: Tensor | None  # [Hq] fp32
    scale: float
    causal: str  # "none" or "bottom_right"
    window_left: int  # -1: unlimited
    window_right: int
    softcap: float  # 0: none


def bind(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    page_table: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Decode:
    """Check a public call."""
    check_tensors(q, k_cache, v_cache, names=("q", "k_cache", "v_cache"))
    B, Hq, Sq, D = q.shape
    first, Hkv, S, Dv = *k_cache.shape[:3], v_cache.shape[3]
    if k_cache.shape[3] != D or (page_table is None and first != B):
        rows = f"[{B}, Hkv, S, {D}]" if page_table is None else f"[pages, Hkv, page_size, {D}]"
        paged = "without" if page_table is None else "with"
        found = f"to match q {tuple(q.shape)} {paged} a page_table, not {tuple(k_cache.shape)}"
        raise ValueError(f"k_cache must be {rows} {found}")
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(
            f"v_cache must be {[first, Hkv, S]} + [Dv] to match k_cache, not {tuple(v_cache.shape)}"
        )
    if Hkv == 0 or Hq % Hkv != 0:
        raise ValueError(f"q's head count {Hq} must be a multiple of k_cache's and v_cache's, {Hkv}")
    if (k is None) != (v is None):
        raise ValueError(f"{'k' if k is None else 'v'} must be given with {'v' if k is None else 'k'}")
    if k is not None and v is not None:
        _check_new("k", k, (B, Hkv, Sq, D), q)
        _check_new("v", v, (B, Hkv, Sq, Dv), q)
        check_written("k_cache", k_cache)
        check_written("v_cache", v_cache)
    _check_int32("cache_seqlens", cache_seqlens, (B,), "[B]", q)
    capacity = S
    if page_table is not None:
        check_dense("page_table", page_table)
        width = page_table.shape[-1] if page_table.dim() == 2 else 0
        _check_int32("page_table", page_table, (B, width), "[B, pages of a sequence]", q)
        capacity = S * width
    added = 0 if k is None else Sq
    _check_values(cache_seqlens, added, capacity, page_table, first, S)
    if alibi_slopes is not None:
        alibi_slopes = check_slopes(alibi_slopes, B, q)
    if sinks is not None:
        sinks = per_head("sinks", sinks, [(Hq,)], q)
    if not isinstance(causal, bool):
        raise ValueError(f"causal must be True or False, not {causal!r}: queries are the last of a sequence")
    rule, left, right = corner_and_window("bottom_right" if causal else False, window)
    lengths = cache_seqlens + added if added else cache_seqlens.contiguous()
    page_table = None if page_table is None else page_table.contiguous()
    return Decode(
        q, k_cache, v_cache, lengths, page_table, alibi_slopes, sinks, check_scale(scale, D), rule, left,
        right, check_softcap(softcap),
    )  # fmt: skip


def _check_new(name: str, x: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype != q.dtype:
        raise TypeError(f"{name} must be a Tensor of q's dtype {q.dtype}, not {kind(x)}")
    check_dense(name, x)
    if tuple(x.shape) != shape or x.device != q.device:
        wanted = f"{list(shape)} on {q.device}, as q and {name}_cache are"
        raise ValueError(f"{name} must be {wanted}, not {list(x.shape)} on {x.device}")


def _check_int32(name: str, x: Tensor, shape: tuple[int, ...], wanted: str, q: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype != torch.int32:
        raise TypeError(f"{name} must be an int32 Tensor {wanted}, not {kind(x)}")
    check_dense(name, x)
    if tuple(x.shape) != shape or x.device != q.device:
        found = f"{list(x.shape)} on {x.device}"
        raise ValueError(f"{name} must have shape {wanted} = {list(shape)} on {q.device}, not {found}")


def _check_values(
    lengths: Tensor, added: int, capacity: int, page_table: Tensor | None, pages: int, page_size: int
) -> None:
    """Lengths within the cache, and page numbers within the pages, where looking costs nothing."""
    if not may_look(lengths) or lengths.numel() == 0:
        return
    least, most = int(lengths.min()), int(lengths.max()) + added
    if least < 0 or most > capacity:
        new = f" with the {added} new keys" if added else ""
        raise ValueError(
            f"cache_seqlens must be within 0 and the {capacity} keys{new} that k_cache and page_table hold,"
            f" not {least}..{most}"
        )
    if page_table is None:
        return
    used = torch.arange(page_table.shape[1], device=lengths.device) * page_size < lengths[:, None] + added
    numbers = page_table[used]
    if numbers.numel() > 0 and (int(numbers.min()) < 0 or int(numbers.max()) >= pages):
        found = f"{int(numbers.min())}..{int(numbers.max())}"
        raise ValueError(f"page_table must hold page numbers below {pages}, not {found}")
