"""Make a call, and say what is wrong with what came of it.

A result is wrong if its shape or dtype is not the stock function's, if it is not a number where the float64
reference is one, or if it is further from that reference than 64 roundings explain: 64 times the unit
roundoff of the call's dtype, of the largest number among the call's results, or, where sums cancel, 64 times
the error of plain torch in the same dtype. The parity rule is tighter; this finds what is broken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from source import Call
from torch import Tensor

ROUNDINGS = 64
EXPECTED_ERRORS = (ValueError, TypeError, RuntimeError)  # torch's own derive from them


@dataclass(frozen=True)
class Finding:
    kind: str  # "wrong" or "unnamed"
    message: str


def judge(call: Call, named_errors: bool) -> Finding | None:
    """Make the call; with ``named_errors`` an error must be of the kinds expected and name an argument."""
    wide, copied = _widened(call), _copied(call)
    arguments, low = _as_leaves(call), _as_leaves(call) | {name: copied[name] for name in call.written}
    before = _copied(call)
    call.last_touch()
    try:
        ours = _results(call.function, arguments, call)
    except Exception as error:
        # torch's functions may fail halfway, and what has no memory is found by the kernel alone
        unchecked = call.name.startswith("bigkern::") or call.without_memory
        written = _changed(before, arguments, call.written if unchecked else frozenset())
        if written:
            return Finding("wrong", f"{written} was written although the call raised {error!r}"[:600])
        return _judged_error(call, error, named_errors)
    written = _changed(before, arguments, call.written)
    if written:
        return Finding("wrong", f"{written} was written")
    if call.exact is None or call.plain is None or not _comparable(call):
        return None
    exact = _attempt(call.exact, wide, call)
    plain = None if call.without_memory else _attempt(call.plain, low, call)
    if isinstance(exact, Exception):  # an op may read as many numbers in another shape; a public function not
        refused = named_errors and isinstance(plain, Exception)
        return Finding("wrong", f"accepted what torch refuses: {plain!r}"[:600]) if refused else None
    wrong = _compared(ours, exact, None if isinstance(plain, Exception) else plain, _rounding(call))
    return None if wrong is None else Finding("wrong", wrong)


def _attempt(function: Callable[..., Any], arguments: dict[str, Any], call: Call) -> Any:
    try:
        return _results(function, arguments, call)
    except Exception as error:
        return error


# Arguments that must belong together, because a kernel reads from one what the reference reads from another:
# a weight from its packed copy, a row's mean from the row itself.
READ_ELSEWHERE = {
    "frozen_layernorm_ffn": {"w1", "w2", "w1_packed", "w2_packed"},
    "norm_backward": {"s", "mean"},
    "layernorm_ffn_backward": {"x", "s", "mean"},
}


def _comparable(call: Call) -> bool:
    name = re.split(r"::|\.", call.name)[-1]
    return READ_ELSEWHERE.get(name, set()).isdisjoint(call.spoiled)


def _judged_error(call: Call, error: Exception, named: bool) -> Finding | None:
    message = f"{type(error).__name__}: {error}"[:400]
    if not call.spoiled:
        return Finding("wrong", f"a valid call raised {message}")
    if not named:
        return None
    if isinstance(error, EXPECTED_ERRORS) and call.without_memory:
        return None
    if not isinstance(error, EXPECTED_ERRORS):
        return Finding("unnamed", f"{call.spoiled[0]} spoiled: {message}")
    begins = re.match(r"\w+", str(error))
    about_another = begins is not None and begins.group() in call.arguments
    if about_another or re.search(rf"\b{call.spoiled[0]}\b", str(error)):
        return None
    return Finding("unnamed", f"{call.spoiled[0]} spoiled: {message}")


# ---- what a call gives -------------------------------------------------------------------------------


def _results(function: Callable[..., Any], arguments: dict[str, Any], call: Call) -> list[Tensor | None]:
    """What is returned, what was written, and, if they are asked for, all gradients."""
    with torch.set_grad_enabled(call.gradients):
        outputs = list(_leaves(function(**arguments)))
    found = [None if t is None else t.detach() for t in outputs]
    for name in sorted(call.written):
        found += [t.detach() if isinstance(t, Tensor) else None for t in _leaves(arguments.get(name))]
    if not call.gradients:
        return found
    inputs = [t for t in _leaves(arguments) if isinstance(t, Tensor) and t.requires_grad]
    asked = [t for t in outputs if isinstance(t, Tensor) and t.requires_grad]
    if not asked or not inputs:
        return found
    generator = torch.Generator().manual_seed(0)
    upstream = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in asked]
    return found + list(torch.autograd.grad(asked, inputs, upstream, allow_unused=True))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, Tensor) or value is None:
        yield value


def _widened(call: Call) -> dict[str, Any]:
    """The arguments in float64, with their numbers where the call is given a tensor without memory."""

    def widen(x: Tensor) -> Tensor:
        x = getattr(x, "numbers", x)
        return _leaf(x.double() if x.is_floating_point() else x.clone(), call)

    made = _mapped(call.arguments, widen)
    return made | {name: value for name, value in _copied(call).items() if name in FLOAT32}


def _copied(call: Call) -> dict[str, Any]:
    return _mapped(call.arguments, lambda x: _leaf(x.clone(), call))


def _as_leaves(call: Call) -> dict[str, Any]:
    """The arguments themselves, the same memory."""
    return _mapped(call.arguments, lambda x: _leaf(x, call))


def _leaf(x: Tensor, call: Call) -> Tensor:
    return x.detach().requires_grad_(call.gradients and x.is_floating_point())


FLOAT32 = ("state_steps", "grad_scale", "found_inf", "lr_tensor", "grad_norm")  # in every call of adam's
WITHOUT_GRADIENT = ("alibi_slopes", "zoneout")


def _mapped(arguments: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    def mapped(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            items = [mapped(item) for item in x]
            return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
        return change(x) if isinstance(x, Tensor) else x

    made = {name: mapped(value) for name, value in arguments.items()}
    for name in WITHOUT_GRADIENT:
        if isinstance(made.get(name), Tensor):
            made[name] = made[name].detach()
    return made


def _changed(before: dict[str, Any], after: dict[str, Any], but: frozenset[str]) -> str:
    """The first argument whose numbers are not what they were."""
    for name in before:
        if name in but:
            continue
        for old, new in zip(_leaves(before[name]), _leaves(after[name]), strict=True):
            if old is None or old.is_meta or new.untyped_storage().nbytes() == 0:
                continue
            if not torch.equal(_bytes(old), _bytes(new)):
                return name
    return ""


def _bytes(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


# ---- comparing ---------------------------------------------------------------------------------------


def _rounding(call: Call) -> float:
    """The unit roundoff of the coarsest dtype: float32 statistics of bfloat16 numbers feel their rounding."""
    given = [t for t in _leaves(call.arguments) if isinstance(t, Tensor) and t.is_floating_point()]
    return max((torch.finfo(t.dtype).eps / 2 for t in given), default=0.0)


def _compared(
    ours: list[Tensor | None],
    exact: list[Tensor | None],
    plain: list[Tensor | None] | None,
    rounding: float,
) -> str | None:
    if len(ours) != len(exact):
        return f"{len(ours)} results, not {len(exact)}"
    if plain is None or len(plain) != len(exact):
        plain = [None] * len(exact)
    largest = max((_largest(t) for t in exact), default=0.0)
    for i, (x, right, low) in enumerate(zip(ours, exact, plain, strict=True)):
        wrong = _wrong(x, right, low, rounding * largest)
        if wrong:
            return f"result {i}: {wrong}"
    return None


def _largest(x: Tensor | None) -> float:
    """The largest finite number."""
    if x is None or x.is_meta or not x.is_floating_point() or x.numel() == 0:
        return 0.0
    return float(x.double().nan_to_num(0.0, 0.0, 0.0).abs().max())


def _wrong(x: Tensor | None, right: Tensor | None, low: Tensor | None, rounded: float) -> str | None:
    if x is None or right is None:
        return None if x is right else f"{'None' if x is None else 'a tensor'} is not what there must be"
    if x.shape != right.shape:
        return f"shape {tuple(x.shape)}, not {tuple(right.shape)}"
    if low is not None and low.dtype != x.dtype:
        return f"dtype {x.dtype}, not {low.dtype}"
    if not x.is_floating_point() or x.is_meta or right.is_meta or x.numel() == 0:
        return None
    right, wide = right.double(), x.double()
    number = right.isfinite() & (right.abs() < torch.finfo(x.dtype).max / 4)
    if low is not None:
        number &= low.isfinite()
    wide, right = wide[number], right[number]
    if not bool(wide.isfinite().all()):
        return f"{int((~wide.isfinite()).sum())} of {x.numel()} are not finite"
    error = _largest(wide - right)
    explained = 0.0 if low is None else _largest(low.double()[number] - right)
    allowed = ROUNDINGS * max(explained, rounded) + torch.finfo(x.dtype).tiny
    return f"error {error:.3g}, where {allowed:.3g} is allowed" if error > allowed else None
