"""How the tests hold an op's backends to parity, and how they remember what they saw.

``check(problem, backend, dtype)`` runs a problem and judges it. What is no problem is judged by
``assert_parity``, by the rule of ``bigkern.core.parity``. ``RECORD`` has the verdicts and the features that
passed; at the end of the run conftest writes both down, for ``parity_table.py`` and ``feature_table.py``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

import pytest
import simt_library
import torch
from torch import Tensor

import bigkern
from bigkern.core import info, registry
from bigkern.core.parity import Yardstick
from bigkern.core.problem import Problem, expect, results

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GPU = torch.cuda.is_available()
FUZZ_FROM = int(os.environ.get("BIGKERN_FUZZ_FROM", "0"))  # added to the seeds of all fuzzed cases

TIERS = {
    "cpu": "native CPU",
    "cpu_library": "native CPU",
    "torch": "native CPU" if not GPU else "GPU",
    "triton": "GPU" if GPU else "interpreter",
    "triton_library": "GPU" if GPU else "interpreter",
    "simt": "emulator",
    "cuda": "GPU",
}


def backends() -> list[str]:
    """The backends that this machine can execute, ``simt`` being the CUDA sources in the emulator."""
    here = ["torch"]
    here += ["cpu"] if info.import_error is None else []
    here += ["triton"] if GPU or os.environ.get("TRITON_INTERPRET") == "1" else []
    here += ["cuda"] if GPU and info.has_cuda_kernels() else []
    here += [] if GPU else ["simt"]
    return here


BACKENDS = backends()
KERNEL_BACKENDS = [name for name in BACKENDS if name != "torch"]
# Of some ops: torch's own products, and our passes around them.
LIBRARY_BACKENDS = [f"{name}_library" for name in BACKENDS if name in ("cpu", "triton")]


def device_of(backend: str) -> torch.device:
    return torch.device("cuda" if GPU and backend not in ("cpu", "cpu_library", "simt") else "cpu")


@contextmanager
def run_backend(op: str, backend: str) -> Iterator[None]:
    """Force ``backend`` for ``op``. ``simt`` puts the emulated CUDA kernels in the place of ``cuda``."""
    if backend != "simt":
        with bigkern.use(**{op: backend}):
            yield
        return
    declared = registry.get(op)
    native = declared.backends["cuda"]
    declared.register(simt_library.backend(op))
    try:
        with bigkern.use(**{op: "cuda"}):
            yield
    finally:
        declared.register(native)


class Record:
    """The worst verdict of every (op, backend, dtype, kind) of this run."""

    def __init__(self) -> None:
        self.worst: dict[tuple[str, str, str, str], tuple[float, int]] = {}
        self.features: Counter[tuple[str, str, str]] = Counter()  # cases passed: (op, feature, backend)
        self.mistakes: dict[tuple[str, str, str], str] = {}  # (op, dtype, mistake): how many were found

    def add(self, op: str, backend: str, dtype: str, kind: str, ratio: float) -> None:
        if backend == "torch":  # no kernel of ours
            return
        key = (op, backend, dtype, kind)
        before, cases = self.worst.get(key, (0.0, 0))
        self.worst[key] = (max(before, ratio), cases + 1)

    def passed(self, op: str, backend: str, features: Iterable[str]) -> None:
        """A whole case has passed that used these features."""
        self.features.update((op, feature, backend) for feature in features)

    def planted(self, op: str, dtype: str, mistake: str, found: str) -> None:
        """The parity rule has caught a mistake that was planted."""
        self.mistakes[op, dtype, mistake] = found


RECORD = Record()


def check(problem: Problem, backend: str, dtype: torch.dtype, seed: int = 0) -> None:
    """Hold a backend to the parity rule on one problem: every output and every gradient."""
    inputs = problem.make(dtype, device_of(backend), seed)
    poisoned_empty_memory()
    with run_backend(problem.op, backend):
        ours = results(problem.ours, inputs, problem.outputs)
    yardstick = _expected(problem, dtype, device_of(backend), seed)
    assert_parity(problem.op, backend, ours, yardstick, f"{problem.label}, seed {seed}:")
    kind = (str(dtype).removeprefix("torch."),) if problem.features else ()
    RECORD.passed(problem.op, backend, problem.features + kind)


_expected = lru_cache(maxsize=4)(expect)  # the next backend asks for the same


def assert_parity(
    op: str, backend: str, ours: Mapping[str, Tensor], yardstick: Yardstick, case: object = ""
) -> None:
    """Fail unless every result is as right as the parity rule asks; remember the ratios either way."""
    assert ours.keys() == yardstick.exact.keys(), f"{op} on {backend}: {list(ours)}, {list(yardstick.exact)}"
    for name, tensor in ours.items():
        verdict = yardstick.judge(name, tensor)
        dtype = str(tensor.dtype).removeprefix("torch.")
        RECORD.add(op, backend, dtype, "gradient" if name.startswith("d") else "forward", verdict.ratio)
        if not verdict.passed:
            where = f"{op} on {backend}, {case} {name} {tuple(tensor.shape)} {dtype}"
            pytest.fail(f"{where}: {verdict.problem}", pytrace=True)


def poisoned_empty_memory(megabytes: int = 64) -> None:
    """Fill torch's and malloc's free memory with NaN, so that an output nobody wrote shows up as NaN."""
    blocks = [torch.full((1 << n,), float("nan")) for n in range(4, 18) for _ in range(4)]
    if GPU:
        torch.full((megabytes << 18,), float("nan"), device="cuda")
    del blocks
