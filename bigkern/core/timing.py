"""Timing tasks that take turns.

CPU time is ``perf_counter``; GPU time is CUDA events, the L2 cache flushed before each.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Task:
    """What is timed: ``run(setup())``, the time of ``run`` alone, divided by ``calls``; both ``within()``.

    ``state`` says how many MB are kept from one call to the next.
    """

    run: Callable[[Any], Any]
    setup: Callable[[], Any] = lambda: None
    calls: int = 1
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    state: Callable[[], float] = lambda: math.nan


class Clock:
    """Times one call on a device."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            size = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(2 * size, dtype=torch.int8, device=device)

    def seconds(self, task: Task) -> float:
        with task.within():
            return self._seconds(task)

    def _seconds(self, task: Task) -> float:
        state = task.setup()
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            task.run(state)
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3 / task.calls
        began = time.perf_counter()
        task.run(state)
        return (time.perf_counter() - began) / task.calls


def take_turns(
    tasks: Sequence[Task], clock: Clock, budget: float, most: int = 200, least: int = 5
) -> list[list[float]]:
    """Seconds of each task by round: ``least`` rounds (3 if slow) to ``most``, in some ``budget`` seconds."""
    slow = max(warm_up(tasks, clock), default=0.0) > 1.0
    return rounds(tasks, clock, budget, most, 3 if slow else least)


def warm_up(tasks: Sequence[Task], clock: Clock) -> list[float]:
    """Seconds of each task's second call: the first may import, compile, and touch memory."""
    for task in tasks:
        clock.seconds(task)
    return [clock.seconds(task) for task in tasks]


def rounds(tasks: Sequence[Task], clock: Clock, budget: float, most: int, least: int) -> list[list[float]]:
    """Seconds of each task by round, once they are warm."""
    began = time.perf_counter()
    times: list[list[float]] = [[] for _ in tasks]
    for turn in range(most):
        for i in range(len(tasks)):
            who = (i + turn) % len(tasks)
            times[who].append(clock.seconds(tasks[who]))
        if turn + 1 >= least and time.perf_counter() - began > budget:
            break
    return times


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, median, p80."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[-1]
