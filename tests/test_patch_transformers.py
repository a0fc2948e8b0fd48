"""``patch`` on Hugging Face models: parity with the stock blocks, what stays as it was, when stock must run.

Tiny models with random weights; nothing is downloaded. Our CPU kernels are forced, as stock is faster at
these sizes.
"""

from __future__ import annotations

import copy
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import parity
import pytest
import torch
from torch import Tensor, nn

import bigkern
from bigkern.core import info
from bigkern.core.parity import Yardstick

hf = pytest.importorskip("transformers")

from transformers.models.gpt2.modeling_gpt2 import GPT2MLP  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaMLP  # noqa: E402

from bigkern.patch.transformers import attention as integration  # noqa: E402
from bigkern.patch.transformers import blocks, forms, layers, parts  # noqa: E402

VOCABULARY, WIDTH, LENGTH = 61, 32, 12

BERT = {"hidden_size": WIDTH, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 48}
LLAMA = {**BERT, "num_key_value_heads": 2, "head_dim": 8}
LLAMA |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
DISTILBERT = {"dim": WIDTH, "n_heads": 4, "n_layers": 1, "hidden_dim": 48}
GPT2 = {"n_embd": WIDTH, "n_head": 4, "n_layer": 1, "bos_token_id": None, "eos_token_id": None}
STARTS = {"decoder_start_token_id": 1, "eos_token_id": None}
T5 = {"d_model": WIDTH, "d_kv": 8, "num_heads": 4, "num_layers": 1, "d_ff": 48, **STARTS}
BART = {"d_model": WIDTH, "max_position_embeddings": 64, "pad_token_id": 0, "forced_eos_token_id": None}
BART |= {"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, **STARTS}
BART |= {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
AUDIO = {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64}
OPT = {**BERT, "ffn_dim": 48, "word_embed_proj_dim": WIDTH, "pad_token_id": 0, "eos_token_id": None}
VIT = {**BERT, "image_size": 12, "patch_size": 4}
SWIN = {"embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 3, "patch_size": 2}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}


@dataclass
class Case:
    """A model class, its configuration, and how often its forward calls each of the ops."""

    model: str
    config: dict[str, Any]
    ffn: int = 1
    rms: int = 0
    add: int = 0  # LayerNorms that are one with the residual before them
    options: dict[str, Any] = field(default_factory=dict)  # that the feed-forward op must be called with
    generates: str = ""


KERNELS = {"layernorm_ffn": "cpu", "norm": "cpu"}

POST = {"norm": "layer", "placement": "post", "residual": True}
PRE = {"norm": "layer", "placement": "pre", "residual": True}
RMS = {**PRE, "norm": "rms"}
BARE = {"norm": "none", "residual": False}
GELU, TANH, RELU, SWIGLU = ({"activation": name} for name in ("gelu", "gelu_tanh", "relu", "swiglu"))
CASES = {
    "bert": Case("BertModel", BERT, add=1, options={**POST, **GELU}),
    "roberta": Case("RobertaModel", {**BERT, "pad_token_id": 0}, add=1, options={**POST, **GELU}),
    "electra": Case("ElectraModel", {**BERT, "embedding_size": 16}, add=1, options={**POST, **GELU}),
    "distilbert": Case("DistilBertModel", DISTILBERT, add=1, options={**POST, **GELU}),
    "gpt2": Case("GPT2Model", GPT2, options={**PRE, **TANH}, generates="GPT2LMHeadModel"),
    "gpt_neox": Case("GPTNeoXModel", BERT, options={**PRE, **GELU}, generates="GPTNeoXForCausalLM"),
    "gpt_neox_in_turn": Case("GPTNeoXModel", {**BERT, "use_parallel_residual": False}, options=PRE),
    "opt": Case("OPTModel", OPT, options={**PRE, **RELU}, generates="OPTForCausalLM"),
    "opt_post": Case("OPTModel", {**OPT, "do_layer_norm_before": False}, add=1, options=POST),
    "llama": Case("LlamaModel", LLAMA, rms=2, options={**RMS, **SWIGLU}, generates="LlamaForCausalLM"),
    "llama_bias": Case(
        "LlamaModel",
        {**LLAMA, "mlp_bias": True, "hidden_act": "gelu"},
        rms=2,
        options={"activation": "geglu"},
    ),
    "mistral": Case("MistralModel", LLAMA, rms=2, options={**RMS, **SWIGLU}, generates="MistralForCausalLM"),
    "phi3": Case("Phi3Model", LLAMA, rms=3, options={**BARE, **SWIGLU}),
    "qwen2": Case("Qwen2Model", LLAMA, rms=2, options={**RMS, **SWIGLU}, generates="Qwen2ForCausalLM"),
    "qwen3": Case("Qwen3Model", LLAMA, rms=4, options={**RMS, **SWIGLU}),
    "t5": Case("T5Model", T5, 2, 5, options={**RMS, **RELU}, generates="T5ForConditionalGeneration"),
    "t5_gated": Case("T5Model", {**T5, "feed_forward_proj": "gated-silu"}, 2, 5, options=SWIGLU),
    "bart": Case(
        "BartModel", BART, 2, add=3, options={**POST, **GELU}, generates="BartForConditionalGeneration"
    ),
    "whisper": Case(
        "WhisperModel", {**BART, **AUDIO}, 2, options=PRE, generates="WhisperForConditionalGeneration"
    ),
    "vit": Case("ViTModel", VIT, options={**PRE, **GELU}),
    "vit_tanh": Case("ViTModel", {**VIT, "hidden_act": "gelu_pytorch_tanh"}, options=TANH),
    "deit": Case("DeiTModel", VIT, options={**PRE, **GELU}),
    "dinov2": Case("Dinov2Model", VIT, options={**BARE, **GELU}),
    "dinov2_swiglu": Case("Dinov2Model", {**VIT, "use_swiglu_ffn": True}, options={**BARE, **SWIGLU}),
    "swin": Case("SwinModel", {**SWIN, "image_size": 12}, 3, options={**BARE, **GELU}),
    "convnext": Case("ConvNextModel", CONVNEXT, 2, options={**PRE, "residual": False}),
    "resnet": Case("ResNetModel", RESNET, 0),
}


def build(name: str, cls: str | None = None, **options: Any) -> nn.Module:
    """A case's tiny model, eager, in eval mode, its weights large enough for every part to matter."""
    model_class = getattr(hf, cls or CASES[name].model)
    vocabulary = {"vocab_size": VOCABULARY} if model_class.main_input_name != "pixel_values" else {}
    config = model_class.config_class(**vocabulary, **CASES[name].config, **options)
    model = model_class._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def inputs(model: nn.Module, padding: str = "right") -> dict[str, Tensor]:
    """What the model takes; of two sequences the second ends, or begins, with padding."""
    kind, dtype = model.main_input_name, next(model.parameters()).dtype
    if kind == "pixel_values":
        return {kind: torch.randn(2, 3, 12, 12, dtype=dtype)}
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, slice(-5, None) if padding == "right" else slice(None, 5)] = 0
    given = {"input_ids": torch.randint(3, VOCABULARY, (2, LENGTH)), "attention_mask": mask}
    if kind == "input_features":
        given = {kind: torch.randn(2, 8, 24, dtype=dtype)}
    if model.config.is_encoder_decoder:
        given |= {"decoder_input_ids": torch.randint(3, VOCABULARY, (2, 7))}
    return given


class Spy(list[dict[str, Any]]):
    """Every call of our two ops by the blocks: its name and its keyword arguments."""

    def of(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.append({"op": name, **options})
            return getattr(bigkern, name)(*args, **options)

        return call

    def count(self, name: str) -> int:  # type: ignore[override]
        return sum(call["op"] == name for call in self)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    """What the blocks call, with our CPU kernels forced."""
    spy = Spy()
    for op in ("layernorm_ffn", "rms_norm", "layer_norm"):
        monkeypatch.setattr(forms, op, spy.of(op))
    monkeypatch.setattr(integration, "attention", spy.of("attention"))
    with bigkern.use(**KERNELS):
        yield spy


pytestmark = [
    pytest.mark.usefixtures("undeclined"),
    pytest.mark.skipif(info.import_error is not None, reason="the extension is not built"),
    pytest.mark.usefixtures("one_thread"),  # tiny tensors
]


# ---- parity ----------------------------------------------------------------------------------------


def run(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The last hidden state, where there are tokens, and the gradient of every parameter that has one."""
    dtype = next(model.parameters()).dtype
    given = {key: x.to(dtype) if x.is_floating_point() else x for key, x in given.items()}
    o = model(**given).last_hidden_state
    if "attention_mask" in given and "decoder_input_ids" not in given:
        o = o[given["attention_mask"].bool()]
    model.zero_grad()
    o.backward(torch.randn(o.shape, generator=torch.Generator().manual_seed(2)).to(dtype))
    gradients = {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": o.detach(), **{name: x.clone() for name, x in gradients.items()}}


def run_in_float64(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The truth. Norms and softmax that ask for float32 would round it."""
    with mock.patch.object(torch, "float32", torch.float64):
        return run(copy.deepcopy(model).double(), given)


def assert_parity(eager: nn.Module, given: dict[str, Tensor]) -> None:
    """Output and gradients of the patched model, judged by those of the stock one."""
    stock = copy.deepcopy(eager)
    yardstick = Yardstick(run_in_float64(eager, given), lambda: run(stock, given))
    bigkern.patch(eager)
    parity.assert_parity("patch", "cpu", run(eager, given), yardstick)


@pytest.mark.parametrize("name", CASES)
def test_parity(name: str, calls: Spy) -> None:
    """Of the whole model, padded, on all our ops at once, which are called as often as the report says."""
    model = build(name)
    assert_parity(model, inputs(model))
    case = CASES[name]
    counts = [calls.count(op) for op in ("layernorm_ffn", "rms_norm", "layer_norm")]
    assert counts == [case.ffn, case.rms, case.add]
    assert all(call.items() >= case.options.items() for call in calls if call["op"] == "layernorm_ffn")
    assert calls.count("attention") == sum(row.op == "attention" for row in bigkern.patch(model))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5_gated", "whisper", "convnext"])
def test_parity_in_bfloat16(name: str, calls: Spy) -> None:
    """Of smooth activations: the gradient of relu jumps with the sign of a rounded number."""
    model = build(name).bfloat16()
    assert_parity(model, inputs(model))
    assert calls.count("layernorm_ffn") == CASES[name].ffn


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.generates])
def test_generation_is_the_same(name: str, calls: Spy) -> None:
    """Greedy tokens by way of the cache, from a padded batch."""
    model = build(name, CASES[name].generates)
    given = {key: x for key, x in inputs(model, "left").items() if "decoder" not in key}
    fixed = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**given, **fixed)
    with bigkern.patch(model):
        assert torch.equal(model.generate(**given, **fixed), expected)
    assert calls.count("layernorm_ffn")
    assert calls.count("attention") >= 8


COMPUTES_ITSELF = {
    "BloomModel": {"hidden_size": WIDTH, "n_head": 4, "n_layer": 1, "vocab_size": VOCABULARY},
    "DebertaV2Model": {**BERT, "vocab_size": VOCABULARY},
    "XLNetModel": {"d_model": WIDTH, "n_head": 4, "n_layer": 1, "d_inner": 48, "vocab_size": VOCABULARY},
    "MPNetModel": {**BERT, "vocab_size": VOCABULARY},
    "FalconModel": {**BERT, "vocab_size": VOCABULARY},
}


# ---- nothing but classes changes -------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_patch_and_unpatch(name: str) -> None:
    model = build(name)
    types = [type(m) for m in model.modules()]
    keys, parameters = list(model.state_dict()), list(model.parameters())
    report = bigkern.patch(model, strict=True)
    ours = [type(m) for m in model.modules()]
    assert bigkern.patch(model) == report
    assert [t.__name__ for t in ours] == [t.__name__ for t in types]  # what wrapping policies go by
    assert all(issubclass(mine, stock) for mine, stock in zip(ours, types, strict=True))
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))

    known = {row.module for row in report}
    assert known >= {n for n, m in model.named_modules() if re.search("Attention|Norm", type(m).__name__)}

    assert all(row.backend == "cpu" for row in report if row.op in ("layernorm_ffn", "attention"))
    assert all(row.reason for row in report)

    assert bigkern.unpatch(model) == report.patched
    assert [type(m) for m in model.modules()] == types
    assert not [key for m in model.modules() for key in m.__dict__ if "bigkern" in key]
    assert model.config._attn_implementation == "eager"


