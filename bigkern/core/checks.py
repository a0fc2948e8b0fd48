"""Checks of arguments that all ops share. Each error begins with the argument's name."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MOST = 2**63 - 1  # what an op's int holds


def kind(x: object) -> object:
    """What an argument is, for an error: a tensor's dtype, else its type."""
    return x.dtype if isinstance(x, Tensor) else type(x).__name__


def check_dense(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, not {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        found = "a nested one" if x.is_nested else x.layout
        raise TypeError(f"{name} must be a dense Tensor, not {found}")


def check_dense_or_jagged(name: str, x: Any) -> None:
    """Stock's functions take nested tensors of layout torch.jagged too."""
    if not isinstance(x, Tensor) or x.layout != torch.jagged:
        check_dense(name, x)


def check_tensor(name: str, tensor: Any, x: Tensor) -> None:
    """A tensor beside x."""
    check_dense_or_jagged(name, tensor)
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, not {tensor.device}")


def check_written(name: str, x: Tensor) -> None:
    """What is written in place must not be expanded."""
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        found = f"strides {x.stride()} for shape {tuple(x.shape)}"
        raise ValueError(f"{name} must have memory for each element, because it is written, not {found}")


def check_number(name: str, x: Any, must: str, least: float = -math.inf, below: float = math.inf) -> float:
    """A finite number within [least, below); ``must`` says so in words."""
    try:
        fits = least <= x < below and -math.inf < x
        number = float(x)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{name} must be a number, not {kind(x)}") from None
    if not fits:
        raise ValueError(f"{name} must be {must}, not {x}")
    return number


def check_eps(eps: Any) -> float:
    return check_number("eps", eps, "finite and not negative", 0.0)


def check_flag(name: str, x: Any) -> bool:
    if not isinstance(x, int):
        raise TypeError(f"{name} must be True or False, not {kind(x)}")
    return bool(x)


def check_size(name: str, x: Any) -> None:
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"{name} must be an int, not {kind(x)}")
    if not 0 <= x < 2**31:
        raise ValueError(f"{name} must be a size, within 0 and 2^31, not {x}")


def check_factory(device: Any, dtype: Any) -> None:
    """What a layer's parameters are made with."""
    try:
        torch.empty(0, device=device)
    except (TypeError, RuntimeError) as error:
        raise type(error)(f"device must be a device of torch's, not {device!r}: {error}") from None
    if not isinstance(dtype, torch.dtype | None):
        raise TypeError(f"dtype must be a torch.dtype or None, not {type(dtype).__name__}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating point, not {dtype}")


def check_choice(name: str, x: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(x, str) or x not in choices:
        said = ", ".join(f'"{choice}"' for choice in choices[:-1])
        raise ValueError(f'{name} must be {said} or "{choices[-1]}", not {x!r}')


TORCHS = (TypeError, ValueError, RuntimeError, IndexError, OverflowError)  # what its functions raise


def named(error: Exception, misfit: str | None) -> Exception:
    """torch's error with what is wrong with an argument before it; as it is if nothing is known to be."""
    if misfit is None:
        return error
    kept = type(error) if isinstance(error, TypeError | ValueError | RuntimeError) else RuntimeError
    return kept(f"{misfit}: {error}")


def misfit_beside(name: str, x: Any, first: Any, firsts_name: str) -> str | None:
    """What is wrong with a tensor by itself, or beside the first one of a call."""
    try:
        check_dense(name, x)
    except TypeError as error:
        return str(error)
    if not x.is_floating_point():
        return f"{name} must be floating point, not {x.dtype}"
    if x.dtype != first.dtype:
        return f"{name} must have {firsts_name}'s dtype {first.dtype}, not {x.dtype}"
    if x.device != first.device:
        return f"{name} must be on {firsts_name}'s device {first.device}, not {x.device}"
    return None


def misfit_dtype(x: Tensor, others: dict[str, Tensor | None]) -> str | None:
    """Which dtype is not x's, or not one that torch's norms take."""
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != x.dtype:
            return f"{name} must have x's dtype {x.dtype}, not {tensor.dtype}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return f"x must be float32, bfloat16, float16 or float64, not {x.dtype}"
    return None
