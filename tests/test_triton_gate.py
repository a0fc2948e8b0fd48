"""The compile-only gate of the Triton kernels, in a process of its own: this one may interpret them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

GATE = Path(__file__).parent / "gate_triton.py"


@pytest.mark.parametrize("arch", ["80", "90"])
def test_kernels_compile_within_their_limits(arch: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    gate = [sys.executable, str(GATE), "--quick", "--arch", arch]
    done = subprocess.run(gate, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_interpreter_is_refused() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(GATE)], capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert "without TRITON_INTERPRET" in done.stderr
