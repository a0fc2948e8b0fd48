"""What every launch in this folder needs: the architecture that picks a configuration, and grid sizes."""

from __future__ import annotations

from functools import cache

import torch
import triton

OPTIONS = {"enable_fp_fusion": True}  # Triton 3.10 turns a * b + c into one instruction only where asked


def architecture(device: torch.device) -> int:
    """90 on an H100 or H200; 80 elsewhere: its configurations fit into any GPU's 99 KiB of shared memory."""
    return _architecture(device.index) if device.type == "cuda" else 80


@cache
def _architecture(index: int | None) -> int:
    return 90 if torch.cuda.get_device_capability(index) == (9, 0) else 80


def multiprocessors(device: torch.device) -> int:
    """How many blocks run at once on the device; a few under the interpreter, which runs one at a time."""
    return _multiprocessors(device.index) if device.type == "cuda" else 4


@cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def padded(size: int, least: int = 16) -> int:
    """The power of two that a tile of ``size`` columns takes."""
    return max(least, triton.next_power_of_2(size))
