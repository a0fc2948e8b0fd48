"""The torch libraries that hold the ops, and what all op files share.

``bigkern`` holds the public, backend-independent ops: one opaque node each under ``torch.compile``.
``bigkern_native`` holds the compiled kernels behind the backends ``cpu`` and ``cuda``; ``_ops`` registers
its implementations there by dispatch key.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from bigkern.core import device, info, registry

LIBRARY = torch.library.Library("bigkern", "FRAGMENT")
NATIVE = torch.library.Library("bigkern_native", "FRAGMENT")

SCHEMAS: list[str] = []  # of every native op: the tests register the emulated kernels with the same ones

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_COLUMNS = 65536  # of GPU kernels with a norm: a row stays on one block


def define_native(schema: str) -> None:
    """Define ``name(args) -> results`` as an op that only compiled kernels implement."""
    schema = schema.replace("SymInt", "int")  # a kernel is given numbers
    NATIVE.define(schema)
    SCHEMAS.append(schema)


def plain(*tensors: Tensor | None) -> bool:
    """Whether eager autograd may call a backend directly: no subclass, no tracing, no functorch."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return not in_functorch() and ordinary(*tensors)


def ordinary(*tensors: Tensor | None) -> bool:
    """Whether these are torch's own tensors: a subclass (DTensor, quantised weights, torch.fx's proxies)
    knows torch's functions, not our ops."""
    return all(t is None or type(t) is Tensor or type(t) is Parameter for t in tensors)


def lazily_negated(x: Tensor) -> bool:
    """Whether x's memory holds other numbers than x: their negatives or conjugates. Kernels read memory."""
    return x.is_neg() or x.is_conj()


def in_functorch() -> bool:
    """Whether a transform of torch.func (grad, vmap, ...) is in force."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def traced() -> bool:
    """Whether torch.jit.trace is at work."""
    return torch._C._get_tracing_state() is not None


def foreign(*tensors: Tensor | None) -> registry.Reason:
    """Why only torch's own functions will do for these tensors, here."""
    if not ordinary(*tensors):
        return "subclasses of Tensor know torch's functions alone"
    if torch.compiler.is_compiling():
        return None
    if in_functorch():
        return "transforms of torch.func know how to batch stock's"
    return None


def is_autocast_on(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def autocast(x: Tensor) -> registry.Reason:
    """Why kernels stay out of autocast: torch's own functions choose their dtypes there."""
    if is_autocast_on(x):
        return "autocast is on, and decides the dtypes of torch's own functions"
    return None


def narrowed(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """As torch's autocast does for its own attention: floating point, but not float64, becomes its dtype."""
    device = x.device.type if isinstance(x, Tensor) else "none"
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return x, *others
    dtype, kinds = torch.get_autocast_dtype(device), (torch.float32, torch.bfloat16, torch.float16)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in kinds else t for t in (x, *others))


# Read once: resolving a call must cost next to nothing, and be plain Python to torch.compile.
_NOT_LOADED = None if info.import_error is None else info.summary()
_NO_CUDA_KERNELS = None if info.has_cuda_kernels() else info.summary()
_NO_TRITON = None if importlib.util.find_spec("triton") is not None else "triton is not installed"
_TRITON_ON_CPU = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter, for tests
DEBUG = os.environ.get("BIGKERN_DEBUG", "0") != "0"  # check what can only be seen by waiting for the GPU


def _slow_products() -> frozenset[torch.dtype]:
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return frozenset(dtype for dtype, asked in supported.items() if not asked())


# Of 16 bits, where torch's library has no product of them for this processor: torch multiplies in loops of
# its own there, and our kernels widen to float32.
SLOW_PRODUCTS = _slow_products()
UNMEASURED_PRODUCTS = "not measured here: on some processors stock's products are faster"


def declines_products(call: Any) -> registry.Reason:
    """Why a CPU kernel that is mostly products leaves an unmeasured call to stock."""
    return None if call.x.dtype in SLOW_PRODUCTS else UNMEASURED_PRODUCTS


def unavailable(backend: str, tensor: Tensor) -> registry.Reason:
    """Why a compiled or Triton backend cannot run anything here, or nothing on this tensor's device."""
    if traced():
        return "torch.jit.trace records torch's functions alone"
    if backend.startswith("cpu"):
        return _NOT_LOADED if tensor.is_cpu else f"tensors are on {tensor.device.type}"
    lacking = _NO_CUDA_KERNELS if backend == "cuda" else _NO_TRITON
    if lacking is not None or tensor.is_cuda:
        return lacking
    if backend == "triton" and _TRITON_ON_CPU and tensor.is_cpu:
        return None
    return f"tensors are on {tensor.device.type}"


def unproven(op: str, backend: str) -> Callable[[Any], registry.Reason]:
    """Of a GPU backend: nothing has shown that it is right on the tensors' GPU, for calls of this kind."""

    def is_unproven(call: Any) -> registry.Reason:
        first = call.flat()[0]
        tensor = first[0] if isinstance(first, list) else first
        if not device.is_gpu(tensor.device):
            return "off a GPU it is for tests"
        return registry.unproven(op, backend, tensor.device.index or 0, registry.get(op).variants(call))

    return is_unproven


def triton_kernel(module: str, name: str) -> Callable[..., Any]:
    """A function of a module in triton_kernels, imported when it is first called.

    Triton reads memory without asking torch's dispatcher, which resolves lazy negation for compiled kernels.
    """

    def call(*arguments: Any) -> Any:
        kernels = importlib.import_module(f"bigkern.triton_kernels.{module}")
        return getattr(kernels, name)(*(x.resolve_neg() if isinstance(x, Tensor) else x for x in arguments))

    return call
