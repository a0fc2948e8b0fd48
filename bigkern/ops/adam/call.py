"""What the adam op is called with, and the checks of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from bigkern.core.checks import check_written
from bigkern.core.op import Call, Written
from bigkern.ops.adam.dynamic8 import blocks_of

NARROW = (torch.bfloat16, torch.float16)
NUMBERS = (float, int, Real)  # the usual ones first: asking an abstract class takes time
BELOW = {"lr": math.inf, "beta1": 1.0, "beta2": 1.0, "eps": math.inf, "weight_decay": math.inf}


@dataclass(slots=True)
class Lists(Call):
    """Everything is updated in place, element i of each list belonging to parameter i."""

    params: Written
    grads: Written  # left as they are; with grad_scale divided by it (as torch's fused path does); or 0
    exp_avgs: Written
    exp_avg_sqs: Written
    max_exp_avg_sqs: Written  # empty without amsgrad
    state_steps: Written  # float32, 0-dim, on the parameters' device: THE OP ADDS 1 to each before it uses it
    # Empty, or where bf16 and fp16 parameters live in float32; int16: what bf16's rounding left.
    masters: Written = field(default_factory=list)
    # Empty, or, where the moments are uint8 codes, a float32 for each 256.
    exp_avg_scales: Written = field(default_factory=list)
    exp_avg_sq_scales: Written = field(default_factory=list)


@dataclass(slots=True)
class Adam(Lists):
    """One step of Adam, or of AdamW where ``decoupled``."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    amsgrad: bool = False
    maximize: bool = False
    zero_grads: bool = False
    max_norm: float = 0.0
    seed: int | None = None  # round v, and p without a master, at random where they are stored in bf16
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None  # one float32; where it is not 0, nothing changes: not even a step
    lr_tensor: Tensor | None = None  # one float32 on the parameters' device, which replaces lr
    grad_norm: Tensor | None = None  # one float32, of all gradients as they came: clip them to max_norm


def bind(*arguments: Any, max_norm: float | None = None, **options: Any) -> Adam:
    """Check a call of :func:`bigkern.ops.adam.adam`, and turn it into the op's."""
    call = Adam(*arguments, **options)
    lists = {name: getattr(call, name) for name in Lists.names}
    for name, tensors in lists.items():
        check_tensors(name, tensors)
        setattr(call, name, list(tensors))
    for name in ("decoupled", "amsgrad", "maximize", "zero_grads"):
        check_flag(name, getattr(call, name))
    _check_lengths(call, lists)
    device = call.params[0].device if call.params else torch.device("cpu")
    _check_lists(call, lists, device)
    if isinstance(call.lr, Tensor):
        _check_scalar_tensor("lr", call.lr, device)
        call.lr, call.lr_tensor = split_lr(call.lr, device)
    for name, end in BELOW.items():
        setattr(call, name, _hyper(name, getattr(call, name), end))
    if (max_norm is None) != (call.grad_norm is None):
        raise ValueError("max_norm and grad_norm must be given together")
    call.max_norm = 0.0 if max_norm is None else _hyper("max_norm", max_norm, math.inf)
    seed = call.seed
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise ValueError(f"seed must be an int in [0, 2^63), not {seed!r}")
    for name in ("grad_scale", "found_inf", "grad_norm"):
        setattr(call, name, _scalar(name, getattr(call, name), device))
    return call


def split_lr(lr: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """``lr`` as the op takes it: a number, or a tensor where reading the number would wait for a GPU."""
    if not isinstance(lr, Tensor) or lr.device.type == "cpu":
        return number("lr", lr), None
    return 0.0, lr.detach().to(device=device, dtype=torch.float32, non_blocking=True)


def check_tensors(name: str, tensors: Any) -> None:
    """Refuse what is not a list of tensors."""
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{name} must be a list of Tensors, not {type(tensors).__name__}")
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{i}] must be a Tensor, not {type(tensor).__name__}")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is not a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")


