"""``patch`` on Hugging Face models: parity with the stock blocks, what stays as it was, when stock must run.

Tiny models with random weights; nothing is downloaded. Our CPU kernels are forced, as stock is faster at
these sizes.
"""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bigkern
from bigkern import info
from bigkern.parity import compare

hf = pytest.importorskip("transformers")

from transformers.models.gpt2.modeling_gpt2 import GPT2MLP  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaMLP  # noqa: E402

from bigkern.integrations import transformers_blocks as blocks  # noqa: E402
from bigkern.integrations import transformers_parts as parts  # noqa: E402
from bigkern.integrations.transformers import enable  # noqa: E402

VOCABULARY, WIDTH, LENGTH = 61, 32, 12

BERT = {"hidden_size": WIDTH, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 48}
LLAMA = {**BERT, "num_key_value_heads": 2, "head_dim": 8}
LLAMA |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
DISTILBERT = {"dim": WIDTH, "n_heads": 4, "n_layers": 1, "hidden_dim": 48}
GPT2 = {"n_embd": WIDTH, "n_head": 4, "n_layer": 1, "bos_token_id": None, "eos_token_id": None}
T5 = {"d_model": WIDTH, "d_kv": 8, "num_heads": 4, "num_layers": 1, "d_ff": 48}
VIT = {**BERT, "image_size": 12, "patch_size": 4}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}


@dataclass
class Case:
    """A model class, its configuration, and how often its forward calls each of the two ops."""

    model: str
    config: dict[str, Any]
    ffn: int = 1
    rms: int = 0
    options: dict[str, Any] = field(default_factory=dict)  # that the op must be called with


KERNELS = {"layernorm_ffn": "cpu", "norm": "cpu"}
TORCH = dict.fromkeys(KERNELS, "torch")

POST = {"norm": "layer", "placement": "post", "residual": True, "activation": "gelu"}
BARE = {"norm": "none", "residual": False}
CASES = {
    "bert": Case("BertModel", BERT, options=POST),
    "roberta": Case("RobertaModel", {**BERT, "pad_token_id": 0}, options=POST),
    "electra": Case("ElectraModel", {**BERT, "embedding_size": 16}, options=POST),
    "distilbert": Case("DistilBertModel", DISTILBERT, options={**BARE, "activation": "gelu"}),
    "gpt2": Case("GPT2Model", GPT2, options={**BARE, "activation": "gelu_tanh"}),
    "gpt_neox": Case("GPTNeoXModel", BERT, options={**BARE, "activation": "gelu"}),
    "vit": Case("ViTModel", VIT, options={**BARE, "activation": "gelu"}),
    "vit_tanh": Case(
        "ViTModel", {**VIT, "hidden_act": "gelu_pytorch_tanh"}, options={"activation": "gelu_tanh"}
    ),
    "deit": Case("DeiTModel", VIT, options={**BARE, "activation": "gelu"}),
    "dinov2": Case("Dinov2Model", VIT, options={**BARE, "activation": "gelu"}),
    "dinov2_swiglu": Case(
        "Dinov2Model", {**VIT, "use_swiglu_ffn": True}, options={**BARE, "activation": "swiglu"}
    ),
    "llama": Case("LlamaModel", LLAMA, rms=3, options={**BARE, "activation": "swiglu"}),
    "llama_bias": Case(
        "LlamaModel",
        {**LLAMA, "mlp_bias": True, "hidden_act": "gelu"},
        rms=3,
        options={"activation": "geglu"},
    ),
    "mistral": Case("MistralModel", LLAMA, rms=3, options={**BARE, "activation": "swiglu"}),
    "phi3": Case("Phi3Model", LLAMA, rms=3, options={**BARE, "activation": "swiglu"}),
    "qwen2": Case("Qwen2Model", LLAMA, rms=3, options={**BARE, "activation": "swiglu"}),
    "qwen3": Case("Qwen3Model", LLAMA, rms=5, options={**BARE, "activation": "swiglu"}),
    "t5": Case(
        "T5EncoderModel",
        T5,
        rms=2,
        options={"norm": "rms", "placement": "pre", "residual": True, "activation": "relu"},
    ),
    "t5_gated": Case(
        "T5EncoderModel", {**T5, "feed_forward_proj": "gated-silu"}, rms=2, options={"activation": "swiglu"}
    ),
    "convnext": Case(
        "ConvNextModel", CONVNEXT, 2, options={"norm": "layer", "placement": "pre", "residual": False}
    ),
}


