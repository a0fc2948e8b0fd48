"""The norm of all gradients of a model, which clipping needs: schema, fake, backends, public function."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from bigkern.core import registry
from bigkern.core.library import (
    KERNEL_DTYPES,
    LIBRARY,
    define,
    define_native,
    plain,
    triton_kernel,
    unavailable,
    unproven,
)
from bigkern.ops.adam import dense
from bigkern.ops.adam.call import check_tensors

define("grad_norm(Tensor[] grads) -> Tensor")
# The same from adam's table of addresses, of the gradients that it is given: see ops/adam.py, Packed.
define_native("grad_norm_packed(Tensor param, Tensor table, Tensor grads) -> Tensor")


# ---- the public function ---------------------------------------------------------------------------


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all elements of a list of gradients, in one pass: what clipping needs.

    Args:
        grads: tensors of any shapes, of one dtype and on one device.

    Returns:
        One float32 (float64 for float64), 0-dim, on their device; 0 for an empty list.

    Raises:
        TypeError: ``grads`` is not a list of tensors, or one is not floating point, or sparse.
        ValueError: the tensors are of several dtypes or devices.

    Source: :func:`torch.nn.utils.get_total_norm`.

    Example:
        >>> import torch
        >>> from bigkern.ops.adam.grad_norm import grad_norm
        >>> grad_norm([torch.full((2, 2), 1.5), torch.tensor(4.0)])
        tensor(5.)
    """
    arguments = bind(grads)
    if plain(*grads):
        return _forward(*arguments)
    return cast(Tensor, torch.ops.bigkern.grad_norm(*arguments))


# ---- the op: fake and kernel -----------------------------------------------------------------------


def bind(grads: Sequence[Tensor]) -> tuple[list[Tensor]]:
    """Check a call of grad_norm."""
    check_tensors("grads", grads)
    for i, g in enumerate(grads):
        if g.layout != torch.strided:
            raise TypeError(f"grads[{i}] must be dense, not {g.layout}")
        if not g.is_floating_point():
            raise TypeError(f"grads[{i}] must be floating point, not {g.dtype}")
        if (g.dtype, g.device) != (grads[0].dtype, grads[0].device):
            want, have = (f"{x.dtype} on {x.device}" for x in (grads[0], g))
            raise ValueError(f"grads[{i}] must be {want} as grads[0] is, not {have}")
    return ([g.resolve_neg() for g in grads],)


@torch.library.register_fake("bigkern::grad_norm", lib=LIBRARY)
def _fake(grads: list[Tensor]) -> Tensor:
    if not grads:
        return torch.empty(())
    return grads[0].new_empty((), dtype=torch.promote_types(grads[0].dtype, torch.float32))


def _forward(grads: list[Tensor]) -> Tensor:
    return cast(Tensor, GRAD_NORM.resolve(grads).forward(grads))


LIBRARY.impl("grad_norm", _forward, "CompositeExplicitAutograd")


# ---- backends --------------------------------------------------------------------------------------

GRAD_NORM = registry.declare("grad_norm", bind)


def kernel_refuses(backend: str, grads: list[Tensor]) -> registry.Reason:
    if not grads:
        return "there are no gradients"
    if (reason := unavailable(backend, grads[0])) is not None:
        return reason
    for g in grads:
        if type(g) is not Tensor and type(g) is not Parameter:
            return f"a tensor is a {type(g).__name__}"
        if g.dtype not in KERNEL_DTYPES:
            return f"dtype {g.dtype} is not float32, bfloat16 or float16"
        if g.layout != torch.strided or not dense(g):
            return f"strides {g.stride()} are not dense"
    return None


def stock(grads: list[Tensor]) -> Tensor:
    if not grads:
        return torch.zeros(())
    norms = torch._foreach_norm(grads, 2.0, dtype=torch.promote_types(grads[0].dtype, torch.float32))
    return cast(Tensor, torch.linalg.vector_norm(torch.stack(norms)))


def cuda_backend(native: Any, *, emulated: bool = False) -> registry.Backend:
    """The CUDA kernels in ``native``: the compiled ones, or, in the tests, those that the emulator runs."""
    refuses = partial(kernel_refuses, "cpu" if emulated else "cuda")
    return registry.Backend(
        "cuda", lambda grads: native.grad_norm(grads), None, refuses, unproven("grad_norm", "cuda")
    )


_native = torch.ops.bigkern_native

GRAD_NORM.register(cuda_backend(_native))
GRAD_NORM.register(
    registry.Backend(
        "triton",
        triton_kernel("adam", "grad_norm"),
        None,
        partial(kernel_refuses, "triton"),
        unproven("grad_norm", "triton"),
    )
)
GRAD_NORM.register(
    registry.Backend("cpu", lambda grads: _native.grad_norm(grads), None, partial(kernel_refuses, "cpu"))
)
GRAD_NORM.register(registry.Backend("torch", stock))
