"""What bigkern's optimizers take beyond torch's arguments, checked, and how that stores a parameter.

Storage (``state_dtype``, ``master_weights``, ``stochastic_rounding``) is a parameter group's, like its
learning rate; the rest is the optimizer's. A group holds only what differs from torch, so that without
options groups and state dicts are torch's to the letter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigkern.core.library import KERNEL_DTYPES
from bigkern.ops.adam.call import check_flag, finite

Group = dict[str, Any]

STORAGE = ("state_dtype", "master_weights", "stochastic_rounding")  # of a group; loading keeps them
SEED = "seed"  # of a group; loading takes the saved one, so that a run goes on bit for bit
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)
MASTERS: dict[Any, torch.dtype | None] = {False: None, True: torch.float32, "remainder": torch.int16}


@dataclass(frozen=True)
class Options:
    """The keyword arguments of :class:`bigkern.optim.Adam` that torch's class does not have."""

    state_dtype: torch.dtype | None = None
    master_weights: bool | str = False
    stochastic_rounding: bool = False
    seed: int | None = None
    max_norm: float | None = None
    zero_grads: bool = False
    in_backward: bool = False
    offload: bool = False

    def __post_init__(self) -> None:
        seed, norm = self.seed, self.max_norm
        for name in ("stochastic_rounding", "zero_grads", "in_backward", "offload"):
            check_flag(name, getattr(self, name))
        if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
            raise ValueError(f"seed must be an int in [0, 2^63), not {seed!r}")
        if norm is not None and (isinstance(norm, bool) or (finite(norm) or 0.0) <= 0.0):
            raise ValueError(f"max_norm must be a positive number, not {norm!r}")
        if self.in_backward and norm is not None:
            raise ValueError("max_norm needs all gradients at once, and in_backward never has them")

    def complete(self, group: Group) -> None:
        """Give a new group what it leaves unsaid, and check it."""
        for name in STORAGE:
            if (default := getattr(self, name)) is not getattr(Options, name):
                group.setdefault(name, default)
        check_group(group)
        if group.get("stochastic_rounding") or group.get("state_dtype") == torch.bfloat16:
            group.setdefault(SEED, _drawn_seed() if self.seed is None else self.seed)

    def in_use(self, group: Group) -> str | None:
        """The first option that is in use in a group, by name."""
        names = ("max_norm", "zero_grads", "in_backward", "offload")
        used = [name for name in STORAGE if group.get(name)] + [n for n in names if getattr(self, n)]
        return used[0] if used else None


@dataclass(frozen=True)
class Storage:
    """The tensors that a parameter's state consists of."""

    moments: torch.dtype
    master: torch.dtype | None
    amsgrad: bool
    offload: bool

    @classmethod
    def of(cls, p: Tensor, group: Group, offload: bool) -> Storage:
        """Complex and float64 parameters store what torch stores, whatever the group says.

        Raises:
            ValueError: remainders were asked for a float16 parameter.
        """
        amsgrad = bool(group["amsgrad"])
        if p.dtype not in KERNEL_DTYPES:
            return cls(p.dtype, None, amsgrad, offload)
        master = MASTERS[group.get("master_weights", False)] if p.dtype != torch.float32 else None
        if master == torch.int16 and p.dtype != torch.bfloat16:
            raise ValueError(
                f"master_weights='remainder' is for bfloat16 parameters, not {p.dtype}; True is for both"
            )
        return cls(group.get("state_dtype") or p.dtype, master, amsgrad, offload)

    def is_torchs(self, p: Tensor) -> bool:
        return self.moments == p.dtype and self.master is None and not self.offload

    def rounds_at_random(self, p: Tensor) -> bool:
        """Whether bfloat16 is stored anywhere but in a parameter that has a master."""
        return torch.bfloat16 in (self.moments, p.dtype if self.master is None else None)


def check_group(group: Group) -> None:
    """
    Raises:
        TypeError: stochastic_rounding is not a bool.
        ValueError: the group's storage is not one that there is.
    """
    state_dtype, masters = group.get("state_dtype"), group.get("master_weights", False)
    check_flag("stochastic_rounding", group.get("stochastic_rounding", False))
    if state_dtype is not None and state_dtype not in STATE_DTYPES:
        raise ValueError(
            f"state_dtype must be None, {', '.join(map(str, STATE_DTYPES))}, not {state_dtype!r}"
        )
    if not isinstance(masters, (bool, str)) or masters not in MASTERS:
        raise ValueError(f"master_weights must be False, True or 'remainder', not {masters!r}")
    if masters and group.get("stochastic_rounding"):
        raise ValueError("stochastic_rounding is for parameters without master_weights, which lose nothing")
    if group["amsgrad"] and state_dtype == torch.uint8:
        raise ValueError("amsgrad must be False with 8-bit moments: a maximum of codes would creep upwards")


def _drawn_seed() -> int:
    """From torch's CPU generator; where several processes train, 0: replicas have to round alike."""
    return 0 if several_processes() else int(torch.randint(2**63 - 1, ()))


def several_processes() -> bool:
    """Whether this is one of several processes that train together."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed and torch.distributed.get_world_size() > 1


def mixed(*parts: int) -> int:
    """One seed in [0, 2^63) from several numbers: SplitMix64 over them."""
    mask, h = 2**64 - 1, 0
    for part in parts:
        h = ((h ^ part) + 0x9E3779B97F4A7C15) & mask
        h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 & mask
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB & mask
        h ^= h >> 31
    return h >> 1


def name_of(groups: list[Group], p: Tensor) -> str:
    """A parameter's name where its group has names, its index otherwise: for messages."""
    index = 0
    for group in groups:
        for position, other in enumerate(group["params"]):
            if other is p:
                names = group.get("param_names")
                return f"parameter {names[position]!r}" if names else f"parameter {index}"
            index += 1
    return "a parameter"
