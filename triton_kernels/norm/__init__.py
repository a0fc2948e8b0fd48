"""LayerNorm and RMSNorm of [M, N], with the residual addition before them; told in `layernorm_ffn.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigkern.triton_kernels.common import launch
from bigkern.triton_kernels.common.dropout import OUTPUT, dropout_of, dropped
from bigkern.triton_kernels.common.rows import affine, column_sum, dense_rows, programs, row_stride
from bigkern.triton_kernels.norm.backward import (
    norm_backward_kernel,
    norm_backward_long_kernel,
    norm_parameters_kernel,
)

LONGEST_FORWARD = 16384  # columns that a program keeps in registers
LONGEST_BACKWARD = {2: 8192, 4: 4096}  # by bytes an element: the inputs wait in registers as they are
CHUNK = 4096  # columns that a program looks at together in longer rows


@triton.jit
def load_sum(x, residual, dropout, at, residual_at, i, j, exists):
    """drop(x) + residual at rows i, columns j as it is stored, rounded, in fp32; 0 where nothing exists."""
    s = tl.load(x + at, mask=exists, other=0.0).to(tl.float32)
    if residual is not None:
        s = dropped(s, dropout, OUTPUT, i, j)
        s += tl.load(residual + residual_at, mask=exists, other=0.0).to(tl.float32)
        s = s.to(x.dtype.element_ty).to(tl.float32)
    return s


@triton.jit
def norm_kernel(
    x, residual, weight, bias, y, total, mean, rstd, dropout, x_row, residual_row, M, N, eps,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM whole rows in registers. Layer norm where `mean` is given."""
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN)
    row_exists, column_exists = rows < M, columns < N
    exists = row_exists[:, None] & column_exists[None, :]
    i, j = rows.to(tl.int64)[:, None], columns[None, :]
    s = load_sum(x, residual, dropout, i * x_row + j, i * residual_row + j, i, j, exists)
    if total is not None:
        tl.store(total + i * N + j, s.to(total.dtype.element_ty), mask=exists)
    if mean is not None:
        m0 = tl.sum(s, 1) / N
        s = tl.where(exists, s - m0[:, None], 0.0)
        shift = tl.sum(s, 1) / N
        variance = tl.sum(s * s, 1) / N - shift * shift
        s = s - shift[:, None]
        tl.store(mean + rows, m0 + shift, mask=row_exists)
    else:
        variance = tl.sum(s * s, 1) / N
    r = 1.0 / tl.sqrt_rn(variance + eps)
    tl.store(rstd + rows, r, mask=row_exists)
    out = affine(s * r[:, None], weight, bias, columns, column_exists)
    tl.store(y + i * N + j, out.to(y.dtype.element_ty), mask=exists)


@triton.jit
def norm_long_kernel(
    x, residual, weight, bias, y, total, mean, rstd, dropout, x_row, residual_row, M, N, eps,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One row in chunks of BN: add it up, then its squares, then normalize it."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_row
    if residual is not None:
        residual += row * residual_row
    sums = tl.zeros([BN], tl.float32)
    for start in range(0, N, BN):
        columns = start + tl.arange(0, BN)
        exists = columns < N
        s = load_sum(x, residual, dropout, columns, columns, row, columns, exists)
        if total is not None:
            tl.store(total + row * N + columns, s.to(total.dtype.element_ty), mask=exists)
        sums += s
    m0 = tl.sum(sums, 0) / N
    if mean is None:
        m0 = 0.0
    shifts, squares = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32)
    for start in range(0, N, BN):
        columns = start + tl.arange(0, BN)
        exists = columns < N
        d = load_sum(x, residual, dropout, columns, columns, row, columns, exists)
        d = tl.where(exists, d - m0, 0.0)
        shifts += d
        squares += d * d
    variance, shift = tl.sum(squares, 0) / N, 0.0
    if mean is not None:
        shift = tl.sum(shifts, 0) / N
        variance -= shift * shift
        tl.store(mean + row, m0 + shift)
    r = 1.0 / tl.sqrt_rn(variance + eps)
    tl.store(rstd + row, r)
    for start in range(0, N, BN):
        columns = start + tl.arange(0, BN)
        exists = columns < N
        d = load_sum(x, residual, dropout, columns, columns, row, columns, exists) - m0 - shift
        out = affine((d * r)[None, :], weight, bias, columns, exists)
        tl.store(y + row * N + columns[None, :], out.to(y.dtype.element_ty), mask=exists[None, :])


