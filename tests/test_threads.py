"""The CPU kernels on torch's thread pool: the same numbers whatever the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import bigkern
from bigkern.ops.adam import adam


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def gradients(output: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [output.detach(), *torch.autograd.grad(output, inputs, torch.ones_like(output))]


def run_attention() -> list[Tensor]:
    q = torch.randn(2, 4, 130, 32, requires_grad=True)
    k = torch.randn(2, 2, 150, 32, requires_grad=True)
    return gradients(bigkern.attention(q, k, k, causal="bottom_right"), q, k)


def run_norm() -> list[Tensor]:
    x = torch.randn(333, 129, requires_grad=True)
    w = torch.randn(129, requires_grad=True)
    return gradients(bigkern.layer_norm(x, (129,), w, w), x, w)


def run_layernorm_ffn() -> list[Tensor]:
    x, w1, b1 = torch.randn(700, 48), torch.randn(200, 48), torch.randn(200)
    w2, b2 = torch.randn(48, 200), torch.randn(48)
    inputs = [t.requires_grad_() for t in (x, w1, b1, w2, b2)]
    return gradients(bigkern.layernorm_ffn(*inputs), *inputs)


def run_adam() -> list[Tensor]:
    sizes = (1, 70_001, 13, 5)
    params, grads, m, v = ([torch.rand(n) for n in sizes] for _ in range(4))
    adam(params, grads, m, v, [], [torch.zeros(()) for _ in sizes])
    return [*params, *m, *v]


@pytest.mark.parametrize("run", [run_attention, run_norm, run_layernorm_ffn, run_adam])
@pytest.mark.parametrize("threads", [2, 5])
def test_thread_count_does_not_matter(run: Callable[[], list[Tensor]], threads: int) -> None:
    results = []
    for count in (1, threads):
        torch.set_num_threads(count)
        torch.manual_seed(0)
        with bigkern.use("cpu"):
            results.append(run())
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-5)
