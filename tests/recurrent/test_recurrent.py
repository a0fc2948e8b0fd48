"""A layer of an LSTM, a GRU or an RNN beyond test_parity.py: long ones, packs, and what surrounds the op."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import parity
import pytest
import torch
from parity import BACKENDS, KERNEL_BACKENDS, check, device_of, run_backend
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import bigkern
from bigkern.core.problem import Problem, results
from bigkern.ops.recurrent import recurrent, reference, stock
from bigkern.ops.recurrent.call import GATES, bind
from bigkern.ops.recurrent.problems import form

MODES = list(GATES)
SLOW = ("triton", "simt") if not parity.GPU else ()  # the interpreter and the emulator
SMALL = (3, 2, 3, 4)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:LSTM with projections"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # of saturated gates, in numpy
]


def inputs_of(problem: Problem, backend: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """x, states, weights, batch_sizes and zoneout, and hx of the states."""
    made = {name: t.detach() for name, t in problem.make(dtype, device_of(backend)).items()}
    (x, hx, weights, _), options = problem.arguments(made)
    states = [] if hx is None else list(hx) if isinstance(hx, tuple) else [hx]
    return {"x": x, "hx": hx, "states": states, "weights": weights, **options}


def by_stock(x: Tensor, hx: Any, weights: Any, *rest: Any) -> tuple[Tensor, Any]:
    y, hn, cn = stock.recurrent(bind(x, hx, weights, *rest))
    return (y, hn) if cn is None else (y, (hn, cn))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", [name for name in KERNEL_BACKENDS if name not in SLOW])
def test_a_thousand_steps(backend: str, mode: str) -> None:
    """Errors do not add up to more than stock's. Of fewer columns torch would add a product in one sum."""
    for dtype in (torch.float32, torch.bfloat16):
        check(form(mode, 1000, 2, 32, 32, state=False), backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_do_not_see_each_other(backend: str) -> None:
    """Every sequence alone gives what it gives in the pack, and equal lengths what no packing gives."""
    for mode, D in (("LSTM", 2), ("GRU", 1)):
        inputs = inputs_of(form(mode, 4, 3, 3, 4, packed=True, directions=D, state=False), backend)
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
        problem = form(mode, *SMALL)
        problem = replace(problem, values=lambda drawn: drawn | {"x": 1e3 * drawn["x"]})
        inputs = problem.make(torch.float16, device_of(backend))
        with run_backend("recurrent", backend):
            found = results(problem.ours, inputs, problem.outputs)
        assert all(t.isfinite().all() for t in found.values())


# ---- autograd and compilation ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_changes_nothing(backend: str, mode: str) -> None:
    """Twice through a retained graph gives the same bits, and what was saved stays as it was."""
    inputs, saved = inputs_of(form(mode, *SMALL, directions=2, zoneout="mask"), backend), []
    x, weights = inputs["x"].requires_grad_(), [w.requires_grad_() for w in inputs["weights"]]

    def keep(t: Tensor) -> Tensor:
        saved.append((t, t.detach().clone()))
        return t

    with run_backend("recurrent", backend), saved_tensors_hooks(keep, lambda t: t):
        y, _ = recurrent(x, inputs["hx"], weights, mode, None, inputs["zoneout"])
        first, second = (torch.autograd.grad(y.sum(), (x, *weights), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(t, before) for t, before in saved)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_what_is_saved(backend: str) -> None:
    """Beside inputs and y an LSTM keeps gates and cells, a GRU gates and b_hn's sum, an RNN its output."""
    for mode, extra in (("LSTM", 4 + 1), ("GRU", 3 + 1), ("RNN_TANH", 1)):
        inputs, sizes = inputs_of(form(mode, 3, 2, 3, 40, biases=False, state=False), backend), []

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
    inputs = inputs_of(form("GRU", *SMALL), backend)
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
    inputs = inputs_of(form("LSTM", *SMALL, packed=True, state=False), backend)
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
        problem = form(mode, 3, 2, 2, 2, packed=True, directions=directions, zoneout=zoneout)
        inputs = inputs_of(problem, "cpu", torch.float64)
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
    problem, found = form("LSTM", 5, 37, 16, 48, directions=2), []
    inputs = problem.make(torch.float32, device_of(backend))
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        with run_backend("recurrent", backend):
            found.append(results(problem.ours, inputs, problem.outputs))
    scan = ("output", "hn", "cn", "dh0", "dc0")  # the others are products, torch's own
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in scan)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    forms: list[tuple[str, dict[str, Any]]] = [
        ("GRU", {"packed": True, "directions": 2, "zoneout": "mask"}),
        ("LSTM", {"biases": False}),
        ("RNN_TANH", {}),
    ]
    for mode, options in forms[: 1 if backend in SLOW else 3]:
        inputs = inputs_of(form(mode, 2, 2, 2, 3, **options), backend)
        x, weights = inputs["x"].requires_grad_(), [w.requires_grad_() for w in inputs["weights"]]
        arguments = bind(x, inputs["hx"], weights, mode, inputs["batch_sizes"], inputs["zoneout"]).flat()
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
    weights = [w.requires_grad_() for w in inputs_of(form("GRU", *SMALL), backend)["weights"]]
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
    def reasons(problem: Problem, dtype: torch.dtype = torch.float32, **change: Any) -> str:
        inputs = inputs_of(problem, "cpu", dtype)
        mode = problem.label.split()[0]
        arguments = {
            "x": inputs["x"],
            "hx": inputs["hx"],
            "weights": inputs["weights"],
            "mode": mode,
            **change,
        }
        return str(bigkern.explain("recurrent", *arguments.values()))

    assert "below 4 steps" in reasons(form("GRU", 1, 2, 3, 4))
    assert "float64" in reasons(form("GRU", 4, 3, 5, 6), torch.float64)
    assert "empty" in reasons(form("GRU", 4, 3, 5, 6), x=torch.randn(4, 0, 5), hx=torch.randn(1, 0, 6))
    with torch.autocast("cpu"):
        assert "autocast" in reasons(form("LSTM", 4, 3, 5, 6))
    layer = torch.nn.LSTM(5, 6, proj_size=2)
    states = torch.randn(1, 3, 2), torch.randn(1, 3, 6)
    x = torch.randn(4, 3, 5)
    assert "w_hr" in reasons(form("LSTM", 4, 3, 5, 6), hx=states, weights=layer._flat_weights)
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
