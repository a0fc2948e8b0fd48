"""Declare an op once: the schemas, the compiled node, autograd and the choice of a candidate follow.

An op is declared by its **call**, a slotted dataclass of the arguments as they are after the checks:

    @dataclass(slots=True)
    class Linear(Call):
        x: Tensor              # [..., K]
        weight: Tensor         # [N, K]
        bias: Tensor | None    # [N]

and by what its kernels return, a NamedTuple whose first fields are what the caller gets. From the types come
the schemas of the public op ``bigkern::linear`` and of the native one that compiled kernels implement. A
gradient is declared in the same way, by the backward's call and its result, whose names say what is kept and
what becomes of it (:class:`Autograd`).

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
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from bigkern.core import registry, wisdom
from bigkern.core.library import LIBRARY, define_native, in_functorch, plain
from bigkern.core.memory import Memory, Stocks
from bigkern.core.registry import Backend
from bigkern.core.wisdom_file import Kind, Point, Sizes

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
        cls.of_flat = staticmethod(_maker(cls, ", ".join(cls.names), {name: name for name in cls.names}))


def getter(names: Sequence[str], kinds: Mapping[str, Any] = types.MappingProxyType({})) -> Getter:
    """Of a call: its fields, or, where their kinds are given, its tensors, those of lists one by one.

    Code made of the names, as a dataclass's own __init__ is: a loop would cost a microsecond a call.
    """
    parts = "".join(f"{'*' if kinds.get(name) in LISTS else ''}call.{name}, " for name in names)
    made: Getter = eval(f"lambda call: ({parts})")
    return made


def _maker(cls: type[Call], parameters: str, sources: Mapping[str, str]) -> Callable[..., Any]:
    """Of parameters: a call whose fields are these expressions."""
    by_name = ", ".join(f"{name}={source}" for name, source in sources.items())
    made: Callable[..., Any] = eval(f"lambda {parameters}: cls({by_name})", {"cls": cls})
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
    """The gradient of an op, which the names in the backward's call and in its result say:

    - ``d<field>`` of the result is the gradient of that field of the op's call;
    - ``d<output>`` of the backward's call is the gradient of that field of the op's result, None where there
      is none;
    - ``want_<field>`` is whether a gradient of that field is asked for, of a list of any of its tensors, and
      ``wanted: list[bool]`` says it of all;
    - every other field is what the op's call, or else its result, has under that name. It is kept.

    Args:
        call, result: of the backward; a NamedTuple.
        gradients: ``(run, call, needed)`` -> gradients of the fields in ``of``, in their order, where the
            result is not all of them. ``run`` takes the backward's call and returns its result, a tuple
            unless it is one tensor; ``needed`` says of each field whether it is asked for, of a list of each
            tensor.
        of: the fields that have gradients, where the result does not name them all.
        kept: ``(call, result)`` -> the tensors that the backward's call has besides upstream gradients, in
            its order, where they are not fields of those names.
        twice: ``(call, needed)`` -> gradients that can be differentiated again; without it they cannot.
        fake: of the backward, as the op's.
        forward_of: the backward's call -> a call for which the same candidate is chosen; without it, the one
            of the fields that both have, with None for the others.
        differentiable: how many of the outputs; without it all.
        compiled: whether compiled kernels implement all of the backward; else it has no native op.
        contiguous: whether nodes make kernels' gradients contiguous, as ``fake`` has them.
    """

    call: type[Call]
    result: Any
    gradients: Callable[..., tuple[Any, ...]] | None = None
    of: tuple[str, ...] = ()
    kept: Callable[[Any, Any], tuple[Tensor | None, ...]] | None = None
    twice: Callable[..., tuple[Any, ...]] | None = None
    fake: Callable[[Any], Any] | None = None
    forward_of: Callable[[Any], Call] | None = None
    differentiable: int | None = None
    compiled: bool = True
    contiguous: bool = False


@dataclass(frozen=True, slots=True)
class Measures:
    """What of a call decides which candidate is fastest.

    ``sizes(call)`` are numbers that time grows with; a measured point speaks for a call if each is within
    ``reach`` times its own, up or down. ``options(call)`` are words for what chooses other code.
    """

    sizes: Callable[[Any], Sizes]
    options: Callable[[Any], Kind] = lambda call: ()
    reach: float = 4.0


class Op(registry.Op):
    """An op. Called with its call, it runs the candidate that ``explain`` names.

    Args:
        name: the op's name everywhere.
        call, result: what goes in, and a NamedTuple of what kernels return, or Tensor, or None.
        bind: the public function's arguments -> the call; raises where they do not fit.
        fake: the call -> the result, uninitialised; without it, contiguous tensors of the reference's shapes,
            which may look at no number in a tensor.
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
        measures: what of a call decides which candidate is fastest.
    """

    def __init__(
        self,
        name: str,
        call: type[Call],
        result: Any,
        *,
        bind: Callable[..., Call],
        fake: Callable[[Any], Any] | None = None,
        reference: Backend | None = None,
        outputs: int = 1,
        check_values: Callable[[Any], None] | None = None,
        autograd: Autograd | None = None,
        draw: Callable[[Any], None] | None = None,
        compiled: bool = True,
        remembers: Sequence[str] = (),
        measures: Measures | None = None,
    ):
        super().__init__(name, bind)
        self.measures = measures
        self.call, self.result, self.outputs = call, result, outputs
        self.reference: Any = reference
        self.draw, self.compiled, self._check_values = draw, compiled, check_values
        self.tensor_fields = [n for n, kind in call.kinds.items() if kind in TENSORS]
        self.tensors = getter(self.tensor_fields, call.kinds)
        self.memory: Any = Memory(self, remembers) if remembers else None
        self.stocks = Stocks()
        fake = fake or _shapes_of(typing.cast(Backend, reference).forward)
        self.node = _define(name, call, result, fake, self._run_as_node, compiled)
        self.gradient: Any = None if autograd is None else _Gradient(self, autograd)

    def __call__(self, call: Any) -> Any:
        if self.reference is None:  # no candidate is for torch to look into
            opaque = not plain(*self.tensors(call))
            return self.given(self.node(*self.call.public(call)) if opaque else self._run_as_node(call))
        return self.run(self.resolve(call), call)

    def decided(self, *arguments: Any) -> tuple[Backend, Any, bool | None]:
        """Of bind's arguments, one after the other: what :meth:`run` takes."""
        found: tuple[Backend, Any, bool | None] = self.memory.decided(arguments)
        return found

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

    def place(self, call: Any) -> wisdom.Place | None:
        """Where a call stands among measured ones."""
        first = next((t for t in self.tensors(call) if t is not None), None)
        if self.measures is None or first is None or first.device.type not in ("cpu", "cuda"):
            return None
        mode = "training" if self.needs_grad(self.tensors(call)) else "forward"
        kind = (wisdom.DTYPES.get(first.dtype, "other"), mode, *self.measures.options(call))
        return wisdom.Place(self.name, kind, self.measures.sizes(call), first.device, self.measures.reach)

    def variants(self, call: Any) -> tuple[str, ...]:
        """``("bfloat16 causal", "bfloat16 dropout")``: each option's code is proven by itself."""
        first = next((t for t in self.tensors(call) if t is not None), None)
        dtype = "other" if first is None else wisdom.DTYPES.get(first.dtype, "other")
        words = () if self.measures is None else self.measures.options(call)
        return tuple(f"{dtype} {word}" for word in words) or (f"{dtype} plain",)

    def point(self, call: Any) -> Point | None:
        place = self.place(call)
        return None if place is None else wisdom.point(place)

    def measured(self, call: Any) -> tuple[str, ...]:
        place = self.place(call)
        return () if place is None else wisdom.order(place)

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


