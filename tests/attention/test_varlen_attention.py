"""Packed and nested sequences: what the public function adds to the op, whose cases are in test_attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import BACKENDS, device_of, run_backend
from torch import Tensor

import bigkern

EVERY = pytest.mark.parametrize("backend", BACKENDS)


def ends(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@EVERY
def test_each_sequence_alone(backend: str) -> None:
    """The same as one call a sequence, whatever max_seqlen says beyond the truth."""
    device = device_of(backend)
    lengths = [(4, 9), (0, 3), (20, 20), (7, 0)]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int().to(device) for n in zip(*lengths, strict=True))
    q, k = torch.randn(31, 4, 16, device=device), torch.randn(32, 2, 16, device=device)
    with run_backend("attention", backend):
        o, lse = bigkern.varlen_attention(q, k, k, cu_q, cu_k, 64, 40, causal="bottom_right", return_lse=True)
        assert o.shape == (31, 4, 16)
        assert lse.shape == (4, 31)
        for i in range(len(lengths)):
            rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
            alone = bigkern.attention(
                *(x.transpose(0, 1).unsqueeze(0) for x in (q[rows], k[keys], k[keys])),
                causal="bottom_right",
                return_lse=True,
            )
            torch.testing.assert_close(o[rows].transpose(0, 1), alone[0][0])
            torch.testing.assert_close(lse[:, rows], alone[1][0])


@EVERY
def test_nested(backend: str) -> None:
    device = device_of(backend)

    def nested(H: int, *lengths: int) -> Tensor:
        parts = [torch.randn(n, H, 8, device=device) for n in lengths]
        return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)

    q, k = nested(4, 3, 7, 1), nested(2, 5, 6, 2)
    with run_backend("attention", backend):
        o = bigkern.varlen_attention(q, k, k)
        assert isinstance(o, Tensor)
        assert o.is_nested
        o.values().sum().backward()  # type: ignore[attr-defined]
        for mine, x, y in zip(o.unbind(), q.unbind(), k.unbind(), strict=True):
            alone = bigkern.attention(*(t.transpose(0, 1).unsqueeze(0) for t in (x, y, y)))
            torch.testing.assert_close(mine, alone[0].transpose(0, 1))
    assert q.grad is not None
    assert q.grad.is_nested


def test_scaled_dot_product_attention_of_nested_tensors() -> None:
    parts = [torch.randn(n, 4, 16) for n in (3, 7, 1)]
    q = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)  # [B, H, j, D]
    mine = bigkern.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert mine.shape == q.shape
    for o, part in zip(mine.transpose(1, 2).unbind(), parts, strict=True):
        x = part.transpose(0, 1)
        torch.testing.assert_close(o, F.scaled_dot_product_attention(x, x, x, is_causal=True).transpose(0, 1))


def test_compile() -> None:
    torch.compiler.reset()
    q = torch.randn(7, 2, 8)
    cu = ends(0, 3, 7)

    def f(q: Tensor) -> Any:
        return bigkern.varlen_attention(q, q, q, cu, cu, 4, 4, causal=True)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q), f(q))


Q = torch.zeros(7, 4, 8)
WRONG: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("q", ValueError, {"q": torch.zeros(1, 7, 4, 8)}),
    ("k", TypeError, {"k": None}),
    ("cu_seqlens_q", TypeError, {"cu_seqlens_q": None}),
    ("cu_seqlens_k", TypeError, {"cu_seqlens_k": None}),
    ("cu_seqlens_q", TypeError, {"cu_seqlens_q": torch.tensor([0, 7])}),
    ("cu_seqlens_q", ValueError, {"cu_seqlens_q": ends(0, 7).view(1, 2)}),
    ("cu_seqlens_q", ValueError, {"cu_seqlens_q": ends(0, 7).to("meta")}),
    ("cu_seqlens_q", ValueError, {"cu_seqlens_q": ends(0, 5, 3, 7)}),  # falls
    ("cu_seqlens_q", ValueError, {"cu_seqlens_q": ends(0, 3, 8)}),  # overruns
    ("cu_seqlens_q", ValueError, {"cu_seqlens_q": ends(0, 3, 6)}),  # forgets a row
    ("cu_seqlens_k", ValueError, {"cu_seqlens_k": ends(1, 3, 7)}),
    ("cu_seqlens_k", ValueError, {"cu_seqlens_k": ends(0, 7)}),  # one sequence fewer than cu_seqlens_q
    ("max_seqlen_q", ValueError, {"max_seqlen_q": 3}),
    ("max_seqlen_k", ValueError, {"max_seqlen_k": 1}),
    ("window", ValueError, {"window": (None, -3)}),
    ("alibi_slopes", ValueError, {"alibi_slopes": torch.ones(3, 4)}),
]


@pytest.mark.parametrize(("name", "error", "change"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_arguments_are_named(name: str, error: type[Exception], change: dict[str, Any]) -> None:
    cu = ends(0, 3, 7)
    call = {"q": Q, "k": Q, "v": Q, "cu_seqlens_q": cu, "cu_seqlens_k": cu, **change}
    with pytest.raises(error, match=rf"^{name}\b"):
        bigkern.varlen_attention(**call)


def test_masks_have_no_packed_form() -> None:
    cu = ends(0, 3, 7)
    with pytest.raises(ValueError, match="mask cannot be given for packed"):
        bigkern.explain("attention", Q, Q, Q, cu, cu, mask=torch.ones(7, 7, dtype=torch.bool))
    mixed = torch.nested.nested_tensor([Q], layout=torch.jagged)
    with pytest.raises(TypeError, match="k must be a nested Tensor"):
        bigkern.varlen_attention(mixed, Q, Q)