def build(name: str, cls: str | None = None, **options: Any) -> nn.Module:
    """A case's tiny model in eval mode, its weights large enough for every part to matter."""
    model_class = getattr(hf, cls or CASES[name].model)
    config = model_class.config_class
    vocabulary = {"vocab_size": VOCABULARY} if takes_text(model_class) else {}
    model = model_class(config(**vocabulary, **CASES[name].config, **options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def takes_text(model_class: type) -> bool:
    return model_class.main_input_name == "input_ids"


def inputs(model: nn.Module, padding: bool = False) -> dict[str, Tensor]:
    if not takes_text(type(model)):
        return {"pixel_values": torch.randn(2, 3, 12, 12, dtype=next(model.parameters()).dtype)}
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    if padding:
        mask[1, -5:] = 0
    return {"input_ids": torch.randint(3, VOCABULARY, (2, LENGTH)), "attention_mask": mask}


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
    monkeypatch.setattr(blocks, "layernorm_ffn", spy.of("layernorm_ffn"))
    monkeypatch.setattr(blocks, "rms_norm", spy.of("rms_norm"))
    with bigkern.use(**KERNELS):
        yield spy


pytestmark = [
    pytest.mark.skipif(info.import_error is not None, reason="the extension is not built"),
    pytest.mark.usefixtures("one_thread"),  # tiny tensors
]


# ---- parity ----------------------------------------------------------------------------------------


def run(model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The last hidden state, where there are tokens, and the gradient of every parameter that has one."""
    dtype = next(model.parameters()).dtype
    given = {key: x.to(dtype) if x.is_floating_point() else x for key, x in given.items()}
    o = model(**given).last_hidden_state
    if "attention_mask" in given:
        o = o[given["attention_mask"].bool()]
    model.zero_grad()
    o.backward(torch.randn(o.shape, generator=torch.Generator().manual_seed(2)).to(dtype))
    return o.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run_in_float64(model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The truth. Norms and softmax that ask for float32 would round it."""
    with mock.patch.object(torch, "float32", torch.float64):
        return run(copy.deepcopy(model).double(), given)


def assert_parity(eager: nn.Module, given: dict[str, Tensor]) -> None:
    """Output and gradients of the patched model, judged by those of the stock one.

    Every gradient counts by its own largest value, and all are judged as one vector: in a few numbers stock
    may be exact by luck. The gradient of a key's bias is 0 but for rounding, and says nothing.
    """
    output, gradients = run_in_float64(eager, given)
    stock_output, stock_gradients = run(eager, given)
    bigkern.patch(eager)
    our_output, our_gradients = run(eager, given)
    verdict = compare(our_output, output, stock_output)
    assert verdict.passed, verdict.problem

    assert our_gradients.keys() == stock_gradients.keys()
    largest = {name: x.abs().max() for name, x in gradients.items()}
    names = [name for name in gradients if largest[name] > 1e-9 * max(largest.values())]
    ours, reference, stock = (
        torch.cat([(of[name].double() / largest[name]).flatten() for name in names])
        for of in (our_gradients, gradients, stock_gradients)
    )
    verdict = compare(ours.to(our_output.dtype), reference, stock, gradient=True)
    assert verdict.passed, verdict.problem


@pytest.mark.parametrize("name", CASES)
def test_parity(name: str, calls: Spy) -> None:
    model = build(name)
    assert_parity(model, inputs(model))
    case = CASES[name]
    assert (calls.count("layernorm_ffn"), calls.count("rms_norm")) == (case.ffn, case.rms)
    assert all(call.items() >= case.options.items() for call in calls if call["op"] == "layernorm_ffn")


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "convnext"])
def test_parity_in_bfloat16(name: str, calls: Spy) -> None:
    model = build(name).bfloat16()
    assert_parity(model, inputs(model))
    assert calls.count("layernorm_ffn") == CASES[name].ffn


def test_parity_with_padding(calls: Spy) -> None:
    model = build("bert")
    assert_parity(model, inputs(model, padding=True))


def test_with_our_attention(calls: Spy) -> None:
    model = build("bert")
    given = inputs(model, padding=True)
    expected = model(**given).last_hidden_state
    bigkern.patch(enable(model))
    torch.testing.assert_close(model(**given).last_hidden_state, expected)


@pytest.mark.parametrize(("name", "cls"), [("gpt2", "GPT2LMHeadModel"), ("llama", "LlamaForCausalLM")])
def test_generation_is_the_same(name: str, cls: str, calls: Spy) -> None:
    model = build(name, cls)
    given = inputs(model)
    fixed = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**given, **fixed)
    bigkern.patch(model)
    assert torch.equal(model.generate(**given, **fixed), expected)
    assert calls


