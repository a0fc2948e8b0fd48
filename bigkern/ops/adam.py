"""The Adam and AdamW update over lists of tensors, in place: schema, fake, backends, public function."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adam import adam as torch_adam

from bigkern import registry
from bigkern.ops._library import (
    KERNEL_DTYPES,
    LIBRARY,
    define,
    define_native,
    plain,
    triton_kernel,
    unavailable,
    unproven,
)

# Everything is updated in place, element i of each list belonging to parameter i:
#   params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs  the update; the last is empty without amsgrad
#   grads        left as they are without grad_scale; with it, divided by it (as torch's fused path does)
#   state_steps  float32, 0-dim, on the parameters' device: THE OP ADDS 1 to each before it uses it
#   lr_tensor    one float32 on the parameters' device, which replaces lr where it is given
#   found_inf    one float32; where it is not 0, nothing changes: no parameter, state, gradient or step
define(
    "adam(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs,"
    " Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] state_steps, float lr, float beta1, float beta2, float eps,"
    " float weight_decay, bool decoupled, bool amsgrad, bool maximize, Tensor? grad_scale=None,"
    " Tensor? found_inf=None, Tensor? lr_tensor=None) -> ()"
)
# The same from a table of addresses that a caller packs once and answers for: see Packed.
define_native(
    "adam_pack(Tensor[] params, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor[] max_exp_avg_sqs,"
    " Tensor[] state_steps, bool amsgrad) -> Tensor table"
)
define_native(
    "adam_packed(Tensor like, Tensor table, Tensor grads, float lr, float beta1, float beta2, float eps,"
    " float weight_decay, bool decoupled, bool amsgrad, bool maximize, Tensor? grad_scale=None,"
    " Tensor? found_inf=None, Tensor? lr_tensor=None) -> ()"
)


# ---- the public function ---------------------------------------------------------------------------


def adam(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    amsgrad: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    r"""One step of Adam, or of AdamW with ``decoupled``, over lists of tensors, in place.

    ``m = beta1 m + (1 - beta1) g``, ``v = beta2 v + (1 - beta2) g^2``,
    ``p = p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)``

    All tensors of all parameters are read and written once, in one pass. The math is float32 whatever
    the storage.

    Args:
        params: the parameters, any shapes; float32, bfloat16 or float16 on one device, stored densely
            in any order of dimensions (float64, complex and other layouts run on stock PyTorch).
        grads: g, like ``params``. With ``grad_scale`` they are divided by it in place.
        exp_avgs: m, like ``params`` in shape, dtype and strides.
        exp_avg_sqs: v, likewise.
        max_exp_avg_sqs: the running maximum of v with ``amsgrad``, likewise; otherwise empty.
        state_steps: t, one float32 scalar tensor a parameter on its device; 1 is added to each.
        lr: learning rate; a one-element tensor is read on its device, without waiting for it.
        beta1, beta2: decay of m and v, in [0, 1).
        eps: added to the denominator.
        weight_decay: decay of the parameters: ``g + weight_decay * p`` takes g's place, or, where
            ``decoupled``, p is first multiplied by ``1 - lr * weight_decay``.
        amsgrad: divide by the largest v so far.
        maximize: ascend.
        grad_scale: one-element tensor; the gradients are divided by it first.
        found_inf: one-element tensor; where it is not 0 nothing is changed.

    Raises:
        TypeError: an argument is not a tensor or not a list of them, or a dtype does not fit.
        ValueError: lengths, shapes, devices or hyper-parameters do not fit.

    Source: Kingma and Ba, Adam (2015); Loshchilov and Hutter, Decoupled Weight Decay Regularization
    (2019); Reddi et al., On the Convergence of Adam and Beyond (2018).

    Example:
        >>> import torch
        >>> from bigkern.ops.adam import adam
        >>> p, g = torch.ones(3), torch.ones(3)
        >>> adam([p], [g], [torch.zeros(3)], [torch.zeros(3)], [], [torch.tensor(0.0)], lr=0.5)
        >>> p
        tensor([0.5000, 0.5000, 0.5000])
    """
    arguments = bind(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        state_steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled,
        amsgrad=amsgrad,
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
    with torch.no_grad():
        if plain(*arguments[0], *arguments[1]):
            _forward(*arguments)
        else:
            torch.ops.bigkern.adam(*arguments)


# ---- checks ----------------------------------------------------------------------------------------


def bind(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    amsgrad: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> tuple[Any, ...]:
    """Check a public call and turn it into the op's arguments, in the order of its schema."""
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if amsgrad:
        lists["max_exp_avg_sqs"] = max_exp_avg_sqs
    elif len(max_exp_avg_sqs) != 0:
        have = len(max_exp_avg_sqs)
        raise ValueError(f"max_exp_avg_sqs must be empty without amsgrad, not of length {have}")
    for name, tensors in {**lists, "state_steps": state_steps}.items():
        _check_list(name, tensors, params)
    for name, tensors in lists.items():
        _check_like_params(name, tensors, params)
    for i, step in enumerate(state_steps):
        if step.numel() != 1:
            raise ValueError(f"state_steps[{i}] must have 1 element, not shape {tuple(step.shape)}")
    _check_distinct(params)
    if isinstance(lr, Tensor):
        _check_scalar_tensor("lr", lr)
    else:
        _check_hyper("lr", lr, 0.0, math.inf)
    _check_hyper("beta1", beta1, 0.0, 1.0)
    _check_hyper("beta2", beta2, 0.0, 1.0)
    _check_hyper("eps", eps, 0.0, math.inf)
    _check_hyper("weight_decay", weight_decay, 0.0, math.inf)
    for name, scalar in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if scalar is not None:
            _check_scalar_tensor(name, scalar)
    rate, lr_tensor = split_lr(lr, params[0].device if params else torch.device("cpu"))
    hyper = (rate, float(beta1), float(beta2), float(eps), float(weight_decay))
    all_lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
    return (*map(list, all_lists), *hyper, decoupled, amsgrad, maximize, grad_scale, found_inf, lr_tensor)


