"""State dicts of optimizers whose states torch.optim does not know: nothing is cast that must not be.

``torch.optim.Optimizer.load_state_dict`` casts whatever it finds to the parameter's dtype. It hands on what
is not a tensor, a dict or an iterable, so compact states travel through it in an envelope.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigkern.optim.options import SEED, STORAGE, Group, Options, Storage, check_group, name_of
from bigkern.optim.states import State, as_torch, as_whole, converted, is_compact, problem

StateDict = dict[str, Any]


class _Envelope:
    """A state that has already been converted."""

    def __init__(self, state: State):
        self.state = state


class StateDicts(torch.optim.Adam):
    """Saving and loading, for the optimizers that add a step."""

    _options = Options()

    def state_dict(self) -> StateDict:
        """As torch's: states by index, and groups; storage options are not in it, the seed is.

        Compact states are in it as they are stored, and load again bit for bit; but for DTensors, whose
        8-bit codes and remainders belong to one way of cutting them up: those are saved as float32
        DTensors, which ``torch.distributed.checkpoint`` can cut up anew.
        """
        saved = super().state_dict()
        params = dict(enumerate(p for group in self.param_groups for p in group["params"]))
        states = {i: as_whole(s, params[i]) if i in params else s for i, s in saved["state"].items()}
        groups = [_without(STORAGE, group) for group in saved["param_groups"]]
        return {**saved, "state": states, "param_groups": groups}

    def torch_state_dict(self) -> StateDict:
        """The state for :class:`torch.optim.Adam` and ``AdamW``: no codes, no masters, no options.

        Moments that are stored in other dtypes than the parameters' come in float32 or as they are;
        torch casts them as it loads them. What masters hold beyond their parameters is lost.

        Example:
            >>> import torch, bigkern
            >>> model = torch.nn.Linear(4, 4)
            >>> optimizer = bigkern.optim.AdamW(model.parameters(), state_dtype=torch.uint8)
            >>> model(torch.ones(1, 4)).sum().backward()
            >>> optimizer.step()
            >>> stock = torch.optim.AdamW(model.parameters())
            >>> stock.load_state_dict(optimizer.torch_state_dict())
        """
        saved = self.state_dict()
        groups = [_without((SEED,), group) for group in saved["param_groups"]]
        return {**saved, "state": {i: as_torch(s) for i, s in saved["state"].items()}, "param_groups": groups}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state of this class or of ``torch.optim``'s, in any storage, into this optimizer's own.

        The storage stays what the constructor was told. Masters that the state does not hold start from
        the parameters: load the model first.

        Raises:
            ValueError: the state is of other groups or of parameters of other shapes; nothing changes.
        """
        hook = self.register_load_state_dict_pre_hook(_sealed)  # after the user's own
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __setstate__(self, state: StateDict) -> None:
        for p, value in state["state"].items():
            if isinstance(value, _Envelope):
                state["state"][p] = value.state
        super().__setstate__(state)

    def __getstate__(self) -> StateDict:
        return {**super().__getstate__(), "_options": self._options}


def _sealed(optimizer: Any, state_dict: StateDict) -> StateDict | None:
    """The state dict with what torch must not touch in envelopes, and with the optimizer's storage."""
    saved_groups = state_dict["param_groups"]
    lengths = [len(group["params"]) for group in saved_groups]
    if lengths != [len(group["params"]) for group in optimizer.param_groups]:
        return None  # torch knows what to say
    groups = list(map(_with_storage_of, saved_groups, optimizer.param_groups))
    states = dict(state_dict["state"])
    for group, current in zip(groups, optimizer.param_groups, strict=True):
        check_group(group)
        for i, p in zip(group["params"], current["params"], strict=True):
            if states.get(i):
                states[i] = _sealed_state(optimizer, states[i], p, group)
    return {**state_dict, "state": states, "param_groups": groups}


def _sealed_state(optimizer: Any, saved: State, p: Tensor, group: Group) -> State | _Envelope:
    if (reason := problem(saved, p)) is not None:
        name = name_of(optimizer.param_groups, p)
        raise ValueError(f"loaded state dict contains, for {name}, {reason}")
    storage = Storage.of(p, group, optimizer._options.offload)
    if storage.is_torchs(p) and not is_compact(saved):
        return saved
    return _Envelope(converted(saved, p, storage))


def _with_storage_of(saved: Group, current: Group) -> Group:
    own = {key: current[key] for key in STORAGE if key in current}
    if SEED in current:
        own[SEED] = saved.get(SEED, current[SEED])
    return {**_without((*STORAGE, SEED), saved), **own}


def _without(keys: tuple[str, ...], group: Group) -> Group:
    return {key: value for key, value in group.items() if key not in keys}
