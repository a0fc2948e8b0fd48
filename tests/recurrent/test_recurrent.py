"""A layer of an LSTM, a GRU or an RNN on every backend against float64, and what surrounds the op."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from typing import Any

import parity
import pytest
import torch
from parity import FUZZ_FROM, RECORD, assert_parity, device_of, poisoned_empty_memory, run_backend
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import bigkern
from bigkern.core.parity import Yardstick
from bigkern.ops.recurrent import recurrent, reference, stock
from bigkern.ops.recurrent.call import GATES, RecurrentBackward, bind
from bigkern.ops.recurrent.stock import REFERENCE

MODES = list(GATES)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = parity.BACKENDS
KERNEL_BACKENDS = parity.KERNEL_BACKENDS
SLOW = ("triton", "simt") if not parity.GPU else ()  # the interpreter and the emulator

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:LSTM with projections"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # of saturated gates, in numpy
]


@dataclass(frozen=True)
class Case:
    """A call of the op of any form; ``sizes`` are T, B, I and H."""

    mode: str
    dtype: torch.dtype = torch.float32
    sizes: tuple[int, int, int, int] = (4, 3, 5, 6)
    directions: int = 1
    packed: bool = False
    biases: bool = True
    state: bool = True
    zoneout: str = ""  # "", "mask" or "rate"
    used: tuple[str, ...] = ("y", "hn", "cn")
    strided: bool = False

    def features(self) -> list[str]:
        asked = {
            self.mode: True,
            "two directions": self.directions == 2,
            "packed": self.packed,
            "zoneout": bool(self.zoneout),
            "no biases": not self.biases,
        }
        return [name for name, used in asked.items() if used]

    def inputs(self, device: torch.device, seed: int = 0) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(seed)
        T, B, I, H = self.sizes
        D, rows = self.directions, GATES[self.mode] * H

        def make(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=draw)).to(device, self.dtype)

        batch_sizes = None
        if self.packed:
            batch_sizes = torch.randint(1, B + 1, (T,), generator=draw).sort(descending=True).values
            batch_sizes[0] = B
        steps = (T, B) if batch_sizes is None else (int(batch_sizes.sum()),)
        shapes = [(rows, I), (rows, H), *([(rows,), (rows,)] if self.biases else [])] * D
        states = [make(D, B, H) for _ in range(1 + (self.mode == "LSTM"))] if self.state else []
        m = None
        if self.zoneout:
            m = torch.rand(*steps, D * H, generator=draw)
            m = (m < 0.3 if self.zoneout == "mask" else m.fill_(0.2)).to(device, self.dtype)
        x = make(*steps, I)
        weights = [make(*shape, scale=H**-0.5) for shape in shapes]
        if self.strided:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
            states = [t.repeat_interleave(2, -1)[..., ::2] for t in states]
            weights = [w.t().contiguous().t() for w in weights]
        upstream = {"y": make(*steps, D * H), "hn": make(D, B, H), "cn": make(D, B, H)}
        given = {"x": x, "states": states, "weights": weights, "batch_sizes": batch_sizes}
        return given | {"zoneout": m, "upstream": upstream}

    def hx(self, states: list[Tensor]) -> Any:
        return None if not states else tuple(states) if self.mode == "LSTM" else states[0]

    def by_reference(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The specification in the inputs' dtype, which keeps gates and their gradients in it."""
        hx, weights, m = self.hx(inputs["states"]), inputs["weights"], inputs["zoneout"]
        call = bind(inputs["x"], hx, weights, self.mode, inputs["batch_sizes"], m)
        call.save = True
        y, hn, cn, gates, reserve = REFERENCE.forward(call)
        upstream = [inputs["upstream"][name] if name in self.used else None for name in ("y", "hn", "cn")]
        upstream[2] = None if cn is None else upstream[2]
        *context, mode, _save = call.flat()
        assert REFERENCE.backward is not None
        dx, dh0, dc0, dweights = REFERENCE.backward(
            RecurrentBackward(*upstream, *context, y, gates, reserve, mode, True, True)
        )
        outputs = {name: t for name, t in (("y", y), ("hn", hn), ("cn", cn)) if name in self.used}
        states = dict(zip(("dh0", "dc0"), (dh0, dc0), strict=True)) if inputs["states"] else {}
        found = {"dx": dx, **states, **{f"dweights[{i}]": w for i, w in enumerate(dweights)}}
        return {name: t for name, t in (outputs | found).items() if t is not None}

    def run(self, function: Any, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
        """The outputs that are used, and what their random gradients make of every input."""

        def leaf(t: Tensor) -> Tensor:
            return (
                torch.empty_strided(t.shape, t.stride(), dtype=dtype, device=t.device)
                .copy_(t)
                .requires_grad_()
            )

        x, states, weights = leaf(inputs["x"]), *([leaf(t) for t in inputs[k]] for k in ("states", "weights"))
        m = None if inputs["zoneout"] is None else inputs["zoneout"].to(dtype)
        hx = self.hx(states)
        y, hidden = function(x, hx, weights, self.mode, inputs["batch_sizes"], m)
        hidden = hidden if isinstance(hidden, tuple) else (hidden,)
        outputs = {n: t for n, t in zip(("y", "hn", "cn"), (y, *hidden), strict=False) if n in self.used}
        upstream = [inputs["upstream"][name].to(dtype) for name in outputs]
        names = ["dx", *("dh0", "dc0")[: len(states)], *(f"dweights[{i}]" for i in range(len(weights)))]
        found = torch.autograd.grad(list(outputs.values()), [x, *states, *weights], upstream)
        return {**outputs, **dict(zip(names, found, strict=True))}


def by_stock(x: Tensor, hx: Any, weights: Any, *rest: Any) -> tuple[Tensor, Any]:
    y, hn, cn = stock.recurrent(bind(x, hx, weights, *rest))
    return (y, hn) if cn is None else (y, (hn, cn))


def judge(backend: str, case: Case, seed: int = 0) -> None:
    """Every output and gradient by the parity rule."""
    inputs = case.inputs(device_of(backend), seed)
    stocks = [partial(case.run, by_stock, inputs, case.dtype)]
    if case.zoneout:  # which torch has not: stock is then the reference, all wide, by torch's autograd
        stocks.append(partial(case.by_reference, inputs))
    yardstick = Yardstick(case.run(by_stock, inputs, torch.float64), *stocks)
    poisoned_empty_memory()
    with run_backend("recurrent", backend):
        ours = case.run(recurrent, inputs, case.dtype)
    assert_parity("recurrent", backend, ours, yardstick, f"judge({backend!r}, {case}, {seed}):")
    RECORD.passed("recurrent", backend, case.features())


# ---- parity ----------------------------------------------------------------------------------------

FORMS: list[dict[str, Any]] = [
    {},
    {"packed": True, "directions": 2, "zoneout": "mask"},
    {"directions": 2, "biases": False, "state": False},
    {"packed": True, "zoneout": "rate", "biases": False},
    {"directions": 2, "zoneout": "rate", "strided": True},
    {"packed": True, "state": False},
]
SMALL = (3, 2, 3, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity(backend: str, dtype: torch.dtype) -> None:
    for i, mode in enumerate(MODES):
        if backend in SLOW:  # every form once
            for form in FORMS[i % 3 :: 3]:
                judge(backend, Case(mode, dtype, SMALL, **form))
        else:
            for form in FORMS:
                judge(backend, Case(mode, dtype, (5, 4, 9, 12), **form))


SIZES = [
    (1, 1, 1, 1),
    (1, 5, 3, 7),
    (7, 1, 9, 33),
    (3, 17, 2, 65),
    (2, 70, 4, 8),
    (9, 3, 1, 1),
    (3, 9, 40, 130),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_sizes(backend: str) -> None:
    """A single step, one sequence, one unit, and more than a tile of each."""
    for i, sizes in enumerate(SIZES):
        if backend in SLOW and i not in (0, 2, 5):
            continue
        form = {"packed": i % 2 == 1, "directions": 1 + (i % 3 == 1)}
        for mode in MODES if backend not in SLOW else MODES[i % 2 : 3 : 2]:
            judge(backend, Case(mode, DTYPES[i % 3], sizes, **form))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_some_outputs_are_used(backend: str) -> None:
    for mode, used in (("LSTM", ("cn",)), ("GRU", ("hn",)), ("LSTM", ("hn",)), ("LSTM", ("cn", "y"))):
        judge(backend, Case(mode, torch.float32, SMALL, directions=2, packed=True, used=used))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", [name for name in KERNEL_BACKENDS if name not in SLOW])
def test_a_thousand_steps(backend: str, mode: str) -> None:
    """Errors do not add up to more than stock's. Of fewer columns torch would add a product in one sum."""
    for dtype in DTYPES[:2]:
        judge(backend, Case(mode, dtype, (1000, 2, 32, 32), state=False))


SEEDS = {"cpu": 300, "torch": 15, "cuda": 60, "triton": 4, "simt": 4}


def random_case(seed: int, small: bool) -> Case:
    draw = random.Random(seed)
    tops = (4, 3, 5, 9) if small else (12, 20, 30, 70)
    sizes = tuple(draw.choice((1, 2, draw.randint(1, top))) for top in tops)
    return Case(
        draw.choice(MODES),
        draw.choice(DTYPES),
        sizes,  # type: ignore[arg-type]
        directions=draw.choice((1, 2)),
        packed=draw.random() < 0.5,
        biases=draw.random() < 0.7,
        state=draw.random() < 0.7,
        zoneout=draw.choice(("", "", "mask", "rate")),
        used=draw.choice((("y",), ("y", "hn"), ("y", "hn", "cn"))),
        strided=draw.random() < 0.2,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_fuzz(backend: str) -> None:
    """A failing draw prints the line that judges it again."""
    for seed in range(FUZZ_FROM, FUZZ_FROM + SEEDS[backend]):
        judge(backend, random_case(seed, backend in SLOW), seed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_do_not_see_each_other(backend: str) -> None:
    """Every sequence alone gives what it gives in the pack, and equal lengths what no packing gives."""
    for mode, D in (("LSTM", 2), ("GRU", 1)):
        case = Case(mode, torch.float32, (4, 3, 3, 4), directions=D, packed=True, state=False)
        inputs = case.inputs(device_of(backend))
        x, weights, sizes = inputs["x"], inputs["weights"], inputs["batch_sizes"]
        starts = sizes.cumsum(0) - sizes
        with run_backend("recurrent", backend):
            y, _ = recurrent(x, None, weights, mode, sizes)
            for b in range(int(sizes[0])):
                rows = starts[sizes > b] + b
                alone, _ = recurrent(x[rows].unsqueeze(1), None, weights, mode)
                torch.testing.assert_close(alone.squeeze(1), y[rows])


@pytest.mark.parametrize("backend", BACKENDS)
def test_saturated_gates(backend: str) -> None:
    for mode in ("LSTM", "GRU", "RNN_TANH"):
        case = Case(mode, torch.float16, SMALL)
        inputs = case.inputs(device_of(backend))
        inputs["x"] = inputs["x"] * 1e3
        with run_backend("recurrent", backend):
            found = case.run(recurrent, inputs, case.dtype)
        assert all(t.isfinite().all() for t in found.values())


# ---- autograd and compilation ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_changes_nothing(backend: str, mode: str) -> None:
    """Twice through a retained graph gives the same bits, and what was saved stays as it was."""
    case = Case(mode, torch.float32, SMALL, directions=2, zoneout="mask")
    inputs, saved = case.inputs(device_of(backend)), []
    x, weights = inputs["x"].requires_grad_(), [w.requires_grad_() for w in inputs["weights"]]
    hx = tuple(inputs["states"]) if mode == "LSTM" else inputs["states"][0]

    def keep(t: Tensor) -> Tensor:
        saved.append((t, t.detach().clone()))
        return t

    with run_backend("recurrent", backend), saved_tensors_hooks(keep, lambda t: t):
        y, _ = recurrent(x, hx, weights, mode, None, inputs["zoneout"])
        first, second = (torch.autograd.grad(y.sum(), (x, *weights), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(t, before) for t, before in saved)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_what_is_saved(backend: str) -> None:
    """Beside inputs and y an LSTM keeps gates and cells, a GRU gates and b_hn's sum, an RNN its output."""
    for mode, extra in (("LSTM", 4 + 1), ("GRU", 3 + 1), ("RNN_TANH", 1)):
        case = Case(mode, torch.float32, (3, 2, 3, 40), biases=False, state=False)
        inputs, sizes = case.inputs(device_of(backend)), []

        def keep(t: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(t.numel())
            return t

        x = inputs["x"].requires_grad_()
        with run_backend("recurrent", backend), saved_tensors_hooks(keep, lambda t: t):
            recurrent(x, None, inputs["weights"], mode)
        given = sum(t.numel() for t in (x, *inputs["weights"])) + (1 + (mode == "LSTM")) * 2 * 40
        assert sum(sizes) - given == (1 + extra) * 3 * 2 * 40


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_wanted_gradients(backend: str) -> None:
    case = Case("GRU", torch.float32, SMALL)
    inputs = case.inputs(device_of(backend))
    given = [inputs["x"], *inputs["states"], *inputs["weights"]]
    full = None
    for wanted in ((0, 1, 2, 3, 4, 5), (0,), (1,), (3,), (5,)):
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(given)]
        with run_backend("recurrent", backend):
            recurrent(leaves[0], leaves[1], leaves[2:], "GRU")[0].sum().backward()
        found = [t.grad for t in leaves]
        full = full or found
        for i, (got, want) in enumerate(zip(found, full, strict=True)):
            assert (got is None) == (i not in wanted)
            assert got is None or torch.allclose(got, want)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_gradients_of_gradients(backend: str) -> None:
    case = Case("LSTM", torch.float32, SMALL, packed=True, state=False)
    inputs = case.inputs(device_of(backend))
    results = []
    for function in (recurrent, by_stock):
        leaves = [t.detach().requires_grad_() for t in (inputs["x"], *inputs["weights"])]
        with run_backend("recurrent", backend):
            y, (_, cn) = function(leaves[0], None, leaves[1:], "LSTM", inputs["batch_sizes"])
            (dx,) = torch.autograd.grad(y.square().sum() + cn.sum(), leaves[0], create_graph=True)
            results.append(torch.autograd.grad(dx.square().sum(), leaves[1:]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_of_the_reference(mode: str) -> None:
    """The backward's formulas, in both directions of a pack, with zoneout and without."""
    for zoneout, directions in (("", 1), ("mask", 2)):
        case = Case(mode, torch.float64, (3, 2, 2, 2), directions, packed=True, zoneout=zoneout)
        inputs = case.inputs(torch.device("cpu"))
        leaves = [t.requires_grad_() for t in (inputs["x"], *inputs["states"], *inputs["weights"])]
        count = len(inputs["states"])
        rest = inputs["batch_sizes"], inputs["zoneout"], mode, True

        def function(x: Tensor, *t: Tensor, count: int = count, rest: Any = rest) -> list[Tensor]:
            h0, c0 = (*t[:count], None)[:2]
            outputs = torch.ops.bigkern.recurrent(x, h0, c0, list(t[count:]), *rest)[:3]
            return [t for t in outputs if t is not None]

        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_states_before() -> None:
    y, h0, sizes = (
        torch.arange(6.0).view(6, 1),
        torch.tensor([[10.0], [11.0], [12.0]]),
        torch.tensor([3, 2, 1]),
    )
    before = [
        reference.previous_states(y, h0, sizes, reverse).flatten().tolist() for reverse in (False, True)
    ]
    assert before == [[10.0, 11.0, 12.0, 0.0, 1.0, 3.0], [3.0, 4.0, 12.0, 5.0, 11.0, 10.0]]
    equal = torch.tensor([3, 3])
    for reverse in (False, True):
        ours = reference.previous_states(y, h0, None, reverse)
        assert torch.equal(ours, reference.previous_states(y, h0, equal, reverse))


@pytest.mark.parametrize("backend", [name for name in KERNEL_BACKENDS if name in ("cpu", "cuda")])
def test_the_same_bits_on_any_number_of_threads(backend: str) -> None:
    case = Case("LSTM", torch.float32, (5, 37, 16, 48), directions=2)
    inputs, found = case.inputs(device_of(backend)), []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        with run_backend("recurrent", backend):
            found.append(case.run(recurrent, inputs, case.dtype))
    scan = ("y", "hn", "cn", "dh0", "dc0")  # the others are products, torch's own
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in scan)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    forms: list[tuple[str, dict[str, Any]]] = [
        ("GRU", {"packed": True, "directions": 2, "zoneout": "mask"}),
        ("LSTM", {"biases": False}),
        ("RNN_TANH", {}),
    ]
    for mode, form in forms[: 1 if backend in SLOW else 3]:
        case = Case(mode, torch.float32, (2, 2, 2, 3), **form)
        inputs = case.inputs(device_of(backend))
        x, weights = inputs["x"].requires_grad_(), [w.requires_grad_() for w in inputs["weights"]]
        hx = tuple(inputs["states"]) if mode == "LSTM" else inputs["states"][0]
        arguments = bind(x, hx, weights, mode, inputs["batch_sizes"], inputs["zoneout"]).flat()
        with run_backend("recurrent", backend):
            torch.library.opcheck(torch.ops.bigkern.recurrent.default, arguments)
            given = x.detach(), *arguments[1:3], [w.detach() for w in weights], *arguments[4:6]
            y, hn, _, gates, reserve = torch.ops.bigkern.recurrent(*given, mode, True)
            arguments = torch.ones_like(y), torch.ones_like(hn), None, *given, y, gates, reserve, mode
            backward, utilities = (
                torch.ops.bigkern.recurrent_backward.default,
                ("test_schema", "test_faketensor"),
            )
            for wanted in ((True, True), (True, False)):
                torch.library.opcheck(backward, (*arguments, *wanted), test_utils=utilities)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_without_recompiles(backend: str) -> None:
    """A pack of any lengths, and any number of steps and sequences."""
    weights = [
        w.requires_grad_() for w in Case("GRU", torch.float32, SMALL).inputs(device_of(backend))["weights"]
    ]
    torch._dynamo.reset()

    def function(x: Tensor, h0: Tensor, sizes: Tensor) -> Tensor:
        y, hn = recurrent(x, h0, weights, "GRU", sizes)
        return y.square().sum() + hn.sum()

    with run_backend("recurrent", backend), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for lengths in ([3, 2, 2], [3, 3, 1], [4, 3, 2, 1]):
            sizes = torch.tensor(lengths)
            x = torch.randn(sum(lengths), 3, device=weights[0].device)
            h0 = torch.randn(1, lengths[0], 4, device=x.device)
            for t, dim in ((x, 0), (h0, 1), (sizes, 0)):
                torch._dynamo.mark_dynamic(t, dim)
            ours = torch.autograd.grad(compiled(x, h0, sizes), weights)
            theirs = torch.autograd.grad(function(x, h0, sizes), weights)
            torch.testing.assert_close(ours, theirs)


def test_a_compiled_lstm_trains_where_stock_would_run() -> None:
    """torch 2.13 compiles the forward of its own on a CPU, and fails in what it saves for the backward."""
    weights, x = torch.nn.LSTM(3, 4)._flat_weights, torch.randn(1, 2, 3)

    def function(x: Tensor) -> Tensor:
        return recurrent(x, None, weights)[0].square().sum()

    assert bigkern.explain("recurrent", x, None, weights).chosen == "torch"
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(f(x), weights) for f in (compiled, function))
    torch.testing.assert_close(ours, theirs)


# ---- what runs where, and errors ---------------------------------------------------------------------


def test_which_calls_stock_runs() -> None:
    def reasons(case: Case, **change: Any) -> str:
        inputs = case.inputs(torch.device("cpu"))
        hx = tuple(inputs["states"]) if case.mode == "LSTM" else inputs["states"][0]
        arguments = {"x": inputs["x"], "hx": hx, "weights": inputs["weights"], "mode": case.mode, **change}
        return str(bigkern.explain("recurrent", *arguments.values()))

    assert "below 4 steps" in reasons(Case("GRU", sizes=(1, 2, 3, 4)))
    assert "float64" in reasons(Case("GRU", torch.float64))
    assert "empty" in reasons(Case("GRU"), x=torch.randn(4, 0, 5), hx=torch.randn(1, 0, 6))
    with torch.autocast("cpu"):
        assert "autocast" in reasons(Case("LSTM"))
    layer = torch.nn.LSTM(5, 6, proj_size=2)
    states = torch.randn(1, 3, 2), torch.randn(1, 3, 6)
    x = torch.randn(4, 3, 5)
    assert "w_hr" in reasons(Case("LSTM"), hx=states, weights=layer._flat_weights)
    for ours, theirs in zip(
        flat(recurrent(x, states, layer._flat_weights)), flat(layer(x, states)), strict=True
    ):
        assert torch.equal(ours, theirs)


def flat(result: tuple[Tensor, Any]) -> list[Tensor]:
    y, hidden = result
    return [y, *(hidden if isinstance(hidden, tuple) else (hidden,))]


def test_autocast_is_torchs() -> None:
    layer, x = torch.nn.GRU(5, 6), torch.randn(4, 3, 5)
    with torch.autocast("cpu"):
        ours, theirs = recurrent(x, None, layer._flat_weights, "GRU")[0], layer(x)[0]
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


def test_transforms_of_torch_func() -> None:
    layer, x = torch.nn.RNN(3, 4), torch.randn(5, 2, 3)
    for zoneout in (None, torch.full((5, 2, 4), 0.25)):

        def total(x: Tensor, zoneout: Any = zoneout) -> Tensor:
            return recurrent(x, None, layer._flat_weights, "RNN_TANH", None, zoneout)[0].square().sum()

        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(torch.func.grad(total)(x), *torch.autograd.grad(total(leaf), leaf))


def test_weights_that_do_not_fit_on_chip() -> None:
    """The emulated GPU has four multiprocessors of 227 KiB."""
    weights = [torch.zeros(4 * 256, 4), torch.zeros(4 * 256, 256)]
    refused = pytest.raises(bigkern.BackendRefused, match="256 hidden units do not fit")
    with run_backend("recurrent", "simt"), refused:
        recurrent(torch.zeros(1, 1, 4), None, weights)


def test_empty_batches() -> None:
    layer = torch.nn.GRU(3, 4)
    with bigkern.use(recurrent="torch"):
        y, hn = recurrent(torch.randn(5, 0, 3), None, layer._flat_weights, "GRU", None, torch.zeros(0, 4))
    assert y.shape == (5, 0, 4)
    assert hn.shape == (1, 0, 4)


X, W = torch.randn(5, 3, 4), [torch.randn(8, 4), torch.randn(8, 2), torch.randn(8), torch.randn(8)]
H0 = torch.randn(1, 3, 2)
BAD = [
    ("x must be a Tensor", TypeError, {"x": [1.0]}),
    ("x must be floating", TypeError, {"x": torch.ones(5, 3, 4, dtype=torch.long)}),
    ("does not match weight dtype", ValueError, {"x": X.double()}),
    ("input must have 3 dimensions, got 2", RuntimeError, {"x": X[0]}),
    ("input must have 2 dimensions, got 3", RuntimeError, {"batch_sizes": torch.tensor([3, 2])}),
    ("sequence length to be larger than 0", RuntimeError, {"x": X[:0]}),
    ("equal to input_size. Expected 4, got 3", RuntimeError, {"x": X[..., :3]}),
    ("Unrecognized RNN mode: GRUU", ValueError, {"mode": "GRUU"}),
    ("hx must be \\(h0, c0\\) for LSTM, not Tensor", TypeError, {"hx": H0}),
    ("hx\\[1\\] must be a Tensor, not NoneType", TypeError, {"hx": (H0, None)}),
    ("Expected hidden\\[0\\] size \\(1, 3, 2\\), got \\[1, 2, 2\\]", RuntimeError, {"hx": (H0[:, :2], H0)}),
    ("Expected hidden\\[1\\] size \\(1, 3, 2\\), got \\[3, 2\\]", RuntimeError, {"hx": (H0, H0[0])}),
    ("hx\\[0\\] must be on", ValueError, {"hx": (H0.to("meta"), H0)}),
    ("weights\\[0\\] must be a Tensor", TypeError, {"weights": [1.0, *W[1:]]}),
    ("weights must be w_ih, w_hh", ValueError, {"weights": W[:1]}),
    ("weights\\[1\\] must have shape \\(8, 2\\)", RuntimeError, {"weights": [W[0], W[0], *W[2:]]}),
    ("weights\\[3\\] must have shape", RuntimeError, {"weights": [*W[:3], W[3][:6]]}),
    ("must have 3 \\* hidden_size rows for GRU, not 8", RuntimeError, {"mode": "GRU", "hx": H0}),
    ("batch_sizes must be an int64 Tensor", TypeError, {"x": X[0], "batch_sizes": [3]}),
    ("batch_sizes must be an int64 Tensor", TypeError, {"x": X[0], "batch_sizes": torch.ones(3)}),
    (
        "batch_sizes should always be on CPU",
        ValueError,
        {"x": X[0], "batch_sizes": torch.ones(3, dtype=torch.long, device="meta")},
    ),
    ("batch_sizes must be of shape", RuntimeError, {"x": X[0], "batch_sizes": torch.tensor(3)}),
    ("never rise, not \\[1, 2\\]", ValueError, {"x": X[0], "batch_sizes": torch.tensor([1, 2])}),
    ("must be positive", ValueError, {"x": X[0], "batch_sizes": torch.tensor([3, 0])}),
    ("add up to x's 3 rows, not 4", ValueError, {"x": X[0], "batch_sizes": torch.tensor([2, 2])}),
    ("zoneout must be a Tensor", TypeError, {"zoneout": 0.5}),
    ("zoneout must have x's dtype", TypeError, {"zoneout": torch.ones(5, 3, 2).bool()}),
    (
        "zoneout must have the output's shape \\(5, 3, 2\\), not \\(5, 3\\)",
        RuntimeError,
        {"zoneout": torch.ones(5, 3)},
    ),
]


@pytest.mark.parametrize(("message", "error", "change"), BAD)
def test_bad_arguments(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"x": X, "hx": None, "weights": W, "mode": "LSTM", **change}
    with pytest.raises(error, match=message):
        recurrent(**arguments)


def test_a_projection_is_an_lstms() -> None:
    weights = [torch.randn(6, 4), torch.randn(6, 1), torch.randn(1, 2)]
    with pytest.raises(ValueError, match="only an LSTM"):
        recurrent(X, None, weights, "GRU")
    weights = [torch.randn(8, 4), torch.randn(8, 1), torch.randn(1, 2)]
    assert recurrent(X, None, weights)[0].shape == (5, 3, 1)
    with pytest.raises(ValueError, match="zoneout must be None"):
        recurrent(X, None, weights, zoneout=torch.zeros(5, 3, 1))


# ---- LayerNorm in the scan ---------------------------------------------------------------------------


def test_layer_norm_scan() -> None:
    """Against the paper's equations, step by step; packed, every sequence is as if alone."""
    norm, H, draws = torch.nn.functional.layer_norm, 3, torch.float64
    gates, h0, c0 = torch.randn(4, 4 * H, dtype=draws), *torch.randn(2, 1, 1, H, dtype=draws)
    w, gamma, beta = torch.randn(4 * H, H, dtype=draws), *torch.randn(2, 4 * H, dtype=draws)
    cell = torch.randn(2, H, dtype=draws)
    lists = [w], [gamma], [beta], [cell[0]], [cell[1]]
    y, hn, cn = reference.layer_norm_scan(gates, h0, c0, *lists, None, None, "LSTM")
    h, c = h0[0], c0[0]
    for t in range(4):
        i, f, g, o = (gates[t : t + 1] + norm(h @ w.t(), (4 * H,), gamma, beta)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * norm(c, (H,), *cell).tanh()
        torch.testing.assert_close(y[t : t + 1], h)
    torch.testing.assert_close((hn[0], cn[0]), (h, c))


def test_layer_norm_scan_of_a_gru() -> None:
    """n is normalised apart from r and z, and a pack holds sequences that do not meet."""
    norm, H, draws = torch.nn.functional.layer_norm, 3, torch.float64
    gates, h0 = torch.randn(4, 2 * 3 * H, dtype=draws), torch.randn(2, 2, H, dtype=draws)
    w, gamma, sizes = (
        torch.randn(2, 3 * H, H, dtype=draws),
        torch.randn(2, 3 * H, dtype=draws),
        torch.tensor([2, 2]),
    )
    lists: list[Any] = [list(w), list(gamma), None, None, None]
    y, _, cn = reference.layer_norm_scan(gates, h0, None, *lists, sizes, None, "GRU")
    assert cn is None
    hidden = h0[0] @ w[0].t()
    hidden = torch.cat([norm(hidden[:, :6], (6,), gamma[0, :6]), norm(hidden[:, 6:], (3,), gamma[0, 6:])], 1)
    x_r, x_z, x_n = gates[:2, :9].chunk(3, 1)
    h_r, h_z, h_n = hidden.chunk(3, 1)
    z, n = (x_z + h_z).sigmoid(), (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
    torch.testing.assert_close(y[:2, :3], (1 - z) * n + z * h0[0])
    alone, _, _ = reference.layer_norm_scan(gates[::2], h0[:, :1], None, *lists, None, None, "GRU")
    torch.testing.assert_close(y[::2], alone)


@pytest.mark.parametrize("mode", MODES)
def test_a_state_of_another_dtype_than_x_is_named(mode: str) -> None:
    x, weights = torch.randn(4, 2, 3), [torch.randn(GATES[mode] * 5, n) for n in (3, 5)]
    h = torch.zeros(1, 2, 5, dtype=torch.float64)
    hx = (h.float(), h) if mode == "LSTM" else h
    with pytest.raises(TypeError, match=r"^hx(\[1\])? must have x's dtype torch.float32, not torch.float64"):
        recurrent(x, hx, weights, mode)
