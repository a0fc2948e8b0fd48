"""Run the C++ tests: build the CMake tree, then one pytest case for each case of ctest.

Headers, and what is compiled once per instruction set, are also compiled by themselves.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "cmake"
CASE = re.compile(r"^TEST\((\w+)\)", re.MULTILINE)


def cases() -> list[str]:
    """The names that tests/cpp/CMakeLists.txt gives to ctest; reading them takes no build."""
    sources = {
        path.stem: CASE.findall(path.read_text()) for path in sorted((ROOT / "tests/cpp").glob("test_*.cpp"))
    }
    sources["test_simt_asan"] += sources["test_simt"] + sources["test_simt_faults"]
    return [name for stem, found in sources.items() for name in ([f"{stem}.{c}" for c in found] or [stem])]


def shell(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@cache
def build() -> str:
    """Configure and build what is out of date; returns the error, if any. Test processes take turns."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configured = shell("cmake", "-S", ROOT, "-B", BUILD, *generator)
        if configured.returncode != 0:
            return configured.stdout
        keep_going = ["--", "-k", "0"] if generator else ["--", "-k"]
        built = shell("cmake", "--build", BUILD, "--target", "cpp_tests", "--parallel", "2", *keep_going)
        return built.stdout if built.returncode != 0 else ""


def test_everything_builds() -> None:
    error = build()
    assert not error, error[-8000:]


# Pieces from the middle of another file, torch's headers and pybind11's, and what compiles other files.
NOT_ALONE = re.compile(r"vec_(avx2|avx512|portable)\.inl|op(_frozen)?\.h|addresses\.h|foreach_isa\.h")


def headers() -> list[str]:
    files = (file for file in sorted((ROOT / "csrc").rglob("*")) if file.suffix in {".h", ".inl", ".cuh"})
    return [str(file.relative_to(ROOT)) for file in files if not NOT_ALONE.fullmatch(file.name)]


@pytest.mark.parametrize("file", headers())
def test_a_header_stands_alone(file: str) -> None:
    """It includes what it uses; an .inl does too when an editor reads it."""
    include = [f"-I{ROOT / folder}" for folder in ("csrc", "tests")]
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-fsyntax-only", "-w", "-DBIGKERN_SIMT", *include]
    done = shell(*command, "-x", "c++", ROOT / file)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("case", cases())
def test_case(case: str) -> None:
    build()  # One executable that does not build fails its own cases only.
    done = shell("ctest", "--test-dir", BUILD, "--output-on-failure", "-R", f"^{re.escape(case)}$")
    assert done.returncode == 0, done.stdout
    assert "100% tests passed" in done.stdout, done.stdout
