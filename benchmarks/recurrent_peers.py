"""A recurrent layer, and who runs it: bigkern's, torch's, torch's compiled, a loop of cells, FlashRNN."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

import bigkern
from bigkern.benchmarks.harness import Bench, Contestant, LeftOut, compiler_works
from bigkern.core import registry
from bigkern.core.problem import Inputs, Problem
from bigkern.core.timing import Task

Run = Callable[[Tensor], tuple[Tensor, ...]]  # of x: the output, hn, an LSTM's cn
Build = Callable[[Inputs], Run]  # around the inputs' weights

WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
COMPILED_STEPS = 32  # torch.compile unrolls them all: 30 s for these, minutes for 128


@dataclass(frozen=True, slots=True)
class Layer:
    """What is timed: T steps of B rows of 256 (packed: of these lengths), through layers of H."""

    kind: str  # LSTM, GRU or RNN
    T: int
    B: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    lengths: tuple[int, ...] = ()
    layer_norm: bool = False
    I: int = 256

    def problem(self) -> Problem:
        """Its inputs are x and the layer's parameters by their names; outputs and states are judged."""
        sizes = [sum(length > t for length in self.lengths) for t in range(max(self.lengths, default=0))]
        rows = (sum(sizes),) if sizes else (self.T, self.B)
        weights = {name: tuple(p.shape) for name, p in self.empty(bigkern.nn).named_parameters()}
        products = sum(w[0] * w[1] for w in weights.values() if len(w) == 2)

        def values(drawn: Inputs) -> Inputs:
            """About as torch draws them: with larger weights a GRU is chaotic, and a rounding grows to 1."""
            scale = (3 * self.H) ** -0.5
            return {n: x * scale if n.startswith(("weight_", "bias_")) else x for n, x in drawn.items()}

        return Problem(
            "recurrent",
            self.label(),
            {"x": (*rows, self.I), **weights},
            lambda inputs: self.ours(inputs)(inputs["x"]),
            lambda inputs: ((inputs,), {}),
            lambda inputs: self.stock(inputs)(inputs["x"]),
            constants=lambda device: {"batch_sizes": torch.tensor(sizes)} if sizes else {},
            values=values,
            outputs=("output", "hn", "cn") if self.kind == "LSTM" else ("output", "hn"),
            flops=2 * torch.Size(rows).numel() * products,
            parameters=tuple(weights),
        )

    def label(self) -> str:
        words = ["LayerNorm " * self.layer_norm + self.kind, f"{self.I}->{self.H}"]
        words += [f"{self.layers} layers"] if self.layers > 1 else []
        words += [f"T {self.T}", f"batch {self.B}"]
        words += ["bidirectional"] if self.bidirectional else []
        return ", ".join(words) + ", packed" * bool(self.lengths)

    def empty(self, module: Any) -> nn.RNNBase:
        """The layer of ``torch.nn`` or ``bigkern.nn``, without memory."""
        options = {"layer_norm": True} if self.layer_norm else {}
        cls, both = getattr(module, self.kind), self.bidirectional
        return cls(self.I, self.H, self.layers, bidirectional=both, device="meta", **options)  # type: ignore[no-any-return]

    # ---- contestants --------------------------------------------------------------------------------

    def ours(self, inputs: Inputs) -> Run:
        return self._run(_around(self.empty(bigkern.nn), inputs), inputs)

    def stock(self, inputs: Inputs) -> Run:
        """torch's layer; where it has none, a loop of its functions, which is how people write one."""
        if self.layer_norm:
            return partial(_layer_norm_lstm, inputs)
        return self._run(_around(self.empty(nn), inputs), inputs)

    def _run(self, layer: Any, inputs: Inputs) -> Run:
        sizes = inputs.get("batch_sizes")

        def run(x: Tensor) -> tuple[Tensor, ...]:
            y, state = layer(x if sizes is None else PackedSequence(x, sizes))
            states = state if isinstance(state, tuple) else (state,)
            return (y if sizes is None else y.data, *states)

        return run

    # ---- their backends -----------------------------------------------------------------------------

    def choice(self, inputs: Inputs) -> str:
        """bigkern's backend of the first layer; where that is stock, torch runs the whole stack."""
        if self.layer_norm:
            return "torch"
        ends = ["l0", "l0_reverse"][: 1 + self.bidirectional]
        weights = [inputs[f"{name}_{end}"] for end in ends for name in WEIGHTS]
        mode = "RNN_TANH" if self.kind == "RNN" else self.kind
        call = inputs["x"], None, weights, mode, inputs.get("batch_sizes")
        return registry.explain("recurrent", *call).chosen

    def dispatched(self, inputs: Inputs) -> str:
        """What torch runs two steps on."""
        with _Operators() as seen:
            short = inputs["x"] if self.lengths else inputs["x"][:2]
            self.stock(inputs)(short)
        return next((name for name, sign in KNOWN.items() if any(sign in n for n in seen.names)), "aten")


KNOWN = {"onednn": "mkldnn_rnn", "cudnn": "cudnn_rnn", "fused cells": "_thnn_fused"}


