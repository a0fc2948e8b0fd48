"""The norm of all gradients of a model, which clipping needs: public function, call and candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from bigkern.core.library import KERNEL_DTYPES, triton_kernel, unavailable, unproven
from bigkern.core.op import Call, Measures, Op, native, of_fields
from bigkern.core.registry import Backend, Reason
from bigkern.ops.adam.call import check_tensors
from bigkern.ops.adam.layout import dense


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
    return cast(Tensor, GRAD_NORM(bind(grads)))


# ---- the call --------------------------------------------------------------------------------------


@dataclass(slots=True)
class GradNorm(Call):
    grads: list[Tensor]  # of one dtype, on one device, dense and not lazily negated


def bind(grads: Sequence[Tensor]) -> GradNorm:
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
    return GradNorm([g.resolve_neg() for g in grads])


def _fake(call: GradNorm) -> Tensor:
    if not call.grads:
        return torch.empty(())
    first = call.grads[0]
    return first.new_empty((), dtype=torch.promote_types(first.dtype, torch.float32))


def sizes(call: GradNorm) -> tuple[int, ...]:
    """Elements, and tensors."""
    return sum(g.numel() for g in call.grads), len(call.grads)


GRAD_NORM = Op("grad_norm", GradNorm, Tensor, bind=bind, fake=_fake, measures=Measures(sizes))


# ---- candidates ------------------------------------------------------------------------------------


def kernel_refuses(backend: str, call: GradNorm) -> Reason:
    if not call.grads:
        return "there are no gradients"
    if (reason := unavailable(backend, call.grads[0])) is not None:
        return reason
    for g in call.grads:
        if type(g) is not Tensor and type(g) is not Parameter:
            return f"a tensor is a {type(g).__name__}"
        if g.dtype not in KERNEL_DTYPES:
            return f"dtype {g.dtype} is not float32, bfloat16 or float16"
        if g.layout != torch.strided or not dense(g):
            return f"strides {g.stride()} are not dense"
    return None


def stock(call: GradNorm) -> Tensor:
    if not call.grads:
        return torch.zeros(())
    wide = torch.promote_types(call.grads[0].dtype, torch.float32)
    norms = torch._foreach_norm(call.grads, 2.0, dtype=wide)
    return cast(Tensor, torch.linalg.vector_norm(torch.stack(norms)))


def cuda_backend(kernels: Any, *, emulated: bool = False) -> Backend:
    """The CUDA kernels in ``kernels``: the compiled ones, or, in the tests, those that the emulator runs."""
    refuses = partial(kernel_refuses, "cpu" if emulated else "cuda")
    return Backend("cuda", native("grad_norm", kernels), None, refuses, unproven("grad_norm", "cuda"))


_by_triton = of_fields(triton_kernel("adam", "grad_norm"))

GRAD_NORM.register(cuda_backend(torch.ops.bigkern_native))
GRAD_NORM.register(
    Backend("triton", _by_triton, None, partial(kernel_refuses, "triton"), unproven("grad_norm", "triton"))
)
GRAD_NORM.register(Backend("cpu", native("grad_norm"), refuses=partial(kernel_refuses, "cpu")))
GRAD_NORM.register(Backend("torch", stock))
