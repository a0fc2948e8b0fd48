"""A feed-forward block with frozen weights, for inference: weights of 8 bits with a scale for each row.

    frozen_up        a = act(((x W1^T) * x_scale[m]) * w1_scale[n] + b1), gated: act(gate) * up
    frozen_down      y = ((a W2^T) * a_scale[m]) * w2_scale[n] + b2 + residual
    quantize_rows    q, scale: x as e4m3 with a scale for each row, the left factor of an fp8 product

    int8     x stays fp32, bf16 or fp16. A tile of W becomes x's type on its way to the tensor cores, which
             all three types can hold exactly, so no scale is needed before the sums.   Any GPU.
    e4m3     x is e4m3 too, made by `quantize_rows`; the products are fp8's.             sm_89 and up.

A generated token reads every weight once and does nothing else that takes time: half the bytes are half the
time. The kernels are those of `ffn_products.py`, with two things besides:

The product is flipped. wgmma takes 64 rows, and a token has one; and it takes its left factor from registers,
where int8 has just been widened, its right one from shared memory only. So W's rows are the tensor cores'
rows, and x's are their columns, of which 16 will do:

    W  [BN, BK] int8  -> registers, widened  \\
                                               wgmma -> [BN, BM] fp32 -> transposed, the end of up or down
    x  [BM, BK]       -> shared memory       /

Few rows are few tiles, too few to read W with all processors. Then K is cut into spans besides:

    W's rows    | tile 0             | tile 1             | ..
    K           | span 0 1 2 3       | span 0 1 2 3       |     program = (tile, span) -> partial[span] fp32
                  \\__ sums in this order, then the end of up or down: `up_join_kernel`, `down_join_kernel`

How many spans there are depends on the shapes and the GPU alone: the same call has the same bits.

Dettmers et al., LLM.int8() (2022); Micikevicius et al., FP8 Formats for Deep Learning (2022); Frantar et al.,
MARLIN (2024), on reading weights at full speed while there are few rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigkern.triton_kernels.common import launch
from bigkern.triton_kernels.common.products import (
    LONG_SUM,
    SHORT_SUMS,
    Tile,
    grid,
    operand,
    options,
    place,
    products,
)
from bigkern.triton_kernels.common.rows import dense_rows, pointers, row_stride
from bigkern.triton_kernels.layernorm_ffn.activation import GATED
from bigkern.triton_kernels.layernorm_ffn.products import (
    down_kernel,
    finish_down,
    finish_up,
    store_sums,
    up_kernel,
)
from bigkern.triton_kernels.layernorm_ffn.quantize import quantize_rows

__all__ = ["frozen_down", "frozen_up", "quantize_rows"]


class FrozenTiles(NamedTuple):
    few: Tile  # FEW rows or fewer: bound by reading the weights
    gated_few: Tile
    forward: Tile
    gated: Tile


FEW = 64
# (architecture, bytes an element of x) -> tiles; BM is an upper bound
CONFIGURATIONS = {
    (80, 1): FrozenTiles(  # sm_89, and GPUs after sm_90
        few=Tile(64, 64, 128, 4, 4),
        gated_few=Tile(64, 64, 64, 4, 4),
        forward=Tile(128, 128, 64, 8, 3),
        gated=Tile(128, 64, 64, 8, 3),
    ),
    (80, 2): FrozenTiles(
        few=Tile(64, 64, 128, 4, 4),
        gated_few=Tile(64, 64, 64, 4, 4),
        forward=Tile(128, 128, 64, 8, 3),
        gated=Tile(128, 64, 64, 8, 3),
    ),
    (80, 4): FrozenTiles(
        few=Tile(64, 64, 32, 4, 3, "tf32x3"),
        gated_few=Tile(64, 32, 32, 4, 3, "tf32x3"),
        forward=Tile(64, 64, 32, 4, 3, "tf32x3"),
        gated=Tile(64, 32, 32, 4, 3, "tf32x3"),
    ),
    (90, 1): FrozenTiles(
        few=Tile(64, 64, 128, 4, 5),
        gated_few=Tile(64, 64, 128, 4, 5),
        forward=Tile(128, 128, 128, 8, 4),
        gated=Tile(128, 64, 128, 8, 4),
    ),
    (90, 2): FrozenTiles(
        few=Tile(64, 64, 128, 4, 5),
        gated_few=Tile(64, 64, 128, 4, 5),
        forward=Tile(256, 128, 64, 8, 4),
        gated=Tile(128, 128, 64, 8, 4),
    ),
    (90, 4): FrozenTiles(
        few=Tile(64, 64, 64, 4, 4, "tf32x3"),
        gated_few=Tile(64, 64, 32, 4, 5, "tf32x3"),
        forward=Tile(128, 128, 32, 8, 3, "tf32x3"),
        gated=Tile(64, 128, 32, 8, 3, "tf32x3"),
    ),
}
PROGRAMS = 2  # a processor: as many as shared memory has room for
LEAST_SPAN = 1024  # products: shorter sums cost more to join than they save


# ---- kernels ---------------------------------------------------------------------------------------


@triton.jit
def span_kernel(
    x, w, partial, length, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial [spans, M, N] fp32: of x w^T, the products of one span, `length` of K."""
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    span = tl.program_id(0) // tiles
    row, column = place(tl.program_id(0) % tiles, M, N, BM, BN)
    begin = span * length
    end = tl.minimum(begin + length, K)
    sums, _ = products(
        x, w, row, column, None, M, N, K, False, False, BM, BN, BK, PRECISION, True, begin, end
    )
    store_sums(sums, None, partial + tl.cast(span, tl.int64) * M * N, row, column, M, N, BM, BN, SLICE)


