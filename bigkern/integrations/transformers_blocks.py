"""Blocks of Hugging Face transformers on our ops: what :func:`bigkern.patch` puts in their place.

Each class here is the stock class of the same name with another forward for its feed-forward work or its
norm; parameters, keys and everything else are the stock class's. Where the op does not cover a call (a hook
on a part, LoRA, quantised weights, another activation), the stock forward runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.bert import modeling_bert as bert
from transformers.models.convnext import modeling_convnext as convnext
from transformers.models.deit import modeling_deit as deit
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.distilbert import modeling_distilbert as distilbert
from transformers.models.electra import modeling_electra as electra
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.gpt_neox import modeling_gpt_neox as gpt_neox
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.phi3 import modeling_phi3 as phi3
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.roberta import modeling_roberta as roberta
from transformers.models.t5 import modeling_t5 as t5
from transformers.models.vit import modeling_vit as vit
from transformers.pytorch_utils import Conv1D

from bigkern import registry
from bigkern.integrations.transformers_parts import (
    FrozenParts,
    Parts,
    few_rows,
    freezing_reason,
    operands,
    options,
    stock_reason,
    unfit,
)
from bigkern.nn import LayerNorm
from bigkern.ops.frozen_layernorm_ffn import Weights
from bigkern.ops.layernorm_ffn import layernorm_ffn
from bigkern.ops.norm import rms_norm


class FeedForwardBlock(nn.Module):
    """A block that calls the op with its parts, above the stock class that knows what else to do."""

    copies = False  # whether its weights must be copied to be what the op takes

    @property
    def frozen(self: Any) -> FrozenParts | None:
        """What :func:`bigkern.freeze` put in the place of the linear layers."""
        return cast(FrozenParts | None, self._modules.get("frozen"))

    def _parts(self: Any) -> Parts | str:
        """The parts of this block as they are now, or why they are not its stock class's."""
        raise NotImplementedError

    def _known_parts(self) -> Parts | str:
        try:
            return self._parts()
        except AttributeError as error:
            return f"another version of transformers builds it otherwise: {error}"

    def _plan(self, x: Tensor, width: int) -> Parts | str:
        """The parts to call the op with on x, of rows of so many elements, or why the stock forward runs."""
        parts = few_rows(x, width, self.copies) or self._known_parts()
        return parts if isinstance(parts, str) else stock_reason(parts, x) or parts

    def freeze(self, weights: Weights) -> str | None:
        """Put frozen weights in the place of the linear layers, or say why not."""
        parts = self._known_parts()
        reason = parts if isinstance(parts, str) else freezing_reason(parts)
        if reason is not None:
            return reason
        self._modules["frozen"] = FrozenParts(cast(Parts, parts), weights)
        gone = {id(linear) for linear in cast(Parts, parts).linears()}
        for parent in list(self.modules()):
            for name, child in parent.named_children():
                if id(child) in gone:
                    setattr(parent, name, None)
        return None

    def _run(self, x: Tensor, stock: Callable[[Tensor], Any]) -> Tensor:
        if self.frozen is not None:
            return cast(Tensor, self.frozen(x))
        parts = self._plan(x, x.shape[-1])
        if isinstance(parts, str):
            return cast(Tensor, stock(x))
        return layernorm_ffn(x, *operands(parts), **options(parts))

    def explain_op(self, tokens: int) -> tuple[str, registry.Explanation | None, str]:
        """The op of this block, which backend runs it for so many tokens, or why the stock forward does."""
        if self.frozen is not None:
            return "frozen_layernorm_ffn", self.frozen.explain(tokens), ""
        parts = self._known_parts()
        linear = self if isinstance(parts, str) else parts.up
        width = cast(int, getattr(linear, "nx" if type(linear) is Conv1D else "in_features", 1))
        parameter = next(self.parameters(), torch.empty(0))
        x = torch.empty(tokens, width, dtype=parameter.dtype, device=parameter.device)
        parts = self._plan(x, width)
        if isinstance(parts, str):
            return "layernorm_ffn", None, parts
        return "layernorm_ffn", registry.explain("layernorm_ffn", x, *operands(parts), **options(parts)), ""


