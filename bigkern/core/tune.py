"""Measure the candidates of calls, for wisdom to choose by: what ``bigkern tune`` does.

Candidates take turns in one process on the same tensors, so that a slow moment hits all alike. What counts is
how many times faster than stock one of ours was in the lower quartile of the rounds, in the worse of two
sittings: for as long as one lasts, where tensors lie and what else the machine does may favour a candidate.
Where the two choose differently a third one decides.

What could take minutes is cut short: who is four times behind in the warm-up is timed no more; where the
choice is plain one sitting is enough; and a size is left out if, by the speed of the one before it, its
slowest candidate would take over half a second. On some processors products of bfloat16 are that slow.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bigkern.core import registry, wisdom
from bigkern.core.op import Op
from bigkern.core.timing import Clock, Task, rounds, take_turns, warm_up
from bigkern.core.wisdom_file import Kind, Point, Points

NOISY = 0.1  # the same task against itself, between the quartiles
LAST = 0.1  # of the time, for the third sitting
ASKING = 2e-6  # seconds that a call of ours takes before its kernel is reached, and one of stock's does not
LEAST_ROUNDS, MOST_ROUNDS = 3, 100  # of a sitting
SHORT, FEWEST_ROUNDS = 0.05, 2  # calls of more seconds differ little
LEAST_SECONDS = 0.01  # of a sitting
BEHIND, MOMENT = 4.0, 0.02  # who takes so many times as long, and at least these seconds, is out
PLAIN = 1.3  # a choice that is so many times faster than the next
LONGEST = 0.5  # seconds of a call


@dataclass(frozen=True, slots=True)
class Plan:
    """A call to be measured; ``make()`` gives one with tensors of its own, in the mode it is to be run in."""

    op: Op
    label: str
    training: bool
    make: Callable[[], Any]
    work: float = 0.0  # in proportion to it, about, is how long the calls of a kind take


@dataclass(frozen=True, slots=True)
class Measured:
    """A point, and the candidate that was chosen at its sizes before, and is now."""

    plan: Plan
    kind: Kind
    point: Point
    before: str
    after: str

    @property
    def gain(self) -> float:
        """How many times faster the choice now is than the one before."""
        return self.point.us[self.before] / self.point.us[self.after] if self.before in self.point.us else 1.0

    @property
    def is_plain(self) -> bool:
        """Whether the choice leaves no doubt: looking again would change nothing."""
        us = self.point.us
        return all(us[name] > PLAIN * us[self.after] for name in us if name != self.after)


class Slowest:
    """Seconds that the slowest candidate takes for a unit of work, by the last size measured of each kind."""

    def __init__(self) -> None:
        self._of: dict[tuple[str, Kind], float] = {}

    def takes(self, plan: Plan, kind: Kind) -> float:
        return self._of.get((plan.op.name, kind), 0.0) * plan.work

    def learn(self, plan: Plan, measured: Measured) -> None:
        if plan.work:
            self._of[plan.op.name, measured.kind] = 1e-6 * max(measured.point.us.values()) / plan.work


def measure(
    plan: Plan, device: torch.device, seconds: float, clock: Clock, slowest: Slowest
) -> Measured | None:
    """A plan's point; None where there is nothing to choose between, or where it would take too long."""
    with torch.set_grad_enabled(plan.training), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        call = plan.make()
        able = [b for b in plan.op.backends.values() if b.unable(call) is None]
        place = plan.op.place(call)
        if place is None or len(able) < 2 or not any(b.is_stock for b in able):
            return None
        if slowest.takes(plan, place.kind) > LONGEST:
            return None
        before = plan.op.choose(call).name
        tasks = [_task(plan, candidate, call) for candidate in able]
        turns = _rounds(tasks, clock, seconds)
    times = dict(zip((b.name for b in able), turns, strict=True))
    for b in able:
        times[b.name] = [each + (0.0 if b.is_stock else ASKING) for each in times[b.name]]
    us = {name: 1e6 * statistics.median(of) for name, of in times.items()}
    stock = min((b.name for b in able if b.is_stock), key=us.__getitem__)
    gain = {b.name: _quartile(times[stock], times[b.name]) for b in able if not b.is_stock}
    point = Point(place.sizes, us, gain)
    measured = Measured(plan, place.kind, point, before, point.order[0])
    slowest.learn(plan, measured)
    return measured


def _rounds(tasks: Sequence[Task], clock: Clock, seconds: float) -> list[list[float]]:
    """Seconds of each task by round; those of the warm-up of who is far behind."""
    warm = warm_up(tasks, clock)
    limit = max(BEHIND * min(warm), MOMENT)
    near = [i for i, once in enumerate(warm) if once <= limit]
    least = LEAST_ROUNDS if max(warm[i] for i in near) < SHORT else FEWEST_ROUNDS
    turns = rounds([tasks[i] for i in near], clock, max(seconds, LEAST_SECONDS), MOST_ROUNDS, least)
    found = dict(zip(near, turns, strict=True))
    return [found.get(i, [once]) for i, once in enumerate(warm)]


def _quartile(stock: Sequence[float], ours: Sequence[float]) -> float:
    if min(len(stock), len(ours)) == 1:  # who was far behind has one time
        return statistics.median(stock) / statistics.median(ours)
    ratios = [s / o for s, o in zip(stock, ours, strict=True)]
    return statistics.quantiles(ratios, n=4, method="inclusive")[0]


