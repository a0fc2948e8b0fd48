"""The backward of attention: three kernels, or two of them, told in `attention.py`.

p  = exp(s - lse)                delta = rowsum(do * o) - dlse
dv = dropout(p)^T do             ds    = p * (dropout(do v^T) - delta)
dx = ds * (1 - tanh(..)^2)       dq    = scale * dx k          dk = scale * dx^T q

A tile's products come in the order q k^T, p^T do, do v^T, dx^T q, so that p leaves for dv before dp arrives;
where dq is summed by atomics, dx k is the fifth.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bigkern.triton_kernels.attention.scores import (
    capped,
    dropped,
    product_gradient,
    score_gradient,
    to_score,
    weights,
)
from bigkern.triton_kernels.attention.tiles import (
    add_rows,
    load_rows,
    query_rows,
    rows_of,
    sequence,
    statistic_of,
    store_rows,
    visible_keys,
    visible_queries,
)


@triton.jit
def statistics_kernel(
    do, o, lse, dlse, score_lse, delta, Hq, S, shape, DV: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr
):
    """delta, and lse as a score, +inf for a row that saw nothing so that p = 0; all [B, Hq, S]."""
    tiles = tl.cdiv(S, BR)
    start = tl.program_id(0) % tiles * BR
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    do_tile = load_rows(rows_of(do, bh // Hq, bh % Hq, 0), start, S, DV, BDV, BR, True).to(tl.float32)
    o_tile = load_rows(rows_of(o, bh // Hq, bh % Hq, 0), start, S, DV, BDV, BR, True).to(tl.float32)
    rows = start + tl.arange(0, BR)
    at, exists = bh * S + rows, rows < S
    row_delta = tl.sum(do_tile * o_tile, 1)
    if dlse is not None:
        row_delta -= tl.load(dlse + at, mask=exists, other=0.0)
    row_lse = tl.load(lse + at, mask=exists, other=0.0)
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), to_score(row_lse, shape))
    tl.store(score_lse + at, row_lse, mask=exists)
    tl.store(delta + at, row_delta, mask=exists)


@triton.jit
def key_value_gradient_kernel(
    do, q, k, v, terms, score_lse, delta, dq_sums, dk, dv, scale, factor, shape,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BC keys of one head. Scores are transposed, [BC, BR]: p^T and dx^T are first factors.

    Given dq_sums, [B, Hq, Sq, D] fp32, also adds to them what these keys give to dq / scale, in any order.

    Keys beyond Sk need no mask for dk and dv, because each key's gradient is its own row, which is not
    stored; for dq they do, because their p may be inf. Queries beyond Sq get lse = inf, so p = 0. With a
    window every tile is masked: a second, unmasked loop would cost more registers than the comparison
    costs time.
    """
    tiles = tl.cdiv(shape.Sk, BC)
    column = tl.program_id(0) % tiles * BC
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, kv_head = bh // shape.Hkv, bh % shape.Hkv
    seq = sequence(shape, b)
    if shape.q_begins is not None and column >= seq.Sk:
        return
    EDGE: tl.constexpr = shape.left is not None or shape.right is not None or dq_sums is not None
    k_tile = load_rows(rows_of(k, b, kv_head, seq.k_begin), column, seq.Sk, D, BD, BC, True)
    v_tile = load_rows(rows_of(v, b, kv_head, seq.k_begin), column, seq.Sk, DV, BDV, BC, True)
    dk_tile = tl.zeros([BC, BD], tl.float32)
    dv_tile = tl.zeros([BC, BDV], tl.float32)
    begin, end = visible_queries(column, seq, shape, BR, BC)
    for h in range(kv_head * shape.group, (kv_head + 1) * shape.group):
        q_rows = rows_of(q, b, h, seq.q_begin)
        do_rows = rows_of(do, b, h, seq.q_begin)
        for start in range(begin, end, BR):
            q_tile = load_rows(q_rows, start, seq.Sq, D, BD, BR, True)
            do_tile = load_rows(do_rows, start, seq.Sq, DV, BDV, BR, True)
            x = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
            rows = start + tl.arange(0, BR)
            i, j = rows[None, :], column + tl.arange(0, BC)[:, None]
            row_lse = tl.load(
                statistic_of(score_lse, b, h, seq.q_begin) + i, mask=i < seq.Sq, other=float("inf")
            )
            x = capped(x, terms)
            p = weights(x, row_lse, factor, terms, b, h, i, j, seq, shape, EDGE)
            pv = dropped(p, terms, b, h, i, j, shape)
            dv_tile = tl.dot(pv.to(do_tile.dtype), do_tile, dv_tile, input_precision=PRECISION)
            dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
            row_delta = tl.load(  # late: registers
                statistic_of(delta, b, h, seq.q_begin) + i, mask=i < seq.Sq, other=0.0
            )
            dx = product_gradient(score_gradient(p, dp, row_delta, terms, b, h, i, j, shape), x, terms)
            dx = dx.to(q_tile.dtype)
            dk_tile = tl.dot(dx, q_tile, dk_tile, input_precision=PRECISION)
            if dq_sums is not None:
                dq_tile = tl.dot(tl.trans(dx), k_tile, input_precision=PRECISION)
                add_rows(rows_of(dq_sums, b, h, seq.q_begin), start, seq.Sq, dq_tile, D, BD, BR)
    store_rows(rows_of(dk, b, kv_head, seq.k_begin), column, seq.Sk, dk_tile * scale, D, BD, BC)
    store_rows(rows_of(dv, b, kv_head, seq.k_begin), column, seq.Sk, dv_tile, DV, BDV, BC)


