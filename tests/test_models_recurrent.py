"""Recurrent models: torch's numbers from the same weights, carried state, padding, generation, errors."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigkern
from bigkern.models import RecurrentClassifier, RecurrentConfig, RecurrentEncoderDecoder, RecurrentLM
from bigkern.models.recurrent import STOCK
from bigkern.models.recurrent.stack import embedded
from bigkern.models.transformer import parameters_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

SMALL: dict[str, Any] = {"vocab_size": 40, "layers": 2, "width": 32}
CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
LENGTHS = torch.tensor([3, 9, 1, 6])


def small(**options: Any) -> RecurrentConfig:
    return RecurrentConfig(**{**SMALL, **options})


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, SMALL["vocab_size"], shape)


def state_of(model: Any, prefix: str) -> dict[str, Tensor]:
    """The state dict of a part of a model."""
    return {k.removeprefix(prefix): v for k, v in model.state_dict().items() if k.startswith(prefix)}


# ---- published sizes -------------------------------------------------------------------------------


def test_published_sizes() -> None:
    """Zaremba et al. (2014), section 4.1: 66 millions; Merity et al. (2018), table 1: 24 millions.

    AWD-LSTM's last layer has 400 units, ours 1150 and a projection.
    """
    large = parameters_of(RecurrentConfig.zaremba_large(), RecurrentLM)
    assert large == 10000 * (1500 + 1500 + 1) + 2 * (2 * 4 * 1500 * 1500 + 8 * 1500)
    assert round(large / 1e6) == 66
    config = RecurrentConfig.awd_lstm(recurrent_dropout=0.0)
    wider = 4 * 1150 * (1150 + 1150 + 2) - 4 * 400 * (1150 + 400 + 2) + 1150 * 400
    assert abs((parameters_of(config, RecurrentLM) - wider) / 24e6 - 1) < 0.02


# ---- torch's numbers -------------------------------------------------------------------------------

Model = Callable[..., Any]
TWINS: list[tuple[Model, dict[str, Any]]] = [
    *((RecurrentLM, {"cell": cell}) for cell in CELLS),
    (RecurrentLM, {"embedding": 24, "locked": True}),
    (RecurrentLM, {"tied": False, "proj_size": 20}),
    (RecurrentClassifier, {"bidirectional": True, "cell": "gru"}),
    (RecurrentClassifier, {"features": 5, "pooling": "mean", "locked": True, "bidirectional": True}),
    (RecurrentClassifier, {"pooling": "max", "cell": "rnn_tanh"}),
    (RecurrentEncoderDecoder, {"bidirectional": True, "heads": 2}),
    (RecurrentEncoderDecoder, {"cell": "gru", "input_feeding": True, "embedding": 24, "tied": False}),
]


def arguments(family: Model, config: RecurrentConfig) -> tuple[Tensor, ...]:
    if family is RecurrentLM:
        return (tokens(4, 9),)
    if family is RecurrentClassifier:
        return tokens(4, 9) if config.features is None else torch.randn(4, 9, config.features), LENGTHS
    return tokens(4, 9), tokens(4, 5), LENGTHS


def outputs(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
    out = model(*batch)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize(("family", "options"), TWINS, ids=lambda x: x.__name__ if callable(x) else str(x))
def test_twins_agree(family: Model, options: dict[str, Any]) -> None:
    """The same start, outputs and gradients in plain PyTorch; saved, copied and made anew the same."""
    config = small(**options)
    ours, stock = family(config), family(config, STOCK)
    assert list(ours.state_dict()) == list(stock.state_dict())
    for name, value in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    batch = arguments(family, config)
    # Stock may be faster at these sizes, and would be compared with itself; projections are its alone.
    with bigkern.use("cpu") if config.proj_size is None else nullcontext():
        a = outputs(ours, batch)
        a.square().mean().backward()
    b = outputs(stock, batch)
    b.square().mean().backward()
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert q.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    with torch.device("meta"):
        shell = family(config)
    shell.to_empty(device="cpu")
    shell.reset_parameters()
    expected = outputs(ours, batch)
    for same in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), shell):
        assert torch.equal(outputs(same, batch), expected)


def test_language_model_is_torchs_lstm_between_two_products() -> None:
    config = small(layers=3)
    model, t = RecurrentLM(config), tokens(2, 7)
    layers = nn.LSTM(32, 32, 3)
    layers.load_state_dict(state_of(model, "stack.layers.0."))
    y, _ = layers(model.token(t).transpose(0, 1))
    logits = (y @ model.token.weight.T + model.bias).transpose(0, 1)
    torch.testing.assert_close(model(t)[0], logits)
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in (*layers.parameters(), model.token.weight, model.bias)
    )
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), t[:, 1:].flatten())
    torch.testing.assert_close(model(t[:, :-1], None, t[:, 1:])[0], loss)


def test_pooling_is_over_each_rows_own_length() -> None:
    x = torch.randn(4, 9, 5)
    for pooling, pool in {"last": None, "mean": lambda y: y.mean(0), "max": lambda y: y.amax(0)}.items():
        model = RecurrentClassifier(small(features=5, bidirectional=True, pooling=pooling, classes=3))
        layers = nn.LSTM(5, 16, 2, bidirectional=True)
        layers.load_state_dict(state_of(model, "stack.layers.0."))
        for row, length, logits in zip(x, LENGTHS.tolist(), model(x, LENGTHS), strict=True):
            y, (h, _) = layers(row[:length])
            pooled = h[-2:].flatten() if pool is None else pool(y)
            torch.testing.assert_close(logits, model.head(pooled))


def test_padding_changes_nothing() -> None:
    changed = tokens(4, 9)
    for family, more in ((RecurrentClassifier, ()), (RecurrentEncoderDecoder, (tokens(4, 5),))):
        model = family(small(bidirectional=True))
        padding = torch.arange(9) >= LENGTHS.unsqueeze(1)
        source = tokens(4, 9)
        outs = [model(t, *more, LENGTHS) for t in (source, torch.where(padding, changed, source))]
        assert torch.equal(*outs)
        alone = model(source[:1, :3], *(x[:1] for x in more))
        torch.testing.assert_close(outs[0][:1], alone)


# ---- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"cell": "gru", "locked": True}, {"proj_size": 20}], ids=str)
def test_carried_state_equals_one_long_run(options: dict[str, Any]) -> None:
    model, t = RecurrentLM(small(**options)), tokens(2, 24)
    whole, last = model(t)
    state, parts = None, []
    for part in t.split((5, 1, 18), dim=1):
        logits, state = model(part, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    torch.testing.assert_close(state, last)


def test_gradients_stop_at_the_state() -> None:
    model, t = RecurrentLM(small()), tokens(2, 8)
    _, state = model(t)
    assert not any(s.requires_grad for s in state)
    model(t, state, t)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---- dropout ---------------------------------------------------------------------------------------

PLACES = ("embedding_dropout", "input_dropout", "dropout", "output_dropout")
OWN = ({"recurrent_dropout": 0.5}, {"zoneout": 0.5}, {"layer_norm": True})  # stock's layers know none of them


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_dropout_only_in_training(place: str, locked: bool) -> None:
    model, t = RecurrentLM(small(locked=locked, **{place: 0.5})), tokens(2, 6)
    assert not torch.equal(model(t)[0], model(t)[0])
    plain = RecurrentLM(small(locked=locked))
    torch.testing.assert_close(model.eval()(t)[0], plain(t)[0])


def test_a_locked_mask_is_one_for_all_steps_and_no_two_rows() -> None:
    stack = RecurrentLM(small(locked=True, input_dropout=0.5)).stack
    ones = torch.ones(6, 3, 32)
    dropped = stack._drop(ones, 0.5)
    assert torch.equal(dropped, dropped[:1].expand_as(dropped))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(dropped[:, 0], dropped[:, 1])
    packed = nn.utils.rnn.pack_padded_sequence(ones, torch.tensor([6, 4, 1]))
    unpacked, _ = nn.utils.rnn.pad_packed_sequence(stack._drop(packed, 0.5))
    for b, length in enumerate((6, 4, 1)):
        assert torch.equal(unpacked[:length, b], unpacked[:1, b].expand(length, -1))


def test_embedding_dropout_takes_words_everywhere() -> None:
    t = tokens(8, 20)
    x = embedded(t, torch.ones(40, 4), 0.5)
    for word in t.unique():
        assert x[t == word].unique().tolist() in ([0.0], [2.0])


@pytest.mark.parametrize("options", OWN, ids=str)
def test_what_torchs_layers_do_not_know(options: dict[str, Any]) -> None:
    config = small(locked=True, **options)
    model, t = RecurrentLM(config), tokens(2, 6)
    model(t, None, t)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    (whole, last), (first, state) = model(t), model(t[:, :2])
    rest, state = model(t[:, 2:], state)
    torch.testing.assert_close(torch.cat((first, rest), dim=1), whole)
    torch.testing.assert_close(state, last)
    with pytest.raises(TypeError, match=next(iter(options))):
        RecurrentLM(config, STOCK)


# ---- initial weights -------------------------------------------------------------------------------


def test_initial_weights() -> None:
    model = RecurrentLM(small())
    assert not torch.equal(model.token.weight, RecurrentLM(small(seed=1)).token.weight)
    assert model.token.weight.abs().max() <= 0.1
    torchs = 1 / math.sqrt(32)
    for p in model.stack.parameters():
        assert 0.9 * torchs < p.abs().max() <= torchs
    assert abs(model(tokens(4, 9), None, tokens(4, 9))[0].item() - math.log(40)) < 0.1
    asked = RecurrentLM(small(forget_bias=1.0, orthogonal=True)).stack.layers[0]
    assert torch.equal((asked.bias_ih_l1 + asked.bias_hh_l1)[32:64], torch.ones(32))
    for gate in asked.weight_hh_l0.split(32):
        torch.testing.assert_close(gate @ gate.T, torch.eye(32), rtol=0, atol=1e-5)


# ---- generation ------------------------------------------------------------------------------------


def sharpened(model: Any) -> Any:
    """Weights large enough that outputs vary and no two logits are near each other."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.mul_(8 if "token" in name else 3)
    return model


