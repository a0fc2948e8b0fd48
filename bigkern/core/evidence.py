"""What has been shown to be right, and on which architecture.

A GPU kernel is used by default on an architecture only when it passed there, with these versions of torch and
bigkern. The proof is an entry in one of two files of the same form: ``evidence.json`` beside this module,
committed with the kernels, or the one that ``bigkern doctor --verify`` writes into the user's cache. They are
read once, when this module is imported; one that cannot be read is a warning, and proves nothing.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
import warnings
from dataclasses import asdict, dataclass, fields
from importlib import metadata
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

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int if field.type == "int" else str) or isinstance(value, bool):
                raise TypeError(f"{field.name} must be of type {field.type}, not {type(value).__name__}")


def version() -> str:
    """bigkern's, as it is installed."""
    try:
        return metadata.version("bigkern")
    except metadata.PackageNotFoundError:
        return "source"


def user_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~"), ".cache")
    return Path(root) / "bigkern" / "evidence.json"


def read(path: Path) -> list[Entry]:
    try:
        return [Entry(**row) for row in json.loads(_text(path))["entries"]]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not an evidence file ({error}); delete it or write it anew") from error


def _text(path: Path) -> str:
    """The text of a regular file; opening anything else must not wait for a writer."""
    with open(path, encoding="utf-8", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        return file.read()


def write(path: Path, entries: list[Entry]) -> None:
    """Replace the entries of the same op, backend and arch in ``path``; atomic."""
    kept = {(e.op, e.backend, e.arch): e for e in read(path)}
    kept.update({(e.op, e.backend, e.arch): e for e in entries})
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(kept[key]) for key in sorted(kept)]
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as scratch:
        scratch.write(json.dumps({"entries": rows}, indent=2) + "\n")
    os.replace(scratch.name, path)
    refresh()


def refresh() -> None:
    """Read both files again."""
    global proven
    entries: list[Entry] = []
    for path in (COMMITTED, user_file()):
        try:
            entries += read(path)
        except ValueError as error:
            warnings.warn(f"{error}: its entries are ignored", stacklevel=2)
    proven = frozenset((e.op, e.backend, e.arch) for e in entries if _counts(e))


def _counts(entry: Entry) -> bool:
    """Whether an entry is about what runs here."""
    return entry.cases > 0 and (entry.torch, entry.bigkern) == (torch.__version__, version())


proven: frozenset[tuple[str, str, str]] = frozenset()
refresh()


def verified(op: str, backend: str, arch: str) -> bool:
    return (op, backend, arch) in proven


_archs: dict[int, str] = {}


def device_arch(index: int) -> str:
    arch = _archs.get(index)
    if arch is None:
        major, minor = torch.cuda.get_device_capability(index)
        arch = f"sm_{major}{minor}"
        if not torch.compiler.is_compiling():
            _archs[index] = arch
    return arch
