"""Attention over sequence lengths, one by one its features, and decoding from a cache."""

from __future__ import annotations

import math

import torch

from bigkern.benchmarks.attention_peers import decoding, dense, packed
from bigkern.benchmarks.harness import Bench, Case, Contestant, ours
from bigkern.core.problem import Problem
from bigkern.ops.attention.decode_problems import decode
from bigkern.ops.attention.problems import attention, varlen

GPU, CPU = (torch.bfloat16,), (torch.float32, torch.bfloat16)
TOKENS, WIDTH = 16384, 2048  # on a GPU: the layout that published numbers use


def cases(bench: Bench) -> list[Case]:
    return [*sweep(bench), *features(bench), *decodes(bench)]


# ---- over sequence lengths --------------------------------------------------------------------------


def sweep(bench: Bench) -> list[Case]:
    """[B, S, H, D] with as many tokens at every length, so that the work grows with S alone."""
    if bench.device.type == "cuda":
        lengths = (1024, 8192) if bench.quick else (128, 512, 1024, 2048, 4096, 8192, 16384)
        dims = (64, 128) if bench.quick else (64, 128, 256)
        sizes = [(TOKENS // S, WIDTH // D, S, D) for D in dims for S in lengths]
    else:
        sizes = [(1, 12, 128, 64)]
        sizes += [] if bench.quick else [(4, 12, 512, 64), (1, 12, 2048, 64), (1, 16, 4096, 128)]
    return [_of_sweep(bench, size, causal) for size in sizes for causal in (False, True)]


def _of_sweep(bench: Bench, size: tuple[int, int, int, int], causal: bool) -> Case:
    _B, _H, S, D = size
    problem = attention(*size, causal)
    # On a CPU FlexAttention has no backward, and compiles for half a minute.
    peers = dense(problem, bench.device, causal, with_flex=bench.device.type == "cuda" and not bench.quick)
    rule = "causal" if causal else "full"
    smaller = attention(1, 2, min(S, 1024), D, causal)
    return _case(bench, problem, peers, rule, smaller, panel=f"D {D}, {rule}", x=S)


# ---- features ---------------------------------------------------------------------------------------


def features(bench: Bench) -> list[Case]:
    """A sliding window, a bias with a gradient (T5's: one for all batches), packed sequences."""
    if bench.device.type == "cuda":
        B, H, S, D, left = 4, 16, 4096, 128, 1024
        lengths = [4096, 256, 2048, 1024, 128, 3072, 512, 1536, 64, 3648]  # 16k tokens
    elif bench.quick:
        B, H, S, D, left, lengths = 1, 4, 256, 64, 64, [256, 32, 128, 64]
    else:
        B, H, S, D, left, lengths = 1, 12, 2048, 64, 256, [1024, 64, 512, 256, 128, 768, 384, 960]
    window = attention(B, H, S, D, True, window=(left, 0))
    bias = attention(2 * B, H, S // 2, D, bias="learned")
    words = f"varlen, {len(lengths)} sequences of {min(lengths)} to {max(lengths)}, {H}x{D}"
    packs = varlen(lengths, H, D, True, label=words)
    device, with_flex = bench.device, not bench.quick
    return [
        _case(
            bench,
            window,
            dense(window, device, True, left, with_flex),
            "window",
            attention(1, 2, min(S, 1024), D, True, window=(min(left, 256), 0)),
        ),
        _case(
            bench,
            bias,
            dense(bias, device, False, with_flex=with_flex),
            "bias",
            attention(2, 2, min(S // 2, 512), D, bias="learned"),
        ),
        _case(
            bench, packs, packed(packs, device, True, lengths), "varlen", varlen([200, 1, 300], 2, D, True)
        ),
    ]


# ---- decoding ---------------------------------------------------------------------------------------


def decodes(bench: Bench) -> list[Case]:
    """Eight sequences: of one length, of many, with shared keys, in pages; on a GPU also one long one."""
    quick, S = bench.quick, 1024 if bench.quick else 4096
    same, ragged = [S] * 8, [S - n * S // 8 for n in range(8)]
    if bench.device.type == "cuda":
        H, D, shared = 32, 128, 8
        pages, longer = (16, 256), [_decode(bench, [32768], H, D, shared)] * (not quick)
    else:
        H, D, shared = 12, 64, 3
        pages, longer = (16,), []
    found = [_decode(bench, same, H, D, H), _decode(bench, same, H, D, shared)]
    found += [] if quick else [_decode(bench, ragged, H, D, n) for n in (H, shared)]
    return (
        found
        + [_decode(bench, ragged, H, D, shared, size) for size in pages[: 1 if quick else None]]
        + longer
    )


def _decode(bench: Bench, lengths: list[int], H: int, D: int, shared: int, page_size: int = 0) -> Case:
    B, longest = len(lengths), max(lengths)
    span = f"{longest}" if len(set(lengths)) == 1 else f"{min(lengths)} to {longest}"
    problem = decode(
        lengths,
        H,
        longest,
        D,
        kv_heads=shared,
        page_size=page_size,
        label=f"decode {B}x{H}x1x{D} over {span}",
    )
    peers = decoding(problem, bench.device, lengths, page_size > 0)
    smaller = decode([300, 41], H, 300, D, kv_heads=shared, page_size=page_size)
    return _case(bench, problem, peers, "decode", smaller)


def _case(
    bench: Bench,
    problem: Problem,
    peers: list[Contestant],
    group: str,
    gate: Problem,
    panel: str = "",
    x: float = math.nan,
) -> Case:
    dtypes = GPU if bench.device.type == "cuda" else CPU
    return Case(problem, [ours(problem), *peers], gate, dtypes, group, panel, x)
