"""What every configuration of a model checks of its fields, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args


def check_fields(
    config: Any,
    sizes: Iterable[str],
    optional_sizes: Iterable[str],
    choices: Mapping[str, Any],
    probabilities: Iterable[str],
    tokens: Iterable[str],
) -> None:
    """Raise a ValueError that names the first field out of its range.

    Sizes are at least 1, optional ones may be None; a choice is one of its Literal's; probabilities are in
    [0, 1); tokens, which may be None, are within ``config.vocab_size``.
    """
    given = (name for name in optional_sizes if getattr(config, name) is not None)
    for name in (*sizes, *given):
        size = getattr(config, name)
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")
    for name, literal in choices.items():
        if getattr(config, name) not in get_args(literal):
            known = ", ".join(get_args(literal))
            raise ValueError(f"{name} must be one of {known}, not {getattr(config, name)!r}")
    for name in probabilities:
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ValueError(f"{name} must be in [0, 1), not {getattr(config, name)}")
    for name in tokens:
        token = getattr(config, name)
        if token is not None and not 0 <= token < config.vocab_size:
            raise ValueError(f"{name} must be within the vocabulary of {config.vocab_size}, not {token}")
