"""Decoding from a cache beyond test_parity.py: its specification, appending, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import BACKENDS, device_of, run_backend
from torch import Tensor

import bigkern
from bigkern.ops.attention.decode_call import bind
from bigkern.ops.attention.decode_problems import form

EVERY = pytest.mark.parametrize("backend", BACKENDS)


@EVERY
def test_the_specification_is_attention_of_each_sequence(backend: str) -> None:
    problem = form((33, 5, 0), queries=2, sinks=True, window=(7, 0), lse=False)
    tensors, options = problem.arguments(problem.make(torch.float32, device_of(backend)))
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
    problem = form(page_size=8, sinks=True, lse=False)
    tensors, options = problem.arguments(problem.make(torch.float32, torch.device("cpu")))
    call = bind(*tensors, **options)
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
