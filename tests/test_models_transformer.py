"""Transformer families: known shapes, twins, padding, positions, generation, errors; HF's models and ours."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bigkern
from bigkern import models
from bigkern.models import BERT, GPT, EncoderDecoder, TransformerConfig, ViT
from bigkern.models.transformer import (
    STOCK,
    alibi_slopes,
    convert_state_dict,
    parameters_of,
    rotary_positions,
)
from bigkern.models.transformer.generation import Decoding, Finished, draw
from bigkern.models.transformer.positions import rotate

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"vocab_size": 40, "context": 16, "layers": 2, "heads": 4, "width": 32}
LLAMA: dict[str, Any] = {
    "positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": False, "kv_heads": 2, "tied": False
}  # fmt: skip
LAST: dict[str, Any] = {"placement": "post", "embedding_norm": True}
Model = Callable[..., Any]


def small(**options: Any) -> TransformerConfig:
    return TransformerConfig(**{**SMALL, **options})


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, SMALL["vocab_size"], shape)


# ---- published sizes -------------------------------------------------------------------------------

# Parameters as counted by transformers' own models of these sizes, which hold the published checkpoints:
# GPT2Model, LlamaForCausalLM, BertModel with its pooler, BartModel, ViTForImageClassification of 1000 classes
# (torchvision's ``num_params`` too). Vaswani et al. (2017), table 3, gives 65 and 213 millions without the
# exact vocabulary: ours are of 37000 tokens, as the paper's section 5.1.
PUBLISHED: list[tuple[str, Model, int]] = [
    ("gpt2", GPT, 124_439_808),
    ("gpt2_medium", GPT, 354_823_168),
    ("gpt2_large", GPT, 774_030_080),
    ("gpt2_xl", GPT, 1_557_611_200),
    ("llama_7b", GPT, 6_738_415_616),
    ("llama_13b", GPT, 13_015_864_320),
    ("llama_70b", GPT, 68_976_648_192),
    ("llama3_8b", GPT, 8_030_261_248),
    ("llama3_70b", GPT, 70_553_706_496),
    ("bert_base", BERT, 109_482_240),
    ("bert_large", BERT, 335_141_888),
    ("bart_base", EncoderDecoder, 139_420_416 - 2 * 2 * 768),  # theirs has two unused positions a half
    ("bart_large", EncoderDecoder, 406_291_456 - 2 * 2 * 1024),
    ("transformer_base", EncoderDecoder, 63_082_496),
    ("transformer_big", EncoderDecoder, 214_245_376),
    ("vit_b16", ViT, 86_567_656),
    ("vit_b32", ViT, 88_224_232),
    ("vit_l16", ViT, 304_326_632),
    ("vit_l32", ViT, 306_535_400),
    ("vit_h14", ViT, 632_045_800),
]


@pytest.mark.parametrize(("name", "family", "count"), PUBLISHED, ids=[name for name, *_ in PUBLISHED])
def test_published_sizes(name: str, family: Model, count: int) -> None:
    config = getattr(TransformerConfig, name)()
    assert parameters_of(config, family) == count
    if name.startswith("transformer"):
        paper = 65e6 if name == "transformer_base" else 213e6
        assert abs(count / paper - 1) < 0.031
    with torch.device("meta"):
        model = family(getattr(TransformerConfig, name)(layers=1, decoder_layers=1))
        t = torch.zeros(2, 8, dtype=torch.long)
        W = config.width
        if family is ViT:
            x = torch.zeros(2, 3, 224, 224)
            assert model.features(x).shape == (2, (224 // config.patch_size) ** 2 + 1, W)
            assert model(x).shape == (2, 1000)
        elif family is BERT:
            assert model(t, t).shape == (2, 8, W)
            assert model.pool(model(t)).shape == (2, W)
        else:
            logits = model(t) if family is GPT else model(t, t[:, :5])
            assert logits.shape == (2, 8 if family is GPT else 5, config.vocab_size)


# ---- twins -----------------------------------------------------------------------------------------

TWINS: list[tuple[Model, dict[str, Any]]] = [
    (GPT, LLAMA),
    (GPT, {"positions": "alibi", "heads": 4, "kv_heads": 1, "checkpointing": True}),
    (GPT, {"positions": "rotary", "rope_fraction": 0.5, "save": "input", **LAST}),
    (BERT, {"segments": 2, **LAST}),
    (BERT, {"positions": "alibi", "norm": "rms", "bias": False}),
    (BERT, {"positions": "sinusoidal"}),
    (ViT, {"image_size": 16, "patch_size": 4, "classes": 7}),
    (ViT, {"image_size": 16, "patch_size": 8, "pooling": "mean", "positions": "sinusoidal"}),
    (EncoderDecoder, {"positions": "sinusoidal", "placement": "post", "activation": "relu"}),
    (EncoderDecoder, {**LLAMA, "decoder_layers": 1}),
    (EncoderDecoder, {"positions": "alibi"}),
]


def arguments(family: Model) -> tuple[Tensor | None, ...]:
    """A batch with padding, for any family; the right sort of padding for a BERT with a pooler."""
    if family is ViT:
        return (torch.randn(2, 3, 16, 16),)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    if family is GPT:
        return tokens(2, 9), mask
    if family is BERT:
        return tokens(2, 9), None, mask
    return tokens(2, 9), tokens(2, 5), mask


@pytest.mark.parametrize(("family", "options"), TWINS, ids=lambda x: x.__name__ if callable(x) else str(x))
def test_twins_agree(family: Model, options: dict[str, Any]) -> None:
    """Outputs and gradients in plain PyTorch, from the same state dict."""
    config = small(**options)
    ours, stock = family(config), family(config, STOCK)
    stock.load_state_dict(ours.state_dict())
    batch = arguments(family)
    with bigkern.use("cpu"):  # stock is faster at these sizes, and would be compared with itself
        a, b = ours(*batch), stock(*batch)
        a.square().mean().backward()
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    b.square().mean().backward()
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        if q.grad is None:  # a pooler that forward does not use
            assert p.grad is None, name
            continue
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary", "alibi"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(positions: str, side: str) -> None:
    config = small(positions=positions)
    t, source = tokens(1, 6), tokens(1, 5)
    extra = (0, 4) if side == "right" else (4, 0)
    kept = slice(0, 6) if side == "right" else slice(4, 10)
    padded, mask = F.pad(t, extra, value=1), F.pad(torch.ones_like(t), extra)
    for model, of in ((GPT(config), (mask,)), (BERT(config), (None, mask))):
        torch.testing.assert_close(model(padded, *of)[:, kept], model(t))
    model = EncoderDecoder(config)
    torch.testing.assert_close(model(padded, source, mask), model(t, source))
    torch.testing.assert_close(model(source, padded, None, mask)[:, kept], model(source, t))


def test_a_row_of_padding_alone_is_finite() -> None:
    model = GPT(small())
    mask = torch.tensor([[True] * 6, [False] * 6])
    model(tokens(2, 6), mask).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---- positions -------------------------------------------------------------------------------------


def test_alibi_slopes_are_the_papers() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    twelve = [2.0**-i for i in range(1, 9)] + [2.0**-i for i in (0.5, 1.5, 2.5, 3.5)]
    torch.testing.assert_close(alibi_slopes(12), torch.tensor(twelve))
    assert [len(alibi_slopes(h)) for h in range(1, 34)] == list(range(1, 34))


def test_rotation_depends_on_distance_alone() -> None:
    cosine, sine = rotary_positions(64, 8)
    q, k = torch.randn(2, 1, 1, 1, 8).double()

    def score(i: int, j: int) -> float:
        at_i, at_j = (rotate(x, cosine[p].double(), sine[p].double()) for x, p in ((q, i), (k, j)))
        return float((at_i * at_j).sum())

    assert score(3, 1) == pytest.approx(score(60, 58), abs=1e-5)
    assert score(0, 0) == pytest.approx((q * k).sum().item(), abs=1e-6)
    fraction = rotate(q, cosine[5, :2], sine[5, :2])
    assert torch.equal(fraction[..., 4:], q[..., 4:])


def test_tables_stay_in_float32_and_off_the_state_dict() -> None:
    model = GPT(small(**LLAMA))
    before = model.cosine.clone()
    model.bfloat16()
    assert model.cosine.dtype == torch.float32
    assert torch.equal(model.cosine, before)
    assert "cosine" not in model.state_dict()
    with torch.device("meta"):
        shell = GPT(small(**LLAMA))
    assert torch.equal(shell.to_empty(device="cpu").cosine, before)


# ---- modes -----------------------------------------------------------------------------------------


def test_dropout_in_training_alone() -> None:
    options = {"dropout": 0.3, "attention_dropout": 0.3, "hidden_dropout": 0.3}
    for placement in ("pre", "post"):
        for name in options:
            model = EncoderDecoder(small(placement=placement, **{name: options[name]}))
            source, target = tokens(2, 6), tokens(2, 6)
            assert not torch.equal(model(source, target), model(source, target)), name
            model.eval()
            assert torch.equal(model(source, target), model(source, target)), name


@pytest.mark.parametrize("options", [LLAMA, LAST, {}])
def test_autocast(options: dict[str, Any]) -> None:
    model, x = GPT(small(**options)), tokens(2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    torch.testing.assert_close(y.float(), model(x), rtol=3e-2, atol=3e-2)
    y.sum().backward()


def test_checkpointing_repeats_dropout() -> None:
    t, grads = tokens(2, 8), []
    for again in (False, True):
        model = GPT(small(dropout=0.2, attention_dropout=0.2, checkpointing=again))
        torch.manual_seed(0)
        model(t).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_copies_and_state_dicts() -> None:
    batches: dict[Any, Any] = {family: arguments(family) for family in (GPT, BERT, ViT, EncoderDecoder)}
    for family, batch in batches.items():
        config = small(image_size=16, patch_size=8)
        model = family(config)
        expected = model(*batch)
        other = family(small(image_size=16, patch_size=8, seed=1))
        assert not torch.equal(other(*batch), expected)
        other.load_state_dict(model.state_dict())
        for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other, model):
            assert torch.equal(same(*batch), expected)
        with torch.device("meta"):
            shell = family(config)
        shell.to_empty(device="cpu")
        shell.reset_parameters()
        assert torch.equal(shell(*batch), expected)


@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt", "llama"])
def test_compiles_as_one_graph(options: dict[str, Any]) -> None:
    model = GPT(small(layers=1, **options)).eval()
    t = tokens(2, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(t), model(t))


def test_heads_share_the_trunk() -> None:
    t, config = tokens(2, 6), small(segments=2, classes=3, **LAST)
    trunk = BERT(config).state_dict()
    for name, shapes in {
        "BERTForMaskedLM": [(2, 6, 40)],
        "BERTForPreTraining": [(2, 6, 40), (2, 2)],
        "BERTForSequenceClassification": [(2, 3)],
        "BERTForTokenClassification": [(2, 6, 3)],
    }.items():
        model = getattr(models, name)(config)
        outputs = model(t)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert [tuple(o.shape) for o in outputs] == shapes
        for key, value in model.bert.state_dict().items():
            assert torch.equal(value, trunk[key]), key
        sum(o.sum() for o in outputs).backward()
        assert all(p.grad is not None for p in model.parameters()), name


def test_teacher_forcing() -> None:
    model = EncoderDecoder(small(start_token=2, pad_token=1))
    source, labels = tokens(2, 6), tokens(2, 4)
    labels[1, 2:] = -100
    shifted = model.shifted(labels)
    assert shifted[0].tolist() == [2, *labels[0, :3].tolist()]
    assert shifted[1].tolist() == [2, *labels[1, :2].tolist(), 1]
    logs = model(source, shifted).log_softmax(-1)
    picked = [logs[b, i, labels[b, i]] for b, i in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1))]
    torch.testing.assert_close(model.loss(source, labels), -torch.stack(picked).mean())


# ---- generation ------------------------------------------------------------------------------------

GENERATORS: list[dict[str, Any]] = [{}, LLAMA, {"positions": "alibi"}, {"positions": "sinusoidal", **LAST}]
WAYS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "top_k": 10, "top_p": 0.9, "seed": 1},
    {"beams": 3, "end": 7},
]


def sharpened(model: Any) -> Any:
    """Weights large enough that outputs vary and no two logits are near each other."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(15)
    return model


