"""Merging partial attention by log-sum-exp, forward and backward."""

from __future__ import annotations

import pytest
import torch
from parity import BACKENDS, device_of, run_backend
from torch import Tensor

import bigkern


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_are_the_whole(dtype: torch.dtype, backend: str) -> None:
    """Outputs and all gradients, with a part that some rows see nothing of."""
    device = device_of(backend)
    q, k, v = (torch.randn(1, 2, S, 16, device=device, dtype=dtype, requires_grad=True) for S in (9, 30, 30))
    do = torch.randn(1, 2, 9, 16, device=device, dtype=dtype)

    def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for keys in (slice(0, 21), slice(21, 30)):
            causal = "bottom_right" if keys.stop == 30 else False
            parts.append(bigkern.attention(q, k[:, :, keys], v[:, :, keys], causal=causal, return_lse=True))
        return bigkern.merge_attention(*zip(*parts, strict=True))[0]

    with run_backend("attention", backend):
        o = merged(q, k, v)
        grads = torch.autograd.grad(o, (q, k, v), do)
        whole = bigkern.attention(q, k, v, causal="bottom_right")
        right = torch.autograd.grad(whole, (q, k, v), do)
    rounding = 4e-6 if dtype == torch.float32 else 4e-2
    for a, b in zip((o, *grads), (whole, *right), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, atol=rounding, rtol=rounding)


def test_nothing_seen() -> None:
    o, lse = torch.zeros(2, 3, 4), torch.full((2, 3), float("-inf"))
    some, some_lse = torch.ones(2, 3, 4), torch.zeros(2, 3)
    assert torch.equal(bigkern.merge_attention([o, o], [lse, lse])[0], o)
    assert torch.isneginf(bigkern.merge_attention([o], [lse])[1]).all()
    torch.testing.assert_close(bigkern.merge_attention([o, some], [lse, some_lse]), (some, some_lse))


def test_gradcheck() -> None:
    outputs = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    torch.autograd.gradcheck(lambda *x: bigkern.merge_attention(x[:3], x[3:]), (*outputs, *lses))


@pytest.mark.parametrize(
    ("outputs", "lses"),
    [
        ([], []),
        ([torch.zeros(2, 4)], []),
        ([torch.zeros(2, 4)], [torch.zeros(4)]),
        ([torch.zeros(2, 4), torch.zeros(3, 4)], [torch.zeros(2), torch.zeros(3)]),
    ],
)
def test_wrong_arguments_are_named(outputs: list[Tensor], lses: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"lses"):
        bigkern.merge_attention(outputs, lses)
