"""How every benchmark here is measured.

1. Parity first: a wrong result gets no time (``bigkern.parity``).
2. Contestants take turns in one process, in an order that rotates, on the same inputs. Medians with p20
   and p80; speed-ups are medians of the ratios within a round, so that a slow moment cancels.
3. A contestant's name says what it is, the column ``backend`` what it really ran on.
4. Rates are shares of what this machine showed minutes ago: a large copy, a large matrix product.

CPU time is ``perf_counter``; GPU time is CUDA events, the L2 cache flushed before each.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigkern import info
from bigkern.cli.console import Console, machine
from bigkern.cli.problems import Inputs, Problem, judge

BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


@dataclass(frozen=True, slots=True)
class Task:
    """What is timed: ``run(setup())``, the time of ``run`` alone, divided by ``calls``."""

    run: Callable[[Any], Any]
    setup: Callable[[], Any] = lambda: None
    calls: int = 1


@dataclass(frozen=True, slots=True)
class Contestant:
    """``tasks(inputs)`` gives a task for each mode; ``backend(inputs)`` names what runs it."""

    name: str
    tasks: Callable[[Inputs], dict[str, Task]]
    backend: Callable[[Inputs], str] = lambda inputs: ""


@dataclass(frozen=True, slots=True)
class Case:
    """A problem, who competes on it (bigkern first), and the smaller problem that parity is judged on."""

    problem: Problem
    contestants: list[Contestant]
    gate: Problem | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the CSV. ``speedup`` is bigkern's over this contestant."""

    op: str
    case: str
    dtype: str
    device: str
    mode: str
    contestant: str
    backend: str
    ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    rate: float
    unit: str
    share: float
    speedup: float
    speedup_p20: float
    speedup_p80: float
    peak_mb: float
    wrong: str
    machine: str
    threads: int
    isa: str
    python: str
    torch: str
    bigkern: str
    commit: str


# ---- contestants -----------------------------------------------------------------------------------


def by_autograd(
    name: str, call: Callable[[Inputs], Tensor], backend: Callable[[Inputs], str] | str
) -> Contestant:
    """A function of the inputs: forward without a graph, backward alone, and both."""

    def tasks(inputs: Inputs) -> dict[str, Task]:
        wanted = [value for value in inputs.values() if value.requires_grad]
        with torch.no_grad():
            upstream = torch.randn_like(call(inputs))

        def forward(_: Any) -> Tensor:
            with torch.no_grad():
                return call(inputs)

        def backward(output: Tensor) -> Any:
            return torch.autograd.grad(output, wanted, upstream)

        return {
            "forward": Task(forward),
            "backward": Task(backward, setup=lambda: call(inputs)),
            "both": Task(lambda _: backward(call(inputs))),
        }

    words = backend
    return Contestant(name, tasks, (lambda inputs: words) if isinstance(words, str) else words)


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


def compiled(problem: Problem, device: torch.device) -> list[Contestant]:
    """torch.compile of the stock call, where it works."""
    if not compiler_works(device.type):
        return []
    return [by_autograd("compile", torch.compile(problem.stock, dynamic=False), "inductor")]


# ---- timing ----------------------------------------------------------------------------------------


class Clock:
    """Times one call on a device."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            size = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(2 * size, dtype=torch.int8, device=device)

    def seconds(self, task: Task) -> float:
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
    """Seconds of each task by round: at least 5 rounds, at most ``most``, within about ``budget`` seconds."""
    for task in tasks:  # warm-up: kernels are compiled, memory is touched
        clock.seconds(task)
        clock.seconds(task)
    began = time.perf_counter()
    times: list[list[float]] = [[] for _ in tasks]
    for turn in range(most):
        for i in range(len(tasks)):
            who = (i + turn) % len(tasks)
            times[who].append(clock.seconds(tasks[who]))
        if turn >= 4 and time.perf_counter() - began > budget:
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
    state = task.setup()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    task.run(state)
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


# ---- the machine -----------------------------------------------------------------------------------


@dataclass
class Bench:
    """Where and how thoroughly to measure; remembers the machine's measured peaks."""

    device: torch.device
    quick: bool
    console: Console
    peaks: dict[str, float] = field(default_factory=dict)

    @property
    def budget(self) -> float:
        """Seconds a case, dtype and mode."""
        return 0.5 if self.quick else 3.0

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
        """The machine as a folder name."""
        about = machine()
        gpu = self.device.type == "cuda"
        words = (
            torch.cuda.get_device_name(self.device) if gpu else f"{about['cpu']} {about['threads']} threads"
        )
        return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


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


