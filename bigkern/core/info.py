"""What was built, and what this machine is: the Python face of the compiled ``_info`` and ``_ops``.

Importing this module loads the extension if it can be loaded. If it cannot, the exact error is kept in
:data:`import_error`, every compiled backend refuses with it, and stock PyTorch runs.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch

_info: ModuleType | None = None
import_error: str | None = None

# Read once: the questions that backends answer are asked while torch.compile traces, which sees Python only.
_build: dict[str, Any] = {}
_isa = "none"

OPS_LIBRARY = next(iter(sorted(Path(__file__).parent.parent.glob("_ops*.so"))), None)

try:
    if OPS_LIBRARY is None:
        raise ImportError(
            f"no _ops library in {Path(__file__).parent.parent}: bigkern was not compiled; "
            "run `pip install . --no-build-isolation`"
        )
    torch.ops.load_library(str(OPS_LIBRARY))
    from bigkern import _info as _compiled  # type: ignore[attr-defined]

    _info = _compiled
    _build = dict(_info.build())
    _isa = str(_info.isa(str(OPS_LIBRARY)))
except (ImportError, OSError) as error:
    import_error = f"{type(error).__name__}: {error}"


def version() -> str:
    """bigkern's, as it is installed."""
    try:
        return metadata.version("bigkern")
    except metadata.PackageNotFoundError:
        return "source"


def build() -> dict[str, Any]:
    """How the extension was built: torch, compiler, CUDA version and architectures, or why not."""
    return dict(_build) if import_error is None else {"import_error": import_error}


def has_cuda_kernels() -> bool:
    return bool(_build.get("cuda"))


def isa() -> str:
    """The instruction set that the CPU kernels run with: avx512bf16, avx512, avx2 or portable."""
    return _isa


def isas() -> list[str]:
    """The instruction sets that this CPU has, from the least to the best."""
    return list(_info.isas()) if _info is not None else []


def set_isa(name: str) -> None:
    """Run the CPU kernels with a lesser instruction set, for tests and benchmarks.

    Raises:
        ValueError: this CPU lacks it, or it does not exist.
        RuntimeError: the extension is not loaded.
    """
    global _isa
    _loaded().set_isa(str(OPS_LIBRARY), name)
    _isa = name


def kernels() -> list[dict[str, Any]]:
    """Registers, spilled bytes and shared memory of every CUDA kernel; empty without a CUDA build."""
    return list(_info.kernels(str(OPS_LIBRARY))) if _info is not None and has_cuda_kernels() else []


def addresses(tensors: list[torch.Tensor]) -> bytearray:
    """Where each tensor's first element lies, an int64.

    Raises:
        RuntimeError: a tensor has no address (sparse, meta), or the extension is not loaded.
    """
    return cast(bytearray, _loaded().addresses(tensors))


def layouts(tensors: list[torch.Tensor]) -> bytes:
    """Devices, dtypes, sizes and strides: the same bytes for lists of tensors that are stored alike.

    Raises:
        RuntimeError: as :func:`addresses`.
    """
    return cast(bytes, _loaded().layouts(tensors))


def _loaded() -> ModuleType:
    if _info is None:
        raise RuntimeError(f"the extension is not loaded: {import_error}")
    return _info


def summary() -> str:
    """What this installation holds, in one line."""
    if import_error is not None:
        return f"the compiled extension did not load ({import_error})"
    cuda = _build["cuda"]
    return f"built with CPU kernels ({_isa}) and {'CUDA ' + cuda + ' kernels' if cuda else 'no CUDA kernels'}"
