"""Every figure of the benchmarks, from their CSVs alone: ``python -m bigkern.benchmarks.plot FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bigkern.benchmarks.harness import Row, read

COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#64748b", "#0e7490")


def plot(path: Path) -> list[Path]:
    """One PNG for each dtype and device in a CSV, beside it: bars of the median, p20 to p80 as whiskers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in read(path) if not row.wrong]
    written = []
    for device, dtype in sorted({(row.device, row.dtype) for row in rows}):
        chosen = [row for row in rows if (row.device, row.dtype) == (device, dtype)]
        modes = list(dict.fromkeys(row.mode for row in chosen))
        cases = list(dict.fromkeys(row.case for row in chosen))
        size = (4.2 * len(modes) + 2.5, 0.6 + 0.75 * len(cases))
        figure, axes = plt.subplots(
            1, len(modes), figsize=size, sharey=True, squeeze=False, layout="constrained"
        )
        for axis, mode in zip(axes[0], modes, strict=True):
            _bars(axis, [row for row in chosen if row.mode == mode], cases)
            axis.set_title(mode, fontsize=9)
        axes[0][0].legend(fontsize=7)
        first = chosen[0]
        figure.suptitle(f"{first.op}, {dtype}, {first.machine}, torch {first.torch}", fontsize=9)
        target = path.with_name(f"{path.stem}-{device}-{dtype}.png")
        figure.savefig(target, dpi=120)
        plt.close(figure)
        written.append(target)
    return written


def _bars(axis: Any, rows: list[Row], cases: list[str]) -> None:
    contestants = list(dict.fromkeys(row.contestant for row in rows))
    height = 0.8 / len(contestants)
    for i, (name, colour) in enumerate(zip(contestants, COLOURS, strict=False)):
        mine = [row for row in rows if row.contestant == name]
        places = [cases.index(row.case) + (i - (len(contestants) - 1) / 2) * height for row in mine]
        values = [row.ms for row in mine]
        whiskers = [[row.ms - row.p20_ms for row in mine], [row.p80_ms - row.ms for row in mine]]
        axis.barh(places, values, height * 0.9, xerr=whiskers, color=colour, label=name, error_kw={"lw": 0.7})
    axis.set_yticks(range(len(cases)), cases, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("ms", fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(axis="x", alpha=0.3)


if __name__ == "__main__":
    for folder in sys.argv[1:] or ["."]:
        for file in sorted(Path(folder).rglob("*.csv")):
            print(*plot(file), sep="\n")
