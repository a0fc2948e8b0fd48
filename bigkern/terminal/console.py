"""What the commands print: tables, progress and JSON, pretty where there is a terminal and rich."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

import torch

from bigkern.core import info

INTERRUPTED = 130  # the shell's exit code for Ctrl-C


class Failure(Exception):
    """A wrong call, which the user can mend: printed as one line, without a traceback."""

    code = 2


class RunFailed(Failure):
    """The call was right, and the work failed."""

    code = 1


class OutputClosed(RunFailed):
    """Nobody reads standard output any more, or what it goes to is full."""


class Console:
    """Prints for people, or with ``--json`` one JSON document on stdout and the rest on stderr."""

    def __init__(self, as_json: bool = False):
        self.as_json = as_json
        standard = sys.stderr if as_json else sys.stdout
        self._out: TextIO = standard or open(os.devnull, "w")  # noqa: SIM115 - closed when the process ends
        self._rich: Any = None
        if self._out.isatty():
            try:
                from rich.console import Console as RichConsole

                self._rich = RichConsole(file=self._out, highlight=False)
            except ImportError:
                pass

    def say(self, text: str = "") -> None:
        if self._rich is not None:
            self._rich.print(text, markup=False)
        else:
            _print(text, self._out)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
        """Numbers to the right, words to the left; the last column takes the width that is left."""
        cells = [[str(cell) for cell in row] for row in rows]
        numeric = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(columns))]
        if self._rich is not None:
            from rich.table import Table

            table = Table(title=title, title_justify="left", box=None, pad_edge=False)
            for column, right in zip(columns, numeric, strict=True):
                table.add_column(column, justify="right" if right else "left", overflow="fold")
            for row in cells:
                table.add_row(*(cell.replace("[", "\\[") for cell in row))
            self._rich.print(table)
            return
        widths = [max(len(column), *(len(row[i]) for row in cells), 0) for i, column in enumerate(columns)]
        if title:
            self.say(title)
        for row in [list(columns), *cells]:
            padded = (
                c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True)
            )
            self.say("  ".join(padded).rstrip())

    def emit(self, document: Any) -> None:
        """Print the command's JSON document, if JSON was asked for."""
        if self.as_json:
            _print(to_json(document), sys.stdout)

    def progress(self, total: int, start: int = 0, lines: int = 20) -> Progress:
        return Progress(self, total, start, lines)


def to_json(document: Any) -> str:
    """The document as JSON, which has no NaN and no infinities: they become null."""
    return json.dumps(_finite(document), indent=2, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _print(text: str, out: TextIO) -> None:
    """Print at once; characters that ``out`` cannot show become question marks.

    Raises:
        OutputClosed: it cannot be written; what is said from now on is dropped.
    """
    encoding = getattr(out, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), file=out, flush=True)
    except OSError as error:
        if out is sys.__stdout__:  # or Python would try once more at its end
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), out.fileno())
        name = "standard error" if out is sys.stderr else "standard output"
        raise OutputClosed(f"cannot write to {name}: {error.strerror}") from error


def _is_number(cell: str) -> bool:
    try:
        float(cell.rstrip("x%").replace(",", "") or "x")
    except ValueError:
        return cell == "-"
    return True


class Progress:
    """A bar on a terminal, about ``lines`` plain lines elsewhere; shows a caption and the time left."""

    def __init__(self, console: Console, total: int, start: int, lines: int):
        self._console = console
        self._total = total
        self._first = self._done = start
        self._every = max(1, total // lines)
        self._began = time.perf_counter()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self._console._rich is not None:
            from rich import progress as bars

            columns = (
                bars.BarColumn(),
                bars.MofNCompleteColumn(),
                bars.TextColumn("{task.description}"),
                bars.TimeRemainingColumn(),
            )
            self._bar = bars.Progress(*columns, console=self._console._rich)
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total, completed=self._done)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, caption: str) -> None:
        before, self._done = self._done, done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=caption)
        elif done == self._total or done // self._every > before // self._every:
            elapsed = time.perf_counter() - self._began
            left = elapsed / max(1, done - self._first) * (self._total - done)
            self._console.say(f"{done:>{len(str(self._total))}}/{self._total}  {caption}  {left:4.0f} s left")


def machine() -> dict[str, Any]:
    """The machine and the versions that a result belongs to."""
    import platform

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "bigkern": info.version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _cpu_name() -> str:
    import platform

    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
