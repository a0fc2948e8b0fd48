"""``patch`` and ``unpatch``: exact types only, the same objects before and after, a report of everything."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import bigkern


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
    assert report.patched == 6  # the layer, its attention and two norms, LayerNorm, RMSNorm
    torch.testing.assert_close(stock(x), expected)


def test_unpatch_restores_exactly() -> None:
    patched = model()
    types = [type(m) for m in patched.modules()]
    attributes = [sorted(m.__dict__) for m in patched.modules()]
    bigkern.patch(patched)
    assert bigkern.unpatch(patched) == 6
    assert [type(m) for m in patched.modules()] == types
    assert [sorted(m.__dict__) for m in patched.modules()] == attributes
    assert bigkern.unpatch(patched) == 0


def test_patching_twice_is_the_same_as_once() -> None:
    patched = model()
    first = bigkern.patch(patched)
    assert bigkern.patch(patched) == first
    assert bigkern.unpatch(patched) == 6


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
    assert bigkern.unpatch(duplicate) == 6
    del patched[2]._forward_hooks
    patched[2]._forward_hooks = {}
    again = pickle.loads(pickle.dumps(patched))
    torch.testing.assert_close(again(x), expected)
    assert bigkern.unpatch(again) == 6


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
