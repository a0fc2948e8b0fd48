"""Attention without the score matrix: forward and backward in Triton.

    s = scale * q k^T + bias     lse = log sum exp s     o = exp(s - lse) v

A program of the forward owns BR rows of one head and walks over the keys in tiles of BC, keeping the
row's maximum m, its sum l and the unnormalised output:

         q [BR, D]      k, v [BC, D]          stays in registers:  acc [BR, DV], m [BR], l [BR]
      +-----------+   +--+--+--+--+--+        loaded once:         q
      |  program  | x |  |  |  |  |  |        streamed:            k, v, one tile ahead of the product
      +-----------+   +--+--+--+--+--+
                        plain   | edge        masks are built only in edge tiles: where the causal
                                              diagonal or the end of the keys runs through the tile

The backward recomputes p = exp(s - lse) and runs three kernels: ``statistics`` (delta = rowsum(do * o)),
``key_value_gradient`` (a program owns BC keys and walks over the queries of all heads that share them) and
``query_gradient`` (a program owns BR queries and walks over the keys). Each gradient has one owner, so
there are no atomics and the result is the same in every run.

Scores live in the log2 domain (s * log2 e), because the hardware's exponential is exp2. A row with nothing
to attend to gives o = 0, lse = -inf and zero gradients.

Dao, FlashAttention-2 (2023); Milakov and Gimelshein, Online normalizer calculation for softmax (2018).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .attention_backward import key_value_gradient_kernel, query_gradient_kernel, statistics_kernel
from .attention_tiles import (
    LN_2,
    LOG2_E,
    broadcast,
    empty_bshd,
    load_rows,
    logits,
    query_rows,
    shape_of,
    store_rows,
    view,
    visible_keys,
)


class Tile(NamedTuple):
    """A launch: BR query rows and BC key columns a tile, warps a program, stages of the load pipeline."""

    BR: int
    BC: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    forward: Tile
    key_value: Tile
    query: Tile


# (architecture, bytes an element, head dim up to) -> tiles. 2 bytes run on tensor cores, 4 on plain FMA.
CONFIGURATIONS = {
    (80, 2, 64): Tiles(Tile(128, 32, 4, 3), Tile(32, 128, 8, 2), Tile(64, 32, 4, 2)),
    (80, 2, 128): Tiles(Tile(128, 32, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    (80, 2, 256): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 32, 8, 1)),
    (80, 4, 64): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(64, 32, 8, 1)),
    (80, 4, 128): Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
    (80, 4, 256): Tiles(Tile(32, 32, 16, 1), Tile(16, 16, 8, 1), Tile(16, 16, 4, 1)),
    (90, 2, 64): Tiles(Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 3)),
    (90, 2, 128): Tiles(Tile(128, 64, 8, 3), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2)),
    (90, 2, 256): Tiles(Tile(128, 32, 8, 2), Tile(32, 32, 8, 2), Tile(128, 32, 8, 2)),
    (90, 4, 64): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 4, 1)),
    (90, 4, 128): Tiles(Tile(32, 16, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
    (90, 4, 256): Tiles(Tile(32, 32, 16, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}


# ---- forward ---------------------------------------------------------------------------------------


@triton.jit
def attend(
    acc, m, l, q_tile, k, v, mask, bias, b, h, row, begin, end, scale_log2, shape,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Fold keys [begin, end) into the running output, maximum and sum of the BR queries from `row`."""
    kv_head = h // shape.group
    for start in range(begin, end, BC):
        k_tile = load_rows(k, b, kv_head, start, shape.Sk, D, BD, BC, EDGE)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # [BR, BC] fp32
        if EDGE or mask is not None or bias is not None:
            i, j = row + tl.arange(0, BR)[:, None], start + tl.arange(0, BC)[None, :]
            s = logits(s, mask, bias, b, h, i, j, scale_log2, shape, CAUSAL, EDGE)
            new_m = tl.maximum(m, tl.max(s, 1))
            finite_m = tl.where(new_m == float("-inf"), 0.0, new_m)  # no NaN while a row has seen nothing
            p = tl.exp2(s - finite_m[:, None])
            rescale = tl.exp2(m - finite_m)
        else:  # scale is not negative, so it commutes with the maximum and fuses into the subtraction
            new_m = tl.maximum(m, tl.max(s, 1) * scale_log2)
            p = tl.exp2(s * scale_log2 - new_m[:, None])
            rescale = tl.exp2(m - new_m)
        l = l * rescale + tl.sum(p, 1)
        v_tile = load_rows(v, b, kv_head, start, shape.Sk, DV, BDV, BC, EDGE)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee")
        m = new_m
    return acc, m, l


