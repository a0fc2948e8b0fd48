"""Whole layers of Hugging Face transformers: attention as the stock forward has it, and the rest as one op.

Each class here is the stock class of the same name. Its ``_first_half`` is what that class's forward does
before the feed-forward block, in transformers 5.17 to 5.23.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.bart import modeling_bart as bart
from transformers.models.deit import modeling_deit as deit
from transformers.models.distilbert import modeling_distilbert as distilbert
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.gpt_neox import modeling_gpt_neox as gpt_neox
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.opt import modeling_opt as opt
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.vit import modeling_vit as vit
from transformers.models.whisper import modeling_whisper as whisper

from bigkern.patch.transformers import blocks
from bigkern.patch.transformers.forms import LayerAround, LayerWithLinears, add_norm, around
from bigkern.patch.transformers.parts import FunctionalDropout, Parts

# ---- layers around a feed-forward block ------------------------------------------------------------


class GPT2Block(LayerAround, gpt2.GPT2Block):
    read = "ln_1 attn hasattr ValueError ln_cross_attn crossattention ln_2 mlp"

    def _parts(self: Any) -> Parts | str:
        return around(self.mlp, norm=self.ln_2)

    def _first_half(
        self: Any,
        x: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor | None:
        if encoder_hidden_states is not None:
            return None
        o, _ = self.attn(
            self.ln_1(x),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        return cast(Tensor, o + x)


class GPTNeoXLayer(LayerAround, gpt_neox.GPTNeoXLayer):
    """``x + attention(norm1(x)) + ffn(norm2(x))``, or one after the other."""

    read = (
        "attention input_layernorm post_attention_dropout use_parallel_residual mlp post_attention_layernorm"
        " post_mlp_dropout"
    )

    def _parts(self: Any) -> Parts | str:
        return around(self.mlp, norm=self.post_attention_layernorm, dropout=self.post_mlp_dropout)

    def _attention(
        self: Any,
        x: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        layer_past: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        o, _ = self.attention(
            self.input_layernorm(x),
            attention_mask=attention_mask,
            position_ids=position_ids,
            layer_past=layer_past,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        return cast(Tensor, self.post_attention_dropout(o))

    def _first_half(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return cast(Tensor, self._attention(x, *args, **kwargs) + x)

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts = self._plan(hidden_states, hidden_states.shape[-1]) if self.use_parallel_residual else ""
        if isinstance(parts, str):
            return super().forward(hidden_states, *args, **kwargs)
        return cast(Tensor, self._op(hidden_states, parts) + self._attention(hidden_states, *args, **kwargs))


class ViTForm(LayerAround):
    read = "layernorm_before attention dropout layernorm_after mlp"

    def _parts(self: Any) -> Parts | str:
        return around(self.mlp, norm=self.layernorm_after, dropout=self.dropout)

    def _first_half(self: Any, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        o, _ = self.attention(self.layernorm_before(x), attention_mask, **kwargs)
        return cast(Tensor, self.dropout(o) + x)


class ViTLayer(ViTForm, vit.ViTLayer):
    pass


class DeiTLayer(ViTForm, deit.DeiTLayer):
    pass


class LlamaForm(LayerAround):
    joins = True
    read = "input_layernorm self_attn post_attention_layernorm mlp"
    norms: tuple[type, type]

    def _parts(self: Any) -> Parts | str:
        norm = {"norm": self.post_attention_layernorm, "norm_types": self.norms, "kind": "rms"}
        return around(self.mlp, **norm)

    def _first_half(
        self: Any,
        x: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        o, _ = self.self_attn(
            hidden_states=self.input_layernorm(x),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        return cast(Tensor, x + o)


class LlamaDecoderLayer(LlamaForm, llama.LlamaDecoderLayer):
    norms = (llama.LlamaRMSNorm, blocks.LlamaRMSNorm)


class MistralDecoderLayer(LlamaForm, mistral.MistralDecoderLayer):
    norms = (mistral.MistralRMSNorm, blocks.MistralRMSNorm)


class Qwen2DecoderLayer(LlamaForm, qwen2.Qwen2DecoderLayer):
    norms = (qwen2.Qwen2RMSNorm, blocks.Qwen2RMSNorm)


class Qwen3DecoderLayer(LlamaForm, qwen3.Qwen3DecoderLayer):
    norms = (qwen3.Qwen3RMSNorm, blocks.Qwen3RMSNorm)


class TransformerBlock(LayerAround, distilbert.TransformerBlock):
    """``norm2(y + ffn(y))``, ``y = norm1(x + attention(x))``."""

    read = "attention sa_layer_norm ffn output_layer_norm"

    def _block(self: Any) -> nn.Module:
        return cast(nn.Module, self.ffn)

    def _parts(self: Any) -> Parts | str:
        if self.ffn.chunk_size_feed_forward > 0:
            return "its feed-forward block is called in chunks"
        return around(self.ffn, norm=self.output_layer_norm, placement="post")

    def _first_half(self: Any, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        o, _ = self.attention(x, attention_mask=attention_mask, **kwargs)
        return add_norm(self.sa_layer_norm, o, x, NO_DROPOUT)


NO_DROPOUT = nn.Dropout(0.0).eval()


# ---- layers with linear layers of their own --------------------------------------------------------


class SeqForm(LayerWithLinears):
    """The layers of the models that came with fairseq: BART, OPT, Whisper."""

    first = "self_attn nn functional dropout training self_attn_layer_norm"
    cross = " encoder_attn encoder_attn_layer_norm"
    ffn = " activation_fn fc1 activation_dropout fc2 final_layer_norm"
    placement = "post"

    def _parts(self: Any) -> Parts | str:
        drop: dict[str, Any] = {"dropout": FunctionalDropout(self, "dropout")}
        if hasattr(self, "activation_dropout"):
            drop["hidden_dropout"] = FunctionalDropout(self, "activation_dropout")
        norm = {"norm": self.final_layer_norm, "placement": self.placement, "residual": True}
        return Parts(self.fc1, self.activation_fn, self.fc2, **drop, **norm)

    def _first_half(self: Any, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Of an encoder layer."""
        return attend(self, "self_attn", x, attention_mask=attention_mask, **kwargs)


