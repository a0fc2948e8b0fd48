"""The gradient of attention's bias: ds, summed over the dimensions in which the bias was broadcast.

    bias [B or 1, Hq or 1, Sq or 1, Sk or 1]        a program owns one tile of it ...

         +--+--+--+--+            one bias for all batches: walks over the batches
         |  |##|  |  |  [BR, BC]  one row for all queries:  walks over the tiles of queries too, and
         +--+--+--+--+            adds up the rows of its sums at the end
                                  ... so its sums have one owner, in a fixed order

Scores and do v^T are computed once more for it: cheaper than writing ds, which is as large as the scores.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from bigkern.triton_kernels.attention.scores import capped, score_gradient, weights
from bigkern.triton_kernels.attention.tiles import (
    load_rows,
    rows_of,
    sequence,
    statistic_of,
    visible_keys,
    visible_queries,
)


class Owned(NamedTuple):
    """A dense [B or 1, Hq or 1, Sq or 1, Sk or 1] tensor of sums."""

    data: Tensor
    heads: int  # that it has
    sum_batches: int  # 1, or how many a program adds up
    sum_heads: int


@triton.jit
def summed_tiles(
    row,
    column,
    seq,
    shape,
    PER_QUERY: tl.constexpr,
    PER_KEY: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """(first query, tiles of queries, first key, tiles of keys) to add up, as far as they see each other."""
    row_end, column_end = seq.Sq, seq.Sk
    if PER_QUERY:
        row_end = row + BR
        begin, _, _, end = visible_keys(row, seq, shape, BR, BC)
        if PER_KEY:  # one tile, or none: begin is a multiple of BC
            column_end = tl.where(begin <= column, tl.minimum(end, column + BC), column)
        else:
            column, column_end = begin, end
    elif PER_KEY:
        row, row_end = visible_queries(column, seq, shape, BR, BC)
        column_end = column + BC
    rows = tl.cdiv(tl.maximum(0, row_end - row), BR)
    columns = tl.cdiv(tl.maximum(0, column_end - column), BC)
    return row, rows, column, columns


@triton.jit
def store_sums(
    dbias, owner, row, column, sums, shape,
    PER_QUERY: tl.constexpr, PER_KEY: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Store the sums of ds [BR, BC] at query `row` and key `column` of the owner's part of dbias."""
    i, j = (row + tl.arange(0, BR)).to(tl.int64), column + tl.arange(0, BC)
    dtype: tl.constexpr = dbias.data.dtype.element_ty
    if PER_QUERY and PER_KEY:
        at = dbias.data + owner * shape.Sq * shape.Sk + i[:, None] * shape.Sk + j[None, :]
        tl.store(at, sums.to(dtype), mask=(i < shape.Sq)[:, None] & (j < shape.Sk)[None, :])
    elif PER_QUERY:
        tl.store(dbias.data + owner * shape.Sq + i, tl.sum(sums, 1).to(dtype), mask=i < shape.Sq)
    elif PER_KEY:
        tl.store(dbias.data + owner * shape.Sk + j, tl.sum(sums, 0).to(dtype), mask=j < shape.Sk)
    else:
        tl.store(dbias.data + owner, tl.sum(tl.sum(sums, 1), 0).to(dtype))


@triton.jit
def bias_gradient_kernel(
    do, q, k, v, terms, score_lse, delta, dbias, factor, shape,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    PER_QUERY: tl.constexpr, PER_KEY: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dbias of BR queries, or of all unless PER_QUERY, and of BC keys, or of all unless PER_KEY."""
    row_tiles = tl.cdiv(shape.Sq, BR) if PER_QUERY else 1
    column_tiles = tl.cdiv(shape.Sk, BC) if PER_KEY else 1
    own_row = tl.program_id(0) // column_tiles % row_tiles * BR
    own_column = tl.program_id(0) % column_tiles * BC
    owner = (tl.program_id(0) // (column_tiles * row_tiles)).to(tl.int64)
    first_b, first_h = owner // dbias.heads, owner % dbias.heads
    seq = sequence(shape, 0)
    row, rows, column, columns = summed_tiles(own_row, own_column, seq, shape, PER_QUERY, PER_KEY, BR, BC)
    sums = tl.zeros([BR, BC], tl.float32)
    for n in range(dbias.sum_batches * dbias.sum_heads * rows * columns):
        i0, j0 = row + n // columns % rows * BR, column + n % columns * BC
        h = first_h + n // (columns * rows) % dbias.sum_heads
        b = first_b + n // (columns * rows * dbias.sum_heads)
        q_tile = load_rows(rows_of(q, b, h, 0), i0, seq.Sq, D, BD, BR, True)
        do_tile = load_rows(rows_of(do, b, h, 0), i0, seq.Sq, DV, BDV, BR, True)
        k_tile = load_rows(rows_of(k, b, h // shape.group, 0), j0, seq.Sk, D, BD, BC, True)
        v_tile = load_rows(rows_of(v, b, h // shape.group, 0), j0, seq.Sk, DV, BDV, BC, True)
        x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        i, j = i0 + tl.arange(0, BR)[:, None], j0 + tl.arange(0, BC)[None, :]
        row_lse = tl.load(statistic_of(score_lse, b, h, 0) + i, mask=i < seq.Sq, other=float("inf"))
        p = weights(capped(x, terms), row_lse, factor, terms, b, h, i, j, seq, shape, True)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
        row_delta = tl.load(statistic_of(delta, b, h, 0) + i, mask=i < seq.Sq, other=0.0)
        sums += score_gradient(p, dp, row_delta, terms, b, h, i, j, shape)
    store_sums(dbias, owner, own_row, own_column, sums, shape, PER_QUERY, PER_KEY, BR, BC)
