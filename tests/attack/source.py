"""Where the numbers of one call come from: a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Call:
    """A function, its arguments by name, and what may be said of its results."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    written: frozenset[str] = frozenset()  # the arguments that the function may write into
    exact: Callable[..., Any] | None = None  # the same in float64; None: the results are not compared
    plain: Callable[..., Any] | None = None  # the same by torch's own functions, in the call's own dtype
    gradients: bool = False  # whether gradients are compared, too
    last_touch: Callable[[], object] = field(default=lambda: None)  # done just before the call
    kernels: bool = True  # whether our kernels are asked for: torch's functions may read where nothing is
    without_memory: bool = False  # whether an argument has lost its memory, of which torch has its own words
    spoiled: tuple[str, ...] = ()  # the arguments that are not what they should be

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={described(value)}" for name, value in self.arguments.items())
        return f"{self.name}({arguments})"


def described(value: Any) -> str:
    """A tensor by its dtype, shape and strides; few integers by themselves."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(described, value))}]"
    if not isinstance(value, Tensor):
        return repr(value)
    if not value.is_meta and not value.is_floating_point() and value.numel() <= 8:
        return f"{str(value.dtype).removeprefix('torch.')} {value.tolist()}"
    strides = "" if value.is_contiguous() else f" strides {value.stride()}"
    meta = " on meta" if value.is_meta else ""
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}{strides}{meta}"


class Source:
    """Choices and tensors, the same for the same seed."""

    def __init__(self, seed: str):
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(self._random.getrandbits(60))

    def one_of(self, choices: Sequence[T]) -> T:
        return self._random.choice(choices)

    def below(self, end: int) -> int:
        return self._random.randrange(end)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def maybe(self, make: Callable[[], T], probability: float = 0.5) -> T | None:
        return make() if self.chance(probability) else None

    def size(self, most: int = 200) -> int:
        """Small sizes often, and those around the kernels' tiles."""
        sizes = (1, 1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 33, 48, 63, 64, 65, 96, 127, 129, 200)
        return self.one_of([size for size in sizes if size <= most])

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self._generator) * scale).to(dtype)

    def positive(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.rand(shape, generator=self._generator) + 0.1).to(dtype)

    def mask(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator) < 0.7

    def laid(self, x: Tensor, *, unit_stride: bool = False) -> Tensor:
        """The same numbers, perhaps with other strides, and a storage that holds more."""
        layouts = [_as_it_is, _as_it_is, _inside_more, _transposed, _every_second]
        laid = self.one_of(layouts)(x)
        return x if unit_stride and laid.dim() > 0 and laid.stride(-1) != 1 else laid


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _inside_more(x: Tensor) -> Tensor:
    if x.dim() == 0:
        return x
    return torch.cat([x[:1], x, x[:1]])[1 if x.shape[0] else 0 :][: x.shape[0]]


def _transposed(x: Tensor) -> Tensor:
    return x if x.dim() < 2 else x.transpose(0, -1).contiguous().transpose(0, -1)


def _every_second(x: Tensor) -> Tensor:
    return x if x.dim() == 0 else x.repeat_interleave(2, dim=-1)[..., ::2]
