"""Hugging Face transformers models on our attention: ``register()``, ``enable(model)``, ``disable(model)``.

:func:`bigkern.patch` does this, and the rest of the model; these functions are for attention alone.

transformers looks two functions up by the name that ``attn_implementation=`` gives. One makes the mask of a
whole model: boolean, or None where the causal rule, or a window that every layer hands over itself, says it
all. The other runs each layer's attention on what that layer hands over: mask, position bias, window,
softcap, sinks, dropout, grouped heads.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

try:
    from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
    from transformers.masking_utils import (
        AttentionMaskInterface,
        bidirectional_mask_function,
        causal_mask_function,
        sdpa_mask,
    )
    from transformers.utils import logging
except ImportError as error:
    raise ImportError("this needs transformers 5.17 or later: pip install 'bigkern[transformers]'") from error

from bigkern.core import registry
from bigkern.ops.attention import attention

NAME = "bigkern"
BEFORE = "_bigkern_attention_before"  # on an enabled model: the name that it and each model inside it had

# Models whose layers hand over the window that their mask was made with, as the tests check of each: there no
# [Sq, Sk] mask is made, and what lies outside the window is skipped. All others get a mask.
CAUSAL_WINDOW = frozenset({"gemma2", "gemma3_text", "gpt_oss", "mistral", "mixtral", "qwen2", "qwen3"})
BIDIRECTIONAL_WINDOW = frozenset({"modernbert"})

# Models that drop queries once the mask is made, which leaves None with the wrong meaning.
DROPS_QUERIES = frozenset({"gemma4_text", "gemma4_unified_text"})

HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim")  # what modules that attend call it

# What some layers hand to an attention that is neither "eager" nor "sdpa", for it to select keys by.
NOT_HONOURED = ("indices", "block_indices", "sinks")

logger = logging.get_logger(__name__)


# ---- what users call -------------------------------------------------------------------------------


def register() -> None:
    """Make ``"bigkern"`` a name that transformers' ``attn_implementation=`` takes; harmless to repeat.

    ``from_pretrained(..., attn_implementation="bigkern")`` and ``model.set_attn_implementation("bigkern")``
    then work. transformers gives the name to any class, also to one that computes its attention itself. Of
    those, the ones that would misread our mask (Bloom, MPNet) raise ValueError in their first forward, and
    the rest (DeBERTa, XLNet) ignore the name. :func:`enable` refuses them all.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from bigkern.integrations.transformers import register
        >>> register()
        >>> config = BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=99)
        >>> BertModel._from_config(config, attn_implementation="bigkern").config._attn_implementation
        'bigkern'
    """
    AttentionInterface.register(NAME, layer_attention)
    AttentionMaskInterface.register(NAME, model_mask)


def enable(model: PreTrainedModel) -> PreTrainedModel:
    """Run the attention of ``model``, and of the models inside it, on ours; returns ``model``.

    The model gets copies of its configurations, as other models may have been built from the same objects.

    Raises:
        TypeError: ``model`` is not a transformers model.
        ValueError: a class in it would ignore the choice; the message names it.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> from bigkern.integrations.transformers import disable, enable
        >>> model = enable(GPT2Model(GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=99)))
        >>> model.config._attn_implementation
        'bigkern'
        >>> disable(model).config._attn_implementation
        'sdpa'
    """
    models = _models(model)
    reason = refusal(model)
    if reason is not None:
        raise ValueError(reason)
    register()
    if BEFORE not in model.__dict__:
        names = {name: inner.config._attn_implementation for name, inner in models.items()}
        setattr(model, BEFORE, Before(names))
        _own_configurations(model)
    for inner in models.values():
        inner.set_attn_implementation(NAME)
    return model


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Give ``model`` back the attention that it had before :func:`enable`, if it was enabled.

    Raises:
        TypeError: ``model`` is not a transformers model.
    """
    models = _models(model)
    for name, implementation in model.__dict__.pop(BEFORE, {}).items():
        models[name].set_attn_implementation(implementation)
    return model


def _own_configurations(model: PreTrainedModel) -> None:
    copies: dict[int, Any] = {}  # one for each, whoever else in the model holds it
    for module in model.modules():
        if isinstance(module.__dict__.get("config"), PreTrainedConfig):
            module.config = copy.deepcopy(module.config, copies)