def _task(plan: Plan, candidate: registry.Backend, call: Any) -> Task:
    """Of the candidate: the call, in training with its backward, on the same tensors every time."""
    op, again = plan.op, type(call).of_flat
    arguments = type(call).public(call)

    def forward(_: Any) -> Any:
        return op.run(candidate, again(*arguments))  # a call may draw a key, once

    if not plan.training:
        return Task(forward)
    leaves = [t for t in op.tensors(call) if t is not None and t.requires_grad]
    outputs = _differentiable(forward(None))
    upstream = [torch.randn_like(output) for output in outputs]

    def both(_: Any) -> Any:
        return torch.autograd.grad(_differentiable(forward(None)), leaves, upstream, allow_unused=True)

    return Task(both)


def _differentiable(outputs: Any) -> list[Tensor]:
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return [output for output in outputs if output is not None and output.requires_grad]


def noise(device: torch.device) -> float:
    """How far the same task is from itself: half the distance between the quartiles of its ratio."""
    x = torch.randn(512, 512, device=device)
    task = Task(lambda _: x @ x)
    one, other = take_turns([task, task], Clock(device), 0.5)
    low, _, high = statistics.quantiles([a / b for a, b in zip(one, other, strict=True)], n=4)
    return (high - low) / 2


def run(
    plans: Sequence[Plan], device: torch.device, seconds: float, tell: Callable[[Plan, Measured | None], None]
) -> tuple[list[Measured], str | None]:
    """Measure all plans in about so many seconds, and record what was found, also when interrupted.

    ``tell`` is given each plan once in each sitting, and what is known of it by then.

    Returns:
        What was measured, and why it could not be written, or None.

    Raises:
        KeyboardInterrupt: after what was measured has been recorded.
    """
    sat: list[list[Measured]] = [[] for _ in plans]
    clock, here, slowest = Clock(device), wisdom.machine(device), Slowest()

    def sit(turns: Sequence[int], ends: float) -> None:
        for done, i in enumerate(turns):
            left = max(ends - time.monotonic(), 0.0) / (len(turns) - done)
            measured = measure(plans[i], device, left, clock, slowest)
            sat[i] += [] if measured is None else [measured]
            tell(plans[i], _together(sat[i]) if sat[i] else None)

    began = time.monotonic()
    try:
        sit(range(len(plans)), began + seconds * (1 - LAST) / 2)
        sit(
            [i for i, those in enumerate(sat) if those and not those[0].is_plain],
            began + seconds * (1 - LAST),
        )
        sit([i for i, those in enumerate(sat) if len({m.after for m in those}) > 1], began + seconds)
    finally:
        found = [_together(those) for those in sat if those]
        points: Points = {}
        for m in found:
            points.setdefault((m.plan.op.name, m.kind), {})[m.point.sizes] = m.point
        problem = wisdom.record(here, points) if points else None
    return found, problem


def _together(sittings: Sequence[Measured]) -> Measured:
    """Each candidate's shortest time, and its gain: the lesser of two, the middle one of three."""
    first, every = sittings[0], [m.point for m in sittings]
    us = {name: min(point.us[name] for point in every) for name in first.point.us}
    gain = {n: sorted(point.gain[n] for point in every)[(len(every) - 1) // 2] for n in first.point.gain}
    point = Point(first.point.sizes, us, gain)
    return replace(first, point=point, after=point.order[0])


# ---- the calls of a model of one's own -------------------------------------------------------------


@contextmanager
def tune(seconds: float = 60.0) -> Iterator[list[Measured]]:
    """Measure exactly the calls that pass in the block, when it is left, and choose by that from then on.

    Args:
        seconds: how long measuring may take, about.

    Yields:
        A list, which holds afterwards what was measured.

    Raises:
        RuntimeError: the block is inside another.

    Example:
        >>> import torch, bigkern
        >>> layer = bigkern.nn.RMSNorm(256)
        >>> with bigkern.tune(seconds=0.1) as measured:
        ...     y = layer(torch.randn(64, 256))
        >>> [m.plan.op.name for m in measured]
        ['norm']
    """
    plans: dict[Any, tuple[Plan, torch.device]] = {}

    def note(op: Any, call: Any) -> None:
        place = None if torch.compiler.is_compiling() else op.place(call)
        key = None if place is None else place[:4]
        if place is not None and key not in plans:
            plans[key] = _noted(op, call, place), place.device

    measured: list[Measured] = []
    if wisdom.noting is not None:
        raise RuntimeError("bigkern.tune() is at work already: leave its block before entering another")
    wisdom.noting = note
    try:
        yield measured
    finally:
        wisdom.noting = None
    for device in {device for _, device in plans.values()}:
        those = [plan for plan, where in plans.values() if where == device]
        found, problem = run(those, device, seconds * len(those) / len(plans), lambda *_: None)
        measured += found
        if problem is not None:
            warnings.warn(problem, stacklevel=3)


def _noted(op: Op, call: Any, place: wisdom.Place) -> Plan:
    """A plan of a call like this one, with other numbers but for those in whole-number tensors."""
    makers = [_maker(value) for value in type(call).public(call)]

    def make() -> Any:
        return type(call).of_flat(*(maker() for maker in makers))

    return Plan(op, "x".join(map(str, place.sizes)), place.kind[1] == "training", make)


def _maker(value: Any) -> Callable[[], Any]:
    if isinstance(value, list):
        makers = [_maker(item) for item in value]
        return lambda: [maker() for maker in makers]
    if not isinstance(value, Tensor):
        return lambda: value
    if not value.is_floating_point():
        kept = value.clone()
        return kept.clone
    shape, stride, dtype, device = value.shape, value.stride(), value.dtype, value.device
    wanted = value.requires_grad
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if value.numel() else 0

    def make() -> Tensor:
        memory = (torch.randn(reach, device=device) if shape else torch.ones(1, device=device)).to(dtype)
        return memory.as_strided(shape, stride).requires_grad_(wanted)

    return make
