"""The torch libraries that hold the ops, and what all op files share.

``bigkern`` holds the public, backend-independent ops: one opaque node each under ``torch.compile``.
``bigkern_native`` holds the compiled kernels behind the backends ``cpu`` and ``cuda``; ``_ops`` registers
its implementations there by dispatch key.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

LIBRARY = torch.library.Library("bigkern", "FRAGMENT")
NATIVE = torch.library.Library("bigkern_native", "FRAGMENT")

SCHEMAS: list[str] = []  # of every native op: the tests register the emulated kernels with the same ones

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def define(schema: str) -> None:
    """Define ``name(args) -> results`` as a public op and, with the same schema, as a native one."""
    LIBRARY.define(schema)
    define_native(schema)


def define_native(schema: str) -> None:
    """Define an op that only compiled kernels implement: a piece that a backend composes."""
    NATIVE.define(schema)
    SCHEMAS.append(schema)


def plain(*tensors: Tensor | None) -> bool:
    """Whether eager autograd may call a backend directly: no subclass, no tracing, no functorch."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if in_functorch():
        return False
    return all(t is None or type(t) is Tensor or type(t) is Parameter for t in tensors)


def in_functorch() -> bool:
    """Whether a transform of torch.func (grad, vmap, ...) is in force."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def wrong_device(backend: str, tensor: Tensor) -> str | None:
    """Why a compiled or Triton backend cannot run on this tensor's device."""
    kind = tensor.device.type
    if backend == "cpu":
        return None if kind == "cpu" else f"tensors are on {kind}"
    if kind == "cuda":
        return None
    if backend == "triton" and kind == "cpu" and triton_interpreted():
        return None
    return f"tensors are on {kind}"


def triton_interpreted() -> bool:
    """Whether Triton kernels run under Triton's interpreter, on CPU tensors (for tests)."""
    import os

    return os.environ.get("TRITON_INTERPRET") == "1"
