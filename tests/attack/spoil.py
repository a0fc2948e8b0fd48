"""One argument made into what it must not be, or into something odd that is still legal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from source import Call, Source
from torch import Tensor

INTEGERS = (torch.int32, torch.int64)


def spoil(source: Source, call: Call) -> Call:
    """The call with one argument changed."""
    name = source.one_of(sorted(call.arguments))
    value = call.arguments[name]
    if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
        changed = _spoiled_list(source, call, list(value))
        call.arguments[name] = changed if isinstance(value, list) else tuple(changed)
    else:
        call.arguments[name] = _spoiled(source, call, value)
    call.spoiled += (name,)
    return call


def _spoiled(source: Source, call: Call, value: Any) -> Any:
    if isinstance(value, Tensor):
        return _spoiled_tensor(source, call, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return source.one_of([-1, 0, value + 1, 2**31, 2**62])
    if isinstance(value, float) and "::" in call.name:  # numbers are the public function's to check
        return source.one_of([0.0, value / 2])
    if isinstance(value, float):
        return source.one_of([math.nan, math.inf, -math.inf, -1.0, 0.0, 2.0])
    if isinstance(value, str):
        return source.one_of(["", "bad", value.upper()])
    if value is None:
        return source.one_of([torch.zeros(3), torch.zeros(()), torch.zeros(2, 2, dtype=torch.int64)])
    return source.one_of([None, "bad", (), (-1, 3)])


def _spoiled_list(source: Source, call: Call, values: list[Any]) -> list[Any]:
    at = source.below(len(values))
    ways: list[Callable[[], list[Any]]] = [
        lambda: [],
        lambda: values[:-1],
        lambda: [*values, values[0]],
        lambda: [*values[:at], _spoiled(source, call, values[at]), *values[at + 1 :]],
    ]
    return source.one_of([*ways, ways[-1], ways[-1]])()


def _spoiled_tensor(source: Source, call: Call, x: Tensor) -> Any:
    if x.dtype in INTEGERS and x.numel() > 0 and source.chance(0.7):
        return _odd_number(source, x)
    return source.one_of(_WAYS)(source, call, x)


def _odd_number(source: Source, x: Tensor) -> Tensor:
    x = x.clone()
    old, top = int(x.flatten()[-1]), torch.iinfo(x.dtype).max
    x.view(-1)[source.below(x.numel())] = source.one_of([-1, old + 1, old - 1, 0, 100, 10**6, top, -top])
    return x


def _flat(source: Source, call: Call, x: Tensor) -> Tensor:
    return x.reshape(-1)


def _turned(source: Source, call: Call, x: Tensor) -> Tensor:
    """As many elements in another shape."""
    if x.dim() < 2:
        return x.unsqueeze(source.below(x.dim() + 1))
    return x.transpose(source.below(x.dim()), source.below(x.dim()))


def _reshaped(source: Source, call: Call, x: Tensor) -> Tensor:
    turned = x.transpose(0, -1) if x.dim() > 1 else x.unsqueeze(0)
    return x.reshape(turned.shape)


def _shorter(source: Source, call: Call, x: Tensor) -> Tensor:
    if x.dim() == 0:
        return x.reshape(1)[:0]
    d = source.below(x.dim())
    return x.narrow(d, 0, max(0, x.shape[d] - 1))


def _longer(source: Source, call: Call, x: Tensor) -> Tensor:
    if x.dim() == 0:
        return x.repeat(2)
    d = source.below(x.dim())
    return torch.cat([x, x.narrow(d, 0, min(1, x.shape[d]))], d)


def _empty(source: Source, call: Call, x: Tensor) -> Tensor:
    return x.new_empty(0) if x.dim() == 0 else x.narrow(source.below(x.dim()), 0, 0)


def _broadcast(source: Source, call: Call, x: Tensor) -> Tensor:
    """Of the same shape, with a stride of 0."""
    if x.numel() == 0 or x.dim() == 0:
        return x
    d = source.below(x.dim())
    return x.narrow(d, 0, 1).expand(x.shape)


def _of_one_number(source: Source, call: Call, x: Tensor) -> Tensor:
    return x if x.numel() == 0 else x.flatten()[:1].reshape((1,) * x.dim()).expand(x.shape)


def _other_dtype(source: Source, call: Call, x: Tensor) -> Tensor:
    dtypes = (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int32,
        torch.int64,
        torch.bool,
    )
    return x.to(source.one_of(dtypes))


def _without_storage(source: Source, call: Call, x: Tensor) -> Tensor:
    """A tensor whose storage is taken away, as FSDP does, just before the call."""
    x = x.clone()

    def take_away() -> None:
        x.untyped_storage().resize_(0)

    if x.numel() > 0 and call.kernels:
        call.last_touch, call.without_memory = take_away, True
    return x


def _on_meta(source: Source, call: Call, x: Tensor) -> Tensor:
    """On another device. Of a public op torch would run the fake, whatever else is on the CPU."""
    if not call.kernels:
        return x
    call.without_memory = True
    meta = x.to("meta")
    meta.numbers = x  # type: ignore[attr-defined]
    return meta


def _none(source: Source, call: Call, x: Tensor) -> None:
    return None


def _no_tensor(source: Source, call: Call, x: Tensor) -> Any:
    return source.one_of(["bad", 1.5, [1, 2]])


_WAYS: list[Callable[[Source, Call, Tensor], Any]] = [
    _flat, _turned, _reshaped, _shorter, _longer, _empty, _broadcast, _of_one_number, _other_dtype,
    _without_storage, _on_meta, _none, _no_tensor,
]  # fmt: skip
