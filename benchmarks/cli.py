"""``bigkern bench``: the kernels against stock PyTorch and others, on this machine."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bigkern.core import registry
from bigkern.ops import problems
from bigkern.terminal import options
from bigkern.terminal.console import Console, Failure, machine
from bigkern.terminal.files import require_writable

if TYPE_CHECKING:
    from bigkern.benchmarks.harness import Bench
    from bigkern.benchmarks.table import Row

OPS = (
    "attention",
    "norm",
    "batch_norm",
    "linear",
    "recurrent",
    "layernorm_ffn",
    "frozen_layernorm_ffn",
    "adam",
    "overhead",
    "models",
)
CHECKOUT = Path("benchmarks/results")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="*", help=f"which: {', '.join(OPS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases, shorter runs")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only cases whose name has all these words")
    parser.add_argument("--compile", action="store_true", help="compile every model, not just two of them")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="only this one")
    parser.add_argument("--backend", choices=registry.ORDER, help="force it (default: bigkern chooses)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for <machine>/<op>.csv and figures; --only and --dtype leave its other rows",
    )
    parser.add_argument(
        "--compare", type=Path, metavar="OLD", help="an older CSV or folder; exit 1 if slower now"
    )


def run(arguments: argparse.Namespace, console: Console) -> int:
    from bigkern.benchmarks import harness, table

    for name in arguments.op:
        if name not in OPS:
            raise Failure(f"there is no benchmark {name!r}; there are {', '.join(OPS)}")
    device = options.device(arguments.device)
    old = _old_rows(arguments.compare) if arguments.compare else None
    bench = harness.Bench(device, arguments.quick, console, compile_all=arguments.compile)
    out = (arguments.out or (CHECKOUT if CHECKOUT.is_dir() else Path("bigkern-results"))) / bench.name()
    require_writable(out)
    part = bool(arguments.only or arguments.dtype)
    if part:
        _check_tables(out, arguments.op or OPS)
    rows: list[Row] = []
    for name in arguments.op or OPS:
        try:
            with registry.use(**dict.fromkeys(problems.OPS, arguments.backend) if arguments.backend else {}):
                found = _measure(name, bench, arguments.dtype, arguments.only or [])
        except registry.BackendRefused as error:
            raise Failure(f"--backend {arguments.backend}: {error}") from error
        except Failure as failure:
            if arguments.op:
                raise
            console.say(f"left out: {failure}")  # of everything, what can be measured is
            continue
        rows += found
        if found:
            _write(out / f"{name}.csv", found, bench, part)
    if arguments.only and not rows:
        raise Failure(f"--only: no case has {' and '.join(map(repr, arguments.only))} in its name")
    summary = _summarise(rows, console)
    console.say(f"\n{_peaks(bench)}written to {out}")
    bad = [row for row in rows if row.wrong and row.contestant == "bigkern"]
    wrong = [f"{row.op} {row.case} {row.dtype}: {row.wrong}" for row in bad]
    slower = [] if old is None else table.regressions(old, rows)
    for line in wrong:
        console.say(f"wrong result, not timed: {line}")
    for line in slower:
        console.say(f"slower than before: {line}")
    if old is not None and not slower:
        console.say("no regression beyond noise")
    document = {"machine": machine(), "peaks": bench.peaks, "rows": [asdict(row) for row in rows]}
    console.emit({**document, "summary": summary, "wrong": wrong, "regressions": slower})
    return 1 if wrong or slower else 0


def _check_tables(out: Path, names: Iterable[str]) -> None:
    """Find out now whether the rows that a part leaves as they are can be read."""
    from bigkern.benchmarks import breakdown, table

    try:
        for name in names:
            if (rows := out / f"{name}.csv").exists():
                table.read(rows)
            if (times := out / f"{name}_time.json").exists():
                breakdown.read(times)
    except (OSError, ValueError) as error:
        raise Failure(f"--out: {error}") from error


def _old_rows(path: Path) -> list[Row]:
    from bigkern.benchmarks import table

    try:
        rows = [row for file in table.files(path) for row in table.read(file)]
    except (OSError, ValueError) as error:
        raise Failure(f"--compare: {error}") from error
    if not rows:
        raise Failure(f"--compare: no results in {path}")
    return rows


def _measure(name: str, bench: Bench, dtype: str | None, only: list[str]) -> list[Row]:
    from bigkern.benchmarks import breakdown, harness

    module = import_module(f"bigkern.benchmarks.bench_{name}")
    bench.console.say(f"\n{name}")
    rows: list[Row] = []
    for case in module.cases(bench):
        if not all(word.lower() in case.problem.label.lower() for word in only):
            continue
        dtypes = [getattr(torch, dtype)] if dtype else case.dtypes
        for kind in dtypes:
            found = harness.measure(case, kind, bench)
            rows += found
            _show(found, bench.console)
    if bench.breakdowns:
        bench.console.say()
        bench.console.table(*breakdown.table(bench.breakdowns))
    return rows


def _write(path: Path, rows: list[Row], bench: Bench, part: bool) -> None:
    """The CSV, where the time went, and the figures; a part leaves what it does not have as it was."""
    from bigkern.benchmarks import breakdown, table

    table.write(path, table.merged(table.read(path), rows) if part and path.exists() else rows)
    times = path.with_name(f"{path.stem}_time.json")
    if bench.breakdowns:
        breakdown.write(times, bench.breakdowns, part)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        bench.console.say("no figure: matplotlib is not installed (pip install 'bigkern[cli]')")
    else:
        import_module("bigkern.benchmarks.plot").plot(path)
        if bench.breakdowns:
            breakdown.plot(times)
    bench.breakdowns.clear()


def _show(rows: list[Row], console: Console) -> None:
    first = rows[0]
    console.say(f"\n{first.case}, {first.dtype}")
    if first.wrong:  # bigkern's own
        console.say(f"  wrong result, not timed: {first.wrong}")
        return
    timed = [row for row in rows if not row.wrong]
    scale, unit = (1e3, "us") if max(row.ms for row in timed) < 1 else (1.0, "ms")
    lines = [
        (
            row.mode,
            row.contestant,
            row.backend,
            f"{scale * row.ms:.3g}",
            f"{scale * row.p20_ms:.3g} to {scale * row.p80_ms:.3g}",
            _optional(row.rate, f"{row.rate:.3g} {row.unit}"),
            _optional(row.share, f"{100 * row.share:.0f} %"),
            _optional(row.peak_mb, f"{row.peak_mb:.0f}"),
            _optional(row.saved_mb, f"{row.saved_mb:.3g}"),
            _optional(row.processor_ms, f"{scale * row.processor_ms:.3g}"),
            _optional(row.state_mb, f"{row.state_mb:.4g}"),
            _optional(row.step_us, f"{row.step_us:.3g}"),
            "" if row.contestant == "bigkern" else f"{row.speedup:.2f}x",
        )
        for row in timed
    ]
    columns = (
        "mode",
        "",
        "backend",
        unit,
        "p20 to p80",
        "rate",
        "of peak",
        "peak MB",
        "saved MB",
        f"processor {unit}",
        "state MB",
        "us a step",
        "bigkern's speed-up",
    )
    used = [i for i in range(len(columns)) if any(line[i] != "-" for line in lines)]
    console.table([columns[i] for i in used], [tuple(line[i] for i in used) for line in lines])
    for row in rows:
        if row.wrong:
            console.say(f"  left out: {' '.join((row.contestant, row.mode)).strip()}: {row.wrong}")


def _summarise(rows: list[Row], console: Console) -> dict[str, Any]:
    """The sweep's geometric means and its losses, at a glance."""
    from bigkern.benchmarks import summary

    points = summary.points(rows)
    lines = summary.lines(points)
    said = summary.verdicts(points)
    if lines:
        console.say("\nbigkern's speed-up, geometric means")
        cells = [
            (
                line.group,
                line.dtype,
                line.mode,
                line.points,
                f"{line.over_stock:.2f}x",
                f"{line.over_fastest:.2f}x",
                f"{line.worst.fastest:.2f}x over {line.worst.who}: {line.worst.row.case}",
            )
            for line in lines
        ]
        columns = ("", "dtype", "mode", "points", "over stock", "over the fastest", "worst point")
        console.table(columns, cells)
    for line in said:
        console.say(line)
    return {"lines": [asdict(line) for line in lines], "verdicts": said}


def _optional(value: float, words: str) -> str:
    return "-" if math.isnan(value) else words


def _peaks(bench: Bench) -> str:
    words = [
        f"copy {rate:.0f} GB/s" if n == "copy" else f"{n} products {rate:.2f} TFLOP/s"
        for n, rate in bench.peaks.items()
    ]
    cached = "a share above 100 % means that the data fitted into a cache"
    return f"peaks measured here: {', '.join(words)}; {cached}\n" if words else ""
