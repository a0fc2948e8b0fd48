"""Declare an op once: the schemas, the compiled node, autograd and the choice of a candidate follow.

An op is declared by its **call**, a slotted dataclass of the arguments as they are after the checks:

    @dataclass(slots=True)
    class Linear(Call):
        x: Tensor              # [..., K]
        weight: Tensor         # [N, K]
        bias: Tensor | None    # [N]

and by what its kernels return, a NamedTuple whose first fields are what the caller gets. From the types come
the schemas of the public op ``bigkern::linear`` and of the native one that compiled kernels implement. A
gradient is declared in the same way: the backward's call, what is kept for it by name, and the formula that
turns upstream gradients into those of the call's fields (:class:`Autograd`).

A call takes one of three ways: a candidate that torch differentiates itself runs as it is; in eager mode a
candidate's kernels run inside one autograd function; anything that traces, compiles or subclasses tensors
sees the public op, one opaque node, which chooses again when it runs.
"""

from __future__ import annotations

import itertools
import string
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bigkern.core import registry
from bigkern.core.library import LIBRARY, define_native, in_functorch, plain
from bigkern.core.memory import Memory
from bigkern.core.registry import Backend

Size = Annotated[int, "SymInt"]  # a size that torch.compile may leave open; kernels are given a number
Written = Annotated[list[Tensor], "written"]  # tensors that the op writes in place
# A tensor that kernels add to: the last fields of a call, None by default. Of the native op alone, as
# torch.compile knows no op that returns and also adds to.
Sum = Annotated[Tensor | None, "a sum"]

SCHEMAS: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", list[Tensor]: "Tensor[]", Written: "Tensor(!)[]",
    Sum: "Tensor(!)?", float: "float", int: "int", int | None: "int?", Size: "SymInt", bool: "bool",
    list[bool]: "bool[]", str: "str", None: "()",
}  # fmt: skip


Getter = Callable[[Any], tuple[Any, ...]]
LISTS = (list[Tensor], Written)
TENSORS = (Tensor, Tensor | None, *LISTS)


class Call:
    """The arguments of an op after the checks: slotted dataclasses, whose order is the schema's.

    The fields of a base come first; but a backward's call that inherits the forward's names some of those
    fields itself, and begins with what it names.
    """

    __slots__ = ()
    names: ClassVar[tuple[str, ...]] = ()  # without sums
    kinds: ClassVar[dict[str, Any]]  # name -> type
    sums: ClassVar[tuple[str, ...]]
    public: ClassVar[Getter]  # the fields in names, as the public op takes them
    flat: ClassVar[Getter]  # all fields, as kernels do
    of_flat: ClassVar[Callable[..., Any]]  # a call of what the public op was given

    def __init_subclass__(cls) -> None:
        own, base = tuple(cls.__annotations__), typing.cast(Any, cls.__base__).names
        names = tuple(dict.fromkeys((*own, *base) if set(own) & set(base) else (*base, *own)))
        hints = typing.get_type_hints(cls, include_extras=True)
        cls.kinds = {name: hints[name] for name in names if hints[name] != Sum}
        cls.names = tuple(cls.kinds)
        cls.sums = tuple(name for name in names if name not in cls.kinds)
        cls.public, cls.flat = getter(cls.names), getter((*cls.names, *cls.sums))
        by_name = ", ".join(f"{name}={name}" for name in cls.names)
        cls.of_flat = staticmethod(eval(f"lambda {', '.join(cls.names)}: cls({by_name})", {"cls": cls}))


def getter(names: Sequence[str], kinds: Mapping[str, Any] = types.MappingProxyType({})) -> Getter:
    """Of a call: its fields, or, where their kinds are given, its tensors, those of lists one by one.

    Code made of the names, as a dataclass's own __init__ is: a loop would cost a microsecond a call.
    """
    parts = "".join(f"{'*' if kinds.get(name) in LISTS else ''}call.{name}, " for name in names)
    made: Getter = eval(f"lambda call: ({parts})")
    return made


def _lengths(names: Sequence[str], kinds: Mapping[str, Any]) -> Getter:
    """Of a call: how many tensors each of these fields has, None where it is no list."""
    lists = (kinds.get(name) in LISTS for name in names)
    parts = "".join(f"len(call.{name}), " if a else "None, " for name, a in zip(names, lists, strict=True))
    made: Getter = eval(f"lambda call: ({parts})")
    return made


def schema(name: str, call: type[Call], result: Any, sums: Sequence[str] = ()) -> str:
    """``linear(Tensor x, Tensor weight, Tensor? bias) -> (Tensor y)``, in torch's schema language."""
    returned = SCHEMAS.get(result) or f"({listed(typing.get_type_hints(result))})"
    return f"{name}({listed(call.kinds | dict.fromkeys(sums, Sum))}) -> {returned}"