@torch.no_grad()
def test_generation_step_by_step_is_one_go() -> None:
    model, prompt = sharpened(RecurrentLM(small(dropout=0.5))), tokens(4, 9)
    long = model.generate(prompt, 12, temperature=0)
    assert model.training
    assert len(long[:, 9:].unique()) > 4
    assert torch.equal(long[:, 9:], model.eval()(long[:, :-1])[0][:, 8:].argmax(-1))
    _, state = model(prompt[:, :4])
    assert torch.equal(model.generate(prompt[:, 4:], 12, state=state, temperature=0)[:, 5:], long[:, 9:])
    uneven = model.generate(prompt, 12, lengths=LENGTHS, temperature=0)[:, 9:]
    for row, length, new in zip(prompt, LENGTHS.tolist(), uneven, strict=True):
        assert torch.equal(model.generate(row[None, :length], 12, temperature=0)[0, length:], new)
    drawn = [model.generate(prompt, 12, top_k=5, top_p=0.9, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@torch.no_grad()
def test_beams_carry_their_states() -> None:
    """A beam's log-probability is what the model gives its tokens in one go."""
    model, prompt = sharpened(RecurrentLM(small())).eval(), tokens(2, 3)
    greedy, best = (model.generate(prompt, 6, temperature=0, beams=beams) for beams in (1, 8))

    def score(sequence: Tensor) -> Tensor:
        logs = model(sequence[:, :-1])[0][:, 2:].log_softmax(-1)
        return logs.gather(2, sequence[:, 3:].unsqueeze(2)).sum((1, 2))

    assert bool((score(best) >= score(greedy) - 1e-5).all())
    every = torch.cartesian_prod(*[torch.arange(40)] * 2)
    for row in prompt:
        both = torch.cat((row.expand(len(every), -1), every), dim=1)
        logs = model(both[:, :-1])[0][:, 2:].log_softmax(-1).gather(2, every.unsqueeze(2)).sum((1, 2))
        assert torch.equal(model.generate(row[None], 2, beams=20)[0], both[logs.argmax()])


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"input_feeding": True}], ids=str)
def test_encoder_decoder_generates_what_forward_says(options: dict[str, Any]) -> None:
    model = sharpened(RecurrentEncoderDecoder(small(start_token=2, heads=2, **options))).eval()
    source = tokens(4, 9)
    out = model.generate(source, 7, lengths=LENGTHS, temperature=0)
    assert torch.equal(out[:, 1:], model(source, out[:, :-1], LENGTHS).argmax(-1))
    assert torch.equal(model.generate(source, 7, lengths=LENGTHS, beams=1, top_k=1), out)
    begun = model.generate(source, 4, lengths=LENGTHS, target=out[:, :4], temperature=0)
    assert torch.equal(begun, out)
    beams = model.generate(source, 7, lengths=LENGTHS, beams=4)
    for b, length in enumerate(LENGTHS.tolist()):
        assert torch.equal(model.generate(source[b : b + 1, :length], 7, beams=4)[0], beams[b])


