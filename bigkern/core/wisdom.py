"""What was measured fastest on this kind of machine, for kinds of calls at points of their sizes.

After FFTW's wisdom: a plan is measured once and remembered. A call has a **kind**, words for what chooses
the code (dtype, forward or training, options), and **sizes**. A point of a kind holds what each candidate
took at its sizes. A call takes the nearest point, if each of its sizes is within the op's reach of the
point's. A kernel of ours runs there only if it gained at least 3 % over stock in three of four rounds, and
likewise at the second nearest point where that is about as near.

Wisdom is of one kind of processor and one number of threads, or of one GPU. There is yours, which
``bigkern tune`` measures and writes into your cache, and what is shipped beside the package, asked for calls
that yours does not cover. All files are read when bigkern is imported; one that cannot be read is a warning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

from bigkern.core import device as processor
from bigkern.core import info
from bigkern.core.wisdom_file import (
    Kind,
    Machine,
    Point,
    Points,
    Sizes,
    alone,
    merged,
    read,
    read_all,
    write,
)

MOST = 1 << 14  # decisions that are remembered
NEAR = 1.5  # times as far as the nearest point, another speaks as well
SHIPPED = Path(__file__).parent.parent / "wisdom"

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Place(NamedTuple):
    """Where a call stands."""

    op: str
    kind: Kind
    sizes: Sizes
    device: torch.device
    reach: float  # how far a point may be, times each size


_NOTHING: Any = ([], ())


class Wisdom:
    """Of one machine: points, and the nearest ones as they are asked for."""

    def __init__(self, points: Points):
        self.points = points
        self._logs = {  # [sizes, points]
            key: (list(of.values()), numpy.log2([[max(n, 1) for n in sizes] for sizes in of]).T.copy())
            for key, of in points.items()
        }

    def nearest(self, op: str, kind: Kind, sizes: Sizes, reach: float) -> Point | None:
        points, logs = self._logs.get((op, kind), _NOTHING)
        if len(logs) != len(sizes):
            return None
        apart = numpy.abs(logs - [[math.log2(max(n, 1))] for n in sizes])
        within = apart.max(0) <= math.log2(reach) + 1e-9
        distances = numpy.where(within, apart.sum(0), math.inf)
        best = int(distances.argmin())
        if not within[best]:
            return None
        found: Point = points[best]
        limit, distances[best] = NEAR * distances[best], math.inf
        second = int(distances.argmin())
        return found.worse(points[second]) if distances[second] <= limit else found


# ---- choosing --------------------------------------------------------------------------------------


class State:
    """Replaced as a whole when anything changes, so that who remembers decisions sees it."""

    def __init__(self, yours: dict[Machine, Points], shipped: dict[Machine, Points]):
        self.yours, self.shipped = yours, shipped
        self.asked = {
            machine: [Wisdom(points) for points in (yours.get(machine), shipped.get(machine)) if points]
            for machine in {*yours, *shipped}
        }
        self.decided: dict[Any, Point | None] = {}


def point(place: Place) -> Point | None:
    """The nearest measured point on this machine, or None."""
    decided = state.decided
    key = (place, torch.get_num_threads())
    try:
        return decided[key]
    except KeyError:
        pass
    if len(decided) >= MOST:
        decided.clear()
    wise = state.asked.get(machine(place.device), ())
    found = (w.nearest(place.op, place.kind, place.sizes, place.reach) for w in wise)
    decided[key] = answer = next((p for p in found if p is not None), None)
    return answer


def order(place: Place) -> tuple[str, ...]:
    """Candidates from the fastest on, at the nearest measured point; none where there is no such point."""
    if left_open(place.sizes):
        return ()
    if torch.compiler.is_compiling():
        return _traced_order(place.op, place.kind, place.sizes, str(place.device), place.reach)
    found = point(place)
    return () if found is None else found.order


def left_open(sizes: Sizes) -> bool:
    """Whether torch.compile leaves a size open: to look at it would bind the graph to it."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not all(has_static_value(n) for n in sizes)