class PostNorm(FeedForwardBlock):
    """``norm(x + drop(down(act(up(x)))))``, of a block called in chunks of the sequence if so configured."""

    inner: tuple[type, type]  # of intermediate and output

    def _parts(self: Any) -> Parts | str:
        up, down = self.intermediate, self.output
        if (type(up), type(down)) != self.inner:
            return f"intermediate is a {type(up).__name__}, output a {type(down).__name__}"
        act = up.intermediate_act_fn
        block = {"dropout": down.dropout, "norm": down.LayerNorm, "placement": "post", "residual": True}
        return Parts(up.dense, act, down.dense, **block, around=(up, down))

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        return self._run(attention_output, super().feed_forward_chunk)  # type: ignore[misc]


class TwoLinears(FeedForwardBlock):
    """``down(act(up(x)))``."""

    def _parts(self: Any) -> Parts | str:
        return Parts(self.fc1, self.activation_fn, self.fc2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self._run(hidden_states, super().forward)


class Gated(FeedForwardBlock):
    """``down(act(gate(x)) * up(x))``."""

    copies = True

    def _parts(self: Any) -> Parts | str:
        return Parts(self.up_proj, self.act_fn, self.down_proj, gate=self.gate_proj)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, super().forward)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if unfit(hidden_states, self.weight) is not None:
            return cast(Tensor, super().forward(hidden_states))
        return cast(Tensor, rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon))

    def explain_op(self: Any, tokens: int) -> tuple[str, registry.Explanation | None, str]:
        x = self.weight.new_empty(tokens, *self.weight.shape)
        reason = unfit(x, self.weight)
        if reason is not None:
            return "norm", None, reason
        return "norm", registry.explain("norm", x, self.weight.shape, self.weight, kind="rms"), ""


# ---- the classes -----------------------------------------------------------------------------------


class BertLayer(PostNorm, bert.BertLayer):
    inner = (bert.BertIntermediate, bert.BertOutput)


class ElectraLayer(PostNorm, electra.ElectraLayer):
    inner = (electra.ElectraIntermediate, electra.ElectraOutput)


class RobertaLayer(PostNorm, roberta.RobertaLayer):
    inner = (roberta.RobertaIntermediate, roberta.RobertaOutput)


class FFN(FeedForwardBlock, distilbert.FFN):
    def _parts(self: Any) -> Parts | str:
        return Parts(self.lin1, self.activation, self.lin2, dropout=self.dropout)

    def ff_chunk(self, input: Tensor) -> Tensor:
        return self._run(input, super().ff_chunk)


class GPT2MLP(TwoLinears, gpt2.GPT2MLP):
    copies = True

    def _parts(self: Any) -> Parts | str:
        return Parts(self.c_fc, self.act, self.c_proj, dropout=self.dropout)


class GPTNeoXMLP(TwoLinears, gpt_neox.GPTNeoXMLP):
    def _parts(self: Any) -> Parts | str:
        return Parts(self.dense_h_to_4h, self.act, self.dense_4h_to_h)


class ViTMLP(TwoLinears, vit.ViTMLP):
    pass


class DeiTMLP(TwoLinears, deit.DeiTMLP):
    pass


class Dinov2MLP(TwoLinears, dinov2.Dinov2MLP):
    pass


class Dinov2SwiGLUFFN(Gated, dinov2.Dinov2SwiGLUFFN):
    pass


class LlamaMLP(Gated, llama.LlamaMLP):
    pass


class MistralMLP(Gated, mistral.MistralMLP):
    pass


class Qwen2MLP(Gated, qwen2.Qwen2MLP):
    pass


class Qwen3MLP(Gated, qwen3.Qwen3MLP):
    pass


class Phi3MLP(TwoLinears, phi3.Phi3MLP):
    def _parts(self: Any) -> Parts | str:
        return Parts(self.gate_up_proj, self.activation_fn, self.down_proj, joined=True)


class LlamaRMSNorm(RMSNorm, llama.LlamaRMSNorm):
    pass


class MistralRMSNorm(RMSNorm, mistral.MistralRMSNorm):
    pass