@triton.jit
def joined(partial, spans, row, column, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """The [BM, BN] tile of partial's sum over the spans, in their order."""
    exists = (row + tl.arange(0, BM) < M)[:, None] & (column + tl.arange(0, BN) < N)[None, :]
    at = pointers(partial, row, column, N, BM, BN)
    sums = tl.zeros([BM, BN], tl.float32)
    for _ in range(spans):
        sums += tl.load(at, mask=exists, other=0.0)
        at += tl.cast(M, tl.int64) * N
    return sums


@triton.jit
def up_join_kernel(
    partial, spans, x_scale, w1_scale, b1, out, M, F,
    ACT: tl.constexpr, GATES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of a [M, F] from partial [spans, M, F or 2 F]."""
    row, column = place(tl.program_id(0), M, F, BM, BN)
    p = joined(partial, spans, row, column, M, F * (1 + GATES), BM, BN)
    up = joined(partial, spans, row, column + F, M, F * (1 + GATES), BM, BN) if GATES else p
    finish_up(p, up, x_scale, w1_scale, b1, None, out, None, row, column, M, F, ACT, GATES, BM, BN, BN)


@triton.jit
def down_join_kernel(
    partial, spans, a_scale, w2_scale, b2, residual, y, residual_row, M, D,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of y [M, D] from partial [spans, M, D]."""
    row, column = place(tl.program_id(0), M, D, BM, BN)
    s = joined(partial, spans, row, column, M, D, BM, BN)
    finish_down(s, a_scale, w2_scale, b2, residual, y, None, residual_row, row, column, M, D, BM, BN, BN)


# ---- launchers -------------------------------------------------------------------------------------


def frozen_up(
    x: Tensor,
    x_scale: Tensor | None,
    w1: Tensor,
    w1_scale: Tensor,
    b1: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """``a [M, F]`` in dtype: x ``[M, D]``, w1 ``[N, D]``, N = F or gated 2 F, scales ``[M]`` and ``[N]``."""
    gated = activation in GATED
    (M, D), N = x.shape, w1.shape[0]
    F = N // (1 + gated)
    x_scale, w1_scale, b1 = dense_rows(x_scale), dense_rows(w1_scale), dense_rows(b1)
    out, spans = torch.empty(M, F, dtype=dtype, device=x.device), spans_of(x, N)
    if out.numel() == 0:
        return out
    if spans > 1:
        BM, BN = join_tile(M)
        up_join_kernel[(triton.cdiv(M, BM) * triton.cdiv(F, BN),)](
            span_sums(x, w1, spans), spans, x_scale, w1_scale, b1, out, M, F,
            ACT=activation, GATES=gated, BM=BM, BN=BN, num_warps=4, **launch.OPTIONS,
        )  # fmt: skip
    else:
        tile = tile_for(x, F, gated)
        up_kernel[programs(x, F, tile)](
            operand(x, tile.BM, tile.BK), operand(w1, tile.BN, tile.BK), x_scale, w1_scale, b1, None, out,
            None, M, F, D, ACT=activation, GATES=gated, FLIP=True, **options(tile, F),
        )  # fmt: skip
    return out


def frozen_down(
    a: Tensor,
    a_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``y [M, D]`` in dtype: a ``[M, F]``, w2 ``[D, F]``, scales ``[M]`` and ``[D]``, residual ``[M, D]``."""
    (M, F), D = a.shape, w2.shape[0]
    a_scale, w2_scale, b2 = dense_rows(a_scale), dense_rows(w2_scale), dense_rows(b2)
    y, residual, spans = torch.empty(M, D, dtype=dtype, device=a.device), dense_rows(residual), spans_of(a, D)
    if y.numel() == 0:
        return y
    if spans > 1:
        BM, BN = join_tile(M)
        down_join_kernel[(triton.cdiv(M, BM) * triton.cdiv(D, BN),)](
            span_sums(a, w2, spans), spans, a_scale, w2_scale, b2, residual, y, row_stride(residual), M, D,
            BM=BM, BN=BN, num_warps=4, **launch.OPTIONS,
        )  # fmt: skip
    else:
        tile = tile_for(a, D, False)
        down_kernel[programs(a, D, tile)](
            operand(a, tile.BM, tile.BK), operand(w2, tile.BN, tile.BK), a_scale, w2_scale, b2, residual, y,
            None, row_stride(residual), M, D, F, FLIP=True, **options(tile, D),
        )  # fmt: skip
    return y


def tile_for(x: Tensor, N: int, gated: bool) -> Tile:
    """The table's entry for x's GPU and dtype, hardly larger than the [M, N] result."""
    M, K = x.shape
    if x.dtype == torch.float32 and K < LONG_SUM:
        tile = SHORT_SUMS.gated if gated else SHORT_SUMS.forward
    else:
        tiles = CONFIGURATIONS[launch.architecture(x.device), x.element_size()]
        few, many = (tiles.gated_few, tiles.gated) if gated else (tiles.few, tiles.forward)
        tile = few if M <= FEW else many
    return tile._replace(BM=min(tile.BM, launch.padded(M)), BN=min(tile.BN, launch.padded(N, 64)))


def programs(x: Tensor, N: int, tile: Tile) -> tuple[int]:
    """For few rows all tiles at once, as many loads under way as there can be; else one a processor."""
    M = x.shape[0]
    return (triton.cdiv(N, tile.BN),) if M <= FEW else grid(x.device, M, N, tile)


def spans_of(x: Tensor, N: int) -> int:
    """Into how many spans K is cut in a product with N rows of weights."""
    M, K = x.shape
    if M > FEW or K < 2 * LEAST_SPAN:
        return 1
    tiles = triton.cdiv(N, tile_for(x, N, False).BN)
    spans = min(PROGRAMS * launch.multiprocessors(x.device) // tiles, K // LEAST_SPAN)
    return max(1, spans)


def span_sums(x: Tensor, w: Tensor, spans: int) -> Tensor:
    """``partial [spans, M, N]`` fp32, whose sum is ``x w^T``."""
    (M, K), N = x.shape, w.shape[0]
    tile = tile_for(x, N, False)
    length = triton.cdiv(triton.cdiv(K, spans), tile.BK) * tile.BK
    partial = torch.empty(spans, M, N, dtype=torch.float32, device=x.device)
    span_kernel[(triton.cdiv(N, tile.BN) * spans,)](
        operand(x, tile.BM, tile.BK), operand(w, tile.BN, tile.BK), partial, length, M, N, K,
        **options(tile, N),
    )  # fmt: skip
    return partial


def join_tile(M: int) -> tuple[int, int]:
    return min(4, triton.next_power_of_2(M)), 128
