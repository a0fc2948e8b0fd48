"""The stack of layers of every recurrent model: its dropouts, its state, its initial weights.

    x = drop(x)                                                    [T, B, I], time first inside all models
    y, state = layer(... drop(layer(x)))                           [T, B, P]
    y = drop(y)

The state is torch's: ``h [L * D, B, P]``, for an LSTM ``(h, c)``. A stack is put together from
:class:`Parts`: bigkern's, or plain PyTorch's to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from bigkern import nn as bnn
from bigkern.models.recurrent.config import RecurrentConfig
from bigkern.models.transformer.blocks import attend
from bigkern.models.transformer.stock import stock_attend
from bigkern.ops.linear import linear

State = Tensor | tuple[Tensor, Tensor]


class Parts(NamedTuple):
    """What a model is made of; ``product`` is a linear layer whose weight is an embedding's."""

    linear: type[nn.Linear]
    product: Callable[..., Tensor]
    attend: Callable[..., Tensor]
    cells: dict[str, Callable[..., nn.RNNBase]]


def _cells(module: Any) -> dict[str, Callable[..., nn.RNNBase]]:
    plain = {f"rnn_{f}": partial(module.RNN, nonlinearity=f) for f in ("tanh", "relu")}
    return {"lstm": module.LSTM, "gru": module.GRU, **plain}


OURS = Parts(bnn.Linear, linear, attend, _cells(bnn))
STOCK = Parts(nn.Linear, F.linear, stock_attend, _cells(nn))


