"""Imports go downward only, and torch stays out of the kernels. Reads the sources; imports nothing."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# What each room of the package may import of the package, besides itself.
ALLOWED = {
    "evidence": set(),
    "info": {"_info"},
    "parity": {"random_rounding"},
    "random_rounding": set(),
    "registry": {"evidence", "info"},
    "reference": set(),
    "ops": {"registry", "info", "reference", "triton_kernels"},
    "nn": {"ops", "reference", "registry"},
    "optim": {"ops", "reference", "registry"},
    "patch": {"nn", "ops", "registry", "optim", "integrations"},
    "freeze": {"nn", "ops", "patch", "registry"},
    "models": {"nn", "ops"},
    "triton_kernels": set(),
}
# Rooms on top: they may import anything below.
TOP = {"__init__", "__main__", "cli", "benchmarks", "integrations"}

# What the core may import at the top of a file besides itself.
CORE = {"torch", "numpy"} | sys.stdlib_module_names

TORCH_INCLUDE = re.compile(r'#include\s*[<"](?:torch|ATen|c10)/')
# The torch binding: op.cpp of each room and the one header they share.
TORCH_FILES = {"op.cpp", "op.h"}


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if parts[0] in ("triton_kernels", "benchmarks"):
        return parts[0]
    return parts[1].removesuffix(".py")


def imported_rooms(tree: ast.Module) -> set[tuple[str, int]]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                assert node.level == 1, f"line {node.lineno}: a relative import out of the room"
                continue
            names = (
                [f"bigkern.{alias.name}" for alias in node.names]
                if node.module == "bigkern"
                else [node.module]
            )
        else:
            continue
        found |= {(name.split(".")[1], node.lineno) for name in names if name and name.startswith("bigkern.")}
    return found


def python_files() -> list[Path]:
    return sorted(file for room in ("bigkern", "triton_kernels") for file in (ROOT / room).rglob("*.py"))


def test_imports_go_downward() -> None:
    wrong = []
    for file in python_files():
        room = room_of(file)
        if room in TOP:
            continue
        assert room in ALLOWED, f"{file.relative_to(ROOT)} stands in a room that the layout does not know"
        for target, line in imported_rooms(ast.parse(file.read_text())):
            if target != room and target not in ALLOWED[room]:
                wrong.append(f"{file.relative_to(ROOT)}:{line}: {room} must not import bigkern.{target}")
    assert not wrong, "\n".join(wrong)


def test_core_imports_torch_and_numpy_alone() -> None:
    """Outside the top rooms, other packages are imported inside functions only (triton, in its own room)."""
    wrong = []
    for file in python_files():
        room = room_of(file)
        if room in TOP:
            continue
        allowed = CORE | ({"triton"} if room == "triton_kernels" else set())
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            else:
                continue
            for name in (name.split(".")[0] for name in names):
                if name not in allowed and name != "bigkern":
                    wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}: imports {name}")
    assert not wrong, "\n".join(wrong)


def test_kernels_are_free_of_torch() -> None:
    sources = [file for file in (ROOT / "csrc").rglob("*") if file.suffix in {".h", ".cuh", ".cu", ".cpp"}]
    assert sources
    wrong = [
        str(file.relative_to(ROOT))
        for file in sources
        if file.name not in TORCH_FILES and TORCH_INCLUDE.search(file.read_text())
    ]
    assert not wrong, f"these must not include torch: {wrong}"


def test_every_package_is_installed() -> None:
    listed = re.search(r"^packages = \[\n(.*?)\n\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert listed is not None
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "bigkern").rglob("*.py")}
    packages = {folder.as_posix().replace("/", ".") for folder in folders}
    packages |= {"bigkern.triton_kernels", "bigkern.benchmarks"}
    assert set(re.findall(r'"([\w.]+)"', listed[1])) == packages


def test_emulator_is_never_shipped() -> None:
    """Nothing outside csrc/simt includes it, but for the one header that chooses what CUDA is."""
    including = [
        str(file.relative_to(ROOT))
        for file in (ROOT / "csrc").rglob("*.*")
        if file.parent.name != "simt" and file.suffix != ".md" and '"simt/' in file.read_text()
    ]
    assert set(including) <= {"csrc/common/cuda.cuh", "csrc/common/ptx.cuh"}, including


if __name__ == "__main__":
    for name, check in list(globals().items()):
        if name.startswith("test_"):
            check()
            print("ok", name)
