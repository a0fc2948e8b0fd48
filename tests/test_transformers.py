"""Hugging Face models on our attention: parity with their own eager one, generation, masks, refusals.

Tiny models with random weights; nothing is downloaded. A model runs three times: eager in float64, which is
the truth, eager in float32, whose error is allowed by the parity rule, and ours in float32.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any
from unittest import mock

import parity
import pytest
import torch
from torch import Tensor, nn

import bigkern
from bigkern.core.parity import Yardstick

hf = pytest.importorskip("transformers")

from transformers.masking_utils import sliding_window_causal_mask_function  # noqa: E402

from bigkern.patch.transformers import attention as ours  # noqa: E402

ours.register()

VOCABULARY, WIDTH, LENGTH, WINDOW = 61, 32, 20, 6
PADDED = 5  # tokens of the second sequence that are padding, where there is any

SPECIAL = {f"{name}_token_id": None for name in ("bos", "eos", "pad", "cls", "sep")}
BERT = {"hidden_size": WIDTH, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
LLAMA = {**BERT, "num_key_value_heads": 2, "head_dim": 8}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
QWEN = {**LLAMA, **SLIDING, "use_sliding_window": True}
GEMMA4 = {**LLAMA, **SLIDING, "num_hidden_layers": 4, "layer_types": SLIDING["layer_types"] * 2}
GEMMA4 |= {
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}
GEMMA4 |= {"global_head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
ENCODER = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
DECODER = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
STARTS = {"decoder_start_token_id": 1, "eos_token_id": None, "forced_eos_token_id": None}
BART = {"d_model": WIDTH, **ENCODER, **DECODER, **STARTS, "pad_token_id": 0, "max_position_embeddings": 64}
T5 = {"d_model": WIDTH, "d_kv": 8, "num_heads": 4, "num_layers": 2, "d_ff": 48, **STARTS}
OPT = {**BERT, "ffn_dim": 48, "word_embed_proj_dim": WIDTH, "pad_token_id": 0}
AUDIO = {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64}
VIT = {**BERT, "image_size": 24, "patch_size": 6}
SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 3}


@dataclass
class Case:
    """A model class, its configuration, what it takes, how often it attends, the class that generates."""

    model: str
    config: dict[str, Any]
    takes: str = "text"
    attends: int = 2
    generates: str = ""


CASES = {
    "bert": Case("BertModel", BERT),
    "roberta": Case("RobertaModel", {**BERT, "pad_token_id": 0}),
    "distilbert": Case("DistilBertModel", {"dim": WIDTH, "n_heads": 4, "n_layers": 2, "hidden_dim": 48}),
    "electra": Case("ElectraModel", {**BERT, "embedding_size": 16}),
    "albert": Case("AlbertModel", {**BERT, "embedding_size": 16}),
    "modernbert": Case("ModernBertModel", {**BERT, **SPECIAL, **SLIDING, "local_attention": 2 * WINDOW}),
    "gpt2": Case("GPT2Model", {"n_embd": WIDTH, "n_head": 4, "n_layer": 2}, generates="GPT2LMHeadModel"),
    "gpt_neox": Case("GPTNeoXModel", BERT, generates="GPTNeoXForCausalLM"),
    "opt": Case("OPTModel", OPT, generates="OPTForCausalLM"),
    "llama": Case("LlamaModel", LLAMA, generates="LlamaForCausalLM"),
    "mistral": Case("MistralModel", {**LLAMA, "sliding_window": WINDOW}, generates="MistralForCausalLM"),
    "mixtral": Case("MixtralModel", {**LLAMA, **EXPERTS, "sliding_window": WINDOW}),
    "qwen2": Case("Qwen2Model", QWEN, generates="Qwen2ForCausalLM"),
    "qwen3": Case("Qwen3Model", QWEN),
    "gemma2": Case(
        "Gemma2Model", {**LLAMA, **SLIDING, "attn_logit_softcapping": 2.0}, generates="Gemma2ForCausalLM"
    ),
    "gemma3_text": Case("Gemma3TextModel", {**LLAMA, **SLIDING}),
    "gemma4_text": Case("Gemma4TextModel", GEMMA4, attends=4),
    "gpt_oss": Case("GptOssModel", {**LLAMA, **SLIDING, **EXPERTS}, generates="GptOssForCausalLM"),
    "t5": Case("T5Model", T5, "pairs", 6, "T5ForConditionalGeneration"),
    "bart": Case("BartModel", BART, "pairs", 6, "BartForConditionalGeneration"),
    "marian": Case("MarianModel", BART, "pairs", 6, "MarianMTModel"),
    "whisper": Case("WhisperModel", {**BART, **AUDIO}, "audio", 6),
    "vit": Case("ViTModel", VIT, "images"),
    "deit": Case("DeiTModel", VIT, "images"),
    "beit": Case("BeitModel", {**VIT, "use_relative_position_bias": True}, "images"),
    "dinov2": Case("Dinov2Model", VIT, "images"),
    "swin": Case("SwinModel", {**SWIN, "image_size": 24, "patch_size": 2}, "images", 4),
}


def build(name: str, cls: str | None = None, **options: Any) -> nn.Module:
    """A case's tiny model, eager, in eval mode, its weights large enough for attention to matter."""
    model_class = getattr(hf, cls or CASES[name].model)
    vocabulary = {} if CASES[name].takes == "images" else {"vocab_size": VOCABULARY}
    config = model_class.config_class(**vocabulary, **CASES[name].config, **options)
    model = model_class._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def tokens(length: int, padding: str = "none") -> tuple[Tensor, Tensor]:
    """Two sequences and their mask; the second may end, or begin, with padding."""
    mask = torch.ones(2, length, dtype=torch.int64)
    if padding != "none":
        mask[1, slice(-PADDED, None) if padding == "right" else slice(None, PADDED)] = 0
    return torch.randint(3, VOCABULARY, (2, length)), mask


