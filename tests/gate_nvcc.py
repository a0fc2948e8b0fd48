"""Compile-only gate: every CUDA kernel for sm_80 and sm_90a, without a GPU.

Asks ptxas what each kernel takes and fails on a spilled byte, or on shared memory or registers beyond the
architecture's limit. Prints the table; ``--csv FILE`` writes it.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).parent.parent
ARCHITECTURES = {"sm_80": "compute_80", "sm_90a": "compute_90a"}
MAX_REGISTERS = 255

ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'")
FRAME = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill"
)
USED = re.compile(r"Used (?P<registers>\d+) registers")
SMEM = re.compile(r"(?P<smem>\d+) bytes smem")


@dataclass
class Kernel:
    room: str
    kernel: str
    arch: str
    registers: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0
    static_smem: int = 0


def compile_for(source: Path, arch: str) -> list[Kernel]:
    """What ptxas says of every kernel of one source file on one architecture."""
    command = [
        "nvcc", "-c", str(source), "-o", "/dev/null", f"-I{ROOT / 'csrc'}", "-std=c++17", "-O3",
        "--expt-relaxed-constexpr", "-DBIGKERN_CUDA", "-Werror=all-warnings",
        f"-gencode=arch={ARCHITECTURES[arch]},code={arch}", "-Xptxas=-v",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    kernels: list[Kernel] = []
    for line in (done.stdout + done.stderr).splitlines():
        if entry := ENTRY.search(line):
            kernels.append(Kernel(source.parent.name, entry["name"], arch))
        if frame := FRAME.search(line):
            kernels[-1].stack_bytes = int(frame["stack"])
            kernels[-1].spill_bytes = int(frame["stores"]) + int(frame["loads"])
        if used := USED.search(line):
            kernels[-1].registers = int(used["registers"])
        if smem := SMEM.search(line):
            kernels[-1].static_smem = int(smem["smem"])
    return kernels


def demangled(kernels: list[Kernel]) -> None:
    """Readable names: no argument list, no namespace of ours."""
    names = "\n".join(kernel.kernel for kernel in kernels)
    plain = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout
    for kernel, name in zip(kernels, plain.splitlines(), strict=True):
        name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
        name = re.sub(r"\((?:int|bool|bigkern::[\w:]+)\)", "", name)
        depth = 0
        for i, character in enumerate(name):
            depth += (character == "<") - (character == ">")
            if character == "(" and depth == 0:
                name = name[:i]
                break
        kernel.kernel = re.sub(r"\bbigkern::(?:\w+::)*", "", name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="write the table here")
    options = parser.parse_args()
    if shutil.which("nvcc") is None:
        sys.exit("gate_nvcc: nvcc is not on the PATH; install the CUDA toolkit or leave this gate out")
    sources = sorted((ROOT / "csrc").glob("*/*.cu"))
    jobs = [(source, arch) for source in sources for arch in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        kernels = [kernel for found in pool.map(lambda job: compile_for(*job), jobs) for kernel in found]
    demangled(kernels)
    kernels.sort(key=lambda kernel: (kernel.room, kernel.kernel, kernel.arch))

    print(f"{'room':<14} {'arch':<7} {'registers':>9} {'stack':>6} {'spills':>6} {'smem':>6}  kernel")
    for k in kernels:
        print(
            f"{k.room:<14} {k.arch:<7} {k.registers:>9} {k.stack_bytes:>6} {k.spill_bytes:>6}"
            f" {k.static_smem:>6}  {k.kernel}"
        )
    if options.csv:
        with options.csv.open("w", newline="") as file:
            out = csv.writer(file)
            out.writerow([field.name for field in fields(Kernel)])
            out.writerows(astuple(kernel) for kernel in kernels)

    bad = [k for k in kernels if k.spill_bytes or k.stack_bytes or k.registers > MAX_REGISTERS]
    for k in bad:
        print(f"FAILED {k.kernel} on {k.arch}: {k.spill_bytes} bytes spilled, {k.stack_bytes} bytes of stack")
    print(f"{len(kernels)} kernels, {len(bad)} failed")
    sys.exit(bool(bad) or not kernels)


if __name__ == "__main__":
    main()
