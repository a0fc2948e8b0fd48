"""Where a call's time goes, and the memory it needs, from torch's profiler: a table, a JSON file, a figure.

An operator belongs to the first kind below that knows it, or one of those that called it, outermost first:
what the optimizer or a norm calls is theirs. A fused op counts as what it is named for: ``layernorm_ffn`` as
linear, with the norm, the activation and the residual that it does in passing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bigkern.benchmarks.plot import COLOURS
from bigkern.benchmarks.table import Row
from bigkern.core.timing import Task

OTHER = "other"  # copies, concatenations, pooling, Python's own bookkeeping
KINDS = {
    "optimizer": r"^Optimizer\.|::_?fused_adam|::adam",
    "attention": r"scaled_dot_product|::\w*attention|^_(Attention|Transformed)|::(_?softmax|baddbmm|bmm)\b",
    "linear, FFN": r"layernorm_ffn|frozen_linear|^_(LayernormFfn|Linear)"
    r"|::(linear|linear_backward|addmm|mm|matmul)\b|mkldnn_?(::_)?linear"
    r"|evaluate_function: (Addmm|Mm)Backward",
    "norms": r"(layer|batch|rms|group)_?norm|::norm\b|^_(Batch)?Norm",
    "convolution": r"::(_?convolution|conv[123]d|\w+_convolution)",
    "loss, embedding": r"embedding|cross_entropy|log_softmax|nll_loss",
    "elementwise": r"::_?(add|sub|mul|div|neg|pow|tanh|sigmoid|gelu|silu|relu|clamp|clamp_min|threshold|where"
    r"|native_dropout|dropout|bernoulli)_?(_backward)?(_data)?$",
}
PATTERNS = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}
NAMES = (*KINDS, OTHER)


@dataclass(frozen=True, slots=True)
class Breakdown:
    """A call's median time, and the share of each kind in it, which sum to 1."""

    case: str
    dtype: str
    device: str
    mode: str
    contestant: str
    ms: float
    shares: dict[str, float]
    machine: str
    torch: str
    bigkern: str
    commit: str

    @classmethod
    def of(cls, row: Row, shares: dict[str, float]) -> Breakdown:
        about = {name: getattr(row, name) for name in cls.__slots__ if name != "shares"}  # type: ignore[attr-defined]
        return cls(**about, shares=shares)


# ---- measuring -------------------------------------------------------------------------------------


def profiled(task: Task, device: torch.device) -> tuple[dict[str, float], float]:
    """One call: the share of each kind in its time, and the MB that it had allocated at its peak.

    The time is the operators' own: on a CPU theirs, on a GPU that of the kernels they start.
    """
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if gpu else [])
    with task.within():
        state = task.setup()
        with profile(activities=activities, profile_memory=True) as found:
            task.run(state)
            if gpu:
                torch.cuda.synchronize(device)
    clock = "self_device_time_total" if gpu else "self_cpu_time_total"
    spent = dict.fromkeys(NAMES, 0.0)
    for event in found.events() or ():
        if event.device_type == torch.autograd.DeviceType.CPU:
            spent[_kind(event)] += getattr(event, clock)
    total = sum(spent.values()) or 1.0
    return {name: time / total for name, time in spent.items()}, _peak_mb(found, gpu)


def _kind(event: Any) -> str:
    found = OTHER
    while event is not None:  # the outermost has the last word
        found = _kind_of(event.name) or found
        event = event.cpu_parent
    return found


@cache
def _kind_of(name: str) -> str | None:
    return next((kind for kind, pattern in PATTERNS.items() if pattern.search(name)), None)


def _peak_mb(found: Any, gpu: bool) -> float:
    """The most that was allocated at once beyond what was there before, by torch's allocator."""
    wanted = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.device_type() == wanted:
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak / 2**20


# ---- the table and the file ------------------------------------------------------------------------


def table(found: Sequence[Breakdown]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Columns and lines: the kinds that occur, in percent of the time."""
    used = [name for name in NAMES if any(each.shares[name] >= 0.005 for each in found)]
    lines = [
        (each.case, each.dtype, each.contestant, f"{each.ms:.3g}", *_percent(each, used)) for each in found
    ]
    return ["where the time goes", "dtype", "", "ms", *used], lines


def _percent(each: Breakdown, names: Iterable[str]) -> list[str]:
    return [f"{100 * each.shares[name]:.0f}%" for name in names]


def write(path: Path, found: Iterable[Breakdown], part: bool = False) -> None:
    """The file; of a ``part``, in the place of what it says about the same cases."""
    found = list(found)
    measured = {(each.case, each.dtype, each.device) for each in found}
    before = read(path) if part and path.exists() else []
    kept = [each for each in before if (each.case, each.dtype, each.device) not in measured]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(each) for each in [*kept, *found]], indent=1) + "\n")


def read(path: Path) -> list[Breakdown]:
    """What :func:`write` wrote.

    Raises:
        ValueError: it is something else.
    """
    try:
        return [Breakdown(**each) for each in json.loads(path.read_text())]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a breakdown of `bigkern bench` ({error!r})") from error


# ---- the figure ------------------------------------------------------------------------------------


def plot(path: Path) -> list[Path]:
    """A PNG beside the file for each device and dtype: bars of times, stacked by kind."""
    import matplotlib

    matplotlib.use("Agg")

    everything, written = read(path), []
    for device, dtype in sorted({(each.device, each.dtype) for each in everything}):
        found = [each for each in everything if (each.device, each.dtype) == (device, dtype)]
        target = path.with_name(f"{path.stem}-{device}-{dtype}.png")
        _stack(found, target)
        written.append(target)
    return written


def _stack(found: Sequence[Breakdown], target: Path) -> None:
    """A row for each case, its bars relative to the slowest, whose time is written beside it."""
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(each.case for each in found))
    figure, axis = plt.subplots(figsize=(11, 1.2 + 0.27 * (len(found) + len(cases))), layout="constrained")
    place, places, labels = 0.0, [], []
    for case in cases:
        here = [each for each in found if each.case == case]
        slowest = max(each.ms for each in here)
        for each in here:
            left = 0.0
            for colour, name in zip(COLOURS, NAMES, strict=False):
                width = each.shares[name] * each.ms / slowest
                axis.barh(place, width, 0.85, left=left, color=colour, label=name)
                left += width
            axis.text(left + 0.005, place, f"{each.ms:.4g} ms", va="center", fontsize=7)
            places.append(place)
            labels.append(f"{case if each is here[0] else ''}  {each.contestant}")
            place += 1
        place += 0.6
    axis.set_yticks(places, labels, fontsize=7)
    axis.set_ylim(place - 0.9, -0.7)
    axis.set_xlim(0, 1.09)
    axis.set_xlabel("time, the slowest of a case = 1", fontsize=8)
    handles = {name: handle for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=8, ncols=len(NAMES), loc="outside lower center")
    first = found[0]
    figure.suptitle(f"where the time goes, {first.dtype}, {first.machine}, torch {first.torch}", fontsize=9)
    figure.savefig(target, dpi=120)
    plt.close(figure)