@triton.jit
def collect(
    dq_tile, q_tile, do_tile, row_lse, row_delta, k_rows, v_rows, terms, b, h, row, begin, end, factor, seq,
    shape, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add what keys [begin, end) give to the BR queries from `row`."""
    for start in range(begin, end, BC):
        k_tile = load_rows(k_rows, start, seq.Sk, D, BD, BC, EDGE)
        v_tile = load_rows(v_rows, start, seq.Sk, DV, BDV, BC, EDGE)
        x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)  # [BR, BC] fp32
        i, j = row + tl.arange(0, BR)[:, None], start + tl.arange(0, BC)[None, :]
        x = capped(x, terms)
        p = weights(x, row_lse[:, None], factor, terms, b, h, i, j, seq, shape, EDGE)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
        ds = score_gradient(p, dp, row_delta[:, None], terms, b, h, i, j, shape)
        dx = product_gradient(ds, x, terms)
        dq_tile = tl.dot(dx.to(k_tile.dtype), k_tile, dq_tile, input_precision=PRECISION)
    return dq_tile


@triton.jit
def query_gradient_kernel(
    do, q, k, v, terms, score_lse, delta, dq, scale, factor, shape,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BR queries of one head."""
    row, b, h = query_rows(shape, BR)
    seq = sequence(shape, b)
    if shape.q_begins is not None and row >= seq.Sq:
        return
    q_tile = load_rows(rows_of(q, b, h, seq.q_begin), row, seq.Sq, D, BD, BR, True)
    do_tile = load_rows(rows_of(do, b, h, seq.q_begin), row, seq.Sq, DV, BDV, BR, True)
    k_rows = rows_of(k, b, h // shape.group, seq.k_begin)
    v_rows = rows_of(v, b, h // shape.group, seq.k_begin)
    rows = row + tl.arange(0, BR)
    row_lse = tl.load(
        statistic_of(score_lse, b, h, seq.q_begin) + rows, mask=rows < seq.Sq, other=float("inf")
    )
    row_delta = tl.load(statistic_of(delta, b, h, seq.q_begin) + rows, mask=rows < seq.Sq, other=0.0)
    begin, plain, edge, end = visible_keys(row, seq, shape, BR, BC)
    dq_tile = tl.zeros([BR, BD], tl.float32)
    if shape.left is not None:
        dq_tile = collect(
            dq_tile, q_tile, do_tile, row_lse, row_delta, k_rows, v_rows, terms, b, h, row, begin,
            tl.minimum(plain, end), factor, seq, shape, D, DV, BD, BDV, BR, BC, PRECISION, True,
        )  # fmt: skip
    dq_tile = collect(
        dq_tile, q_tile, do_tile, row_lse, row_delta, k_rows, v_rows, terms, b, h, row, plain, edge,
        factor, seq, shape, D, DV, BD, BDV, BR, BC, PRECISION, False,
    )  # fmt: skip
    dq_tile = collect(
        dq_tile, q_tile, do_tile, row_lse, row_delta, k_rows, v_rows, terms, b, h, row, edge, end,
        factor, seq, shape, D, DV, BD, BDV, BR, BC, PRECISION, True,
    )  # fmt: skip
    store_rows(rows_of(dq, b, h, seq.q_begin), row, seq.Sq, dq_tile * scale, D, BD, BR)
