"""The CPU kernels among threads, forks and signals: the same numbers as alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import bigkern
from bigkern.ops.adam import adam

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _our_kernels() -> Iterator[None]:
    before = torch.get_num_threads()
    with bigkern.use("cpu"):
        yield
    torch.set_num_threads(before)


def drawn(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def attention(normal: Callable[..., Tensor]) -> list[Tensor]:
    q, k = normal(2, 4, 70, 32).requires_grad_(), normal(2, 2, 90, 32).requires_grad_()
    o = bigkern.attention(q, k, k, causal="bottom_right")
    return [o.detach(), *torch.autograd.grad(o.sum(), (q, k))]


def decode(normal: Callable[..., Tensor]) -> list[Tensor]:
    lengths = torch.tensor([300, 17], dtype=torch.int32)
    return [
        bigkern.decode_attention(normal(2, 4, 1, 32), normal(2, 2, 300, 32), normal(2, 2, 300, 32), lengths)
    ]


def feed_forward(normal: Callable[..., Tensor]) -> list[Tensor]:
    x, w1, w2 = (t.requires_grad_() for t in (normal(150, 48), normal(96, 48), normal(48, 96)))
    y = bigkern.layernorm_ffn(x, w1, None, w2, None)
    return [y.detach(), *torch.autograd.grad(y.sum(), (x, w1, w2))]


def linear(normal: Callable[..., Tensor]) -> list[Tensor]:
    x, w = normal(300, 65).requires_grad_(), normal(70, 65).requires_grad_()
    y = bigkern.linear(x, w)
    return [y.detach(), *torch.autograd.grad(y.sum(), (x, w))]


def recurrent(normal: Callable[..., Tensor]) -> list[Tensor]:
    x = normal(12, 3, 20).requires_grad_()
    weights = [0.3 * normal(*shape) for shape in ((96, 20), (96, 32), (96,), (96,))]
    y, hn = bigkern.recurrent(x, None, weights, "GRU")
    return [y.detach(), hn.detach(), *torch.autograd.grad(y.sum(), (x,))]


def update(normal: Callable[..., Tensor]) -> list[Tensor]:
    params, grads, m, v = ([normal(n).square() for n in (70_001, 13)] for _ in range(4))
    adam(params, grads, m, v, [], [torch.zeros(()) for _ in params])
    return [*params, *m, *v]


CALLS = (attention, decode, feed_forward, linear, recurrent, update)


def everything(seed: int) -> list[Tensor]:
    """Of one call after the other."""
    return [result for call in CALLS for result in call(drawn(seed))]


def same(results: list[Tensor], expected: list[Tensor]) -> None:
    for x, right in zip(results, expected, strict=True):
        torch.testing.assert_close(x, right, rtol=1e-4, atol=1e-4)


# ---- threads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(1, 1), (1, 3), (2, 5)])
def test_threads_with_thread_counts_of_their_own_call_at_once(counts: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    expected = [everything(seed) for seed in range(len(counts))]

    def work(seed: int) -> list[list[Tensor]]:
        torch.set_num_threads(counts[seed])
        return [everything(seed) for _ in range(10)]

    with ThreadPoolExecutor(len(counts)) as pool:
        for right, runs in zip(expected, pool.map(work, range(len(counts))), strict=True):
            for results in runs:
                same(results, right)


def test_the_first_calls_of_a_process_may_come_from_many_threads_at_once() -> None:
    program = """
        import threading
        from concurrent.futures import ThreadPoolExecutor
        import bigkern, test_processes
        start = threading.Barrier(6)
        def work(i):
            start.wait()
            return test_processes.CALLS[i](test_processes.drawn(0))
        with bigkern.use("cpu"), ThreadPoolExecutor(6) as pool:
            first = [result for results in pool.map(work, range(6)) for result in results]
            test_processes.same(first, test_processes.everything(0))
    """
    in_a_process(program)


def in_a_process(program: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# ---- forks -------------------------------------------------------------------------------------------


class Forked(Dataset[list[Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, seed: int) -> list[Tensor]:
        return everything(seed)


def test_a_forked_data_loader_calls_what_its_parent_has_called() -> None:
    torch.set_num_threads(2)
    expected = [everything(seed) for seed in range(4)]
    loader = DataLoader(Forked(), None, num_workers=2, multiprocessing_context="fork", timeout=120)
    for results, right in zip(loader, expected, strict=True):
        same(results, right)
    same(everything(0), expected[0])  # and the parent goes on


# ---- signals -----------------------------------------------------------------------------------------


def interrupt(work: Callable[[], object], after: float) -> None:
    """Ctrl-C while ``work`` runs over and over again."""
    timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        while True:
            work()
    except KeyboardInterrupt:
        timer.join()


@pytest.mark.parametrize("what", ["calls", "steps"])
def test_what_comes_after_an_interrupt_is_right(what: str) -> None:
    """In a process of its own: pytest's must not be interrupted."""
    in_a_process(f"""
        import bigkern, test_processes
        with bigkern.use("cpu"):
            test_processes.interrupted_{what}()
    """)


def interrupted_calls() -> None:
    expected = everything(0)
    for i in range(10):
        interrupt(lambda: everything(0), 0.003 * (i + 1))
        same(everything(0), expected)


def interrupted_steps() -> None:
    """Each interrupted step has been done or not: no parameter is ahead of the others."""
    params = [torch.nn.Parameter(torch.ones(n)) for n in (70_000, 7, 300)]
    optimizer = bigkern.optim.AdamW(params, lr=1e-3)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for i in range(10):
        interrupt(optimizer.step, 0.003 * (i + 1))
        assert len({float(optimizer.state[p]["step"]) for p in params}) == 1
        everywhere = torch.cat([p.detach() for p in params])
        assert float(everywhere.max() - everywhere.min()) < 1e-4  # a tenth of a step
    before = float(params[0].detach()[0])
    optimizer.step()
    assert float(params[0].detach()[0]) < before
