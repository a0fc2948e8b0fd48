"""The backward of the norms: ds row by row, and the sums over all rows that weight and bias need.

xhat = (s - mean) * rstd                g = dy * weight
ds   = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum          mean(g) for layer norm only
dx   = drop(ds)
dweight = sum(dy * xhat)                dbias = sum(dy)
"""

from __future__ import annotations

import triton
import triton.language as tl

from bigkern.triton_kernels.common.dropout import OUTPUT, dropped
from bigkern.triton_kernels.common.rows import affine


@triton.jit
def load_normalized(dy, s, weight, mean, rstd, dy_row, s_row, rows, columns, M, N):
    """dy, xhat = (s - mean) * rstd and g = dy * weight as [rows, columns] fp32, 0 where nothing exists."""
    row_exists, column_exists = rows < M, columns < N
    exists = row_exists[:, None] & column_exists[None, :]
    i, j = rows.to(tl.int64)[:, None], columns[None, :]
    dy_tile = tl.load(dy + i * dy_row + j, mask=exists, other=0.0).to(tl.float32)
    xhat = tl.load(s + i * s_row + j, mask=exists, other=0.0).to(tl.float32)
    if mean is not None:
        xhat -= tl.load(mean + rows, mask=row_exists, other=0.0)[:, None]
    r = tl.load(rstd + rows, mask=row_exists, other=0.0)[:, None]
    xhat = tl.where(exists, xhat * r, 0.0)
    return dy_tile, xhat, affine(dy_tile, weight, None, columns, column_exists), r, exists


@triton.jit
def store_gradients(ds, dx, dropout, dsum, g, xhat, r, mean_g, mean_gx, dsum_row, rows, columns, N, exists):
    """ds = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum, and dx = drop(ds)."""
    i, j = rows.to(tl.int64)[:, None], columns[None, :]
    out = r * (g - mean_g - xhat * mean_gx)
    if dsum is not None:
        out += tl.load(dsum + i * dsum_row + j, mask=exists, other=0.0).to(tl.float32)
    tl.store(ds + i * N + j, out.to(ds.dtype.element_ty), mask=exists)
    if dx is not None:
        out = dropped(out, dropout, OUTPUT, i, j)
        tl.store(dx + i * N + j, out.to(dx.dtype.element_ty), mask=exists)


@triton.jit
def norm_backward_kernel(
    dy, dsum, s, weight, mean, rstd, ds, dx, dweight, dbias, dropout, dy_row, dsum_row, s_row, M, N,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Every P-th block of BM rows; dweight and dbias are partial sums, [P, N] fp32."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BN)
    sum_weight, sum_bias = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
    for block in range(program, tl.cdiv(M, BM), programs):
        rows = block * BM + tl.arange(0, BM)
        dy_tile, xhat, g, r, exists = load_normalized(
            dy, s, weight, mean, rstd, dy_row, s_row, rows, columns, M, N
        )
        if dweight is not None:
            sum_weight += dy_tile * xhat
        if dbias is not None:
            sum_bias += dy_tile
        mean_gx = (tl.sum(g * xhat, 1) / N)[:, None]
        mean_g = 0.0
        if mean is not None:
            mean_g = (tl.sum(g, 1) / N)[:, None]
        store_gradients(
            ds, dx, dropout, dsum, g, xhat, r, mean_g, mean_gx, dsum_row, rows, columns, N, exists
        )
    at = program.to(tl.int64) * N + columns
    if dweight is not None:
        tl.store(dweight + at, tl.sum(sum_weight, 0), mask=columns < N)
    if dbias is not None:
        tl.store(dbias + at, tl.sum(sum_bias, 0), mask=columns < N)


@triton.jit
def norm_backward_long_kernel(
    dy, dsum, s, weight, mean, rstd, ds, dx, dropout, dy_row, dsum_row, s_row, M, N, BN: tl.constexpr
):
    """ds and dx of one row in chunks of BN: its two means, then the gradient."""
    rows = tl.program_id(0) + tl.arange(0, 1)
    products, gradients = tl.zeros([1, BN], tl.float32), tl.zeros([1, BN], tl.float32)
    for start in range(0, N, BN):
        columns = start + tl.arange(0, BN)
        _, xhat, g, _, _ = load_normalized(dy, s, weight, mean, rstd, dy_row, s_row, rows, columns, M, N)
        products += g * xhat
        gradients += g
    mean_gx = (tl.sum(products, 1) / N)[:, None]
    mean_g = 0.0
    if mean is not None:
        mean_g = (tl.sum(gradients, 1) / N)[:, None]
    for start in range(0, N, BN):
        columns = start + tl.arange(0, BN)
        _, xhat, g, r, exists = load_normalized(dy, s, weight, mean, rstd, dy_row, s_row, rows, columns, M, N)
        store_gradients(
            ds, dx, dropout, dsum, g, xhat, r, mean_g, mean_gx, dsum_row, rows, columns, N, exists
        )


@triton.jit
def norm_parameters_kernel(
    dy, s, mean, rstd, dweight, dbias, dy_row, s_row, M, N, BM: tl.constexpr, BN: tl.constexpr
):
    """The partial sums for long rows: a program owns BN columns of every P-th block of BM rows."""
    tiles = tl.cdiv(N, BN)
    program, programs = tl.program_id(0) // tiles, tl.num_programs(0) // tiles
    columns = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    sum_weight, sum_bias = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
    for block in range(program, tl.cdiv(M, BM), programs):
        rows = block * BM + tl.arange(0, BM)
        dy_tile, xhat, _, _, _ = load_normalized(dy, s, None, mean, rstd, dy_row, s_row, rows, columns, M, N)
        sum_weight += dy_tile * xhat
        sum_bias += dy_tile
    at = program.to(tl.int64) * N + columns
    if dweight is not None:
        tl.store(dweight + at, tl.sum(sum_weight, 0), mask=columns < N)
    if dbias is not None:
        tl.store(dbias + at, tl.sum(sum_bias, 0), mask=columns < N)