def listed(kinds: Mapping[str, Any]) -> str:
    """``Tensor(a!)[] params, Tensor? scale``: what is written has a letter each."""
    letters = iter(string.ascii_lowercase)
    spelled = ((SCHEMAS[kind], field) for field, kind in kinds.items())
    return ", ".join(f"{s.replace('!', next(letters) + '!') if '!' in s else s} {f}" for s, f in spelled)


# ---- the declaration -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Autograd:
    """The gradient of an op.

    ``gradients(run, saved, grads, needed)`` gives those of the fields in ``of``, in their order, None where
    one is not needed. ``run`` takes the backward's call and returns its result, a tuple unless it is one
    tensor. ``saved`` has by name the tensors in ``saves`` and the numbers of the call. ``grads`` are those of
    the outputs, None where there is none. ``needed`` says of each field in ``of`` whether it is asked for, of
    a list for each of its tensors.
    """

    call: type[Call]  # of the backward
    result: type  # a NamedTuple
    of: tuple[str, ...]  # the call's fields that have gradients
    saves: tuple[str, ...]  # fields of the call and of the result, or names of what ``kept`` gives
    gradients: Callable[..., tuple[Any, ...]]
    fake: Callable[[Any], Any]  # the backward's call -> its result, uninitialised
    forward_of: Callable[[Any], Call]  # the backward's call -> a call for which the same candidate is chosen
    # (saved, grads, needed) -> gradients that can be differentiated again; without it they cannot.
    twice: Callable[..., tuple[Any, ...]] | None = None
    # (call, result) -> the tensors in ``saves``; without it they are the fields of those names.
    kept: Callable[[Any, Any], tuple[Tensor | None, ...]] | None = None
    differentiable: int | None = None  # how many of the outputs; without it all
    compiled: bool = True  # whether compiled kernels implement all of the backward; else it has no native op
    contiguous: bool = False  # whether nodes make kernels' gradients contiguous, as ``fake`` has them


class Op(registry.Op):
    """An op. Called with its call, it runs the candidate that ``explain`` names.

    Args:
        name: the op's name everywhere.
        call, result: what goes in, and a NamedTuple of what kernels return, or Tensor, or None.
        bind: the public function's arguments -> the call; raises where they do not fit.
        fake: the call -> the result, uninitialised.
        reference: the op in plain torch, forward and backward: what a node runs for torch's own functions,
            which return no more than the outputs. None where no candidate is differentiated by torch.
        outputs: how many fields of the result the caller gets: one tensor, or a tuple. The others are for
            the backward.
        check_values: raises where numbers in the tensors do not fit, which a traced call cannot see: its
            node does when it runs.
        autograd: its gradient, if it has one.
        draw: puts into a call what it leaves to chance, as a key of dropout: torch's own functions draw for
            themselves, kernels are told.
        compiled: whether there are compiled kernels of it; else it has no native op.
        remembers: the tensors of calls whose checks and choice are remembered (:mod:`bigkern.core.memory`).
    """

    def __init__(
        self,
        name: str,
        call: type[Call],
        result: Any,
        *,
        bind: Callable[..., Call],
        fake: Callable[[Any], Any],
        reference: Backend | None = None,
        outputs: int = 1,
        check_values: Callable[[Any], None] | None = None,
        autograd: Autograd | None = None,
        draw: Callable[[Any], None] | None = None,
        compiled: bool = True,
        remembers: Sequence[str] = (),
    ):
        super().__init__(name, bind)
        self.call, self.result, self.outputs = call, result, outputs
        self.reference: Any = reference
        self.draw, self.compiled, self._check_values = draw, compiled, check_values
        self.tensor_fields = [n for n, kind in call.kinds.items() if kind in TENSORS]
        self.tensors = getter(self.tensor_fields, call.kinds)
        self.memory: Any = Memory(self, remembers) if remembers else None
        self.node = _define(name, call, result, fake, self._run_as_node, compiled)
        self.gradient: Any = None if autograd is None else _Gradient(self, autograd)

    def __call__(self, call: Any) -> Any:
        if self.reference is None:  # no candidate is for torch to look into
            opaque = not plain(*self.tensors(call))
            return self.given(self.node(*self.call.public(call)) if opaque else self._run_as_node(call))
        return self.run(self.resolve(call), call)

    def decided(self, *arguments: Any) -> tuple[Backend, Any, bool | None]:
        """Of bind's arguments, one after the other: what :meth:`run` takes."""
        return self.memory.decided(arguments)

    def run(self, candidate: Backend, call: Any, needs_grad: bool | None = None) -> Any:
        """Run the candidate, in one of the three ways.

        Whether the call needs a gradient is known of what was remembered: ordinary tensors, in eager mode.
        """
        if candidate.by_torch:
            return candidate.forward(call)
        if self.draw is not None:
            self.draw(call)
        if needs_grad is None:
            tensors = self.tensors(call)
            if not plain(*tensors):
                return self.given(self.node(*self.call.public(call)))
            needs_grad = self.needs_grad(tensors)
        if needs_grad:
            return self.gradient.function.apply(self, candidate, call, *self.gradient.inputs(call))
        return self.given(candidate.forward(call))

    def needs_grad(self, tensors: Sequence[Tensor | None]) -> bool:
        wanted = self.gradient is not None and torch.is_grad_enabled()
        return wanted and any(t is not None and t.requires_grad for t in tensors)

    def given(self, result: Any) -> Any:
        """What the caller gets of a result."""
        if result is None or isinstance(result, Tensor):
            return result
        return result[0] if self.outputs == 1 else tuple(result[: self.outputs])

    def of_node(self, call: Any) -> Backend:
        """The candidate that a node runs."""
        candidate = super().of_node(call)
        return self.reference if candidate.by_torch else candidate

    def _run_as_node(self, call: Any) -> Any:
        if self._check_values is not None:
            self._check_values(call)
        return self.of_node(call).forward(call)