def attend(layer: Any, name: str, x: Tensor, **kwargs: Any) -> Tensor:
    """``norm(x + drop(attention(x)))`` or ``x + drop(attention(norm(x)))``, of an attention and its norm."""
    attention, norm = getattr(layer, name), getattr(layer, f"{name}_layer_norm")
    if layer.placement == "post":
        return add_norm(norm, attention(x, **kwargs)[0], x, FunctionalDropout(layer, "dropout"))
    o, _ = attention(norm(x), **kwargs)
    return x + nn.functional.dropout(o, p=layer.dropout, training=layer.training)


class SeqDecoderForm(SeqForm):
    read = SeqForm.first + SeqForm.cross + SeqForm.ffn

    def _first_half(
        self: Any,
        x: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> Tensor:
        kwargs["past_key_values"] = past_key_values
        x = super()._first_half(x, attention_mask, **kwargs)
        if encoder_hidden_states is None:
            return x
        kwargs |= {"key_value_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
        return attend(self, "encoder_attn", x, **kwargs)


class ClampedForm(SeqForm):
    """An encoder layer that clamps its output in float16, where the stock forward runs."""

    read = SeqForm.first + SeqForm.ffn + " dtype torch float16 finfo max clamp"

    def _parts(self: Any) -> Parts | str:
        if self.fc1.weight.dtype == torch.float16:
            return "its output is clamped in float16"
        return super()._parts()


class BartEncoderLayer(ClampedForm, bart.BartEncoderLayer):
    read = f"{ClampedForm.read} isfinite all"


class BartDecoderLayer(SeqDecoderForm, bart.BartDecoderLayer):
    pass


class WhisperEncoderLayer(ClampedForm, whisper.WhisperEncoderLayer):
    placement = "pre"


class WhisperDecoderLayer(SeqDecoderForm, whisper.WhisperDecoderLayer):
    placement = "pre"


class OPTDecoderLayer(SeqForm, opt.OPTDecoderLayer):
    read = (
        f"do_layer_norm_before {SeqForm.first} shape reshape size final_layer_norm fc1 activation_fn fc2 view"
    )

    @property
    def placement(self: Any) -> str:  # type: ignore[override]
        return "pre" if self.do_layer_norm_before else "post"

    def _first_half(
        self: Any,
        x: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        kwargs |= {"past_key_values": past_key_values, "position_ids": position_ids}
        return super()._first_half(x, attention_mask, **kwargs)


# Stock class, by exact type -> ours.
LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    gpt2.GPT2Block: GPT2Block,
    gpt_neox.GPTNeoXLayer: GPTNeoXLayer,
    vit.ViTLayer: ViTLayer,
    deit.DeiTLayer: DeiTLayer,
    llama.LlamaDecoderLayer: LlamaDecoderLayer,
    mistral.MistralDecoderLayer: MistralDecoderLayer,
    qwen2.Qwen2DecoderLayer: Qwen2DecoderLayer,
    qwen3.Qwen3DecoderLayer: Qwen3DecoderLayer,
    distilbert.TransformerBlock: TransformerBlock,
    bart.BartEncoderLayer: BartEncoderLayer,
    bart.BartDecoderLayer: BartDecoderLayer,
    whisper.WhisperEncoderLayer: WhisperEncoderLayer,
    whisper.WhisperDecoderLayer: WhisperDecoderLayer,
    opt.OPTDecoderLayer: OPTDecoderLayer,
}
