"""Merge what the test processes recorded into ``build/parity.csv`` and print the parity table."""

from __future__ import annotations

import csv
from pathlib import Path

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


def main() -> None:
    rows = merged()
    with (BUILD / "parity.csv").open("w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS)
        out.writeheader()
        out.writerows(rows)
    print("worst error over stock's own error (allowed: 2 forward, 3 gradient)")
    for row in rows:
        line = "  {op:<14} {backend:<7} {dtype:<9} {tier:<12} {kind:<9} {worst_ratio:>7} {cases:>6} cases"
        print(line.format(**row))


if __name__ == "__main__":
    main()