def _define(name: str, call: type[Call], result: Any, fake: Any, run: Any, compiled: bool) -> Any:
    """Define a public op, which torch.compile sees as one node, and the native one, which also has sums."""
    LIBRARY.define(schema(name, call, result))
    if compiled:
        define_native(schema(name, call, result, call.sums))

    def of(function: Callable[[Any], Any]) -> Callable[..., Any]:
        def flat(*arguments: Any) -> Any:
            found = function(call.of_flat(*arguments))
            if found is None or isinstance(found, Tensor):
                return found
            return found[0] if len(found) == 1 else tuple(found)

        return flat

    torch.library.register_fake(f"bigkern::{name}", of(fake), lib=LIBRARY)
    by_device = Tensor in call.kinds.values()  # lists may be empty, and then have no device
    for key in ("CPU", "CUDA") if by_device else ("CompositeExplicitAutograd",):
        LIBRARY.impl(name, of(run), key)
    return getattr(torch.ops.bigkern, name).default


def native(name: str, namespace: Any = torch.ops.bigkern_native) -> Callable[[Any], Any]:
    """The compiled kernels' op of that name, as a candidate runs it, without the overload's own frame."""
    return of_fields(getattr(namespace, name).default._op)


def of_fields(kernel: Callable[..., Any]) -> Callable[[Any], Any]:
    """A kernel that takes a call's fields one by one, as a candidate runs it."""

    def run(call: Any) -> Any:
        return kernel(*call.flat())

    return run


# ---- gradients -------------------------------------------------------------------------------------


