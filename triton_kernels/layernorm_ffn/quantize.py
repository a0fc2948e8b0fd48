"""Rows of x as e4m3, with a scale for each: the left factor of an fp8 product, told in `frozen_ffn.py`.

    scale[m] = max |x[m]| / 448          q[m, n] = x[m, n] / scale[m], to the nearest e4m3, ties to even

    program = BM rows in registers, or one row in chunks: x is read from memory once, q and scale are written

e4m3 has 3 bits after the leading one, reaches 448 and has no infinity: what is beyond becomes 448, and a NaN
stays one. With a scale for each row a large row costs the others no digits, and no row waits for another.

Micikevicius et al., FP8 Formats for Deep Learning (2022).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigkern.triton_kernels.common import launch
from bigkern.triton_kernels.common.rows import dense_rows
from bigkern.triton_kernels.norm import row_tile

LARGEST = tl.constexpr(448.0)
LONGEST = 16384  # columns that a program keeps in registers
CHUNK = 8192  # columns that a program looks at together in longer rows


@triton.jit
def magnitude(x):
    """|x| as the bits of an fp32: ordered like |x|, and a NaN is larger than infinity."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(largest):
    """largest / 448 from a row's largest magnitude; 1 where that is 0."""
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), LARGEST)
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def quantize_kernel(x, q, scale, x_row, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """BM whole rows in registers."""
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN)
    exists = (rows < M)[:, None] & (columns < N)[None, :]
    i, j = rows.to(tl.int64)[:, None], columns[None, :]
    tile = tl.load(x + i * x_row + j, mask=exists, other=0.0)
    s = scale_of(tl.max(magnitude(tile), 1))
    tl.store(scale + rows, s, mask=rows < M)
    tl.store(q + i * N + j, tl.div_rn(tile.to(tl.float32), s[:, None]).to(tl.float8e4nv), mask=exists)


@triton.jit
def quantize_long_kernel(x, q, scale, x_row, N, BN: tl.constexpr):
    """One row in chunks of BN: its largest magnitude, then, out of the L2 cache, its quotients."""
    row = tl.program_id(0).to(tl.int64)
    x, q = x + row * x_row, q + row * N
    largest = tl.zeros([BN], tl.int32)
    for start in range(0, N, BN):
        columns = start + tl.arange(0, BN)
        largest = tl.maximum(largest, magnitude(tl.load(x + columns, mask=columns < N, other=0.0)))
    s = scale_of(tl.max(largest, 0))
    tl.store(scale + row, s)
    for start in range(0, N, BN):
        columns = start + tl.arange(0, BN)
        chunk = tl.load(x + columns, mask=columns < N, other=0.0).to(tl.float32)
        tl.store(q + columns, tl.div_rn(chunk, s).to(tl.float8e4nv), mask=columns < N)


# ---- launcher --------------------------------------------------------------------------------------


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``q [M, N]`` e4m3 and ``scale [M]`` fp32 with x about q * scale: x ``[M, N]`` fp32, bf16 or fp16.

    scale = max |row| / 448, or 1 where that is 0; q = x / scale to nearest even. A NaN makes its row NaN.
    """
    M, N = x.shape
    x = dense_rows(x)
    q = torch.empty(M, N, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    if M > 0 and N > LONGEST:
        quantize_long_kernel[(M,)](x, q, scale, x.stride(0), N, BN=CHUNK, num_warps=8, **launch.OPTIONS)
    elif M > 0:
        BM, BN, warps = row_tile(N, 4096)
        quantize_kernel[(triton.cdiv(M, BM),)](
            x, q, scale, x.stride(0), M, N, BM=BM, BN=BN, num_warps=warps, **launch.OPTIONS
        )
    return q, scale
