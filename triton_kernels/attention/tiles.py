"""What attention's kernels share: how they see tensors, which tiles they visit, how they load them."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bigkern.triton_kernels.common import launch

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class View(NamedTuple):
    """A [B, H, S, D] tensor whose last stride is 1; the other strides count elements. Packed: batch = 0."""

    data: Tensor
    batch: int
    head: int
    row: int


class Statistic(NamedTuple):
    """A [B, Hq, Sq] fp32 tensor with dense rows. Packed: batch = 0."""

    data: Tensor
    batch: int
    head: int


class Shape(NamedTuple):
    """Sizes, and which keys a query sees; what is None compiles to kernels without it."""

    Hq: int
    Hkv: int
    group: int  # query heads that share a key head
    Sq: int  # of the longest sequence
    Sk: int
    offset: int | None  # query i stands at key i + offset; None: the last query stands at the last key
    left: int | None  # it sees keys from i + offset - left ...
    right: int | None  # ... to i + offset + right
    natural: int | None  # 1: scores are logits; None: logits of base 2, see attention_scores.py
    q_begins: Tensor | None  # packed: sequence b is rows begins[b] .. begins[b + 1]
    k_begins: Tensor | None


class Sequence(NamedTuple):
    """Device side: the rows of one sequence, and where its first query stands."""

    q_begin: tl.tensor
    k_begin: tl.tensor
    Sq: tl.tensor
    Sk: tl.tensor
    offset: tl.tensor


class Rows(NamedTuple):
    """Device side: the rows of one head of one sequence."""

    data: tl.tensor
    stride: tl.tensor


class DescribedRows(NamedTuple):
    """The same of a dense tensor behind a tensor descriptor, whose tiles arrive with zeros beyond its end."""

    data: tl.tensor_descriptor
    b: tl.tensor
    h: tl.tensor


def view(x: Tensor, packed: bool = False) -> View:
    """Offsets inside a tile are 32-bit: what has an odd last stride, or enormous rows, is copied."""
    if (x.shape[3] > 1 and x.stride(3) != 1) or x.stride(2) >= 2**23:
        x = x.contiguous()
    return View(x, 0 if packed else x.stride(0), x.stride(1), x.stride(2))


def describable(x: Tensor) -> bool:
    """Whether tensor descriptors can express a [B, H, S, D] tensor: all in multiples of 16 bytes."""
    steps = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:3]))
    return x.stride(3) == 1 and x.numel() > 0 and 0 not in x.stride() and not any(n % 16 for n in steps)


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of so many rows of a [B, H, S, D] tensor."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, launch.padded(x.shape[3])])


def statistic(x: Tensor, packed: bool = False) -> Statistic:
    x = x.contiguous()
    return Statistic(x, 0 if packed else x.stride(0), x.stride(1))


def side(keys: int, Sq: int, Sk: int) -> int | None:
    """A side of the window, -1: unlimited; None where it reaches beyond every key."""
    return keys if 0 <= keys < Sq + Sk else None


def empty_bshd(x: Tensor, H: int, S: int, D: int) -> Tensor:
    """An uninitialised ``[B, H, S, D]`` stored as ``[B, S, H, D]``: merging heads needs no copy."""
    return x.new_empty(x.shape[0], S, H, D).transpose(1, 2)


# ---- which rows ------------------------------------------------------------------------------------


@triton.jit
def sequence(shape, b):
    """Sequence b of the batch."""
    q_begin, k_begin, Sq, Sk = 0, 0, shape.Sq, shape.Sk
    if shape.q_begins is not None:
        q_begin = tl.load(shape.q_begins + b)
        k_begin = tl.load(shape.k_begins + b)
        Sq = tl.load(shape.q_begins + b + 1) - q_begin
        Sk = tl.load(shape.k_begins + b + 1) - k_begin
    offset = Sk - Sq if shape.offset is None else shape.offset
    return Sequence(q_begin, k_begin, Sq, Sk, offset)


@triton.jit
def query_rows(shape, ROWS: tl.constexpr):
    """This program's query rows and head: (first row, b, h), the last two int64.

    Programs that follow each other walk up the rows of one head, whose keys the cache then holds; they
    begin at the bottom, because the last rows of a causal triangle are the longest.
    """
    tiles = tl.cdiv(shape.Sq, ROWS)
    start = (tiles - 1 - tl.program_id(0) % tiles) * ROWS
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    return start, bh // shape.Hq, bh % shape.Hq


@triton.jit
def visible_keys(row, seq, shape, BR, BC: tl.constexpr):
    """For BR queries from `row`, as multiples of BC: (begin, plain, edge, end).

    They see keys [begin, end); keys [plain, edge) are seen by all of them. The window's left edge runs
    through the tiles of [begin, plain), its right edge or the end of the keys through those of [edge, end).
    """
    place = row + seq.offset
    begin, edge, end = 0, seq.Sk, seq.Sk
    if shape.right is not None:
        edge = tl.maximum(0, tl.minimum(edge, place + shape.right + 1))
        end = tl.maximum(0, tl.minimum(end, place + shape.right + BR))
    plain = 0
    if shape.left is not None:
        begin = tl.maximum(0, place - shape.left) // BC * BC
        plain = tl.cdiv(tl.maximum(0, tl.minimum(end, place - shape.left + BR - 1)), BC) * BC
        edge = tl.maximum(edge, plain)
    return begin, plain, edge // BC * BC, end


@triton.jit
def visible_queries(column, seq, shape, BR: tl.constexpr, BC: tl.constexpr):
    """The queries [begin, end) that see any of the BC keys from `column`; begin is a multiple of BR."""
    place = column - seq.offset
    begin, end = 0, seq.Sq
    if shape.right is not None:
        begin = tl.maximum(0, place - shape.right) // BR * BR
    if shape.left is not None:
        end = tl.minimum(end, place + shape.left + BC)
    return begin, end


# ---- tiles of rows ---------------------------------------------------------------------------------


@triton.jit
def rows_of(x, b, h, begin):
    """The rows from `begin` of one head of the [B, H, S, D] tensor x, of 2^31 elements or more."""
    if isinstance(x, tl.tensor_descriptor):
        rows = DescribedRows(x, tl.cast(b, tl.int32), tl.cast(h, tl.int32))
    else:
        rows = Rows(x.data + b * x.batch + h * x.head + tl.cast(begin, tl.int64) * x.row, x.row)
    return rows


@triton.jit
def statistic_of(x, b, h, begin):
    return x.data + b * x.batch + h * x.head + begin


@triton.jit
def row_tile(rows, start, BD: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, BD] pointers to the rows from `start`."""
    first = rows.data + tl.cast(start, tl.int64) * rows.stride
    return first + (tl.arange(0, ROWS)[:, None] * rows.stride + tl.arange(0, BD)[None, :])