def split_lr(lr: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """``lr`` as the op takes it: a number, or a tensor where reading the number would wait for a GPU."""
    if not isinstance(lr, Tensor):
        return float(lr), None
    if lr.device.type == "cpu":
        return float(lr), None
    return 0.0, lr.detach().to(device=device, dtype=torch.float32, non_blocking=True)


def _check_list(name: str, tensors: Any, params: Any) -> None:
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{name} must be a list of Tensors, not {type(tensors).__name__}")
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{i}] must be a Tensor, not {type(tensor).__name__}")
    if len(tensors) != len(params):
        raise ValueError(f"{name} must have one tensor a parameter, {len(params)}, not {len(tensors)}")


def _check_like_params(name: str, tensors: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise TypeError(f"{name}[{i}] must be floating point, not {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name}[{i}] must be dense, not {tensor.layout}")
        if tensor.dtype != param.dtype:
            raise TypeError(f"{name}[{i}] must have params[{i}]'s dtype {param.dtype}, not {tensor.dtype}")
        if tensor.device != param.device:
            want, have = param.device, tensor.device
            raise ValueError(f"{name}[{i}] must be on params[{i}]'s device {want}, not {have}")
        if tensor.shape != param.shape:
            shape, got = tuple(param.shape), tuple(tensor.shape)
            raise ValueError(f"{name}[{i}] must have params[{i}]'s shape {shape}, not {got}")


def _check_distinct(params: Sequence[Tensor]) -> None:
    seen: dict[int, int] = {}
    for i, param in enumerate(params):
        if param.numel() == 0 or type(param) not in (Tensor, Parameter):
            continue
        first = seen.setdefault(0 if param.is_meta else param.data_ptr(), i)
        if first != i and not param.is_meta:
            raise ValueError(f"params[{i}] shares its memory with params[{first}]; each must be given once")


def _check_hyper(name: str, value: Any, low: float, end: float) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    if not low <= value < end:
        raise ValueError(f"{name} must be in [{low}, {end}), not {value}")


def _check_scalar_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, not {type(tensor).__name__}")
    if tensor.numel() != 1:
        raise ValueError(f"{name} must have 1 element, not shape {tuple(tensor.shape)}")


# ---- the op: fake and kernel -----------------------------------------------------------------------


@torch.library.register_fake("bigkern::adam", lib=LIBRARY)
def _fake(*_: Any) -> None:
    return None


def _forward(*arguments: Any) -> None:
    if arguments[0]:
        ADAM.resolve(*arguments).forward(*arguments)


# Not by device: an empty list has none.
LIBRARY.impl("adam", _forward, "CompositeExplicitAutograd")


# ---- backends --------------------------------------------------------------------------------------

ADAM = registry.declare("adam", bind)


def stock(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    lr_tensor: Tensor | None = None,
) -> None:
    """The same update by torch's own optimizer functions: its fused one where that takes the tensors."""
    fused = all(
        p.is_floating_point() and dense(p) and _same_layout(p, g) for p, g in zip(params, grads, strict=True)
    )
    if not fused:
        if found_inf is not None and bool(found_inf):
            return
        if grad_scale is not None:
            torch._foreach_div_(grads, grad_scale.to(grads[0].device))
        grad_scale = found_inf = None
    if found_inf is not None:
        found_inf = found_inf.reshape(())  # torch subtracts it from the 0-dim steps
    torch_adam(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        state_steps,
        foreach=False if fused else None,
        fused=fused,
        capturable=not fused and state_steps[0].device.type == "cuda",
        grad_scale=grad_scale,
        found_inf=found_inf,
        has_complex=any(p.is_complex() for p in params),
        decoupled_weight_decay=decoupled,
        amsgrad=amsgrad,
        beta1=beta1,
        beta2=beta2,
        lr=lr if lr_tensor is None else lr_tensor,
        weight_decay=weight_decay,
        eps=eps,
        maximize=maximize,
    )


def _same_layout(p: Tensor, other: Tensor) -> bool:
    return p.stride() == other.stride() or (p.is_contiguous() and other.is_contiguous())


def dense(p: Tensor) -> bool:
    """Whether p's elements fill one block of memory, each once, in any order of dimensions."""
    if p.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def kernel_refuses(
    backend: str, params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], *rest: Any
) -> registry.Reason:
    """What no kernel of ours does, in whatever language; `rest` is the remainder of the op's arguments."""
    exp_avg_sqs, max_exp_avg_sqs, state_steps = rest[:3]
    if not params:
        return None
    first = params[0]
    if (reason := unavailable(backend, first)) is not None:
        return reason
    if first.dtype not in KERNEL_DTYPES:
        return f"dtype {first.dtype} is not float32, bfloat16 or float16"
    for group in (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs):
        for p, x in zip(params, group, strict=False):
            if type(x) is not Tensor and type(x) is not Parameter:
                return f"a tensor is a {type(x).__name__}"
            if x.device != first.device:
                return f"tensors are on {first.device} and on {x.device}"
            if x.dtype != first.dtype:
                return f"tensors are {first.dtype} and {x.dtype}"
            if x.layout != torch.strided:
                return f"a tensor's layout is {x.layout}"
            if not (dense(x) if x is p else _same_layout(p, x)):
                return f"strides {x.stride()} are not dense, or not the parameter's {p.stride()}"
    for step in state_steps:
        if step.device != first.device or step.dtype != torch.float32:
            return f"a step is {step.dtype} on {step.device}, not float32 on {first.device}"
    return None


