"""Problems of decoding: few queries, long caches, contiguous and paged."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from bigkern.core.problem import Call, Inputs, Problem
from bigkern.ops.attention import decode as op
from bigkern.ops.attention import decode_reference, stock
from bigkern.ops.attention.decode_call import bind
from bigkern.ops.attention.problems import Window, feature_words, keywords, present, slopes


def decode(
    lengths: Sequence[int], H: int, S: int, D: int, *, kv_heads: int | None = None, queries: int = 1,
    page_size: int = 0, label: str = "", causal: bool = True, value_dim: int | None = None,
    window: Window | None = None, softcap: float = 0.0, alibi: str | bool = False, sinks: bool = False,
    lse: bool = False, poisoned: bool = False,
) -> Problem:  # fmt: skip
    """The newest queries of each sequence over a cache with room for S keys of each, perhaps in pages.

    ``poisoned``: what no sequence reaches is NaN in the caches and -1 in the table of pages.
    """
    B, kv, Dv = len(lengths), kv_heads or H, value_dim or D
    width = -(-S // page_size) if page_size else 1
    as_pages = page_size or poisoned  # stored as [pages, keys, heads, D]
    size = (B * width, page_size or S, kv) if as_pages else (B, kv, S)
    shapes: dict[str, tuple[int, ...]] = {
        "q": (B, queries, H, D),
        "cache_k": (*size, D),
        "cache_v": (*size, Dv),
    }
    table = torch.arange(B).view(B, 1)
    if page_size:
        table = torch.randperm(B * width, generator=torch.Generator().manual_seed(2)).view(B, width)
    given = keywords(causal, 0.0, window=window, softcap=softcap, return_lse=lse)

    def values(drawn: Inputs) -> Inputs:
        if not poisoned:
            return drawn
        reached = torch.zeros(size[:2], dtype=torch.bool)
        for pages, length in zip(table, lengths, strict=True):
            reached[pages] = (torch.arange(width * size[1]) < length).view(width, -1)
        return drawn | {name: drawn[name].where(reached[..., None, None], torch.nan) for name in CACHES}

    def constants(device: torch.device) -> Inputs:
        made = {"lengths": torch.tensor(lengths, dtype=torch.int32, device=device)}
        if page_size:
            used = torch.arange(width) * page_size < torch.tensor(lengths)[:, None]
            made["page_table"] = (table.where(used, -1) if poisoned else table).to(device, torch.int32)
        if sinks:
            made["sinks"] = torch.randn(H, generator=torch.Generator().manual_seed(H)).to(device)
        return made | (slopes(H, device, B if alibi == "batches" else 0) if alibi else {})

    def call(inputs: Inputs) -> Call:
        keys, values = (inputs[name].transpose(1, 2) if as_pages else inputs[name] for name in CACHES)
        tensors = present(inputs, "page_table", "alibi_slopes", "sinks")
        return (inputs["q"].transpose(1, 2), keys, values, inputs["lengths"]), tensors | given

    def specification(inputs: Inputs) -> Any:
        arguments, options = call(inputs)
        o, of_rows = decode_reference.decode_attention(bind(*arguments, **options))
        return (o, of_rows) if lse else o

    def by_torch(inputs: Inputs) -> Any:
        arguments, options = call(inputs)
        o = stock.decode_attention(bind(*arguments, **options))
        return (o, specification(inputs)[1]) if lse else o

    words = [label or f"{B}x{H}x{queries}x{D} over {', '.join(str(n) for n in lengths)} keys"]
    words += [f"{kv} kv heads"] if kv != H else []
    words += [f"{Dv} columns of v"] if Dv != D else []
    words += [f"pages of {page_size}"] if page_size else []
    words += feature_words(window, softcap, alibi, sinks) + ["not causal"] * (not causal)
    features = {
        "paged cache" if page_size else "contiguous cache": True,
        "sequences of several lengths": len(set(lengths)) > 1,
        "empty cache": 0 in lengths,
        "several queries": queries > 1,
        "grouped and multi-query heads": kv != H,
        "ALiBi": alibi,
        "sliding window": window,
        "softcap": softcap,
        "sinks": sinks,
    }
    return Problem(
        "decode_attention",
        ", ".join(words),
        shapes,
        op.decode_attention,
        call,
        by_torch,
        constants,
        specification,
        values=values,
        outputs=("output", "lse") if lse else ("output",),
        elements=2 * kv * D * sum(lengths),
        differentiable=False,
        features=tuple(name for name, used in features.items() if used),
    )


CACHES = ("cache_k", "cache_v")


def form(
    lengths: Sequence[int] = (33, 5), H: int = 4, D: int = 32, page_size: int = 0, **options: Any
) -> Problem:
    """A small call, with a page in vain."""
    given = {"kv_heads": 2, "lse": True, "poisoned": True, **options}
    return decode(lengths, H, max((*lengths, 1)) + (page_size or 3), D, page_size=page_size, **given)


def forms() -> list[Problem]:
    return [
        form(),
        form((0, 1, 70)),
        form((600,), 2, 64, kv_heads=1),
        form((5,), 2, 1, value_dim=3),
        form((40, 300), 8, 128, kv_heads=1),
        form((40,), D=256, value_dim=192),
        form((40, 3), queries=4),
        form((40, 3), queries=5, causal=False),
        form((70, 33), 6, queries=20),
        form(page_size=16),
        form((3, 5, 0), page_size=1),
        form((50, 0, 14), page_size=7, queries=3),
        form((500, 64), page_size=64),
        form(window=(9, 0)),
        form(window=(9, 2), queries=4, causal=False),
        form(softcap=1.0),
        form(alibi="heads", queries=3),
        form(alibi="batches", page_size=8),
        form((0, 9), sinks=True),
        form((90, 1, 0), page_size=8, queries=2, window=(20, 0), softcap=2.0, alibi="batches", sinks=True),
    ]


def drawn(draw: random.Random, largest: int) -> Problem:
    kv_heads, D = draw.choice([1, 2, 3]), draw.choice([8, 64, 128, draw.randint(1, 256)])
    side = lambda: draw.choice([None, 0, draw.randint(1, largest)])  # noqa: E731
    return form(
        [draw.choice([0, 1, draw.randint(1, largest)]) for _ in range(draw.randint(1, 4))],
        kv_heads * draw.choice([1, 2, 4]),
        D,
        draw.choice([0, 0, 1, 16, draw.randint(1, 64)]),
        kv_heads=kv_heads,
        queries=draw.choice([1, 1, 2, draw.randint(1, 20)]),
        value_dim=draw.choice([D, draw.randint(1, 96)]),
        causal=draw.random() < 0.8,
        window=draw.choice([None, None, (side(), side())]),
        softcap=draw.choice([0.0, 0.0, 1.5]),
        alibi=draw.choice(["", "", "heads", "batches"]),
        sinks=draw.random() < 0.3,
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


def grid() -> list[Problem]:
    return [
        decode([keys] * B, 12, keys, 64, page_size=page_size)
        for page_size in (0, 64)
        for B, keys in ((1, 64), (1, 1024), (1, 8192), (16, 64), (16, 1024))
    ]


def large() -> list[Problem]:
    return [
        decode([keys] * B, 32, keys, 128, kv_heads=8, page_size=page_size)
        for page_size in (0, 64)
        for B, keys in ((1, 8192), (64, 1024), (64, 4096))
    ]


def typical() -> Problem:
    return decode([4096] * 8, 12, 4096, 64)
