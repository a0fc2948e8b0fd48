"""BatchNorm's backward in three kernels: sums over spans of rows, their sums, and the gradient of x.

g  = dy where z > 0, else 0         the sign of z is y's, or without y that of xhat weight + bias
dx = weight / sqrt(var + eps) (g - mean(g) - xhat mean(g xhat))         g alone where statistics were given
dresidual = g           dweight = sum(g xhat)           dbias = sum(g)
"""

from __future__ import annotations

import triton
import triton.language as tl

from bigkern.triton_kernels.batch_norm.forward import load_channels
from bigkern.triton_kernels.common.rows import pointers


@triton.jit
def load_gradient(
    dy, x, y, m, scale, b, row, column, C, exists, RELU: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """g and x - mean as [BM, BN] fp32, 0 where nothing exists."""
    g = tl.load(pointers(dy, row, column, C, BM, BN), mask=exists, other=0.0).to(tl.float32)
    centred = tl.load(pointers(x, row, column, C, BM, BN), mask=exists, other=0.0).to(tl.float32) - m
    centred = tl.where(exists, centred, 0.0)
    if RELU:
        if y is not None:
            z = tl.load(pointers(y, row, column, C, BM, BN), mask=exists, other=0.0).to(tl.float32)
        else:
            z = centred * scale + b
        g = tl.where(z <= 0.0, 0.0, g)
    return g, centred


@triton.jit
def gradient_kernel(
    dy, x, y, weight, bias, mean, var, dresidual, partial, M, C, span, eps,
    RELU: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """g of a span of rows as dresidual, and the sums of g and g xhat: partial [2, P, C] fp32."""
    program, P = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * BN
    columns = column + tl.arange(0, BN)
    m, r, scale, b = load_channels(weight, bias, mean, var, eps, columns, C)
    first = program.to(tl.int64) * span
    last = tl.minimum(first + span, M)
    sum_g, sum_gx = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
    for row in range(first, last, BM):
        exists = (row + tl.arange(0, BM) < last)[:, None] & (columns < C)[None, :]
        g, centred = load_gradient(dy, x, y, m, scale, b, row, column, C, exists, RELU, BM, BN)
        sum_g += g
        sum_gx += g * centred
        if dresidual is not None:
            out = g.to(dresidual.dtype.element_ty)
            tl.store(pointers(dresidual, row, column, C, BM, BN), out, mask=exists)
    at = program.to(tl.int64) * C + columns
    tl.store(partial + at, tl.sum(sum_g, 0), mask=columns < C)
    of_span = tl.sum(tl.sum(sum_gx, 0)[None, :] * r, 0)
    tl.store(partial + P.to(tl.int64) * C + at, of_span, mask=columns < C)


@triton.jit
def gradient_sums_kernel(partial, sums, dweight, dbias, P, C, BP: tl.constexpr, BN: tl.constexpr):
    """The spans' sums, all at once, to sums [2, C] fp32, which are dbias and dweight."""
    parts, columns = tl.arange(0, BP), tl.program_id(0) * BN + tl.arange(0, BN)
    exists = (parts < P)[:, None] & (columns < C)[None, :]
    at = partial + parts[:, None] * C + columns[None, :]
    g = tl.sum(tl.load(at, mask=exists, other=0.0), 0)
    gx = tl.sum(tl.load(at + tl.cast(P, tl.int64) * C, mask=exists, other=0.0), 0)
    tl.store(sums + columns, g, mask=columns < C)
    tl.store(sums + C + columns, gx, mask=columns < C)
    if dbias is not None:
        tl.store(dbias + columns, g.to(dbias.dtype.element_ty), mask=columns < C)
    if dweight is not None:
        tl.store(dweight + columns, gx.to(dweight.dtype.element_ty), mask=columns < C)


@triton.jit
def batch_norm_backward_kernel(
    dy, x, y, weight, bias, mean, var, sums, dx, M, C, span, eps,
    RELU: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dx of a span of rows, BN columns of it; statistics that were given had no share in x without sums."""
    column = tl.program_id(1) * BN
    columns = column + tl.arange(0, BN)
    m, r, scale, b = load_channels(weight, bias, mean, var, eps, columns, C)
    if sums is not None:
        mean_g = (tl.load(sums + columns, mask=columns < C, other=0.0) / M)[None, :]
        mean_gx = (tl.load(sums + C + columns, mask=columns < C, other=0.0) / M)[None, :] * r
    first = tl.program_id(0).to(tl.int64) * span
    last = tl.minimum(first + span, M)
    for row in range(first, last, BM):
        exists = (row + tl.arange(0, BM) < last)[:, None] & (columns < C)[None, :]
        g, centred = load_gradient(dy, x, y, m, scale, b, row, column, C, exists, RELU, BM, BN)
        if sums is not None:
            g = g - mean_g - centred * mean_gx
        tl.store(pointers(dx, row, column, C, BM, BN), (g * scale).to(dx.dtype.element_ty), mask=exists)
