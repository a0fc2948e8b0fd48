"""What was decided for a call holds for all calls like it: checks and choice cost more than a small kernel.

Calls are alike if all is the same that checks and candidates look at: of every tensor its class, layout,
shape, dtype, device and whether it wants a gradient; every other argument; whether gradients are enabled, and
how many threads there are.
Only what nothing else decides is remembered: outside of ``use``, autocast, tracing, compilation, torch.func
and dispatch modes, and if the op's call holds the very tensors that were given.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from bigkern.core import evidence, registry, wisdom
from bigkern.core.library import ordinary
from bigkern.core.registry import Backend

MOST = 4096  # decisions of an op; then it begins anew


class Decision(NamedTuple):
    numbers: Any  # the call that was checked, without its tensors
    candidate: Backend
    needs_grad: bool


class Memory:
    """The decisions on an op's calls.

    ``tensors`` are the arguments that may be tensors in a call that is remembered: fields of the call by the
    same name, whose numbers neither checks nor candidates look at.
    """

    def __init__(self, op: Any, tensors: Sequence[str]):
        self._op, self._decisions = op, dict[Any, Decision]()
        self._of = self._now()
        names = list(inspect.signature(op.bind).parameters)
        self._places = {name: names.index(name) for name in tensors}
        arguments = ", ".join(names)
        likeness = ", ".join(_LIKENESS.format(name) if name in tensors else name for name in names)
        fields = ", ".join(name if name in tensors else f"numbers.{name}" for name in op.call.names)
        self._key = eval(f"lambda {arguments}: (is_grad_enabled(), get_num_threads(), {likeness})", _GLOBALS)
        self._again = eval(f"lambda numbers, {arguments}: Call({fields})", {"Call": op.call})

    def decided(self, arguments: tuple[Any, ...]) -> tuple[Backend, Any, bool | None]:
        """The candidate, the call, and, if others like it came before, whether it needs a gradient."""
        key, decision = self._recalled(arguments)
        if decision is not None:
            return decision[1], self._again(decision[0], *arguments), decision[2]
        call = self._op.bind(*arguments)
        candidate = self._op.resolve(call)
        if key is not None:
            self._remember(key, arguments, call, (candidate, self._op.needs_grad(self._op.tensors(call))))
        return candidate, call, None

    def _recalled(self, arguments: tuple[Any, ...]) -> tuple[Any, Decision | None]:
        """What a decision is remembered by, if it may be, and the decision, if there is one."""
        if not _undisturbed():
            return None, None
        of = self._of
        if (
            of[0] is not self._op.backends
            or of[1] is not evidence.proven
            or of[2] is not wisdom.state
            or of[3] is not is_deterministic()
        ):
            self._of = self._now()
            self._decisions.clear()
        try:
            key = self._key(*arguments)
            return key, self._decisions.get(key)
        except (AttributeError, TypeError, RuntimeError):  # no hash, or the checks will say what is wrong
            return None, None

    def _now(self) -> tuple[Any, ...]:
        """What decisions depend on besides the call."""
        return self._op.backends, evidence.proven, wisdom.state, is_deterministic()

    def _remember(
        self, key: Any, arguments: tuple[Any, ...], call: Any, decided: tuple[Backend, bool]
    ) -> None:
        """Unless the call holds other tensors than those that were given, or subclasses."""
        for name in self._op.tensor_fields:
            tensor, place = getattr(call, name), self._places.get(name)
            if tensor is not None and (place is None or arguments[place] is not tensor):
                return
        if ordinary(*self._op.tensors(call)):
            if len(self._decisions) >= MOST:
                self._decisions.clear()
            self._decisions[key] = Decision(self._again(call, *(None for _ in arguments)), *decided)


class Stocks:
    """Which calls stock ran, by a rough likeness: to be asked first where a call may be small.

    A likeness need not be exact, as torch's own functions take whatever is alike and yet different.
    """

    def __init__(self) -> None:
        self._known: dict[Any, bool] = {}
        self._of = evidence.proven, wisdom.state

    def have(self, *likeness: Any) -> bool | None:
        """Whether stock ran all calls of this likeness; None if nothing is known of it."""
        if is_compiling():
            return None
        known = self._known.get((likeness, is_grad_enabled(), get_num_threads()))
        if known is None or self._of[0] is not evidence.proven or self._of[1] is not wisdom.state:
            return None
        return None if registry.watched() else known

    def learn(self, ran: bool, *likeness: Any) -> None:
        """Whether stock was chosen for a call of this likeness."""
        if not _undisturbed():
            return
        if self._of[0] is not evidence.proven or self._of[1] is not wisdom.state or len(self._known) >= MOST:
            self._known.clear()
            self._of = evidence.proven, wisdom.state
        key = (likeness, is_grad_enabled(), get_num_threads())
        self._known[key] = ran and self._known.get(key, True)


_LIKENESS = "{0} is not None and (type({0}), {0}.layout, {0}.shape, {0}.dtype, {0}.device, {0}.requires_grad)"
is_compiling, is_grad_enabled, get_num_threads = (
    torch.compiler.is_compiling,
    torch.is_grad_enabled,
    torch.get_num_threads,
)
is_deterministic = torch._C._get_deterministic_algorithms
_GLOBALS = {"is_grad_enabled": is_grad_enabled, "get_num_threads": get_num_threads}


_any_autocast = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._get_tracing_state


def _undisturbed() -> bool:
    if is_compiling() or _any_autocast() or _dispatch_modes():
        return False
    return _transforms() is None and _tracing() is None and not registry.watched()