@pytest.mark.parametrize("options", GENERATORS, ids=str)
@pytest.mark.parametrize("how", WAYS, ids=str)
def test_cache_changes_nothing(options: dict[str, Any], how: dict[str, Any]) -> None:
    """Nor does padding on either side, nor the company of other rows."""
    model = sharpened(GPT(small(**options)))
    prompt = tokens(2, 5)
    expected = model.generate(prompt, 8, cache=False, **how)
    with bigkern.use("cpu"):
        assert torch.equal(model.generate(prompt, 8, **how), expected)
    if "seed" in how:
        return  # which draws a row gets depends on the batch
    for extra in ((3, 0), (0, 3)):
        padded, mask = F.pad(prompt, extra, value=1), F.pad(torch.ones_like(prompt), extra)
        both, ones = torch.cat((padded, tokens(2, 8))), torch.cat((mask, torch.ones_like(mask)))
        for cache in (True, False):
            new = model.generate(both, 8, mask=ones, cache=cache, **how)[:2, 8:]
            n = expected.shape[1] - 5
            assert torch.equal(new[:, :n], expected[:, 5:])
    seq2seq = sharpened(EncoderDecoder(small(start_token=2, **options)))
    mask = torch.ones_like(prompt)
    mask[1, 3:] = 0
    with_cache, without = (seq2seq.generate(prompt, 8, mask=mask, cache=c, **how) for c in (True, False))
    assert torch.equal(with_cache, without)


