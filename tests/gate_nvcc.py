"""Compile-only gate: every CUDA kernel for sm_80 and sm_90a, without a GPU.

Asks ptxas what each kernel takes and fails on a spilled byte, or on shared memory or registers beyond the
architecture's limit. Counts in the machine code what reads and writes 16 bytes of global memory, and fails
where ``VECTORS`` asks for more. Prints the table; ``--csv FILE`` writes it.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
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
SECTION_OR_VECTOR = re.compile(
    r"^\s*\.section\s+\.text\.(?P<name>\w+)|\b(?P<op>LDG|LDGSTS|STG)\.E\S*\.128\b", re.MULTILINE
)

# How many 16-byte loads and stores a kernel has at least: what its inner loop reads and writes, once. The
# compiler takes a vector apart without a word, and every test still passes. Nothing is asked of kernels that
# take one element at a time.
VECTORS = [
    # op, kernel, loads, stores
    ("adam", r"squares_kernel<", 1, 0),
    ("adam", r"update_kernel<(\w+), \1, false>", 4, 3),  # p, g, m, v -> p, m, v
    ("adam", r"update_kernel<(\w+), \1, true>", 5, 4),
    ("adam", r"update_kernel<(bf16|fp16), float, ", 3, 3),  # m, v, master
    ("adam", r"update_kernel<float, bf16, ", 2, 2),  # p, g -> p, zeroed g
    ("adam", r"update_codes_kernel<", 2, 2),
    ("attention", r"(forward|dq|dkdv|dbias|decode)_kernel<", 1, 0),  # cp.async
    ("attention", r"(forward|dq)_kernel<", 1, 1),
    ("attention", r"dkdv_kernel<", 1, 2),
    # six activations, two of them gated
    ("layernorm_ffn", r"bias_activation_kernel<\w+, [48]>", 8, 14),
    ("layernorm_ffn", r"bias_activation_backward_kernel<\w+, [48]>", 14, 14),
    ("layernorm_ffn", r"dropout_add_kernel<\w+, [48]>", 2, 1),
    ("layernorm_ffn", r"norm_kernel<Layout<\w+, \d+, \w+, true>", 3, 2),
    ("layernorm_ffn", r"norm_backward_kernel<Layout<\w+, \d+, \w+, true>", 3, 2),  # ds, dx
    ("layernorm_ffn", r"norm_backward_kernel<Layout<\w+, \d+, true, true>", 12, 8),  # of four vectors a row
    ("recurrent", r"scan(_backward)?_kernel<", 16, 0),  # two batches of what the other blocks wrote
]


def disassembler() -> str:
    """The toolkit's nvdisasm, or the one that comes with Triton."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin or "").parent / "backends" / "nvidia" / "bin" if triton else None
    found = shutil.which("nvdisasm") or shutil.which("nvdisasm", path=bundled)
    return found or sys.exit("gate_nvcc: no nvdisasm, neither on the PATH nor with Triton")


@dataclass
class Kernel:
    op: str
    kernel: str
    arch: str
    registers: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0
    static_smem: int = 0
    loads_16: int = 0  # instructions that read 16 bytes of global memory
    stores_16: int = 0

    def failures(self) -> list[str]:
        """What is wrong with it."""
        bad = []
        if self.spill_bytes or self.stack_bytes:
            bad.append(f"{self.spill_bytes} bytes spilled, {self.stack_bytes} bytes of stack")
        if self.registers > MAX_REGISTERS:
            bad.append(f"{self.registers} registers")
        for op, pattern, loads, stores in VECTORS:
            if op == self.op and re.match(pattern, self.kernel):
                if self.loads_16 < loads:
                    bad.append(f"{self.loads_16} loads of 16 bytes, not {loads}")
                if self.stores_16 < stores:
                    bad.append(f"{self.stores_16} stores of 16 bytes, not {stores}")
        return bad


def compile_for(source: Path, arch: str) -> list[Kernel]:
    """What ptxas and the machine code say of every kernel of one source file on one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "nvcc", "-c", str(source), "-o", f"{folder}/object.o", f"-I{ROOT / 'csrc'}", "-std=c++17", "-O3",
            "--expt-relaxed-constexpr", "-DBIGKERN_CUDA", "-Werror=all-warnings",
            f"-gencode=arch={ARCHITECTURES[arch]},code={arch}", "-Xptxas=-v",
            "--keep", f"--keep-dir={folder}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        kernels = resources(done.stdout + done.stderr, source.parent.parent.name, arch)
        (cubin,) = Path(folder).glob("*.cubin")
        count_vectors(cubin, kernels)
    return kernels


def resources(said: str, op: str, arch: str) -> list[Kernel]:
    """The kernels, from what ``ptxas -v`` said."""
    kernels: list[Kernel] = []
    for line in said.splitlines():
        if entry := ENTRY.search(line):
            kernels.append(Kernel(op, entry["name"], arch))
        if frame := FRAME.search(line):
            kernels[-1].stack_bytes = int(frame["stack"])
            kernels[-1].spill_bytes = int(frame["stores"]) + int(frame["loads"])
        if used := USED.search(line):
            kernels[-1].registers = int(used["registers"])
        if smem := SMEM.search(line):
            kernels[-1].static_smem = int(smem["smem"])
    return kernels


def count_vectors(cubin: Path, kernels: list[Kernel]) -> None:
    """Count the 16-byte accesses of each kernel."""
    command = [disassembler(), "-c", "-ndf", str(cubin)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts: Counter[tuple[str, str]] = Counter()
    section = ""
    for found in SECTION_OR_VECTOR.finditer(code):
        if found["name"]:
            section = found["name"]
        else:
            counts[section, found["op"]] += 1
    for kernel in kernels:
        kernel.loads_16 = counts[kernel.kernel, "LDG"] + counts[kernel.kernel, "LDGSTS"]
        kernel.stores_16 = counts[kernel.kernel, "STG"]


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
    sources = sorted((ROOT / "csrc").glob("*/cuda/*.cu"))
    jobs = [(source, arch) for source in sources for arch in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        kernels = [kernel for found in pool.map(lambda job: compile_for(*job), jobs) for kernel in found]
    demangled(kernels)
    kernels.sort(key=lambda kernel: (kernel.op, kernel.kernel, kernel.arch))

    columns = f"{'registers':>9} {'stack':>6} {'spills':>6} {'smem':>6} {'ld16':>5} {'st16':>5}"
    print(f"{'op':<14} {'arch':<7} {columns}  kernel")
    for k in kernels:
        print(
            f"{k.op:<14} {k.arch:<7} {k.registers:>9} {k.stack_bytes:>6} {k.spill_bytes:>6}"
            f" {k.static_smem:>6} {k.loads_16:>5} {k.stores_16:>5}  {k.kernel}"
        )
    if options.csv:
        with options.csv.open("w", newline="") as file:
            out = csv.writer(file)
            out.writerow([field.name for field in fields(Kernel)])
            out.writerows(astuple(kernel) for kernel in kernels)

    bad = [k for k in kernels if k.failures()]
    for k in bad:
        print(f"FAILED {k.kernel} on {k.arch}: {'; '.join(k.failures())}")
    missing = [p for op, p, *_ in VECTORS if not any(k.op == op and re.match(p, k.kernel) for k in kernels)]
    if missing:
        sys.exit(f"VECTORS names kernels that do not exist: {missing}")
    print(f"{len(kernels)} kernels, {len(bad)} failed")
    sys.exit(bool(bad) or not kernels)


if __name__ == "__main__":
    main()