# ---- nothing but classes changes -------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_patch_and_unpatch(name: str) -> None:
    model = build(name)
    types = [type(m) for m in model.modules()]
    keys, parameters = list(model.state_dict()), list(model.parameters())
    report = bigkern.patch(model)
    ours = [type(m) for m in model.modules()]
    assert bigkern.patch(model) == report
    assert [t.__name__ for t in ours] == [t.__name__ for t in types]  # what wrapping policies go by
    assert all(issubclass(mine, stock) for mine, stock in zip(ours, types, strict=True))
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))

    ffn = [row for row in report if row.op == "layernorm_ffn"]
    assert len(ffn) == CASES[name].ffn
    assert all((row.backend, row.reason) == ("cpu", "runs this call") for row in ffn)
    rms = [row for row in report if row.op == "norm" and type(model.get_submodule(row.module)) in RMS_NORMS]
    assert len(rms) == CASES[name].rms + (name.startswith("t5"))  # T5's other norm is part of a block

    assert bigkern.unpatch(model) == report.patched
    assert [type(m) for m in model.modules()] == types
    assert not [key for m in model.modules() for key in m.__dict__ if "bigkern" in key]


RMS_NORMS = [cls for cls in blocks.BLOCKS.values() if issubclass(cls, blocks.RMSNorm)]


def test_every_block_has_a_case() -> None:
    covered = {type(m) for name in CASES for m in build(name).modules()}
    assert set(blocks.BLOCKS) <= covered


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "convnext"])
def test_copies_pickles_and_checkpoints(name: str, calls: Spy, tmp_path: Path) -> None:
    model = build(name)
    given = inputs(model)
    bigkern.patch(model)
    expected = model(**given).last_hidden_state
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(**given).last_hidden_state, expected)
        assert bigkern.unpatch(again) == bigkern.patch(model).patched
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not any(type(m) in blocks.BLOCKS.values() for m in loaded.modules())
    torch.testing.assert_close(loaded(**given).last_hidden_state, expected)