def test_generation_past_the_context_slides() -> None:
    model = sharpened(GPT(small()))
    prompt = tokens(1, 10)
    long = model.generate(prompt, 12, temperature=0)
    assert long.shape == (1, 22)
    for i in range(16, 22):
        assert long[0, i] == model(long[:, i - 16 : i])[0, -1].argmax()


def test_sequences_end_and_are_padded() -> None:
    model = sharpened(GPT(small()))
    prompt = tokens(4, 3)
    free = model.generate(prompt, 8, temperature=0)
    end = int(free[0, 5])
    ended = model.generate(prompt, 8, temperature=0, end=end, pad=0)
    for row, plain in zip(ended[:, 3:].tolist(), free[:, 3:].tolist(), strict=True):
        stop = plain.index(end) + 1 if end in plain else len(row)
        assert row == (plain[:stop] + [0] * 8)[: len(row)]


@pytest.mark.parametrize(
    "how", [{"top_k": 3}, {"top_p": 0.6}, {"temperature": 0.5, "top_k": 6, "top_p": 0.8}], ids=str
)
def test_draws_follow_the_distribution(how: dict[str, Any]) -> None:
    logits = torch.tensor([2.0, -1.0, 1.5, 0.3, 0.0, -3.0, 1.0])
    ranked = sorted(range(7), key=lambda i: -logits[i])[: how.get("top_k", 7)]
    weights = [math.exp(logits[i] / how.get("temperature", 1.0)) for i in ranked]
    kept, total = 0.0, sum(weights)
    allowed: dict[int, float] = {}
    for i, w in zip(ranked, weights, strict=True):
        if kept < how.get("top_p", 1.0):
            allowed[i] = w
        kept += w / total
    generator = torch.Generator().manual_seed(0)
    drawn = draw(logits.expand(20000, 7), Decoding(**how), generator)
    frequencies = torch.bincount(drawn, minlength=7) / 20000
    expected = torch.tensor([allowed.get(i, 0.0) for i in range(7)]) / sum(allowed.values())
    assert torch.equal(frequencies > 0, expected > 0)
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.015)


