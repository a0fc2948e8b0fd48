"""Problems of the recurrent op: one layer of an LSTM, a GRU or an RNN, in one or two directions."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bigkern.core.problem import Call, Inputs, Problem, by_formulas
from bigkern.ops import recurrent as op
from bigkern.ops.recurrent.backends import RECURRENT
from bigkern.ops.recurrent.call import GATES, bind
from bigkern.ops.recurrent.stock import recurrent as by_torch

OUTPUTS = ("output", "hn", "cn")


def recurrent(
    mode: str,
    T: int,
    B: int,
    I: int,
    H: int,
    directions: int = 1,
    lengths: Sequence[int] = (),
    biases: bool = True,
    zoneout: str = "",
    *,
    state: bool = True,
    strided: bool = False,
    used: Collection[str] = OUTPUTS,
) -> Problem:
    """``lengths`` of B packed sequences, falling from T.

    ``zoneout``: a "mask" keeps a third of the states as they were, a "rate" a part of each. ``used`` are the
    outputs that count and have gradients.
    """
    sizes = [sum(length > t for length in lengths) for t in range(T)] if lengths else []
    rows, lstm = (sum(sizes),) if lengths else (T, B), mode == "LSTM"
    states = dict.fromkeys(("h0", "c0")[: state * (1 + lstm)], (directions, B, H))
    weights = _weight_shapes(GATES[mode], I, H, directions, biases)
    shapes: dict[str, tuple[int, ...]] = {"x": (*rows, I)} | states | weights
    shapes |= {"fixed_zoneout": (*rows, directions * H)} if zoneout else {}
    outputs = tuple(name for name in OUTPUTS[: 2 + lstm] if name in used)
    views = {}
    if strided:  # x and the weights transposed, of the states every second number
        views = {"x": lambda t: t.transpose(0, 1)} | {name: lambda t: t[..., ::2] for name in states}
        views |= {name: Tensor.t for name, shape in weights.items() if len(shape) == 2}
        shapes |= {"x": (I, *rows) if lengths else (B, T, I)}
        shapes |= dict.fromkeys(states, (directions, B, 2 * H))
        shapes |= {name: shape[::-1] for name, shape in weights.items()}

    def values(drawn: Inputs) -> Inputs:
        drawn |= {name: drawn[name] / (3 * H) ** 0.5 for name in weights}  # about as torch draws them
        if zoneout == "mask":
            drawn["fixed_zoneout"] = (drawn["fixed_zoneout"] > 0.5).float()
        if zoneout == "rate":
            drawn["fixed_zoneout"] = torch.full_like(drawn["fixed_zoneout"], 0.2)
        return drawn

    def call(inputs: Inputs) -> Call:
        hx = [inputs[name] for name in states]
        given = (tuple(hx) if lstm else hx[0]) if hx else None
        options = {"batch_sizes": inputs.get("batch_sizes"), "zoneout": inputs.get("fixed_zoneout")}
        return (inputs["x"], given, [inputs[name] for name in weights], mode), options

    def asked(y: Tensor, *hidden: Tensor | None) -> tuple[Tensor, ...]:
        named: dict[str, Any] = dict(zip(OUTPUTS, (y, *hidden), strict=False))
        return tuple(named[name] for name in outputs)

    def public(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        y, hidden = op.recurrent(*arguments, **options)
        return asked(y, *hidden) if lstm else asked(y, hidden)

    def stock(inputs: Inputs) -> tuple[Tensor, ...]:
        arguments, options = call(inputs)
        return asked(*by_torch(bind(*arguments, **options)))

    def specification(inputs: Inputs) -> tuple[Tensor, ...]:
        """Its backward keeps gates and their gradients in the inputs' dtype."""
        arguments, options = call(inputs)
        return asked(*by_formulas(RECURRENT, bind(*arguments, **options)))

    words = [mode, f"{T}x{B}x{I}x{H}", "bidirectional" if directions == 2 else ""]
    words += ["packed" if lengths else "", "" if biases else "no bias", zoneout and f"zoneout by {zoneout}"]
    words += ["" if state else "no state", "strided" if strided else ""]
    words += ["" if len(outputs) == 2 + lstm else "used: " + ", ".join(outputs)]
    features = [mode, "two directions" if directions == 2 else "", "packed" if lengths else ""]
    features += ["zoneout" if zoneout else "", "" if biases else "no biases"]
    product = torch.Size(rows).numel() * directions * GATES[mode] * H * (I + H)
    return Problem(
        "recurrent",
        " ".join(filter(None, words)),
        shapes,
        public,
        call,
        stock,
        constants=lambda device: {"batch_sizes": torch.tensor(sizes)} if lengths else {},
        specification=specification if zoneout else None,  # which torch has not
        values=values,
        views=views,
        outputs=outputs,
        flops=2 * product,
        parameters=tuple(weights),
        features=tuple(filter(None, features)),
        kernels=("cpu", *(() if mode == "RNN_RELU" else ("cpu_library",)), "triton", "cuda"),
    )


def _weight_shapes(G: int, I: int, H: int, directions: int, biases: bool) -> dict[str, tuple[int, ...]]:
    """In torch's order and by its names."""
    own: dict[str, tuple[int, ...]] = {"weight_ih": (G * H, I), "weight_hh": (G * H, H)}
    own |= {"bias_ih": (G * H,), "bias_hh": (G * H,)} if biases else {}
    return {name + end: shape for end in ("", "_reverse")[:directions] for name, shape in own.items()}


