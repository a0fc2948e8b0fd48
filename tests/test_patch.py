"""``patch`` and ``unpatch``: exact types only, the same objects before and after, a report of everything."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import bigkern
from bigkern.core import wisdom
from bigkern.core.wisdom_file import Point
from bigkern.patch.report import together


class Shouting(nn.LayerNorm):
    """A subclass whose forward means something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 10


def model() -> nn.Sequential:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
    return nn.Sequential(nn.Linear(64, 64), layer, nn.LayerNorm(64), nn.RMSNorm(64), Shouting(64))


def test_patch_keeps_the_objects_and_the_numbers() -> None:
    stock = model()
    x = torch.randn(2, 16, 64)
    expected = stock(x)
    modules, parameters = list(stock.modules()), list(stock.parameters())
    keys = list(stock.state_dict())
    report = bigkern.patch(stock)
    assert all(a is b for a, b in zip(modules, stock.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, stock.parameters(), strict=True))
    assert list(stock.state_dict()) == keys
    assert report.patched == 9  # the layer, its attention, norms and linear layers, and the other three
    torch.testing.assert_close(stock(x), expected)


def test_unpatch_restores_exactly() -> None:
    patched = model()
    types = [type(m) for m in patched.modules()]
    attributes = [sorted(m.__dict__) for m in patched.modules()]
    bigkern.patch(patched)
    assert bigkern.unpatch(patched) == 9
    assert [type(m) for m in patched.modules()] == types
    assert [sorted(m.__dict__) for m in patched.modules()] == attributes
    assert bigkern.unpatch(patched) == 0


def test_patching_twice_is_the_same_as_once() -> None:
    patched = model()
    first = bigkern.patch(patched)
    assert bigkern.patch(patched) == first
    assert bigkern.unpatch(patched) == 9


def test_subclasses_are_left_alone_and_named() -> None:
    patched = model()
    report = bigkern.patch(patched)
    assert type(patched[4]) is Shouting
    (row,) = [row for row in report if row.module == "4"]
    assert row.op == "-"
    assert "subclass of LayerNorm" in row.reason


def test_report_prints_and_serialises() -> None:
    report = bigkern.patch(model())
    text = str(report)
    for word in ("module", "backend", "reason", "layernorm_ffn", "attention", "norm", "1 left alone"):
        assert word in text
    assert len(json.loads(report.json())) == len(report)


def test_report_says_what_stops_an_op() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1)
    layer.self_attn.dropout = layer.dropout2.p = 1.0
    reasons = {row.op: row.reason for row in bigkern.patch(layer)}
    assert "dropout" in reasons["layernorm_ffn"]
    assert "dropout" in reasons["attention"]


def test_every_attention_and_norm_has_a_row() -> None:
    class OtherAttention(nn.Module):
        pass

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.batch = nn.GroupNorm(2, 8), nn.BatchNorm2d(8)
            self.attention, self.heads = OtherAttention(), nn.MultiheadAttention(8, 2)

    report = {row.module: row for row in bigkern.patch(Block())}
    assert report["batch"].op == "batch_norm"
    assert report["heads"].op == "attention"
    for name in ("norm", "attention"):
        assert (report[name].op, report[name].refused) == ("-", True)
        assert report[name].reason == "no op of ours is known to do the same"


def test_ops_choose() -> None:
    patched = model()
    report = bigkern.patch(patched, ops=["norm"])
    assert {row.op for row in report} == {"norm", "-"}
    reasons = {row.reason for row in report if row.op == "-" and not row.refused}
    assert reasons == {"attention is not among ops", "layernorm_ffn is not among ops"}
    assert type(patched[1]) is nn.TransformerEncoderLayer
    assert bigkern.patch(patched).patched == bigkern.unpatch(patched) == 9
    known = "attention, norm, layernorm_ffn, batch_norm, recurrent, linear"
    with pytest.raises(ValueError, match=f"ops must be of {known}, not 'ffn'"):
        bigkern.patch(patched, ops=("norm", "ffn"))
    with pytest.raises(TypeError, match="ops must be names of ops or None, not Tensor"):
        bigkern.patch(patched, ops=torch.tensor(0))  # type: ignore[arg-type]


def test_strict_patches_all_or_nothing() -> None:
    patched = model()
    types = [type(m) for m in patched.modules()]
    with pytest.raises(ValueError, match="1 modules would be left alone:\n  4 \\(Shouting\\): a subclass"):
        bigkern.patch(patched, strict=True)
    assert [type(m) for m in patched.modules()] == types
    assert not [key for m in patched.modules() for key in m.__dict__ if "bigkern" in key]
    del patched[4]
    assert bigkern.patch(patched, strict=True).patched == 9


def test_context_manager_takes_back_what_it_changed() -> None:
    patched = model()
    types = [type(m) for m in patched.modules()]
    with bigkern.patch(patched, ops=["norm"]) as outer:
        norms = [type(m) for m in patched.modules()]
        with pytest.raises(KeyError), bigkern.patch(patched):
            raise KeyError
        assert [type(m) for m in patched.modules()] == norms
        with bigkern.patch(patched, ops=["norm"]) as inner:
            assert inner == outer
        assert [type(m) for m in patched.modules()] == norms
    assert [type(m) for m in patched.modules()] == types
    with bigkern.patch(patched) as report:
        again = pickle.loads(pickle.dumps(report))
        bigkern.unpatch(patched)
    assert again == report
    assert [type(m) for m in patched.modules()] == types


