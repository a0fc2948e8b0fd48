"""Problems of the adam op, in every way of storing a parameter."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigkern.core.problem import Call, Inputs, Problem
from bigkern.ops import adam as op
from bigkern.ops.adam import reference
from bigkern.ops.adam.call import bind
from bigkern.ops.adam.dynamic8 import dequantised, quantised

Sizes = list[tuple[int, ...]]

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


class Storage(NamedTuple):
    """What an option of the optimizer makes of the op's arguments; of 16-bit parameters if ``masters``."""

    moments: torch.dtype | None = None  # None: the parameters'
    masters: torch.dtype | None = None
    seed: int | None = None
    max_norm: float | None = None


STORAGE = {
    "clipping": Storage(max_norm=1.0),
    "bf16 moments": Storage(torch.bfloat16, seed=3),
    "8-bit moments": Storage(torch.uint8),
    "bf16, stochastic": Storage(seed=3),
    "bf16, fp32 masters": Storage(torch.float32, torch.float32),
    "bf16, remainders": Storage(torch.float32, torch.int16),
}


def adam(
    sizes: Sizes,
    label: str,
    decoupled: bool = True,
    elements: float = 7.0,
    amsgrad: bool = False,
    maximize: bool = False,
    by_tensors: bool = False,
) -> Problem:
    """One step from given moments; the output is everything that it writes, flattened.

    ``elements`` of the dtype cross the memory bus for each parameter. ``by_tensors``: the rate and what a
    gradient scaler says, that gradients are twice as large and all finite, are tensors.
    """

    def call(inputs: Inputs) -> Call:
        p, g, m, v = _lists(inputs)
        given: dict[str, Any] = {
            **HYPER, "decoupled": decoupled, "amsgrad": amsgrad, "maximize": maximize
        }  # fmt: skip
        if by_tensors:
            numbers = {"lr": HYPER["lr"], "grad_scale": 2.0, "found_inf": 0.0}
            given |= {name: torch.tensor(number, device=p[0].device) for name, number in numbers.items()}
            g = [2 * gradient for gradient in g]
        return (p, g, m, v, [x / 2 for x in v] if amsgrad else [], _steps(p)), given

    def public(
        p: list[Tensor], g: Any, m: list[Tensor], v: list[Tensor], highest: Any, *rest: Any, **options: Any
    ) -> Tensor:
        op.adam(p, g, m, v, highest, *rest, **options)
        return _written(p, m, v + highest)

    def stock(inputs: Inputs) -> Tensor:
        p, g, m, v = _lists(inputs)
        maker = torch.optim.AdamW if decoupled else torch.optim.Adam
        betas = (HYPER["beta1"], HYPER["beta2"])
        optimizer = maker(
            p, lr=HYPER["lr"], betas=betas, eps=HYPER["eps"], weight_decay=HYPER["weight_decay"],
            amsgrad=amsgrad, maximize=maximize,
        )  # fmt: skip
        highest = [x / 2 for x in v] if amsgrad else []
        for parameter, gradient, first, second, step in zip(p, g, m, v, _steps(p), strict=True):
            parameter.grad = gradient
            optimizer.state[parameter] = {"step": step.cpu(), "exp_avg": first, "exp_avg_sq": second}
        for parameter, most in zip(p, highest, strict=False):
            optimizer.state[parameter]["max_exp_avg_sq"] = most
        optimizer.step()
        return _written(p, m, v + highest)

    count = sum(torch.Size(size).numel() for size in sizes)
    return Problem(
        "adam",
        label,
        shapes_of("pgmv", sizes),
        public,
        call,
        stock,
        elements=elements * count,
        differentiable=False,
    )


def adam_storage(name: str, sizes: Sizes) -> Problem:
    """AdamW with other storage, in bfloat16 where its name says so; stock is the reference.

    In float64 it is the plain update from the same numbers, rounded nowhere.
    """
    storage = STORAGE[name]
    narrow = name.startswith("bf16, ")

    def stored(inputs: Inputs) -> dict[str, Any]:
        p, g, m, v = _lists(inputs)
        if narrow:
            p, g = ([x.to(torch.bfloat16) for x in tensors] for tensors in (p, g))
        lists: dict[str, Any] = {"params": p, "grads": g, "max_exp_avg_sqs": [], "state_steps": _steps(p)}
        if storage.moments == torch.uint8:
            codes = [
                [quantised(x.float().flatten(), signed) for x in xs] for xs, signed in ((m, True), (v, False))
            ]
            (
                (lists["exp_avgs"], lists["exp_avg_scales"]),
                (lists["exp_avg_sqs"], lists["exp_avg_sq_scales"]),
            ) = (
                ([c.view_as(x) for (c, _), x in zip(each, p, strict=True)], [s for _, s in each])
                for each in codes
            )
        else:
            kind = storage.moments or p[0].dtype
            lists["exp_avgs"], lists["exp_avg_sqs"] = ([x.to(kind) for x in xs] for xs in (m, v))
        if storage.masters is not None:
            lists["masters"] = [torch.zeros_like(x, dtype=storage.masters) for x in p]
            if storage.masters == torch.float32:
                lists["masters"] = [x.float() for x in p]
        return lists

    def options(grads: list[Tensor]) -> dict[str, Any]:
        clip = (
            {}
            if storage.max_norm is None
            else {"max_norm": storage.max_norm, "grad_norm": torch.nn.utils.get_total_norm(grads).float()}
        )
        return {**HYPER, "decoupled": True, "seed": storage.seed, **clip}

    def call(inputs: Inputs) -> Call:
        lists = stored(inputs)
        return (), {**lists, **options(lists["grads"])}

    def public(**arguments: Any) -> Tensor:
        op.adam(**arguments)
        return _written_wide(arguments)

    def stock(inputs: Inputs) -> Tensor:
        wide = next(iter(inputs.values())).dtype == torch.float64
        lists = stored({n: x.float() for n, x in inputs.items()}) if wide else stored(inputs)
        if wide:
            lists = _widened(lists)
        given = options(lists["grads"]) | ({"seed": None} if wide else {})
        reference.adam(bind(**lists, **given))
        return _written_wide(lists)

    return Problem(
        "adam",
        f"{len(sizes)} tensors, {name}",
        shapes_of("pgmv", sizes),
        public,
        call,
        stock,
        differentiable=False,
    )