@triton.jit
def attention_kernel(
    q, k, v, mask, bias, o, lse, scale_log2, shape,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    CAUSAL: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """o and lse of BR queries of one head."""
    row, bh, b, h = query_rows(shape, BR)
    q_tile = load_rows(q, b, h, row, shape.Sq, D, BD, BR, True)
    acc = tl.zeros([BR, BDV], tl.float32)
    m = tl.full([BR], float("-inf"), tl.float32)  # log2 domain
    l = tl.zeros([BR], tl.float32)
    plain, end = visible_keys(row, shape, CAUSAL, BR, BC)
    acc, m, l = attend(
        acc, m, l, q_tile, k, v, mask, bias, b, h, row, 0, plain, scale_log2, shape,
        D, DV, BD, BDV, BR, BC, CAUSAL, False,
    )  # fmt: skip
    acc, m, l = attend(
        acc, m, l, q_tile, k, v, mask, bias, b, h, row, plain, end, scale_log2, shape,
        D, DV, BD, BDV, BR, BC, CAUSAL, True,
    )  # fmt: skip
    l = tl.where(l == 0.0, 1.0, l)  # a row that saw nothing: o = 0, lse = m = -inf
    store_rows(o, b, h, row, shape.Sq, acc / l[:, None], DV, BDV, BR)
    rows = row + tl.arange(0, BR)
    tl.store(lse + bh * shape.Sq + rows, (m + tl.log2(l)) * LN_2, mask=rows < shape.Sq)


# ---- launchers -------------------------------------------------------------------------------------


class Rules(NamedTuple):
    """The op's arguments after q, k and v."""

    mask: Tensor | None  # bool, [B, Hq, Sq, Sk] or 1 where it is broadcast, True where the query may look
    bias: Tensor | None  # the same, in q's dtype
    alibi_slopes: Tensor | None  # [Hq] or [B, Hq] fp32
    sinks: Tensor | None  # [Hq] fp32
    dropout_key: Tensor | None  # two numbers below 2^32, int64 on the CPU
    cu_seqlens_q: Tensor | None  # [sequences + 1] int32
    cu_seqlens_k: Tensor | None
    scale: float
    causal: str  # "none", "top_left" or "bottom_right"
    window_left: int  # -1: unlimited
    window_right: int
    softcap: float  # 0: none
    dropout_p: float
    max_seqlen_q: int
    max_seqlen_k: int


def attention(q: Tensor, k: Tensor, v: Tensor, *rules: object) -> tuple[Tensor, Tensor]:
    """``o [B, Hq, Sq, Dv]`` stored as ``[B, Sq, Hq, Dv]``, and ``lse [B, Hq, Sq]`` fp32.

    q ``[B, Hq, Sq, D]``, k ``[B, Hkv, Sk, D]``, v ``[B, Hkv, Sk, Dv]``; then what :class:`Rules` lists.
    """
    parsed = Rules(*rules)  # type: ignore[arg-type]
    causal, scale = parsed.causal, parsed.scale
    q, scale = (q, scale) if scale >= 0 else (-q, -scale)
    B, Hq, Sq, _ = q.shape
    mask, bias = expanded(parsed, q, k)
    o = empty_bshd(q, Hq, Sq, v.shape[3])
    lse = torch.empty(B, Hq, Sq, dtype=torch.float32, device=q.device)
    if lse.numel() > 0:
        tile = tiles_of(q, v).forward
        attention_kernel[(triton.cdiv(Sq, tile.BR) * B * Hq,)](
            view(q), view(k), view(v), broadcast(mask), broadcast(bias), view(o), lse, scale * LOG2_E.value,
            shape_of(q, k, causal), **constants(q, v, causal), **options(tile),
        )  # fmt: skip
    return o, lse


def attention_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    bias_grad: bool,
    *rules: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk and dv, each stored as ``[B, S, H, D]``, and an empty dbias."""
    parsed = Rules(*rules)  # type: ignore[arg-type]
    causal, scale = parsed.causal, parsed.scale
    mask, bias = expanded(parsed, q, k)
    B, Hq, Sq, D = q.shape
    Hkv, Sk, DV = v.shape[1:]
    dq, dk, dv = empty_bshd(q, Hq, Sq, D), empty_bshd(k, Hkv, Sk, D), empty_bshd(v, Hkv, Sk, DV)
    lse_log2, delta = torch.empty(2, B, Hq, Sq, dtype=torch.float32, device=q.device)
    shape, tiles, sizes = shape_of(q, k, causal), tiles_of(q, v), constants(q, v, causal)
    inputs = (view(do), view(q), view(k), view(v), broadcast(mask), broadcast(bias), lse_log2, delta)
    scales = (scale, scale * LOG2_E.value)
    if lse.numel() > 0:
        statistics_kernel[(triton.cdiv(Sq, 32) * B * Hq,)](
            view(do), view(o), lse.contiguous(), None if dlse is None else dlse.contiguous(), lse_log2, delta,
            shape, DV=DV, BDV=sizes["BDV"], BR=32, num_warps=4, **launch.OPTIONS,
        )  # fmt: skip
        query_gradient_kernel[(triton.cdiv(Sq, tiles.query.BR) * B * Hq,)](
            *inputs, view(dq), *scales, shape, **sizes, **options(tiles.query)
        )
    if B * Hkv * Sk > 0:
        key_value_gradient_kernel[(triton.cdiv(Sk, tiles.key_value.BC) * B * Hkv,)](
            *inputs, view(dk), view(dv), *scales, shape, **sizes, **options(tiles.key_value)
        )
    return dq, dk, dv, q.new_empty(0)


def expanded(rules: Rules, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """mask and bias as [B, Hq, Sq, Sk]."""
    shape = (*q.shape[:3], k.shape[2])
    return (
        None if rules.mask is None else rules.mask.expand(shape),
        None if rules.bias is None else rules.bias.expand(shape),
    )


def tiles_of(q: Tensor, v: Tensor) -> Tiles:
    D = max(64, launch.padded(max(q.shape[3], v.shape[3])))
    return CONFIGURATIONS[launch.architecture(q.device), q.element_size(), D]


def options(tile: Tile) -> dict[str, int | bool]:
    return {
        "BR": tile.BR,
        "BC": tile.BC,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **launch.OPTIONS,
    }


def constants(q: Tensor, v: Tensor, causal: str) -> dict[str, int | bool]:
    D, DV = q.shape[3], v.shape[3]
    return {"D": D, "DV": DV, "BD": launch.padded(D), "BDV": launch.padded(DV), "CAUSAL": causal != "none"}
