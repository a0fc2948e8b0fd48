"""A few hundred attacks of each kind, and that the harness finds what there is to find."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import attack  # noqa: E402

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or shutil.which("g++") is None,
    reason="the guard allocator needs glibc and g++",
)


@pytest.mark.parametrize("kind", attack.KINDS)
def test_random_calls_are_right_or_raise(kind: str) -> None:
    command = [sys.executable, HERE / "attack.py", "--kind", kind, "--calls", "250", "--jobs", "1"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


def test_the_harness_finds_what_is_planted() -> None:
    """Nothing, a crash, a hang, an overrun, memory that nobody wrote, and memory that was freed."""
    found = attack.batch("planted", 0, 6, wait=3.0)
    assert [(finding.first, finding.count, finding.fault) for finding in found] == [
        (1, 1, "crash"),
        (2, 1, "hang"),
        (3, 1, "crash"),
        (4, 1, "wrong"),
        (5, 1, "crash"),
    ]
    told = ("Segmentation fault", "no answer", "written past the end of a block", "nan", "Segmentation fault")
    assert all(words in finding.message for words, finding in zip(told, found, strict=True))