class _Operators(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def _around(layer: nn.RNNBase, inputs: Inputs) -> nn.RNNBase:
    """The inputs' tensors in the places of the layer's parameters, and, for cuDNN, in one piece."""
    for name, _ in list(layer.named_parameters()):
        delattr(layer, name)
        setattr(layer, name, inputs[name])
    layer.flatten_parameters()
    return layer


def _layer_norm_lstm(inputs: Inputs, x: Tensor) -> tuple[Tensor, ...]:
    """LayerNorm on both products and on the cell, a step at a time."""
    w_ih, w_hh, b_ih, b_hh = (inputs[f"{name}_l0"] for name in WEIGHTS)
    of_ih, of_hh, of_c, bias_c = (
        inputs[f"norm_{n}_l0"] for n in ("weight_ih", "weight_hh", "weight_c", "bias_c")
    )
    gates, cells = of_hh.shape, of_c.shape
    projected = F.layer_norm(F.linear(x, w_ih), gates, of_ih, b_ih)
    h = c = x.new_zeros(x.shape[1], *cells)
    outputs = []
    for step in projected:
        i, f, g, o = (step + F.layer_norm(F.linear(h, w_hh), gates, of_hh, b_hh)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * F.layer_norm(c, cells, of_c, bias_c).tanh()
        outputs.append(h)
    return torch.stack(outputs), h[None], c[None]


# ---- torch.compile -----------------------------------------------------------------------------------


def compiled(layer: Layer, bench: Bench) -> Contestant:
    """torch.compile of torch's layer, without gradients, which would take it minutes."""
    seen: dict[str, Any] = {}
    within = partial(torch._dynamo.config.patch, allow_rnn=True)  # or it would leave the layer as it is

    def tasks(inputs: Inputs) -> dict[str, Task]:
        steps = layer.T * layer.layers
        if steps > COMPILED_STEPS and not bench.compile_all:
            raise LeftOut(f"compiling unrolls {steps} steps, which takes too long; --compile includes it")
        if not compiler_works(bench.device.type):
            raise LeftOut("torch.compile does not work here")
        torch.compiler.reset()  # or the cases before this one count as recompilations of it
        run, x = torch.compile(layer.stock(inputs), dynamic=False), inputs["x"].detach()

        def forward(_: Any) -> Any:
            with torch.no_grad():
                return run(x)

        seen["forward"] = weakref.ref(forward)  # its memory goes with the task
        return {"forward": Task(forward, within=within)}

    def results(inputs: Inputs) -> dict[str, Tensor]:
        with within():
            return {"output": seen["forward"]()(None)[0]}

    return Contestant("compile", tasks, lambda inputs: "inductor", results)


# ---- FlashRNN ----------------------------------------------------------------------------------------


def flashrnn(layer: Layer) -> list[tuple[str, Build, Callable[[Inputs], str]]]:
    """NX-AI's FlashRNN, which knows neither directions nor packed sequences: its scan behind torch's product.

    "fused" keeps the recurrent weights on chip, "alternating" calls cuBLAS at every step.
    """
    if layer.bidirectional or layer.lengths or layer.layer_norm:
        return []
    try:
        from flashrnn import FlashRNNConfig, flashrnn
    except Exception:  # absent, or built for another torch
        return []

    def build(backend: str, inputs: Inputs) -> Run:
        dtype = str(inputs["x"].dtype).removeprefix("torch.")
        config = FlashRNNConfig(
            function=FUNCTIONS[layer.kind],
            backend=backend,
            head_dim=layer.H,
            num_heads=1,
            batch_size=layer.B,
            dtype=dtype,
            input_shape="TBGHD",
            output_shape="STBHD",
        )

        def run(x: Tensor) -> tuple[Tensor, ...]:
            for i in range(layer.layers):
                w_ih, w_hh, *biases = (inputs[f"{name}_l{i}"] for name in WEIGHTS)
                projected = F.linear(x, w_ih).view(layer.T, layer.B, -1, 1, layer.H)
                states, _ = flashrnn(projected, *_flash_weights(layer, w_hh, *biases), config=config)
                x = states[0].squeeze(2)
            return (x,)

        return run

    ways = {"flashrnn": "cuda_fused", "flashrnn-alternating": "cuda"}
    if layer.kind == "GRU":
        del ways["flashrnn"]  # it has no fused one
    return [(name, partial(build, way), lambda inputs, way=way: way) for name, way in ways.items()]  # type: ignore[misc]


FUNCTIONS = {"LSTM": "lstm", "GRU": "gru", "RNN": "elman"}


def _flash_weights(layer: Layer, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> tuple[Tensor, Tensor]:
    """R ``[G, 1, H, H]`` and b; a GRU's are n r z of h, and for the biases b_hn, r, z, b_in."""
    H = layer.H
    if layer.kind != "GRU":
        return w_hh.view(-1, 1, H, H), (b_ih + b_hh).view(-1, 1, H)
    both = (b_ih + b_hh)[: 2 * H]
    biases = torch.cat((b_hh[2 * H :], both, b_ih[2 * H :]))
    return torch.cat((w_hh[2 * H :], w_hh[: 2 * H])).view(3, 1, H, H), biases.view(4, 1, H)
