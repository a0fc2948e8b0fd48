"""The lines of the benchmarks' CSVs: writing, reading, and telling a regression from noise."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the CSV. ``speedup`` is bigkern's over this contestant; ``wrong`` is why there is no time."""

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
    group: str = ""
    panel: str = ""
    x: float = math.nan
    saved_mb: float = math.nan
    processor_ms: float = math.nan
    state_mb: float = math.nan
    step_us: float = math.nan  # a time step of a layer


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
        except (csv.Error, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a result of `bigkern bench` ({error!r})") from error


def files(path: Path) -> list[Path]:
    """The file, or of a folder those CSVs that begin as :func:`write` begins them."""
    if not path.is_dir():
        return [path]
    columns = ",".join(f.name for f in fields(Row) if f.default is MISSING)
    return [file for file in sorted(path.rglob("*.csv")) if _first_line(file).startswith(columns)]


def _first_line(path: Path) -> str:
    with path.open() as file:
        return file.readline()


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """All of ``new``, after those rows of ``old`` whose case, dtype and device it does not have."""
    new = list(new)
    measured = {_key(row)[:4] for row in new}
    return [*(row for row in old if _key(row)[:4] not in measured), *new]


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
        elif (then := before.get(_key(row))) is not None and not then.wrong and not row.wrong:
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
