"""Configs of Hugging Face models as ours; nothing of transformers is imported."""

from __future__ import annotations

from typing import Any

from bigkern.models.transformer.config import RopeScaling, TransformerConfig

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}


def _bert(c: Any) -> dict[str, Any]:
    return {
        "context": c.max_position_embeddings,
        "layers": c.num_hidden_layers,
        "heads": c.num_attention_heads,
        "width": c.hidden_size,
        "hidden": c.intermediate_size,
        "activation": _activation(c.hidden_act),
        "placement": "post",
        "eps": c.layer_norm_eps,
        "dropout": c.hidden_dropout_prob,
        "attention_dropout": c.attention_probs_dropout_prob,
        "segments": c.type_vocab_size,
        "embedding_norm": True,
        "classes": c.num_labels,
    }


def _gpt2(c: Any) -> dict[str, Any]:
    _require(c, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    return {
        "context": c.n_positions,
        "layers": c.n_layer,
        "heads": c.n_head,
        "width": c.n_embd,
        "hidden": c.n_inner,
        "activation": _activation(c.activation_function),
        "eps": c.layer_norm_epsilon,
        "dropout": c.resid_pdrop,
        "attention_dropout": c.attn_pdrop,
        "tied": c.tie_word_embeddings,
    }


def _llama(c: Any) -> dict[str, Any]:
    _require(c, attention_bias=False, mlp_bias=False, head_dim=c.hidden_size // c.num_attention_heads)
    rope = dict(getattr(c, "rope_parameters", None) or getattr(c, "rope_scaling", None) or {})
    kind, scaling = rope.get("rope_type", "default"), None
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = RopeScaling(*(rope[name] for name in names))
    elif kind != "default":
        raise ValueError(f"rope_type must be default or llama3, not {kind!r}")
    return {
        "context": c.max_position_embeddings,
        "layers": c.num_hidden_layers,
        "heads": c.num_attention_heads,
        "kv_heads": c.num_key_value_heads,
        "width": c.hidden_size,
        "hidden": c.intermediate_size,
        "positions": "rotary",
        "activation": {"silu": "swiglu", "gelu": "geglu"}.get(c.hidden_act, c.hidden_act),
        "norm": "rms",
        "bias": False,
        "eps": c.rms_norm_eps,
        "attention_dropout": c.attention_dropout,
        "tied": c.tie_word_embeddings,
        "rope_theta": rope.get("rope_theta", getattr(c, "rope_theta", 10000.0)),
        "rope_scaling": scaling,
    }


def _vit(c: Any) -> dict[str, Any]:
    _require(c, qkv_bias=True)
    return {
        "layers": c.num_hidden_layers,
        "heads": c.num_attention_heads,
        "width": c.hidden_size,
        "hidden": c.intermediate_size,
        "activation": _activation(c.hidden_act),
        "eps": c.layer_norm_eps,
        "dropout": c.hidden_dropout_prob,
        "attention_dropout": c.attention_probs_dropout_prob,
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "channels": c.num_channels,
        "classes": c.num_labels,
    }


def _bart(c: Any) -> dict[str, Any]:
    _require(
        c,
        scale_embedding=False,
        tie_word_embeddings=True,
        decoder_attention_heads=c.encoder_attention_heads,
        decoder_ffn_dim=c.encoder_ffn_dim,
    )
    return {
        "context": c.max_position_embeddings,
        "layers": c.encoder_layers,
        "decoder_layers": c.decoder_layers,
        "heads": c.encoder_attention_heads,
        "width": c.d_model,
        "hidden": c.encoder_ffn_dim,
        "activation": _activation(c.activation_function),
        "placement": "post",
        "embedding_norm": True,
        "dropout": c.dropout,
        "attention_dropout": c.attention_dropout,
        "hidden_dropout": c.activation_dropout,
    }


READERS = {"bert": _bert, "gpt2": _gpt2, "llama": _llama, "vit": _vit, "bart": _bart}


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {name!r}")
    return ACTIVATIONS[name]


def _require(c: Any, **fields: Any) -> None:
    for name, wanted in fields.items():
        found = getattr(c, name, wanted)
        if found is not None and found != wanted:
            raise ValueError(f"{name} must be {wanted} in a config of {c.model_type}, not {found}")


def config_of(config: Any) -> TransformerConfig:
    """A Hugging Face config as ours.

    Raises:
        ValueError: the model type is not known, or a field asks for what our models do not do.
    """
    family = getattr(config, "model_type", None)
    if family not in READERS:
        raise ValueError(f"model_type must be one of {', '.join(READERS)}, not {family!r}")
    size = getattr(config, "vocab_size", 256)
    names = {
        "start_token": "decoder_start_token_id",
        "end_token": "eos_token_id",
        "pad_token": "pad_token_id",
    }
    tokens = {ours: getattr(config, theirs, None) for ours, theirs in names.items()}
    inside: dict[str, Any] = {name: t for name, t in tokens.items() if isinstance(t, int) and 0 <= t < size}
    return TransformerConfig(vocab_size=size, **inside, **READERS[family](config))
