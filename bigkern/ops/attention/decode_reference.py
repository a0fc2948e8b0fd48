"""Attention against a cache of keys and values, in plain torch: what every decode kernel must compute.

Query i of sequence b stands at key cache_seqlens[b] - Sq + i, and sees the keys before cache_seqlens[b] that
the causal rule and the window, counted from there, let it see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigkern.ops.attention import reference as dense
from bigkern.ops.attention.call import Attention, Result
from bigkern.ops.attention.decode_call import Decode


def gathered(cache: Tensor, page_table: Tensor | None) -> Tensor:
    """[B, H, S, D] of a cache that may lie in pages, [pages, H, page_size, D]."""
    if page_table is None:
        return cache
    known = page_table.clamp(0, cache.shape[0] - 1).long()  # entries that are not in use may hold anything
    pages = cache[known]  # [B, pages of a sequence, H, page_size, D]
    return pages.transpose(1, 2).flatten(2, 3)


def as_attention(call: Decode) -> Attention:
    """The same call as one of attention's, whose mask and bias say what depends on a sequence's length."""
    q, slopes, Sq = call.q, call.alibi_slopes, call.q.shape[2]
    k, v = gathered(call.k_cache, call.page_table), gathered(call.v_cache, call.page_table)
    Sk = k.shape[2]
    i, j = torch.arange(Sq, device=q.device)[:, None], torch.arange(Sk, device=q.device)
    lengths = call.cache_seqlens.view(-1, 1, 1, 1)
    back = lengths - Sq + i - j  # [B, 1, Sq, Sk]
    exists = j < lengths
    seen = exists & dense.within(back, call.window_left, call.window_right)
    bias = None if slopes is None else dense.alibi(slopes, back)
    unused = ~exists.view(-1, 1, Sk, 1)  # may hold anything, NaN included
    k, v = k.masked_fill(unused, 0.0), v.masked_fill(unused, 0.0)
    return Attention(
        q, k, v, seen, bias, None, call.sinks, None, None, None, call.scale, "none", -1, -1, call.softcap,
        0.0, Sq, Sk,
    )  # fmt: skip


def decode_attention(call: Decode) -> Result:
    """``o [B, Hq, Sq, Dv]`` in q's dtype and ``lse [B, Hq, Sq]`` in fp32 (fp64 for fp64)."""
    return dense.attention(as_attention(call))