def measure(case: Case, dtype: torch.dtype, bench: Bench) -> list[Row]:
    """Gate, then time everyone on one case in one dtype."""
    problem = case.problem
    inputs = problem.make(dtype, bench.device)
    wrong = gate(case, dtype, bench.device)
    if wrong:
        return [_row(case.contestants[0], "", [], [], problem, inputs, dtype, bench, wrong, math.nan)]
    clock = Clock(bench.device)
    tasks = [contestant.tasks(inputs) for contestant in case.contestants]
    rows = []
    for mode in tasks[0]:
        here = [(c, t[mode]) for c, t in zip(case.contestants, tasks, strict=True) if mode in t]
        times = take_turns([task for _, task in here], clock, bench.budget)
        for (contestant, task), seconds in zip(here, times, strict=True):
            memory = peak_memory_mb(task, bench.device)
            rows.append(_row(contestant, mode, seconds, times[0], problem, inputs, dtype, bench, "", memory))
    return rows


def gate(case: Case, dtype: torch.dtype, device: torch.device) -> str:
    """What is wrong with bigkern's result on this case, or nothing."""
    problem = case.gate or case.problem
    verdicts = judge(problem, dtype, device)
    return "; ".join(f"{name}: {verdict.problem}" for name, verdict in verdicts.items() if not verdict.passed)


def _row(
    contestant: Contestant,
    mode: str,
    seconds: list[float],
    bigkern: list[float],
    problem: Problem,
    inputs: Inputs,
    dtype: torch.dtype,
    bench: Bench,
    wrong: str,
    memory: float,
) -> Row:
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
        backend=contestant.backend(inputs),
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
        peak_mb=memory,
        wrong=wrong,
        machine=bench.name(),
        threads=about["threads"],
        isa=info.isa(),
        python=about["python"],
        torch=about["torch"],
        bigkern=about["bigkern"],
        commit=commit(),
    )


def _rate(
    problem: Problem, mode: str, seconds: float, dtype: torch.dtype, bench: Bench
) -> tuple[float, str, float]:
    """Rate, its unit, and its share of the measured peak."""
    factors = {
        "forward": 1.0,
        "backward": problem.backward_factor,
        "both": 1 + problem.backward_factor,
        "step": 1.0,
    }
    if mode not in factors or math.isnan(seconds):
        return math.nan, "", math.nan
    if problem.flops:
        rate = factors[mode] * problem.flops / seconds / 1e12
        return rate, "TFLOP/s", rate / bench.product_rate(dtype)
    rate = factors[mode] * problem.elements * BYTES[dtype] / seconds / 1e9
    return rate, "GB/s", rate / bench.copy_rate()


# ---- files -----------------------------------------------------------------------------------------


def write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        out.writeheader()
        for row in rows:
            values = asdict(row)
            out.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})


def read(path: Path) -> list[Row]:
    """Rows of a CSV that :func:`write` wrote.

    Raises:
        ValueError: it is something else.
    """
    kinds = {f.name: {"float": float, "int": int}.get(str(f.type), str) for f in fields(Row)}
    with path.open(newline="") as file:
        try:
            return [Row(**{k: kinds[k](v) for k, v in line.items()}) for line in csv.DictReader(file)]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a result of `bigkern bench` ({error!r})") from error


NOISE = 0.05


def regressions(old: Iterable[Row], new: Iterable[Row]) -> list[str]:
    """Where bigkern has become slower than in ``old``, beyond the noise of both runs; in words.

    Both must agree: the time itself (the new p20 above the old p80), and, unless bigkern ran alone, every
    speed-up over another contestant (the new p80 below the old p20). The second forgives a machine that is
    slower today, for everyone.
    """
    before = {_key(row): row for row in old}
    found = []
    groups: dict[tuple[str, ...], list[tuple[Row, Row]]] = {}
    for row in new:
        if row.contestant == "bigkern" and row.wrong:
            found.append(f"{row.op} {row.case} {row.dtype}: wrong result: {row.wrong}")
        elif (then := before.get(_key(row))) is not None and not then.wrong:
            groups.setdefault(_key(row)[:-1], []).append((then, row))
    for pairs in groups.values():
        ours = next(((a, b) for a, b in pairs if b.contestant == "bigkern"), None)
        if ours is None:
            continue
        then, now = ours
        slower = now.p20_ms > then.p80_ms * (1 + NOISE)
        others = [(a, b) for a, b in pairs if b.contestant != "bigkern"]
        behind = all(b.speedup_p80 * (1 + NOISE) < a.speedup_p20 for a, b in others)
        if slower and behind:
            found.append(
                f"{now.op} {now.case} {now.dtype} {now.mode}: {then.ms:.3g} ms -> {now.ms:.3g} ms"
                + "".join(f", {a.speedup:.2f}x -> {b.speedup:.2f}x over {b.contestant}" for a, b in others)
            )
    return found


def _key(row: Row) -> tuple[str, ...]:
    return row.op, row.case, row.dtype, row.device, row.mode, row.contestant