class Before(dict[str, str]):
    """The names that :func:`disable` gives back. Unpickled, they come with ours registered."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _registered, (dict(self),)


def _registered(names: dict[str, str]) -> Before:
    register()
    return Before(names)


# ---- what :func:`bigkern.patch` asks ----------------------------------------------------------------


def refusal(model: PreTrainedModel) -> str | None:
    """Why :func:`enable` refuses this model, or None if it does not."""
    for inner in _models(model).values():
        if not inner._can_set_attn_implementation():
            return _computes_itself(type(inner).__name__)
        if getattr(inner.config, "output_attentions", False):
            return f"the configuration of {type(inner).__name__} asks for attention weights"
    if not any(attends(module) for module in model.modules()):
        return f"{type(model).__name__} has no attention that {NAME!r} could run"
    return None


def is_enabled(model: PreTrainedModel) -> bool:
    return all(is_chosen(inner) for inner in _models(model).values())


def attends(module: nn.Module) -> bool:
    """Whether this very module looks its attention up by the name in its configuration."""
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def is_chosen(module: Any) -> bool:
    """Whether what a module that attends finds by that name is ours."""
    return bool(module.config._attn_implementation == NAME)


def explain(module: Any, tokens: int) -> registry.Explanation:
    """Which backend runs the attention of a module that attends, for so many tokens."""
    parameter = next(module.parameters(), torch.empty(0))  # quantised layers have none
    widths = (getattr(module, name, None) for name in HEAD_DIM)
    D = next((width for width in widths if isinstance(width, int)), 64)
    q = torch.empty(1, 1, tokens, D, dtype=parameter.dtype, device=parameter.device)
    return registry.explain("attention", q, q, q)


def _models(model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """The model and those inside it by name, outermost first: each may have a config of its own."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel, not {type(model).__name__}")
    return {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}


def _computes_itself(name: str) -> str:
    return f'{name} computes its attention itself: attn_implementation="{NAME}" would be ignored'


# ---- what transformers calls -----------------------------------------------------------------------


def model_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **options: Any,
) -> Tensor | None:
    """The mask that a model hands to its layers: ``[B, 1, Sq, Sk]`` bool, True where a query may look.

    It is transformers' own ``sdpa_mask``, and None where that is: where no token is padding and the causal
    rule alone, or no rule at all, is left. It is also None where only a window is left that the layers apply.

    Raises:
        ValueError: the model computes its attention itself, and would take this mask for an additive one.
    """
    reason = _self_computed(type(config))
    if reason is not None:
        raise ValueError(reason)
    if getattr(config, "model_type", "") in DROPS_QUERIES:
        allow_is_causal_skip = False
    square = isinstance(q_offset, int) and q_offset == kv_offset == 0 and q_length == kv_length
    if local_size is not None and square and _hands_over_window(config, causal=allow_is_causal_skip):
        local_size = None
    all_queries_alike = mask_function is bidirectional_mask_function
    mask = sdpa_mask(
        batch_size,
        1 if all_queries_alike else q_length,
        kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **options,
    )
    return mask if mask is None else mask.expand(-1, -1, q_length, -1)


def layer_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, by the rules of transformers' own ``sdpa_attention_forward``.

    ``query [B, Hq, Sq, D]``, ``key`` and ``value [B, Hkv, Sk, D]``; returns ``[B, Sq, Hq, Dv]``, no weights.
    The causal rule holds where the module says so, no mask is given and there is more than one query. It
    counts from the top left: keys beyond the queries are the unused end of a static cache.

    Raises:
        ValueError: the layer selects keys in a way that the op does not know.
        TypeError, ValueError: as :func:`bigkern.attention`.
    """
    for name in NOT_HONOURED:
        if options.get(name) is not None:
            raise ValueError(
                f'{type(module).__name__} needs {name}, unknown to "{NAME}": choose "sdpa" for it'
            )
    if options.get("output_attentions"):
        logger.warning_once(
            f'"{NAME}" stores no attention weights: choose "eager" for output_attentions=True'
        )
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype != torch.float64:
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    if query.shape[0] != key.shape[0]:
        query = query.expand(key.shape[0], -1, -1, -1)  # learned queries, the same for the whole batch
    causal, window, mask, bias = False, None, None, position_bias
    if attention_mask is None:
        if query.shape[2] > 1:
            causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
            if sliding_window is not None and _hands_over_window(module.config, causal=causal):
                window = (sliding_window - 1, sliding_window - 1)
    elif attention_mask.is_floating_point():
        bias = attention_mask if bias is None else bias + attention_mask
    else:
        mask = attention_mask
    o = attention(
        query,
        key,
        value,
        causal=causal,
        mask=mask,
        bias=None if bias is None else bias.to(query.dtype),
        scale=scaling,
        window=window,
        softcap=softcap or 0.0,
        sinks=s_aux,
        dropout_p=dropout,
    )
    return cast(Tensor, o).transpose(1, 2).contiguous(), None


def _hands_over_window(config: Any, *, causal: bool) -> bool:
    return getattr(config, "model_type", "") in (CAUSAL_WINDOW if causal else BIDIRECTIONAL_WINDOW)


@torch.compiler.assume_constant_result
def _self_computed(config_class: type) -> str | None:
    """Why models of this configuration would misread our mask, or None: it asks those that are loaded."""
    models = [cls for cls in _subclasses(PreTrainedModel) if cls.config_class is config_class]
    if not models or any(cls._can_set_attn_implementation() for cls in models):
        return None
    return _computes_itself(models[0].__name__)


def _subclasses(cls: type[PreTrainedModel]) -> Iterator[type[PreTrainedModel]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
