"""What the decode op is called with, and the checks of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigkern.core.checks import check_dense, check_written
from bigkern.core.op import Call
from bigkern.ops.attention.call import (
    Window,
    check_beside,
    check_scale,
    check_sinks,
    check_slopes,
    check_softcap,
    check_tensors,
    corner_and_window,
    may_look,
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
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, *, k: Tensor | None = None,
    v: Tensor | None = None, page_table: Tensor | None = None, causal: bool = True,
    scale: float | None = None, window: Window | None = None, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, sinks: Tensor | None = None, return_lse: bool = False,
) -> Decode:  # fmt: skip
    """Check a public call."""
    check_tensors(q, k_cache, v_cache, ("q", "k_cache", "v_cache"), paged=page_table is not None)
    (B, _Hq, Sq, D), (pages, Hkv, S, _D), Dv = q.shape, k_cache.shape, v_cache.shape[3]
    if (k is None) != (v is None):
        raise ValueError(f"{'k' if k is None else 'v'} must be given with {'v' if k is None else 'k'}")
    if k is not None:
        _check_fits("k", k, q, q.dtype, (B, Hkv, Sq, D), "[B, Hkv, Sq, D] of q and k_cache")
        _check_fits("v", v, q, q.dtype, (B, Hkv, Sq, Dv), "[B, Hkv, Sq, Dv] of q and v_cache")
        check_written("k_cache", k_cache)
        check_written("v_cache", v_cache)
    _check_fits("cache_seqlens", cache_seqlens, q, torch.int32, (B,), "[B]")
    capacity = S
    if page_table is not None:
        check_dense("page_table", page_table)
        width = page_table.shape[-1] if page_table.dim() == 2 else 0
        _check_fits("page_table", page_table, q, torch.int32, (B, width), "[B, pages of a sequence]")
        page_table, capacity = page_table.contiguous(), S * width
    added = 0 if k is None else Sq
    _check_values(cache_seqlens, added, capacity, page_table, pages, S)
    slopes = None if alibi_slopes is None else check_slopes(alibi_slopes, B, q)
    sinks = None if sinks is None else check_sinks(sinks, q)
    if not isinstance(causal, bool):
        raise ValueError(f"causal must be True or False, not {causal!r}: queries are the last of a sequence")
    rule, left, right = corner_and_window("bottom_right" if causal else False, window)
    lengths = cache_seqlens + added if added else cache_seqlens.contiguous()
    return Decode(
        q, k_cache, v_cache, lengths, page_table, slopes, sinks, check_scale(scale, D), rule, left,
        right, check_softcap(softcap),
    )  # fmt: skip


def _check_fits(name: str, x: Any, q: Tensor, dtype: torch.dtype, shape: tuple[int, ...], dims: str) -> None:
    """``dims`` names the dimensions of ``shape``."""
    what = f"a Tensor of q's dtype {dtype}" if dtype == q.dtype else f"an int32 Tensor {dims}"
    check_beside(name, x, q, dtype, what)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)} = {dims}, not {list(x.shape)}")


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


def sizes(call: Decode) -> tuple[int, ...]:
    """Heads of all caches, the queries that share one, keys that there is room for, and D."""
    (B, H, queries, D), (_, Hkv, room, _) = call.q.shape, call.k_cache.shape
    keys = room if call.page_table is None else room * call.page_table.shape[1]
    return B * Hkv, H // Hkv * queries, keys, D


def options(call: Decode) -> tuple[str, ...]:
    words = {
        "paged": call.page_table is not None,
        "window": call.window_left >= 0 or (call.causal == "none" and call.window_right >= 0),
        "softcap": call.softcap != 0.0,
        "alibi": call.alibi_slopes is not None,
        "sinks": call.sinks is not None,
    }
    return tuple(word for word, used in words.items() if used)