def searched(model: Any, prompt: list[int], count: int, beams: int, penalty: float, end: int) -> list[int]:
    """Beam search of one row as its definition says, with lists."""
    running, finished = [(0.0, list[int]())], list[tuple[float, list[int]]]()
    for length in range(1, count + 1):
        grown = []
        for score, new in running:
            logs = model(torch.tensor([prompt + new]))[0, -1].log_softmax(-1).tolist()
            grown += [(score + log, [*new, token]) for token, log in enumerate(logs)]
        grown = sorted(grown, key=lambda pair: -pair[0])[: 2 * beams]
        over = [pair for pair in grown[:beams] if pair[1][-1] == end or length == count]
        finished += [(score / length**penalty, new) for score, new in over]
        finished = sorted(finished, key=lambda pair: -pair[0])[:beams]
        running = [pair for pair in grown if pair[1][-1] != end][:beams]
        if len(finished) == beams and running[0][0] / length**penalty <= finished[-1][0]:
            break
    return finished[0][1]


@pytest.mark.parametrize(("beams", "penalty"), [(2, 1.0), (4, 0.0), (3, 2.0), (3, -1.0)])
@torch.no_grad()
def test_beam_search_is_the_definitions(beams: int, penalty: float) -> None:
    model = sharpened(GPT(small(layers=1)))
    prompt = tokens(3, 4)
    for end in (5, 11, 23):
        found = model.generate(prompt, 5, beams=beams, length_penalty=penalty, end=end, pad=0)[:, 4:]
        for row, start in zip(found.tolist(), prompt.tolist(), strict=True):
            expected = searched(model, start, 5, beams, penalty, end)
            assert row == (expected + [0] * 5)[: len(row)]


def test_finished_beams_are_kept_in_order() -> None:
    finished = Finished(torch.zeros(1, 2, 3, dtype=torch.long), torch.full((1, 2), -math.inf))
    one = torch.tensor([[[1, 0, 0], [2, 0, 0]]])
    finished.add(one, torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, False]]), 1)
    finished.close(torch.tensor([-9.0]))
    assert finished.open.item()
    assert finished.scores.tolist() == [[-1.0, -math.inf]]
    finished.add(one, torch.tensor([[-0.5, -3.0]]), torch.tensor([[True, True]]), 2)
    assert finished.scores.tolist() == [[-0.5, -1.0]]
    assert finished.lengths.tolist() == [[2, 1]]
    finished.close(torch.tensor([-2.0]))
    assert not finished.open.item()


