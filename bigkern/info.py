"""What was built, and what this machine is: the Python face of the compiled ``_info`` and ``_ops``.

Importing this module loads the extension if it can be loaded. If it cannot, the exact error is kept in
:data:`import_error`, every compiled backend refuses with it, and stock PyTorch runs.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_info: ModuleType | None = None
import_error: str | None = None

OPS_LIBRARY = next(iter(sorted(Path(__file__).parent.glob("_ops*.so"))), None)

try:
    if OPS_LIBRARY is None:
        raise ImportError(
            f"no _ops library in {Path(__file__).parent}: bigkern was not compiled; "
            "run `pip install . --no-build-isolation`"
        )
    torch.ops.load_library(str(OPS_LIBRARY))
    from bigkern import _info as _compiled  # type: ignore[attr-defined]

    _info = _compiled
except (ImportError, OSError) as error:
    import_error = f"{type(error).__name__}: {error}"


def build() -> dict[str, Any]:
    """How the extension was built: torch, compiler, CUDA version and architectures, or why not."""
    return dict(_info.build()) if _info is not None else {"import_error": import_error}


def has_cuda_kernels() -> bool:
    return _info is not None and bool(_info.build()["cuda"])


def isa() -> str:
    """The instruction set that the CPU kernels run with: avx512bf16, avx512, avx2 or portable."""
    return str(_info.isa(str(OPS_LIBRARY))) if _info is not None else "none"


def set_isa(name: str) -> None:
    """Run the CPU kernels with a lesser instruction set, for tests and benchmarks.

    Raises:
        ValueError: this CPU lacks it, or it does not exist.
    """
    if _info is None:
        raise RuntimeError(f"the extension is not loaded: {import_error}")
    _info.set_isa(str(OPS_LIBRARY), name)


def kernels() -> list[dict[str, Any]]:
    """Registers, spilled bytes and shared memory of every CUDA kernel; empty without a GPU build."""
    return list(_info.kernels(str(OPS_LIBRARY))) if has_cuda_kernels() and _info is not None else []


def summary() -> str:
    if _info is None:
        return f"the compiled extension did not load ({import_error})"
    cuda = build()["cuda"]
    return f"built with CPU kernels ({isa()}) and {'CUDA ' + cuda if cuda else 'no CUDA kernels'}"
