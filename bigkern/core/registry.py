"""Declare an op once, register its backends, see and force the choice between them.

An op's backends are always asked in the same visible order, that of ``ORDER``. Three questions about a call
are asked in turn; a backend answers each with ``None`` or with a sentence saying why not:

* ``refuses``: it *cannot* run this call ("head_dim 320 > 256"). Nothing overrides it.
* ``unproven``: nothing has shown that it is right here ("not proven on this GPU for bfloat16 window").
  :func:`use` overrides it, and so do the tests.
* Which is fastest? Where the call's kind was measured on this machine near its sizes, that decides
  (:mod:`bigkern.core.wisdom`). Elsewhere it is the first that does not ``decline`` by its own cautious rule
  ("stock is faster below 4096 elements"), which may claim only what held on every machine ever measured.

Our kernels go by the language that they are written in; ``..._library`` is torch's own products, with our
passes around them. ``torch`` is stock PyTorch. It refuses only what PyTorch refuses, so a call always has
somewhere to run. ``torch_...`` are single kernels of torch's that it can be told to take.
"""

from __future__ import annotations

import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from bigkern.core import evidence, wisdom
from bigkern.core.wisdom_file import Point

ORDER = (
    "cuda", "triton", "triton_library", "cpu", "cpu_library",
    "torch", "torch_cudnn", "torch_flash", "torch_efficient",
)  # fmt: skip

Reason = str | None


def is_stock(backend: str) -> bool:
    """Whether nothing in a backend of this name is ours."""
    return backend.startswith("torch")


class BackendRefused(RuntimeError):
    """The backend forced with :func:`use` cannot run this call; the message says why."""