@triton.jit
def within(start, end, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, BD], which elements of a row tile exist."""
    return (start + tl.arange(0, ROWS) < end)[:, None] & (tl.arange(0, BD) < D)[None, :]


@triton.jit
def load_rows(rows, start, end, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, EDGE: tl.constexpr):
    """[ROWS, BD] rows from `start`, zero where they do not exist; only an EDGE tile may pass `end`."""
    if isinstance(rows.data, tl.tensor_descriptor):
        tile = rows.data.load([rows.b, rows.h, start, 0]).reshape(ROWS, BD)
    elif EDGE:
        tile = tl.load(row_tile(rows, start, BD, ROWS), mask=within(start, end, D, BD, ROWS), other=0.0)
    elif D != BD:
        tile = tl.load(row_tile(rows, start, BD, ROWS), mask=(tl.arange(0, BD) < D)[None, :], other=0.0)
    else:
        tile = tl.load(row_tile(rows, start, BD, ROWS))
    return tile


@triton.jit
def store_rows(rows, start, end, tile, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    """Store an fp32 tile as rows from `start`, as far as they exist."""
    at = row_tile(rows, start, BD, ROWS)
    tl.store(at, tile.to(rows.data.dtype.element_ty), mask=within(start, end, D, BD, ROWS))


@triton.jit
def add_rows(rows, start, end, tile, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    """Add an fp32 tile to rows from `start`, as far as they exist, in whatever order programs come."""
    if isinstance(rows.data, tl.tensor_descriptor):
        rows.data.atomic_add([rows.b, rows.h, start, 0], tile.reshape(1, 1, ROWS, BD))
    else:
        at = row_tile(rows, start, BD, ROWS)
        tl.atomic_add(at, tile, mask=within(start, end, D, BD, ROWS), sem="relaxed")
