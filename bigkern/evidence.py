"""What has been shown to be right, and on which architecture.

A GPU kernel is used by default on an architecture only when it passed there. The proof is an entry in
one of two files of the same form: ``evidence.json`` beside this module, committed with the kernels, or
the one that ``bigkern doctor --verify`` writes into the user's cache.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

COMMITTED = Path(__file__).with_name("evidence.json")


@dataclass(frozen=True, slots=True)
class Entry:
    """``backend`` of ``op`` passed every parity case on ``arch`` with these versions."""

    op: str
    backend: str
    arch: str
    cases: int
    machine: str
    torch: str
    bigkern: str


def user_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "bigkern" / "evidence.json"


def read(path: Path) -> list[Entry]:
    if not path.exists():
        return []
    try:
        return [Entry(**row) for row in json.loads(path.read_text())["entries"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an evidence file ({error}); delete it or write it anew") from error


def write(path: Path, entries: list[Entry]) -> None:
    """Replace the entries of the same op, backend and arch in ``path``; atomic."""
    kept = {(e.op, e.backend, e.arch): e for e in read(path)}
    kept.update({(e.op, e.backend, e.arch): e for e in entries})
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(kept[key]) for key in sorted(kept)]
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps({"entries": rows}, indent=2) + "\n")
    scratch.replace(path)
    _entries.cache_clear()


@cache
def _entries() -> frozenset[tuple[str, str, str]]:
    return frozenset((e.op, e.backend, e.arch) for e in [*read(COMMITTED), *read(user_file())])


def verified(op: str, backend: str, arch: str) -> bool:
    return (op, backend, arch) in _entries()


@cache
def device_arch(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"