def scripted(stock: nn.Module) -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)))


def traced(stock: nn.Module) -> nn.Module:
    return torch.jit.trace(nn.Sequential(nn.LayerNorm(64)), torch.randn(2, 64))


def compiled_in_place(stock: nn.Module) -> nn.Module:
    stock.compile()
    return stock


@pytest.mark.parametrize("seal", [torch.compile, compiled_in_place, scripted, traced])
def test_compiled_and_scripted_models_are_refused(seal: Callable[[nn.Module], nn.Module]) -> None:
    sealed = seal(model())
    types = [type(m) for m in sealed.modules()]
    report = bigkern.patch(sealed)
    assert report.patched == 0
    assert all("already: patch the model, then" in row.reason and row.refused for row in report)
    outer = bigkern.patch(nn.Sequential(sealed, nn.LayerNorm(64)))
    assert [row.module for row in outer if row.op == "norm"] == ["1"]
    with pytest.raises(ValueError, match="already: patch the model"):
        bigkern.patch(sealed, strict=True)
    assert [type(m) for m in sealed.modules()] == types


def test_parametrized_weights_are_left_alone() -> None:
    norm = nn.utils.parametrizations.weight_norm(nn.LayerNorm(8).requires_grad_(), dim=0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    nn.utils.parametrizations.weight_norm(layer.linear1)
    row, _ = bigkern.patch(norm)
    assert row.reason == "a parametrization computes its parameters"
    assert "linear1 or linear2 is not a plain nn.Linear" in {row.reason for row in bigkern.patch(layer).left}


def test_parametrized_after_patch() -> None:
    stock, x = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)), torch.randn(2, 64)
    bigkern.patch(stock)
    nn.utils.parametrizations.weight_norm(stock[0])
    expected = stock(x)
    assert bigkern.unpatch(stock) == 1
    torch.testing.assert_close(stock(x), expected)
    nn.utils.parametrize.remove_parametrizations(stock[0], "weight")
    assert bigkern.unpatch(stock) == 1
    assert type(stock[0]) is nn.Linear


def test_native_layers_survive_unpatch() -> None:
    mixed = nn.Sequential(bigkern.nn.LayerNorm(8), nn.LayerNorm(8))
    bigkern.patch(mixed)
    assert bigkern.unpatch(mixed) == 1
    assert type(mixed[0]) is bigkern.nn.LayerNorm
    assert type(mixed[1]) is nn.LayerNorm


def test_the_model_itself_may_be_one_module() -> None:
    norm = nn.LayerNorm(8)
    (row,) = bigkern.patch(norm)
    assert row.module == "(model)"
    assert isinstance(norm, bigkern.nn.LayerNorm)
    bigkern.unpatch(norm)
    assert type(norm) is nn.LayerNorm


def test_hooks_copies_and_pickles_survive() -> None:
    patched = model()
    fired = []
    patched[2].register_forward_hook(lambda *_: fired.append(1))
    bigkern.patch(patched)
    x = torch.randn(2, 16, 64)
    expected = patched(x)
    assert fired == [1]
    duplicate = copy.deepcopy(patched)
    assert bigkern.unpatch(duplicate) == 9
    del patched[2]._forward_hooks
    patched[2]._forward_hooks = {}
    again = pickle.loads(pickle.dumps(patched))
    torch.testing.assert_close(again(x), expected)
    assert bigkern.unpatch(again) == 9


def test_gradients_reach_the_shared_parameters() -> None:
    patched = model()
    optimizer = torch.optim.SGD(patched.parameters(), lr=0.1)
    before = patched[1].linear1.weight.detach().clone()
    bigkern.patch(patched)
    patched(torch.randn(2, 16, 64)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, patched[1].linear1.weight)


@pytest.mark.parametrize("function", [bigkern.patch, bigkern.unpatch])
def test_bad_input(function: object) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, not int"):
        function(3)  # type: ignore[operator]


def test_layers_that_are_alike_share_a_line() -> None:
    layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True) for _ in range(12))
    text = str(bigkern.patch(layers))
    assert "0-11.self_attn" in text
    assert len(text.splitlines()) < 8
    assert together(["a.1.b2", "a.2.b2", "a.4.b2"]) == "a.1,2,4.b2"
    assert together(["norm"]) == "norm"


def test_what_was_not_measured_here_is_said() -> None:
    norm = nn.RMSNorm(64)
    assert "nothing was measured here: run `bigkern tune`" in str(bigkern.patch(norm))
    before, kind = wisdom.state, ("float32", "training", "rms")
    point = Point((512, 64), {"cpu": 1.0, "torch": 2.0}, {"cpu": 2.0})
    wisdom.remember(wisdom.machine(torch.device("cpu")), {("norm", kind): {point.sizes: point}})
    try:
        (row,) = found = bigkern.patch(norm)
    finally:
        wisdom.state = before
    assert (row.backend, row.reason) == ("cpu", "measured at 512x64: 2.00x as fast as torch")
    assert "not measured" not in str(found)
