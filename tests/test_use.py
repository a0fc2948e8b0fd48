"""Whose choice a block of ``use`` is: that of the thread or asyncio task that enters it, while it lasts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import bigkern
from bigkern.core import registry


def chosen() -> str:
    q = torch.zeros(1, 1, 4, 8)
    return bigkern.explain("attention", q, q, q).chosen


@pytest.fixture(autouse=True)
def _nothing_left_in_force() -> Iterator[None]:
    assert not registry.forced()
    yield
    assert not registry.forced()


def overlap(first_leaves_first: bool) -> dict[str, str]:
    """Two threads whose blocks overlap; what each finds inside its own, and the first found before."""
    found: dict[str, str] = {}
    inside, entered, may_leave, left = (threading.Event() for _ in range(4))

    def first() -> None:
        with bigkern.use("torch"):
            inside.set()
            entered.wait(10)
            found["first"] = chosen()
            if not first_leaves_first:
                left.wait(10)
        found["first, after"] = chosen()
        may_leave.set()

    def second() -> None:
        inside.wait(10)
        with bigkern.use("cpu"):
            entered.set()
            if first_leaves_first:
                may_leave.wait(10)
            found["second"] = chosen()
        found["second, after"] = chosen()
        left.set()

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


@pytest.mark.parametrize("first_leaves_first", [True, False])
def test_threads_whose_blocks_overlap_do_not_meet(first_leaves_first: bool) -> None:
    default = chosen()
    found = overlap(first_leaves_first)
    assert found == {"first": "torch", "second": "cpu", "first, after": default, "second, after": default}
    assert chosen() == default


def test_asyncio_tasks_whose_blocks_overlap_do_not_meet() -> None:
    async def force(backend: str, turns: int) -> None:
        with bigkern.use(backend):
            for _ in range(turns):
                await asyncio.sleep(0)
                assert chosen() == backend
        assert not registry.forced()

    async def together() -> None:
        await asyncio.gather(force("torch", 1), force("cpu", 5), force("torch", 3))

    asyncio.run(together())


def test_a_task_started_in_a_block_is_forced_until_the_block_ends() -> None:
    async def started(inside: asyncio.Event, after: asyncio.Event) -> list[bool]:
        found = [registry.forced()]
        inside.set()
        await after.wait()
        return [*found, registry.forced()]

    async def parent() -> list[bool]:
        inside, after = asyncio.Event(), asyncio.Event()
        with bigkern.use("torch"):
            task = asyncio.create_task(started(inside, after))
            await inside.wait()
        after.set()
        return await task

    assert asyncio.run(parent()) == [True, False]


def test_a_generator_that_is_closed_late_takes_back_its_own_choice_alone() -> None:
    def forcing() -> Iterator[None]:
        with bigkern.use(norm="torch"):
            yield

    generator = forcing()
    next(generator)
    with bigkern.use("cpu"):
        generator.close()
        assert chosen() == "cpu"


def test_a_generator_that_another_thread_closes_is_over_here_too() -> None:
    def forcing() -> Iterator[None]:
        with bigkern.use("torch"):
            yield

    generator = forcing()
    next(generator)
    assert registry.forced()
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join(10)
    assert not registry.forced()


def test_an_exception_ends_the_block() -> None:
    with bigkern.use("torch"):
        with pytest.raises(ZeroDivisionError), bigkern.use("cpu"):
            raise ZeroDivisionError
        assert chosen() == "torch"


def in_a_thread(run: Callable[[], Any]) -> None:
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            run()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join(60)
    assert not failures, failures[0]


def test_an_eager_backward_in_another_thread_runs_on_its_forwards_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(300, 64, requires_grad=True)
    with bigkern.use("cpu"):
        y = bigkern.rms_norm(x, 64)
    monkeypatch.setattr(registry.Op, "resolve", lambda *_: pytest.fail("a backend was chosen again"))
    in_a_thread(lambda: y.sum().backward())
    assert x.grad is not None


class _Reentrant(torch.autograd.Function):
    """A backward within a backward, ``depth`` times: torch runs those beyond sixty in threads of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, found: list[tuple[int, bool]]) -> Tensor:  # type: ignore[override]
        ctx.depth, ctx.found = depth, found
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        if ctx.depth == 0:
            ctx.found.append((threading.get_ident(), registry.forced()))
        else:
            with torch.enable_grad():
                inner = torch.ones((), requires_grad=True)
                _Reentrant.apply(inner, ctx.depth - 1, ctx.found).backward()
        return dy, None, None


def test_autograds_own_threads_take_the_choice_of_the_thread_that_called_backward() -> None:
    found: list[tuple[int, bool]] = []

    def backward() -> None:
        _Reentrant.apply(torch.ones((), requires_grad=True), 70, found).backward()

    with bigkern.use("torch"):
        backward()
    backward()
    threads, forced = zip(*found, strict=True)
    assert threading.get_ident() not in threads
    assert forced == (True, False)


def test_a_compiled_graph_notices_whose_choice_is_in_force() -> None:
    q = torch.randn(1, 2, 16, 8)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _example: Any) -> Any:
        graphs.append(graph.print_readable(print_output=False))
        return graph

    compiled = torch.compile(
        lambda q: bigkern.attention(q, q, q, causal=True), fullgraph=True, backend=backend
    )
    with bigkern.use("torch"):
        compiled(q)
        in_a_thread(lambda: compiled(q))
        compiled(q)
    compiled(q)
    assert ["scaled_dot_product_attention" in graph for graph in graphs] == [True, False]


def test_use_inside_a_compiled_function() -> None:
    q = torch.randn(1, 2, 16, 8)

    def forced(q: Tensor) -> Any:
        with bigkern.use("torch"):
            return bigkern.attention(q, q, q)

    torch.testing.assert_close(torch.compile(forced, fullgraph=True, backend="eager")(q), forced(q))