def test_learns_to_reverse() -> None:
    torch.manual_seed(0)
    config = RecurrentConfig(
        vocab_size=10, layers=1, width=48, bidirectional=True, start_token=0, end_token=1
    )
    model = RecurrentEncoderDecoder(config)
    optimizer = bigkern.optim.AdamW(model.parameters(), lr=1e-2)

    def batch(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        lengths = torch.randint(2, 6, (rows,))
        source = torch.randint(2, 10, (rows, 5))
        labels = torch.full((rows, 6), -100)
        for b, n in enumerate(lengths.tolist()):
            labels[b, : n + 1] = torch.tensor([*source[b, :n].flip(0).tolist(), 1])
        return source, labels, lengths

    for _ in range(150):
        source, labels, lengths = batch(32)
        loss = model.loss(source, labels, lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    source, labels, lengths = batch(64)
    for how in ({"temperature": 0}, {"beams": 3}):
        out = model.generate(source, 6, lengths=lengths, **how)[:, 1:]
        out = F.pad(out, (0, 6 - out.shape[1]), value=1)
        right = ((out == labels) | (labels == -100)).all(1).float().mean()
        assert right > 0.9, (how, right)


# ---- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": 0}, "layers must be at least 1, not 0"),
        ({"cell": "mgu"}, "cell must be one of lstm, gru, rnn_tanh, rnn_relu, not 'mgu'"),
        ({"pooling": "sum"}, "pooling must be one of last, mean, max"),
        ({"zoneout": 1.0}, r"zoneout must be in \[0, 1\), not 1.0"),
        ({"proj_size": 32}, "proj_size must be smaller than width 32, not 32"),
        ({"proj_size": 8, "cell": "gru"}, "proj_size goes with cell 'lstm', not 'gru'"),
        ({"proj_size": 8, "layer_norm": True}, "layer_norm goes without proj_size"),
        ({"forget_bias": 1.0, "cell": "rnn_relu"}, "forget_bias goes with cell 'lstm'"),
        ({"forget_bias": math.inf}, "forget_bias must be finite, not inf"),
        ({"width": 31, "bidirectional": True}, "width must be even for two directions, not 31"),
        ({"heads": 5}, "heads must divide the 32 outputs of a step, not 5"),
        ({"end_token": 40}, "end_token must be within the vocabulary of 40, not 40"),
    ],
)
def test_bad_configs_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(**options)


