"""LSTM, GRU, RNN and their cells against torch's own; what is beyond torch's against a loop over steps."""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from parity import BACKENDS, run_backend
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.utils._pytree import tree_leaves, tree_map

import bigkern
from bigkern.nn.recurrent_base import RecurrentBase

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]

KINDS = ["LSTM", "GRU", "RNN"]
CELLS = ["LSTMCell", "GRUCell", "RNNCell"]
T, B, I, H = 7, 3, 5, 6

kinds = pytest.mark.parametrize("kind", KINDS)
native = pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("torch", "cpu")])


@contextlib.contextmanager
def loop(backend: str) -> Iterator[None]:
    """Our loop over the layers on a backend of the op, even on stock, which is given torch's whole stack."""
    stack = mock.patch.object(RecurrentBase, "_is_stocks", return_value=False)
    with stack, run_backend("recurrent", backend):
        yield


def twins(kind: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """torch's layer and ours with the same weights, the state dict loaded across and back."""
    stock, ours = (getattr(module, kind)(*args, **kwargs) for module in (nn, bigkern.nn))
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    return stock, ours


def state(kind: str, *shape: int, dtype: torch.dtype = torch.float32) -> Any:
    h, c = torch.randn(2, *shape).to(dtype)
    return (h, c) if kind.startswith("LSTM") else h


def packed(lengths: list[int], enforce_sorted: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    return pack_sequence([torch.randn(n, I).to(dtype) for n in lengths], enforce_sorted)


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]


def run(layer: nn.Module, *inputs: Any) -> tuple[Any, list[Tensor | None]]:
    """The output, and the gradients of the inputs and of the parameters."""
    fresh = tree_map(
        lambda x: (
            x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        ),
        inputs,
    )
    out = layer(*fresh)
    torch.manual_seed(1)
    found = tensors(out)
    weights = [torch.randn(x.shape).to(x.dtype) for x in found]
    wanted = [*tensors(fresh), *layer.parameters()]
    return out, list(torch.autograd.grad(found, wanted, weights, allow_unused=True))


def assert_same(ours: Any, stock: Any, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours, stock, rtol=tolerance, atol=tolerance)


# ---- torch's layers --------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"bias": False, "num_layers": 3},
    {"bias": False, "bidirectional": True},
]


@native
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@kinds
def test_batches(kind: str, options: dict[str, Any], backend: str) -> None:
    """Batched and unbatched, with and without a state: outputs and every gradient."""
    stock, ours = twins(kind, I, H, **options)
    rows = stock.num_layers * (2 if stock.bidirectional else 1)
    shape = (B, T, I) if stock.batch_first else (T, B, I)
    for inputs in (
        (torch.randn(shape), state(kind, rows, B, H)),
        (torch.randn(shape),),
        (torch.randn(T, I), state(kind, rows, H)),
    ):
        expected = run(stock, *inputs)
        assert_same(run(ours, *inputs), expected)
        with loop(backend):
            assert_same(run(ours, *inputs), expected)
            with torch.no_grad():
                assert_same(ours(*inputs), expected[0])


@native
@pytest.mark.parametrize("bidirectional", [False, True])
@kinds
def test_packed(kind: str, bidirectional: bool, backend: str) -> None:
    """Sorted, unsorted, and all of one length; the state is in the order of the sequences."""
    stock, ours = twins(kind, I, H, 2, bidirectional=bidirectional)
    hx = state(kind, 4 if bidirectional else 2, B, H)
    for sequences in (packed([5, 3, 1], True), packed([2, 5, 3]), packed([4, 4, 4])):
        for inputs in ((sequences, hx), (sequences,)):
            expected = run(stock, *inputs)
            assert_same(run(ours, *inputs), expected)
            with loop(backend):
                found = run(ours, *inputs)
            assert isinstance(found[0][0], PackedSequence)
            assert_same(found, expected)


