"""Files that are whole or absent: filled under another name, and put in place when they are complete.

The other name ends with the id of the process that writes, so that what a killed process has left is known.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bigkern.terminal.console import Failure, RunFailed

PARTIAL = re.compile(r"\..+\.([0-9]{1,9})\.partial")


def partial(path: Path) -> Path:
    """Where ``path`` is filled until it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then put it in place: never half a file.

    Raises:
        RunFailed: it cannot be written.
    """
    scratch = partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(scratch)
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise RunFailed(f"cannot write {path}: {error.strerror or error}") from error


def require_writable(folder: Path) -> None:
    """Find out whether files can be written into ``folder``, which need not exist; leaves nothing there.

    Raises:
        Failure: they cannot.
    """
    missing: list[Path] = []
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: Python 3.10 on a loop of links
        raise Failure(f"cannot write to {folder}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def sweep(folder: Path) -> None:
    """Remove what processes that run no longer have left half written in ``folder``."""
    for path in folder.glob(".*.partial"):
        match = PARTIAL.fullmatch(path.name)
        if match is None or _runs(int(match[1])):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    """Return whether another process has this id."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is another user's
    return True
