"""Timing tasks that take turns, and counting the memory they need.

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
from torch import Tensor


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


def take_turns(tasks: Sequence[Task], clock: Clock, budget: float, most: int = 200) -> list[list[float]]:
    """Seconds of each task by round: 5 rounds (3 of slow tasks) to ``most``, in about ``budget`` seconds."""
    slow = False
    for task in tasks:  # warm-up: kernels are compiled, memory is touched
        clock.seconds(task)
        slow = clock.seconds(task) > 1.0 or slow
    least = 3 if slow else 5
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


def peak_memory_mb(task: Task, device: torch.device) -> float:
    """What a call allocates on the GPU at its peak, above what was there before; nan on a CPU."""
    if device.type != "cuda":
        return math.nan
    with task.within():
        state = task.setup()
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        task.run(state)
        torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def processor_ms(task: Task, device: torch.device, rounds: int = 5) -> float:
    """Processor time of a call: of all threads together on a CPU; of the host alone, on a GPU, which it does
    not wait for."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    taken = []
    for _ in range(rounds):
        with task.within():
            state = task.setup()
            began = clock()
            task.run(state)
            taken.append(clock() - began)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    return 1e3 * statistics.median(taken) / task.calls


def saved_mb(task: Task, parameters: Sequence[Tensor]) -> float:
    """What a forward keeps for its backward besides the parameters: each block of memory counted once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with task.within(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        state = task.setup()  # held: nothing is freed and counted again
    for parameter in parameters:
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    del state
    return sum(kept.values()) / 2**20
