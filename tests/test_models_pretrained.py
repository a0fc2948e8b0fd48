"""transformers' own models and ours with their weights: the same outputs, the same generated tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from bigkern.models import TransformerConfig  # noqa: E402
from bigkern.models.transformer import alibi_slopes, from_transformers  # noqa: E402
from bigkern.models.transformer.pretrained_configs import config_of  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = 0.4  # standard deviation of weights: logits far apart, so that rounding decides no token
BERT: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 20, "initializer_range": WIDE, "num_labels": 3,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 20,
    "initializer_range": WIDE, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 20,
    "initializer_range": WIDE,
}  # fmt: skip
LONG = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
VIT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 16, "patch_size": 4, "num_labels": 5, "initializer_range": 0.2,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 50, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "max_position_embeddings": 20, "init_std": WIDE,
}  # fmt: skip


def built(name: str, **fields: Any) -> Any:
    config = getattr(transformers, name.split("For")[0].split("LM")[0].removesuffix("Model") + "Config")
    model = getattr(transformers, name)(config(**fields)).eval()
    if hasattr(model, "generation_config"):
        model.generation_config.forced_eos_token_id = None
    return model


def tokens() -> Tensor:
    return torch.randint(3, 50, (3, 9))


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "BertModel",
        "BertForPreTraining",
        "BertForMaskedLM",
        "BertForSequenceClassification",
        "BertForTokenClassification",
    ],
)
def test_bert(name: str) -> None:
    theirs = built(name, **BERT)
    ours = from_transformers(theirs)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    t, segments, mask = tokens(), torch.randint(0, 2, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    found = ours(t, segments, mask)
    found = (found, ours.pool(found)) if name == "BertModel" else found
    expected = theirs(t, attention_mask=mask, token_type_ids=segments).to_tuple()
    for a, b in zip(found if isinstance(found, tuple) else (found,), expected, strict=True):
        close(*(x[mask.bool()] if x.dim() == 3 else x for x in (a, b)))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("GPT2LMHeadModel", GPT2),
        ("LlamaForCausalLM", LLAMA),
        ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True, "rope_parameters": LONG}),
    ],
    ids=["gpt2", "llama", "llama, tied, long"],
)
def test_decoders(name: str, fields: dict[str, Any]) -> None:
    theirs = built(name, **fields)
    ours = from_transformers(theirs)
    t = tokens()
    a, b = ours(t), theirs(t).logits
    close(a, b)
    a.square().mean().backward()
    b.square().mean().backward()
    embedding = theirs.get_input_embeddings().weight.grad
    torch.testing.assert_close(
        ours.token.weight.grad, embedding, rtol=1e-3, atol=1e-3 * embedding.abs().max()
    )
    mask = torch.ones_like(t)
    mask[0, :4] = 0
    generates_alike(ours, theirs, t, mask)


def test_bart() -> None:
    theirs = built("BartForConditionalGeneration", **BART)
    ours = from_transformers(theirs)
    source, labels, mask = tokens(), tokens()[:, :6].contiguous(), torch.ones(3, 9, dtype=torch.long)
    mask[0, 5:], labels[1, 4:] = 0, -100
    expected = theirs(source, attention_mask=mask, labels=labels)
    close(ours(source, ours.shifted(labels), mask), expected.logits)
    close(ours.loss(source, labels, mask), expected.loss)
    generates_alike(ours, theirs, source, mask)


def generates_alike(ours: Any, theirs: Any, t: Tensor, mask: Tensor) -> None:
    """Greedy and by beams, with ends that some rows reach, with padding: identical tokens."""
    ways: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"temperature": 0}, {}),
        ({"beams": 3}, {"num_beams": 3}),
        ({"beams": 4, "length_penalty": 2.0}, {"num_beams": 4, "length_penalty": 2.0}),
        ({"beams": 2, "length_penalty": -1.0}, {"num_beams": 2, "length_penalty": -1.0}),
    ]
    for end in (7, 23):
        for how, options in ways:
            options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": end, **options}
            expected = theirs.generate(t, attention_mask=mask, pad_token_id=1, **options)
            found = ours.generate(t, 8, mask=mask, end=end, pad=1, **how)
            assert torch.equal(found, expected), (how, end)


def test_vit() -> None:
    theirs = built("ViTForImageClassification", **VIT)
    images = torch.randn(3, 3, 16, 16)
    close(from_transformers(theirs)(images), theirs(images).logits)


def test_named_shapes_are_theirs() -> None:
    """The configs that transformers builds without arguments are those of published checkpoints."""
    for name, ours in {
        "GPT2Config": TransformerConfig.gpt2(),
        "BertConfig": TransformerConfig.bert_base(),
        "BartConfig": TransformerConfig.bart_large(classes=3, decoder_layers=12),
        "ViTConfig": TransformerConfig.vit_b16(classes=2, eps=1e-12),  # ours: ImageNet's, 1e-6
    }.items():
        found = config_of(getattr(transformers, name)())
        assert replace(found, hidden=None, classes=ours.classes) == ours
        assert found.ffn_width == ours.ffn_width


def test_alibi_slopes_are_blooms() -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    for heads in range(1, 26):
        theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)  # slope * key's place
        torch.testing.assert_close(alibi_slopes(heads), theirs[:, 0, 1])


def test_dtype_and_mode_are_theirs() -> None:
    theirs = built("GPT2LMHeadModel", **GPT2).bfloat16().train()
    ours = from_transformers(theirs)
    assert ours.training
    assert ours.token.weight.dtype == torch.bfloat16
    ours.eval(), theirs.eval()
    t = tokens()
    torch.testing.assert_close(ours(t), theirs(t).logits, rtol=0.05, atol=0.5)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("LlamaConfig", {**LLAMA, "attention_bias": True}, "attention_bias must be False"),
        ("LlamaConfig", {**LLAMA, "head_dim": 16}, "head_dim must be 8"),
        ("BartConfig", {**BART, "scale_embedding": True}, "scale_embedding must be False"),
        ("BertConfig", {**BERT, "hidden_act": "mish"}, "activation must be one of"),
        ("T5Config", {}, "model_type must be one of bert, gpt2, llama, vit, bart, not 't5'"),
    ],
)
def test_what_ours_do_not_do_is_refused(name: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_of(getattr(transformers, name)(**fields))
