"""Problems of the recurrent op: one layer of an LSTM, a GRU or an RNN, in one or two directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigkern.core.problem import Call, Inputs, Problem
from bigkern.ops import recurrent as op
from bigkern.ops.recurrent.call import GATES

STOCK: dict[str, Any] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}
CELLS: dict[str, Any] = {
    "LSTM": torch.lstm_cell,
    "GRU": torch.gru_cell,
    "RNN_TANH": torch.rnn_tanh_cell,
    "RNN_RELU": torch.rnn_relu_cell,
}


def recurrent(
    mode: str,
    T: int,
    B: int,
    I: int,
    H: int,
    directions: int = 1,
    lengths: Sequence[int] = (),
    biases: bool = True,
    zoneout: bool = False,
) -> Problem:
    """``lengths`` of B packed sequences, falling from T; zoneout keeps half of the states as they were."""
    sizes = [sum(length > t for length in lengths) for t in range(T)] if lengths else []
    rows = (sum(sizes),) if lengths else (T, B)
    shapes: dict[str, tuple[int, ...]] = {"x": (*rows, I), "h0": (directions, B, H)}
    if mode == "LSTM":
        shapes["c0"] = (directions, B, H)
    weights = _weight_shapes(GATES[mode], I, H, directions, biases)
    shapes |= weights
    if zoneout:
        shapes["fixed_zoneout"] = (*rows, directions * H)

    def call(inputs: Inputs) -> Call:
        hx = (inputs["h0"], inputs["c0"]) if mode == "LSTM" else inputs["h0"]
        mask = (inputs["fixed_zoneout"] > 0).to(inputs["x"].dtype) if zoneout else None
        options = {"batch_sizes": inputs.get("batch_sizes"), "zoneout": mask}
        return (inputs["x"], hx, [inputs[name] for name in weights], mode), options

    def stock(inputs: Inputs) -> tuple[Tensor, ...]:
        (x, hx, given, _), options = call(inputs)
        if zoneout:
            return _by_cells(mode, x, hx, given, options["zoneout"])
        data = (x, options["batch_sizes"]) if lengths else (x,)
        order = () if lengths else (False,)  # batch_first
        training = torch.is_grad_enabled()
        hx = list(hx) if mode == "LSTM" else hx
        found = STOCK[mode](*data, hx, given, biases, 1, 0.0, training, directions == 2, *order)
        return tuple(found)

    words = [mode, f"{T}x{B}x{I}x{H}", "bidirectional" if directions == 2 else ""]
    words += ["packed" if lengths else "", "" if biases else "no bias", "zoneout" if zoneout else ""]
    product = torch.Size(rows).numel() * directions * GATES[mode] * H * (I + H)
    return Problem(
        "recurrent",
        " ".join(filter(None, words)),
        shapes,
        _flat,
        call,
        stock,
        constants=lambda device: {"batch_sizes": torch.tensor(sizes)} if lengths else {},
        outputs=("output", "hn", "cn") if mode == "LSTM" else ("output", "hn"),
        flops=2 * product,
        parameters=tuple(weights),
    )


def _weight_shapes(G: int, I: int, H: int, directions: int, biases: bool) -> dict[str, tuple[int, ...]]:
    """In torch's order and by its names."""
    own: dict[str, tuple[int, ...]] = {"weight_ih": (G * H, I), "weight_hh": (G * H, H)}
    own |= {"bias_ih": (G * H,), "bias_hh": (G * H,)} if biases else {}
    return {name + end: shape for end in ("", "_reverse")[:directions] for name, shape in own.items()}


def _flat(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    y, state = op.recurrent(*arguments, **options)
    return (y, *state) if isinstance(state, tuple) else (y, state)


def _by_cells(mode: str, x: Tensor, hx: Any, weights: list[Tensor], zoneout: Tensor) -> tuple[Tensor, ...]:
    """A loop over torch's cells, which is how people write zoneout."""
    D = hx[0].shape[0] if mode == "LSTM" else hx.shape[0]
    each, outputs, states = len(weights) // D, [], []
    for d, masks in enumerate(zoneout.chunk(D, -1)):
        state = tuple(s[d] for s in hx) if mode == "LSTM" else hx[d]
        y: list[Tensor] = []
        for t in range(len(x)) if d == 0 else reversed(range(len(x))):
            before = state[0] if mode == "LSTM" else state
            state = CELLS[mode](x[t], state, *weights[d * each : (d + 1) * each])
            h = state[0] if mode == "LSTM" else state
            h = h + masks[t] * (before - h)
            state = (h, state[1]) if mode == "LSTM" else h
            y.append(h)
        outputs.append(torch.stack(y if d == 0 else y[::-1]))
        states.append(state if mode == "LSTM" else (state,))
    return torch.cat(outputs, -1), *(torch.stack(parts) for parts in zip(*states, strict=True))


def small() -> list[Problem]:
    """Odd sizes; every mode, and every feature once."""
    return [
        recurrent("LSTM", 7, 3, 33, 40),
        recurrent("GRU", 5, 2, 17, 48, directions=2),
        recurrent("RNN_TANH", 9, 1, 16, 65),
        recurrent("RNN_RELU", 4, 5, 24, 32, biases=False),
        recurrent("GRU", 6, 4, 20, 32, lengths=(6, 6, 3, 1)),
        recurrent("LSTM", 5, 3, 20, 24, directions=2, lengths=(5, 2, 2)),
        recurrent("LSTM", 4, 3, 16, 40, zoneout=True),
        recurrent("GRU", 4, 2, 16, 40, directions=2, zoneout=True),
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
        *(recurrent(mode, 9, 5, 64, 256, directions=2, zoneout=True) for mode in smooth),
        *(recurrent(mode, 300, 4, 32, 128) for mode in smooth),
        recurrent("RNN_RELU", 4, 9, 64, 130),
    ]


def typical() -> Problem:
    return recurrent("LSTM", 128, 32, 256, 512)