def test_a_subclass_is_left_alone_and_named() -> None:
    class Louder(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 10

    mlp = Louder(hf.LlamaConfig(hidden_size=WIDTH, intermediate_size=48))
    (row,) = bigkern.patch(mlp)
    assert type(mlp) is Louder
    assert (row.op, row.reason) == ("-", "a subclass of LlamaMLP: its forward may differ")


def test_another_version_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's layers are patched without its classes, and nobody else hears of them."""
    monkeypatch.setitem(sys.modules, "bigkern.integrations.transformers_blocks", None)
    with pytest.warns(UserWarning, match=r"BertModel: its feed-forward blocks need transformers 5\.17"):
        report = bigkern.patch(build("bert"))
    assert {row.op for row in report} == {"norm"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bigkern.patch(nn.LayerNorm(8))


def test_another_version_of_a_block(calls: Spy) -> None:
    mlp = build("vit").layers[0].mlp
    mlp.act, x = mlp.activation_fn, torch.randn(2, WIDTH)
    del mlp.activation_fn
    (row,) = bigkern.patch(mlp)
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


@pytest.mark.parametrize(
    ("name", "options"), [("bert", {}), ("distilbert", {}), ("t5", {"dropout_rate": 0.2})]
)
def test_dropout_is_the_models(name: str, options: dict[str, float], calls: Spy) -> None:
    model = build(name, **options).train()
    p = {"bert": (0.1, 0.0), "distilbert": (0.1, 0.0), "t5": (0.2, 0.2)}[name]
    bigkern.patch(model)
    given = inputs(model)
    a, b = (model(**given).last_hidden_state for _ in range(2))
    assert a.isfinite().all()
    assert not torch.equal(a, b)
    ffn = [call for call in calls if call["op"] == "layernorm_ffn"]
    assert all((call["dropout_p"], call["hidden_dropout_p"]) == p for call in ffn)
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
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    checkpointed = run(model, given)
    assert len(calls) > 2 * once
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
    "gpt2": ("h.0.mlp", (2, LENGTH, WIDTH)),
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
    y = torch.compile(block, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(y, block(x))
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


@pytest.mark.parametrize("change", STOCK, ids=lambda change: change.__name__)
def test_stock_runs(change: Callable[[Any], None], calls: Spy) -> None:
    """The same numbers as the stock block to the bit, and the report says why."""
    model = build("bert")
    change(model.encoder.layer[0])
    given = inputs(model)
    with bigkern.use(**TORCH):
        expected = model(**given).last_hidden_state
        report = bigkern.patch(model)
        assert torch.equal(model(**given).last_hidden_state, expected)
    assert not calls
    (row,) = [row for row in report if row.op == "layernorm_ffn"]
    assert (row.backend, row.reason) == ("torch", STOCK[change])


def test_stock_runs_under_autocast(calls: Spy) -> None:
    for name in ("bert", "llama"):
        model = build(name)
        given = inputs(model)
        with torch.autocast("cpu", torch.bfloat16), bigkern.use(**TORCH):
            expected = model(**given).last_hidden_state
            report = bigkern.patch(model)
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


@pytest.mark.parametrize(("name", "least"), [("bert", 32), ("gpt2", 512), ("llama", 512)])
def test_few_rows_are_stock_pytorchs(name: str, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a look at the block's parts, let alone a copy of them. Forcing a backend overrides it."""
    spy = Spy()
    monkeypatch.setattr(blocks, "layernorm_ffn", spy.of("layernorm_ffn"))
    model = build(name, use_cache=False)
    bigkern.patch(model)
    model(input_ids=torch.zeros(1, least - 1, dtype=torch.int64))
    assert not spy
    model(input_ids=torch.zeros(1, least, dtype=torch.int64))
    assert len(spy) == 1


def test_gate_and_up_are_not_joined_for_stock_pytorch() -> None:
    mlp = LlamaMLP(hf.LlamaConfig(hidden_size=WIDTH, intermediate_size=48))
    with bigkern.use(**TORCH):
        (row,) = bigkern.patch(mlp)
    assert row.reason == "stock PyTorch would run the op, and needs no joined weights"


def test_gate_and_up_are_joined_on_a_gpu_for_many_rows() -> None:
    """Asked of tensors that are nowhere: the rule takes what is not on a CPU for a GPU."""
    mlp = LlamaMLP(hf.LlamaConfig(hidden_size=WIDTH, intermediate_size=48)).to("meta")
    (row,) = bigkern.patch(mlp)
    assert row.reason == "tensors are on meta"
    x = torch.empty(2 * WIDTH - 1, WIDTH, device="meta")
    assert mlp(x).shape == x.shape
    reason = parts.joining_reason(mlp._parts(), x)
    assert reason == "joining gate and up costs more than fusing saves below 64 rows"


# ---- frozen weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["packed", "int8"])
@pytest.mark.parametrize("name", CASES)
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