def inputs(takes: str, padding: str) -> tuple[dict[str, Tensor], Tensor | None]:
    """What the model is called with, and which of its outputs belong to tokens."""
    if takes == "images":
        return {"pixel_values": torch.randn(2, 3, 24, 24)}, None
    ids, mask = tokens(LENGTH, padding)
    if takes == "text":
        return {"input_ids": ids, "attention_mask": mask}, mask.bool()
    decoder_ids, decoder_mask = tokens(LENGTH - 7, padding)
    decoder = {"decoder_input_ids": decoder_ids, "decoder_attention_mask": decoder_mask}
    if takes == "audio":
        return {"input_features": torch.randn(2, 8, 24), **decoder}, decoder_mask.bool()
    return {"input_ids": ids, "attention_mask": mask, **decoder}, decoder_mask.bool()


def run(model: nn.Module, given: dict[str, Tensor], valid: Tensor | None) -> dict[str, Tensor]:
    """The last hidden state where there are tokens, and the gradients of all parameters."""
    dtype = next(model.parameters()).dtype
    given = {key: x.to(dtype) if x.is_floating_point() else x for key, x in given.items()}
    o = model(**given).last_hidden_state
    o = o if valid is None else o[valid]
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    model.zero_grad()
    o.backward(do)
    gradients = {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": o.detach(), **{name: x.clone() for name, x in gradients.items()}}


def run_in_float64(model: nn.Module, given: dict[str, Tensor], valid: Tensor | None) -> dict[str, Tensor]:
    """The truth. Many eager models ask softmax for float32, which would round it, and make NaN of padding."""
    softmax = nn.functional.softmax
    with mock.patch.object(nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim)):
        return run(copy.deepcopy(model).double(), given, valid)