# ---- launchers -------------------------------------------------------------------------------------


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    dropout_p: float = 0.0,
    dropout_key: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """``y [M, N]``, ``sum [M, N]`` with a residual, fp32 ``mean [M]`` for kind ``"layer"``, ``rstd [M]``.

    x and residual ``[M, N]``, weight and bias ``[N]``; kind is ``"layer"`` or ``"rms"``.
    """
    M, N = x.shape
    x, residual, weight, bias = dense_rows(x), dense_rows(residual), dense_rows(weight), dense_rows(bias)
    y, total = x.new_empty(M, N), None if residual is None else x.new_empty(M, N)
    rstd = torch.empty(M, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if kind == "layer" else None
    long = N > LONGEST_FORWARD
    BM, BN, warps = (1, CHUNK, 8) if long else row_tile(N, 4096)
    if M > 0:
        (norm_long_kernel if long else norm_kernel)[(triton.cdiv(M, BM),)](
            x, residual, weight, bias, y, total, mean, rstd, dropout_of(dropout_key, dropout_p),
            x.stride(0), row_stride(residual), M, N, eps,
            BM=BM, BN=BN, num_warps=warps, **launch.OPTIONS,
        )  # fmt: skip
    return y, total, mean, rstd


def norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    kind: str,
    want_weight: bool,
    want_bias: bool,
    dropout_p: float = 0.0,
    dropout_key: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``ds [M, N]``, with dropout ``dx = drop(ds)``; ``dweight`` and ``dbias [N]`` where wanted.

    ``dsum`` is the gradient that arrives at the sum by another way.
    """
    M, N = s.shape
    dy, dsum, s, weight = dense_rows(dy), dense_rows(dsum), dense_rows(s), dense_rows(weight)
    mean = mean if kind == "layer" else None
    ds, dropout = s.new_empty(M, N), dropout_of(dropout_key, dropout_p)
    dx = None if dropout is None else torch.empty_like(ds)
    longest = LONGEST_BACKWARD[s.element_size()]
    long = longest < N
    BM, BN, warps = (16, 64, 4) if long else row_tile(N, 1024)
    tiles = triton.cdiv(N, BN) if long else 1
    P = programs(s, M, BM, tiles, warps)
    dweight, dbias = (
        torch.empty(P, N, dtype=torch.float32, device=s.device) if want else None
        for want in (want_weight, want_bias)
    )
    strides = (dy.stride(0), row_stride(dsum), s.stride(0))
    if not long:
        norm_backward_kernel[(P,)](
            dy, dsum, s, weight, mean, rstd, ds, dx, dweight, dbias, dropout, *strides, M, N,
            BM=BM, BN=BN, num_warps=warps, **launch.OPTIONS,
        )  # fmt: skip
    elif M > 0:
        norm_backward_long_kernel[(M,)](
            dy, dsum, s, weight, mean, rstd, ds, dx, dropout, *strides, M, N,
            BN=CHUNK, num_warps=8, **launch.OPTIONS,
        )  # fmt: skip
    if long and (want_weight or want_bias):
        norm_parameters_kernel[(P * tiles,)](
            dy, s, mean, rstd, dweight, dbias, strides[0], strides[2], M, N,
            BM=BM, BN=BN, num_warps=warps, **launch.OPTIONS,
        )  # fmt: skip
    like = s if weight is None else weight
    return ds, dx, column_sum(dweight, like), column_sum(dbias, like)


def row_tile(N: int, elements: int) -> tuple[int, int, int]:
    """(BM, BN, warps): whole rows, about ``elements`` of them in a tile, 16 or fewer a thread."""
    BN = launch.padded(N)
    BM = max(1, elements // BN)
    return BM, BN, min(16, max(4, BM * BN // 512))
