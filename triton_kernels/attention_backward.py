"""The backward of attention: three kernels, told in `attention.py`.

p  = exp(s - lse)                delta = rowsum(do * o)
dv = p^T do                      ds = p * (do v^T - delta)
dq = scale * ds k                dk = scale * ds^T q
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import LOG2_E, load_rows, logits, query_rows, store_rows, visible_keys


@triton.jit
def statistics_kernel(
    do, o, lse, dlse, lse_log2, delta, shape, DV: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr
):
    """delta = rowsum(do * o) - dlse, and lse in the log2 domain, +inf for a row that saw nothing."""
    start, bh, b, h = query_rows(shape, BR)
    do_tile = load_rows(do, b, h, start, shape.Sq, DV, BDV, BR, True).to(tl.float32)
    o_tile = load_rows(o, b, h, start, shape.Sq, DV, BDV, BR, True).to(tl.float32)
    rows = start + tl.arange(0, BR)
    at, exists = bh * shape.Sq + rows, rows < shape.Sq
    row_lse = tl.load(lse + at, mask=exists, other=0.0)
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2_E)
    tl.store(lse_log2 + at, row_lse, mask=exists)
    row_delta = tl.sum(do_tile * o_tile, 1)
    if dlse is not None:
        row_delta -= tl.load(dlse + at, mask=exists, other=0.0)
    tl.store(delta + at, row_delta, mask=exists)


@triton.jit
def probabilities(
    s, row_lse, mask, bias, b, h, i, j, scale_log2, shape, CAUSAL: tl.constexpr, EDGE: tl.constexpr
):
    """exp(s - lse), recomputed; row_lse broadcasts to s."""
    if EDGE or mask is not None or bias is not None:
        s = logits(s, mask, bias, b, h, i, j, scale_log2, shape, CAUSAL, EDGE)
    else:
        s = s * scale_log2
    return tl.exp2(s - row_lse)


@triton.jit
def key_value_gradient_kernel(
    do, q, k, v, mask, bias, lse_log2, delta, dk, dv, scale, scale_log2, shape,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    CAUSAL: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dk and dv of BC keys of one head. Scores are transposed, [BC, BR]: p^T and ds^T are first factors.

    Keys beyond Sk need no mask, because each key's gradient is its own row, which is not stored. Queries
    beyond Sq get lse = inf, so p = 0. A causal tile is masked everywhere: a second, unmasked loop would
    cost more registers than the comparison costs time.
    """
    tiles = tl.cdiv(shape.Sk, BC)
    column = tl.program_id(0) % tiles * BC
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, kv_head = bh // shape.Hkv, bh % shape.Hkv
    k_tile = load_rows(k, b, kv_head, column, shape.Sk, D, BD, BC, True)
    v_tile = load_rows(v, b, kv_head, column, shape.Sk, DV, BDV, BC, True)
    dk_tile = tl.zeros([BC, BD], tl.float32)
    dv_tile = tl.zeros([BC, BDV], tl.float32)
    begin = 0
    if CAUSAL:  # the first query that sees the first key
        begin = tl.maximum(0, column - shape.diagonal) // BR * BR
    for h in range(kv_head * shape.group, (kv_head + 1) * shape.group):
        for start in range(begin, shape.Sq, BR):
            q_tile = load_rows(q, b, h, start, shape.Sq, D, BD, BR, True)
            do_tile = load_rows(do, b, h, start, shape.Sq, DV, BDV, BR, True)
            rows = start + tl.arange(0, BR)
            at, exists = (b * shape.Hq + h) * shape.Sq + rows, rows < shape.Sq
            s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
            row_lse = tl.load(lse_log2 + at, mask=exists, other=float("inf"))[None, :]
            i, j = rows[None, :], column + tl.arange(0, BC)[:, None]
            p = probabilities(s, row_lse, mask, bias, b, h, i, j, scale_log2, shape, CAUSAL, CAUSAL)
            dv_tile = tl.dot(p.to(do_tile.dtype), do_tile, dv_tile, input_precision="ieee")
            dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
            row_delta = tl.load(delta + at, mask=exists, other=0.0)[None, :]  # late: registers
            ds = p * (dp - row_delta)
            dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision="ieee")
    store_rows(dk, b, kv_head, column, shape.Sk, dk_tile * scale, D, BD, BC)
    store_rows(dv, b, kv_head, column, shape.Sk, dv_tile, DV, BDV, BC)


@triton.jit
def collect(
    dq_tile, q_tile, do_tile, row_lse, row_delta, k, v, mask, bias, b, h, row, begin, end, scale_log2, shape,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add what keys [begin, end) give to the BR queries from `row`."""
    kv_head = h // shape.group
    for start in range(begin, end, BC):
        k_tile = load_rows(k, b, kv_head, start, shape.Sk, D, BD, BC, EDGE)
        v_tile = load_rows(v, b, kv_head, start, shape.Sk, DV, BDV, BC, EDGE)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # [BR, BC] fp32
        i, j = row + tl.arange(0, BR)[:, None], start + tl.arange(0, BC)[None, :]
        p = probabilities(s, row_lse[:, None], mask, bias, b, h, i, j, scale_log2, shape, CAUSAL, EDGE)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
        ds = p * (dp - row_delta[:, None])
        dq_tile = tl.dot(ds.to(k_tile.dtype), k_tile, dq_tile, input_precision="ieee")
    return dq_tile


@triton.jit
def query_gradient_kernel(
    do, q, k, v, mask, bias, lse_log2, delta, dq, scale, scale_log2, shape,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    CAUSAL: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dq of BR queries of one head."""
    row, bh, b, h = query_rows(shape, BR)
    q_tile = load_rows(q, b, h, row, shape.Sq, D, BD, BR, True)
    do_tile = load_rows(do, b, h, row, shape.Sq, DV, BDV, BR, True)
    rows = row + tl.arange(0, BR)
    at, exists = bh * shape.Sq + rows, rows < shape.Sq
    row_lse = tl.load(lse_log2 + at, mask=exists, other=float("inf"))
    row_delta = tl.load(delta + at, mask=exists, other=0.0)
    plain, end = visible_keys(row, shape, CAUSAL, BR, BC)
    dq_tile = tl.zeros([BR, BD], tl.float32)
    dq_tile = collect(
        dq_tile, q_tile, do_tile, row_lse, row_delta, k, v, mask, bias, b, h, row, 0, plain,
        scale_log2, shape, D, DV, BD, BDV, BR, BC, CAUSAL, False,
    )  # fmt: skip
    dq_tile = collect(
        dq_tile, q_tile, do_tile, row_lse, row_delta, k, v, mask, bias, b, h, row, plain, end,
        scale_log2, shape, D, DV, BD, BDV, BR, BC, CAUSAL, True,
    )  # fmt: skip
    store_rows(dq, b, h, row, shape.Sq, dq_tile * scale, D, BD, BR)