def test_every_block_has_a_case() -> None:
    covered = {type(m) for name in CASES for m in build(name).modules()}
    assert {stock for table in blocks.BLOCKS.values() for stock in table} | set(layers.LAYERS) <= covered


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "whisper", "convnext"])
def test_copies_pickles_and_checkpoints(name: str, calls: Spy, tmp_path: Path) -> None:
    model = build(name)
    given = inputs(model)
    bigkern.patch(model)
    expected = model(**given).last_hidden_state
    pickled = pickle.dumps(model)
    integration.AttentionInterface._global_mapping.pop("bigkern", None)  # as in a process of its own
    for again in (pickle.loads(pickled), copy.deepcopy(model)):
        assert torch.equal(again(**given).last_hidden_state, expected)
        assert bigkern.unpatch(again) == bigkern.patch(model).patched
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not any(type(m).__module__.startswith("bigkern") for m in loaded.modules())
    assert loaded.config._attn_implementation != "bigkern"
    torch.testing.assert_close(loaded(**given).last_hidden_state, expected)


@pytest.mark.parametrize("name", ["bert", "gpt2", "bart"])
def test_hidden_states_are_recorded(name: str, calls: Spy) -> None:
    model = build(name)
    given = inputs(model)
    expected = model(**given, output_hidden_states=True)
    bigkern.patch(model)
    mine = model(**given, output_hidden_states=True)
    states = [key for key in expected if key.endswith("hidden_states")]
    assert states
    assert [len(mine[key]) for key in states] == [len(expected[key]) for key in states]
    torch.testing.assert_close(mine[states[0]], expected[states[0]])


