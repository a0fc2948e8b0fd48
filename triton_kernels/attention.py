"""Attention without the score matrix: forward and backward in Triton.

    x = scale * q k^T            x = softcap tanh(x / softcap), if asked
    s = x + bias - slope |i + offset - j|, -inf where mask or window forbid
    lse = log (sum exp s + exp sink)          p = exp(s - lse)          o = dropout(p) v

A program of the forward owns BR rows of one head and walks over the keys in tiles of BC, keeping the
row's maximum m, its sum l and the unnormalised output:

         q [BR, D]        k, v [BC, D]             stays in registers:  acc [BR, DV], m [BR], l [BR]
      +-----------+   +--+--+--+--+--+--+--+       loaded once:         q
      |  program  | x |  |  |  |  |  |  |  |       streamed:            k, v, one tile ahead of the product
      +-----------+   +--+--+--+--+--+--+--+
                        edge | plain  | edge       masks are built only in edge tiles: where the window's
                                                   edges, the causal one among them, or the end of the
                                                   keys run through the tile; what is outside is not visited

The backward recomputes p = exp(s - lse) and runs three kernels: ``statistics`` (delta = rowsum(do * o) -
dlse), ``key_value_gradient`` (a program owns BC keys and walks over the queries of all heads that share
them) and ``query_gradient`` (a program owns BR queries and walks over the keys); a fourth, in
`attention_bias.py`, sums ds for the bias. Each gradient has one owner, so there are no atomics and the
result is the same in every run.

A row with nothing to attend to gives o = 0, lse = -inf (its sink, if it has one) and zero gradients. Packed
sequences lie behind each other in the rows of one batch; a program whose tile is beyond its sequence's end
leaves at once.

Dao, FlashAttention-2 (2023); Milakov and Gimelshein, Online normalizer calculation for softmax (2018).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch
from .attention_backward import key_value_gradient_kernel, query_gradient_kernel, statistics_kernel
from .attention_bias import Owned, bias_gradient_kernel
from .attention_forward import attention_kernel
from .attention_scores import Terms, broadcast, dropout_of, factor_of, given, slopes_of
from .attention_tiles import Shape, View, describable, descriptor, empty_bshd, side, statistic, view


class Tile(NamedTuple):
    """A launch: BR query rows and BC key columns a tile, warps a program, stages of the load pipeline.

    And how fp32 factors are multiplied: "ieee" by plain FMA, "tf32x3" in three parts on tensor cores.
    """

    BR: int
    BC: int
    warps: int
    stages: int
    precision: str = "ieee"


class Tiles(NamedTuple):
    forward: Tile
    key_value: Tile
    query: Tile
    bias: Tile


# (architecture, bytes an element, head dim up to) -> tiles. 2 bytes run on tensor cores, 4 on plain FMA.
CONFIGURATIONS = {
    (80, 2, 64): Tiles(Tile(128, 64, 8, 3), Tile(32, 128, 8, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
    (80, 2, 128): Tiles(Tile(128, 32, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
    (80, 2, 256): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 16, 8, 1)),
    (80, 4, 64): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (80, 4, 128): Tiles(Tile(32, 16, 8, 1), Tile(32, 16, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    (80, 4, 256): Tiles(Tile(32, 32, 16, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 4, 1)),
    (90, 2, 64): Tiles(Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
    (90, 2, 128): Tiles(Tile(128, 64, 8, 3), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    (90, 2, 256): Tiles(Tile(128, 32, 8, 2), Tile(32, 32, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 1)),
    (90, 4, 64): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    (90, 4, 128): Tiles(Tile(32, 16, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    (90, 4, 256): Tiles(Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}

# Where windows, biases and the like need registers of their own.
GENERAL = {
    (80, 2, 64): CONFIGURATIONS[80, 2, 64]._replace(key_value=Tile(32, 128, 8, 1)),
    (80, 2, 256): CONFIGURATIONS[80, 2, 256]._replace(query=Tile(32, 32, 8, 1)),
    (80, 4, 64): CONFIGURATIONS[80, 4, 64]._replace(forward=Tile(64, 32, 8, 1)),
    (80, 4, 256): CONFIGURATIONS[80, 4, 256]._replace(query=Tile(16, 16, 8, 2)),
    (90, 2, 128): CONFIGURATIONS[90, 2, 128]._replace(forward=Tile(128, 32, 8, 3), query=Tile(128, 32, 8, 2)),
    (90, 2, 256): CONFIGURATIONS[90, 2, 256]._replace(forward=Tile(128, 16, 8, 2), query=Tile(128, 16, 8, 2)),
    (90, 4, 128): CONFIGURATIONS[90, 4, 128]._replace(
        forward=Tile(32, 16, 4, 1), key_value=Tile(16, 32, 8, 1), query=Tile(16, 16, 8, 1)
    ),
}


# Where tiles come through tensor descriptors (TMA), and the registers of their addresses go into larger ones.
DESCRIBED = {
    (90, 2, 64): CONFIGURATIONS[90, 2, 64]._replace(query=Tile(64, 64, 4, 3)),
    (90, 2, 128): CONFIGURATIONS[90, 2, 128]._replace(
        forward=Tile(128, 128, 8, 2), key_value=Tile(64, 128, 8, 2)
    ),
    (90, 2, 256): CONFIGURATIONS[90, 2, 256]._replace(forward=Tile(128, 64, 8, 2)),
    (90, 4, 64): CONFIGURATIONS[90, 4, 64]._replace(
        forward=Tile(128, 32, 8, 2, "tf32x3"),
        key_value=Tile(32, 128, 8, 1, "tf32x3"),
        query=Tile(64, 32, 4, 2, "tf32x3"),
    ),
}


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
    call = Rules(*rules)  # type: ignore[arg-type]
    if call.scale < 0:
        q, call = -q, call._replace(scale=-call.scale)
    B, Hq, packed = batches(q, call), q.shape[1], call.cu_seqlens_q is not None
    o = empty_bshd(q, Hq, q.shape[2], v.shape[3])
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    shape, terms = shape_of(q, k, call), terms_of(call)
    tiles, stream = tiles_of(shape, terms, q, k, v)
    BC, factor = tiles.forward.BC, factor_of(call.scale, call.softcap, shape)
    programs = triton.cdiv(shape.Sq, tiles.forward.BR) * B * Hq
    if programs > 0:
        attention_kernel[(programs,)](
            view(q, packed), stream(k, BC), stream(v, BC), terms, call.sinks, view(o, packed),
            statistic(lse, packed), factor, shape, **sizes(q, v), **options(tiles.forward),
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
    """dq, dk and dv, each stored as ``[B, S, H, D]``, and dbias, empty unless ``bias_grad``."""
    call = Rules(*rules)  # type: ignore[arg-type]
    B, Hq, packed = batches(q, call), q.shape[1], call.cu_seqlens_q is not None
    dq, dk, dv = (empty_bshd(x, *x.shape[1:]) for x in (q, k, v))
    dbias = q.new_empty(call.bias.shape if bias_grad and call.bias is not None else 0)
    score_lse, delta = torch.empty(2, *lse.shape, dtype=torch.float32, device=q.device)
    shape, terms = shape_of(q, k, call), terms_of(call)
    if lse.numel() > 0:
        S, DV = o.shape[2:]
        statistics_kernel[(triton.cdiv(S, 32) * lse.shape[0] * Hq,)](
            view(do), view(o), lse.contiguous(), None if dlse is None else dlse.contiguous(), score_lse,
            delta, Hq, S, shape, DV=DV, BDV=launch.padded(DV), BR=32, num_warps=4, **launch.OPTIONS,
        )  # fmt: skip
    factor = factor_of(call.scale, call.softcap, shape)
    tiles, stream = tiles_of(shape, terms, q, k, v, do)
    statistics, constants = (statistic(score_lse, packed), statistic(delta, packed)), sizes(q, v)
    programs = triton.cdiv(shape.Sq, tiles.query.BR) * B * Hq
    if programs > 0:
        BC = tiles.query.BC
        query_gradient_kernel[(programs,)](
            view(do, packed), view(q, packed), stream(k, BC), stream(v, BC), terms, *statistics,
            view(dq, packed), call.scale, factor, shape, **constants, **options(tiles.query),
        )  # fmt: skip
    programs = triton.cdiv(shape.Sk, tiles.key_value.BC) * B * shape.Hkv
    if programs > 0:
        BR = tiles.key_value.BR
        key_value_gradient_kernel[(programs,)](
            stream(do, BR), stream(q, BR), view(k, packed), view(v, packed), terms, *statistics,
            view(dk, packed), view(dv, packed), call.scale, factor, shape, **constants,
            **options(tiles.key_value),
        )  # fmt: skip
    if dbias.numel() > 0:
        b, h, i, j = dbias.shape
        programs = b * h * triton.cdiv(i, tiles.bias.BR) * triton.cdiv(j, tiles.bias.BC)
        bias_gradient_kernel[(programs,)](
            *(view(x) for x in (do, q, k, v)), terms, *statistics, Owned(dbias, h, B // b, Hq // h), factor,
            shape, **constants, PER_QUERY=i > 1, PER_KEY=j > 1, **options(tiles.bias),
        )  # fmt: skip
    return dq, dk, dv, dbias


def batches(q: Tensor, call: Rules) -> int:
    return q.shape[0] if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1


def shape_of(q: Tensor, k: Tensor, call: Rules) -> Shape:
    Hq, Hkv = q.shape[1], k.shape[1]
    return Shape(
        Hq,
        Hkv,
        Hq // Hkv,
        call.max_seqlen_q,
        call.max_seqlen_k,
        0 if call.causal == "top_left" else None,
        side(call.window_left, call.max_seqlen_q, call.max_seqlen_k),
        side(call.window_right, call.max_seqlen_q, call.max_seqlen_k),
        1 if q.dtype == torch.float32 else None,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
    )


def terms_of(call: Rules) -> Terms | None:
    terms = Terms(
        call.scale / call.softcap if call.softcap else None,
        broadcast(call.bias),
        broadcast(call.mask),
        slopes_of(call.alibi_slopes),
        dropout_of(call.dropout_key, call.dropout_p),
    )
    return given(terms)


def tiles_of(
    shape: Shape, terms: Terms | None, q: Tensor, k: Tensor, v: Tensor, *do: Tensor
) -> tuple[Tiles, Callable[[Tensor, int], View | TensorDescriptor]]:
    """The tiles of a call, and how its kernels see a tensor that they walk through in so many rows a tile."""
    D = max(64, launch.padded(max(q.shape[3], v.shape[3])))
    key = launch.architecture(q.device), q.element_size(), D
    packed = shape.q_begins is not None
    if terms is None and not packed and key in DESCRIBED and all(describable(x) for x in (q, k, v, *do)):
        return DESCRIBED[key], descriptor
    tiles = CONFIGURATIONS[key]
    if terms is not None or shape.left is not None:
        tiles = GENERAL.get(key, tiles)
    return tiles, lambda x, rows: view(x, packed)


def options(tile: Tile) -> dict[str, int | str]:
    return {
        "BR": tile.BR,
        "BC": tile.BC,
        "PRECISION": tile.precision,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **launch.OPTIONS,
    }


def sizes(q: Tensor, v: Tensor) -> dict[str, int]:
    D, DV = q.shape[3], v.shape[3]
    return {"D": D, "DV": DV, "BD": launch.padded(D), "BDV": launch.padded(DV)}
