"""The forward of attention: one kernel, told in `attention.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from bigkern.triton_kernels.attention.scores import dropped, log_sum_exp, online_softmax, to_score
from bigkern.triton_kernels.attention.tiles import (
    load_rows,
    query_rows,
    rows_of,
    sequence,
    statistic_of,
    store_rows,
    visible_keys,
)


@triton.jit
def attend(
    acc, m, l, q_tile, k_rows, v_rows, terms, b, h, row, begin, end, factor, seq, shape,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Fold keys [begin, end) into the running output, maximum and sum of the BR queries from `row`."""
    for start in range(begin, end, BC):
        k_tile = load_rows(k_rows, start, seq.Sk, D, BD, BC, EDGE)
        x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)  # [BR, BC] fp32
        i, j = row + tl.arange(0, BR)[:, None], start + tl.arange(0, BC)[None, :]
        p, rescale, m, l = online_softmax(x, m, l, factor, terms, b, h, i, j, seq, shape, EDGE)
        p = dropped(p, terms, b, h, i, j, shape)
        v_tile = load_rows(v_rows, start, seq.Sk, DV, BDV, BC, EDGE)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision=PRECISION)
    return acc, m, l


@triton.jit
def attention_kernel(
    q, k, v, terms, sinks, o, lse, factor, shape,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o and lse of BR queries of one head."""
    row, b, h = query_rows(shape, BR)
    seq = sequence(shape, b)
    if shape.q_begins is not None and row >= seq.Sq:
        return
    q_tile = load_rows(rows_of(q, b, h, seq.q_begin), row, seq.Sq, D, BD, BR, True)
    k_rows = rows_of(k, b, h // shape.group, seq.k_begin)
    v_rows = rows_of(v, b, h // shape.group, seq.k_begin)
    acc = tl.zeros([BR, BDV], tl.float32)
    m = tl.full([BR], float("-inf"), tl.float32)
    l = tl.zeros([BR], tl.float32)
    if sinks is not None:  # a sink is a key that every row sees first, without a value
        m = tl.zeros([BR], tl.float32) + to_score(tl.load(sinks + h), shape)
        l += 1.0
    begin, plain, edge, end = visible_keys(row, seq, shape, BR, BC)
    if shape.left is not None:
        acc, m, l = attend(
            acc, m, l, q_tile, k_rows, v_rows, terms, b, h, row, begin, tl.minimum(plain, end), factor, seq,
            shape, D, DV, BD, BDV, BR, BC, PRECISION, True,
        )  # fmt: skip
    acc, m, l = attend(
        acc, m, l, q_tile, k_rows, v_rows, terms, b, h, row, plain, edge, factor, seq, shape,
        D, DV, BD, BDV, BR, BC, PRECISION, False,
    )  # fmt: skip
    acc, m, l = attend(
        acc, m, l, q_tile, k_rows, v_rows, terms, b, h, row, edge, end, factor, seq, shape,
        D, DV, BD, BDV, BR, BC, PRECISION, True,
    )  # fmt: skip
    l = tl.where(l == 0.0, 1.0, l)  # a row that saw nothing: o = 0, lse = m = -inf
    store_rows(rows_of(o, b, h, seq.q_begin), row, seq.Sq, acc / l[:, None], DV, BDV, BR)
    rows = row + tl.arange(0, BR)
    at = statistic_of(lse, b, h, seq.q_begin) + rows
    tl.store(at, log_sum_exp(m, l, shape), mask=rows < seq.Sq)
