"""Merge what the test processes saw pass into ``build/features.csv``, and hold the docs's table to it.

python tests/feature_table.py            print the table
python tests/feature_table.py --write    put it into docs/evidence.md
python tests/feature_table.py --check    fail if it names a feature and backend that did not pass
"""

from __future__ import annotations

import csv
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD, PAGE = ROOT / "build", ROOT / "docs" / "evidence.md"
BEGIN, END = "<!-- features: written by tests/feature_table.py -->", "<!-- end of features -->"
BACKENDS = {"cpu": "CPU, native", "triton": "Triton, interpreter", "simt": "CUDA, emulator"}
COLUMNS = ["op", "feature", "backend", "tier", "cases"]


def merged() -> Counter[tuple[str, str, str, str]]:
    """Cases passed by (op, feature, backend, tier), in the order in which features were first seen."""
    found: Counter[tuple[str, str, str, str]] = Counter()
    for file in sorted((BUILD / "features").glob("*.csv")):
        for row in csv.DictReader(file.open()):
            found[row["op"], row["feature"], row["backend"], row["tier"]] += int(row["cases"])
    return found


def table(found: Counter[tuple[str, str, str, str]]) -> str:
    """A row for each op and feature, a column for each backend: how many cases passed."""
    lines = ["| op | feature | " + " | ".join(BACKENDS.values()) + " |", "|---|---|" + "---|" * len(BACKENDS)]
    cases: Counter[tuple[str, str, str]] = Counter()
    for (op, feature, backend, _), count in found.items():
        cases[op, feature, backend] += count
    for op, feature in sorted({(op, feature) for op, feature, _ in cases}):
        cells = [
            f"{cases[op, feature, backend]:,}" if cases[op, feature, backend] else "" for backend in BACKENDS
        ]
        lines.append(f"| `{op}` | {feature} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def claimed(text: str) -> set[tuple[str, str, str]]:
    """(op, feature, backend) that docs/evidence.md's table has a number for."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    return {
        (row[0].strip("`"), row[1], backend)
        for row in rows
        for backend, cell in zip(BACKENDS, row[2:], strict=True)
        if cell
    }


def main() -> int:
    found = merged()
    with (BUILD / "features.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(COLUMNS)
        out.writerows([*key, count] for key, count in sorted(found.items()))
    page = PAGE.read_text()
    between = re.compile(f"{re.escape(BEGIN)}\n(.*?)\n{re.escape(END)}", re.DOTALL)
    if "--write" in sys.argv:
        PAGE.write_text(between.sub(f"{BEGIN}\n{table(found)}\n{END}", page))
    elif "--check" in sys.argv:
        stands = between.search(page)
        passed = {(op, feature, backend) for op, feature, backend, _ in found}
        ran = {backend for _, _, backend in passed}
        missing = [("no op", "any", "backend")]  # without a table nothing is right
        if stands:
            missing = sorted(claim for claim in claimed(stands.group(1)) - passed if claim[2] in ran)
        for op, feature, backend in missing:
            print(f"{PAGE.name}: {op} has passed with {feature!r} on {backend}, but this run did not show it")
        return 1 if missing else 0
    else:
        print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