def falling(T: int, B: int) -> list[int]:
    """Lengths of B sequences, evenly from T down."""
    return [max(1, T * (B - b) // B) for b in range(B)]


FORMS: list[dict[str, Any]] = [
    {},
    {"packed": True, "directions": 2, "zoneout": "mask"},
    {"directions": 2, "biases": False, "state": False},
    {"packed": True, "zoneout": "rate", "biases": False},
    {"directions": 2, "zoneout": "rate", "strided": True},
    {"packed": True, "state": False},
]


def form(mode: str, T: int, B: int, I: int, H: int, packed: bool = False, **options: Any) -> Problem:
    return recurrent(mode, T, B, I, H, lengths=falling(T, B) if packed else (), **options)


def forms() -> list[Problem]:
    """Of those that an emulator would take too long for, it gets a part: each form, for some of the modes."""
    found = []
    for i, mode in enumerate(GATES):
        found += [form(mode, 3, 2, 3, 4, **options) for options in FORMS[i % 3 :: 3]]
        found += [replace(form(mode, 5, 4, 9, 12, **options), emulated=False) for options in FORMS]
    # A single step, one sequence, one unit, and more than a tile of each.
    odd = (
        (1, 1, 1, 1),
        (1, 5, 3, 7),
        (7, 1, 9, 33),
        (3, 17, 2, 65),
        (2, 70, 4, 8),
        (9, 3, 1, 1),
        (3, 9, 40, 130),
    )
    for i, sizes in enumerate(odd):
        for mode in GATES:
            emulated = i in (0, 2, 5) and mode in list(GATES)[i % 2 : 3 : 2]
            problem = form(mode, *sizes, i % 2 == 1, directions=1 + (i % 3 == 1))
            found.append(replace(problem, emulated=emulated))
    for mode, used in (("LSTM", ["cn"]), ("GRU", ["hn"]), ("LSTM", ["hn"]), ("LSTM", ["cn", "output"])):
        found.append(form(mode, 3, 2, 3, 4, directions=2, packed=True, used=used))
    return found


def drawn(draw: random.Random, largest: int) -> Problem:
    tops = (3 + largest // 8, 2 + largest // 4, 2 + 2 * largest // 5, largest)
    T, B, I, H = (draw.choice((1, 2, draw.randint(1, top))) for top in tops)
    shorter = sorted((draw.randint(1, T) for _ in range(B - 1)), reverse=True)
    return recurrent(
        draw.choice(list(GATES)),
        T,
        B,
        I,
        H,
        draw.choice((1, 2)),
        [T, *shorter] if draw.random() < 0.5 else (),
        biases=draw.random() < 0.7,
        zoneout=draw.choice(("", "", "mask", "rate")),
        state=draw.random() < 0.7,
        strided=draw.random() < 0.2,
        used=draw.choice((OUTPUTS[:1], OUTPUTS[:2], OUTPUTS)),
    )


def small() -> list[Problem]:
    """Odd sizes; every mode, and every feature once."""
    return [
        recurrent("LSTM", 7, 3, 33, 40),
        recurrent("GRU", 5, 2, 17, 48, directions=2),
        recurrent("RNN_TANH", 9, 1, 16, 65),
        recurrent("RNN_RELU", 4, 5, 24, 32, biases=False),
        recurrent("GRU", 6, 4, 20, 32, lengths=(6, 6, 3, 1)),
        recurrent("LSTM", 5, 3, 20, 24, directions=2, lengths=(5, 2, 2)),
        recurrent("LSTM", 4, 3, 16, 40, zoneout="mask"),
        recurrent("GRU", 4, 2, 16, 40, directions=2, zoneout="mask"),
    ]


def thorough() -> list[Problem]:
    """Few rows and many, weights that fit on a chip and that do not, long sequences.

    relu's are short: of a number near 0 either rounding is right, and its gradient is all or nothing.
    """
    gated, smooth = ("LSTM", "GRU"), ("LSTM", "GRU", "RNN_TANH")
    return [
        *(recurrent(mode, 6, B, 256, 512) for mode in gated for B in (1, 8, 32)),
        *(recurrent(mode, 5, 8, 100, H) for mode in gated for H in (128, 200, 1024, 1536)),
        *(recurrent(mode, 4, 130, 64, 256) for mode in gated),
        *(recurrent(mode, 33, 3, 64, 96, directions=2, lengths=(33, 20, 1)) for mode in smooth),
        *(recurrent(mode, 9, 5, 64, 256, directions=2, zoneout="mask") for mode in smooth),
        *(recurrent(mode, 300, 4, 32, 128) for mode in smooth),
        recurrent("RNN_RELU", 4, 9, 64, 130),
    ]


def grid() -> list[Problem]:
    sizes = ((16, 1, 128, 128), (64, 1, 512, 512), (16, 16, 128, 128), (64, 16, 256, 256), (32, 32, 512, 512))
    return [recurrent(mode, *size) for mode in ("LSTM", "GRU") for size in sizes] + [
        recurrent("RNN_TANH", 64, 16, 256, 256),
        recurrent("LSTM", 32, 16, 256, 256, directions=2),
        recurrent("GRU", 32, 16, 256, 256, directions=2),
    ]


def large() -> list[Problem]:
    sizes = ((256, 64, 512, 512), (256, 64, 1024, 1024), (512, 1, 1024, 1024))
    return [recurrent(mode, *size) for mode in ("LSTM", "GRU") for size in sizes]


def typical() -> Problem:
    return recurrent("LSTM", 128, 32, 256, 512)
