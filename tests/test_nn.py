"""Attention and Transformer layers against torch's own, with the same weights."""

from __future__ import annotations

import copy
import pickle
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from parity import assert_parity
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import bigkern
from bigkern.core.parity import Yardstick

DTYPES = [torch.float32, torch.bfloat16]
E, H = 64, 4


def causal(S: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(S, dtype=dtype)


def padding(B: int, S: int, lengths: list[int]) -> Tensor:
    return torch.arange(S).expand(B, S) >= torch.tensor(lengths)[:, None]


def held_to_parity(stock: nn.Module, ours: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> None:
    """Output, input gradients and parameter gradients by the parity rule, against float64 stock."""
    reference = copy.deepcopy(stock).double()
    wide = {
        key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for key, x in options.items()
    }
    out = reference(*[x.double() for x in inputs], **wide)
    upstream = torch.randn((out[0] if isinstance(out, tuple) else out).shape).to(inputs[0].dtype)

    def results(module: nn.Module, arguments: Any, extra: dict[str, Any]) -> dict[str, Tensor]:
        arguments = [x.detach().clone().requires_grad_() for x in arguments]
        module.zero_grad()
        out = module(*arguments, **extra)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(upstream.to(out.dtype))
        gradients = {f"d input {i}": x.grad for i, x in enumerate(arguments)}
        gradients |= {f"d {name}": p.grad for name, p in module.named_parameters()}
        return {"output": out} | {name: g for name, g in gradients.items() if g is not None}

    yardstick = Yardstick(
        results(reference, [x.double() for x in inputs], wide), partial(results, stock, inputs, options)
    )
    assert_parity("nn", "cpu", results(ours, inputs, options), yardstick)


def twins(
    kind: str, *args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> tuple[nn.Module, nn.Module]:
    """A stock layer and ours with the same weights, the state dict loaded across and back."""
    stock = getattr(nn, kind)(*args, dtype=dtype, **kwargs)
    ours = getattr(bigkern.nn, kind)(*args, dtype=dtype, **kwargs)
    for parameter in stock.parameters():
        if parameter.dim() == 1:  # biases start at 0: give every path something to get wrong
            nn.init.normal_(parameter, 0.5, 0.2)
    ours.load_state_dict(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(stock.state_dict())
    return stock, ours


class TestMultiheadAttention:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("bias", [True, False])
    def test_self_attention(self, dtype: torch.dtype, batch_first: bool, bias: bool) -> None:
        stock, ours = twins("MultiheadAttention", E, H, batch_first=batch_first, bias=bias, dtype=dtype)
        x = torch.randn(3, 9, E, dtype=dtype)

        class Self(nn.Module):
            def __init__(self, attention: nn.Module) -> None:
                super().__init__()
                self.attention = attention

            def forward(self, x: Tensor) -> Tensor:
                return self.attention(x, x, x, need_weights=False)[0]

        held_to_parity(Self(stock), Self(ours), (x,))

    @pytest.mark.parametrize("widths", [{}, {"kdim": 48, "vdim": 32}])
    @pytest.mark.parametrize("shared", [True, False])
    def test_cross_attention(self, widths: dict[str, int], shared: bool) -> None:
        stock, ours = twins("MultiheadAttention", E, H, batch_first=True, **widths)
        q = torch.randn(2, 5, E)
        k = torch.randn(2, 11, widths.get("kdim", E))
        v = k if shared and not widths else torch.randn(2, 11, widths.get("vdim", E))
        held_to_parity(stock, ours, (q, k, v), need_weights=False)

    @pytest.mark.parametrize("attn", ["none", "bool", "float", "bool3d", "float3d"])
    @pytest.mark.parametrize("keys", ["none", "bool", "float"])
    @pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
    def test_masks(self, attn: str, keys: str) -> None:
        B, S = 2, 7
        stock, ours = twins("MultiheadAttention", E, H, batch_first=True)
        allow_first = torch.rand(B * H, S, S) < 0.3
        allow_first[..., 0] = False
        attn_mask = {
            "none": None,
            "bool": allow_first[0],
            "float": torch.randn(S, S),
            "bool3d": allow_first,
            "float3d": torch.randn(B * H, S, S),
        }[attn]
        padded = padding(B, S, [S, 4])
        key_padding = {"none": None, "bool": padded, "float": padded.float() * -3.0}[keys]
        x = torch.randn(B, S, E)
        held_to_parity(
            stock, ours, (x, x, x), need_weights=False, attn_mask=attn_mask, key_padding_mask=key_padding
        )

    def test_causal_hint(self) -> None:
        stock, ours = twins("MultiheadAttention", E, H, batch_first=True)
        x = torch.randn(2, 8, E)
        held_to_parity(stock, ours, (x, x, x), need_weights=False, attn_mask=causal(8), is_causal=True)
        lengths = padding(2, 8, [8, 5]).float().masked_fill(padding(2, 8, [8, 5]), float("-inf"))
        held_to_parity(
            stock,
            ours,
            (x, x, x),
            need_weights=False,
            attn_mask=causal(8),
            is_causal=True,
            key_padding_mask=lengths,
        )

    @pytest.mark.parametrize("average", [True, False])
    def test_weights_come_from_stock(self, average: bool) -> None:
        stock, ours = twins("MultiheadAttention", E, H, batch_first=True)
        x = torch.randn(2, 5, E)
        for masks in ({}, {"attn_mask": causal(5), "is_causal": True}):
            options = {"average_attn_weights": average, **masks}
            theirs, mine = stock(x, x, x, **options), ours(x, x, x, **options)
            assert mine[1].shape == ((2, 5, 5) if average else (2, H, 5, 5))
            torch.testing.assert_close(mine, theirs)
            torch.testing.assert_close(ours(x, x, x, need_weights=False, **masks)[0], theirs[0])

    def test_row_without_keys_is_zero_not_nan(self) -> None:
        ours = bigkern.nn.MultiheadAttention(E, H, batch_first=True, bias=False)
        x = torch.randn(1, 4, E, requires_grad=True)
        out, _ = ours(x, x, x, key_padding_mask=torch.ones(1, 4, dtype=torch.bool), need_weights=False)
        out.sum().backward()
        assert torch.count_nonzero(out) == 0
        assert x.grad is not None
        assert torch.count_nonzero(x.grad) == 0

    @pytest.mark.parametrize(
        "call",
        [
            lambda m, x: m(x[..., :-1], x, x, need_weights=False),
            lambda m, x: m(x, x, x[:, :-1], need_weights=False),
            lambda m, x: m(x, x, x, attn_mask=torch.zeros(3, 3), need_weights=False),
            lambda m, x: m(x, x, x, key_padding_mask=torch.zeros(2, 3, dtype=torch.bool), need_weights=False),
            lambda m, x: m(x, x, x, attn_mask=torch.zeros(6, 6, dtype=torch.int), need_weights=False),
            lambda m, x: m(x, x, x, is_causal=True, need_weights=False),
            lambda m, x: m(x[None], x, x, need_weights=False),
        ],
    )
    def test_errors_are_torchs(self, call: Any) -> None:
        stock, ours = twins("MultiheadAttention", E, H, batch_first=True)
        x = torch.randn(2, 6, E)
        with pytest.raises(Exception) as theirs:
            call(stock, x)
        with pytest.raises(type(theirs.value)) as mine:
            call(ours, x)
        assert str(mine.value) == str(theirs.value)

    def test_stock_reasons(self) -> None:
        x = torch.randn(2, 6, E)
        ours = bigkern.nn.MultiheadAttention(E, H, dropout=0.5, batch_first=True)
        assert "need_weights" in str(ours.stock_reason(x, x, x))
        assert ours.stock_reason(x, x, x, need_weights=False) is None
        certain = bigkern.nn.MultiheadAttention(E, H, dropout=1.0, batch_first=True)
        assert "dropout" in str(certain.stock_reason(x, x, x, need_weights=False))
        assert ours.eval().stock_reason(x, x, x, need_weights=False) is None
        assert "batch" in str(ours.stock_reason(x[0], x[0], x[0], need_weights=False))
        extra = bigkern.nn.MultiheadAttention(E, H, add_bias_kv=True)
        assert "bias_k" in str(extra.stock_reason(x, x, x, need_weights=False))

    def test_unbatched_and_dropout_match_stock(self) -> None:
        stock, ours = twins("MultiheadAttention", E, H, dropout=0.3, batch_first=True)
        x = torch.randn(6, E)
        torch.manual_seed(3)
        theirs = stock(x, x, x, need_weights=False)[0]
        torch.manual_seed(3)
        torch.testing.assert_close(ours(x, x, x, need_weights=False)[0], theirs)

    def test_dropout_is_unbiased(self) -> None:
        """Over many draws the mean is the undropped output, and each draw differs."""
        layer = bigkern.nn.MultiheadAttention(E, H, dropout=0.3, batch_first=True)
        x = torch.randn(1, 6, E)
        with torch.no_grad():
            right = layer.eval()(x, x, x, need_weights=False)[0]
            draws = layer.train()(*[x.expand(4000, 6, E)] * 3, need_weights=False)[0]
        error = draws.std(0) / 4000**0.5
        assert bool((draws.std(0) > 0).all())
        assert bool(((draws.mean(0) - right[0]).abs() < 5 * error).all())


LAYERS = ["TransformerEncoderLayer", "TransformerDecoderLayer"]
PARTS = ["self_attn", "self_attn.out_proj", "norm1", "norm2", "linear1", "linear2", "dropout", "activation"]


def doubled(out: Any) -> Any:
    return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out


def layer_inputs(kind: str, batch_first: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    def tokens(S: int) -> Tensor:
        return torch.randn(*((3, S) if batch_first else (S, 3)), E, dtype=dtype)

    return (tokens(9),) if "Encoder" in kind else (tokens(9), tokens(6))


class TestTransformerLayers:
    @pytest.mark.parametrize("kind", LAYERS)
    @pytest.mark.parametrize("norm_first", [True, False])
    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("activation", ["relu", "gelu", nn.GELU("tanh"), torch.tanh])
    def test_matches_stock(self, kind: str, norm_first: bool, batch_first: bool, activation: Any) -> None:
        stock, ours = twins(
            kind,
            E,
            H,
            128,
            dropout=0.0,
            norm_first=norm_first,
            batch_first=batch_first,
            activation=activation,
        )
        held_to_parity(stock, ours, layer_inputs(kind, batch_first))

    @pytest.mark.parametrize("kind", LAYERS)
    @pytest.mark.parametrize("norm_first", [True, False])
    def test_bfloat16_and_no_bias(self, kind: str, norm_first: bool) -> None:
        stock, ours = twins(
            kind,
            E,
            H,
            128,
            dropout=0.0,
            norm_first=norm_first,
            batch_first=True,
            bias=False,
            dtype=torch.bfloat16,
        )
        held_to_parity(stock, ours, layer_inputs(kind, True, torch.bfloat16))

    def test_encoder_masks(self) -> None:
        stock, ours = twins("TransformerEncoderLayer", E, H, 128, dropout=0.0, batch_first=True)
        x = torch.randn(2, 8, E)
        held_to_parity(stock, ours, (x,), src_mask=causal(8), is_causal=True)
        held_to_parity(stock, ours, (x,), src_key_padding_mask=padding(2, 8, [8, 3]))
        held_to_parity(
            stock, ours, (x,), src_mask=causal(8), src_key_padding_mask=padding(2, 8, [8, 3]).float()
        )

    def test_decoder_masks(self) -> None:
        stock, ours = twins("TransformerDecoderLayer", E, H, 128, dropout=0.0, batch_first=True)
        x, memory = torch.randn(2, 8, E), torch.randn(2, 5, E)
        held_to_parity(
            stock, ours, (x, memory), tgt_mask=causal(8), tgt_is_causal=True,
            memory_key_padding_mask=padding(2, 5, [5, 2]),
        )  # fmt: skip

    def test_inside_torchs_encoder(self) -> None:
        """nn.TransformerEncoder looks into its layers: training, and inference with a padding mask."""
        stock = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 128, batch_first=True), 2)
        ours = copy.deepcopy(stock)
        bigkern.patch(ours)
        x, pad = torch.randn(2, 8, E), padding(2, 8, [8, 3])
        for model in (stock, ours):
            model.eval()
        with torch.no_grad():
            a = stock(x, src_key_padding_mask=pad)
            b = ours(x, src_key_padding_mask=pad)
        torch.testing.assert_close(a[~pad], b[~pad])

    @pytest.mark.parametrize("kind", LAYERS)
    @pytest.mark.parametrize("norm_first", [True, False])
    def test_dropout_is_unbiased(self, kind: str, norm_first: bool) -> None:
        """Fused, the feed-forward block drops: over many draws the mean is what stock's mean is."""
        options = {"batch_first": True, "norm_first": norm_first, "dropout": 0.3}
        stock, ours = twins(kind, E, H, 128, **options)
        inputs = [t[:1].expand(3000, *t.shape[1:]) for t in layer_inputs(kind, True)]
        with torch.no_grad(), bigkern.use(layernorm_ffn="cpu", norm="cpu"):
            a, b = stock(*inputs), ours(*inputs)
        error = ((a.var(0) + b.var(0)) / 3000).sqrt()
        assert bool(((a.mean(0) - b.mean(0)).abs() < 5 * error).all())
        assert bool((b.std(0) > 0).all())
        assert 0.9 < (b.std(0) / a.std(0)).mean() < 1.1

    @pytest.mark.parametrize("kind", LAYERS)
    def test_dropout_left_to_stock_draws_as_stock_does(self, kind: str) -> None:
        """Except on attention weights, where the op draws from a generator of its own."""
        stock, ours = twins(kind, E, H, 128, dropout=0.2, batch_first=False)
        for module in (*stock.modules(), *ours.modules()):
            if isinstance(module, torch.nn.MultiheadAttention):
                module.dropout = 0.0
        inputs = layer_inputs(kind, False)
        torch.manual_seed(5)
        theirs = stock(*inputs)
        torch.manual_seed(5)
        torch.testing.assert_close(ours(*inputs), theirs)

    @pytest.mark.parametrize("part", ["", *PARTS])
    @pytest.mark.parametrize("kind", LAYERS)
    def test_hooks_fire_as_on_stock(self, kind: str, part: str) -> None:
        """On the layer and on each part, out_proj's (never called) included; what a hook returns counts."""
        results, (stock, ours) = [], twins(kind, E, H, 128, dropout=0.0, batch_first=True)
        for module in (stock, ours):
            module.activation = nn.GELU()
            seen, hooked = [], module.get_submodule(part)
            hooked.register_forward_pre_hook(lambda *_, seen=seen: seen.append("pre"))
            hooked.register_forward_hook(lambda m, i, out, seen=seen: seen.append("forward") or doubled(out))
            hooked.register_full_backward_hook(lambda *_, seen=seen: seen.append("backward"))
            hooked.register_full_backward_pre_hook(lambda *_, seen=seen: seen.append("backward pre"))
            torch.manual_seed(0)
            inputs = [x.requires_grad_() for x in layer_inputs(kind, True)]
            out = module(*inputs)
            results.append((seen, out, torch.autograd.grad(out.square().sum(), inputs)))
        (theirs, *numbers), (mine, *others) = results
        assert mine == theirs
        torch.testing.assert_close(others, numbers, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("kind", LAYERS)
    def test_hooks_on_every_module_and_replaced_forwards(self, kind: str) -> None:
        stock, ours = twins(kind, E, H, 128, dropout=0.0, batch_first=True)
        inputs, seen = layer_inputs(kind, True), {"stock": [], "ours": []}
        for who, module in (("stock", stock), ("ours", ours)):
            handle = nn.modules.module.register_module_forward_hook(
                lambda m, *_, who=who: seen[who].append(type(m).__name__)
            )
            module(*inputs)
            handle.remove()
            module.linear2.forward = lambda x, m=module.linear2: 2 * nn.Linear.forward(m, x)
        assert seen["ours"] == seen["stock"]
        torch.testing.assert_close(ours(*inputs), stock(*inputs))

    @pytest.mark.parametrize("kind", LAYERS)
    def test_copies(self, kind: str) -> None:
        _, ours = twins(kind, E, H, 128, dropout=0.0, batch_first=True)
        inputs = layer_inputs(kind, True)
        expected = ours(*inputs)
        for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(copied) is type(ours)
            torch.testing.assert_close(copied(*inputs), expected, rtol=0, atol=0)

    def test_compiles_whole(self) -> None:
        _, ours = twins("TransformerEncoderLayer", E, H, 128, dropout=0.0, batch_first=True)
        (x,) = layer_inputs("TransformerEncoderLayer", True)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), ours(x))

    @pytest.mark.parametrize("kind", LAYERS)
    def test_parametrizations(self, kind: str) -> None:
        """Weights that are computed: of attention, of out_proj, of the linear layers and of a norm."""
        stock, ours = twins(kind, E, H, 128, dropout=0.0, batch_first=True)
        inputs = layer_inputs(kind, True)
        for module in (stock, ours):
            torch.manual_seed(0)
            parametrizations.orthogonal(module.self_attn.out_proj)
            parametrizations.weight_norm(module.self_attn, "in_proj_weight")
            parametrizations.weight_norm(module.linear1)
            parametrizations.spectral_norm(module.linear2)
            parametrizations.weight_norm(module.norm1, dim=None)
        ours.load_state_dict(stock.state_dict())
        results = []
        for module in (stock, ours):
            names, parameters = zip(*module.named_parameters(), strict=True)
            out = module.eval()(*inputs)
            with parametrize.cached():
                torch.testing.assert_close(module(*inputs), out)
            results.append((names, out, torch.autograd.grad(out.square().sum(), parameters)))
        assert results[0][0] == results[1][0]
        torch.testing.assert_close(results[1][1:], results[0][1:], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("kind", LAYERS)
    def test_functional_call_and_frozen_parts(self, kind: str) -> None:
        stock, ours = twins(kind, E, H, 128, dropout=0.0, batch_first=True)
        inputs = layer_inputs(kind, True)
        others = {name: 0.5 * p.detach() for name, p in stock.named_parameters()}
        slopes = [
            torch.func.grad(lambda w, m=m: torch.func.functional_call(m, w, inputs).square().sum())(others)
            for m in (stock, ours)
        ]
        torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-4, atol=1e-4)
        for part in ("self_attn", "linear1", "norm2"):
            for module in (stock, ours):
                module.requires_grad_(True).get_submodule(part).requires_grad_(False)
            held_to_parity(stock, ours, inputs)

    @pytest.mark.parametrize("kind", LAYERS)
    @pytest.mark.parametrize("norm_first", [True, False])
    def test_autocast(self, kind: str, norm_first: bool) -> None:
        stock, ours = twins(kind, E, H, 128, dropout=0.0, batch_first=True, norm_first=norm_first)
        inputs = layer_inputs(kind, True)
        with torch.autocast("cpu", torch.bfloat16):
            expected, out = stock(*inputs), ours(*inputs)
        assert out.dtype == expected.dtype
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
        out.sum().backward()

    @pytest.mark.parametrize("kind", LAYERS)
    def test_functional_calls_of_large_layers(self, kind: str) -> None:
        stock, ours = twins(kind, E, H, 128, dropout=0.0, batch_first=True)
        inputs = tuple(x.repeat(8, 1, 1) for x in layer_inputs(kind, True))
        weights = {name: p.detach() for name, p in stock.named_parameters()}
        slopes = [
            torch.func.grad(lambda w, m=m: torch.func.functional_call(m, w, inputs).square().sum())(weights)
            for m in (stock, ours)
        ]
        torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("kind", LAYERS)
    def test_float16(self, kind: str) -> None:
        stock, ours = twins(kind, E, H, 128, dropout=0.0, batch_first=True, dtype=torch.float16)
        held_to_parity(stock, ours, layer_inputs(kind, True, torch.float16))

    def test_masks_of_two_kinds_and_of_wrong_ones(self) -> None:
        """torch warns of a boolean mask beside a floating one, and refuses integers, naming its argument."""
        x, pad = torch.randn(2, 8, E), padding(2, 8, [8, 3])
        pairs = [(causal(8), pad), (causal(8).isinf(), pad.float()), (causal(8), pad.long())]
        for stock, ours in (
            twins("TransformerEncoderLayer", E, H, 128, dropout=0.0, batch_first=True),
            twins("MultiheadAttention", E, H, batch_first=True),
        ):
            for mask, keys in pairs:
                said = []
                for module in (stock, ours):
                    attention = isinstance(module, nn.MultiheadAttention)
                    args = (x, x, x, keys, False, mask) if attention else (x, mask, keys)
                    with warnings.catch_warnings(record=True) as heard:
                        warnings.simplefilter("always")
                        try:
                            module(*args)
                            said.append([str(w.message) for w in heard])
                        except Exception as error:
                            said.append((type(error), str(error)))
                assert said[1] == said[0] != []

    @pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
    def test_containers_take_stock_layers_and_leave_what_is_the_users(self) -> None:
        layer, norm = nn.TransformerEncoderLayer(E, H, 128, batch_first=True), nn.LayerNorm(E)
        encoder = bigkern.nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False, mask_check=False)
        assert type(layer) is nn.TransformerEncoderLayer
        assert type(encoder.layers[1]) is bigkern.nn.TransformerEncoderLayer
        assert type(encoder.layers[1].self_attn) is bigkern.nn.MultiheadAttention
        assert encoder.norm is norm
        assert type(norm) is nn.LayerNorm
        assert (encoder.enable_nested_tensor, encoder.mask_check) == (False, False)
        decoder = bigkern.nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 128), 1)
        assert type(decoder.layers[0]) is bigkern.nn.TransformerDecoderLayer
        whole = bigkern.nn.Transformer(E, H, 1, 1, 128, batch_first=True, custom_encoder=encoder)
        assert whole.encoder is encoder
        assert type(whole.decoder) is bigkern.nn.TransformerDecoder
        assert type(whole.decoder.norm) is bigkern.nn.LayerNorm
        custom = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H), 1)
        assert bigkern.nn.Transformer(E, H, 1, custom_decoder=custom).decoder is custom
        assert type(custom.layers[0]) is nn.TransformerDecoderLayer
        x = torch.randn(2, 8, E)
        assert whole.eval()(x, x[:, :5], src_mask=causal(8), src_is_causal=True).shape == (2, 5, E)
        with pytest.raises(RuntimeError, match="feature number of src and tgt"):
            whole(x[..., 1:], x)