def number(name: str, value: Any) -> float:
    """``value`` as a float."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a number, not {value!r}") from error


def finite(value: Any) -> float | None:
    """A real number as a float; None if it is not one, or not finite."""
    try:
        real = float(value) if isinstance(value, NUMBERS) else math.nan
    except OverflowError:
        return None
    return real if math.isfinite(real) else None


def _in_codes(call: Adam) -> bool:
    return len(call.exp_avgs) > 0 and call.exp_avgs[0].dtype == torch.uint8


def _check_lengths(call: Adam, lists: dict[str, Sequence[Tensor]]) -> None:
    codes, n = _in_codes(call), len(call.params)
    if call.amsgrad and codes:
        raise ValueError("amsgrad must be False with 8-bit moments: a maximum of codes would creep upwards")
    optional = {"max_exp_avg_sqs": (call.amsgrad, "amsgrad"), "masters": (len(call.masters) > 0, "")}
    optional |= dict.fromkeys(("exp_avg_scales", "exp_avg_sq_scales"), (codes, "8-bit moments"))
    for name, tensors in lists.items():
        wanted, why = optional.get(name, (True, ""))
        if not wanted and len(tensors) != 0:
            raise ValueError(f"{name} must be empty without {why}, not of length {len(tensors)}")
        if wanted and len(tensors) != n:
            raise ValueError(f"{name} must have one tensor a parameter, {n}, not {len(tensors)}")


def _check_lists(call: Adam, lists: dict[str, Sequence[Tensor]], device: torch.device) -> None:
    params = call.params
    _check_like_params("params", params, params)
    _check_like_params("grads", call.grads, params)
    for name in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
        _check_moments(name, lists[name], call.exp_avgs, params)
    if call.masters:
        _check_masters(call.masters, params)
    if _in_codes(call):
        _check_scales("exp_avg_scales", call.exp_avg_scales, params)
        _check_scales("exp_avg_sq_scales", call.exp_avg_sq_scales, params)
    for i, step in enumerate(call.state_steps):
        _check_scalar_tensor(f"state_steps[{i}]", step, device)
        if not step.is_floating_point():
            raise TypeError(f"state_steps[{i}] must be floating point, not {step.dtype}")
    _check_distinct(params)
    for name, tensors in lists.items():
        if name != "grads" or call.zero_grads or call.grad_scale is not None:
            for i, tensor in enumerate(tensors):
                check_written(f"{name}[{i}]", tensor)


def _check_like_params(name: str, tensors: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise TypeError(f"{name}[{i}] must be floating point, not {tensor.dtype}")
        if tensor.dtype != param.dtype:
            raise TypeError(f"{name}[{i}] must have params[{i}]'s dtype {param.dtype}, not {tensor.dtype}")
        _check_place(name, i, tensor, param)


def _check_place(name: str, i: int, tensor: Tensor, param: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}[{i}] must be dense, not {tensor.layout}")
    if tensor.device != param.device:
        want, have = param.device, tensor.device
        raise ValueError(f"{name}[{i}] must be on params[{i}]'s device {want}, not {have}")
    if tensor.shape != param.shape:
        shape, got = tuple(param.shape), tuple(tensor.shape)
        raise ValueError(f"{name}[{i}] must have params[{i}]'s shape {shape}, not {got}")


def _check_moments(
    name: str, tensors: Sequence[Tensor], exp_avgs: Sequence[Tensor], params: Sequence[Tensor]
) -> None:
    """Moments are stored as their parameter is, or wider, or all in bfloat16 or 8-bit codes."""
    for i, (tensor, param) in enumerate(zip(tensors, params, strict=False)):
        allowed = {param.dtype}
        if param.dtype in (torch.float32, *NARROW):
            allowed |= {torch.float32, torch.bfloat16, torch.uint8}
        if tensor.dtype not in allowed:
            raise TypeError(
                f"{name}[{i}] must have params[{i}]'s dtype {param.dtype}, or be float32, bfloat16 or uint8"
                f" beside a parameter of at most 32 bits, not {tensor.dtype}"
            )
        if tensor.dtype != exp_avgs[i].dtype:
            raise TypeError(
                f"{name}[{i}] must have exp_avgs[{i}]'s dtype {exp_avgs[i].dtype}, not {tensor.dtype}"
            )
        _check_place(name, i, tensor, param)


def _check_masters(masters: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    for i, (master, param) in enumerate(zip(masters, params, strict=True)):
        if param.dtype not in NARROW:
            raise TypeError(f"masters must be empty for params[{i}] of dtype {param.dtype}: it needs none")
        if master.dtype != torch.float32 and not (
            master.dtype == torch.int16 and param.dtype == torch.bfloat16
        ):
            raise TypeError(
                f"masters[{i}] must be float32, or, for bfloat16, int16 remainders, not {master.dtype}"
            )
        _check_place("masters", i, master, param)


def _check_scales(name: str, scales: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    for i, (scale, param) in enumerate(zip(scales, params, strict=True)):
        blocks = blocks_of(param.numel())
        if scale.dtype != torch.float32 or scale.shape != (blocks,):
            have = f"{scale.dtype} {tuple(scale.shape)}"
            raise ValueError(f"{name}[{i}] must be float32 ({blocks},), one for 256 elements, not {have}")


def _check_distinct(params: Sequence[Tensor]) -> None:
    seen: dict[int, int] = {}
    for i, param in enumerate(params):
        if param.numel() == 0 or type(param) not in (Tensor, Parameter):
            continue
        first = seen.setdefault(0 if param.is_meta else param.data_ptr(), i)
        if first != i and not param.is_meta:
            raise ValueError(f"params[{i}] shares its memory with params[{first}]; each must be given once")


def _hyper(name: str, value: Any, end: float) -> float:
    if not isinstance(value, NUMBERS):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    real = finite(value)
    if real is None or not 0.0 <= real < end:
        raise ValueError(f"{name} must be in [0.0, {end}), not {value}")
    return real


def _scalar(name: str, tensor: Any, device: torch.device) -> Tensor | None:
    """A one-element tensor as the op takes it, or None."""
    if tensor is None:
        return None
    _check_scalar_tensor(name, tensor, device)
    return cast(Tensor, tensor.detach().to(device, torch.float32))


def _check_scalar_tensor(name: str, tensor: Any, device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, not {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be dense, not {tensor.layout}")
    if tensor.numel() != 1:
        raise ValueError(f"{name} must have 1 element, not shape {tuple(tensor.shape)}")
    if tensor.is_complex():
        raise TypeError(f"{name} must be real, not {tensor.dtype}")
    if tensor.is_meta and device.type != "meta":
        raise ValueError(f"{name} must be on params' device {device}, not on {tensor.device}")


def sizes(call: Adam) -> tuple[int, ...]:
    """Elements, and tensors."""
    return sum(p.numel() for p in call.params), len(call.params)


def options(call: Adam) -> tuple[str, ...]:
    """How moments and masters are stored, and what more is done."""
    stored = [str(x[0].dtype).removeprefix("torch.") for x in (call.exp_avgs, call.masters) if x]
    words = (
        call.amsgrad and "amsgrad",
        call.maximize and "maximize",
        call.grad_norm is not None and "clipping",
        (call.grad_scale is not None or call.found_inf is not None) and "scaler",
        call.lr_tensor is not None and "lr_tensor",
    )
    return (*stored, *(word for word in words if word))
