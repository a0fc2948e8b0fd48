"""Make a model that exists run on our ops, and take it back: ``patch(model)`` and ``unpatch(model)``.

A module is patched when its type is *exactly* one that is known; a subclass may mean something else by its
forward and is left alone, visibly. Patching changes the module's class to ours, which is the stock class with
another forward, and nothing else: the module, its parameters, buffers, hooks and state_dict stay the same
objects. That is why it can be undone, shared, deep-copied and pickled.

Hugging Face models are patched in the same way, by the tables of :mod:`bigkern.integrations`, which are
imported when there are any; their attention, by the name that they look it up by.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import nn

import bigkern.nn as ours
from bigkern.patch.describe import describe
from bigkern.patch.report import PatchReport, Report, Row
from bigkern.patch.transformers import lazy as huggingface

__all__ = ["PatchReport", "Report", "Row", "patch", "unpatch"]

PATCHED_MARK = "_bigkern_patched_from"  # on a patched instance: it was stock before, and can be again

Replacements = dict[type[nn.Module], type[nn.Module]]  # stock class -> ours

REPLACEMENTS: dict[str, Replacements] = {
    "attention": {nn.MultiheadAttention: ours.MultiheadAttention},
    "norm": {nn.LayerNorm: ours.LayerNorm, nn.RMSNorm: ours.RMSNorm},
    "layernorm_ffn": {
        nn.TransformerEncoderLayer: ours.TransformerEncoderLayer,
        nn.TransformerDecoderLayer: ours.TransformerDecoderLayer,
    },
    "batch_norm": {nn.BatchNorm2d: ours.BatchNorm2d},
    "recurrent": {
        nn.LSTM: ours.LSTM,
        nn.GRU: ours.GRU,
        nn.RNN: ours.RNN,
        nn.LSTMCell: ours.LSTMCell,
        nn.GRUCell: ours.GRUCell,
        nn.RNNCell: ours.RNNCell,
    },
    "linear": {nn.Linear: ours.Linear},
}
OPS = tuple(REPLACEMENTS)
REPORTED = tuple(op for op in OPS if op != "linear")  # also where they are left alone


# ---- what users call -------------------------------------------------------------------------------


def patch(model: nn.Module, ops: Iterable[str] | None = None, strict: bool = False) -> PatchReport:
    """Run the model's attention, norms, feed-forward blocks and recurrent layers on our ops, in place.

    :func:`unpatch` takes it back. Patching twice is the same as once. Outputs stay the same within rounding;
    parameters, state_dict keys and hooks are untouched. What is patched: torch's Linear, LayerNorm, RMSNorm,
    BatchNorm2d, MultiheadAttention, Transformer layers, LSTM, GRU, RNN and their cells, and of Hugging Face
    models attention, norms, feed-forward blocks, and dropout and residual where they stand between these.
    What is left alone, and why, is in the report, in which each attention and each norm has a row.
    ``torch.jit.trace`` records stock PyTorch; ``torch.jit.script`` compiles the stock layers, and leaves them
    in the places of ours: patch the model again to run it here.

    Args:
        model: any module; modules inside it are found by exact type.
        ops: which ops to use, of ``"attention"``, ``"norm"``, ``"layernorm_ffn"``, ``"batch_norm"``,
            ``"recurrent"`` and ``"linear"``; None for all.
        strict: whether to raise, rather than report, when something must be left alone.

    Returns:
        A :class:`PatchReport` that prints as a table: module, op, backend, reason. The backend is what runs
        the op for 512 tokens on the module's device and dtype in its present mode. As a context manager it
        takes back at its end what this call changed.

    Raises:
        TypeError: ``model`` is not a :class:`torch.nn.Module`.
        ValueError: ``ops`` names something else; or with ``strict``, what was left alone, a line a module.
            The model is as it was.

    Example:
        >>> import torch, bigkern
        >>> model = torch.nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
        >>> with bigkern.patch(model) as report:
        ...     report.patched
        6
        >>> bigkern.unpatch(model)
        0
    """
    _check(model)
    chosen = _chosen(ops)
    blocks = huggingface.blocks(model)
    tables = _tables(blocks)
    wanted = {stock: cls for op in OPS if op in chosen for stock, cls in tables[op].items()}
    walk = list(_modules(model))
    attention = huggingface.Attention(walk, known=bool(blocks))
    changed = attention.enable(wanted="attention" in chosen)
    for _, module, sealed in walk:
        stock = type(module)
        if sealed is None and stock in wanted:
            module.__class__ = wanted[stock]
            setattr(module, PATCHED_MARK, stock.__name__)
            changed.append(module)
    try:
        rows = [row for entry in walk for row in _rows(*entry, tables, attention)]
        report = PatchReport(rows, partial(_restore, weakref.WeakSet(changed)))
        if strict and report.left:
            left = "\n".join(f"  {row.module} ({row.type}): {row.reason}" for row in report.left)
            raise ValueError(f"{len(report.left)} modules would be left alone:\n{left}")
    except BaseException:
        _restore(changed)
        raise
    return report


def unpatch(model: nn.Module) -> int:
    """Give everything that :func:`patch` changed back as it was; returns how many modules that were.

    Modules that were built as ``bigkern.nn`` layers stay what they are, and so do those whose weights
    :func:`bigkern.freeze` has frozen: stock layers could not read them. Modules from whose class torch has
    derived another since (a parametrization, ``fully_shard``) stay patched while it is theirs.

    Raises:
        TypeError: ``model`` is not a :class:`torch.nn.Module`.
    """
    _check(model)
    return _restore(model.modules())


def _restore(modules: Iterable[nn.Module]) -> int:
    modules = list(modules)
    count = sum(huggingface.disable(module) for module in modules)
    marked = [module for module in modules if PATCHED_MARK in module.__dict__ and not _frozen(module)]
    tables = _tables(huggingface.blocks(*marked))
    stock_of = {replacement: stock for table in tables.values() for stock, replacement in table.items()}
    restored = [module for module in marked if type(module) in stock_of]
    for module in restored:
        module.__class__ = stock_of[type(module)]
        delattr(module, PATCHED_MARK)
    return count + len(restored)


def _frozen(module: nn.Module) -> bool:
    linear = getattr(module, "linear1", None)
    return isinstance(linear, ours.FrozenLinear) or getattr(module, "frozen", None) is not None


# ---- what there is to patch ------------------------------------------------------------------------


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")


def _chosen(ops: Iterable[str] | None) -> tuple[str, ...]:
    if isinstance(ops, torch.Tensor) or not isinstance(ops, Iterable | None):
        raise TypeError(f"ops must be names of ops or None, not {type(ops).__name__}")
    chosen = OPS if ops is None else (ops,) if isinstance(ops, str) else tuple(ops)
    for op in chosen:
        if op not in OPS:
            raise ValueError(f"ops must be of {', '.join(OPS)}, not {op!r}")
    return chosen


def _tables(blocks: dict[str, Replacements]) -> dict[str, Replacements]:
    """Torch's layers, and the blocks of transformers if there are any."""
    return {op: table | blocks.get(op, {}) for op, table in REPLACEMENTS.items()}


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Every module, outermost first, with why it must stay as it is: it is part of something compiled."""
    sealed: dict[str, str] = {}
    for name, module in model.named_modules():
        reason = next((why for outer, why in sealed.items() if name.startswith(outer)), None)
        if reason is None and (reason := _sealed(module)) is not None:
            sealed[f"{name}." if name else ""] = reason
        yield name, module, reason


def _sealed(module: nn.Module) -> str | None:
    """Why a module's code is not its class's any more, or None if it is."""
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted or traced already: patch the model, then script it"
    if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
        return "compiled already: patch the model, then compile it"
    return None


_WORDS = re.compile("Attention|Norm")  # a class so named has a row in the report, whatever it is


def _rows(
    name: str,
    module: nn.Module,
    sealed: str | None,
    tables: dict[str, Replacements],
    attention: huggingface.Attention,
) -> Iterator[Row]:
    """What the report says of a module; nothing of those that are neither patched nor attention nor norm."""
    name, kind = name or "(model)", type(module).__name__
    if sealed is not None:
        if _sealed(module) or _WORDS.search(kind):
            yield Row(name, kind, "-", "torch", sealed, refused=True)
        return
    for op, table in tables.items():
        if type(module) in table.values():
            yield from describe(name, module)
            return
        if type(module) in table and op in REPORTED:
            yield Row(name, kind, "-", "torch", f"{op} is not among ops")
            return
    named_so = _WORDS.search(kind)
    inner = named_so and next(
        (n for n, m in module.named_modules() if n and named_so[0] in type(m).__name__), None
    )
    if (row := attention.row(name, module, named_so is not None and inner is None)) is not None:
        yield row
    elif (reason := _subclassed(module, tables)) is not None:
        yield Row(name, kind, "-", "torch", reason, refused=True)
    elif inner is not None:
        yield Row(name, kind, "-", "-", f"it is made of others: {inner}")
    elif named_so is not None:
        yield Row(name, kind, "-", "torch", "no op of ours is known to do the same", refused=True)


def _subclassed(module: nn.Module, tables: dict[str, Replacements]) -> str | None:
    """Why a module whose class derives from a known one is left alone; None of any other module."""
    bases = (stock for op in REPORTED for stock in tables[op] if isinstance(module, stock))
    if (base := next(bases, None)) is None:
        return None
    if nn.utils.parametrize.is_parametrized(module):
        return "a parametrization computes its parameters"
    return f"a subclass of {base.__name__}: its forward may differ"
