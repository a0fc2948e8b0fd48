"""Blocks of Hugging Face transformers on our ops: what :func:`bigkern.patch` puts in their place.

Each class here is the stock class of the same name with another forward for its feed-forward work or its
norm, in one of the forms of :mod:`bigkern.patch.transformers.forms`; parameters, keys and everything
else are the stock class's. Whole layers stand in :mod:`bigkern.patch.transformers.layers`.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import pytorch_utils
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
from transformers.models.swin import modeling_swin as swin
from transformers.models.t5 import modeling_t5 as t5
from transformers.models.vit import modeling_vit as vit

from bigkern.nn import LayerNorm
from bigkern.patch.transformers.forms import AddNorm, FeedForwardBlock, Gated, PostNorm, RMSNorm, TwoLinears
from bigkern.patch.transformers.parts import Conv1D, Parts


class BertLayer(PostNorm, bert.BertLayer):
    inner = (bert.BertIntermediate, bert.BertOutput)


class ElectraLayer(PostNorm, electra.ElectraLayer):
    inner = (electra.ElectraIntermediate, electra.ElectraOutput)


class RobertaLayer(PostNorm, roberta.RobertaLayer):
    inner = (roberta.RobertaIntermediate, roberta.RobertaOutput)


class BertSelfOutput(AddNorm, bert.BertSelfOutput):
    pass


class ElectraSelfOutput(AddNorm, electra.ElectraSelfOutput):
    pass


class RobertaSelfOutput(AddNorm, roberta.RobertaSelfOutput):
    pass


class FFN(FeedForwardBlock, distilbert.FFN):
    def _parts(self: Any) -> Parts | str:
        return Parts(self.lin1, self.activation, self.lin2, dropout=self.dropout)

    def ff_chunk(self, input: Tensor) -> Tensor:
        return self._run(input, super().ff_chunk)


class GPT2MLP(TwoLinears, gpt2.GPT2MLP):
    def _parts(self: Any) -> Parts | str:
        return Parts(self.c_fc, self.act, self.c_proj, dropout=self.dropout)


class GPTNeoXMLP(TwoLinears, gpt_neox.GPTNeoXMLP):
    def _parts(self: Any) -> Parts | str:
        return Parts(self.dense_h_to_4h, self.act, self.dense_4h_to_h)


class ViTMLP(TwoLinears, vit.ViTMLP):
    pass


class DeiTMLP(TwoLinears, deit.DeiTMLP):
    pass


class SwinMLP(TwoLinears, swin.SwinMLP):
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

    joins = True  # where it is gated

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
        y = self.frozen(y) if self.frozen else self._op(y, parts)
        if self.layer_scale_parameter is not None:
            y = self.layer_scale_parameter * y
        return cast(Tensor, features + self.drop_path(y.permute(0, 3, 1, 2)))


# Stock class, by exact type -> ours, by op: what `patch` adds to torch's layers.
BLOCKS: dict[str, dict[type[nn.Module], type[nn.Module]]] = {
    "norm": {
        bert.BertSelfOutput: BertSelfOutput,
        electra.ElectraSelfOutput: ElectraSelfOutput,
        roberta.RobertaSelfOutput: RobertaSelfOutput,
        llama.LlamaRMSNorm: LlamaRMSNorm,
        mistral.MistralRMSNorm: MistralRMSNorm,
        phi3.Phi3RMSNorm: Phi3RMSNorm,
        qwen2.Qwen2RMSNorm: Qwen2RMSNorm,
        qwen3.Qwen3RMSNorm: Qwen3RMSNorm,
        t5.T5LayerNorm: T5LayerNorm,
        convnext.ConvNextLayerNorm: ConvNextLayerNorm,
    },
    "linear": {pytorch_utils.Conv1D: Conv1D},
    "layernorm_ffn": {
        bert.BertLayer: BertLayer,
        electra.ElectraLayer: ElectraLayer,
        roberta.RobertaLayer: RobertaLayer,
        distilbert.FFN: FFN,
        gpt2.GPT2MLP: GPT2MLP,
        gpt_neox.GPTNeoXMLP: GPTNeoXMLP,
        vit.ViTMLP: ViTMLP,
        deit.DeiTMLP: DeiTMLP,
        swin.SwinMLP: SwinMLP,
        dinov2.Dinov2MLP: Dinov2MLP,
        dinov2.Dinov2SwiGLUFFN: Dinov2SwiGLUFFN,
        llama.LlamaMLP: LlamaMLP,
        mistral.MistralMLP: MistralMLP,
        qwen2.Qwen2MLP: Qwen2MLP,
        qwen3.Qwen3MLP: Qwen3MLP,
        phi3.Phi3MLP: Phi3MLP,
        t5.T5LayerFF: T5LayerFF,
        convnext.ConvNextLayer: ConvNextLayer,
    },
}
