"""Build the CUDA sources for the host against the emulator, and offer them as a backend.

The same ``op.cpp`` and ``*.cu`` that nvcc compiles become ``build/simt/bigkern_simt.so``, whose ops
``bigkern_simt::*`` take CPU tensors and run the kernels in ``tests/simt``.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths

from bigkern.core import library as _library
from bigkern.core import registry

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "simt"
LIBRARY = BUILD / "bigkern_simt.so"

# Ops that live in another's folder, and their modules there.
BESIDE = {"decode_attention": "attention.decode", "grad_norm": "adam.grad_norm"}


def _sources() -> list[Path]:
    csrc = ROOT / "csrc"
    emulator = ROOT / "tests" / "simt"
    return sorted(
        [*csrc.glob("*/op.cpp"), *csrc.glob("*.cu"), *csrc.glob("*/cuda/*.cu"), *emulator.glob("*.cpp")]
    )


def _ninja_file() -> str:
    compiler = os.environ.get("CXX", "g++")
    torch_lib = Path(torch.__file__).parent / "lib"
    headers = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}", *(f"-isystem{path}" for path in include_paths())]
    flags = (
        "-O2 -g1 -fPIC -std=c++20 -Wall -Wextra -Werror -Wno-unknown-pragmas"
        f" -DBIGKERN_SIMT -DBIGKERN_CUDA -DTORCH_TARGET_VERSION=0x020b000000000000 {' '.join(headers)}"
    )
    lines = [
        "rule compile",
        f"  command = {compiler} -MMD -MF $out.d {flags} -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared $in -o $out -L{torch_lib} -ltorch -ltorch_cpu -lc10",
    ]
    objects = []
    for source in _sources():
        target = str(source.relative_to(ROOT).with_suffix(".o"))
        objects.append(target)
        lines.append(f"build {target}: compile {source}")
    lines.append(f"build {LIBRARY.name}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def build() -> Path:
    """Compile what is out of date; safe to call from several test processes at once."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        recipe = BUILD / "build.ninja"
        if not recipe.exists() or recipe.read_text() != _ninja_file():
            recipe.write_text(_ninja_file())
        ninja = shutil.which("ninja") or str(Path(sys.executable).with_name("ninja"))
        done = subprocess.run([ninja, "-C", str(BUILD)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the emulator build failed:\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}")
    return LIBRARY


@cache
def ops() -> Any:
    """``torch.ops.bigkern_simt``, built, loaded, and with the native ops' own schemas."""
    library = torch.library.Library("bigkern_simt", "FRAGMENT")
    for schema in _library.SCHEMAS:
        library.define(schema)
    ops.library = library  # type: ignore[attr-defined]  # dropping it would drop the definitions
    torch.ops.load_library(str(build()))
    return torch.ops.bigkern_simt


def backend(op: str) -> registry.Backend:
    """The op's ``cuda`` backend with the emulator underneath; it refuses the same, but for the device."""
    import importlib

    module = importlib.import_module(f"bigkern.ops.{BESIDE.get(op, op)}")
    return getattr(module, "backends", module).cuda_backend(ops(), emulated=True)


if __name__ == "__main__":
    print(build())