def _never(call: Any) -> Reason:
    return None


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to run an op: its kernels, and what it says of a call."""

    name: str
    forward: Callable[[Any], Any]  # of the op's call
    backward: Callable[[Any], Any] | None = None  # of the backward's
    refuses: Callable[[Any], Reason] = _never
    unproven: Callable[[Any], Reason] = _never
    declines: Callable[[Any], Reason] = _never
    by_torch: bool = False  # torch's own functions, differentiated by torch's autograd

    @property
    def is_stock(self) -> bool:
        return is_stock(self.name)

    def unable(self, call: Any) -> Reason:
        return self.refuses(call) or self.unproven(call)


@dataclass(frozen=True, slots=True)
class Choice:
    """A line of :func:`explain`: a backend, whether it runs, and why it does not."""

    backend: str
    chosen: bool
    reason: str


class Explanation(tuple[Choice, ...]):
    """Every backend of an op with its reason; prints as a table."""

    op: str
    point: Point | None  # the measurement that decided, if one did

    def __new__(cls, op: str, choices: list[Choice], point: Point | None = None) -> Explanation:
        self = super().__new__(cls, choices)
        self.op, self.point = op, point
        return self

    @property
    def chosen(self) -> str:
        return next((choice.backend for choice in self if choice.chosen), "none")

    def __str__(self) -> str:
        width = max((len(c.backend) for c in self), default=0)
        rows = [f"  {'->' if c.chosen else '  '} {c.backend:<{width}}  {c.reason}" for c in self]
        return "\n".join([self.op, *rows])

    __repr__ = __str__


_EARLIER = "could run, but an earlier backend does"
_ops: dict[str, Op] = {}


class Op:
    """An op's name and its backends, in the order in which they are asked."""

    def __init__(self, name: str, bind: Callable[..., Any]):
        if name in _ops:
            raise ValueError(f"op {name!r} is already declared")
        self.name = name
        self.bind = bind  # the public function's arguments -> the call that the backends are asked about
        self.backends: dict[str, Backend] = {}
        _ops[name] = self

    def register(self, backend: Backend) -> None:
        if backend.name not in ORDER:
            raise ValueError(f"backend {backend.name!r} is not one of {', '.join(ORDER)}")
        self.backends[backend.name] = backend
        self.backends = {name: self.backends[name] for name in ORDER if name in self.backends}

    def resolve(self, call: Any) -> Backend:
        """The backend that runs a call."""
        forced = _forced_backend(self.name)
        if forced is not None:
            return self._forced(forced, call)
        return self.choose(call)

    def choose(self, call: Any) -> Backend:
        """The backend that runs a call where none is forced."""
        able = [backend for backend in self.backends.values() if backend.unable(call) is None]
        if len(able) > 1:
            if wisdom.noting is not None:
                wisdom.noting(self, call)
            for name in self.measured(call):
                for backend in able:
                    if backend.name == name:
                        return backend
        for backend in able:
            if backend.declines(call) is None:
                return backend
        raise BackendRefused(str(self.explain(call)))

    def measured(self, call: Any) -> tuple[str, ...]:
        """The backends from the fastest on, where calls of this kind were measured near the call's sizes."""
        point = self.point(call)
        return () if point is None else point.order

    def variants(self, call: Any) -> tuple[str, ...]:
        """What has to be proven of a kernel that runs a call."""
        return ()

    def point(self, call: Any) -> Point | None:
        """The nearest point at which calls of this kind were measured, if one is near."""
        return None

    def of_node(self, call: Any) -> Backend:
        """The same of an opaque node: what the CPU's kernels decline never became one."""
        cpu = self.backends["cpu"]
        return cpu if not forced() and cpu.refuses(call) is None else self.resolve(call)

    def _forced(self, name: str, call: Any) -> Backend:
        backend = self.backends.get(name)
        if backend is None:
            raise BackendRefused(f"{self.name}: there is no {name} backend here; {_built()}")
        reason = backend.refuses(call)
        if reason is not None:
            raise BackendRefused(f"{self.name}: the {name} backend refuses this call: {reason}")
        return backend

    def explain(self, call: Any) -> Explanation:
        forced = _forced_backend(self.name)
        backends, point = list(self.backends.values()), None
        if forced is not None:
            only = f"use({forced!r}) is in force"
            reasons = [b.refuses(call) or (None if b.name == forced else only) for b in backends]
        else:
            reasons = [b.unable(call) for b in backends]
            able = [b.name for b, reason in zip(backends, reasons, strict=True) if reason is None]
            point = self.point(call) if len(able) > 1 else None
            fastest = None if point is None else next((name for name in point.order if name in able), None)
            if point is not None and fastest is not None:
                slower = [None if b.name == fastest else point.why_not(b.name, fastest) for b in backends]
            else:
                slower = [b.declines(call) for b in backends]
            reasons = [reason or slow for reason, slow in zip(reasons, slower, strict=True)]
        chosen = next((i for i, reason in enumerate(reasons) if reason is None), -1)
        return Explanation(self.name, [
            Choice(b.name, i == chosen, reason or ("runs this call" if i == chosen else _EARLIER))
            for i, (b, reason) in enumerate(zip(backends, reasons, strict=True))
        ], point)  # fmt: skip


def get(name: str) -> Op:
    if not isinstance(name, str) or name not in _ops:
        there_are = ", ".join(sorted(_ops))
        raise ValueError(f"op must be a declared one: no op named {name!r}; there are {there_are}")
    return _ops[name]


def ops() -> dict[str, Op]:
    return dict(_ops)


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend runs ``op`` on these arguments, and why each other one does not.

    Args:
        op: a declared op's name, as ``"attention"``: one of ``sorted(registry.ops())``.
        *args, **kwargs: the arguments of the public function of that op.

    Returns:
        A tuple of :class:`Choice` that prints as a table; ``.chosen`` is the backend's name.

    Raises:
        ValueError: ``op`` is not declared, or the arguments are not valid for it.

    Example:
        >>> import torch, bigkern
        >>> q = torch.randn(1, 4, 128, 64)
        >>> bigkern.explain("attention", q, q, q, causal=True).chosen in ("cpu", "torch")
        True
    """
    declared = get(op)
    return declared.explain(declared.bind(*args, **kwargs))


# ---- the choice that is in force -------------------------------------------------------------------

Blocks = tuple[dict[str, str], ...]  # of use() that were entered and not left: op, or "*", -> backend
_BLOCKS: ContextVar[Blocks] = ContextVar("bigkern.use")
_HANDED_ON = "bigkern.use"
_entered: list[Any] = []  # one for each block that any thread has not left


class _Here(types.ModuleType):
    """The blocks of this thread or asyncio task.

    A module's attribute is read, guarded and written by torch.compile as it is; a ContextVar it cannot trace.
    """

    @property
    def blocks(self) -> Blocks:
        blocks = _BLOCKS.get(None)
        if blocks is not None:
            return blocks
        return _handed_on() if torch._C._current_graph_task_id() != -1 else ()

    @blocks.setter
    def blocks(self, blocks: Blocks) -> None:
        _BLOCKS.set(blocks)
        torch._C._stash_obj_in_tls(_HANDED_ON, (threading.get_ident(), blocks))


def _handed_on() -> Blocks:
    """In a thread of autograd's own, which has no context: the blocks of the thread that called backward."""
    if not torch._C._is_key_in_tls(_HANDED_ON):
        return ()
    thread, blocks = torch._C._get_obj_in_tls(_HANDED_ON)
    return () if thread == threading.get_ident() else blocks


