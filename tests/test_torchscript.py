"""TorchScript: traced and scripted models of ours are stock's, saved, loaded and trained as those."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigkern

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:.*nested.*:UserWarning"
)

D = 32


class SelfAttention(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.inner = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class First(nn.Module):
    """The first result of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, 4, 64, 0.0, batch_first=True), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x)


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, 4, 64, 0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


SEQUENCES, ROWS, IMAGES = (4, 200, D), (6, D), (2, 3, 16, 16)

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Sequential(nn.Linear(D, 2 * D), nn.Linear(2 * D, D)), SEQUENCES),
    "norms": (lambda: nn.Sequential(nn.LayerNorm(D), nn.RMSNorm(D)), SEQUENCES),
    "MultiheadAttention": (lambda: SelfAttention(nn.MultiheadAttention(D, 4, batch_first=True)), SEQUENCES),
    "post-norm encoder": (encoder, SEQUENCES),
    "pre-norm encoder": (lambda: encoder(norm_first=True, activation="gelu"), SEQUENCES),
    "decoder": (Decoder, SEQUENCES),
    "LSTM": (lambda: First(nn.LSTM(D, D, 2)), SEQUENCES),
    "GRU": (lambda: First(nn.GRU(D, D, bidirectional=True)), SEQUENCES),
    "RNN": (lambda: First(nn.RNN(D, D)), SEQUENCES),
    "LSTMCell": (lambda: First(nn.LSTMCell(D, D)), ROWS),
    "GRUCell": (lambda: nn.Sequential(nn.GRUCell(D, D)), ROWS),
    "RNNCell": (lambda: nn.Sequential(nn.RNNCell(D, D)), ROWS),
    "BatchNorm2d": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), IMAGES),
}


def saved_and_loaded(program: Any) -> Any:
    file = io.BytesIO()
    torch.jit.save(program, file)
    file.seek(0)
    return torch.jit.load(file)


def gradients(model: Any, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def compare(ours: Any, stock: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(ours, x), gradients(stock, x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_a_patched_model_in_training_is_traced_saved_and_loaded(name: str) -> None:
    make, shape = MODELS[name]
    stock, x = make(), torch.randn(shape)
    patched = copy.deepcopy(stock)
    bigkern.patch(patched)
    compare(saved_and_loaded(torch.jit.trace(patched, x)), stock, x)


@pytest.mark.parametrize("name", MODELS)
def test_a_patched_model_is_traced_for_inference(name: str) -> None:
    make, shape = MODELS[name]
    stock, x = make().eval(), torch.randn(shape)
    patched = copy.deepcopy(stock)
    bigkern.patch(patched)
    with torch.no_grad():
        program = saved_and_loaded(torch.jit.trace(patched, x))
        torch.testing.assert_close(program(x), stock(x), rtol=1e-4, atol=1e-5)
    kinds = {node.kind() for node in program.inlined_graph.nodes()}
    assert not any("bigkern" in kind for kind in kinds), "a program that needs bigkern to be loaded"


@pytest.mark.parametrize("name", MODELS)
def test_a_patched_model_scripts_as_the_stock_layers(name: str) -> None:
    make, shape = MODELS[name]
    stock, x = make(), torch.randn(shape)
    patched = copy.deepcopy(stock)
    bigkern.patch(patched)
    compare(saved_and_loaded(torch.jit.script(patched)), stock, x)
    compare(patched, stock, x)


def test_layers_of_ours_script_as_the_stock_layers() -> None:
    layer = bigkern.nn.TransformerEncoderLayer(D, 4, 64, 0.0, batch_first=True)
    x = torch.randn(SEQUENCES)
    compare(torch.jit.script(layer), layer, x)
    assert type(layer.self_attn) is bigkern.nn.MultiheadAttention


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (bigkern.nn.LSTM(D, D, zoneout=0.1), "zoneout"),
        (bigkern.nn.GRU(D, D, layer_norm=True), "layer_norm"),
        (bigkern.nn.BatchNorm2d(4, activation="relu"), "activation"),
        (bigkern.nn.FeedForward(D, 64), "FeedForward"),
        (bigkern.nn.LayerNormFFN(D, 64), "LayerNormFFN"),
        (bigkern.nn.FrozenLinear(torch.randn(D, D)), "FrozenLinear"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_torch_has_no_layer_for_says_to_trace_it(layer: nn.Module, named: str) -> None:
    with pytest.raises(RuntimeError, match=f"{named}.*torch.jit.trace"):
        torch.jit.script(nn.Sequential(layer))


@pytest.mark.parametrize(
    "call",
    [
        lambda q: bigkern.attention(q, q, q, causal=True, return_lse=True)[1],
        lambda q: bigkern.attention(q, q, q, softcap=5.0),
        lambda q: bigkern.scaled_dot_product_attention(q, q, q, is_causal=True),
        lambda q: bigkern.merge_attention(*zip(bigkern.attention(q, q, q, return_lse=True)))[0],
    ],
    ids=["lse", "softcap", "sdpa", "merge"],
)
def test_attention_with_gradients_is_traced_and_saved(call: Callable[[Tensor], Tensor]) -> None:
    q = torch.randn(2, 4, 100, 16, requires_grad=True)
    program = saved_and_loaded(torch.jit.trace(call, q))
    torch.testing.assert_close(program(q), call(q), rtol=1e-4, atol=1e-5)
    (traced,) = torch.autograd.grad(program(q).square().sum(), q)
    (ours,) = torch.autograd.grad(call(q).square().sum(), q)
    torch.testing.assert_close(traced, ours, rtol=1e-3, atol=1e-3)


def test_decoding_and_frozen_weights_are_traced_and_saved() -> None:
    lengths = torch.tensor([7, 3], dtype=torch.int32)
    weights = [bigkern.freeze_weight(torch.randn(shape), "int8") for shape in ((64, D), (D, 64))]

    def call(q: Tensor, cache: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        o = bigkern.decode_attention(q, cache, cache, lengths)
        y = bigkern.frozen_layernorm_ffn(x, weights[0], None, weights[1], None, norm="none")
        return o, y

    inputs = torch.randn(2, 4, 1, 16), torch.randn(2, 4, 9, 16), torch.randn(5, D)
    with torch.no_grad():
        program = saved_and_loaded(torch.jit.trace(call, inputs))
        torch.testing.assert_close(program(*inputs), call(*inputs), rtol=1e-3, atol=1e-3)
    assert not any("bigkern" in node.kind() for node in program.inlined_graph.nodes())


def test_a_kernel_that_is_forced_refuses_to_be_traced() -> None:
    q = torch.randn(2, 4, 100, 16)
    with bigkern.use("cpu"), pytest.raises(bigkern.BackendRefused, match="jit"):
        torch.jit.trace(lambda q: bigkern.attention(q, q, q), q)


def test_a_patched_bert_is_traced_saved_and_trained() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": D, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=50, **sizes, return_dict=False)
    stock = transformers.BertModel(config).eval()
    patched = copy.deepcopy(stock)
    bigkern.patch(patched)
    tokens = torch.randint(0, 50, (2, 40))
    program = saved_and_loaded(torch.jit.trace(patched, tokens))
    torch.testing.assert_close(program(tokens)[0], stock(tokens)[0], rtol=1e-4, atol=1e-5)
    program(tokens)[0].square().sum().backward()
    stock(tokens)[0].square().sum().backward()
    ours = {name: parameter.grad for name, parameter in program.named_parameters()}
    name = "embeddings.word_embeddings.weight"
    torch.testing.assert_close(ours[name], stock.get_parameter(name).grad, rtol=1e-3, atol=1e-3)
