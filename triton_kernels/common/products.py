"""The tile of a matrix product that every fused kernel begins with: which one, and its sums.

    program = one processor, which walks over tiles        tile 0 3 6 9 | 12 ..      GROUP tiles of a column
    of the [M, N] result                                        1 4 7 10|            follow each other: their
                                                                2 5 8 11|            operands stay in L2
    tile    = [BM, BN] fp32 sums of [BM, BK] x [BK, BN]

Operands arrive through tensor descriptors (TMA) on sm_90 and by cp.async elsewhere, the next ones while the
tensor cores work on these. Their rows are whole vectors: what is not is copied into rows padded with zeros.
A product is one loop over K with one accumulator, or with two where a gated layer needs the same rows times
two blocks of columns. Frozen weights, `frozen_ffn.py`, are of 8 bits and come with scales for what follows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bigkern.triton_kernels.common import launch
from bigkern.triton_kernels.common.rows import pointers


class Tile(NamedTuple):
    """A launch: the tile of the result, the step along K, warps a program, stages of the load pipeline.

    And how fp32 factors are multiplied: "ieee" by plain FMA, "tf32x3" in three parts on tensor cores.
    """

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    precision: str = "ieee"


class Tiles(NamedTuple):
    forward: Tile
    gated: Tile  # two accumulators
    backward: Tile
    gated_backward: Tile
    gradient: Tile


# (architecture, bytes an element) -> tiles
CONFIGURATIONS = {
    (80, 2): Tiles(
        forward=Tile(128, 128, 32, 8, 4),
        gated=Tile(128, 64, 32, 8, 4),
        backward=Tile(128, 128, 32, 8, 3),
        gated_backward=Tile(128, 64, 32, 8, 4),
        gradient=Tile(128, 128, 32, 8, 4),
    ),
    (80, 4): Tiles(
        forward=Tile(64, 64, 32, 4, 3, "tf32x3"),
        gated=Tile(64, 32, 32, 4, 3, "tf32x3"),
        backward=Tile(64, 64, 32, 4, 3, "tf32x3"),
        gated_backward=Tile(64, 32, 32, 4, 3, "tf32x3"),
        gradient=Tile(64, 64, 32, 4, 3, "tf32x3"),
    ),
    (90, 2): Tiles(
        forward=Tile(128, 256, 64, 8, 3),
        gated=Tile(128, 128, 64, 8, 3),
        backward=Tile(128, 128, 64, 8, 4),
        gated_backward=Tile(128, 128, 64, 8, 3),
        gradient=Tile(128, 256, 64, 8, 3),
    ),
    (90, 4): Tiles(
        forward=Tile(128, 128, 32, 8, 3, "tf32x3"),
        gated=Tile(128, 64, 32, 8, 3, "tf32x3"),
        backward=Tile(128, 128, 32, 8, 3, "tf32x3"),
        gated_backward=Tile(128, 64, 32, 8, 3, "tf32x3"),
        gradient=Tile(128, 128, 32, 8, 3, "tf32x3"),
    ),
}

# fp32 where K is short: "tf32x3" rounds each product by 2^-22, which only the rounding of a long sum hides.
LONG_SUM = 256
SHORT_SUMS = Tiles(
    forward=Tile(64, 64, 16, 8, 3),
    gated=Tile(64, 32, 16, 8, 3),
    backward=Tile(64, 64, 16, 8, 3),
    gated_backward=Tile(64, 32, 16, 8, 3),
    gradient=Tile(64, 64, 16, 8, 3),
)


class Matrix(NamedTuple):
    """A matrix with unit last stride, behind a pointer."""

    data: Tensor
    row: int


@triton.jit
def place(tile, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr = 8):
    """The first row and column of a tile of the [M, N] result."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = tile // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    i = tile % (GROUP * columns)
    return (first + i % height) * BM, i // height * BN


@triton.jit
def load(x, i, j, I, J, BI: tl.constexpr, BJ: tl.constexpr):
    """The [BI, BJ] tile of x [I, J] from (i, j), zero beyond its ends."""
    if isinstance(x, tl.tensor_descriptor):
        tile = x.load([i, j])
    else:
        rows, columns = i + tl.arange(0, BI), j + tl.arange(0, BJ)
        exists = (rows < I)[:, None] & (columns < tl.cdiv(J, 16) * 16)[None, :]
        tile = tl.load(pointers(x.data, i, j, x.row, BI, BJ), mask=exists, other=0.0)
    return tile