@pytest.mark.parametrize("form", ["batch", "packed"])
@kinds
def test_gradients_in_float64(kind: str, form: str) -> None:
    """Our loop to 1e-12; the layer runs twice in one graph."""
    stock, ours = twins(kind, I, H, 2, bidirectional=True, dtype=torch.float64)
    x = packed([2, 5, 3], dtype=torch.float64) if form == "packed" else torch.randn(T, B, I).double()
    hx = state(kind, 4, B, H, dtype=torch.float64)

    class Twice(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Any, hx: Any) -> Any:
            _, carried = self.layer(x, hx)
            return self.layer(x, carried)

    expected = run(Twice(stock), x, hx)
    with loop("torch"):
        assert_same(run(Twice(ours), x, hx), expected, 1e-12)


@kinds
def test_dropout_between_layers(kind: str) -> None:
    """The numbers that torch would draw; none in eval; at 1 nothing but biases reaches the second layer."""
    stock, ours = twins(kind, I, H, 3, dropout=0.4)
    x = torch.randn(T, B, I)
    with loop("torch"):
        torch.manual_seed(3)
        expected = run(stock, x)
        torch.manual_seed(3)
        assert_same(run(ours, x), expected)
        assert_same(ours.eval()(x), stock.eval()(x))
        deaf = getattr(bigkern.nn, kind)(I, H, 2, dropout=1.0)
        assert_same(deaf(x)[0], deaf(torch.randn(T, B, I))[0])


def test_projections() -> None:
    """torch's own code, of the whole stack or, with dropped weights, of a layer; no kernel takes them."""
    stock, ours = twins("LSTM", I, H, 2, proj_size=4, bidirectional=True)
    inputs = torch.randn(T, B, I), (torch.randn(4, B, 4), torch.randn(4, B, H))
    expected = run(stock, *inputs)
    assert_same(run(ours, *inputs), expected)
    with loop("torch"):
        assert_same(run(ours, *inputs), expected)
    with run_backend("recurrent", "cpu"), pytest.raises(bigkern.BackendRefused, match="proj"):
        ours(*inputs)
    dropped = bigkern.nn.LSTM(I, H, proj_size=4, recurrent_dropout=0.5)
    assert dropped(torch.randn(T, B, I))[0].shape == (T, B, 4)
    for extra in ({"layer_norm": True}, {"zoneout": 0.1}):
        with pytest.raises(ValueError, match="proj_size must be 0"):
            bigkern.nn.LSTM(I, H, proj_size=4, **extra)


@pytest.mark.parametrize("extra", [{}, {"zoneout": 0.2}, {"layer_norm": True}], ids=str)
@kinds
def test_nothing_to_run(kind: str, extra: dict[str, Any]) -> None:
    """No sequences, and sequences of no steps: torch's shapes, and torch's refusal."""
    stock, ours = getattr(nn, kind)(I, H, 2), getattr(bigkern.nn, kind)(I, H, 2, **extra)
    empty = torch.zeros(T, 0, I)
    shapes = [[x.shape for x in tensors(layer(empty))] for layer in (stock, ours)]
    assert shapes[1] == shapes[0]
    for layer in (stock, ours):
        with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
            layer(torch.zeros(0, B, I))


