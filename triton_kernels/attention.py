"""Attention without the score matrix: forward and backward in Triton.

    s = scale * q k^T + bias     lse = log sum exp s     o = exp(s - lse) v

A program of the forward owns BR rows of one head and walks over the keys in tiles of BC, keeping the
row's maximum m, its sum l and the unnormalised output:

         q [BR, D]      k, v [BC, D]          stays in registers:  acc [BR, DV], m [BR], l [BR]
      +-----------+   +--+--+--+--+--+        loaded once:         q
      |  program  | x |  |  |  |  |  |        streamed:            k, v, one tile ahead of the product
      +-----------+   +--+--+--+--+--+
                        plain   | edge        masks are built only in edge tiles: where the causal
                                              diagonal or the end of the keys runs through the tile

The backward recomputes p = exp(s - lse) and runs three kernels: ``statistics`` (delta = rowsum(do * o)),
``key_value_gradient`` (a program owns BC keys and walks over the queries of all heads that share them) and
``query_gradient`` (a program owns BR queries and walks over the keys). Each gradient has one owner, so
there are no atomics and the result is the same in every run.

Scores live in the log2 domain (s * log2 e), because the hardware's exponential is exp2. A row with nothing
to attend to gives o = 0, lse = -inf and zero gradients.

Dao, FlashAttention-2 (2023); Milakov and Gimelshein, Online normalizer calculation for softmax (2018).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LAUNCH, architecture, padded

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Tile(NamedTuple):
    """A launch: BR query rows and BC key columns a tile, warps a program, stages of the load pipeline."""

    BR: int
    BC: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    forward: Tile
    key_value: Tile
    query: Tile


# (architecture, bytes an element, head dim up to) -> tiles. 2 bytes run on tensor cores, 4 on plain FMA.
CONFIGURATIONS = {
    (80, 2, 64): Tiles(Tile(128, 32, 4, 3), Tile(32, 128, 8, 2), Tile(64, 32, 4, 2)),
    (80, 2, 128): Tiles(Tile(128, 32, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    (80, 2, 256): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 32, 8, 1)),
    (80, 4, 64): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(64, 32, 8, 1)),
    (80, 4, 128): Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
    (80, 4, 256): Tiles(Tile(32, 32, 16, 1), Tile(16, 16, 8, 1), Tile(16, 16, 4, 1)),
    (90, 2, 64): Tiles(Tile(128, 64, 8, 3), Tile(64, 128, 8, 3), Tile(128, 64, 8, 3)),
    (90, 2, 128): Tiles(Tile(128, 64, 8, 3), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2)),
    (90, 2, 256): Tiles(Tile(128, 32, 8, 2), Tile(32, 32, 8, 2), Tile(128, 32, 8, 2)),
    (90, 4, 64): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 4, 1)),
    (90, 4, 128): Tiles(Tile(32, 16, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
    (90, 4, 256): Tiles(Tile(32, 32, 16, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}


class View(NamedTuple):
    """A [B, H, S, D] tensor whose last stride is 1; the other strides count elements."""

    data: Tensor
    batch: int
    head: int
    row: int


class Broadcast(NamedTuple):
    """A [B, Hq, Sq, Sk] tensor, strides 0 where it is broadcast; rows are dense, padded to 16 elements."""

    data: Tensor
    batch: int
    head: int
    row: int


class Shape(NamedTuple):
    Hq: int
    Hkv: int
    group: int  # query heads that share a key head
    Sq: int
    Sk: int
    diagonal: int  # query i sees keys j <= i + diagonal where CAUSAL


# ---- what the kernels share ------------------------------------------------------------------------


@triton.jit
def head_of(x, b, h):
    """Where one head's [S, D] begins; b and h are int64, since a tensor may pass 2^31 elements."""
    return x.data + b * x.batch + h * x.head


@triton.jit
def row_tile(head, row, start, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, BD] pointers to the rows from `start` of one head."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BD)
    return head + tl.cast(start, tl.int64) * row + (rows[:, None] * row + columns[None, :])


