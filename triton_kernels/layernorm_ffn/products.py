"""An FFN's matrix products, each in one kernel with what follows it; told in `layernorm_ffn.py`.

    up               p = x W1^T + b1            a = drop(act(p)), gated: drop(act(gate) * up), p = [gate | up]
    down             y = drop(a W2^T + b2) (+ residual)
    up_backward      dp = drop(dz W2) act'(p)   db1 = sum of dp's rows, and a once more
    weight_gradient  dW = d^T x, stored, or added to fp32 sums

The sums of a tile leave the tensor cores as fp32 and are rounded once, after everything that follows. A gated
up-projection keeps two accumulators, for the gate's columns and for the others, of the same rows:

    x [BM, BK]  .  W1 rows [column, + BN)        -> gate [BM, BN]      a = drop(act(gate) * up)
                   W1 rows [F + column, + BN)    -> up   [BM, BN]

db1's partial sums have one owner each, [row tiles, F] fp32, and are added up in a fixed order.

Products of frozen weights, `frozen_ffn.py`, have a scale for each row and column of their sums besides.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigkern.triton_kernels.common.dropout import HIDDEN, OUTPUT, dropout_of, dropped
from bigkern.triton_kernels.common.products import grid, halves, operand, options, place, products, tile_for
from bigkern.triton_kernels.common.rows import affine, column_sum, dense_rows, pointers, row_stride
from bigkern.triton_kernels.layernorm_ffn.activation import GATED, activate, store_gradients
from bigkern.triton_kernels.norm import norm

Dropout = tuple[float, Tensor | None]  # probability, key


@triton.jit
def scaled(sums, row_scale, column_scale, bias, rows, columns, row_exists, column_exists):
    """sums * row_scale * column_scale + bias; without scales where no factor was quantized."""
    if row_scale is not None:
        sums = sums * tl.load(row_scale + rows, mask=row_exists, other=0.0)[:, None]
    return affine(sums, column_scale, bias, columns, column_exists)


@triton.jit
def finish_up(
    p, up, x_scale, w1_scale, b1, preactivation, out, dropout, row, column, M, F,
    ACT: tl.constexpr, GATES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Stores a, and the preactivation if it is given, SLICE columns at a time."""
    if BN > SLICE:
        p, p_right = halves(p)
        up, up_right = halves(up)
        finish_up(
            p, up, x_scale, w1_scale, b1, preactivation, out, dropout, row, column, M, F,
            ACT, GATES, BM, BN // 2, SLICE,
        )  # fmt: skip
        column += BN // 2
        p, up = p_right, up_right
        finish_up(
            p, up, x_scale, w1_scale, b1, preactivation, out, dropout, row, column, M, F,
            ACT, GATES, BM, BN // 2, SLICE,
        )  # fmt: skip
    else:
        rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
        column_exists, width, row_exists = columns < F, F * (1 + GATES), rows < M
        exists = row_exists[:, None] & column_exists[None, :]
        p = scaled(p, x_scale, w1_scale, b1, rows, columns, row_exists, column_exists)
        p = p.to(out.dtype.element_ty)
        if preactivation is not None:
            tl.store(pointers(preactivation, row, column, width, BM, BN), p, mask=exists)
        a = activate(p.to(tl.float32), ACT)
        if GATES:
            up = scaled(up, x_scale, w1_scale, b1, rows, columns + F, row_exists, column_exists)
            up = up.to(out.dtype.element_ty)
            if preactivation is not None:
                tl.store(pointers(preactivation, row, column + F, width, BM, BN), up, mask=exists)
            a = a * up.to(tl.float32)
        a = dropped(a, dropout, HIDDEN, rows[:, None], columns[None, :])
        tl.store(pointers(out, row, column, F, BM, BN), a.to(out.dtype.element_ty), mask=exists)


@triton.jit
def up_kernel(
    x, w1, x_scale, w1_scale, b1, preactivation, out, dropout, M, F, D,
    ACT: tl.constexpr, GATES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SLICE: tl.constexpr, PRECISION: tl.constexpr, FLIP: tl.constexpr = False,
):  # fmt: skip
    """a [M, F]; the preactivation, [M, F] or gated [M, 2 F], is stored if given."""
    for tile in range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(F, BN), tl.num_programs(0)):
        row, column = place(tile, M, F, BM, BN)
        second = F + column if GATES else None
        p, up = products(
            x, w1, row, column, second, M, F * (1 + GATES), D, False, False, BM, BN, BK, PRECISION, FLIP
        )
        finish_up(
            p, up, x_scale, w1_scale, b1, preactivation, out, dropout, row, column, M, F,
            ACT, GATES, BM, BN, SLICE,
        )  # fmt: skip


