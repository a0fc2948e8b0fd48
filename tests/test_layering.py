"""Imports go downward only, and torch stays out of the kernels. Reads the sources; imports nothing."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# The parts of the package, from the bottom up: what each may import besides itself, always something above it
# in this list, so that there are no circles.
ALLOWED: dict[str, set[str]] = {
    "triton_kernels": set(),
    "core": {"_info"},
    "ops": {"core", "triton_kernels"},
    "wisdom": {"core"},
    "nn": {"core", "ops"},
    "optim": {"core", "ops"},
    "models": {"core", "nn", "ops"},
    "patch": {"core", "ops", "nn"},
    "freeze": {"core", "ops", "nn", "patch"},
    "integrations": {"ops", "patch"},
    "terminal": {"core"},
    "train": {"core", "terminal", "models", "optim"},
    "benchmarks": {
        "core",
        "ops",
        "nn",
        "optim",
        "models",
        "patch",
        "freeze",
        "terminal",
        "train",
        "integrations",
    },
    "cli": {"core", "ops", "terminal", "train", "benchmarks"},
}
TOP = {"__init__", "__main__"}
# Parts that stand on other packages than torch and numpy: the extras.
EXTRAS = {"integrations", "terminal", "train", "benchmarks", "cli"}

# What all others may import at the top of a file besides the package.
CORE = {"torch", "numpy"} | sys.stdlib_module_names

TORCH_INCLUDE = re.compile(r'#include\s*[<"](?:torch|ATen|c10)/')
# The torch binding: op.cpp of each op and the headers that it includes.
TORCH_FILES = {"op.cpp", "op.h"}


def part_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if parts[0] in ("triton_kernels", "benchmarks"):
        return parts[0]
    return parts[1].removesuffix(".py")


def imported_parts(tree: ast.Module) -> set[tuple[str, int]]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                assert node.level == 1, f"line {node.lineno}: a relative import out of the folder"
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
    folders = ("bigkern", "triton_kernels", "benchmarks")
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def test_imports_go_downward() -> None:
    order = list(ALLOWED)
    for part, allowed in ALLOWED.items():
        assert allowed <= {*order[: order.index(part)], "_info"}, f"{part} may import what stands above it"
    wrong = []
    for file in python_files():
        part = part_of(file)
        if part in TOP:
            continue
        assert part in ALLOWED, f"{file.relative_to(ROOT)} is in no part that the layout knows"
        for target, line in imported_parts(ast.parse(file.read_text())):
            if target != part and target not in ALLOWED[part]:
                wrong.append(f"{file.relative_to(ROOT)}:{line}: {part} must not import bigkern.{target}")
    assert not wrong, "\n".join(wrong)


# What an op may take from another: the public function, what it is called with, and the same in plain torch.
OF_ANOTHER_OP = {"call", "reference", "stock", "product"}


def test_ops_know_one_another_by_their_public_functions() -> None:
    wrong = []
    for file in sorted((ROOT / "bigkern" / "ops").glob("*/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bigkern.ops."):
                _, _, op, *module = (node.module or "").split(".")
                if op != file.parent.name and not set(module) <= OF_ANOTHER_OP:
                    wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}: imports {node.module}")
    assert not wrong, "\n".join(wrong)


def test_no_circles_between_modules() -> None:
    """Imports at the top of files; those within functions are there to be late."""
    modules = {module_of(file): file for file in python_files()}
    imports = {
        name: {
            target
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.ImportFrom) and node.module
            for target in (f"{node.module}.{alias.name}" for alias in node.names)
            for target in (target if target in modules else node.module,)
            if target in modules and target != name
        }
        for name, file in modules.items()
        if part_of(file) not in TOP
    }
    circles = []
    while imports:
        free = [name for name, targets in imports.items() if not targets & imports.keys()]
        if not free:
            circles = sorted(imports)
            break
        for name in free:
            del imports[name]
    assert not circles, f"these import each other in circles: {circles}"


def module_of(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return name if name.startswith("bigkern") else f"bigkern.{name}"


def test_core_imports_torch_and_numpy_alone() -> None:
    """Outside the extras, other packages are imported inside functions only (triton, in its own folder)."""
    wrong = []
    for file in python_files():
        part = part_of(file)
        if part in TOP | EXTRAS or "patch/transformers" in file.as_posix():
            continue
        allowed = CORE | ({"triton"} if part == "triton_kernels" else set())
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


def cpp_files() -> list[Path]:
    suffixes = {".h", ".inl", ".cuh", ".cu", ".cpp"}
    return sorted(file for file in (ROOT / "csrc").rglob("*") if file.suffix in suffixes)


def test_kernels_are_free_of_torch() -> None:
    wrong = [
        str(file.relative_to(ROOT))
        for file in cpp_files()
        if file.name not in TORCH_FILES and TORCH_INCLUDE.search(file.read_text())
    ]
    assert not wrong, f"these must not include torch: {wrong}"


def test_headers_have_guards_and_inl_files_have_none() -> None:
    """What is compiled once per instruction set is an .inl, and says so."""
    for file in cpp_files():
        text = file.read_text()
        guarded = "\n#pragma once\n" in text
        assert guarded == (file.suffix in {".h", ".cuh"}), f"{file.relative_to(ROOT)}: {guarded=}"
        comment = text.partition("\n\n")[0].replace("\n//", "")
        assert file.suffix != ".inl" or "once per instruction set" in comment, file.relative_to(ROOT)


def test_every_package_is_installed() -> None:
    listed = re.search(r"^packages = \[\n(.*?)\n\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert listed is not None
    packages = {module_of(file.parent / "__init__.py") for file in python_files()}
    assert set(re.findall(r'"([\w.]+)"', listed[1])) == packages


def test_emulator_is_never_shipped() -> None:
    """It stands with the tests; two headers, which choose what CUDA is, include it, and nothing else does."""
    including = {str(file.relative_to(ROOT)) for file in cpp_files() if '"simt/' in file.read_text()}
    assert including == {"csrc/common/cuda/cuda.cuh", "csrc/common/cuda/ptx.cuh"}, including


if __name__ == "__main__":
    for name, check in list(globals().items()):
        if name.startswith("test_"):
            check()
            print("ok", name)