@pytest.mark.parametrize("name", COMPUTES_ITSELF)
def test_a_model_that_computes_its_attention_itself(name: str) -> None:
    """Its attention is left alone, with the reason; strict, everything is."""
    model_class = getattr(hf, name)
    model = model_class(model_class.config_class(**COMPUTES_ITSELF[name])).eval()
    given, before = {"input_ids": torch.randint(3, 50, (2, LENGTH))}, model.config._attn_implementation
    types = [type(m) for m in model.modules()]
    expected = model(**given).last_hidden_state
    with pytest.raises(ValueError, match=f"{name} computes its attention itself"):
        bigkern.patch(model, strict=True)
    assert [type(m) for m in model.modules()] == types
    report = bigkern.patch(model)
    assert [row for row in report.left if f"{name} computes its attention itself" in row.reason]
    assert model.config._attn_implementation == before
    torch.testing.assert_close(model(**given).last_hidden_state, expected)


def test_a_model_that_is_asked_for_attention_weights() -> None:
    model = build("bert")
    model.config.output_attentions = True
    (row,) = bigkern.patch(model).left
    assert row.reason == "the configuration of BertModel asks for attention weights"
    assert model(**inputs(model)).attentions[0] is not None


def test_models_of_one_configuration() -> None:
    """Patching one leaves the others alone."""
    config = hf.T5Config(**T5, vocab_size=VOCABULARY)
    stock, patched = hf.T5Model(config), hf.T5Model(config)
    assert stock.config is patched.config
    bigkern.patch(patched)
    assert patched.decoder.config._attn_implementation == "bigkern"
    assert {stock.config._attn_implementation, config._attn_implementation} == {"sdpa"}