_here = _Here("bigkern.core.registry.here")


@contextmanager
def use(backend: str | None = None, **per_op: str) -> Iterator[None]:
    """Force a backend for every op, or op by op, while the block lasts.

    Inside it, a call that the backend cannot run raises :class:`BackendRefused` with the reason. It
    does not fall back. The choice is that of the thread or asyncio task that enters the block, and of the
    tasks that it starts there; other threads and tasks choose for themselves. In eager mode a backward runs
    on the backend of its forward, wherever it is called; in a compiled graph, on what is in force there.

    Args:
        backend: one of ``bigkern.core.registry.ORDER``, as ``"cpu"`` or ``"torch"``, for all ops.
        **per_op: a backend for one op each, ``attention="torch"``.

    Raises:
        ValueError: an op or a backend of that name does not exist.

    Example:
        >>> import torch, bigkern
        >>> q = torch.randn(1, 4, 8, 64)
        >>> with bigkern.use("torch"):
        ...     o = bigkern.attention(q, q, q)
    """
    wanted = dict(per_op) if backend is None else {"*": backend, **per_op}
    for op, name in wanted.items():
        if op != "*":
            get(op)
        if name not in ORDER:
            argument = "backend" if op == "*" else op
            raise ValueError(f"{argument} must be a backend: {name!r} is not one of {', '.join(ORDER)}")
    _here.blocks = (*_here.blocks, wanted)
    _entered.append(wanted)
    try:
        yield
    finally:
        _entered.pop()
        wanted.clear()  # wherever a context that has a copy may be: the block is over
        _here.blocks = tuple(block for block in _here.blocks if block)


def _forced_backend(op: str) -> str | None:
    """What the innermost block says that names the op, else the innermost that speaks of all ops."""
    if not (blocks := _here.blocks):
        return None
    wanted: dict[str, str] = {}
    for block in blocks:
        wanted.update(block)
    return wanted.get(op) or wanted.get("*")


def forced() -> bool:
    """Whether :func:`use` is in force for any op.

    Mostly nobody has entered a block, which costs less to ask than whether it is this thread's.
    """
    return bool(_entered or torch.compiler.is_compiling()) and any(_here.blocks)


def watched() -> bool:
    """Whether a call must come to its op, whatever is known of others like it."""
    return forced() or wisdom.noting is not None


_warned: set[int] = set()


def _warn_of(index: int) -> None:
    """Once, if no kernel at all is proven on a GPU."""
    if index in _warned or not evidence.nothing_proven(index):
        return
    _warned.add(index)
    words = "stock PyTorch runs until `bigkern tune` has proven and measured them, in some minutes"
    warnings.warn(f"bigkern: no GPU kernel is proven on {evidence.place(index)}; {words}", stacklevel=2)


def unproven(op: str, backend: str, index: int, variants: Sequence[str]) -> Reason:
    """Why a GPU kernel should not be chosen there: nothing has shown that it is right for all variants."""
    for variant in variants:
        found = evidence.verdict(op, backend, index, variant)
        if found == evidence.PASS:
            continue
        if not torch.compiler.is_compiling():
            _warn_of(index)
        if found is None:
            return f"not proven on this GPU for {variant}; run `bigkern tune`"
        return f"not right on this GPU for {variant}: {found} in its proof"
    return None


def _built() -> str:
    from bigkern.core import info

    return info.summary()