def test_bad_calls_are_refused() -> None:
    t, x = tokens(2, 6), torch.zeros(2, 6, 5)
    lm, both = RecurrentLM(small()), RecurrentEncoderDecoder(small())
    sorter, reader = RecurrentClassifier(small()), RecurrentClassifier(small(features=5))
    one, wrong = torch.tensor([1]), torch.zeros(2, 3, 32)
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (TypeError, "tokens must be an int64 or int32 Tensor .*, not torch.float32", lambda: lm(t.float())),
        (ValueError, "tokens must have 2 dimensions", lambda: lm(t[0])),
        (ValueError, r"targets must have tokens's shape \(2, 6\)", lambda: lm(t, None, t[:, 1:])),
        (RuntimeError, "hidden", lambda: lm(t, (wrong, wrong))),
        (ValueError, "features goes with a classifier", lambda: RecurrentLM(small(features=5))),
        (ValueError, "bidirectional goes with", lambda: RecurrentLM(small(bidirectional=True))),
        (ValueError, "features goes with", lambda: RecurrentEncoderDecoder(small(features=5))),
        (TypeError, "input must be an int64 or int32 Tensor", lambda: sorter(x)),
        (TypeError, "input must be a floating point Tensor .* not torch.int64", lambda: reader(t)),
        (ValueError, r"input must be \[B, T, 5\], not \[2, 6, 4\]", lambda: reader(x[:, :, :4])),
        (TypeError, "lengths must be an int64 or int32 Tensor", lambda: sorter(t, [6, 6])),
        (ValueError, r"lengths must be one of each row of input, \[2\]", lambda: sorter(t, one)),
        (ValueError, r"lengths must be from 1 to 6, not \[0, 7\]", lambda: sorter(t, torch.tensor([0, 7]))),
        (ValueError, "target must have source's batch size 2, not 1", lambda: both(t, t[:1])),
        (ValueError, "start_token must be set", lambda: both.generate(t, 3)),
        (ValueError, "start_token must be set", lambda: both.loss(t, t)),
        (ValueError, "count must be at least 1", lambda: lm.generate(t, 0)),
        (ValueError, "tokens must hold at least one token", lambda: lm.generate(t[:, :0], 3)),
        (ValueError, r"lengths must be one of each row of tokens", lambda: lm.generate(t, 3, lengths=one)),
        (ValueError, "beams must be at most half the vocabulary", lambda: lm.generate(t, 1, beams=21)),
    ]  # fmt: skip
    for error, words, call in cases:
        with pytest.raises(error, match=words):
            call()
    assert lm.training