class Spy(list[dict[str, Any]]):
    """Every call of our attention: its q, k and keyword arguments."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        self.append({"q": q, "k": k, **options})
        return bigkern.attention(q, k, v, **options)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy()
    monkeypatch.setattr(ours, "attention", spy)
    return spy


# ---- parity ----------------------------------------------------------------------------------------

PADDINGS = {"text": ("none", "left", "right"), "pairs": ("none", "left", "right"), "audio": ("none",)}
PARITY = [(name, p) for name, case in CASES.items() for p in PADDINGS.get(case.takes, ("none",))]


def assert_parity(eager: nn.Module, given: dict[str, Tensor], valid: Tensor | None = None) -> None:
    """Output and gradients of the model on our attention, judged by those of the eager one."""
    stock = copy.deepcopy(eager)
    yardstick = Yardstick(run_in_float64(eager, given, valid), lambda: run(stock, given, valid))
    parity.assert_parity("attention", "cpu", run(ours.enable(eager), given, valid), yardstick)


@pytest.mark.parametrize(("name", "padding"), PARITY)
def test_parity(name: str, padding: str, calls: Spy) -> None:
    assert_parity(build(name), *inputs(CASES[name].takes, padding))
    assert len(calls) == CASES[name].attends


@pytest.mark.parametrize("name", sorted(ours.CAUSAL_WINDOW | ours.BIDIRECTIONAL_WINDOW))
def test_a_window_needs_no_mask(name: str, calls: Spy) -> None:
    """Whoever stands in these sets is held to parity above, with its window and nothing else."""
    ours.enable(build(name))(**inputs("text", "none")[0])
    assert all(call["mask"] is None for call in calls)
    windows = [call["window"] for call in calls if call["window"] is not None]
    side = WINDOW if name in ours.BIDIRECTIONAL_WINDOW else WINDOW - 1
    assert windows
    assert all(window == (side, side) for window in windows)


@pytest.mark.parametrize(
    ("sizes", "none"),
    [
        ({"q_length": 12, "kv_length": 12}, True),
        ({"q_length": 12, "kv_length": 12, "attention_mask": torch.ones(1, 12, dtype=torch.bool)}, True),
        ({"q_length": 12, "kv_length": 12, "attention_mask": torch.arange(12)[None] > 0}, False),
        ({"q_length": 12, "kv_length": 12, "allow_is_causal_skip": False}, False),
        ({"q_length": 1, "kv_length": 12, "q_offset": 11}, False),
        ({"q_length": 4, "kv_length": 12, "q_offset": 8}, False),
        ({"q_length": 12, "kv_length": 12, "q_offset": torch.tensor(0)}, False),
    ],
)
def test_a_mask_that_the_window_replaces(sizes: dict[str, Any], none: bool) -> None:
    """It is None for a whole sequence only, without padding: else the layers cannot know who sees what."""
    rule = sliding_window_causal_mask_function(WINDOW)
    config = hf.MistralConfig(sliding_window=WINDOW)
    mask = ours.model_mask(1, **sizes, local_size=WINDOW, mask_function=rule, config=config)
    assert (mask is None) == none


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_packed_sequences(name: str, calls: Spy) -> None:
    """Positions that start again begin another sequence, which sees nothing of the one before."""
    places = torch.cat([torch.arange(12), torch.arange(LENGTH - 12)])[None]
    assert_parity(build(name, use_cache=False), {"input_ids": tokens(LENGTH)[0][:1], "position_ids": places})
    assert calls[0]["mask"] is not None


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_additive_mask(name: str, calls: Spy) -> None:
    mask = torch.randn(2, 1, LENGTH, LENGTH).masked_fill(torch.rand(LENGTH, LENGTH) < 0.3, -1e30)
    assert_parity(build(name), {"input_ids": tokens(LENGTH)[0], "attention_mask": mask})
    assert calls[0]["bias"] is not None


def test_a_mask_of_padding_alone_is_one_row(calls: Spy) -> None:
    ours.enable(build("bert"))(**inputs("text", "left")[0])
    assert calls[0]["mask"].stride(2) == 0


def test_grouped_heads_are_not_repeated(calls: Spy) -> None:
    ours.enable(build("llama"))(**inputs("text", "left")[0])
    assert calls[0]["q"].shape[1] == 4
    assert calls[0]["k"].shape[1] == 2


def test_autocast(calls: Spy) -> None:
    eager = build("llama")
    given, _ = inputs("text", "none")
    stock = copy.deepcopy(eager)

    @torch.no_grad()
    def output(model: nn.Module) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return {"output": model(**given).last_hidden_state}

    with torch.no_grad():
        exact = copy.deepcopy(eager).double()(**given).last_hidden_state
    mine = output(ours.enable(eager))
    assert calls[0]["q"].dtype == torch.bfloat16
    parity.assert_parity("attention", "cpu", mine, Yardstick({"output": exact}, lambda: output(stock)))


def test_dropout_is_the_models(calls: Spy) -> None:
    model = ours.enable(build("gpt2", attn_pdrop=0.25, resid_pdrop=0.0, embd_pdrop=0.0))
    given, _ = inputs("text", "none")
    a, b = (model(**given).last_hidden_state for _ in range(2))
    assert torch.equal(a, b)
    model.train()
    c, d = (model(**given).last_hidden_state for _ in range(2))
    assert not torch.equal(c, d)
    assert [call["dropout_p"] for call in calls] == [0.0] * 4 + [0.25] * 4


# ---- generation, compilation -----------------------------------------------------------------------


def generate(model: nn.Module, given: dict[str, Tensor], **options: Any) -> Tensor:
    given = {key: x for key, x in given.items() if not key.startswith("decoder")}
    fixed = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    return model.generate(**given, **fixed, **options)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.generates])
def test_generation_is_the_same(name: str, calls: Spy) -> None:
    """Greedy tokens by way of the cache, beyond the sliding window, from a padded batch."""
    model = build(name, CASES[name].generates)
    given, _ = inputs(CASES[name].takes, "left")
    expected = generate(model, given)
    assert torch.equal(generate(ours.enable(model), given), expected)
    assert calls[-1]["q"].shape[2] == 1
    assert calls[-1]["k"].shape[2] > 1


def test_generation_with_a_cache_longer_than_the_window() -> None:
    model = build("mistral", "MistralForCausalLM")
    given, _ = inputs("text", "none")
    expected = generate(model, given)
    assert torch.equal(generate(ours.enable(model), given, past_key_values=hf.DynamicCache()), expected)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_generation_with_a_static_cache(name: str, padding: str, calls: Spy) -> None:
    """Its keys are longer than what was written so far: the rest must stay unseen."""
    model = build(name, CASES[name].generates)
    given, _ = inputs("text", padding)
    expected = generate(model, given)
    assert torch.equal(generate(ours.enable(model), given, cache_implementation="static"), expected)
    assert calls[0]["k"].shape[2] > LENGTH or name != "llama"


@pytest.mark.parametrize("kept", [1, 3])
def test_queries_dropped_after_the_mask_is_made(kept: int) -> None:
    """Gemma 4 does so in a prefill, where its layers share keys: None would count from the wrong corner."""
    eager = build("gemma4_text", "Gemma4ForCausalLM")
    given, _ = inputs("text", "none")

    def logits(model: nn.Module) -> dict[str, Tensor]:
        cache = hf.StaticCache(config=model.config, max_cache_len=2 * LENGTH)
        return {"logits": model(**given, past_key_values=cache, logits_to_keep=kept).logits}

    stock = copy.deepcopy(eager)
    yardstick = Yardstick(logits(copy.deepcopy(eager).double()), lambda: logits(stock))
    parity.assert_parity("attention", "cpu", logits(ours.enable(eager)), yardstick)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_compiles_without_a_graph_break(padding: str) -> None:
    model = ours.enable(build("mistral", use_cache=False))
    given, _ = inputs("text", padding)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given).last_hidden_state, model(**given).last_hidden_state)


def test_exports() -> None:
    model = ours.enable(build("llama", use_cache=False))
    given, _ = inputs("text", "left")
    exported = torch.export.export(model, (), given).module()
    other, _ = inputs("text", "none")
    torch.testing.assert_close(exported(**other).last_hidden_state, model(**other).last_hidden_state)


# ---- what is refused, and what is taken back --------------------------------------------------------

SMALL = {**BERT, "vocab_size": VOCABULARY}
COMPUTES_ITSELF = {
    "BloomModel": {"hidden_size": WIDTH, "n_head": 4, "n_layer": 1, "vocab_size": VOCABULARY},
    "DebertaV2Model": SMALL,
    "XLNetModel": {"d_model": WIDTH, "n_head": 4, "n_layer": 1, "d_inner": 48, "vocab_size": VOCABULARY},
    "MPNetModel": SMALL,
    "FalconModel": SMALL,
}


@pytest.mark.parametrize("name", COMPUTES_ITSELF)
def test_refuses_a_model_that_would_not_listen(name: str) -> None:
    model_class = getattr(hf, name)
    model = model_class(model_class.config_class(**COMPUTES_ITSELF[name]))
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=f"{name} computes its attention itself"):
        ours.enable(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", ["BloomModel", "MPNetModel"])
def test_the_name_alone_cannot_make_a_model_wrong(name: str) -> None:
    """Such a model would add our boolean mask to its scores."""
    model_class = getattr(hf, name)
    config = model_class.config_class(**COMPUTES_ITSELF[name])
    model = model_class._from_config(config, attn_implementation="bigkern")
    with pytest.raises(ValueError, match="computes its attention itself"):
        model(**inputs("text", "right")[0])


def test_refuses_a_model_without_attention() -> None:
    model = hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4))
    with pytest.raises(ValueError, match="ConvNextModel has no attention"):
        ours.enable(model)


@pytest.mark.parametrize("function", [ours.enable, ours.disable])
def test_refuses_what_is_no_model(function: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a transformers\.PreTrainedModel, not Linear"):
        function(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ours.NOT_HONOURED)
def test_refuses_what_it_would_have_to_ignore(name: str) -> None:
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match=f"Linear needs {name}"):
        ours.layer_attention(nn.Linear(2, 2), q, q, q, None, **{name: q})


def test_disable_takes_it_back(calls: Spy) -> None:
    model = build("t5")  # encoder and decoder have configurations of their own
    given, _ = inputs("pairs", "right")
    assert ours.enable(ours.enable(model)) is model
    assert model.encoder.config._attn_implementation == "bigkern"
    assert copy.deepcopy(ours.disable(model)) is not model
    assert {model.config._attn_implementation, model.encoder.config._attn_implementation} == {"eager"}
    assert not [name for name in vars(model) if "bigkern" in name]
    model(**given)
    assert not calls
    ours.disable(model)


def test_parts_get_their_own_back() -> None:
    part = {**SMALL, "image_size": 24, "patch_size": 6}
    model = hf.CLIPModel(hf.CLIPConfig(text_config=part, vision_config=part, projection_dim=8))
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    ours.enable(model)
    assert model.text_model.config._attn_implementation == "bigkern"
    ours.disable(model)
    assert model.text_model.config._attn_implementation == "eager"
    assert model.vision_model.config._attn_implementation == "sdpa"


def test_attention_weights_are_not_stored(caplog: pytest.LogCaptureFixture) -> None:
    model = ours.enable(build("gpt2"))
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True
    assert model(**inputs("text", "none")[0], output_attentions=True).last_hidden_state is not None