@triton.jit
def add_product(sums, left, right, PRECISION: tl.constexpr, FLIP: tl.constexpr):
    """sums + left right, or (FLIP) sums + (left right)^T; right is widened if it is int8.

    Tensor cores add fp8 products up in about 14 bits, even into fp32 sums (DeepSeek-V3 Technical Report,
    3.3.2, for sm_90; sm_89 is said to be alike), and Triton would leave all of K to them. Here, as in cuBLAS
    without "fast accumulation", they make the sums of one step along K, and these are added up in fp32
    outside. `max_num_imprecise_acc` says so on sm_90, and keeps the compiler from joining the two anywhere.
    """
    right = right.to(left.dtype)
    if FLIP:
        left, right = tl.trans(right), tl.trans(left)
    if left.dtype == tl.float8e4nv:
        sums += tl.dot(left, right, max_num_imprecise_acc=left.shape[1])
    else:
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    return sums


@triton.jit
def products(
    a, b, row, column, second, M, N, K,
    A_BY_K: tl.constexpr, B_BY_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    FLIP: tl.constexpr = False, begin=0, end=None,
):  # fmt: skip
    """fp32 [BM, BN] of a b from (row, column); and, if there is a second column, of a b from (row, second).

    a is [M, K], or stored [K, M] (A_BY_K); b is stored [N, K], or [K, N] (B_BY_K). FLIP makes the transposed
    tiles. Of K's products, those of [begin, end); begin is a multiple of BK.
    """
    x = tl.zeros([BN, BM] if FLIP else [BM, BN], tl.float32)
    y = x
    for k in range(begin, K if end is None else end, BK):
        left = tl.trans(load(a, k, row, K, M, BK, BM)) if A_BY_K else load(a, row, k, M, K, BM, BK)
        right = load(b, k, column, K, N, BK, BN) if B_BY_K else tl.trans(load(b, column, k, N, K, BN, BK))
        x = add_product(x, left, right, PRECISION, FLIP)
        if second is not None:
            right = tl.trans(load(b, second, k, N, K, BN, BK))
            y = add_product(y, left, right, PRECISION, FLIP)
    if FLIP:
        x, y = tl.trans(x), tl.trans(y)
    return x, y


@triton.jit
def halves(x):
    """The left and the right half of the columns of a tile."""
    rows: tl.constexpr = x.shape[0]
    columns: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, [rows, 2, columns]), (0, 2, 1)))


# ---- for the launchers -----------------------------------------------------------------------------


def tile_for(kind: str, x: Tensor, M: int, N: int, K: int) -> Tile:
    """The table's entry for x's GPU and dtype, hardly larger than the [M, N] result; wgmma has 64 rows."""
    short = x.element_size() == 4 and K < LONG_SUM
    tiles = SHORT_SUMS if short else CONFIGURATIONS[launch.architecture(x.device), x.element_size()]
    tile: Tile = getattr(tiles, kind)
    return tile._replace(BM=min(tile.BM, launch.padded(M, 64)), BN=min(tile.BN, launch.padded(N)))


def operand(x: Tensor, rows: int, columns: int) -> Matrix | TensorDescriptor:
    """x as a product reads it, in tiles of so many rows and columns."""
    x = aligned(x)
    if launch.architecture(x.device) >= 90:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])
    return Matrix(x, x.stride(0))


def aligned(x: Tensor) -> Tensor:
    """x itself if its rows are whole vectors, else a copy with zeros up to the next 16 elements."""
    rows, columns = x.shape
    whole = columns % 16 == 0 and x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.stride(0) >= columns
    if whole and x.data_ptr() % 16 == 0:
        return x
    copy = x.new_zeros(rows, triton.cdiv(columns, 16) * 16)
    copy[:, :columns] = x
    return copy


def grid(device: torch.device, M: int, N: int, tile: Tile) -> tuple[int]:
    """A program a processor, but none without a tile."""
    return (min(triton.cdiv(M, tile.BM) * triton.cdiv(N, tile.BN), launch.multiprocessors(device)),)


def options(tile: Tile, columns: int) -> dict[str, object]:
    """Of a product whose result has so many columns; rows that are not whole vectors take more registers."""
    return {
        "BM": tile.BM,
        "BN": tile.BN,
        "BK": tile.BK,
        "SLICE": 32 if columns % 16 == 0 else 16,
        "PRECISION": tile.precision,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **launch.OPTIONS,
    }
