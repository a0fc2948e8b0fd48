"""Problems of decoding: few queries, long caches, contiguous and paged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bigkern.core.problem import Call, Inputs, Problem
from bigkern.ops.attention import decode as op
from bigkern.ops.attention import decode_reference
from bigkern.ops.attention.decode_call import bind
from bigkern.ops.attention.problems import feature_words, keywords, present, slopes


def decode(
    lengths: Sequence[int], H: int, S: int, D: int, *, kv_heads: int | None = None, queries: int = 1,
    page_size: int = 0, label: str = "", window: tuple[int, int] | None = None, softcap: float = 0.0,
    alibi: bool = False, sinks: bool = False,
) -> Problem:  # fmt: skip
    """The newest queries of each sequence over a cache with room for S keys of each, perhaps in pages."""
    B, kv = len(lengths), kv_heads or H
    width = -(-S // page_size) if page_size else 1
    cache = (B * width, page_size, kv, D) if page_size else (B, kv, S, D)
    shapes: dict[str, tuple[int, ...]] = {"q": (B, queries, H, D), "cache_k": cache, "cache_v": cache}
    shapes |= {"sinks": (H,)} if sinks else {}
    given = keywords(True, 0.0, window=window, softcap=softcap)

    def constants(device: torch.device) -> Inputs:
        made = {"lengths": torch.tensor(lengths, dtype=torch.int32, device=device)}
        if page_size:
            shuffled = torch.randperm(B * width, generator=torch.Generator().manual_seed(2))
            made["page_table"] = shuffled.view(B, width).to(device, torch.int32)
        return made | (slopes(H, device) if alibi else {})

    def call(inputs: Inputs) -> Call:
        keys, values = (inputs[name] for name in ("cache_k", "cache_v"))
        if page_size:
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        tensors = present(inputs, "page_table", "alibi_slopes", "sinks")
        return (inputs["q"].transpose(1, 2), keys, values, inputs["lengths"]), tensors | given

    def specified(inputs: Inputs) -> Tensor:
        arguments, options = call(inputs)
        return decode_reference.decode_attention(bind(*arguments, **options)).o

    words = [label or f"{B}x{H}x{queries}x{D} over {', '.join(str(n) for n in lengths)} keys"]
    words += [f"{kv} kv heads"] if kv != H else []
    words += [f"pages of {page_size}"] if page_size else []
    words += feature_words(window, softcap, alibi, sinks)
    return Problem(
        "decode_attention",
        ", ".join(words),
        shapes,
        op.decode_attention,
        call,
        specified,
        constants,
        elements=2 * kv * D * sum(lengths),
        differentiable=False,
    )


def small() -> list[Problem]:
    return [
        decode((129, 1, 0), 4, 150, 64),
        decode((129, 64, 7), 8, 150, 64, kv_heads=2),
        decode((129, 33), 4, 160, 64, kv_heads=2, page_size=16),
        decode((97, 33), 4, 100, 64, kv_heads=2, queries=3, window=(40, 0)),
        decode((65, 9), 4, 65, 64, softcap=2.0, alibi=True, sinks=True),
    ]


def thorough() -> list[Problem]:
    return [
        *(decode((301, 44), 4, 301, D, kv_heads=2) for D in (16, 40, 80, 96, 128, 160, 256)),
        *(decode((4097, 513, 1), 8, 4100, 128, kv_heads=n) for n in (1, 2, 8)),
        *(decode((1000, 77, 0), 8, 1024, 128, kv_heads=2, page_size=size) for size in (16, 64, 256)),
        decode((700, 41), 8, 720, 64, kv_heads=1, queries=8, page_size=16, window=(300, 0)),
        decode((700, 41), 8, 700, 256, kv_heads=4, queries=5, softcap=5.0, alibi=True, sinks=True),
    ]


def typical() -> Problem:
    return decode([4096] * 8, 12, 4096, 64)
