"""BatchNorm's forward in three kernels: statistics of spans of rows, their merger, and the normalization.

mean = mean(x)      var = M2 / M = mean((x - mean)^2)                               by columns of x [M, C]
y    = max((x - mean) / sqrt(var + eps) * weight + bias + residual, 0)              without RELU as it is
"""

from __future__ import annotations

import triton
import triton.language as tl

from bigkern.triton_kernels.common.rows import pointers


@triton.jit
def merged(count, mean, m2):
    """Mean and M2 of each column's rows together, from those of its parts: [R, BN] fp32 to [BN]."""
    m = tl.sum(count * mean, 0) / tl.sum(count, 0)
    apart = mean - m[None, :]
    return m, tl.sum(m2 + count * apart * apart, 0)


@triton.jit
def statistics_kernel(x, origin, partial, M, C, span, BM: tl.constexpr, BN: tl.constexpr):
    """Mean and M2 of d = x - origin in a span of rows: partial [2, P, C] fp32; origin: the first rows' mean.

    Each of the BM rows of a tile has its own first (Welford, 1962): mean += (d - mean) / k and
    M2 += (d - old mean) (d - mean) for its k-th element.
    """
    program, P = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * BN
    columns = column + tl.arange(0, BN)
    first = program.to(tl.int64) * span
    last = tl.minimum(first + span, M)
    i = tl.arange(0, BM)
    exists = (i < M)[:, None] & (columns < C)[None, :]
    top = tl.load(x + i[:, None] * C + columns[None, :], mask=exists, other=0.0).to(tl.float32)
    middle = tl.sum(top, 0) / tl.minimum(M, BM)
    if program == 0:
        tl.store(origin + columns, middle, mask=columns < C)
    mean, m2 = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
    k = 0.0
    for row in range(first, last, BM):
        exists = (row + tl.arange(0, BM) < last)[:, None] & (columns < C)[None, :]
        k += 1.0
        x_tile = tl.load(pointers(x, row, column, C, BM, BN), mask=exists, other=0.0).to(tl.float32)
        apart = tl.where(exists, x_tile - middle[None, :] - mean, 0.0)
        step = apart * (1.0 / k)
        mean += step
        m2 += apart * (apart - step)
    left = (last - first - tl.arange(0, BM)).to(tl.int32)
    count = tl.maximum((left + (BM - 1)) // BM, 0).to(tl.float32)
    of_span, m2_of_span = merged(count[:, None] + tl.zeros([BM, BN], tl.float32), mean, m2)
    at = program.to(tl.int64) * C + columns
    tl.store(partial + at, of_span, mask=columns < C)
    tl.store(partial + P.to(tl.int64) * C + at, m2_of_span, mask=columns < C)


@triton.jit
def merge_kernel(origin, partial, mean, var, M, C, span, P, BP: tl.constexpr, BN: tl.constexpr):
    """The spans' means and M2, all at once, to mean and variance of x: [C] fp32."""
    parts, columns = tl.arange(0, BP), tl.program_id(0) * BN + tl.arange(0, BN)
    exists = (parts < P)[:, None] & (columns < C)[None, :]
    at = partial + parts[:, None] * C + columns[None, :]
    means = tl.load(at, mask=exists, other=0.0)
    squares = tl.load(at + tl.cast(P, tl.int64) * C, mask=exists, other=0.0)
    first = parts.to(tl.int64) * span
    count = tl.maximum(tl.minimum(first + span, M) - first, 0).to(tl.float32)
    m, m2 = merged(count[:, None] + tl.zeros([BP, BN], tl.float32), means, squares)
    middle = tl.load(origin + columns, mask=columns < C, other=0.0)
    tl.store(mean + columns, middle + m, mask=columns < C)
    tl.store(var + columns, m2 / M, mask=columns < C)


@triton.jit
def load_channels(weight, bias, mean, var, eps, columns, C):
    """mean, 1 / deviation, weight / deviation and bias of some columns: [1, BN] fp32."""
    exists = columns < C
    m = tl.load(mean + columns, mask=exists, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt_rn(tl.load(var + columns, mask=exists, other=1.0).to(tl.float32) + eps)
    scale, b = r, tl.zeros_like(r)
    if weight is not None:
        scale = r * tl.load(weight + columns, mask=exists, other=0.0).to(tl.float32)
    if bias is not None:
        b = tl.load(bias + columns, mask=exists, other=0.0).to(tl.float32)
    return m[None, :], r[None, :], scale[None, :], b[None, :]


@triton.jit
def batch_norm_kernel(
    x, residual, weight, bias, mean, var, y, M, C, span, eps,
    RELU: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A span of rows, BN columns of it. A NaN stays one under the ReLU."""
    column = tl.program_id(1) * BN
    columns = column + tl.arange(0, BN)
    m, _, scale, b = load_channels(weight, bias, mean, var, eps, columns, C)
    first = tl.program_id(0).to(tl.int64) * span
    last = tl.minimum(first + span, M)
    for row in range(first, last, BM):
        exists = (row + tl.arange(0, BM) < last)[:, None] & (columns < C)[None, :]
        z = (
            tl.load(pointers(x, row, column, C, BM, BN), mask=exists, other=0.0).to(tl.float32) - m
        ) * scale + b
        if residual is not None:
            z += tl.load(pointers(residual, row, column, C, BM, BN), mask=exists, other=0.0).to(tl.float32)
        if RELU:
            z = tl.where(z < 0.0, 0.0, z)
        tl.store(pointers(y, row, column, C, BM, BN), z.to(y.dtype.element_ty), mask=exists)