@triton.jit
def finish_down(
    s, a_scale, w2_scale, b2, residual, y, dropout, residual_row, row, column, M, D,
    BM: tl.constexpr, BN: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Stores y, SLICE columns at a time."""
    if BN > SLICE:
        s, right = halves(s)
        finish_down(
            s, a_scale, w2_scale, b2, residual, y, dropout, residual_row, row, column, M, D,
            BM, BN // 2, SLICE,
        )  # fmt: skip
        column += BN // 2
        finish_down(
            right, a_scale, w2_scale, b2, residual, y, dropout, residual_row, row, column, M, D,
            BM, BN // 2, SLICE,
        )  # fmt: skip
    else:
        rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
        column_exists, row_exists = columns < D, rows < M
        exists = row_exists[:, None] & column_exists[None, :]
        s = scaled(s, a_scale, w2_scale, b2, rows, columns, row_exists, column_exists)
        s = dropped(s, dropout, OUTPUT, rows[:, None], columns[None, :])
        if residual is not None:
            at = pointers(residual, row, column, residual_row, BM, BN)
            s += tl.load(at, mask=exists, other=0.0).to(tl.float32)
        tl.store(pointers(y, row, column, D, BM, BN), s.to(y.dtype.element_ty), mask=exists)


@triton.jit
def down_kernel(
    a, w2, a_scale, w2_scale, b2, residual, y, dropout, residual_row, M, D, F,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
    FLIP: tl.constexpr = False,
):  # fmt: skip
    """y [M, D]."""
    for tile in range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(D, BN), tl.num_programs(0)):
        row, column = place(tile, M, D, BM, BN)
        s, _ = products(a, w2, row, column, None, M, D, F, False, False, BM, BN, BK, PRECISION, FLIP)
        finish_down(
            s, a_scale, w2_scale, b2, residual, y, dropout, residual_row, row, column, M, D, BM, BN, SLICE
        )


@triton.jit
def finish_up_backward(
    da, preactivation, dp, out, dbias, dropout, row, column, M, F, ROWS: tl.constexpr,
    ACT: tl.constexpr, GATES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Stores dp and what else is given, SLICE columns at a time."""
    if BN > SLICE:
        da, right = halves(da)
        finish_up_backward(
            da, preactivation, dp, out, dbias, dropout, row, column, M, F, ROWS,
            ACT, GATES, BM, BN // 2, SLICE,
        )  # fmt: skip
        column += BN // 2
        finish_up_backward(
            right, preactivation, dp, out, dbias, dropout, row, column, M, F, ROWS,
            ACT, GATES, BM, BN // 2, SLICE,
        )  # fmt: skip
    else:
        gradient, up_gradient = store_gradients(
            da, preactivation, dp, out, dropout, row, column, M, F, ACT, GATES, BM, BN
        )
        if dbias is not None:
            columns = column + tl.arange(0, BN)
            at = dbias + (row // ROWS).to(tl.int64) * (F * (1 + GATES)) + columns
            tl.store(at, tl.sum(gradient, 0), mask=columns < F)
            if GATES:
                tl.store(at + F, tl.sum(up_gradient, 0), mask=columns < F)


@triton.jit
def up_backward_kernel(
    dz, w2, preactivation, dp, out, dbias, dropout, M, F, D,
    ACT: tl.constexpr, GATES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SLICE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dp like the preactivation; a again, if it is given; dbias, partial sums, [row tiles, F or 2 F] fp32."""
    for tile in range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(F, BN), tl.num_programs(0)):
        row, column = place(tile, M, F, BM, BN)
        da, _ = products(dz, w2, row, column, None, M, F, D, False, True, BM, BN, BK, PRECISION)
        finish_up_backward(
            da, preactivation, dp, out, dbias, dropout, row, column, M, F, BM, ACT, GATES, BM, BN, SLICE
        )


@triton.jit
def store_sums(sums, into, out, row, column, M, N, BM: tl.constexpr, BN: tl.constexpr, SLICE: tl.constexpr):
    """Stores sums, or sums + into, as a tile of out [M, N], SLICE columns at a time."""
    if BN > SLICE:
        sums, right = halves(sums)
        store_sums(sums, into, out, row, column, M, N, BM, BN // 2, SLICE)
        store_sums(right, into, out, row, column + BN // 2, M, N, BM, BN // 2, SLICE)
    else:
        rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
        exists = (rows < M)[:, None] & (columns < N)[None, :]
        if into is not None:
            sums += tl.load(pointers(into, row, column, N, BM, BN), mask=exists, other=0.0)
        tl.store(pointers(out, row, column, N, BM, BN), sums.to(out.dtype.element_ty), mask=exists)


@triton.jit
def weight_gradient_kernel(
    d, x, into, out, N, D, M,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [N, D] = d^T x (+ into, which out may be)."""
    for tile in range(tl.program_id(0), tl.cdiv(N, BM) * tl.cdiv(D, BN), tl.num_programs(0)):
        row, column = place(tile, N, D, BM, BN)
        dw, _ = products(d, x, row, column, None, N, D, M, True, True, BM, BN, BK, PRECISION)
        store_sums(dw, into, out, row, column, N, D, BM, BN, SLICE)


# ---- launchers -------------------------------------------------------------------------------------


def drop(dropout: Dropout) -> Any:
    p, key = dropout
    return dropout_of(key, p)


def up(
    x: Tensor, w1: Tensor, b1: Tensor | None, activation: str, dropout: Dropout, save: bool
) -> tuple[Tensor | None, Tensor]:
    """``(preactivation or None, a [M, F])``: x ``[M, D]``, w1 ``[F, D]``, gated ``[2 F, D]``."""
    gated = activation in GATED
    M, D = x.shape
    F = w1.shape[0] // (1 + gated)
    tile = tile_for("gated" if gated else "forward", x, M, F, D)
    out, preactivation = x.new_empty(M, F), x.new_empty(M, w1.shape[0]) if save else None
    up_kernel[grid(x.device, M, F, tile)](
        operand(x, tile.BM, tile.BK), operand(w1, tile.BN, tile.BK), None, None, dense_rows(b1),
        preactivation, out, drop(dropout), M, F, D, ACT=activation, GATES=gated, **options(tile, F),
    )  # fmt: skip
    return preactivation, out


def down(a: Tensor, w2: Tensor, b2: Tensor | None, residual: Tensor | None, dropout: Dropout) -> Tensor:
    """``y [M, D]``: a ``[M, F]``, w2 ``[D, F]``."""
    (M, F), D = a.shape, w2.shape[0]
    tile = tile_for("forward", a, M, D, F)
    y, residual = a.new_empty(M, D), dense_rows(residual)
    down_kernel[grid(a.device, M, D, tile)](
        operand(a, tile.BM, tile.BK), operand(w2, tile.BN, tile.BK), None, None, dense_rows(b2),
        residual, y, drop(dropout), row_stride(residual), M, D, F, **options(tile, D),
    )  # fmt: skip
    return y


def down_norm(
    a: Tensor, w2: Tensor, b2: Tensor | None, residual: Tensor | None, dropout: Dropout, *affine_eps_kind: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """``(y, s, mean or None, rstd)``: a row of s is longer than a tile, so the norm is a pass of its own."""
    s = down(a, w2, b2, residual, dropout)
    y, _, mean, rstd = norm(s, None, *affine_eps_kind)
    return y, s, mean, rstd


def up_backward(
    dz: Tensor, w2: Tensor, preactivation: Tensor, activation: str, dropout: Dropout, want_bias: bool,
    rebuild: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """``(dp, a or None, db1 or None)``: dz ``[M, D]``, w2 ``[D, F]``."""
    gated = activation in GATED
    (M, D), F, width = dz.shape, w2.shape[1], preactivation.shape[1]
    tile = tile_for("gated_backward" if gated else "backward", dz, M, F, D)
    preactivation = preactivation.contiguous()
    dp, out = torch.empty_like(preactivation), dz.new_empty(M, F) if rebuild else None
    row_tiles = triton.cdiv(M, tile.BM)
    dbias = torch.empty(row_tiles, width, dtype=torch.float32, device=dz.device) if want_bias else None
    up_backward_kernel[grid(dz.device, M, F, tile)](
        operand(dz, tile.BM, tile.BK), operand(w2, tile.BK, tile.BN), preactivation, dp, out, dbias,
        drop(dropout), M, F, D, ACT=activation, GATES=gated, **options(tile, F),
    )  # fmt: skip
    return dp, out, column_sum(dbias, dz)


def weight_gradient(d: Tensor, x: Tensor, into: Tensor | None) -> Tensor | None:
    """``d^T x``: d ``[M, N]``, x ``[M, D]``; added to the fp32 ``[N, D]`` ``into`` if that is given."""
    (M, N), D = d.shape, x.shape[1]
    tile = tile_for("gradient", d, N, D, M)
    out = d.new_empty(N, D) if into is None else into
    weight_gradient_kernel[grid(d.device, N, D, tile)](
        operand(d, tile.BK, tile.BM), operand(x, tile.BK, tile.BN), into, out, N, D, M, **options(tile, D)
    )
    return out if into is None else None
