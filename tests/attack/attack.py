"""Attack bigkern: random calls, valid and not, in processes whose memory is guarded.

    python tests/attack/attack.py --calls 100000                 some of every kind
    python tests/attack/attack.py --kind native --seed 1234      one call again

Kinds: ``public``, the public functions held to float64; ``bad``, the same with one argument spoiled, which
must raise an error that names it; ``op`` and ``native``, ``torch.ops.bigkern`` and
``torch.ops.bigkern_native`` with arguments that a caller of theirs might get wrong: they raise, or are right.
A crash or a hang ends the process that made the call; another one goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LIBRARY = ROOT / "build" / "attack" / "guard_allocator.so"
KINDS = ("public", "bad", "op", "native")
FAULTS = {"crash": "crashes", "hang": "hangs", "wrong": "wrong", "unnamed": "unnamed errors"}
BATCH = 250  # calls of one process
WAIT = 60.0  # seconds that a call may take on a busy machine
START = 300.0  # and a process until it makes its first
LOOK_BACK = (0, 1, 7, 63)  # calls before the one that crashed, any of which may be at fault


@dataclass(frozen=True)
class Finding:
    kind: str
    first: int
    count: int
    fault: str  # one of FAULTS
    message: str

    def __str__(self) -> str:
        count = f" --count {self.count}" if self.count > 1 else ""
        again = f"python tests/attack/attack.py --kind {self.kind} --seed {self.first}{count}"
        return f"{self.fault}: {self.message}\n    {again}"


@dataclass(frozen=True)
class Outcome:
    """What became of a process: the number of its last call, how that ended, and the calls judged bad."""

    last: int
    fault: str  # "", "crash" or "hang"
    message: str
    findings: list[Finding]


def guard_allocator() -> Path:
    """The preloaded allocator, compiled if its source is newer."""
    source = HERE / "guard_allocator.cpp"
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime < source.stat().st_mtime:
        LIBRARY.parent.mkdir(parents=True, exist_ok=True)
        made = LIBRARY.with_suffix(f".{os.getpid()}")
        options = ["-O2", "-std=c++17", "-shared", "-fPIC", "-fno-builtin"]
        subprocess.run([_compiler(), *options, "-o", made, source], check=True)
        made.replace(LIBRARY)  # whole, whoever else compiles it
    return LIBRARY


def _compiler() -> str:
    return os.environ.get("CXX") or shutil.which("g++") or "c++"


# ---- one process -------------------------------------------------------------------------------------


def run(kind: str, first: int, count: int, wait: float = WAIT) -> Outcome:
    """Make calls ``first`` to ``first + count`` in a process, up to the one that ends it."""
    environment = os.environ | {"LD_PRELOAD": str(guard_allocator()), "TRITON_INTERPRET": "0"}
    command = [sys.executable, HERE / "worker.py", kind, str(first), str(count)]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment) as worker,
    ):
        last, name, findings, hung = first, kind, [], False
        for line in _lines(worker, wait):
            if line is None:
                hung = True
                worker.kill()
                break
            word, number, *rest = line.split(maxsplit=2)
            last = int(number)
            if word == "call":
                name = rest[0]
            if word == "end" and (found := json.loads(rest[0])):
                findings.append(Finding(kind, last, 1, found[0], f"{name}: {found[1]}"))
        status = worker.wait()
        if hung:
            return Outcome(last, "hang", f"{name}: no answer after {wait:.0f} seconds", findings)
        if status != 0:
            return Outcome(last, "crash", f"{name}: exit status {status}: {_end_of(errors)}", findings)
    return Outcome(last, "", "", findings)


def _lines(worker: subprocess.Popen[bytes], wait: float) -> Iterator[str | None]:
    """What the worker prints; None if nothing comes for so long."""
    assert worker.stdout is not None
    pending, patience = b"", START
    while True:
        if not select.select([worker.stdout], [], [], patience)[0]:
            yield None
            return
        patience = wait
        some = os.read(worker.stdout.fileno(), 1 << 16)
        if not some:
            return
        *whole, pending = (pending + some).split(b"\n")
        yield from (line.decode() for line in whole)


def _end_of(errors: IO[bytes]) -> str:
    """Why the process ended, by the guard allocator, faulthandler or Python, and where."""
    errors.seek(0)
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith("Extension modules")]
    if lines and not any(word in line for line in lines for word in ("guard allocator", "Fatal")):
        lines = lines[-3:]  # a traceback tells most at its end
    return " | ".join(lines[:6])[:500]


# ---- many --------------------------------------------------------------------------------------------


def batch(kind: str, first: int, count: int, wait: float = WAIT) -> list[Finding]:
    """All findings of these calls: behind one that ends its process, another goes on."""
    findings, end = [], first + count
    while first < end:
        outcome = run(kind, first, end - first, wait)
        findings += outcome.findings
        if outcome.fault == "crash":
            findings.append(_narrowed(kind, first, outcome, wait))
        elif outcome.fault:
            findings.append(Finding(kind, outcome.last, 1, outcome.fault, outcome.message))
        first = outcome.last + 1
    return findings


def _narrowed(kind: str, first: int, outcome: Outcome, wait: float) -> Finding:
    """The fewest calls up to the last one that end a process as they did."""
    for back in LOOK_BACK:
        begin = max(first, outcome.last - back)
        again = run(kind, begin, outcome.last + 1 - begin, wait)
        if again.fault == "crash":
            return Finding(kind, begin, outcome.last + 1 - begin, again.fault, again.message)
    return Finding(kind, first, outcome.last + 1 - first, outcome.fault, outcome.message)


def attack(kinds: list[str], first: int, calls: int, jobs: int) -> dict[str, list[Finding]]:
    """``calls`` of each kind from number ``first`` on: findings as they come, and a progress bar."""
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    guard_allocator()
    pieces = [
        (k, n, min(BATCH, first + calls - n)) for n in range(first, first + calls, BATCH) for k in kinds
    ]
    findings: dict[str, list[Finding]] = {kind: [] for kind in kinds}
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, ThreadPoolExecutor(jobs) as pool:
        bar = progress.add_task("calls", total=calls * len(kinds))

        def one(piece: tuple[str, int, int]) -> None:
            found = batch(*piece)
            findings[piece[0]] += found
            for finding in found:
                progress.console.print(str(finding), markup=False, highlight=False, soft_wrap=True)
            progress.advance(bar, piece[2])

        list(pool.map(one, pieces))
    return findings


def report(findings: dict[str, list[Finding]], calls: int, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{calls * len(findings):,} calls in {seconds:.0f} seconds")
    for column in ("kind", "calls", *FAULTS.values()):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind, found in findings.items():
        counts = Counter(finding.fault for finding in found)
        table.add_row(kind, f"{calls:,}", *(str(counts[fault]) for fault in FAULTS))
    Console().print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=20_000, help="of all kinds together")
    parser.add_argument("--kind", action="append", choices=KINDS, help="a kind; by default all of them")
    parser.add_argument("--seed", type=int, help="make this call only, or --count calls from it on")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the seed of the first call")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def main() -> int:
    given = arguments()
    kinds = given.kind or list(KINDS)
    begin = time.monotonic()
    if given.seed is not None:
        first, calls = given.seed, given.count
    else:
        first, calls = given.first, -(-given.calls // len(kinds))
    findings = attack(kinds, first, calls, given.jobs)
    report(findings, calls, time.monotonic() - begin)
    return int(any(findings.values()))


if __name__ == "__main__":
    sys.exit(main())
