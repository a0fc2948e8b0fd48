"""The files of wisdom: measured points of one machine, one line each, to be read by eye.

{"version": 1,
 "machine": {"fingerprint": "amd-25-17-avx512bf16", "threads": 2, "torch": "2.13.0"},
 "points": {
  "linear": {
   "float32 forward": [
    {"sizes": [512, 768, 768], "us": {"cpu": 2310.0, "torch": 2950.0}, "gain": {"cpu": 1.24}}]}}}
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VERSION = 1  # of the files' form
GAIN = 1.03  # that a candidate of ours must show
MOST = 512  # points of a kind: finding the nearest takes 10 us at most

Kind = tuple[str, ...]
Sizes = tuple[int, ...]
Machine = tuple[str, int]  # fingerprint, and the number of threads; 0 on a GPU


@dataclass(frozen=True, slots=True)
class Point:
    """Microseconds of every candidate at these sizes, medians; of ours also how many times faster than stock
    each was: the lower quartile of the rounds, in which they took turns."""

    sizes: Sizes
    us: dict[str, float]
    gain: dict[str, float]
    order: tuple[str, ...] = field(init=False, compare=False)  # from the one to run to the last

    def __post_init__(self) -> None:
        ours = sorted((c for c in self.gain if self.gain[c] >= GAIN), key=self.us.__getitem__)
        stock = sorted((c for c in self.us if c not in self.gain), key=self.us.__getitem__)
        object.__setattr__(self, "order", (*ours, *stock))

    def worse(self, other: Point) -> Point:
        """The same times, with each candidate's lesser gain."""
        gain = {name: min(gain, other.gain.get(name, 0.0)) for name, gain in self.gain.items()}
        return Point(self.sizes, self.us, gain)

    def why_not(self, candidate: str, fastest: str) -> str:
        """In words."""
        where = "x".join(map(str, self.sizes))
        if candidate not in self.us:
            return f"not measured near {where}"
        ratio = self.us[candidate] / self.us[fastest]
        if candidate in self.gain and ratio < GAIN:
            return f"measured at {where}: as fast as {fastest}, within {GAIN - 1:.0%}"
        return f"measured at {where}: {fastest} {ratio:.2f}x faster"


Points = dict[tuple[str, Kind], dict[Sizes, Point]]  # of (op, kind)


def read(path: Path | str) -> tuple[Machine, Points]:
    """A file's machine and points.

    Raises:
        ValueError: it is not a wisdom file of this version; the message names it.
        OSError: it cannot be read.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        if document["version"] != VERSION:
            raise ValueError(f"it has version {document['version']!r}, not {VERSION}")
        of = document["machine"]
        points: Points = {}
        for op, kinds in document["points"].items():
            for kind, rows in kinds.items():
                read_points = (_point(row) for row in rows)
                points[op, tuple(kind.split())] = {p.sizes: p for p in read_points}
        if not (isinstance(of["fingerprint"], str) and type(of["threads"]) is int):
            raise ValueError("its machine has no fingerprint and number of threads")
        for key, of_kind in points.items():
            if len({len(sizes) for sizes in of_kind}) > 1:
                raise ValueError(f"the points of {key} differ in how many sizes they have")
        return (of["fingerprint"], of["threads"]), points
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a wisdom file ({type(error).__name__}: {error})") from error


def _point(row: Any) -> Point:
    sizes, us, gain = tuple(row["sizes"]), row["us"], row["gain"]
    if not sizes or not all(type(n) is int and n >= 0 for n in sizes):
        raise ValueError(f"sizes must be whole numbers, not {row['sizes']}")
    for name, value in (*us.items(), *gain.items()):
        if isinstance(value, bool) or not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise ValueError(f"{name} must have a positive number, not {value!r}")
    if not gain.keys() < us.keys():
        raise ValueError(f"gain must be of some of the candidates {', '.join(us)}, not of {', '.join(gain)}")
    return Point(sizes, us, gain)


def write(path: Path | str, machine: Machine, points: Points, about: dict[str, Any]) -> None:
    """One line a point; atomic."""
    path = Path(path)
    head = json.dumps({"fingerprint": machine[0], "threads": machine[1], **about})
    ops = []
    for op in sorted({op for op, _ in points}):
        kinds = []
        for _, kind in sorted(key for key in points if key[0] == op):
            rows = (_row(p) for p in points[op, kind].values())
            kinds.append(f"   {json.dumps(' '.join(kind))}: [\n    " + ",\n    ".join(rows) + "]")
        ops.append(f"  {json.dumps(op)}: {{\n" + ",\n".join(kinds) + "}")
    text = f'{{"version": {VERSION},\n "machine": {head},\n "points": {{\n' + ",\n".join(ops) + "}}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as scratch:
        scratch.write(text)
    os.replace(scratch.name, path)


def _row(p: Point) -> str:
    us, gain = ({name: float(f"{v:.4g}") for name, v in of.items()} for of in (p.us, p.gain))
    return json.dumps({"sizes": list(p.sizes), "us": us, "gain": gain})


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time; where there are no such locks, the last one's file stays."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def read_all(where: Path, wanted: str = "*") -> dict[Machine, Points]:
    found: dict[Machine, Points] = {}
    for path in sorted(where.glob(f"{wanted}.json")) if where.is_dir() else ():
        try:
            machine, points = read(path)
        except (OSError, ValueError) as error:
            warnings.warn(f"{error}: it is ignored; `bigkern tune` writes it anew", stacklevel=3)
            continue
        found.setdefault(machine, {}).update(points)
    return found


def merged(points: Points, more: Points) -> Points:
    """The later of two measurements counts; the oldest of very many are dropped."""
    found = {}
    for key in {**points, **more}:
        old, new = points.get(key, {}), more.get(key, {})
        of = {sizes: p for sizes, p in old.items() if sizes not in new} | new
        found[key] = dict(list(of.items())[-MOST:])
    return found