def test_a_part_of_a_model() -> None:
    """Its layers are patched; its attention is chosen by the model around it."""
    model = build("gpt2")
    report = {row.module: row for row in bigkern.patch(model.h[0])}
    assert report["attn"].reason == "its model chooses its attention: patch that"
    assert report["(model)"].op == "layernorm_ffn"
    assert model.config._attn_implementation == "eager"


def test_a_model_of_which_a_part_is_compiled() -> None:
    model = build("bert")
    model.encoder.layer[0].compile()
    report = {row.module: row for row in bigkern.patch(model)}
    for name in ("encoder.layer.0", "encoder.layer.0.attention.self"):
        assert report[name].reason == "compiled already: patch the model, then compile it"
    assert report["embeddings.LayerNorm"].op == "norm"
    assert model.config._attn_implementation == "eager"


def test_a_subclass_is_left_alone_and_named() -> None:
    class Louder(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 10

    mlp = Louder(hf.LlamaConfig(hidden_size=WIDTH, intermediate_size=48))
    (row,) = bigkern.patch(mlp).left
    assert type(mlp) is Louder
    assert (row.op, row.reason) == ("-", "a subclass of LlamaMLP: its forward may differ")


def test_another_version_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's layers are patched without its classes, and nobody else hears of them."""
    monkeypatch.setitem(sys.modules, "bigkern.patch.transformers.blocks", None)
    with pytest.warns(UserWarning, match=r"BertModel: its attention and blocks need transformers 5\.17"):
        report = bigkern.patch(build("bert"))
    assert {row.op for row in report} == {"norm", "linear", "-"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bigkern.patch(nn.LayerNorm(8))


def test_another_version_of_a_block(calls: Spy) -> None:
    mlp = build("vit").layers[0].mlp
    mlp.act, x = mlp.activation_fn, torch.randn(2, WIDTH)
    del mlp.activation_fn
    row, *_ = bigkern.patch(mlp)
    assert row.op == "layernorm_ffn"
    assert row.reason.startswith("another version of transformers builds it otherwise")
    with pytest.raises(AttributeError, match="activation_fn"):  # by the stock forward, which runs
        mlp(x)
    assert not calls


# ---- training --------------------------------------------------------------------------------------


def test_dropout() -> None:
    """Drawn anew in every call, of the right mean, and none in eval mode."""
    mlp = GPT2MLP(48, hf.GPT2Config(n_embd=WIDTH, resid_pdrop=0.25))
    x = torch.randn(1, LENGTH, WIDTH)
    bigkern.patch(mlp)
    with torch.no_grad(), bigkern.use(layernorm_ffn="cpu"):
        expected = mlp.eval()(x)
        draws = torch.stack([mlp.train()(x) for _ in range(200)])
    assert not torch.equal(draws[0], draws[1])
    assert abs(float((draws == 0).double().mean()) - 0.25) < 0.01
    assert float((draws.mean(0) - expected).abs().max()) < 6 * float(expected.abs().max()) / (3 * 200) ** 0.5


DROPOUT = {  # what the configuration says, and the op's dropout_p and hidden_dropout_p
    "bert": ({}, (0.1, 0.0)),
    "distilbert": ({}, (0.1, 0.0)),
    "gpt2": ({"resid_pdrop": 0.3}, (0.3, 0.0)),
    "vit": ({"hidden_dropout_prob": 0.3}, (0.3, 0.0)),
    "t5": ({"dropout_rate": 0.2}, (0.2, 0.2)),
    "bart": ({"dropout": 0.3, "activation_dropout": 0.2}, (0.3, 0.2)),
}


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_is_the_models(name: str, calls: Spy) -> None:
    options, p = DROPOUT[name]
    model = build(name, **options).train()
    bigkern.patch(model)
    given = inputs(model)
    a, b = (model(**given).last_hidden_state for _ in range(2))
    assert a.isfinite().all()
    assert not torch.equal(a, b)
    ffn = [call for call in calls if call["op"] == "layernorm_ffn"]
    assert all((call["dropout_p"], call["hidden_dropout_p"]) == p for call in ffn)
    assert all(
        call["dropout_p"] == p[0] for call in calls if call["op"] == "layer_norm" and name != "distilbert"
    )
    a.sum().backward()


WITHOUT_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "t5": {"dropout_rate": 0.0},
}


@pytest.mark.parametrize("name", WITHOUT_DROPOUT)
def test_gradient_checkpointing(name: str, calls: Spy) -> None:
    model = build(name, **WITHOUT_DROPOUT[name])
    given = inputs(model)
    bigkern.patch(model.train())
    plain = run(model, given)
    once = len(calls)
    model.gradient_checkpointing_enable()
    checkpointed = run(model, given)
    assert len(calls) > 2 * once + once // 2
    torch.testing.assert_close(checkpointed, plain)


def test_feed_forward_in_chunks(calls: Spy) -> None:
    for name in ("bert", "distilbert"):
        model = build(name)
        given = inputs(model)
        bigkern.patch(model)
        whole = model(**given).last_hidden_state
        for module in model.modules():
            if hasattr(module, "chunk_size_feed_forward"):
                module.chunk_size_feed_forward = 4
        calls.clear()
        torch.testing.assert_close(model(**given).last_hidden_state, whole)
        assert calls.count("layernorm_ffn") == LENGTH // 4


BLOCK_INPUTS = {
    "bert": ("encoder.layer.0", (2, LENGTH, WIDTH)),
    "gpt2": ("h.0", (2, LENGTH, WIDTH)),
    "bart": ("encoder.layers.0", (2, LENGTH, WIDTH)),
    "llama": ("layers.0.mlp", (2, LENGTH, WIDTH)),
    "t5": ("encoder.block.0.layer.1", (2, LENGTH, WIDTH)),
    "convnext": ("encoder.stages.0.layers.0", (2, 8, 6, 6)),
}


@pytest.mark.parametrize("name", BLOCK_INPUTS)
def test_compiles_without_a_graph_break(name: str, calls: Spy) -> None:
    path, shape = BLOCK_INPUTS[name]
    block, x = build(name).get_submodule(path), torch.randn(shape, requires_grad=True)
    bigkern.patch(block)
    nodes = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    torch._dynamo.reset()
    mask = {"attention_mask": None} if name == "bart" else {}
    y = torch.compile(block, fullgraph=True, backend=backend)(x, **mask)
    torch.testing.assert_close(y, block(x, **mask))
    y.sum().backward()
    assert any(node.startswith("bigkern.layernorm_ffn") for node in nodes)


# ---- when the stock forward runs -------------------------------------------------------------------


class LoRA(nn.Linear):
    """Stands for any linear layer whose forward is not nn.Linear's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def hook(layer: Any) -> None:
    layer.output.dense.register_forward_hook(lambda *_: None)


def hook_inner(layer: Any) -> None:
    layer.intermediate.register_forward_pre_hook(lambda *_: None)


def replace_forward(layer: Any) -> None:
    layer.output.dense.forward = layer.output.dense.forward


def adapt(layer: Any) -> None:
    layer.intermediate.dense.__class__ = LoRA


def swap_output(layer: Any) -> None:
    layer.output.__class__ = type("OtherOutput", (type(layer.output),), {})


def swap_activation(layer: Any) -> None:
    layer.intermediate.intermediate_act_fn = hf.activations.ACT2FN["quick_gelu"]


def swap_norm(layer: Any) -> None:
    layer.output.LayerNorm.__class__ = type("OtherNorm", (nn.LayerNorm,), {})


def quantise(layer: Any) -> None:
    class Packed(nn.Parameter):
        pass

    layer.output.dense.weight = Packed(layer.output.dense.weight.detach())


def drop_everything(layer: Any) -> None:
    layer.output.dropout.p = 1.0
    layer.output.dropout.train()


def swap_dropout(layer: Any) -> None:
    layer.output.dropout = nn.AlphaDropout(0.5).eval()


STOCK = {
    hook: "a hook watches a part of the feed-forward block",
    hook_inner: "a hook watches a part of the feed-forward block",
    replace_forward: "a hook watches a part of the feed-forward block",
    adapt: "a LoRA in the place of a linear layer",
    swap_output: "intermediate is a BertIntermediate, output a OtherOutput",
    swap_activation: "an activation that the op does not have",
    swap_norm: "the norm is a OtherNorm",
    quantise: "a parameter is a Packed",
    drop_everything: "a dropout that drops everything",
    swap_dropout: "a dropout is not a plain nn.Dropout",
}


FFN_ONLY = {"ops": "layernorm_ffn"}


@pytest.mark.parametrize("change", STOCK, ids=lambda change: change.__name__)
def test_stock_runs(change: Callable[[Any], None], calls: Spy) -> None:
    """The same numbers as the stock block to the bit, and the report says why."""
    model = build("bert")
    change(model.encoder.layer[0])
    given = inputs(model)
    expected = model(**given).last_hidden_state
    report = bigkern.patch(model, **FFN_ONLY)
    assert torch.equal(model(**given).last_hidden_state, expected)
    assert not calls
    (row,) = [row for row in report if row.op == "layernorm_ffn"]
    assert (row.backend, row.reason, row.refused) == ("torch", STOCK[change], True)


def hook_norm(layer: Any) -> None:
    layer.ln_2.register_forward_hook(lambda *_: None)


def hook_mlp(layer: Any) -> None:
    layer.mlp.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("change", [hook_norm, hook_mlp])
def test_a_layer_that_cannot_be_one_op_calls_its_block(change: Callable[[Any], None], calls: Spy) -> None:
    model = build("gpt2")
    change(model.h[0])
    given = inputs(model)
    expected = model(**given).last_hidden_state
    report = {row.module: row for row in bigkern.patch(model)}
    assert report["h.0"].reason == "a hook watches a part of the feed-forward block"
    torch.testing.assert_close(model(**given).last_hidden_state, expected)
    assert [call["norm"] for call in calls if call["op"] == "layernorm_ffn"] == ["none"]


def test_another_version_of_a_layer(monkeypatch: pytest.MonkeyPatch, calls: Spy) -> None:
    """Its forward uses other names than the one that ours was written after."""
    assert not any(ours.unread for ours in layers.LAYERS.values())
    monkeypatch.setattr(layers.GPT2Block, "unread", True)
    model = build("gpt2")
    report = {row.module: row for row in bigkern.patch(model)}
    assert report["h.0"].reason.startswith("another version of transformers")
    model(**inputs(model))
    assert [call["norm"] for call in calls if call["op"] == "layernorm_ffn"] == ["none"]


def test_float16_is_clamped_by_stock() -> None:
    (layer,) = build("whisper").half().encoder.layers
    (row,) = [row for row in bigkern.patch(layer) if row.op == "layernorm_ffn"]
    assert row.reason == "its output is clamped in float16"


def test_stock_runs_under_autocast(calls: Spy) -> None:
    for name in ("bert", "llama"):
        model = build(name)
        given = inputs(model)
        with torch.autocast("cpu", torch.bfloat16), bigkern.use(layernorm_ffn="torch", norm="torch"):
            expected = model(**given).last_hidden_state
            report = bigkern.patch(model, ops=("norm", "layernorm_ffn"))
            assert torch.equal(model(**given).last_hidden_state, expected)
        assert not calls
        assert "autocast is on" in {row.reason for row in report}


def test_stock_runs_where_dtypes_differ(calls: Spy) -> None:
    model = build("llama").bfloat16()
    model.norm.float()
    model.layers[0].mlp.float()
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.bfloat16)
    expected = model.norm(x)
    report = {row.module: row for row in bigkern.patch(model)}
    assert torch.equal(model.norm(x), expected)
    assert model.norm(x).dtype == torch.float32
    assert not calls
    assert report["layers.0.mlp"].op == "layernorm_ffn"


def test_a_gated_activation_that_the_op_does_not_have(calls: Spy) -> None:
    model = build("t5", feed_forward_proj="gated-gelu")
    report = {row.op: row.reason for row in bigkern.patch(model)}
    assert report["layernorm_ffn"] == "an activation that the op does not have"
    model(**inputs(model))
    assert not calls.count("layernorm_ffn")


@pytest.mark.parametrize(("name", "least"), [("bert", 2), ("gpt2", 2), ("llama", 512)])
def test_few_rows_are_stock_pytorchs(name: str, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a look at the block's parts, let alone a copy of them. Forcing a backend overrides it."""
    spy = Spy()
    monkeypatch.setattr(forms, "layernorm_ffn", spy.of("layernorm_ffn"))
    model = build(name, use_cache=False)
    bigkern.patch(model)
    model(input_ids=torch.zeros(1, least - 1, dtype=torch.int64))
    assert not spy
    model(input_ids=torch.zeros(1, least, dtype=torch.int64))
    assert len(spy) == 1


def test_gate_and_up_are_not_joined_for_stock_pytorch() -> None:
    mlp = LlamaMLP(hf.LlamaConfig(hidden_size=WIDTH, intermediate_size=48))
    with bigkern.use(layernorm_ffn="torch"):
        row, *_ = bigkern.patch(mlp)
    assert row.reason == "stock PyTorch would run the op, and needs no joined weights"


def test_gate_and_up_are_joined_on_a_gpu_for_many_rows() -> None:
    """Asked of tensors that are nowhere: the rule takes what is not on a CPU for a GPU."""
    mlp = LlamaMLP(hf.LlamaConfig(hidden_size=WIDTH, intermediate_size=48)).to("meta")
    row, *_ = bigkern.patch(mlp)
    assert row.reason == "tensors are on meta"
    x = torch.empty(2 * WIDTH - 1, WIDTH, device="meta")
    assert mlp(x).shape == x.shape
    reason = parts.joining_reason(mlp._parts(), x)
    assert reason == "joining gate and up costs more than fusing saves below 64 rows"


# ---- frozen weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["packed", "int8"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.ffn])
def test_freeze(name: str, weights: str) -> None:
    """The patched model frozen is the model, within the error of its weights; unpatch leaves the blocks."""
    model = build(name)
    given = inputs(model)
    with torch.no_grad():
        before = model(**given)[0]
        bigkern.patch(model)
        report = bigkern.freeze(model, weights)  # type: ignore[arg-type]
        assert report.patched == CASES[name].ffn
        assert all(row.op == "frozen_layernorm_ffn" for row in report)
        after = model(**given)[0]
        error = float((after - before).norm() / before.norm())
        assert error < (1e-5 if weights == "packed" else 0.03)
        assert weights == "packed" or error > 1e-6
        bigkern.unpatch(model)
        assert torch.allclose(model(**given)[0], after, rtol=1e-4, atol=1e-4)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**given)[0], model(**given)[0])
    assert bigkern.freeze(bigkern_patched(model), weights).patched == 0  # type: ignore[arg-type]


def bigkern_patched(model: nn.Module) -> nn.Module:
    bigkern.patch(model)
    return model


def test_other_linear_layers_do_not_stop_the_report() -> None:
    """Such as torch.ao's quantised ones, whose weight is a method."""

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = [nn.Linear(32, 32)]

        def weight(self) -> Tensor:
            return self.inner[0].weight

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[0](x)

    config = hf.ViTConfig(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1)
    model = hf.ViTModel(config).eval()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, Quantised())
    assert bigkern.patch(model).patched > 0