def _shapes_of(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A fake: uninitialised, contiguous tensors of the shapes that the function's results have."""
    return lambda call: tree_map_only(Tensor, lambda x: x.new_empty(x.shape), function(call))


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
        kinds, outputs, call = op.call.kinds, list(op.result._fields), autograd.call
        self.fields = autograd.of or tuple(name.removeprefix("d") for name in autograd.result._fields)
        self.inputs = getter(self.fields, kinds)
        self.gradients = autograd.gradients or (lambda run, call, _needed: run(call))
        kept, numbers = self._read_names(call, outputs)
        self.numbers = getter(numbers)
        star = {name: "*" for name, kind in kinds.items() if kind in LISTS}
        if autograd.kept is None:
            places = (
                f"{star.get(n, '')}call.{n}" if n in kinds else f"result[{outputs.index(n)}]" for n in kept
            )
            self.kept = eval(f"lambda call, result: ({', '.join(places)},)")
        else:
            of_call, named = autograd.kept, op.result._make
            self.kept = lambda call, result: of_call(call, named(result))
        self.differentiable = op.outputs if autograd.differentiable is None else autograd.differentiable
        self.has_lists = not star.keys().isdisjoint((*self.fields, *kept))
        self.counts, self.lengths = (_lengths(names, kinds) for names in (self.fields, kept))
        same = {name: f"call.{name}" if name in call.kinds else "None" for name in op.call.names}
        self.forward_of = autograd.forward_of or _maker(op.call, "call", same)
        fake = autograd.fake or _shapes_of(op.reference.backward)
        compiled = op.compiled and autograd.compiled
        self.node = _define(f"{op.name}_backward", call, autograd.result, fake, self._run_as_node, compiled)
        torch.library.register_autograd(
            f"bigkern::{op.name}", self.in_a_graph, setup_context=self.set_up_graph, lib=LIBRARY
        )

    def _read_names(self, call: type[Call], outputs: Sequence[str]) -> tuple[list[str], list[str]]:
        """The tensors and the numbers that are kept for the backward's call, and how it is made of them."""
        kept: list[str] = []
        numbers: list[str] = []
        sources: dict[str, str] = {}
        for name, kind in call.kinds.items():
            output, field = name.removeprefix("d"), name.removeprefix("want_")
            if output != name and output in outputs:
                sources[name] = f"grads[{outputs.index(output)}]"
            elif name == "wanted":
                sources[name] = "list(needed)"
            elif field != name:
                asked = f"needed[{self.fields.index(field)}]"
                sources[name] = f"any({asked})" if self.op.call.kinds[field] in LISTS else asked
            else:
                of, group = ("kept", kept) if kind in TENSORS else ("numbers", numbers)
                sources[name] = f"{of}[{len(group)}]"
                group.append(name)
        self.call = _maker(call, "grads, kept, numbers, needed", sources)
        return kept, numbers

    def save(self, ctx: Any, call: Any, result: Any) -> None:
        """Keep what the backward reads: tensors as autograd wants them kept, numbers as they are."""
        ctx.save_for_backward(*self.kept(call, (result,) if isinstance(result, Tensor) else result))
        if self.has_lists:
            ctx.lengths = self.lengths(call)
        ctx.numbers = self.numbers(call)
        ctx.set_materialize_grads(False)

    def mark(self, ctx: Any, outputs: Sequence[Tensor | None]) -> None:
        """Tell autograd which outputs have no gradients."""
        ctx.mark_non_differentiable(*(t for t in outputs[self.differentiable :] if t is not None))

    def of(self, run: Any, ctx: Any, grads: Sequence[Tensor | None], needed: Sequence[Any]) -> Sequence[Any]:
        """Gradients of the fields that have any, for those of the outputs."""
        grads = grads[: self.differentiable]
        if all(grad is None for grad in grads):
            return (None,) * len(needed)
        kept = _gathered(ctx.saved_tensors, ctx.lengths) if self.has_lists else ctx.saved_tensors
        call = self.call(grads, kept, ctx.numbers, needed)
        # torch.func has grad mode on whether or not it differentiates again.
        if torch.is_grad_enabled() and self.autograd.twice is not None and not in_functorch():
            return self.autograd.twice(call, needed)
        return self.gradients(run, call, needed)

    def _run_as_node(self, call: Any) -> Any:
        backward = self.op.of_node(self.forward_of(call)).backward
        assert backward is not None
        found = backward(call)
        return [g if g is None else g.contiguous() for g in found] if self.autograd.contiguous else found

    def set_up_graph(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        self.save(ctx, self.op.call.of_flat(*inputs), output)
        if not isinstance(output, Tensor):
            self.mark(ctx, output)

    def in_a_graph(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        wanted = dict(zip(self.op.call.names, ctx.needs_input_grad, strict=True))
        needed = [wanted[name] for name in self.fields]
        found = self.of(lambda call: self.node(*call.public()), ctx, grads, needed)
        by_name = dict(zip(self.fields, found, strict=True))
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
