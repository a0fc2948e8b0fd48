"""Weights of Hugging Face models in ours: key by key, from a table; nothing of transformers is imported.

Keys that no row of the table knows are refused, and so are rows that are there in part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bigkern.models.transformer import encoder
from bigkern.models.transformer.decoder import GPT
from bigkern.models.transformer.encoder_decoder import EncoderDecoder
from bigkern.models.transformer.pretrained_configs import config_of
from bigkern.models.transformer.pretrained_tables import IGNORED, PREFIXES, TABLES, TIED
from bigkern.models.transformer.vision import ViT


def convert_state_dict(family: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Hugging Face model's state dict under our names.

    Args:
        family: ``"bert"``, ``"gpt2"``, ``"llama"``, ``"vit"`` or ``"bart"``, as their
            ``config.model_type`` says.
        state_dict: the model's, with or without a head. Not changed; tensors that need no change are shared.

    Raises:
        ValueError: the family is not known; or keys are missing or foreign: the message lists them.

    Example:
        >>> import torch
        >>> from bigkern.models.transformer import convert_state_dict
        >>> list(convert_state_dict("gpt2", {"transformer.wte.weight": torch.zeros(8, 4)}))
        ['token.weight']
    """
    if family not in TABLES:
        raise ValueError(f"family must be one of {', '.join(TABLES)}, not {family!r}")
    prefix = PREFIXES[family]
    given = {key.removeprefix(prefix): key for key in state_dict}
    found: dict[str, Tensor] = {}
    known, missing = set(), []
    for ours, theirs in TABLES[family]:
        for key in given:
            match = re.fullmatch(_pattern(theirs[0]), key)
            if match is None:
                continue
            parts = [_filled(part, match) for part in theirs]
            known.update(parts)
            if lost := [part for part in parts if part not in given]:
                missing += lost
                continue
            tensors = [_adapted(family, part, state_dict[given[part]]) for part in parts]
            inner = prefix if family == "bert" and given[key].startswith(prefix) else ""  # under a head
            found[inner + _filled(ours, match)] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    ignored = re.compile(IGNORED[family])
    foreign = [name for key, name in given.items() if key not in known and not ignored.fullmatch(key)]
    if missing or foreign:
        raise ValueError(f"not a state dict of {family}: missing {missing}, foreign {foreign}")
    if family == "bart" and "final_logits_bias" in state_dict and state_dict["final_logits_bias"].any():
        raise ValueError("final_logits_bias must be 0: our output has no bias")
    head, token = found.get("head.weight"), found.get("token.weight")
    if family in TIED and head is not None and token is not None and head.data_ptr() == token.data_ptr():
        del found["head.weight"]  # the token embedding's second name
    return found


WILDCARDS = {"{i}": r"(?P<i>\d+)", "*": r"(?P<kind>weight|bias)", "{half}": "(?P<half>encoder|decoder)"}


def _pattern(template: str) -> str:
    pattern = re.escape(template)
    for wildcard, group in WILDCARDS.items():
        pattern = pattern.replace(re.escape(wildcard), group)
    return pattern


def _filled(template: str, match: re.Match[str]) -> str:
    found = match.groupdict()
    return template.format(**found).replace("*", found.get("kind", ""))


def _adapted(family: str, key: str, tensor: Tensor) -> Tensor:
    if family == "gpt2" and key.startswith("h.") and tensor.dim() == 2:
        return tensor.t()  # theirs are [in, out]
    if family == "bart" and key.endswith("embed_positions.weight"):
        return tensor[2:]  # theirs begin at place 2
    if key == "embeddings.position_embeddings":
        return tensor[0]  # [1, S, W]
    return tensor


# ---- models ----------------------------------------------------------------------------------------

MODELS: dict[str, Any] = {
    "BertModel": encoder.BERT,
    "BertForPreTraining": encoder.BERTForPreTraining,
    "BertForMaskedLM": encoder.BERTForMaskedLM,
    "BertForSequenceClassification": encoder.BERTForSequenceClassification,
    "BertForTokenClassification": encoder.BERTForTokenClassification,
    "GPT2LMHeadModel": GPT,
    "LlamaForCausalLM": GPT,
    "ViTForImageClassification": ViT,
    "BartForConditionalGeneration": EncoderDecoder,
}


def from_transformers(model: nn.Module) -> Any:
    """Our model with a Hugging Face model's shape and weights, in its dtype, on its device, in its mode.

    Args:
        model: one of those that ``MODELS`` names, by its class's name.

    Raises:
        TypeError: the class is not known.
        ValueError: its config asks for what our models do not do, or its keys do not fit.
        RuntimeError: shapes do not fit, in torch's own words.

    Example:
        >>> import torch
        >>> from bigkern.models.transformer import from_transformers
        >>> from_transformers(torch.nn.Linear(1, 1))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        TypeError: model must be one of BertModel, BertForPreTraining, ..., not Linear
    """
    name = type(model).__name__
    if name not in MODELS:
        raise TypeError(f"model must be one of {', '.join(MODELS)}, not {name}")
    theirs: Any = model
    config = config_of(theirs.config)
    state = convert_state_dict(theirs.config.model_type, theirs.state_dict())
    with torch.device("meta"):
        ours = MODELS[name](config)
    parameter = next(theirs.parameters())
    ours = ours.to_empty(device=parameter.device).to(parameter.dtype)
    ours.load_state_dict(state)
    return ours.train(theirs.training)
