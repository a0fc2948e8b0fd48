"""How every benchmark here is measured.

1. Parity first: a wrong result gets no time (``bigkern.core.parity``). A contestant that refuses a case, or
   that disagrees with bigkern at the size that is timed, gets a row that says so, and no time.
2. Contestants take turns in one process, in an order that rotates, on the same inputs. Medians with p20
   and p80; speed-ups are medians of the ratios within a round, so that a slow moment cancels.
3. A contestant's name says what it is, the column ``backend`` what it really ran on.
4. Rates are shares of what this machine showed minutes ago: a large copy, a large matrix product.
"""

from __future__ import annotations

import math
import subprocess
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigkern.benchmarks.breakdown import Breakdown
from bigkern.benchmarks.footprint import peak_memory_mb, processor_ms, saved_mb
from bigkern.benchmarks.table import Row
from bigkern.core import info, wisdom
from bigkern.core.parity import Verdict
from bigkern.core.problem import Inputs, Problem, judge, results
from bigkern.core.timing import Clock, Task, spread, take_turns
from bigkern.terminal.console import Console, machine

BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


class LeftOut(Exception):
    """A contestant takes no part in a case, for the reason that the message gives."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """``tasks(inputs)`` gives a task for each mode, none at all if it is another one over again.

    ``backend(inputs)`` names what runs it; ``results(inputs)`` are its outputs and, if gradients are enabled,
    its gradients, to be compared.
    """

    name: str
    tasks: Callable[[Inputs], dict[str, Task]]
    backend: Callable[[Inputs], str] = lambda inputs: ""
    results: Callable[[Inputs], dict[str, Tensor]] | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """A problem, who competes on it (bigkern, stock, others), and the smaller one that parity is judged on.

    ``group`` is its line in the summary. A case of a sweep stands at ``x`` in the figure's ``panel``, and may
    do with a part of the ``budget``.
    What is more than a call of one op brings its own ``judge``; ``observe`` may see more of a task than time.
    """

    problem: Problem
    contestants: list[Contestant]
    gate: Problem | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    group: str = ""
    panel: str = ""
    x: float = math.nan
    budget: float = 1.0
    judge: Callable[[torch.dtype, torch.device], dict[str, Verdict]] | None = None
    observe: Callable[[Row, Task], Row] = lambda row, task: row


# ---- contestants -----------------------------------------------------------------------------------


def by_autograd(
    name: str,
    call: Callable[[Inputs], Any],
    backend: Callable[[Inputs], str] | str,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Contestant:
    """A function of the inputs: forward without a graph, and if they want gradients backward and both."""

    def tasks(inputs: Inputs) -> dict[str, Task]:
        wanted = [value for value in inputs.values() if value.requires_grad]
        plain = _without_graph(inputs)

        def forward(_: Any) -> Any:
            with torch.no_grad():
                return call(plain)

        if not wanted:
            return {"forward": Task(forward, within=within)}
        with within():
            upstream = torch.randn_like(forward(None))

        def backward(output: Tensor) -> Any:
            return torch.autograd.grad(output, wanted, upstream)

        return {
            "forward": Task(forward, within=within),
            "backward": Task(backward, setup=lambda: call(inputs), within=within),
            "both": Task(lambda _: backward(call(inputs)), within=within),
        }

    def compared(inputs: Inputs) -> dict[str, Tensor]:
        with within():
            return results(call, inputs if torch.is_grad_enabled() else _without_graph(inputs))

    words = backend
    return Contestant(name, tasks, (lambda inputs: words) if isinstance(words, str) else words, compared)


def _without_graph(inputs: Inputs) -> Inputs:
    """Some ask whether their tensors require gradients, and not whether gradients are enabled."""
    return {name: value.detach() for name, value in inputs.items()}


def ours(problem: Problem) -> Contestant:
    return by_autograd("bigkern", problem.ours, lambda inputs: problem.explain(inputs).chosen)


@cache
def compiler_works(device_type: str) -> bool:
    """Whether torch.compile can compile a small function here."""
    try:
        torch.compile(lambda x: torch.nn.functional.gelu(x) + 1)(torch.ones(64, device=device_type))
    except Exception:  # it fails in as many ways as there are missing compilers
        return False
    return True


def compiled(problem: Problem, device: torch.device, autotuned: bool = False) -> list[Contestant]:
    """torch.compile of the stock call, where it works; on request also in its mode max-autotune."""
    if not compiler_works(device.type):
        return []
    modes = {"compile": "default"} | ({"compile-max": "max-autotune-no-cudagraphs"} if autotuned else {})
    return [
        by_autograd(name, torch.compile(problem.stock, dynamic=False, mode=mode), "inductor")
        for name, mode in modes.items()
    ]


# ---- the machine -----------------------------------------------------------------------------------


@dataclass
class Bench:
    """Where and how thoroughly to measure; remembers the machine's measured peaks, and where time went."""

    device: torch.device
    quick: bool
    console: Console
    peaks: dict[str, float] = field(default_factory=dict)
    compile_all: bool = False  # also what takes the compiler minutes
    breakdowns: list[Breakdown] = field(default_factory=list)

    @property
    def budget(self) -> float:
        """Seconds a case, dtype and mode."""
        if self.quick:
            return 0.5
        return 1.0 if self.device.type == "cuda" else 3.0

    def copy_rate(self) -> float:
        """GB/s of a copy much larger than the caches, read and write counted."""
        if "copy" not in self.peaks:
            source = torch.ones((1 << 30 if self.device.type == "cuda" else 1 << 27) // 4, device=self.device)
            target = torch.empty_like(source)
            seconds = self._best(lambda _: target.copy_(source))
            self.peaks["copy"] = 2 * source.numel() * 4 / seconds / 1e9
        return self.peaks["copy"]

    def product_rate(self, dtype: torch.dtype) -> float:
        """TFLOP/s of a large square matrix product of random numbers."""
        name = str(dtype).removeprefix("torch.")
        if name not in self.peaks:
            n = 8192 if self.device.type == "cuda" else 1024
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            self.peaks[name] = 2 * n**3 / self._best(lambda _: a @ b) / 1e12
        return self.peaks[name]

    def _best(self, run: Callable[[Any], Any]) -> float:
        clock = Clock(self.device)
        return min(clock.seconds(Task(run)) for _ in range(10))

    def name(self) -> str:
        """The machine as a folder name, the same as its wisdom's file."""
        return wisdom.name(wisdom.machine(self.device))


@cache
def commit() -> str:
    """The checkout's commit, with a plus if files differ from it; nothing for an installed package."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if git("ls-files", "--", Path(__file__).name) == "":
            return ""
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


# ---- measuring -------------------------------------------------------------------------------------


Starters = list[tuple[Contestant, dict[str, Task]]]


def measure(case: Case, dtype: torch.dtype, bench: Bench) -> list[Row]:
    """Gate, then time everyone on one case in one dtype."""
    inputs = case.problem.make(dtype, bench.device)
    line = partial(_row, case, inputs, dtype, bench)
    bigkern = case.contestants[0]
    wrong = gate(case, dtype, bench.device)
    if wrong:
        return [line(bigkern, wrong=wrong)]
    starters, absent = _starters(case, inputs)
    if any(contestant is bigkern for contestant, _, _ in absent):
        return [line(bigkern, wrong=next(why for contestant, _, why in absent if contestant is bigkern))]
    clock = Clock(bench.device)
    rows = []
    for mode in starters[0][1]:
        here = [(contestant, tasks[mode]) for contestant, tasks in starters if mode in tasks]
        times = take_turns([task for _, task in here], clock, case.budget * bench.budget)
        for (contestant, task), seconds in zip(here, times, strict=True):
            parameters = [inputs[name] for name in case.problem.parameters]
            counted = {
                "peak_mb": peak_memory_mb(task, bench.device),
                "saved_mb": saved_mb(task, parameters) if mode == "backward" else math.nan,
                "processor_ms": processor_ms(task, bench.device) if mode == "step" else math.nan,
                "state_mb": task.state(),
            }
            rows.append(case.observe(line(contestant, mode, seconds, times[0], counted), task))
    return rows + [line(contestant, mode, wrong=why) for contestant, mode, why in absent]


def _starters(case: Case, inputs: Inputs) -> tuple[Starters, list[tuple[Contestant, str, str]]]:
    """Who takes part, bigkern first, and who does not: in which mode, and why.

    Everyone's results are held against bigkern's on the very inputs that are timed. If it is stock, the
    second contestant, that disagrees, bigkern is the one who does not take part.
    """
    bigkern = case.contestants[0]
    starters: Starters = [(bigkern, bigkern.tasks(inputs))]
    absent = []
    ours = bigkern.results(inputs) if bigkern.results else {}
    for contestant in case.contestants[1:]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own, each time one of its backends refuses
                tasks = contestant.tasks(inputs)
                theirs, refusal = _results(contestant, inputs) if tasks else ({}, "")
        except Exception as error:  # other people's code: whatever it says is why it is not here
            absent.append((contestant, "", _first_line(error)))
            continue
        differences = disagreement(ours, theirs)
        if differences and contestant is case.contestants[1]:
            return starters, [(bigkern, "", f"disagrees with {contestant.name}: {differences}")]
        if differences:
            absent.append((contestant, "", f"disagrees with bigkern: {differences}"))
        elif refusal:
            absent.append((contestant, "backward", refusal))
            starters.append((contestant, {"forward": tasks["forward"]}))
        elif tasks:
            starters.append((contestant, tasks))
    return starters, absent


def _results(contestant: Contestant, inputs: Inputs) -> tuple[dict[str, Tensor], str]:
    """Outputs and gradients; if there are no gradients to be had, outputs, and the reason."""
    if contestant.results is None:
        return {}, ""
    try:
        return contestant.results(inputs), ""
    except Exception as error:
        with torch.no_grad():
            return contestant.results(inputs), _first_line(error)


def _first_line(error: Exception) -> str:
    while isinstance(error.__cause__, Exception):  # what was underneath: torch.compile wraps it
        error = error.__cause__
    words = str(error).strip().split("\n")[0]
    return words if isinstance(error, LeftOut) else f"{type(error).__name__}: {words}"


# How far two right results may lie apart, as a part of the largest value, and on average of the average one.
# Wide: what is wrong differs by the values themselves, and bigkern's own precision has been judged before.
# On a CPU torch adds up the gradients of a norm's parameters in bfloat16, and is 8 % off at 4096 rows.
APART = {torch.float32: 1e-4, torch.bfloat16: 1.5e-1, torch.float16: 1e-2}


def disagreement(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    """Where another's results are not bigkern's, in words, or nothing."""
    found = []
    for name in ours.keys() & theirs.keys():
        a, b = ours[name], theirs[name]
        if a.shape != b.shape:
            found.append(f"{name} has shape {list(b.shape)}, not {list(a.shape)}")
            continue
        if a.numel() == 0:
            continue
        scale, apart = a.float().abs(), (a.float() - b.float()).abs()
        for measure, reduce in (("max", torch.amax), ("mean", torch.mean)):
            difference, limit = float(reduce(apart)), APART[a.dtype] * float(reduce(scale))
            if not difference <= limit:
                found.append(f"{name} {measure} |difference| {difference:.3g} > {limit:.3g}")
                break
    return "; ".join(sorted(found))


def gate(case: Case, dtype: torch.dtype, device: torch.device) -> str:
    """What is wrong with bigkern's result on this case, or nothing."""
    if case.judge is not None:
        verdicts = case.judge(dtype, device)
    else:
        verdicts = judge(case.gate or case.problem, dtype, device)
    return "; ".join(f"{name}: {verdict.problem}" for name, verdict in verdicts.items() if not verdict.passed)


def _row(
    case: Case,
    inputs: Inputs,
    dtype: torch.dtype,
    bench: Bench,
    contestant: Contestant,
    mode: str = "",
    seconds: Sequence[float] = (),
    bigkern: Sequence[float] = (),
    counted: dict[str, float] | None = None,
    wrong: str = "",
) -> Row:
    problem = case.problem
    nothing = (math.nan,) * 3
    low, middle, high = spread(seconds) if seconds else nothing
    slow, speedup, fast = (
        spread([t / o for t, o in zip(seconds, bigkern, strict=True)]) if seconds else nothing
    )
    rate, unit, share = _rate(problem, mode, middle, dtype, bench)
    about = machine()
    return Row(
        op=problem.op,
        case=problem.label,
        dtype=str(dtype).removeprefix("torch."),
        device=bench.device.type,
        mode=mode,
        contestant=contestant.name,
        backend="" if wrong else _backend(contestant, inputs, mode),
        ms=1e3 * middle,
        p20_ms=1e3 * low,
        p80_ms=1e3 * high,
        rounds=len(seconds),
        rate=rate,
        unit=unit,
        share=share,
        speedup=speedup,
        speedup_p20=slow,
        speedup_p80=fast,
        wrong=wrong,
        machine=bench.name(),
        threads=about["threads"],
        isa=info.isa(),
        python=about["python"],
        torch=about["torch"],
        bigkern=about["bigkern"],
        commit=commit(),
        group=case.group,
        panel=case.panel,
        x=case.x,
        **{"peak_mb": math.nan, **(counted or {})},
    )


def _backend(contestant: Contestant, inputs: Inputs, mode: str) -> str:
    """What ran: forward alone runs without gradients, and may run on something else for that."""
    with torch.set_grad_enabled(mode != "forward"):
        return contestant.backend(inputs)


def _rate(
    problem: Problem, mode: str, seconds: float, dtype: torch.dtype, bench: Bench
) -> tuple[float, str, float]:
    """Rate, its unit, and its share of the measured peak."""
    factors = {
        "forward": 1.0,
        "backward": problem.backward_factor,
        "both": 1 + problem.backward_factor,
        "step": 1.0,
        "inference": 1.0,
        "training": 1 + problem.backward_factor,
    }
    if mode not in factors or math.isnan(seconds) or not (problem.flops or problem.elements):
        return math.nan, "", math.nan
    if problem.flops:
        rate = factors[mode] * problem.flops / seconds / 1e12
        return rate, "TFLOP/s", rate / bench.product_rate(dtype)
    rate = factors[mode] * problem.elements * BYTES[dtype] / seconds / 1e9
    return rate, "GB/s", rate / bench.copy_rate()