def _traced_order(op: str, kind: Kind, sizes: Sizes, device: str, reach: float) -> tuple[str, ...]:
    found = point(Place(op, kind, sizes, torch.device(device), reach))
    return () if found is None else found.order


# As torch.compiler.assume_constant_result marks a function, without the second that its import takes.
_traced_order._dynamo_marked_constant = True  # type: ignore[attr-defined]

# Told of each call that has a choice, with its op, while `with bigkern.tune()` looks on.
noting: Callable[[Any, Any], None] | None = None


def machine(device: torch.device) -> Machine:
    """What measured times depend on."""
    if processor.is_gpu(device):
        return processor.gpu_fingerprint(device.index or 0), 0
    return processor.cpu_fingerprint(), torch.get_num_threads()


# ---- yours -----------------------------------------------------------------------------------------


def folder() -> Path:
    """Of your wisdom."""
    return processor.cache() / "wisdom"


def name(machine: Machine) -> str:
    """Of a machine's files: ``amd-25-17-avx512bf16-2-threads``."""
    fingerprint, threads = machine
    return f"{fingerprint}-{threads}-threads" if threads else fingerprint


def file_name(machine: Machine) -> str:
    return f"{name(machine)}.json"


def record(machine: Machine, points: Points) -> str | None:
    """Add points to yours, and to the file; why they could only be kept for this process, or None."""
    remember(machine, points)
    path = folder() / file_name(machine)
    try:
        with alone(path):
            try:
                known = read(path)[1]
            except (OSError, ValueError):
                known = {}
            write(path, machine, merged(known, points), about())
    except OSError as error:
        return f"cannot write {path} ({error.strerror or error}): kept for this process alone"
    return None


def remember(machine: Machine, points: Points) -> None:
    """Add points to yours, for this process."""
    global state
    yours = {**state.yours, machine: merged(state.yours.get(machine, {}), points)}
    state = State(yours, state.shipped)


def about() -> dict[str, Any]:
    """What a file says of itself besides the machine's fingerprint."""
    return {"torch": torch.__version__, "bigkern": info.version()}


def summary(device: torch.device) -> dict[str, Any]:
    """How many points there are for a device, and what to run if there are none of yours."""
    here = machine(device)
    yours, shipped = (sum(map(len, of.get(here, {}).values())) for of in (state.yours, state.shipped))
    advice = "" if yours else "; `bigkern tune` measures in two minutes"
    return {"machine": file_name(here), "yours": yours, "shipped": shipped, "advice": advice}


def load(path: Path | str) -> None:
    """Take a file's points as yours, for this process.

    Raises:
        ValueError, OSError: as :func:`read`.
    """
    remember(*read(path))


def export(path: Path | str, device: torch.device | str = "cpu") -> None:
    """Write your points of this machine, at the present number of threads, to a file.

    Raises:
        ValueError: there are none.
        OSError: it cannot be written.
    """
    here = machine(torch.device(device))
    if not state.yours.get(here):
        raise ValueError(f"nothing was measured for {file_name(here)}; run `bigkern tune`")
    write(path, here, state.yours[here], about())


def forget(ops: Iterable[str] = ()) -> None:
    """Drop your points of these ops, or all, here and in your files."""
    global state
    gone = set(ops)
    yours = {
        here: {key: of for key, of in points.items() if gone and key[0] not in gone}
        for here, points in state.yours.items()
    }
    for here, points in yours.items():
        path = folder() / file_name(here)
        with suppress(FileNotFoundError):
            if any(points.values()):
                write(path, here, points, about())
            else:
                path.unlink()
    state = State(yours, state.shipped)


def refresh() -> None:
    """Read all files again."""
    global state
    state = State(read_all(folder()), read_all(SHIPPED))


state: State
refresh()
