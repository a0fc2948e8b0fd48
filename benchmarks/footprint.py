"""What a task needs besides time: memory, and the processor."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from bigkern.core.timing import Task


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
