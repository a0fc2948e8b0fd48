"""Merge what the test processes recorded into ``build/parity.csv`` and print the parity table.

Prints besides what mistakes the rule has caught. Exits with 1 if a row is outside the rule.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from bigkern.core.parity import FACTOR, GRADIENT_FACTOR

BUILD = Path(__file__).parent.parent / "build"
COLUMNS = ["op", "backend", "dtype", "tier", "kind", "worst_ratio", "cases"]


def merged() -> list[dict[str, str]]:
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for file in sorted((BUILD / "parity").glob("*.csv")):
        for row in csv.DictReader(file.open()):
            key = tuple(row[column] for column in COLUMNS[:5])
            before = rows.setdefault(key, {**row, "worst_ratio": "0", "cases": "0"})
            before["worst_ratio"] = max(before["worst_ratio"], row["worst_ratio"], key=float)
            before["cases"] = str(int(before["cases"]) + int(row["cases"]))
    return [rows[key] for key in sorted(rows)]


def main() -> int:
    rows = merged()
    with (BUILD / "parity.csv").open("w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS)
        out.writeheader()
        out.writerows(rows)
    print(f"worst error over stock's own error (allowed: {FACTOR:g} forward, {GRADIENT_FACTOR:g} gradient)")
    outside = 0
    for row in rows:
        line = "  {op:<21} {backend:<7} {dtype:<9} {tier:<12} {kind:<9} {worst_ratio:>7} {cases:>6} cases"
        allowed = GRADIENT_FACTOR if row["kind"] == "gradient" else FACTOR
        wrong = float(row["worst_ratio"]) > allowed
        outside += wrong
        print(line.format(**row) + ("   outside the rule" if wrong else ""))
    print_mistakes()
    return 1 if outside else 0


def print_mistakes() -> None:
    """What was planted in each op and caught, in how many of its sums."""
    rows = [row for file in (BUILD / "planted").glob("*.csv") for row in csv.DictReader(file.open())]
    found = {(row["op"], row["dtype"], row["mistake"]): row["found"] for row in rows}
    mistakes = list(dict.fromkeys(row["mistake"] for row in rows))
    print("\nmistakes planted and caught (k/n: in k of the op's n sums it shows, and each was caught)")
    print("  " + " | ".join([f"{'op and dtype':<24}", *mistakes]))
    for op, dtype in sorted({key[:2] for key in found}):
        cells = [f"{found.get((op, dtype, mistake), '-'):<{len(mistake)}}" for mistake in mistakes]
        print("  " + " | ".join([f"{op + ' ' + dtype:<24}", *cells]))


if __name__ == "__main__":
    sys.exit(main())
