"""Decoding from a cache: every backend against float64, pages, appending, errors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from parity import BACKENDS, FUZZ_FROM, RECORD, assert_parity, device_of, poisoned_empty_memory, run_backend
from torch import Tensor

import bigkern
from bigkern.core.parity import Yardstick
from bigkern.ops.attention import decode_call as op
from bigkern.ops.attention import decode_reference as reference
from bigkern.ops.attention import stock

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERY = pytest.mark.parametrize("backend", BACKENDS)


@dataclass(frozen=True)
class Case:
    """The arguments of one call; ``check(Case(...), backend)`` repeats it exactly."""

    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] = (33, 5)
    Hq: int = 4
    Hkv: int = 2
    Sq: int = 1
    D: int = 32
    Dv: int = 32
    page_size: int = 0  # 0: contiguous
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    alibi: str = ""  # "", "heads" or "batches"
    sinks: bool = False
    seed: int = 0

    def __str__(self) -> str:
        changed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        return "-".join(f"{name}={getattr(self, name)}" for name in changed) or "plain"

    def features(self) -> list[str]:
        used = {
            "contiguous cache": self.page_size == 0,
            "paged cache": self.page_size > 0,
            "sequences of several lengths": len(set(self.lengths)) > 1,
            "empty cache": 0 in self.lengths,
            "several queries": self.Sq > 1,
            "grouped and multi-query heads": self.Hq != self.Hkv,
            "ALiBi": self.alibi != "",
            "sliding window": self.window is not None,
            "softcap": self.softcap != 0.0,
            "sinks": self.sinks,
            str(self.dtype).removeprefix("torch."): True,
        }
        return [name for name, yes in used.items() if yes]

    def arguments(self, device: torch.device) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """q, the caches and the lengths, and the options; what no sequence reaches in the caches is NaN."""
        generator = torch.Generator().manual_seed(self.seed)
        B, longest = len(self.lengths), max((*self.lengths, 1))
        q = torch.randn(B, self.Sq, self.Hq, self.D, generator=generator).transpose(1, 2)
        options: dict[str, Any] = {"causal": self.causal, "window": self.window, "softcap": self.softcap}
        if self.alibi:
            shape = (B, self.Hq) if self.alibi == "batches" else (self.Hq,)
            options["alibi_slopes"] = torch.rand(shape, generator=generator).to(device)
        if self.sinks:
            options["sinks"] = torch.randn(self.Hq, generator=generator).to(device)
        page_size = self.page_size or longest + 3
        width = -(-longest // page_size) + (1 if self.page_size else 0)  # one page in vain
        pages = torch.randperm(B * width, generator=generator).view(B, width).int()
        if not self.page_size:
            pages = torch.arange(B, dtype=torch.int32).view(B, 1)
        caches = []
        for D in (self.D, self.Dv):
            cache = torch.full((B * width, page_size, self.Hkv, D), float("nan")).transpose(1, 2)
            for b, length in enumerate(self.lengths):
                for j in range(length):
                    row = torch.randn(self.Hkv, D, generator=generator)
                    cache[pages[b, j // page_size], :, j % page_size] = row
            caches.append(cache.to(device, self.dtype))
        if self.page_size:
            used = torch.arange(width) * page_size < torch.tensor(self.lengths)[:, None]
            options["page_table"] = pages.where(used, -1).to(device)  # what is not in use may be anything
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        return (q.to(device, self.dtype), *caches, lengths), options


def named(results: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(("o", "lse"), results, strict=True))


def check(case: Case, backend: str) -> None:
    tensors, options = case.arguments(device_of(backend))
    with run_backend("decode_attention", backend):
        poisoned_empty_memory()
        mine = bigkern.decode_attention(*tensors, **options, return_lse=True)
    q, k_cache, v_cache, lengths = tensors
    wide = (q.double(), k_cache.double(), v_cache.double(), lengths)
    right = reference.decode_attention(op.bind(*wide, **options))
    bound = op.bind(*tensors, **options)

    def by_reference() -> dict[str, Tensor]:
        return named(reference.decode_attention(bound))

    def by_stock() -> dict[str, Tensor]:
        return by_reference() | {"o": stock.decode_attention(bound)}

    yardstick = Yardstick(named(right), by_stock, by_reference)
    assert_parity("decode_attention", backend, named(mine), yardstick, case)
    RECORD.passed("decode_attention", backend, case.features())


CASES = [
    Case(),
    Case(lengths=(0, 1, 70)),
    Case(lengths=(600,), Hq=2, Hkv=1, D=64, Dv=64),
    Case(lengths=(5,), Hq=2, Hkv=2, D=1, Dv=3),
    Case(lengths=(40, 300), Hq=8, Hkv=1, D=128, Dv=128),
    Case(lengths=(40,), D=256, Dv=192),
    Case(lengths=(40, 3), Sq=4),
    Case(lengths=(40, 3), Sq=5, causal=False),
    Case(lengths=(70, 33), Sq=20, Hq=6, Hkv=2),
    Case(page_size=16),
    Case(page_size=1, lengths=(3, 5, 0)),
    Case(page_size=7, lengths=(50, 0, 14), Sq=3),
    Case(page_size=64, lengths=(500, 64)),
    Case(window=(9, 0)),
    Case(window=(9, 2), Sq=4, causal=False),
    Case(softcap=1.0),
    Case(alibi="heads", Sq=3),
    Case(alibi="batches", page_size=8),
    Case(sinks=True, lengths=(0, 9)),
    Case(window=(20, 0), softcap=2.0, alibi="batches", sinks=True, page_size=8, Sq=2, lengths=(90, 1, 0)),
]


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: Case, dtype: torch.dtype, backend: str) -> None:
    check(replace(case, dtype=dtype), backend)


def random_case(seed: int, largest: int) -> Case:
    draw = random.Random(seed)
    Hkv, D = draw.choice([1, 2, 3]), draw.choice([8, 64, 128, draw.randint(1, 256)])
    side = lambda: draw.choice([None, 0, draw.randint(1, largest)])  # noqa: E731
    return Case(
        dtype=draw.choice(DTYPES),
        lengths=tuple(draw.choice([0, 1, draw.randint(1, largest)]) for _ in range(draw.randint(1, 4))),
        Hq=Hkv * draw.choice([1, 2, 4]),
        Hkv=Hkv,
        Sq=draw.choice([1, 1, 2, draw.randint(1, 20)]),
        D=D,
        Dv=draw.choice([D, draw.randint(1, 96)]),
        page_size=draw.choice([0, 0, 1, 16, draw.randint(1, 64)]),
        causal=draw.random() < 0.8,
        window=draw.choice([None, None, (side(), side())]),
        softcap=draw.choice([0.0, 0.0, 1.5]),
        alibi=draw.choice(["", "", "heads", "batches"]),
        sinks=draw.random() < 0.3,
        seed=seed,
    )


SEEDS = {"cpu": 200, "torch": 20, "cuda": 200, "triton": 10, "simt": 20}
FUZZ = [(backend, seed) for backend in BACKENDS for seed in range(SEEDS[backend])]


@pytest.mark.parametrize(("backend", "seed"), FUZZ)
def test_fuzz(backend: str, seed: int) -> None:
    case = random_case(seed + FUZZ_FROM, largest=40 if backend in ("triton", "simt") else 600)
    try:
        check(case, backend)
    except BaseException:
        print(f"to repeat: from test_decode_attention import *; check({case!r}, {backend!r})")
        raise


@EVERY
def test_the_specification_is_attention_of_each_sequence(backend: str) -> None:
    tensors, options = Case(lengths=(33, 5, 0), Sq=2, sinks=True, window=(7, 0)).arguments(device_of(backend))
    q, k_cache, v_cache, lengths = tensors
    with run_backend("decode_attention", backend):
        o = bigkern.decode_attention(*tensors, **options)
    options["causal"] = "bottom_right"
    for b, n in enumerate(lengths.tolist()):
        alone = bigkern.attention(
            q[b : b + 1], k_cache[b : b + 1, :, :n], v_cache[b : b + 1, :, :n], **options
        )
        torch.testing.assert_close(o[b : b + 1], alone)


@EVERY
@pytest.mark.parametrize("page_size", [0, 4])
def test_generation_appends(page_size: int, backend: str) -> None:
    """Token by token with appending gives what causal attention over the whole sequence gives."""
    device = device_of(backend)
    q, k, v = (torch.randn(2, H, 11, 16, device=device) for H in (4, 2, 2))
    whole = bigkern.attention(q, k, v, causal=True)
    pages = torch.tensor([[5, 0, 3], [1, 4, 2]], dtype=torch.int32, device=device)
    shape = (6, 2, page_size, 16) if page_size else (2, 2, 12, 16)
    k_cache, v_cache = (torch.full(shape, float("nan"), device=device) for _ in range(2))
    lengths = torch.zeros(2, dtype=torch.int32, device=device)
    with run_backend("decode_attention", backend):
        for begin, end in [(0, 4), (4, 5), (5, 6), (6, 11)]:
            new = (slice(None), slice(None), slice(begin, end))
            o = bigkern.decode_attention(
                q[new], k_cache, v_cache, lengths, k=k[new], v=v[new], page_table=pages if page_size else None
            )
            torch.testing.assert_close(o, whole[new])  # type: ignore[index]
            lengths += end - begin


def test_opcheck_and_compile() -> None:
    tensors, options = Case(page_size=8, sinks=True).arguments(torch.device("cpu"))
    call = op.bind(*tensors, **options)
    torch.library.opcheck(torch.ops.bigkern.decode_attention.default, call.public())
    torch.compiler.reset()

    @torch.no_grad()
    def f(*tensors: Tensor) -> Any:
        return bigkern.decode_attention(*tensors, **options)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), f(*tensors))


Q, CACHE = torch.zeros(2, 4, 1, 8), torch.zeros(2, 2, 10, 8)
LENGTHS = torch.tensor([3, 10], dtype=torch.int32)
TABLE = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)
NEW = torch.zeros(2, 2, 1, 8)
WRONG: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("q", ValueError, {"q": Q[0]}),
    ("k_cache", TypeError, {"k_cache": CACHE.half()}),
    ("k_cache", ValueError, {"k_cache": CACHE[:1], "v_cache": CACHE[:1]}),
    ("k_cache", ValueError, {"k_cache": CACHE[..., :4]}),
    ("v_cache", ValueError, {"v_cache": CACHE[:, :, :9]}),
    ("q's head count", ValueError, {"q": torch.zeros(2, 3, 1, 8)}),
    ("cache_seqlens", TypeError, {"cache_seqlens": LENGTHS.long()}),
    ("cache_seqlens", ValueError, {"cache_seqlens": LENGTHS[:1]}),
    ("cache_seqlens", ValueError, {"cache_seqlens": LENGTHS + 1}),
    ("cache_seqlens", ValueError, {"cache_seqlens": LENGTHS - 4}),
    ("cache_seqlens", ValueError, {"k": NEW, "v": NEW}),  # no room for the eleventh
    ("v", ValueError, {"k": NEW}),
    ("k", ValueError, {"v": NEW}),
    ("k", ValueError, {"k": NEW[:1], "v": NEW}),
    ("v", TypeError, {"k": NEW, "v": NEW.half()}),
    ("page_table", TypeError, {"page_table": TABLE.long()}),
    ("page_table", ValueError, {"page_table": TABLE[:1]}),
    ("page_table", ValueError, {"page_table": TABLE + 1}),
    ("page_table", ValueError, {"page_table": TABLE - 1}),
    ("causal", ValueError, {"causal": "top_left"}),
    ("window", ValueError, {"window": (-2, 0)}),
    ("softcap", ValueError, {"softcap": float("nan")}),
    ("sinks", ValueError, {"sinks": torch.zeros(2)}),
]


@pytest.mark.parametrize(("name", "error", "change"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_arguments_are_named(name: str, error: type[Exception], change: dict[str, Any]) -> None:
    call = {"q": Q, "k_cache": CACHE, "v_cache": CACHE, "cache_seqlens": LENGTHS, **change}
    before = CACHE.clone()
    with pytest.raises(error, match=rf"^{name}\b"):
        bigkern.decode_attention(**call)
    assert torch.equal(CACHE, before)


def test_there_is_no_backward() -> None:
    with pytest.raises(RuntimeError, match="no backward"):
        bigkern.decode_attention(Q.clone().requires_grad_(), CACHE, CACHE, LENGTHS)
