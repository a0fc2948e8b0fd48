"""What a processor is, as far as proofs and measurements depend on it."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch

from bigkern.core import info


def is_gpu(device: torch.device) -> bool:
    """Whether kernels there have to be proven first: a CPU's are, by the tests, wherever they were built."""
    return device.type == "cuda"


@lru_cache
def cpu_fingerprint() -> str:
    """``amd-25-17-avx512bf16``: vendor, family and model, and the instruction set of our kernels."""
    found: dict[str, str] = {}
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    vendor, *model = (found.get(name, "") for name in ("vendor_id", "cpu family", "model"))
    vendor = vendor.removeprefix("Authentic").removeprefix("Genuine")
    known = [vendor, *model] if all(model) else [platform.machine(), platform.processor()]
    return _slug(" ".join([*known, info.isa()]))


@lru_cache
def gpu_fingerprint(index: int) -> str:
    """``nvidia-h200-sm90-132-227k``: name, architecture, multiprocessors, shared memory that a block can ask
    for. The architecture is AMD's own name there, as numbers alone would be NVIDIA's."""
    gpu = torch.cuda.get_device_properties(index)
    arch = f"sm{gpu.major}{gpu.minor}" if torch.version.hip is None else gpu.gcnArchName
    shared = getattr(gpu, "shared_memory_per_block_optin", 0) >> 10
    return _slug(f"{gpu.name} {arch} {gpu.multi_processor_count} {shared}k")


def gpu_software() -> str:
    """``torch 2.13.0, driver 13.0``: what compiles and loads kernels there, but for Triton."""
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    return f"torch {torch.__version__}, driver {driver // 1000}.{driver % 1000 // 10}"


def _slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def cache() -> Path:
    """The user's folder for what was proven and measured here."""
    root = os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~"), ".cache")
    return Path(root) / "bigkern"
