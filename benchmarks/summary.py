"""What a sweep says in a few lines: mean speed-ups, the worst point, and how many points are losses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from bigkern.benchmarks.table import Row

STOCK = ("sdpa", "eager", "adamw-default")  # what people call today
LOSS = 0.97  # below it a point counts as lost; above it, it is noise


@dataclass(frozen=True, slots=True)
class Point:
    """bigkern's speed-up at one case, dtype and mode: over stock, and over the fastest of all others."""

    row: Row
    stock: float
    fastest: float
    who: str

    def __str__(self) -> str:
        return f"{self.row.case}, {self.row.dtype} {self.row.mode}"


@dataclass(frozen=True, slots=True)
class Line:
    """All points of one dtype, mode and group."""

    dtype: str
    mode: str
    group: str
    points: int
    over_stock: float  # geometric means
    over_fastest: float
    worst: Point


def points(rows: Iterable[Row]) -> list[Point]:
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        other = not row.contestant.startswith("bigkern")  # which may stand there in several forms
        if row.group and other and not math.isnan(row.speedup):
            cases.setdefault((row.op, row.case, row.dtype, row.device, row.mode), []).append(row)
    found = []
    for others in cases.values():
        hardest = min(others, key=lambda row: row.speedup)
        stock = next((row.speedup for row in others if row.contestant in STOCK), math.nan)
        found.append(Point(hardest, stock, hardest.speedup, hardest.contestant))
    return found


def lines(found: Iterable[Point]) -> list[Line]:
    groups: dict[tuple[str, str, str], list[Point]] = {}
    for point in found:
        groups.setdefault((point.row.group, point.row.dtype, point.row.mode), []).append(point)
    return [
        Line(
            dtype,
            mode,
            group,
            len(each),
            _geometric_mean([point.stock for point in each]),
            _geometric_mean([point.fastest for point in each]),
            min(each, key=lambda point: point.fastest),
        )
        for (group, dtype, mode), each in groups.items()
    ]


def _geometric_mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.exp(sum(map(math.log, known)) / len(known)) if known else math.nan


def verdicts(found: list[Point]) -> list[str]:
    """In words: whether any point is lost to stock, or to the fastest of the others, and which."""
    said = []
    for name, speedups in (
        ("stock", [(point.stock, point, "stock") for point in found]),
        ("the fastest other", [(point.fastest, point, point.who) for point in found]),
    ):
        known = [entry for entry in speedups if not math.isnan(entry[0])]
        lost = sorted((entry for entry in known if entry[0] < LOSS), key=lambda entry: entry[0])
        if known and not lost:
            said.append(f"over {name}: no point of {len(known)} under {LOSS}x")
        elif lost:
            said.append(f"over {name}: {len(lost)} of {len(known)} points under {LOSS}x:")
            said += [f"  {speedup:.2f}x over {who}: {point}" for speedup, point, who in lost]
    return said