@triton.jit
def within(start, end, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, BD], which elements of a row tile exist."""
    return (start + tl.arange(0, ROWS) < end)[:, None] & (tl.arange(0, BD) < D)[None, :]


@triton.jit
def load_rows(
    head, row, start, end, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, EDGE: tl.constexpr
):
    """[ROWS, BD] rows from `start`, zero where they do not exist; only an EDGE tile may pass `end`."""
    tile = row_tile(head, row, start, D, BD, ROWS)
    if EDGE:
        x = tl.load(tile, mask=within(start, end, D, BD, ROWS), other=0.0)
    elif D != BD:
        x = tl.load(tile, mask=(tl.arange(0, BD) < D)[None, :], other=0.0)
    else:
        x = tl.load(tile)
    return x


@triton.jit
def store_rows(head, row, start, end, x, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    tl.store(row_tile(head, row, start, D, BD, ROWS), x, mask=within(start, end, D, BD, ROWS))


@triton.jit
def score_tile(x, b, h, i, j, shape):
    """mask or bias at queries i and keys j, which broadcast to a tile; undefined where these do not exist."""
    exists = (i < shape.Sq) & (j < tl.cdiv(shape.Sk, 16) * 16)  # rows are padded: whole vectors exist or not
    return tl.load(
        x.data + b * x.batch + h * x.head + (tl.cast(i, tl.int64) * x.row + j), mask=exists, other=0
    )


@triton.jit
def logits(s, mask, bias, b, h, i, j, scale_log2, shape, CAUSAL: tl.constexpr, EDGE: tl.constexpr):
    """s * scale + bias in the log2 domain, -inf where query i may not see key j; i and j broadcast to s."""
    s = s * scale_log2
    if bias is not None:
        s += LOG2_E * score_tile(bias, b, h, i, j, shape).to(tl.float32)
    if mask is not None:
        s = tl.where(score_tile(mask, b, h, i, j, shape) != 0, s, float("-inf"))
    if EDGE:
        seen = j < shape.Sk
        if CAUSAL:
            seen = seen & (j <= i + shape.diagonal)
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def visible_keys(start, shape, CAUSAL: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """For BR queries from `start`: keys below `plain` need no mask, keys from `end` on are not seen."""
    plain, end = shape.Sk, shape.Sk
    if CAUSAL:
        plain = tl.maximum(0, tl.minimum(plain, start + shape.diagonal + 1))
        end = tl.maximum(0, tl.minimum(end, start + shape.diagonal + BR))
    return plain // BC * BC, end


# ---- forward ---------------------------------------------------------------------------------------


@triton.jit
def attend(
    acc, m, l, q_tile, k_head, v_head, k_row, v_row, mask, bias, b, h, row, begin, end, scale_log2, shape,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BC: tl.constexpr,
    BR: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Fold keys [begin, end) into the running output, maximum and sum of the BR rows from `row`."""
    for start in range(begin, end, BC):
        k_tile = load_rows(k_head, k_row, start, shape.Sk, D, BD, BC, EDGE)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # [BR, BC] fp32
        if EDGE or mask is not None or bias is not None:
            i, j = row + tl.arange(0, BR)[:, None], start + tl.arange(0, BC)[None, :]
            s = logits(s, mask, bias, b, h, i, j, scale_log2, shape, CAUSAL, EDGE)
            new_m = tl.maximum(m, tl.max(s, 1))
            finite_m = tl.where(new_m == float("-inf"), 0.0, new_m)  # no NaN while a row has seen nothing
            p = tl.exp2(s - finite_m[:, None])
            rescale = tl.exp2(m - finite_m)
        else:  # scale is not negative, so it commutes with the maximum and fuses into the subtraction
            new_m = tl.maximum(m, tl.max(s, 1) * scale_log2)
            p = tl.exp2(s * scale_log2 - new_m[:, None])
            rescale = tl.exp2(m - new_m)
        l = l * rescale + tl.sum(p, 1)
        v_tile = load_rows(v_head, v_row, start, shape.Sk, DV, BDV, BC, EDGE)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee")
        m = new_m
    return acc, m, l