# ---- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_heads": 3}, "heads 4 must be a multiple of kv_heads 3"),
        (
            {"positions": "fourier"},
            "positions must be one of learned, sinusoidal, rotary, alibi, not 'fourier'",
        ),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"positions": "rotary", "rope_fraction": 0.1}, "even number of head dimensions must turn"),
        ({"hidden": 0}, "hidden must be at least 1, not 0"),
        ({"attention_dropout": -0.1}, "attention_dropout must be in"),
        ({"end_token": 40}, "end_token must be within the vocabulary of 40, not 40"),
        ({"image_size": 225}, "image_size 225 must be a multiple of patch_size 16"),
    ],
)
def test_bad_configs_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(**options)


def test_bad_calls_are_refused() -> None:
    t = tokens(2, 6)
    gpt, bert, both = GPT(small()), BERT(small()), EncoderDecoder(small())
    vit, image = ViT(small(image_size=32)), torch.zeros(1, 3, 8, 8)
    bare, mask = BERT(small(), pooler=False), torch.zeros_like(t)
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, "tokens must be at most 16 long, not 17", lambda: bert(tokens(1, 17))),
        (ValueError, "tokens must have 2 dimensions", lambda: gpt(t[0])),
        (TypeError, "tokens must be an int64 or int32 Tensor .*, not torch.float32", lambda: gpt(t.float())),
        (TypeError, "mask must be a bool Tensor.* not torch.float32", lambda: gpt(t, torch.ones(2, 6))),
        (ValueError, r"mask must have tokens's shape \(2, 6\), not \(2, 5\)", lambda: gpt(t, t[:, :5])),
        (ValueError, "segments cannot be given", lambda: bert(t, t)),
        (ValueError, "target must be at most 16 long", lambda: both(t, tokens(2, 17))),
        (ValueError, "target must have source's batch size 2, not 1", lambda: both(t, t[:1])),
        (ValueError, "target_mask must have target's shape", lambda: both(t, t, None, t[:, :5])),
        (ValueError, "start_token must be set", lambda: both.generate(t, 3)),
        (ValueError, r"images must be \[B, 3, 32, 32\], not \[1, 3, 8, 8\]", lambda: vit(image)),
        (TypeError, "images must be a floating point Tensor, not torch.uint8", lambda: vit(t.byte())),
        (ValueError, "positions must be learned or sinusoidal", lambda: ViT(small(positions="alibi"))),
        (RuntimeError, "built without a pooler", lambda: bare.pool(torch.zeros(1, 1, 32))),
        (ValueError, "count must be at least 1", lambda: gpt.generate(t, -9)),
        (ValueError, "target must hold at least one token", lambda: both.generate(t, 3, target=t[:, :0])),
        (ValueError, "top_p must be in", lambda: gpt.generate(t, 1, top_p=0.0)),
        (ValueError, "beams must be at most half the vocabulary", lambda: gpt.generate(t, 1, beams=21)),
        (ValueError, "length_penalty must be", lambda: gpt.generate(t, 1, length_penalty=math.nan)),
        (ValueError, "end must be within the vocabulary of 40", lambda: gpt.generate(t, 1, end=40)),
        (ValueError, "at least one token in each row", lambda: gpt.generate(t, 1, mask=mask)),
        (TypeError, "unexpected keyword argument 'heat'", lambda: gpt.generate(t, 1, heat=1)),
    ]  # fmt: skip
    for error, words, call in cases:
        with pytest.raises(error, match=words):
            call()
    assert gpt.training


def test_foreign_and_missing_keys_are_listed() -> None:
    state = GPT(small()).state_dict()
    state["odd"] = state.pop("norm.weight")
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"norm.weight".*Unexpected key.*"odd"'):
        GPT(small()).load_state_dict(state)
    with pytest.raises(ValueError, match=r"foreign \['odd'\]"):
        convert_state_dict("bert", {"odd": torch.zeros(1)})
    query = {"encoder.layer.0.attention.self.query.weight": torch.zeros(4, 4)}
    with pytest.raises(ValueError, match=r"missing \['encoder.layer.0.attention.self.key.weight'"):
        convert_state_dict("bert", query)
    with pytest.raises(ValueError, match="family must be one of bert, gpt2"):
        convert_state_dict("t5", {})
