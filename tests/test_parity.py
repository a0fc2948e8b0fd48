"""Every op on every backend against float64, by its problems: each form of the call, and calls at random."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from parity import DTYPES, FUZZ_FROM, GPU, KERNEL_BACKENDS, LIBRARY_BACKENDS, check, run_backend

from bigkern.core.problem import Problem, results, widened
from bigkern.ops import problems

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of saturated gates, in numpy
FORMS = [problem for op in problems.OPS for problem in problems.forms(op)]


def emulated(backend: str) -> bool:
    """Whether a backend takes a second where kernels take a millisecond."""
    return backend == "simt" or (backend.startswith("triton") and not GPU)


def runs(problem: Problem, backend: str) -> bool:
    """Whether there is a kernel to be judged: what torch computes is no result of ours."""
    kernel = "cuda" if backend == "simt" else backend
    return kernel in problem.kernels and (problem.emulated or not emulated(backend))


# ---- every form ------------------------------------------------------------------------------------

CASES = [
    pytest.param(problem, dtype, backend, id=f"{problem.op} {problem.label}-{dtype}-{backend}")
    for number, problem in enumerate(FORMS)
    for dtype in DTYPES
    for backend in KERNEL_BACKENDS + LIBRARY_BACKENDS
    if runs(problem, backend)
    if number % 5 == 0 or backend != "triton_library"  # whose passes are judged alone, too
]


@pytest.mark.parametrize(("problem", "dtype", "backend"), CASES)
def test_parity(problem: Problem, dtype: torch.dtype, backend: str) -> None:
    check(problem, backend, dtype)


WIDE = [problem for problem in FORMS if problem.op != "adam"]  # whose moments are stored in fewer bits


@pytest.mark.parametrize("problem", WIDE, ids=lambda problem: f"{problem.op} {problem.label}")
def test_all_spellings_agree_in_float64(problem: Problem) -> None:
    """Stock, the specification and the candidate torch are one function: else the rule measures nothing."""
    inputs = widened(problem.make(torch.float32, torch.device("cpu")))
    stock = results(problem.stock, inputs, problem.outputs)
    with run_backend(problem.op, "torch"):
        torch.testing.assert_close(results(problem.ours, inputs, problem.outputs), stock)
    if problem.specification is not None:
        torch.testing.assert_close(results(problem.specification, inputs, problem.outputs), stock)


# ---- calls at random -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fuzz:
    """How many seeds on each backend, and the largest size where kernels run and where they are emulated."""

    cpu: int
    cuda: int
    triton: int
    simt: int
    largest: int
    emulated: int
    cpu_library: int = 0
    triton_library: int = 0

    def sizes(self, backend: str) -> int:
        return self.emulated if emulated(backend) else self.largest


FUZZED = {
    "attention": Fuzz(cpu=1400, cuda=60, triton=24, simt=30, largest=300, emulated=40),
    "decode_attention": Fuzz(cpu=200, cuda=200, triton=10, simt=20, largest=600, emulated=40),
    "linear": Fuzz(cpu=40, cuda=0, triton=0, simt=0, largest=300, emulated=40),
    "layernorm_ffn": Fuzz(
        cpu=400, cuda=100, triton=20, simt=30, largest=200, emulated=40, cpu_library=100, triton_library=6
    ),
    "frozen_layernorm_ffn": Fuzz(
        cpu=200, cuda=0, triton=16, simt=0, largest=800, emulated=64, cpu_library=50
    ),
    "recurrent": Fuzz(cpu=300, cuda=60, triton=4, simt=4, largest=72, emulated=9, cpu_library=100),
    "norm": Fuzz(cpu=40, cuda=40, triton=4, simt=4, largest=100, emulated=10),
}
SEEDS = [
    (op, backend, seed)
    for op, fuzz in FUZZED.items()
    for backend in KERNEL_BACKENDS + LIBRARY_BACKENDS
    for seed in range(getattr(fuzz, backend))
]


@pytest.mark.parametrize(("op", "backend", "seed"), SEEDS)
def test_fuzz(op: str, backend: str, seed: int) -> None:
    fuzz(op, backend, seed + FUZZ_FROM)


def fuzz(op: str, backend: str, seed: int) -> None:
    """A call at random; where it fails it prints the line that repeats it."""
    draw = random.Random(seed)
    try:
        of_this_size = partial(problems.drawn, op, draw, FUZZED[op].sizes(backend))
        problem = next(p for p in iter(of_this_size, None) if runs(p, backend))
        check(problem, backend, draw.choice(DTYPES), seed)
    except BaseException:
        print(f"to repeat, in tests: from test_parity import fuzz; fuzz({op!r}, {backend!r}, {seed})")
        raise
