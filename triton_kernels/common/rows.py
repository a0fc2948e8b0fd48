"""What the norm and activation kernels share: rows, columns, and sums over all rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bigkern.triton_kernels.common import launch


@triton.jit
def affine(x, weight, bias, columns, exists):
    """x * weight + bias by columns."""
    if weight is not None:
        x = x * tl.load(weight + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        x = x + tl.load(bias + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def pointers(x, row, column, stride, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN] pointers into a matrix: a 64-bit corner, 32-bit offsets inside the tile."""
    corner = x + tl.cast(row, tl.int64) * stride + column
    return corner + (tl.arange(0, BM)[:, None] * stride + tl.arange(0, BN)[None, :])


@triton.jit
def column_sum_kernel(partial, out, P, N, BP: tl.constexpr, BN: tl.constexpr):
    """out [N] = the sum of partial [P, N] fp32 over P, always in the same order."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros([BP, BN], tl.float32)
    for start in range(0, P, BP):
        rows = start + tl.arange(0, BP)
        exists = (rows < P)[:, None] & (columns < N)[None, :]
        total += tl.load(partial + rows.to(tl.int64)[:, None] * N + columns[None, :], mask=exists, other=0.0)
    tl.store(out + columns, tl.sum(total, 0).to(out.dtype.element_ty), mask=columns < N)


def column_sum(partial: Tensor | None, like: Tensor) -> Tensor | None:
    """[P, N] fp32 -> [N] in like's dtype."""
    if partial is None:
        return None
    P, N = partial.shape
    out = like.new_empty(N)
    if N > 0:
        column_sum_kernel[(triton.cdiv(N, 64),)](
            partial, out, P, N, BP=32, BN=64, num_warps=4, **launch.OPTIONS
        )
    return out


def programs(x: Tensor, M: int, BM: int, tiles: int, warps: int) -> int:
    """How many programs share the rows of a column tile: they give every processor 16 warps."""
    return max(1, min(triton.cdiv(M, BM), launch.multiprocessors(x.device) * (16 // warps) // tiles))


def row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def dense_rows(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()
