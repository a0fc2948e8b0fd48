"""Figures of ``bigkern train``, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigkern.terminal.console import Console
from bigkern.terminal.files import write_atomically

Curve = Sequence[tuple[int, float]]  # (step, loss)
Curves = dict[str, dict[str, Curve]]  # run -> "train" and "validation"
COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce")


def _pyplot(console: Console) -> Any:
    try:
        import matplotlib
    except ImportError:
        console.say("no figure: matplotlib is not installed (pip install 'bigkern[cli]')")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def losses(path: Path, runs: Curves, console: Console) -> str | None:
    """Loss against steps: training thin, validation dotted. Returns where it was written."""
    if (plt := _pyplot(console)) is None:
        return None
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    _draw_losses(axes, runs)
    return _save(plt, figure, path)


def comparison(
    path: Path, runs: Curves, rates: dict[str, tuple[float, float, float]], console: Console
) -> str | None:
    """Losses on the left; on the right tokens/s, the median with p20 and p80."""
    if (plt := _pyplot(console)) is None:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    _draw_losses(left, runs)
    names = list(rates)
    low, middle, high = zip(*rates.values(), strict=True)
    spread = [
        [m - a for m, a in zip(middle, low, strict=True)],
        [b - m for m, b in zip(middle, high, strict=True)],
    ]
    right.barh(names, middle, xerr=spread, color=COLOURS[: len(names)], capsize=3)
    right.invert_yaxis()
    right.set_xlabel("tokens/s (median, p20 to p80)")
    return _save(plt, figure, path)


def _draw_losses(axes: Any, runs: Curves) -> None:
    for i, (colour, (name, curves)) in enumerate(zip(COLOURS, runs.items(), strict=False)):
        width = 0.8 + 1.6 * (len(runs) - 1 - i)  # curves that coincide stay visible, the later on the earlier
        axes.plot(*zip(*curves["train"], strict=True), color=colour, linewidth=width, label=f"{name}, train")
        if curves["validation"]:
            points = list(zip(*curves["validation"], strict=True))
            axes.plot(*points, "o:", color=colour, markersize=3 + 2 * width, label=f"{name}, validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _save(plt: Any, figure: Any, path: Path) -> str:
    write_atomically(path, lambda scratch: figure.savefig(scratch, format="png", dpi=120))
    plt.close(figure)
    return str(path)
