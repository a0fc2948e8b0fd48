"""Every figure of the benchmarks, from their CSVs alone: ``python -m bigkern.benchmarks.plot FOLDER``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bigkern.benchmarks.summary import LOSS, STOCK
from bigkern.benchmarks.table import Row, files, read

COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#64748b", "#0e7490", "#ca8a04", "#be185d", "#4d7c0f")


AXIS = ": "


def plot(path: Path) -> list[Path]:
    """PNGs beside a CSV, for each dtype and device in it: lines of its sweep, bars of everything else.

    Panels named "what: axis" are one figure a device, of speed-ups.
    """
    import matplotlib

    matplotlib.use("Agg")

    rows = [row for row in read(path) if not row.wrong]
    written = []
    for device in sorted({row.device for row in rows}):
        stars = [row for row in rows if row.device == device and AXIS in row.panel]
        if stars:
            written.append(path.with_name(f"{path.stem}-{device}-speedup.png"))
            _speedups(stars, written[-1])
    for device, dtype in sorted({(row.device, row.dtype) for row in rows}):
        chosen = [row for row in rows if (row.device, row.dtype) == (device, dtype)]
        sweep = [row for row in chosen if row.panel and AXIS not in row.panel]
        others = [row for row in chosen if not row.panel]
        for kind, some, draw in (("-sweep", sweep, _lines), ("", others, _bars)):
            if some:
                target = path.with_name(f"{path.stem}-{device}-{dtype}{kind}.png")
                draw(some, target)
                written.append(target)
    return written


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _save(figure: Any, rows: list[Row], target: Path) -> None:
    import matplotlib.pyplot as plt

    first = rows[0]
    dtypes = ", ".join(_unique(row.dtype for row in rows))
    figure.suptitle(f"{first.op}, {dtypes}, {first.machine}, torch {first.torch}", fontsize=9)
    figure.savefig(target, dpi=120)
    plt.close(figure)


# ---- a sweep ---------------------------------------------------------------------------------------


def _lines(rows: list[Row], target: Path) -> None:
    """The rate over x: a column for each panel, a row for forward and one for backward, a line for each."""
    import matplotlib.pyplot as plt

    panels = _unique(row.panel for row in rows)
    modes = [mode for mode in ("forward", "backward") if any(row.mode == mode for row in rows)]
    contestants = _unique(row.contestant for row in rows)
    size = (3.4 * len(panels) + 1.6, 2.7 * len(modes) + 0.5)
    figure, axes = plt.subplots(len(modes), len(panels), figsize=size, squeeze=False, layout="constrained")
    for i, mode in enumerate(modes):
        for j, panel in enumerate(panels):
            here = [row for row in rows if (row.mode, row.panel) == (mode, panel)]
            _panel(axes[i][j], here, contestants)
            axes[i][j].set_title(f"{mode}, {panel}", fontsize=9)
        axes[i][0].set_ylabel(rows[0].unit, fontsize=8)
    handles = {label: h for a in axes.flat for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside right upper")
    _save(figure, rows, target)


def _panel(axis: Any, rows: list[Row], contestants: list[str]) -> None:
    places = sorted({row.x for row in rows})
    for i, name in enumerate(contestants):
        mine = sorted((row for row in rows if row.contestant == name), key=lambda row: row.x)
        if not mine:
            continue
        colour, first = COLOURS[i % len(COLOURS)], name == "bigkern"
        style = {"lw": 2.2, "zorder": 3, "marker": "o"} if first else {"lw": 1.2, "marker": "."}
        x = [row.x for row in mine]
        axis.plot(x, [row.rate for row in mine], color=colour, label=name, ms=5, **style)
        low, high = (
            [row.rate * row.ms / ms for row, ms in zip(mine, times, strict=True)] for times in _spread(mine)
        )
        axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    peaks = [row.rate / row.share for row in rows if row.share > 0]
    if peaks:
        axis.axhline(max(peaks), color="#94a3b8", ls=":", lw=1, label="a large matrix product")
    axis.set_xscale("log", base=2)
    axis.set_xticks(places, [f"{x / 1024:g}k" if x >= 1024 else f"{x:g}" for x in places], fontsize=7)
    axis.set_xlabel("sequence length", fontsize=8)
    axis.set_ylim(bottom=0)
    axis.tick_params(axis="y", labelsize=7)
    axis.grid(alpha=0.3)


def _spread(rows: list[Row]) -> tuple[list[float], list[float]]:
    return [row.p80_ms for row in rows], [row.p20_ms for row in rows]


# ---- speed-ups over stock --------------------------------------------------------------------------


def _speedups(rows: list[Row], target: Path) -> None:
    """A row for each "what", a column for each of its axes, a line for each dtype, dashed where it trains."""
    import matplotlib.pyplot as plt

    stock = [row for row in rows if row.contestant in STOCK]
    panels: dict[str, list[str]] = {}
    for panel in _unique(row.panel for row in rows):
        panels.setdefault(panel.split(AXIS)[0], []).append(panel)
    dtypes, width = _unique(row.dtype for row in rows), max(map(len, panels.values()))
    size = (3.4 * width + 1.6, 2.7 * len(panels) + 0.5)
    figure, axes = plt.subplots(len(panels), width, figsize=size, squeeze=False, layout="constrained")
    for line, names in zip(axes, panels.values(), strict=True):
        for axis, panel in zip(line, names, strict=False):
            for dtype, mode, style in [(d, m, s) for d in dtypes for m, s in MODES.items()]:
                here = [row for row in stock if (row.panel, row.dtype, row.mode) == (panel, dtype, mode)]
                _speedup_line(axis, here, f"{dtype}, {mode}", COLOURS[dtypes.index(dtype)], style)
            what, over = panel.split(AXIS)
            axis.set_title(f"{what}, over {over}", fontsize=9)
            axis.axhline(1, color="#94a3b8", ls=":", lw=1)
            axis.axhspan(0, LOSS, color="#94a3b8", alpha=0.12, lw=0)
            axis.set_xscale("log", base=2)
            places = sorted({row.x for row in rows if row.panel == panel})
            axis.set_xticks(places, [f"{x:g}" for x in places], fontsize=7)
            axis.set_ylim(bottom=0)
            axis.tick_params(axis="y", labelsize=7)
            axis.grid(alpha=0.3)
        line[0].set_ylabel("speed-up over stock", fontsize=8)
    handles = {label: h for a in axes.flat for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside right upper")
    _save(figure, rows, target)


MODES = {"forward": "-", "both": "--"}


def _speedup_line(axis: Any, rows: list[Row], label: str, colour: str, style: str) -> None:
    if not rows:
        return
    points = sorted((row.x, row.speedup, row.speedup_p20, row.speedup_p80) for row in rows)
    x, speedup, low, high = zip(*points, strict=True)
    axis.plot(x, speedup, style, color=colour, label=label, marker="o", ms=4, lw=1.6)
    axis.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)


# ---- single cases ----------------------------------------------------------------------------------


def _bars(rows: list[Row], target: Path) -> None:
    """Medians, p20 to p80 as whiskers: a column for each mode, a group of bars for each case."""
    import matplotlib.pyplot as plt

    modes, cases = _unique(row.mode for row in rows), _unique(row.case for row in rows)
    contestants = _unique(row.contestant for row in rows)
    size = (4.2 * len(modes) + 2.5, 0.6 + 0.75 * len(cases))
    figure, axes = plt.subplots(1, len(modes), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, mode in zip(axes[0], modes, strict=True):
        _bars_of([row for row in rows if row.mode == mode], axis, cases, contestants)
        axis.set_title(mode, fontsize=9)
    handles = {label: h for a in axes.flat for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=7, loc="outside right upper")
    _save(figure, rows, target)


def _bars_of(rows: list[Row], axis: Any, cases: list[str], contestants: list[str]) -> None:
    by_case = {case: [row for row in rows if row.case == case] for case in cases}
    height = 0.8 / max(map(len, by_case.values()))
    for i, name in enumerate(contestants):
        mine = [
            (at, row) for here in by_case.values() for at, row in enumerate(here) if row.contestant == name
        ]
        if not mine:
            continue
        counts = [len(by_case[row.case]) for _, row in mine]
        places = [
            cases.index(row.case) + (at - (count - 1) / 2) * height
            for (at, row), count in zip(mine, counts, strict=True)
        ]
        values = [row.ms for _, row in mine]
        whiskers = [[row.ms - row.p20_ms for _, row in mine], [row.p80_ms - row.ms for _, row in mine]]
        colour = COLOURS[i % len(COLOURS)]
        axis.barh(places, values, height * 0.9, xerr=whiskers, color=colour, label=name, error_kw={"lw": 0.7})
    times = [row.ms for row in rows]
    if max(times) > 30 * min(times):
        axis.set_xscale("log")
    axis.set_yticks(range(len(cases)), cases, fontsize=7)
    axis.set_ylim(len(cases) - 0.5, -0.5)
    axis.set_xlabel("ms", fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(axis="x", alpha=0.3)


def main(folders: list[str]) -> None:
    """Draw what lies in the folders, and print where."""
    from bigkern.benchmarks import breakdown

    for folder in folders:
        for file in files(Path(folder)):
            print(*plot(file), sep="\n")
        for file in sorted(Path(folder).rglob("*_time.json")):
            print(*breakdown.plot(file), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:] or ["."])
