"""Decoding: a few queries, the last of their sequence, against its cache of keys and values.

Every key is used once or twice, so the time is that of reading the cache, and one program a head could not
read fast enough. The keys that a sequence's queries see are therefore cut into spans:

    keys       |---- span 0 ----|---- span 1 ----|---- span 2 ----|
               program          program          program            rows: the query heads of one key head
               m, l, acc        m, l, acc        m, l, acc          x queries, at least the 16 of tl.dot
                        \\____________ | ____________/
                          ``join``: o = sum of e^(m - max m) acc / sum of e^(m - max m) l, in this order

How many spans there are depends on the capacity of the cache and on the GPU, never on a sequence's length,
which only the GPU knows. The cache is contiguous, [B, Hkv, S, D], or in pages, [pages, Hkv, page_size, D].

Dao et al., Flash-Decoding (2023); Kwon et al., PagedAttention (2023).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigkern.triton_kernels.attention.scores import (
    exponential,
    factor_of,
    log_sum_exp,
    online_softmax,
    terms_of,
    to_score,
)
from bigkern.triton_kernels.attention.tiles import Sequence, Shape, empty_bshd, side, view, visible_keys
from bigkern.triton_kernels.common import launch


class Tile(NamedTuple):
    """A launch: at most BR query rows, BC keys a tile, warps a program, stages of the load pipeline."""

    BR: int
    BC: int
    warps: int
    stages: int


# (bytes an element, head dim up to) -> tile
CONFIGURATIONS = {
    (2, 64): Tile(64, 64, 4, 3),
    (2, 128): Tile(32, 64, 4, 3),
    (2, 256): Tile(32, 32, 4, 3),
    (4, 64): Tile(16, 32, 4, 3),
    (4, 128): Tile(16, 32, 4, 3),
    (4, 256): Tile(16, 16, 4, 3),
}
PROGRAMS = 2  # a processor
LEAST_SPAN = 128  # keys: shorter ones cost more to join than they save


class Pages(NamedTuple):
    """table [B, row]: which page holds keys n * size .. of a sequence."""

    table: Tensor
    row: int
    size: int


# ---- kernels ---------------------------------------------------------------------------------------


@triton.jit
def load_keys(x, pages, b, h, j, length, D: tl.constexpr, BD: tl.constexpr):
    """[BC, BD] rows of the cache x: keys j of sequence b, zero from its length on."""
    if pages is None:
        page, row = b, j
    else:
        page = tl.load(pages.table + b * pages.row + j // pages.size, mask=j < length, other=0)
        row = j % pages.size
    rows = x.data + h * x.head + tl.cast(page, tl.int64) * x.batch + row.to(tl.int64) * x.row
    columns = tl.arange(0, BD)
    exists = (j < length)[:, None] & (columns < D)[None, :]
    return tl.load(rows[:, None] + columns[None, :], mask=exists, other=0.0)


@triton.jit
def span_kernel(
    q, k, v, lengths, pages, terms, acc_out, m_out, l_out, factor, shape, spans,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Maximum, sum and unnormalised output, [B, Hq, Sq, spans, ...], of BR rows over one span of keys."""
    count = shape.group * shape.Sq  # rows of one key head: query heads x queries
    tiles = tl.cdiv(count, BR)
    first = tl.program_id(0) % tiles * BR
    span = tl.program_id(0) // tiles % spans
    bh = (tl.program_id(0) // (tiles * spans)).to(tl.int64)
    b, kv_head = bh // shape.Hkv, bh % shape.Hkv
    rows = first + tl.arange(0, BR)
    r = tl.minimum(rows, count - 1)  # rows that do not exist repeat the last one, unstored
    h, i = kv_head * shape.group + r // shape.Sq, r % shape.Sq
    q_rows = q.data + b * q.batch + h * q.head + i * q.row
    columns = tl.arange(0, BD)
    q_tile = tl.load(q_rows[:, None] + columns[None, :], mask=(columns < D)[None, :], other=0.0)
    length = tl.load(lengths + b)
    seq = Sequence(0, 0, shape.Sq, length, length - shape.Sq)
    begin, _, _, end = visible_keys(0, seq, shape, shape.Sq, BC)
    keys = tl.cdiv(tl.cdiv(tl.maximum(0, end - begin), BC), spans) * BC
    begin += span * keys
    acc = tl.zeros([BR, BDV], tl.float32)
    m = tl.full([BR], float("-inf"), tl.float32)
    l = tl.zeros([BR], tl.float32)
    for start in range(begin, tl.minimum(begin + keys, end), BC):
        j = start + tl.arange(0, BC)
        k_tile = load_keys(k, pages, b, kv_head, j, length, D, BD)
        v_tile = load_keys(v, pages, b, kv_head, j, length, DV, BDV)
        x = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # [BR, BC] fp32
        p, rescale, m, l = online_softmax(
            x, m, l, factor, terms, b, h[:, None], i[:, None], j[None, :], seq, shape, True
        )
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee")
    at = ((b * shape.Hq + h) * shape.Sq + i) * spans + span
    exists, columns = rows < count, tl.arange(0, BDV)
    tl.store(m_out + at, m, mask=exists)
    tl.store(l_out + at, l, mask=exists)
    at = acc_out + at[:, None] * DV + columns[None, :]
    tl.store(at, acc, mask=exists[:, None] & (columns < DV)[None, :])


@triton.jit
def join_kernel(
    acc, m, l, sinks, o, lse, shape, spans, DV: tl.constexpr, BDV: tl.constexpr, SPANS: tl.constexpr
):
    """o and lse of one row from those of its spans."""
    row = tl.program_id(0).to(tl.int64)
    b, h, i = row // (shape.Hq * shape.Sq), row // shape.Sq % shape.Hq, row % shape.Sq
    n, columns = tl.arange(0, SPANS), tl.arange(0, BDV)
    span_m = tl.load(m + row * spans + n, mask=n < spans, other=float("-inf"))
    span_l = tl.load(l + row * spans + n, mask=n < spans, other=0.0)
    row_m = tl.max(span_m, 0)
    if sinks is not None:
        sink = to_score(tl.load(sinks + h), shape)
        row_m = tl.maximum(row_m, sink)
    finite_m = tl.where(row_m == float("-inf"), 0.0, row_m)  # no NaN where a row sees nothing
    weight = exponential(span_m - finite_m, shape)
    row_l = tl.sum(span_l * weight, 0)
    if sinks is not None:
        row_l += exponential(sink - finite_m, shape)
    row_l = tl.where(row_l == 0.0, 1.0, row_l)
    span_acc = tl.load(
        acc + (row * spans + n)[:, None] * DV + columns[None, :],
        mask=(n < spans)[:, None] & (columns < DV)[None, :],
        other=0.0,
    )
    row_acc = tl.sum(span_acc * weight[:, None], 0)
    at = o.data + b * o.batch + h * o.head + i * o.row + columns
    tl.store(at, (row_acc / row_l).to(o.data.dtype.element_ty), mask=columns < DV)
    tl.store(lse + row, log_sum_exp(row_m, row_l, shape))


# ---- launcher --------------------------------------------------------------------------------------


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: str,
    window_left: int,
    window_right: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """``o [B, Hq, Sq, Dv]`` stored as ``[B, Sq, Hq, Dv]``, and ``lse [B, Hq, Sq]`` fp32.

    q ``[B, Hq, Sq, D]``: queries are the last of their ``cache_seqlens[b]`` keys. Caches ``[B, Hkv, S, D]``
    and ``[B, Hkv, S, Dv]``, or, with ``page_table [B, pages of a sequence]``, ``[pages, Hkv, page_size, D]``.
    """
    (B, Hq, Sq, D), (Hkv, S, DV) = q.shape, v_cache.shape[1:]
    o = empty_bshd(q, Hq, Sq, DV)
    lse = torch.empty(B, Hq, Sq, dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return o, lse
    tile = CONFIGURATIONS[q.element_size(), max(64, launch.padded(max(D, DV)))]
    BR = min(tile.BR, launch.padded(Hq // Hkv * Sq))
    programs = triton.cdiv(Hq // Hkv * Sq, BR) * B * Hkv
    capacity = S if page_table is None else S * page_table.shape[1]
    spans = spans_of(programs, capacity, launch.multiprocessors(q.device))
    acc = torch.empty(B, Hq, Sq, spans, DV, dtype=torch.float32, device=q.device)
    m, l = torch.empty(2, B, Hq, Sq, spans, dtype=torch.float32, device=q.device)
    left, right = (side(keys, Sq, capacity) for keys in (window_left, window_right))
    natural = 1 if q.dtype == torch.float32 else None
    shape = Shape(Hq, Hkv, Hq // Hkv, Sq, capacity, None, left, right, natural, None, None)
    terms = terms_of(scale / softcap if softcap else None, None, None, alibi_slopes, None)
    factor = factor_of(scale, softcap, shape)
    sizes = {"DV": DV, "BDV": launch.padded(DV)}
    pages = None if page_table is None else Pages(page_table, page_table.stride(0), S)
    stages = tile.stages + 2 * (pages is not None)  # a page's number takes stages of its own
    span_kernel[(programs * spans,)](
        view(q), view(k_cache), view(v_cache), cache_seqlens, pages, terms, acc, m, l, factor, shape,
        spans, D=D, BD=launch.padded(D), **sizes, BR=BR, BC=tile.BC, num_warps=tile.warps,
        num_stages=stages, **launch.OPTIONS,
    )  # fmt: skip
    join_kernel[(B * Hq * Sq,)](
        acc, m, l, sinks, view(o), lse, shape, spans, **sizes, SPANS=triton.next_power_of_2(spans),
        num_warps=4, **launch.OPTIONS,
    )  # fmt: skip
    return o, lse


def spans_of(programs: int, capacity: int, processors: int) -> int:
    """Into how many spans the keys of a head are cut, where so many programs share the rows."""
    return max(1, min(triton.cdiv(PROGRAMS * processors, programs), capacity // LEAST_SPAN, 64))
