"""Build bigkern: two small extension modules, compiled from ``csrc/``.

``bigkern._ops``   the kernels and their torch bindings, on torch's stable ABI (no Python in it)
``bigkern._info``  pybind11 without tensors: what was built, and what the compiler made of it

Environment:
    BIGKERN_CUDA          auto (default): CUDA kernels where torch has CUDA and nvcc is found;
                          0: never; 1: fail, naming what is missing, rather than leave them out
    TORCH_CUDA_ARCH_LIST  default: the visible GPUs' architectures, else "8.0;9.0a"
    MAX_JOBS              default: bounded by cores and by memory (2 GB a compiler)
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
TORCH_TARGET = "0x020b000000000000"  # the oldest torch whose stable ABI _ops needs: 2.11
BYTES_PER_JOB = 2 << 30


def missing_for_cuda() -> str | None:
    """Why no CUDA kernels can be built here, or None if they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if cpp_extension.CUDA_HOME is None:
        return "nvcc was not found; install the CUDA toolkit or set CUDA_HOME"
    if not (Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc").exists():
        return f"there is no nvcc in {cpp_extension.CUDA_HOME}/bin; set CUDA_HOME"
    return None


def want_cuda() -> tuple[bool, str]:
    """Whether to build CUDA kernels, and the reason in words."""
    setting = os.environ.get("BIGKERN_CUDA", "auto")
    if setting not in ("auto", "0", "1"):
        sys.exit(f"BIGKERN_CUDA must be auto, 0 or 1, not {setting!r}")
    if setting == "0":
        return False, "BIGKERN_CUDA=0"
    missing = missing_for_cuda()
    if missing is not None and setting == "1":
        sys.exit(f"BIGKERN_CUDA=1, but no CUDA kernels can be built: {missing}")
    return missing is None, missing or ""


def cuda_library_dirs() -> list[str]:
    """Where libcudart is, when torch's guess of CUDA_HOME misses it: nvcc knows its own toolkit."""
    nvcc = str(Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc")
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(\S+)", said)
    homes = [Path(cpp_extension.CUDA_HOME), *([Path(top[1])] if top else [])]
    folders = [home / name for home in homes for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
    return [str(folder) for folder in folders if (folder / "libcudart.so").exists()]


def default_architectures() -> str:
    """The visible GPUs' architectures (Hopper as 9.0a, for its own instructions), else 8.0 and 9.0a."""
    seen = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    names = {"9.0a" if capability == (9, 0) else "{}.{}".format(*capability) for capability in seen}
    return ";".join(sorted(names)) or "8.0;9.0a"


def default_jobs() -> int:
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // BYTES_PER_JOB))


CUDA, WHY_NO_CUDA = want_cuda()
if CUDA:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_architectures())
os.environ.setdefault("MAX_JOBS", str(default_jobs()))
ARCHITECTURES = os.environ["TORCH_CUDA_ARCH_LIST"] if CUDA else ""


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in CSRC.glob(pattern))


def cuda_sources_hash() -> str:
    """What the CUDA kernels are made of, for evidence to name."""
    found = hashlib.sha256()
    for path in sorted(p for p in CSRC.rglob("*") if p.is_file() and p.parent.name != "cpu"):
        found.update(path.read_bytes())
    return found.hexdigest()[:8]


def define(name: str, value: str = "") -> str:
    return f"-D{name}={value}" if value else f"-D{name}"


def ops_extension() -> cpp_extension.Extension:
    """_ops: every op's kernels and op.cpp. torch's headers count as the system's: no warnings from them."""
    warnings = ["-Wall", "-Wextra"]
    torch_headers = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    defines = [define("TORCH_TARGET_VERSION", TORCH_TARGET)]
    host = ["-O3", "-g0", "-fvisibility=hidden", *warnings, *torch_headers]
    files = sources("exports.cpp", "*/op.cpp", "*/cpu/*.cpp")
    if not CUDA:
        return cpp_extension.CppExtension(
            "bigkern._ops",
            files,
            include_dirs=[str(CSRC)],
            extra_compile_args={"cxx": [*host, *defines]},
            py_limited_api=True,
        )
    defines += [define("USE_CUDA"), define("BIGKERN_CUDA")]
    # torch's builder adds flags that disable half and bfloat16 conversions; our dtypes do not use them.
    device = ["-O3", "--expt-relaxed-constexpr", "-Xptxas=-warn-spills", "-Xcompiler=-fvisibility=hidden"]
    return cpp_extension.CUDAExtension(
        "bigkern._ops",
        files + sources("*.cu", "*/cuda/*.cu"),
        include_dirs=[str(CSRC)],
        library_dirs=cuda_library_dirs(),
        extra_compile_args={"cxx": [*host, *defines], "nvcc": [*device, *defines]},
        py_limited_api=True,
    )


def info_extension() -> Pybind11Extension:
    return Pybind11Extension(
        "bigkern._info",
        ["csrc/info.cpp"],
        include_dirs=[str(CSRC)],
        cxx_std=17,
        define_macros=[
            ("BIGKERN_TORCH", f'"{torch.__version__}"'),
            ("BIGKERN_CUDA_VERSION", f'"{torch.version.cuda if CUDA else ""}"'),
            ("BIGKERN_ARCHITECTURES", f'"{ARCHITECTURES}"'),
            ("BIGKERN_WHY_NO_CUDA", f'"{WHY_NO_CUDA}"'),
            ("BIGKERN_SOURCES", f'"{cuda_sources_hash()}"'),
        ],
        libraries=["dl"],
    )


class Build(cpp_extension.BuildExtension):
    """torch's builder, with the outcome in one line at the end."""

    def build_extensions(self) -> None:
        super().build_extensions()
        built = [f"CPU kernels (torch {torch.__version__})"]
        built += [f"CUDA {torch.version.cuda} kernels for {ARCHITECTURES}"] if CUDA else []
        left_out = "" if CUDA else f"; not built: CUDA kernels ({WHY_NO_CUDA})"
        print(f"bigkern: built {' and '.join(built)}{left_out}", file=sys.stderr)


setup(
    ext_modules=[ops_extension(), info_extension()],
    cmdclass={"build_ext": Build.with_options(no_python_abi_suffix=False)},
)