def shapes_of(letters: str, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    return {f"{letter}_{i}": size for letter in letters for i, size in enumerate(sizes)}


def _lists(inputs: Inputs) -> tuple[list[Tensor], ...]:
    """p, g, m and v, copied: a step writes them."""
    return tuple([t.clone() for name, t in inputs.items() if name[0] == letter] for letter in "pgmv")


def _steps(params: list[Tensor]) -> list[Tensor]:
    return [torch.full((), 2.0, device=p.device) for p in params]


def _written(p: list[Tensor], m: list[Tensor], v: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in (*p, *m, *v)])


def _moments(lists: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """m and v as numbers."""
    m, v = lists["exp_avgs"], lists["exp_avg_sqs"]
    if not lists.get("exp_avg_scales"):
        return m, v
    scales = lists["exp_avg_scales"], lists["exp_avg_sq_scales"]
    return tuple(  # type: ignore[return-value]
        [dequantised(c.flatten(), s, signed).view_as(c) for c, s in zip(codes, each, strict=True)]
        for codes, each, signed in ((m, scales[0], True), (v, scales[1], False))
    )


def _written_wide(lists: dict[str, Any]) -> Tensor:
    """Everything that a step writes but masters, which p is the rounding of; at least float32."""
    tensors = [*lists["params"], *(x for xs in _moments(lists) for x in xs)]
    return torch.cat([x.flatten().to(torch.promote_types(x.dtype, torch.float32)) for x in tensors])


def _widened(lists: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64, nothing stored in a way of its own."""
    m, v = _moments(lists)
    doubles = {"params": lists["params"], "grads": lists["grads"], "exp_avgs": m, "exp_avg_sqs": v}
    wide = {name: [x.double() for x in tensors] for name, tensors in doubles.items()}
    return wide | {name: lists[name] for name in ("max_exp_avg_sqs", "state_steps")}


def forms() -> list[Problem]:
    """One step in every storage; tests/adam has trajectories of many."""
    return small()


def small() -> list[Problem]:
    return [
        adam([(1,), (7, 5), (4097,)], "3 tensors, AdamW"),
        adam([(63, 65), (1023,)], "2 tensors, Adam", decoupled=False),
        adam([(63, 65), (1023,)], "2 tensors, AMSGrad, maximised", amsgrad=True, maximize=True),
        adam([(63, 65), (1023,)], "2 tensors, rate and scale in tensors", by_tensors=True),
        *(adam_storage(name, [(63, 65), (1023,)]) for name in STORAGE),
    ]


def thorough() -> list[Problem]:
    return [
        *(adam_storage(name, [(1 << 18,), (1,), (1023, 7)]) for name in STORAGE),
        adam([(1 << 20,), (1,), (1023, 7)], "3 tensors, AdamW"),
        adam([(n,) for n in range(1, 200)], "199 tensors, Adam", decoupled=False),
    ]


def grid() -> list[Problem]:
    lists: list[Sizes] = [[(64,)], [(768,)] * 20, [(768, 768)] * 2, [(768, 3072)] * 4]
    return [adam(sizes, f"{len(sizes)} tensors of {sizes[0]}") for sizes in lists] + [
        adam_storage(name, [(768, 768)] * 2) for name in STORAGE
    ]


def large() -> list[Problem]:
    lists: list[Sizes] = [[(4096, 4096)] * 8, [(768,)] * 200 + [(768, 3072)] * 48]
    return [adam(sizes, f"{len(sizes)} tensors of {sizes[-1]}") for sizes in lists] + [
        adam_storage(name, lists[0]) for name in STORAGE
    ]


def typical() -> Problem:
    return adam([(768, 768), (768,)], "2 tensors")