@kinds
def test_what_sizes_decide_is_not_bound(kind: str) -> None:
    """A call that no kernel wants, as of a single step, costs next to nothing more than torch's own."""
    stock, ours = twins(kind, I, H)
    with mock.patch.object(RecurrentBase, "_is_stocks", side_effect=AssertionError):
        for x in (torch.randn(1, B, I), packed([1, 1, 1])):
            assert_same(ours(x), stock(x), 0.0)
        with pytest.raises(AssertionError):
            ours(torch.randn(2048 // (B * H) + 4, B, I))


@kinds
def test_bfloat16(kind: str) -> None:
    stock, ours = twins(kind, I, H, 2, dtype=torch.bfloat16)
    x = torch.randn(T, B, I, dtype=torch.bfloat16)
    wide = copy.deepcopy(stock).double()(x.double())
    with loop("cpu"):
        found = run(ours, x)
    for mine, theirs, exact in zip(tensors(found[0]), tensors(stock(x)), tensors(wide), strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert (mine - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    assert {g.dtype for g in found[1] if g is not None} == {torch.bfloat16}


@native
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind: str, backend: str) -> None:
    for options in ({}, {"bias": False}, {"nonlinearity": "relu"} if kind == "RNNCell" else {"bias": True}):
        stock, ours = twins(kind, I, H, **options)
        assert repr(ours) == repr(stock)
        for inputs in (
            (torch.randn(B, I), state(kind, B, H)),
            (torch.randn(B, I),),
            (torch.randn(I), state(kind, H)),
        ):
            expected = run(stock, *inputs)
            assert_same(run(ours, *inputs), expected)
            with run_backend("recurrent", backend):
                assert_same(run(ours, *inputs), expected)


# ---- torch's errors --------------------------------------------------------------------------------


def raised(call: Callable[[], Any]) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:
        call()
    return type(caught.value), str(caught.value)


CALLS: dict[str, Callable[[Any, str], Any]] = {
    "input size": lambda m, kind: m(torch.randn(T, B, I + 1)),
    "one dimension": lambda m, kind: m(torch.randn(I)),
    "dtype": lambda m, kind: m(torch.randn(T, B, I).double()),
    "hidden size": lambda m, kind: m(torch.randn(T, B, I), state(kind, 1, B, H + 1)),
    "layers of the state": lambda m, kind: m(torch.randn(T, B, I), state(kind, 2, B, H)),
    "batch of the state": lambda m, kind: m(torch.randn(T, B, I), state(kind, 1, B + 1, H)),
    "state of one sequence": lambda m, kind: m(torch.randn(T, B, I), state(kind, 1, H)),
    "state of a batch": lambda m, kind: m(torch.randn(T, I), state(kind, 1, 1, H)),
    "form of the state": lambda m, kind: m(
        torch.randn(T, B, I), state("GRU" if kind == "LSTM" else "LSTM", 1, B, H)
    ),
    "no tensor": lambda m, kind: m([1.0]),
    "packed unsorted": lambda m, kind: m(pack_padded_sequence(torch.randn(T, B, I), [2, 7, 5])),
}


@pytest.mark.parametrize("case", CALLS)
@kinds
def test_errors_are_torchs(kind: str, case: str) -> None:
    """Whoever runs it, and with something of ours asked."""
    stock, ours = twins(kind, I, H)
    theirs = raised(partial(CALLS[case], stock, kind))
    assert raised(partial(CALLS[case], ours, kind)) == theirs
    with loop("cpu"):
        assert raised(partial(CALLS[case], ours, kind)) == theirs
    ours.zoneout = 0.5
    assert raised(partial(CALLS[case], ours, kind)) == theirs


@kinds
def test_errors_of_packed_batches(kind: str) -> None:
    """torch's types; its LSTM fails within a product, ours says what was expected, as torch's GRU does."""
    stock, ours = twins(kind, I, H)
    calls: list[tuple[Any, ...]] = [
        (packed([2, 5, 3]), state(kind, 1, B, H + 1)),
        (packed([2, 5, 3]), state(kind, 2, B, H)),
        (pack_padded_sequence(torch.randn(T, B, I + 1), [7, 5, 2]),),
    ]
    for inputs in calls:
        theirs, said = raised(partial(stock, *inputs))
        mine = raised(partial(ours, *inputs))
        assert mine[0] is theirs
        assert mine[1] == said or (kind == "LSTM" and "xpected" in mine[1])


@pytest.mark.parametrize("kind", CELLS)
def test_errors_of_cells_are_torchs(kind: str) -> None:
    stock, ours = twins(kind, I, H)
    x = torch.randn(B, I)
    calls: list[tuple[Any, ...]] = [
        (torch.randn(B, I + 1),),
        (torch.randn(1, B, I),),
        (x, state(kind, B, H + 1)),
        (x, state(kind, B + 1, H)),
        (x, state(kind, B, 1, H)),
        (x.double(),),
    ]
    for inputs in calls:
        theirs = raised(partial(stock, *inputs))
        assert raised(partial(ours, *inputs)) == theirs
        with run_backend("recurrent", "cpu"):
            assert raised(partial(ours, *inputs)) == theirs


def test_errors_of_constructors() -> None:
    for kind, args, kwargs in (
        ("LSTM", (I, H), {"proj_size": H}),
        ("GRU", (I, H), {"proj_size": 2}),
        ("RNN", (I, H, 1, "cubic"), {}),
        ("LSTM", (I, 0), {}),
        ("GRU", (I, H, 0), {}),
        ("GRU", (I, H, 2), {"dropout": 1.5}),
        ("RNN", (I, H), {"bias": 1}),
        ("LSTM", (I, H, 1, True, False, 0.0, False, 0, None, None, 0.1), {}),  # ours are by keyword only
    ):
        theirs = raised(partial(getattr(nn, kind), *args, **kwargs))
        assert raised(partial(getattr(bigkern.nn, kind), *args, **kwargs)) == theirs
    for name in ("zoneout", "recurrent_dropout"):
        with pytest.raises(ValueError, match=f"{name} must be a probability in"):
            bigkern.nn.LSTM(I, H, **{name: 1.5})


# ---- what modules go through -----------------------------------------------------------------------


@kinds
def test_positions_and_representation(kind: str) -> None:
    """torch's constructor, by position; repr is torch's where nothing of ours is asked."""
    args: tuple[Any, ...] = (I, H, 2, *(["relu"] if kind == "RNN" else []), False, True, 0.25, True)
    stock, ours = twins(kind, *args)
    assert repr(ours) == repr(stock)
    assert [x.shape for x in ours._flat_weights] == [x.shape for x in stock._flat_weights]
    assert ours.all_weights[0][0] is ours.weight_ih_l0
    extras = getattr(bigkern.nn, kind)(I, H, layer_norm=True, zoneout=0.1, recurrent_dropout=0.2)
    assert repr(extras) == f"{kind}({I}, {H}, layer_norm=True, zoneout=0.1, recurrent_dropout=0.2)"


@kinds
def test_hooks(kind: str) -> None:
    """Before and after forward and backward, and around state dicts; what a hook returns counts."""
    results, layers = [], twins(kind, I, H, 2)
    x = torch.randn(T, B, I)
    for layer in layers:
        seen: list[str] = []
        layer.register_forward_pre_hook(lambda m, i, seen=seen: seen.append("pre") or (2 * i[0],))
        layer.register_forward_hook(lambda m, i, o, seen=seen: seen.append("forward") or (3 * o[0], o[1]))
        layer.register_full_backward_hook(lambda *_, seen=seen: seen.append("backward"))
        layer.register_state_dict_post_hook(lambda m, d, *_, seen=seen: seen.append(f"saved {len(d)}"))
        layer.register_load_state_dict_post_hook(lambda *_, seen=seen: seen.append("loaded"))
        with loop("cpu"):
            results.append((seen, run(layer, x)))
        layer.load_state_dict(layer.state_dict())
    assert results[0][0] == results[1][0]
    assert_same(results[1][1], results[0][1])


@pytest.mark.parametrize("options", [{}, {"layer_norm": True, "zoneout": 0.1}], ids=str)
@kinds
def test_copies(kind: str, options: dict[str, Any]) -> None:
    """Copied, pickled, converted, and without device: the same numbers, and its own flat weights."""
    ours, x = getattr(bigkern.nn, kind)(I, H, 2, **options).eval(), torch.randn(T, B, I)
    expected = ours(x)
    for copied in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        copy.deepcopy(ours).double().float(),
    ):
        assert type(copied) is type(ours)
        assert all(a is b for a, b in zip(copied._flat_weights, tensors(copied.all_weights), strict=True))
        assert_same(copied(x), expected, 0.0)
    with torch.device("meta"):
        empty = getattr(bigkern.nn, kind)(I, H, 2, **options)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    empty.to_empty(device="cpu").load_state_dict(ours.state_dict())
    assert_same(empty.eval()(x), expected, 0.0)
    empty.reset_parameters()
    gains = [p for name, p in empty.named_parameters() if name.startswith("norm_weight")]
    assert len(gains) == (0 if not options else 6 if kind == "LSTM" else 4)
    assert all(bool((p == 1).all()) for p in gains)


@kinds
def test_other_tensors_in_the_parameters_places(kind: str) -> None:
    """Of DataParallel's replicas, of functional calls under transforms, of ties, of parametrizations."""
    stock, ours = twins(kind, H, H, 2)
    x = torch.randn(T, B, H)
    others = {name: 2 * parameter.detach() for name, parameter in stock.named_parameters()}
    replica = ours._replicate_for_data_parallel()
    for name, tensor in others.items():
        setattr(replica, name, tensor)  # as torch.nn.parallel.replicate does
    expected = torch.func.functional_call(stock, others, (x,))
    with loop("cpu"):
        assert_same(replica(x), expected)
        assert_same(torch.func.functional_call(ours, others, (x,)), expected)
    slopes = [
        torch.func.grad(lambda w, m=m: torch.func.functional_call(m, w, (x,))[0].square().sum())(others)
        for m in (stock, ours)
    ]
    assert_same(slopes[1], slopes[0], 1e-4)
    for layer in (stock, ours):
        layer.weight_hh_l1 = layer.weight_hh_l0
        torch.manual_seed(0)
        parametrizations.spectral_norm(layer, "weight_ih_l0")
        layer.eval()
    ours.load_state_dict(stock.state_dict())
    expected = run(stock, x)
    with loop("cpu"):
        assert_same(run(ours, x), expected, 1e-4)
        assert len(list(ours.parameters())) == len(list(stock.parameters())) == 7


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_compiles_whole(kind: str) -> None:
    """One opaque node a layer, once dynamo lets recurrent layers in; without, it runs them as they are."""
    layer = getattr(bigkern.nn, kind)(I, H)
    inputs = (torch.randn(B, I), torch.randn(B, H)) if kind == "GRUCell" else (torch.randn(T, B, I),)
    expected = run(layer, *inputs)
    torch.compiler.reset()
    with torch._dynamo.config.patch(allow_rnn=True), bigkern.use(recurrent="cpu"):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_same(run(compiled, *inputs), expected)
    if kind == "LSTM":
        assert_same(torch.compile(layer, backend="eager")(*inputs), expected[0])


def test_packed_of_no_steps_is_refused_as_torch_does() -> None:
    empty = PackedSequence(torch.zeros(0, I), torch.zeros(0, dtype=torch.int64))
    for module in (torch.nn, bigkern.nn):
        with pytest.raises(IndexError):
            module.LSTM(I, H)(empty)


def test_exports_with_any_batch() -> None:
    layer = bigkern.nn.LSTM(I, H)
    batch = torch.export.Dim("batch", min=2, max=4096)
    exported = torch.export.export(layer, (torch.randn(T, B, I),), dynamic_shapes=({1: batch},))
    x = torch.randn(T, 512, I)
    assert_same(exported.module()(x), layer(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_and_under_autocast() -> None:
    ours, x = bigkern.nn.LSTM(I, H), torch.randn(T, B, I)
    traced = torch.jit.trace(ours, x)
    assert "lstm" in str(traced.inlined_graph)
    assert_same(traced(x), ours(x))
    for kind in KINDS:
        stock, ours = twins(kind, I, H)
        with torch.autocast("cpu", torch.bfloat16):
            try:
                expected = stock(x)
            except RuntimeError as error:  # oneDNN has no such layer for every processor
                with pytest.raises(RuntimeError, match=re.escape(str(error))):
                    ours(x)
            else:
                assert_same(ours(x), expected)
            for extra in ({"layer_norm": True}, {"zoneout": 0.1}, {"recurrent_dropout": 0.1}):
                torch.manual_seed(0)
                layer = getattr(bigkern.nn, kind)(I, H, 2, **extra).eval()
                (y, _), (exact, _) = layer(x.bfloat16()), copy.deepcopy(layer).double()(x.double())
                assert_same(y.double(), exact, 1e-1)
                y.float().sum().backward()


# ---- beyond torch's --------------------------------------------------------------------------------


def norm(x: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], gain, bias)


def one_step(layer: Any, place: str, w_hh: Tensor, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """A step by torch's cells; with LayerNorm by its definition."""
    w_ih, b_ih, b_hh = (getattr(layer, f"{name}_{place}") for name in ("weight_ih", "bias_ih", "bias_hh"))
    kind = layer.mode
    if not layer.layer_norm:
        cell = getattr(torch._VF, f"{kind.lower()}_cell")
        out = cell(x, (h, c) if kind == "LSTM" else h, w_ih, w_hh, b_ih, b_hh)
        return out if kind == "LSTM" else (out, c)
    g_ih, g_hh = (getattr(layer, f"norm_weight_{name}_{place}") for name in ("ih", "hh"))
    if kind == "GRU":
        rows = [slice(0, 2 * H), slice(2 * H, 3 * H)]
        of_x, of_x_n = (norm(x @ w_ih[own].T, g_ih[own]) + b_ih[own] for own in rows)
        of_h, of_h_n = (norm(h @ w_hh[own].T, g_hh[own]) + b_hh[own] for own in rows)
        r, z = (of_x + of_h).sigmoid().chunk(2, -1)
        return torch.lerp((of_x_n + r * of_h_n).tanh(), h, z), c
    gates = norm(x @ w_ih.T, g_ih) + b_ih + norm(h @ w_hh.T, g_hh) + b_hh
    if kind != "LSTM":
        return (gates.tanh() if kind == "RNN_TANH" else gates.relu()), c
    i, f, g, o = gates.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    of_cell = norm(c, getattr(layer, f"norm_weight_c_{place}"), getattr(layer, f"norm_bias_c_{place}"))
    return o.sigmoid() * of_cell.tanh(), c


def by_steps(
    layer: Any, x: Tensor, masks: list[Tensor], dropped: list[list[Tensor]]
) -> tuple[Tensor, Tensor]:
    """The last layer's output and all final h of a batch ``[T, B, I]``, step by step."""
    steps, batch, final = *x.shape[:2], []
    for index in range(layer.num_layers):
        places, outs = layer._places(index), []
        for d, place in enumerate(places):
            w_hh = dropped[index][1 + d * len(dropped[index]) // len(places)]
            h = c = x.new_zeros(batch, H)
            rows: list[Tensor] = [h] * steps
            for t in reversed(range(steps)) if d else range(steps):
                new, c = one_step(layer, place, w_hh, x[t], h, c)
                if masks:
                    kept = masks[index].view(steps, batch, -1)[t, :, d * H : (d + 1) * H]
                    new = (1 - kept) * new + kept * h
                rows[t] = h = new
            final.append(h)
            outs.append(torch.stack(rows))
        x = torch.cat(outs, -1)
    return x, torch.stack(final)


EXTRAS: list[dict[str, Any]] = [
    {"layer_norm": True},
    {"zoneout": 0.3},
    {"recurrent_dropout": 0.4},
    {"layer_norm": True, "zoneout": 0.2, "recurrent_dropout": 0.3},
]


@native
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("extra", EXTRAS, ids=str)
@kinds
def test_extras_by_steps(kind: str, extra: dict[str, Any], training: bool, backend: str) -> None:
    """The same masks in a loop over steps: outputs, final states and every gradient."""
    layer = getattr(bigkern.nn, kind)(I, H, 2, bidirectional=True, **extra).train(training)
    for name, parameter in layer.named_parameters():
        if name.startswith("norm_"):
            nn.init.normal_(parameter, 1.0, 0.2)
    masks, dropped = [], []
    masked, weights_of = layer._zoneout, layer._weights_of
    with (
        mock.patch.object(layer, "_zoneout", lambda x: masks.append(masked(x)) or masks[-1]),
        mock.patch.object(
            layer, "_weights_of", lambda index: dropped.append(weights_of(index)) or dropped[-1]
        ),
        run_backend("recurrent", backend),
    ):
        x = torch.randn(T, B, I, requires_grad=True)
        y, states = layer(x)
    h = states[0] if kind == "LSTM" else states
    masks = [mask for mask in masks if mask is not None]
    if layer.zoneout:
        assert set(masks[0].unique().tolist()) == ({0.0, 1.0} if training else {masks[0][0, 0].item()})
    dropped = dropped[-2:] if len(dropped) > 1 else [layer._weights_of(0), layer._weights_of(1)]
    w_hh, p = dropped[0][1], layer.recurrent_dropout if training else 0.0
    assert bool(((w_hh == 0) | torch.isclose(w_hh, layer.weight_hh_l0 / (1 - p))).all())
    assert bool((w_hh == 0).any()) == (p > 0)
    other, others = by_steps(layer, x, masks, dropped)
    assert_same((y, h), (other, others))
    upstream = torch.randn_like(y), torch.randn_like(h)
    leaves = [x, *layer.parameters()]
    gradients = [
        torch.autograd.grad(out, leaves, upstream, retain_graph=True) for out in ((y, h), (other, others))
    ]
    assert_same(*gradients, 5e-5)


@pytest.mark.parametrize("extra", [{"layer_norm": True}, {"zoneout": 0.3}], ids=str)
@kinds
def test_extras_of_packed_sequences(kind: str, extra: dict[str, Any]) -> None:
    """Each sequence of a packed batch is what it is alone."""
    layer = getattr(bigkern.nn, kind)(I, H, 2, bidirectional=True, **extra).eval()
    sequences = [torch.randn(n, I) for n in (2, 5, 3)]
    hx = state(kind, 4, 3, H)
    y, found = layer(pack_sequence(sequences, enforce_sorted=False), hx)
    for b, own in enumerate(nn.utils.rnn.unpack_sequence(y)):
        alone = layer(sequences[b], tree_map(lambda s, b=b: s[:, b], hx))
        assert_same((own, tree_map(lambda s, b=b: s[:, b], found)), alone)


def test_weights_are_dropped_once_a_call_and_by_chance() -> None:
    """One mask for all steps: with hh weights dropped altogether nothing is carried from step to step."""
    layer, x = bigkern.nn.RNN(I, H, recurrent_dropout=1.0), torch.randn(1, B, I)
    y, _ = layer(x.expand(T, B, I))
    assert_same(y, y[:1].expand_as(y), 1e-6)
    layer.recurrent_dropout = 0.5
    assert not torch.equal(layer(x.expand(T, B, I))[0], layer(x.expand(T, B, I))[0])
    frozen = bigkern.nn.GRU(I, H, zoneout=1.0)
    h = torch.randn(1, B, H)
    assert_same(frozen(torch.randn(T, B, I), h), (h.expand(T, B, H), h))


# ---- patching --------------------------------------------------------------------------------------


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(20, I), nn.LSTM(I, H, 2, batch_first=True)
        self.gru, self.rnn, self.cell = nn.GRU(H, H), nn.RNN(H, H), nn.LSTMCell(H, H)
        self.out = nn.Linear(H, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.lstm(self.embedding(tokens))
        x, _ = self.rnn(self.gru(x)[0])
        return self.out(self.cell(x[0])[0])


def test_patched_model() -> None:
    """The same objects, numbers and gradients; rows that say what runs; and back again."""
    model, tokens = Tagger(), torch.randint(20, (B, T))
    types, parameters = [type(m) for m in model.modules()], list(model.parameters())
    expected = run(model, tokens)
    with bigkern.patch(model, ops=["recurrent"]) as report:
        assert {row.module: row.op for row in report} == dict.fromkeys(
            ("lstm", "gru", "rnn", "cell"), "recurrent"
        )
        assert all(row.backend in ("cpu", "torch") and row.reason for row in report)
        assert type(model.lstm) is bigkern.nn.LSTM
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        assert_same(run(model, tokens), expected)
        with bigkern.use(recurrent="cpu"):
            assert_same(run(model, tokens), expected)
        again = pickle.loads(pickle.dumps(model))
        assert_same(again(tokens), expected[0])
        assert bigkern.unpatch(again) == 4
        assert repr(model) == repr(Tagger())
    assert [type(m) for m in model.modules()] == types
    assert not [key for m in model.modules() for key in m.__dict__ if "bigkern" in key]


def test_what_patch_leaves_alone() -> None:
    class Own(nn.GRU):
        pass

    normed = nn.LSTM(I, H)
    parametrizations.spectral_norm(normed, "weight_hh_l0")
    projected = nn.LSTM(I, H, proj_size=2)
    model = nn.ModuleList([Own(I, H), normed, projected, bigkern.nn.GRU(I, H, zoneout=0.1)])
    report = {row.module: row for row in bigkern.patch(model)}
    assert "subclass of GRU" in report["0"].reason
    assert report["1"].reason == "a parametrization computes its parameters"
    assert (report["2"].op, report["2"].backend) == ("recurrent", "torch")
    assert "proj_size" in report["2"].reason
    assert report["3"].op == "recurrent"
    with pytest.raises(ValueError, match="3 modules would be left alone"):
        bigkern.patch(model, strict=True)
    assert bigkern.unpatch(model) == 1
    assert type(model[3]) is bigkern.nn.GRU
