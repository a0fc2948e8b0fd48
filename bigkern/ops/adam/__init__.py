"""The Adam and AdamW update over lists of tensors, in place: schema, fake, backends, public function."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adam import adam as torch_adam

from bigkern.core import info, registry
from bigkern.core.library import (
    KERNEL_DTYPES,
    LIBRARY,
    define,
    define_native,
    lazily_negated,
    plain,
    triton_kernel,
    unavailable,
    unproven,
)
from bigkern.ops.adam import reference
from bigkern.ops.adam.call import LISTS, bind

# Everything is updated in place, element i of each list belonging to parameter i:
#   params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs  the update; the last is empty without amsgrad
#   grads        left as they are without grad_scale; with it, divided by it (as torch's fused path does);
#                with zero_grads, 0
#   state_steps  float32, 0-dim, on the parameters' device: THE OP ADDS 1 to each before it uses it
#   masters      empty, or where bf16 and fp16 parameters live in float32; int16: what bf16's rounding left
#   exp_avg_scales, exp_avg_sq_scales  empty, or, where the moments are uint8 codes, a float32 for each 256
#   seed         round v, and p without a master, at random where they are stored in bf16
#   lr_tensor    one float32 on the parameters' device, which replaces lr where it is given
#   found_inf    one float32; where it is not 0, nothing changes: no parameter, state, gradient or step
#   grad_norm    one float32, the norm of all gradients as they came: they are clipped to max_norm
_HYPER = (
    "float lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled, bool amsgrad,"
    " bool maximize, bool zero_grads, float max_norm, int? seed, Tensor? grad_scale, Tensor? found_inf,"
    " Tensor? lr_tensor, Tensor? grad_norm"
)
define(
    "adam(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs,"
    " Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] state_steps, Tensor(g!)[] masters,"
    f" Tensor(h!)[] exp_avg_scales, Tensor(i!)[] exp_avg_sq_scales, {_HYPER}) -> ()"
)
# The same from a table of addresses that a caller packs once and answers for: see Packed.
define_native(
    "adam_pack(Tensor[] params, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor[] max_exp_avg_sqs,"
    " Tensor[] state_steps, Tensor[] masters, Tensor[] exp_avg_scales, Tensor[] exp_avg_sq_scales)"
    " -> Tensor table"
)
define_native(
    f"adam_packed(Tensor param, Tensor exp_avg, Tensor? master, Tensor table, Tensor grads, {_HYPER}) -> ()"
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
    masters: Sequence[Tensor] = (),
    exp_avg_scales: Sequence[Tensor] = (),
    exp_avg_sq_scales: Sequence[Tensor] = (),
    lr: float | Tensor = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    amsgrad: bool = False,
    maximize: bool = False,
    zero_grads: bool = False,
    max_norm: float | None = None,
    seed: int | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    grad_norm: Tensor | None = None,
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
        exp_avgs: m, like ``params`` in shape, and for kernels in strides (other orders run on stock
            PyTorch); of their dtype, float32, bfloat16, or uint8 codes (block-wise dynamic quantisation,
            see :mod:`bigkern.ops.adam.dynamic8`).
        exp_avg_sqs: v, likewise.
        max_exp_avg_sqs: the running maximum of v with ``amsgrad``, likewise; otherwise empty.
        state_steps: t, one float32 scalar tensor a parameter on its device; 1 is added to each.
        masters: empty, or for each bfloat16 or float16 parameter its value in float32, or, for
            bfloat16, in int16 the bits that rounding takes from it. The update reads the master, and
            ``params`` become its rounding.
        exp_avg_scales, exp_avg_sq_scales: with uint8 moments a float32 for each 256 elements, as they
            lie in memory; otherwise empty.
        lr: learning rate; a one-element tensor is read on its device, without waiting for a GPU.
        beta1, beta2: decay of m and v, in [0, 1).
        eps: added to the denominator.
        weight_decay: decay of the parameters: ``g + weight_decay * p`` takes g's place, or, where
            ``decoupled``, p is first multiplied by ``1 - lr * weight_decay``.
        amsgrad: divide by the largest v so far.
        maximize: ascend.
        zero_grads: leave zeros in ``grads``.
        max_norm, grad_norm: clip: the gradients are multiplied by
            ``min(1, max_norm / (grad_norm + 1e-6))`` on the way in. ``grad_norm`` is a one-element
            tensor, the norm of all gradients as they came: :func:`grad_norm`'s.
        seed: round v, and parameters without masters, at random where they are stored in bfloat16, up or
            down in proportion to the distances, so that small updates are not lost; m and what has a
            master are always rounded to nearest. Bits depend on seed, step and position alone.
        grad_scale: one-element tensor; the gradients are divided by it first.
        found_inf: one-element tensor; where it is not 0 nothing is changed.

    Raises:
        TypeError: an argument is not a tensor or not a list of them, or a dtype does not fit.
        ValueError: lengths, shapes, devices or hyper-parameters do not fit.

    Source: Kingma and Ba, Adam (2015); Loshchilov and Hutter, Decoupled Weight Decay Regularization
    (2019); Reddi et al., On the Convergence of Adam and Beyond (2018); Dettmers et al., 8-bit Optimizers
    via Block-wise Quantization (2022).

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
        masters=masters,
        exp_avg_scales=exp_avg_scales,
        exp_avg_sq_scales=exp_avg_sq_scales,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled,
        amsgrad=amsgrad,
        maximize=maximize,
        zero_grads=zero_grads,
        max_norm=max_norm,
        seed=seed,
        grad_scale=grad_scale,
        found_inf=found_inf,
        grad_norm=grad_norm,
    )
    with torch.no_grad():
        if plain(*arguments[0], *arguments[1]):
            _forward(*arguments)
        else:
            torch.ops.bigkern.adam(*arguments)


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
    masters: list[Tensor],
    exp_avg_scales: list[Tensor],
    exp_avg_sq_scales: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
    zero_grads: bool,
    max_norm: float,
    seed: int | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    lr_tensor: Tensor | None,
    grad_norm: Tensor | None,
) -> None:
    """The same update by torch's own optimizer functions: its fused one where that takes the tensors.

    What torch.optim has no word for is left to the reference.
    """
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
    beyond = (masters, exp_avg_scales, exp_avg_sq_scales)
    hyper: Any = (lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize)
    own = any(m.dtype != p.dtype for p, m in zip(params, exp_avgs, strict=True))
    if own or any(beyond) or zero_grads or seed is not None or grad_norm is not None:
        rest: Any = (zero_grads, max_norm, seed, grad_scale, found_inf, lr_tensor, grad_norm)
        reference.adam(*lists, *beyond, *hyper, *rest)
        return
    alike = (grads, exp_avgs, exp_avg_sqs, *([max_exp_avg_sqs] if amsgrad else []))
    lazy = any(map(lazily_negated, itertools.chain(params, *alike)))
    fused = not lazy and all(
        p.is_floating_point() and dense(p) and all(same_layout(p, x) for x in others)
        for p, *others in zip(params, *alike, strict=True)
    )
    if not fused:
        if found_inf is not None and bool(found_inf):
            return
        if grad_scale is not None:
            for g in grads:
                g.div_(grad_scale.to(g.device))
        grad_scale = found_inf = None
    if found_inf is not None:
        found_inf = found_inf.reshape(())  # torch subtracts it from the 0-dim steps
    torch_adam(
        *lists,
        foreach=False if fused or lazy else None,
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


def same_layout(p: Tensor, other: Tensor) -> bool:
    """Whether an element lies as far from the first in ``other`` as in p, which is of the same shape."""
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


def kernel_refuses(backend: str, *arguments: Any) -> registry.Reason:
    """What no kernel of ours does, in whatever language."""
    lists = dict(zip(LISTS, arguments, strict=False))
    params = lists["params"]
    if not params:
        return None
    first = params[0]
    if (reason := unavailable(backend, first)) is not None:
        return reason
    if first.dtype not in KERNEL_DTYPES:
        return f"dtype {first.dtype} is not float32, bfloat16 or float16"
    for name, tensors in lists.items():
        like_params = not name.endswith(("steps", "scales"))
        for p, x in zip(params, tensors, strict=False):
            if type(x) is not Tensor and type(x) is not Parameter:
                return f"a tensor is a {type(x).__name__}"
            if x.device != first.device:
                return f"tensors are on {first.device} and on {x.device}"
            if x.dtype != (first.dtype if name == "grads" else tensors[0].dtype):
                return f"{name} are {tensors[0].dtype} and {x.dtype}"
            if x.layout != torch.strided:
                return f"a tensor's layout is {x.layout}"
            if like_params and not (dense(x) if x is p else same_layout(p, x)):
                return f"strides {x.stride()} are not dense, or not the parameter's {p.stride()}"
            if lazily_negated(x):
                return f"{name} are lazily negated"
    for step in lists["state_steps"]:
        if step.dtype != torch.float32:
            return f"a step is {step.dtype}, not float32"
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
    the same tensors again and again packs them once, and before each use asks where they and the new
    gradients are: :meth:`find`.
    """

    def __init__(self, lists: Sequence[list[Tensor]]):
        """``lists`` are the op's, without the gradients."""
        self._table = _native.adam_pack.default(*lists)
        masters = lists[5]
        self._like = (lists[0][0], lists[1][0], masters[0] if masters else None)
        self._addresses = list(map(info.addresses, lists))
        self._layouts = info.layouts(lists[0])

    def find(self, grads: list[Tensor], lists: Sequence[list[Tensor]]) -> Tensor | None:
        """The gradients' addresses, for :meth:`update`; None unless each is stored as its parameter was and
        is, and ``lists`` lie where they lay when they were packed. None may be lazily negated."""
        try:
            found = info.addresses(grads)
            if any(info.layouts(tensors) != self._layouts for tensors in (lists[0], grads)):
                return None
            if list(map(info.addresses, lists)) != self._addresses:
                return None
        except RuntimeError:  # one has no address
            return None
        return torch.frombuffer(found, dtype=torch.int64)

    def update(self, grads: Tensor, *hyper: Any) -> None:
        """The op on what was packed; ``hyper`` are its arguments after the lists."""
        _native.adam_packed.default(*self._like, self._table, grads, *hyper)

    def grad_norm(self, grads: Tensor) -> Tensor:
        """The norm of the gradients that :meth:`find` found."""
        return cast(Tensor, _native.grad_norm_packed.default(self._like[0], self._table, grads))


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