class _Gradient:
    """An op's gradient, in eager mode and in graphs: what is kept, and what becomes of it."""

    def __init__(self, op: Op, autograd: Autograd):
        self.op, self.autograd = op, autograd
        base = _Once if autograd.twice is None else _Twice
        self.function: Any = type(f"_{op.call.__name__}", (base,), {})  # a profiler shows the name
        kinds, fields = op.call.kinds, list(op.result._fields)
        numbers = [name for name, kind in kinds.items() if kind not in TENSORS]
        star = {name: "*" for name, kind in kinds.items() if kind in LISTS}
        if autograd.kept is None:
            places = (
                f"{star.get(n, '')}call.{n}" if n in kinds else f"result[{fields.index(n)}]"
                for n in autograd.saves
            )
            self._kept = eval(f"lambda call, result: ({', '.join(places)},)")
        else:
            kept, named = autograd.kept, op.result._make
            self._kept = lambda call, result: kept(call, named(result))
        self.differentiable = op.outputs if autograd.differentiable is None else autograd.differentiable
        self._numbers = getter(numbers)
        self._saved = make_dataclass("Saved", [*autograd.saves, *numbers], slots=True)
        self.inputs = getter(autograd.of, kinds)
        self.has_lists = not star.keys().isdisjoint((*autograd.of, *autograd.saves))
        self.counts, self._lengths = (_lengths(names, kinds) for names in (autograd.of, autograd.saves))
        name = f"{op.name}_backward"
        parts = (autograd.call, autograd.result, autograd.fake, self._run_as_node)
        self.node = _define(name, *parts, op.compiled and autograd.compiled)
        torch.library.register_autograd(
            f"bigkern::{op.name}", self.in_a_graph, setup_context=self.set_up_graph, lib=LIBRARY
        )

    def save(self, ctx: Any, call: Any, result: Any) -> None:
        """Keep what the backward reads: tensors as autograd wants them kept, numbers as they are."""
        ctx.save_for_backward(*self._kept(call, (result,) if isinstance(result, Tensor) else result))
        if self.has_lists:
            ctx.lengths = self._lengths(call)
        ctx.numbers = self._numbers(call)
        ctx.set_materialize_grads(False)

    def mark(self, ctx: Any, outputs: Sequence[Tensor | None]) -> None:
        """Tell autograd which outputs have no gradients."""
        ctx.mark_non_differentiable(*(t for t in outputs[self.differentiable :] if t is not None))

    def saved(self, ctx: Any) -> Any:
        """What :meth:`save` kept, by name."""
        kept = _gathered(ctx.saved_tensors, ctx.lengths) if self.has_lists else ctx.saved_tensors
        return self._saved(*kept, *ctx.numbers)

    def of(self, run: Any, ctx: Any, grads: Sequence[Tensor | None], needed: Sequence[Any]) -> Sequence[Any]:
        """Gradients of the fields that have any, for those of the outputs."""
        grads = grads[: self.differentiable]
        if all(grad is None for grad in grads):
            return (None,) * len(needed)
        # torch.func has grad mode on whether or not it differentiates again.
        if torch.is_grad_enabled() and self.autograd.twice is not None and not in_functorch():
            return self.autograd.twice(self.saved(ctx), grads, needed)
        return self.autograd.gradients(run, self.saved(ctx), grads, needed)

    def _run_as_node(self, call: Any) -> Any:
        backward = self.op.of_node(self.autograd.forward_of(call)).backward
        assert backward is not None
        found = backward(call)
        return [g if g is None else g.contiguous() for g in found] if self.autograd.contiguous else found

    def set_up_graph(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        self.save(ctx, self.op.call.of_flat(*inputs), output)
        if not isinstance(output, Tensor):
            self.mark(ctx, output)

    def in_a_graph(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        wanted = dict(zip(self.op.call.names, ctx.needs_input_grad, strict=True))
        needed = [wanted[name] for name in self.autograd.of]
        found = self.of(lambda call: self.node(*call.public()), ctx, grads, needed)
        by_name = dict(zip(self.autograd.of, found, strict=True))
        return tuple(_as_many(by_name.get(name), need) for name, need in wanted.items())


def _as_many(found: Any, needed: Any) -> Any:
    """A field's gradient: of a list as many as it has tensors, also where there are none."""
    return [None] * len(needed) if isinstance(needed, list) and not found else found


def _spread(values: Sequence[Any]) -> list[Any]:
    """What is in lists, one by one."""
    return [item for value in values for item in (value if isinstance(value, list) else (value,))]


def _gathered(items: Sequence[Any], lengths: Sequence[int | None]) -> list[Any]:
    """Lists again of what was spread."""
    rest = iter(items)
    return [next(rest) if n is None else list(itertools.islice(rest, n)) for n in lengths]


class _Once(torch.autograd.Function):
    """Eager autograd straight onto the chosen candidate: a fifth of the cost of a Python custom op.

    Autograd takes time for each argument, so it is given those that may have gradients, and all in one call.
    """

    @staticmethod
    def forward(ctx: Any, op: Op, candidate: Backend, call: Any, *_differentiable: Tensor | None) -> Any:  # type: ignore[override]
        result = candidate.forward(call)
        ctx.gradient, ctx.run = op.gradient, candidate.backward
        if op.gradient.has_lists:
            ctx.counts = op.gradient.counts(call)
        op.gradient.save(ctx, call, result)
        given = op.given(result)
        if op.gradient.differentiable < op.outputs:
            op.gradient.mark(ctx, given)
        return given

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        return _gradients(ctx, grads)


class _Twice(_Once):
    """The same where gradients can be differentiated again."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        return _gradients(ctx, grads)


def _gradients(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """As ``apply`` was given tensors, after the op, the candidate and the call."""
    gradient, needed = ctx.gradient, ctx.needs_input_grad[3:]
    if not gradient.has_lists:
        return None, None, None, *gradient.of(ctx.run, ctx, grads, needed)
    needed = _gathered(needed, ctx.counts)
    found = gradient.of(ctx.run, ctx, grads, needed)
    return None, None, None, *_spread([_as_many(x, need) for x, need in zip(found, needed, strict=True)])