def _counted(update: Any) -> Any:
    """``update``, after which autograd knows that the parameters changed, as after any in-place op."""

    def forward(*arguments: Any) -> None:
        update(*arguments)
        torch.autograd.graph.increment_version(arguments[0])

    return forward


def cuda_backend(native: Any, *, emulated: bool = False) -> registry.Backend:
    """The CUDA kernels in ``native``: the compiled ones, or, in the tests, those that the emulator runs."""
    forward = _counted(lambda *arguments: native.adam(*arguments))
    refuses = partial(kernel_refuses, "cpu" if emulated else "cuda")
    return registry.Backend("cuda", forward, None, refuses, unproven("adam", "cuda"))


_native = torch.ops.bigkern_native


class Packed:
    """Parameters and their states as the table of addresses that the compiled kernels read.

    Unpacking lists of thousands of tensors costs more than updating small ones. A caller that updates
    the same tensors again and again packs them once, and before each use asks whether the addresses
    still hold: :meth:`matches` for the tensors that were packed, :meth:`fits` for new gradients.
    """

    def __init__(self, lists: Sequence[list[Tensor]], *, amsgrad: bool):
        self._table = _native.adam_pack.default(*lists, amsgrad)
        self._like = lists[0][0]
        self._addresses = [_addresses(tensors) for tensors in lists]
        self._sizes = list(map(Tensor.numel, lists[0]))
        self._strides = list(map(Tensor.stride, lists[0]))

    def matches(self, lists: Sequence[list[Tensor]]) -> bool:
        """Whether these are the tensors that were packed, lying where they lay."""
        return all(_addresses(now) == then for now, then in zip(lists, self._addresses, strict=True))

    def fits(self, grads: list[Tensor]) -> bool:
        """Whether every gradient is stored as its parameter is."""
        return (
            set(map(_dtype, grads)) == {self._like.dtype}
            and list(map(Tensor.numel, grads)) == self._sizes
            and list(map(Tensor.stride, grads)) == self._strides
        )

    def update(self, grads: list[Tensor], *hyper: Any) -> None:
        """The op on what was packed; ``hyper`` are its arguments after the lists."""
        addresses = torch.frombuffer(array("q", _addresses(grads)), dtype=torch.int64)
        _native.adam_packed.default(self._like, self._table, addresses, *hyper)


_dtype = attrgetter("dtype")


def _addresses(tensors: list[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


ADAM.register(cuda_backend(_native))
ADAM.register(
    registry.Backend(
        "triton",
        _counted(triton_kernel("adam", "adam")),
        None,
        partial(kernel_refuses, "triton"),
        unproven("adam", "triton"),
    )
)
ADAM.register(
    registry.Backend(
        "cpu", _counted(lambda *arguments: _native.adam(*arguments)), None, partial(kernel_refuses, "cpu")
    )
)
ADAM.register(registry.Backend("torch", _counted(stock)))
