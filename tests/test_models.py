"""The GPT and its stock twin: same names, same start, same function; generation; positions by the paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bigkern.models import GPT, StockGPT, TransformerConfig
from bigkern.models.transformer import sinusoidal_positions

SMALL: dict[str, Any] = {"context": 24, "layers": 2, "heads": 2, "width": 32}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"positions": "sinusoidal"},
    {"activation": "swiglu", "norm": "rms", "bias": False},
    {"activation": "relu", "bias": False},
    {"activation": "geglu", "hidden": 48},
    {"activation": "gelu_tanh"},
]


def tokens(config: TransformerConfig, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (batch, config.context))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_twins_start_alike_and_agree(options: dict[str, Any]) -> None:
    config = TransformerConfig(**SMALL, **options)
    ours, stock = GPT(config), StockGPT(config)
    assert list(ours.state_dict()) == list(stock.state_dict())
    for name, value in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    t = tokens(config)
    torch.testing.assert_close(ours(t), stock(t), rtol=1e-4, atol=1e-5)
    for model in (ours, stock):
        model(t).square().mean().backward()
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_state_dict_loads_both_ways() -> None:
    a, b = TransformerConfig(**SMALL), TransformerConfig(**SMALL, seed=1)
    ours, stock = GPT(a), StockGPT(b)
    assert not torch.equal(ours.token.weight, stock.token.weight)
    ours.load_state_dict(stock.state_dict())
    t = tokens(a)
    torch.testing.assert_close(ours(t), stock(t), rtol=1e-4, atol=1e-5)
    stock.load_state_dict(GPT(a).state_dict())
    assert torch.equal(GPT(a).token.weight, stock.token.weight)


def test_later_tokens_do_not_change_earlier_logits() -> None:
    config = TransformerConfig(**SMALL)
    model, t = GPT(config), tokens(config)
    changed = t.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 256
    torch.testing.assert_close(model(t)[:, :12], model(changed)[:, :12])


def test_sinusoidal_positions_are_the_papers() -> None:
    table = sinusoidal_positions(50, 6)
    for p in (0, 1, 49):
        for i in range(3):
            angle = p / 10000 ** (2 * i / 6)
            assert table[p, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-7)
            assert table[p, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-7)


def test_generation() -> None:
    config = TransformerConfig(**SMALL)
    model = GPT(config)
    prompt = tokens(config)[:, :5]
    first = model.generate(prompt, 30, temperature=0.8, top_k=5, seed=3)  # runs past the context
    assert first.shape == (2, 35)
    assert torch.equal(first[:, :5], prompt)
    assert torch.equal(first, model.generate(prompt, 30, temperature=0.8, top_k=5, seed=3))
    assert not torch.equal(first, model.generate(prompt, 30, temperature=0.8, top_k=5, seed=4))
    greedy = model.generate(prompt, 3, temperature=0)
    assert torch.equal(greedy[:, 5], model(prompt)[:, -1].argmax(-1))
    assert torch.equal(greedy, model.generate(prompt, 3, top_k=1))
    assert model.training


def test_dropout_only_in_training() -> None:
    config = TransformerConfig(**SMALL, dropout=0.5)
    model = GPT(config)
    t = tokens(config)
    assert not torch.equal(model(t), model(t))
    model.eval()
    assert torch.equal(model(t), model(t))
    torch.testing.assert_close(model(t), StockGPT(config).eval()(t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 30, "heads": 4}, "width 30 must be a multiple of heads 4"),
        ({"layers": 0}, "layers must be at least 1, not 0"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"width": 9, "heads": 1, "positions": "sinusoidal"}, "width must be even"),
    ],
)
def test_bad_configs_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TransformerConfig(**options)


def test_bad_calls_are_refused() -> None:
    model = GPT(TransformerConfig(**SMALL))
    with pytest.raises(ValueError, match="at most 24 long, not 25"):
        model(torch.zeros(1, 25, dtype=torch.long))
    with pytest.raises(ValueError, match="temperature"):
        model.generate(torch.zeros(1, 1, dtype=torch.long), 1, temperature=-1)
    with pytest.raises(ValueError, match="top_k"):
        model.generate(torch.zeros(1, 1, dtype=torch.long), 1, top_k=0)
