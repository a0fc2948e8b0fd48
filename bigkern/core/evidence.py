"""What has been shown to be right, and where.

A GPU kernel runs by default only if it passed there: on this GPU, with these versions of torch, driver and
Triton, from these sources, for the dtype and for every **variant** of the call, the words for options that
choose other code ("window", "dropout"; "plain" where there are none). ``bigkern tune`` proves kernels, and
writes what it found into ``proven.json`` in your cache; what we have proven is shipped with the package.

{"version": 2,
 "proven": {
  "nvidia-h200-sm90-132-227k, torch 2.11.0, driver 13.0": {
   "attention, triton, triton 3.6.0, sources 1f3a90bc": {"float32 plain": "pass", "float32 window": "fail"}}}}

The later verdict counts. Files are read when bigkern is imported; one that cannot be read is a warning, and
proves nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import stat
import tempfile
import warnings
from functools import lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, cast

from bigkern.core import device, info
from bigkern.core.wisdom_file import alone

VERSION = 2  # of the files' form
PASS, FAIL, CRASH = "pass", "fail", "crash"
SHIPPED = Path(__file__).parent.parent / "proven.json"

Verdicts = dict[str, str]  # "bfloat16 window" -> pass, fail or crash
Proven = dict[str, dict[str, Verdicts]]  # of a GPU and its software, of a kernel


# ---- what a verdict is about -----------------------------------------------------------------------


@lru_cache
def place(index: int) -> str:
    """Of a GPU, and of the software that runs it."""
    return f"{device.gpu_fingerprint(index)}, {device.gpu_software()}"


@lru_cache
def kernel(op: str, candidate: str) -> str:
    """Of a candidate, and of what it is made."""
    if not candidate.startswith("triton"):
        return f"{op}, {candidate}, sources {info.build().get('sources', 'unknown')}"
    import triton

    return f"{op}, {candidate}, triton {triton.__version__}, sources {_triton_sources()}"


@lru_cache
def _triton_sources() -> str:
    kernels = cast(ModuleSpec, importlib.util.find_spec("bigkern.triton_kernels"))
    return sources_hash(Path(next(iter(kernels.submodule_search_locations or ()))).rglob("*.py"))


def sources_hash(paths: Any) -> str:
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(path.read_bytes())
    return found.hexdigest()[:8]


def verdict(op: str, candidate: str, index: int, variant: str) -> str | None:
    """On this GPU: pass, fail, crash, or None where nothing is known."""
    return verdicts(op, candidate, index).get(variant)


def verdicts(op: str, candidate: str, index: int) -> Verdicts:
    return proven.get(place(index), {}).get(kernel(op, candidate), {})


def count(index: int) -> str:
    """``41 of 43 kinds of calls proven``, of all kernels on this GPU."""
    every = [v for found in proven.get(place(index), {}).values() for v in found.values()]
    return f"{every.count(PASS)} of {len(every)} kinds of calls proven" if every else "nothing proven"


def nothing_proven(index: int) -> bool:
    """Whether no kernel of ours at all has passed on this GPU."""
    return not any(PASS in verdicts.values() for verdicts in proven.get(place(index), {}).values())


# A constant to torch.compile, as torch.compiler.assume_constant_result would mark it, without the second that
# its import takes.
verdict._dynamo_marked_constant = True  # type: ignore[attr-defined]


# ---- files -----------------------------------------------------------------------------------------


def user_file() -> Path:
    return device.cache() / "proven.json"


def read(path: Path) -> Proven:
    """
    Raises:
        ValueError: it is not an evidence file of this version; the message names it.
    """
    try:
        document = json.loads(_text(path))
        if document["version"] != VERSION:
            raise ValueError(f"it has version {document['version']!r}, not {VERSION}")
        found: Proven = document["proven"]
        for kernels in found.values():
            for name, verdicts in kernels.items():
                for variant, said in verdicts.items():
                    if said not in (PASS, FAIL, CRASH):
                        raise ValueError(f"{name} {variant}: {said!r} is not {PASS}, {FAIL} or {CRASH}")
        return found
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not an evidence file ({type(error).__name__}: {error})") from error


def _text(path: Path) -> str:
    """The text of a regular file; opening anything else must not wait for a writer."""
    with open(path, encoding="utf-8", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        return file.read()


def merged(*every: Proven) -> Proven:
    """Later verdicts replace earlier ones."""
    found: Proven = {}
    for proofs in every:
        for where, kernels in proofs.items():
            for name, verdicts in kernels.items():
                found.setdefault(where, {}).setdefault(name, {}).update(verdicts)
    return found


def record(op: str, candidate: str, index: int, verdicts: Verdicts) -> str | None:
    """Remember verdicts and add them to your file; why they are kept for this process alone, or None."""
    global proven
    new: Proven = {place(index): {kernel(op, candidate): verdicts}}
    proven = merged(proven, new)
    path = user_file()
    try:
        with alone(path):
            try:
                known = read(path)
            except ValueError:
                known = {}
            text = json.dumps({"version": VERSION, "proven": merged(known, new)}, indent=1)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as scratch:
                scratch.write(text + "\n")
            os.replace(scratch.name, path)
    except OSError as error:
        return f"cannot write {path} ({error.strerror or error}): kept for this process alone"
    return None


def refresh() -> None:
    """Read both files again."""
    global proven
    found: list[Proven] = []
    for path in (SHIPPED, user_file()):
        try:
            found.append(read(path))
        except ValueError as error:
            warnings.warn(f"{error}: it is ignored; `bigkern tune` writes it anew", stacklevel=2)
    proven = merged(*found)


proven: Proven
refresh()