class Phi3RMSNorm(RMSNorm, phi3.Phi3RMSNorm):
    pass


class Qwen2RMSNorm(RMSNorm, qwen2.Qwen2RMSNorm):
    pass


class Qwen3RMSNorm(RMSNorm, qwen3.Qwen3RMSNorm):
    pass


class T5LayerNorm(RMSNorm, t5.T5LayerNorm):
    pass


class T5LayerFF(FeedForwardBlock, t5.T5LayerFF):
    """``x + drop(wo(drop(act(wi(norm(x))))))``."""

    copies = True  # where it is gated

    def _parts(self: Any) -> Parts | str:
        inner = self.DenseReluDense
        if type(inner) is t5.T5DenseActDense:
            up, gate = inner.wi, None
        elif type(inner) is t5.T5DenseGatedActDense:
            up, gate = inner.wi_1, inner.wi_0
        else:
            return f"DenseReluDense is a {type(inner).__name__}"
        drop = {"hidden_dropout": inner.dropout, "dropout": self.dropout}
        norm = {"norm": self.layer_norm, "norm_types": (t5.T5LayerNorm, T5LayerNorm), "kind": "rms"}
        return Parts(up, inner.act, inner.wo, gate, **drop, **norm, residual=True, around=(inner,))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self._run(hidden_states, super().forward)


class ConvNextLayerNorm(convnext.ConvNextLayerNorm, LayerNorm):  # whose super().forward is then ours
    pass


class ConvNextLayer(FeedForwardBlock, convnext.ConvNextLayer):
    """``x + drop_path(scale * down(act(up(norm(conv(x))))))``, all but the convolution channels last."""

    def _parts(self: Any) -> Parts | str:
        if getattr(self.layernorm, "data_format", None) != "channels_last":
            return "the norm is not channels last"
        types = (convnext.ConvNextLayerNorm, ConvNextLayerNorm)
        return Parts(self.pwconv1, self.act, self.pwconv2, norm=self.layernorm, norm_types=types)

    def forward(self: Any, features: Tensor) -> Tensor:
        parts = self.frozen or self._plan(features, features.shape[1])
        if isinstance(parts, str):
            return cast(Tensor, super().forward(features))
        y = self.dwconv(features).permute(0, 2, 3, 1)  # [N, H, W, C]
        y = self.frozen(y) if self.frozen else layernorm_ffn(y, *operands(parts), **options(parts))
        if self.layer_scale_parameter is not None:
            y = self.layer_scale_parameter * y
        return cast(Tensor, features + self.drop_path(y.permute(0, 3, 1, 2)))


# Stock class, by exact type -> ours: what `patch` adds to torch's layers.
BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    bert.BertLayer: BertLayer,
    electra.ElectraLayer: ElectraLayer,
    roberta.RobertaLayer: RobertaLayer,
    distilbert.FFN: FFN,
    gpt2.GPT2MLP: GPT2MLP,
    gpt_neox.GPTNeoXMLP: GPTNeoXMLP,
    vit.ViTMLP: ViTMLP,
    deit.DeiTMLP: DeiTMLP,
    dinov2.Dinov2MLP: Dinov2MLP,
    dinov2.Dinov2SwiGLUFFN: Dinov2SwiGLUFFN,
    llama.LlamaMLP: LlamaMLP,
    mistral.MistralMLP: MistralMLP,
    qwen2.Qwen2MLP: Qwen2MLP,
    qwen3.Qwen3MLP: Qwen3MLP,
    phi3.Phi3MLP: Phi3MLP,
    llama.LlamaRMSNorm: LlamaRMSNorm,
    mistral.MistralRMSNorm: MistralRMSNorm,
    phi3.Phi3RMSNorm: Phi3RMSNorm,
    qwen2.Qwen2RMSNorm: Qwen2RMSNorm,
    qwen3.Qwen3RMSNorm: Qwen3RMSNorm,
    t5.T5LayerNorm: T5LayerNorm,
    t5.T5LayerFF: T5LayerFF,
    convnext.ConvNextLayerNorm: ConvNextLayerNorm,
    convnext.ConvNextLayer: ConvNextLayer,
}