class Stack(nn.Module):
    """All layers of one model. One module holds them, or with ``config.locked`` each has its own."""

    def __init__(self, config: RecurrentConfig, parts: Parts, inputs: int, bidirectional: bool = False):
        super().__init__()
        self.config, self.directions = config, 2 if bidirectional else 1
        D = self.directions
        options: dict[str, Any] = {"bidirectional": bidirectional}
        if config.proj_size is not None:
            options["proj_size"] = config.proj_size // D
        for name in ("layer_norm", "zoneout", "recurrent_dropout"):
            if getattr(config, name):
                options[name] = getattr(config, name)
        modules = config.layers if config.locked else 1
        if config.layers > modules:
            options.update(num_layers=config.layers, dropout=config.dropout)
        cell = parts.cells[config.cell]
        self.layers = nn.ModuleList(
            cell(inputs if i == 0 else config.outputs, config.width // D, **options) for i in range(modules)
        )

    def forward(
        self, x: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """``x [T, B, I]`` to the outputs ``[T, B, P]``, zero behind a row's length, and the last state.

        ``lengths [B]`` are of the rows, at least 1; None: all are T long.
        """
        c, T = self.config, len(x)
        y: Tensor | PackedSequence = x
        if lengths is not None:
            y = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
        y = self._drop(y, c.input_dropout)
        states: list[State] = []
        for i, layer in enumerate(self.layers):
            if i > 0:
                y = self._drop(y, c.dropout)
            y, last = layer(y, self._part(state, i))
            states.append(last)
        y = self._drop(y, c.output_dropout)
        out = pad_packed_sequence(y, total_length=T)[0] if isinstance(y, PackedSequence) else y
        return out, _joined(states)

    def _part(self, state: State | None, module: int) -> State | None:
        """The state of one of the modules."""
        if state is None or len(self.layers) == 1:
            return state
        rows = slice(module * self.directions, (module + 1) * self.directions)
        return state[rows] if isinstance(state, Tensor) else (state[0][rows], state[1][rows])

    def _drop(self, x: Tensor | PackedSequence, p: float) -> Tensor | PackedSequence:
        if p == 0.0 or not self.training:
            return x
        if isinstance(x, PackedSequence):
            return x._replace(data=self._dropped(x.data, x.batch_sizes, p))
        return self._dropped(x, None, p)

    def _dropped(self, x: Tensor, batch_sizes: Tensor | None, p: float) -> Tensor:
        """``[T, B, W]``, or packed ``[N, W]``: with ``locked`` each sequence loses the same units always."""
        if not self.config.locked:
            return F.dropout(x, p)
        if batch_sizes is None:
            return x * F.dropout(x.new_ones(x.shape[1:]), p)
        mask = F.dropout(x.new_ones(int(batch_sizes[0]), x.shape[1]), p)
        return x * torch.cat([mask[:rows] for rows in batch_sizes.tolist()])


# ---- states ----------------------------------------------------------------------------------------


def mapped(function: Callable[[Tensor], Tensor], state: State) -> State:
    """A function of each tensor of a state."""
    return function(state) if isinstance(state, Tensor) else (function(state[0]), function(state[1]))


def hidden_of(state: State) -> Tensor:
    """h of a state, ``[L * D, B, P]``."""
    return state if isinstance(state, Tensor) else state[0]


def reordered(state: State, rows: Tensor) -> State:
    """Sequence i goes on as sequence ``rows[i]`` did so far."""
    return mapped(lambda x: x.index_select(1, rows), state)


def detached(state: State) -> State:
    """The state as a constant: gradients stop there."""
    return mapped(Tensor.detach, state)


def _joined(states: list[State]) -> State:
    """One state of those of the modules, first layer first."""
    if len(states) == 1:
        return states[0]
    if isinstance(states[0], Tensor):
        return torch.cat(cast("list[Tensor]", states))
    hidden, cells = zip(*states, strict=True)
    return torch.cat(hidden), torch.cat(cells)


# ---- tokens and lengths ----------------------------------------------------------------------------


def embedded(tokens: Tensor, weight: Tensor, p: float = 0.0) -> Tensor:
    """Embeddings ``[*, E]``; with probability p a word is zero wherever it occurs, and the others larger."""
    x = F.embedding(tokens, weight)
    return x if p == 0.0 else x * F.dropout(x.new_ones(len(weight)), p)[tokens].unsqueeze(-1)


def checked_lengths(lengths: Tensor | None, of: str, x: Tensor) -> Tensor | None:
    """``lengths`` is int64 or int32 ``[B]``, each from 1 to the length of x ``[B, T, ...]``."""
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int64, torch.int32):
        kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths must be an int64 or int32 Tensor [B], not {kind}")
    B, T = x.shape[:2]
    if lengths.shape != (B,):
        raise ValueError(f"lengths must be one of each row of {of}, [{B}], not shape {tuple(lengths.shape)}")
    if not bool(((lengths >= 1) & (lengths <= T)).all()):
        raise ValueError(f"lengths must be from 1 to {T}, not {lengths.tolist()}")
    return lengths


def mask_of(lengths: Tensor | None, T: int, device: torch.device) -> Tensor | None:
    """bool ``[B, T]``, True where a token stands; None if one stands everywhere."""
    return None if lengths is None else torch.arange(T, device=device) < lengths.to(device).unsqueeze(1)


# ---- initial weights -------------------------------------------------------------------------------


@torch.no_grad()
def initialise(model: nn.Module, config: RecurrentConfig) -> None:
    """The initial weights of the config's seed, see :class:`RecurrentConfig`.

    Drawn in the order of the state dict from a generator of its own, so that twins start alike. Parameters
    on the meta device are left alone.
    """
    generator = torch.Generator().manual_seed(config.seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                continue
            bound = _bound(module, name)
            if bound is None:  # a norm's
                parameter.fill_(0.0 if "bias" in name else 1.0)
                continue
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
            if isinstance(module, nn.RNNBase):
                _special(module.hidden_size, name, parameter, config, generator)


def _bound(module: nn.Module, name: str) -> float | None:
    """What a parameter's initial values lie within."""
    if isinstance(module, nn.RNNBase):
        own = name.startswith(("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh"))
        return 1 / math.sqrt(module.hidden_size) if own else None
    if isinstance(module, nn.Linear):
        return 1 / math.sqrt(module.in_features)
    if isinstance(module, nn.Embedding):
        return 0.1
    return 0.0 if name == "bias" else None  # the vocabulary's


def _special(
    H: int, name: str, parameter: Tensor, config: RecurrentConfig, generator: torch.Generator
) -> None:
    """What the config asks of a recurrent layer's start."""
    if config.orthogonal and name.startswith("weight_hh"):
        for gate in parameter.split(H):
            gate.copy_(nn.init.orthogonal_(torch.empty(gate.shape), generator=generator))
    if config.forget_bias is not None and name.startswith("bias_"):
        parameter[H : 2 * H] = config.forget_bias if name.startswith("bias_ih") else 0.0