@triton.jit
def attention_kernel(
    q, k, v, mask, bias, o, lse, scale_log2, shape,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    CAUSAL: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(shape.Sq, BR)
    start = (tiles - 1 - tl.program_id(0) % tiles) * BR  # the long rows of a causal triangle first
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // shape.Hq, bh % shape.Hq
    k_head, v_head = head_of(k, b, h // shape.group), head_of(v, b, h // shape.group)
    q_tile = load_rows(head_of(q, b, h), q.row, start, shape.Sq, D, BD, BR, True)

    acc = tl.zeros([BR, BDV], tl.float32)
    m = tl.full([BR], float("-inf"), tl.float32)  # log2 domain
    l = tl.zeros([BR], tl.float32)
    plain, end = visible_keys(start, shape, CAUSAL, BR, BC)
    acc, m, l = attend(
        acc, m, l, q_tile, k_head, v_head, k.row, v.row, mask, bias, b, h, start, 0, plain, scale_log2, shape,
        D, DV, BD, BDV, BC, BR, CAUSAL, False,
    )  # fmt: skip
    acc, m, l = attend(
        acc, m, l, q_tile, k_head, v_head, k.row, v.row, mask, bias, b, h, start, plain, end, scale_log2, shape,
        D, DV, BD, BDV, BC, BR, CAUSAL, True,
    )  # fmt: skip

    l = tl.where(l == 0.0, 1.0, l)  # a row that saw nothing: o = 0, lse = m = -inf
    acc = (acc / l[:, None]).to(o.data.dtype.element_ty)
    store_rows(head_of(o, b, h), o.row, start, shape.Sq, acc, DV, BDV, BR)
    rows = start + tl.arange(0, BR)
    tl.store(lse + bh * shape.Sq + rows, (m + tl.log2(l)) * LN_2, mask=rows < shape.Sq)


# ---- backward --------------------------------------------------------------------------------------


@triton.jit
def statistics_kernel(
    do, o, lse, lse_log2, delta, shape, DV: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr
):
    """delta = rowsum(do * o), and lse in the log2 domain, +inf for a row that saw nothing so that p = 0."""
    tiles = tl.cdiv(shape.Sq, BR)
    start = tl.program_id(0) % tiles * BR
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // shape.Hq, bh % shape.Hq
    do_tile = load_rows(head_of(do, b, h), do.row, start, shape.Sq, DV, BDV, BR, True).to(tl.float32)
    o_tile = load_rows(head_of(o, b, h), o.row, start, shape.Sq, DV, BDV, BR, True).to(tl.float32)
    rows = start + tl.arange(0, BR)
    at, exists = bh * shape.Sq + rows, rows < shape.Sq
    row_lse = tl.load(lse + at, mask=exists, other=0.0)
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2_E)
    tl.store(lse_log2 + at, row_lse, mask=exists)
    tl.store(delta + at, tl.sum(do_tile * o_tile, 1), mask=exists)


@triton.jit
def load_statistics(lse_log2, delta, bh, rows, Sq):
    """Two [rows] fp32; a row that does not exist gets lse = inf, hence p = 0 and no gradient."""
    at = bh * Sq + rows
    return tl.load(lse_log2 + at, mask=rows < Sq, other=float("inf")), tl.load(
        delta + at, mask=rows < Sq, other=0.0
    )


@triton.jit
def probabilities(
    s, row_lse, mask, bias, b, h, i, j, scale_log2, shape, CAUSAL: tl.constexpr, EDGE: tl.constexpr
):
    """exp(s - lse), recomputed; row_lse broadcasts to s."""
    if EDGE or mask is not None or bias is not None:
        p = tl.exp2(logits(s, mask, bias, b, h, i, j, scale_log2, shape, CAUSAL, EDGE) - row_lse)
    else:
        p = tl.exp2(s * scale_log2 - row_lse)
    return p


@triton.jit
def collect_key_value(
    dk, dv, k_tile, v_tile, q_head, do_head, q_row, do_row, mask, bias, lse_log2, delta, b, h, column, begin, end,
    scale_log2, shape, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add the queries [begin, end) of one head; everything is transposed, [BC, BR], keys down the side."""
    for start in range(begin, end, BR):
        q_tile = load_rows(q_head, q_row, start, shape.Sq, D, BD, BR, True)
        do_tile = load_rows(do_head, do_row, start, shape.Sq, DV, BDV, BR, True)
        rows = start + tl.arange(0, BR)
        at, exists = (b * shape.Hq + h) * shape.Sq + rows, rows < shape.Sq
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        row_lse = tl.load(lse_log2 + at, mask=exists, other=float("inf"))[
            None, :
        ]  # a row beyond Sq gets p = 0
        i, j = rows[None, :], column + tl.arange(0, BC)[:, None]
        p = probabilities(s, row_lse, mask, bias, b, h, i, j, scale_log2, shape, CAUSAL, EDGE)
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision="ieee")
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
        ds = p * (dp - tl.load(delta + at, mask=exists, other=0.0)[None, :])
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def key_value_gradient_kernel(
    do, q, k, v, mask, bias, lse_log2, delta, dk, dv, scale, scale_log2, shape,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    CAUSAL: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(shape.Sk, BC)
    start = tl.program_id(0) % tiles * BC
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, kv_head = bh // shape.Hkv, bh % shape.Hkv
    k_tile = load_rows(head_of(k, b, kv_head), k.row, start, shape.Sk, D, BD, BC, True)
    v_tile = load_rows(head_of(v, b, kv_head), v.row, start, shape.Sk, DV, BDV, BC, True)

    begin, plain = 0, 0  # queries from `begin` on see the first key, from `plain` on all keys of this tile
    if CAUSAL:
        begin = tl.maximum(0, start - shape.diagonal) // BR * BR
        plain = tl.maximum(0, start + BC - 1 - shape.diagonal)
        plain = tl.minimum(tl.cdiv(plain, BR) * BR, tl.cdiv(shape.Sq, BR) * BR)
    gradient_k = tl.zeros([BC, BD], tl.float32)
    gradient_v = tl.zeros([BC, BDV], tl.float32)
    for member in range(0, shape.group):
        h = kv_head * shape.group + member
        gradient_k, gradient_v = collect_key_value(
            gradient_k, gradient_v, k_tile, v_tile, head_of(q, b, h), head_of(do, b, h), q.row, do.row, mask, bias,
            lse_log2, delta, b, h, start, begin, shape.Sq, scale_log2, shape, D, DV, BD, BDV, BR, BC, CAUSAL, CAUSAL,
        )  # fmt: skip
    gradient_k = (gradient_k * scale).to(dk.data.dtype.element_ty)
    gradient_v = gradient_v.to(dv.data.dtype.element_ty)
    store_rows(head_of(dk, b, kv_head), dk.row, start, shape.Sk, gradient_k, D, BD, BC)
    store_rows(head_of(dv, b, kv_head), dv.row, start, shape.Sk, gradient_v, DV, BDV, BC)


@triton.jit
def collect_query(
    dq, q_tile, do_tile, row_lse, row_delta, k_head, v_head, k_row, v_row, mask, bias, b, h, row, begin, end,
    scale_log2, shape, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add the keys [begin, end) for the BR queries from `row`."""
    for start in range(begin, end, BC):
        k_tile = load_rows(k_head, k_row, start, shape.Sk, D, BD, BC, EDGE)
        v_tile = load_rows(v_head, v_row, start, shape.Sk, DV, BDV, BC, EDGE)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # [BR, BC] fp32
        i, j = row + tl.arange(0, BR)[:, None], start + tl.arange(0, BC)[None, :]
        p = probabilities(s, row_lse[:, None], mask, bias, b, h, i, j, scale_log2, shape, CAUSAL, EDGE)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
        ds = p * (dp - row_delta[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq


@triton.jit
def query_gradient_kernel(
    do, q, k, v, mask, bias, lse_log2, delta, dq, scale, scale_log2, shape,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    CAUSAL: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(shape.Sq, BR)
    start = (tiles - 1 - tl.program_id(0) % tiles) * BR
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // shape.Hq, bh % shape.Hq
    k_head, v_head = head_of(k, b, h // shape.group), head_of(v, b, h // shape.group)
    q_tile = load_rows(head_of(q, b, h), q.row, start, shape.Sq, D, BD, BR, True)
    do_tile = load_rows(head_of(do, b, h), do.row, start, shape.Sq, DV, BDV, BR, True)
    rows = start + tl.arange(0, BR)
    row_lse, row_delta = load_statistics(lse_log2, delta, bh, rows, shape.Sq)
    plain, end = visible_keys(start, shape, CAUSAL, BR, BC)
    gradient = tl.zeros([BR, BD], tl.float32)
    gradient = collect_query(
        gradient, q_tile, do_tile, row_lse, row_delta, k_head, v_head, k.row, v.row, mask, bias, b, h,
        start, 0, plain, scale_log2, shape, D, DV, BD, BDV, BR, BC, CAUSAL, False,
    )  # fmt: skip
    gradient = collect_query(
        gradient, q_tile, do_tile, row_lse, row_delta, k_head, v_head, k.row, v.row, mask, bias, b, h,
        start, plain, end, scale_log2, shape, D, DV, BD, BDV, BR, BC, CAUSAL, True,
    )  # fmt: skip
    gradient = (gradient * scale).to(dq.data.dtype.element_ty)
    store_rows(head_of(dq, b, h), dq.row, start, shape.Sq, gradient, D, BD, BR)


# ---- launchers -------------------------------------------------------------------------------------


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, causal: str
) -> tuple[Tensor, Tensor]:
    """``o [B, Hq, Sq, Dv]`` stored as ``[B, Sq, Hq, Dv]``, and ``lse [B, Hq, Sq]`` fp32.

    q ``[B, Hq, Sq, D]``, k ``[B, Hkv, Sk, D]``, v ``[B, Hkv, Sk, Dv]``; mask and bias expanded to
    ``[B, Hq, Sq, Sk]``; causal is ``"none"``, ``"top_left"`` or ``"bottom_right"``.
    """
    q, scale = (q, scale) if scale >= 0 else (-q, -scale)
    B, Hq, Sq, _ = q.shape
    o = empty_bshd(q, Hq, Sq, v.shape[3])
    lse = torch.empty(B, Hq, Sq, dtype=torch.float32, device=q.device)
    if lse.numel() > 0:
        tile = tiles_of(q, v).forward
        attention_kernel[(triton.cdiv(Sq, tile.BR) * B * Hq,)](
            view(q), view(k), view(v), broadcast(mask), broadcast(bias), view(o), lse, scale * LOG2_E.value,
            shape_of(q, k, causal), **constants(q, v, causal), **launch(tile),
        )  # fmt: skip
    return o, lse


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    causal: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, each stored as ``[B, S, H, D]``."""
    B, Hq, Sq, D = q.shape
    Hkv, Sk, DV = v.shape[1:]
    dq, dk, dv = empty_bshd(q, Hq, Sq, D), empty_bshd(k, Hkv, Sk, D), empty_bshd(v, Hkv, Sk, DV)
    lse_log2, delta = torch.empty(2, B, Hq, Sq, dtype=torch.float32, device=q.device)
    shape, tiles, sizes = shape_of(q, k, causal), tiles_of(q, v), constants(q, v, causal)
    inputs = (view(do), view(q), view(k), view(v), broadcast(mask), broadcast(bias), lse_log2, delta)
    scales = (scale, scale * LOG2_E.value)
    if lse.numel() > 0:
        statistics_kernel[(triton.cdiv(Sq, 32) * B * Hq,)](
            view(do), view(o), lse.contiguous(), lse_log2, delta, shape,
            DV=DV, BDV=sizes["BDV"], BR=32, num_warps=4, **LAUNCH,
        )  # fmt: skip
        query_gradient_kernel[(triton.cdiv(Sq, tiles.query.BR) * B * Hq,)](
            *inputs, view(dq), *scales, shape, **sizes, **launch(tiles.query)
        )
    if B * Hkv * Sk > 0:
        key_value_gradient_kernel[(triton.cdiv(Sk, tiles.key_value.BC) * B * Hkv,)](
            *inputs, view(dk), view(dv), *scales, shape, **sizes, **launch(tiles.key_value)
        )
    return dq, dk, dv


def tiles_of(q: Tensor, v: Tensor) -> Tiles:
    D = max(64, padded(max(q.shape[3], v.shape[3])))
    return CONFIGURATIONS[architecture(q.device), q.element_size(), D]


def launch(tile: Tile) -> dict[str, int | bool]:
    return {"BR": tile.BR, "BC": tile.BC, "num_warps": tile.warps, "num_stages": tile.stages, **LAUNCH}


def constants(q: Tensor, v: Tensor, causal: str) -> dict[str, int | bool]:
    D, DV = q.shape[3], v.shape[3]
    return {"D": D, "DV": DV, "BD": padded(D), "BDV": padded(DV), "CAUSAL": causal != "none"}


def shape_of(q: Tensor, k: Tensor, causal: str) -> Shape:
    (Hq, Sq), (Hkv, Sk) = q.shape[1:3], k.shape[1:3]
    return Shape(Hq, Hkv, Hq // Hkv, Sq, Sk, Sk - Sq if causal == "bottom_right" else 0)


def view(x: Tensor) -> View:
    """Offsets inside a tile are 32-bit: what has an odd last stride, or enormous rows, is copied."""
    if (x.shape[3] > 1 and x.stride(3) != 1) or x.stride(2) >= 2**23:
        x = x.contiguous()
    return View(x, x.stride(0), x.stride(1), x.stride(2))


def broadcast(x: Tensor | None) -> Broadcast | None:
    """Rows that vectors cannot read are copied into padded ones, without what is broadcast over B, H or Sq."""
    if x is None:
        return None
    Sk = x.shape[3]
    if x.stride(3) != 1 or any(size % 16 for size in (Sk, *x.stride()[:3], x.data_ptr())):
        stored = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride()[:3])]
        rows = x.new_empty(*stored.shape[:3], triton.cdiv(Sk, 16) * 16)[..., :Sk]
        x = rows.copy_(stored).expand(x.shape)
    return Broadcast(x.view(torch.uint8) if x.dtype == torch.bool else x, *x.stride()[:3])


def empty_bshd(x: Tensor, H: int, S: int, D: int) -> Tensor:
    """An uninitialised ``[B, H, S, D]`` stored as ``[B, S, H, D]``: merging heads needs no copy."""
    return x.new_empty(x.shape[0], S, H, D).transpose(1, 2)
