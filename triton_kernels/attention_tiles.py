"""What attention's kernels share: how they see their tensors, load tiles of them and mask scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class View(NamedTuple):
    """A [B, H, S, D] tensor whose last stride is 1; the other strides count elements."""

    data: Tensor
    batch: int
    head: int
    row: int


class Broadcast(NamedTuple):
    """A [B, Hq, Sq, Sk] tensor, strides 0 where it is broadcast; rows are dense, padded to 16 elements."""

    data: Tensor
    batch: int
    head: int
    row: int


class Shape(NamedTuple):
    Hq: int
    Hkv: int
    group: int  # query heads that share a key head
    Sq: int
    Sk: int
    diagonal: int  # query i sees keys j <= i + diagonal where CAUSAL


def shape_of(q: Tensor, k: Tensor, causal: str) -> Shape:
    (Hq, Sq), (Hkv, Sk) = q.shape[1:3], k.shape[1:3]
    return Shape(Hq, Hkv, Hq // Hkv, Sq, Sk, Sk - Sq if causal == "bottom_right" else 0)


def view(x: Tensor) -> View:
    """Offsets inside a tile are 32-bit: what has an odd last stride, or enormous rows, is copied."""
    if (x.shape[3] > 1 and x.stride(3) != 1) or x.stride(2) >= 2**23:
        x = x.contiguous()
    return View(x, x.stride(0), x.stride(1), x.stride(2))


def broadcast(x: Tensor | None) -> Broadcast | None:
    """Rows that vectors cannot read are copied into padded ones, but not what is broadcast over B, H, Sq."""
    if x is None:
        return None
    Sk = x.shape[3]
    if x.stride(3) != 1 or any(size % 16 for size in (Sk, *x.stride()[:3], x.data_ptr())):
        stored = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride()[:3])]
        rows = x.new_empty(*stored.shape[:3], triton.cdiv(Sk, 16) * 16)[..., :Sk]
        x = rows.copy_(stored).expand(x.shape)
    return Broadcast(x.view(torch.uint8) if x.dtype == torch.bool else x, *x.stride()[:3])


def empty_bshd(x: Tensor, H: int, S: int, D: int) -> Tensor:
    """An uninitialised ``[B, H, S, D]`` stored as ``[B, S, H, D]``: merging heads needs no copy."""
    return x.new_empty(x.shape[0], S, H, D).transpose(1, 2)


# ---- on the device ---------------------------------------------------------------------------------


@triton.jit
def query_rows(shape, ROWS: tl.constexpr):
    """This program's query rows and head: (first row, b * Hq + h, b, h), the last three int64.

    Programs that follow each other walk up the rows of one head, whose keys the cache then holds; they
    begin at the bottom, because the last rows of a causal triangle are the longest.
    """
    tiles = tl.cdiv(shape.Sq, ROWS)
    start = (tiles - 1 - tl.program_id(0) % tiles) * ROWS
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    return start, bh, bh // shape.Hq, bh % shape.Hq


@triton.jit
def row_tile(x, b, h, start, BD: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, BD] pointers into the [B, H, S, D] tensor x, which may hold more than 2^31 elements."""
    head = x.data + b * x.batch + h * x.head + tl.cast(start, tl.int64) * x.row
    return head + (tl.arange(0, ROWS)[:, None] * x.row + tl.arange(0, BD)[None, :])


@triton.jit
def within(start, end, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, BD], which elements of a row tile exist."""
    return (start + tl.arange(0, ROWS) < end)[:, None] & (tl.arange(0, BD) < D)[None, :]


@triton.jit
def load_rows(x, b, h, start, end, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, EDGE: tl.constexpr):
    """[ROWS, BD] rows from `start`, zero where they do not exist; only an EDGE tile may pass `end`."""
    tile = row_tile(x, b, h, start, BD, ROWS)
    if EDGE:
        rows = tl.load(tile, mask=within(start, end, D, BD, ROWS), other=0.0)
    elif D != BD:
        rows = tl.load(tile, mask=(tl.arange(0, BD) < D)[None, :], other=0.0)
    else:
        rows = tl.load(tile)
    return rows


@triton.jit
def store_rows(x, b, h, start, end, tile, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    """Store an fp32 tile as rows from `start`, as far as they exist."""
    at = row_tile(x, b, h, start, BD, ROWS)
    tl.store(at, tile.to(x.data.dtype.element_ty), mask=within(start, end, D, BD, ROWS))


@triton.jit
def score_tile(x, b, h, i, j, shape):
    """mask or bias at queries i and keys j, which broadcast to a tile; undefined where these do not exist."""
    exists = (i < shape.Sq) & (j < tl.cdiv(shape.Sk, 16) * 16)  # rows are padded: whole vectors exist or not
    return tl.load(
        x.data + b * x.batch + h * x.head + (tl.cast(i, tl.int64) * x.row + j), mask=exists, other=0
    )


@triton.jit
def logits(s, mask, bias, b, h, i, j, scale_log2, shape, CAUSAL: tl.constexpr, EDGE: tl.constexpr):
    """s * scale + bias in the log2 domain, -inf where query i may not see key j; i and j broadcast to s."""
    s = s * scale_log2
    if bias is not None:
        s += LOG2_E * score_tile(bias, b, h, i, j, shape).to(tl.float32)
    if mask is not None:
        s = tl.where(score_tile(mask, b, h, i, j, shape) != 0, s, float("-inf"))
    if EDGE:
        seen = j < shape.Sk
        if CAUSAL:
            seen = seen & (j <= i + shape.diagonal)
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def visible_keys(start, shape, CAUSAL: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """For BR queries from `start`: keys below `plain` need no mask, keys from `end` on are not seen."""
    plain, end = shape.Sk, shape.Sk
    if CAUSAL:
        plain = tl.maximum(0, tl.minimum(plain, start + shape.diagonal + 1))
        end = tl.maximum(0, tl.minimum(end, start + shape.diagonal + BR))
    return plain // BC * BC, end
