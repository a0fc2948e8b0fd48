"""What ``LSTM``, ``GRU`` and ``RNN`` share: torch's forms and checks around a loop over layers on the op."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bigkern.core import registry
from bigkern.core.checks import check_flag, check_number
from bigkern.core.library import traced
from bigkern.nn.torchscript import ScriptsAsStock
from bigkern.ops.linear import linear
from bigkern.ops.norm import layer_norm
from bigkern.ops.recurrent import recurrent
from bigkern.ops.recurrent.backends import RECURRENT, declined
from bigkern.ops.recurrent.call import Recurrent
from bigkern.ops.recurrent.reference import layer_norm_scan

States = tuple[Tensor, ...]  # (h,), of an LSTM (h, c)


class RecurrentBase(ScriptsAsStock, nn.RNNBase):
    """torch's checks, then torch's whole stack or a loop over its layers on the op."""

    layer_norm = False  # of the class: a layer of torch's that becomes one of these has none of them
    zoneout = 0.0
    recurrent_dropout = 0.0

    def __init__(
        self,
        *args: Any,
        layer_norm: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        for name, p in (("zoneout", zoneout), ("recurrent_dropout", recurrent_dropout)):
            check_number(name, p, "a probability in [0, 1]", 0.0, math.nextafter(1.0, 2.0))
        check_flag("layer_norm", layer_norm)
        if self.proj_size > 0 and (layer_norm or zoneout):
            raise ValueError("layer_norm and zoneout know no projections: proj_size must be 0")
        self.layer_norm, self.zoneout, self.recurrent_dropout = layer_norm, zoneout, recurrent_dropout
        if layer_norm:
            self._add_norms()

    def _add_norms(self) -> None:
        """The norms' parameters; the products' biases serve as theirs, a cell has none yet."""
        for layer in range(self.num_layers):
            for place in self._places(layer):
                weight = getattr(self, f"weight_hh_{place}")
                gates, H = weight.shape
                sizes = {f"norm_weight_ih_{place}": gates, f"norm_weight_hh_{place}": gates}
                if self.mode == "LSTM":
                    sizes |= {f"norm_weight_c_{place}": H, f"norm_bias_c_{place}": H}
                for name, size in sizes.items():
                    setattr(self, name, nn.Parameter(weight.new_empty(size)))
        self.reset_parameters()

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _places(self, layer: int) -> list[str]:
        """How the names of a layer's parameters end, direction after direction."""
        return [f"l{layer}", f"l{layer}_reverse"][: self._directions]

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("norm_"):
                nn.init.constant_(parameter, float(name.startswith("norm_weight")))

    def extra_repr(self) -> str:
        said = [f"{name}={value}" for name, value in self._extras().items() if value]
        return ", ".join([str(super().extra_repr()), *said])

    def _extras(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("layer_norm", "zoneout", "recurrent_dropout")}

    def _beyond_stock(self) -> str | None:
        return next((name for name, value in self._extras().items() if value), None)

    # ---- forward: torch's forms around a loop over the layers --------------------------------------

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        if self._is_declined(input):
            return cast(tuple[Any, Any], super().forward(input, hx))
        packed = isinstance(input, PackedSequence)
        x, batch_sizes, order, back = input if packed else (input, None, None, None)
        states = (hx,) if isinstance(hx, Tensor) else tuple(hx or ())
        rank = 3 if packed else x.dim()
        count = 2 if self.mode == "LSTM" else 1
        if rank not in (2, 3) or len(states) not in (0, count) or any(s.dim() != rank for s in states):
            return cast(tuple[Any, Any], super().forward(input, hx))  # which raises, in torch's words
        batch_dim = 0 if self.batch_first else 1
        if rank == 2:
            x, states = x.unsqueeze(batch_dim), tuple(s.unsqueeze(1) for s in states)
        self._update_flat_weights()
        states = _permuted(states, order) if states else self._zeros(x, batch_sizes)
        self.check_forward_args(x, _form(states), batch_sizes)
        time_major = packed or not self.batch_first
        x = x if time_major else x.transpose(0, 1)
        if self._is_stocks(x, states, batch_sizes):
            return cast(tuple[Any, Any], super().forward(input, hx))
        y, states = self._stack(x, states, batch_sizes)
        if packed:
            return PackedSequence(y, batch_sizes, order, back), _form(_permuted(states, back))
        y = y if time_major else y.transpose(0, 1)
        if rank == 2:
            y, states = y.squeeze(batch_dim), tuple(s.squeeze(1) for s in states)
        return y, _form(states)

    def _zeros(self, x: Tensor, batch_sizes: Tensor | None) -> States:
        shapes = [self.get_expected_hidden_size(x, batch_sizes)]
        if self.mode == "LSTM":
            shapes.append(cast(nn.LSTM, self).get_expected_cell_size(x, batch_sizes))
        return tuple(x.new_zeros(shape) for shape in shapes)

    def _is_declined(self, input: Any) -> bool:
        """Whether stock would be chosen by sizes alone: :meth:`_is_stocks` costs more than a short call."""
        if self._has_extras() or registry.forced() or traced():
            return False
        if isinstance(input, PackedSequence):
            x, batch_sizes = input.data, input.batch_sizes
        elif isinstance(input, Tensor) and input.dim() == 3:
            x, batch_sizes = input.transpose(0, 1) if self.batch_first else input, None
        else:
            return False
        likeness = self.mode, x.shape, batch_sizes is None, x.dtype, self.hidden_size, self.bidirectional
        if (known := RECURRENT.stocks.have(*likeness)) is not None:
            return known
        weights: Any = self._flat_weights[: len(self._flat_weights) // self.num_layers]
        states: Any = None
        call = Recurrent(x, states, states, weights, batch_sizes, None, self.mode, torch.is_grad_enabled())
        found = declined(call)
        RECURRENT.stocks.learn(found, *likeness)
        return found

    def _has_extras(self) -> bool:
        return bool(self.layer_norm or self.zoneout or (self.recurrent_dropout and self.training))

    def _is_stocks(self, x: Tensor, states: States, batch_sizes: Tensor | None) -> bool:
        """Whether torch's whole stack runs: nothing more than it is asked, and the first layer is stock's."""
        if len(x) == 0:
            return True  # sequences of no steps, which torch refuses
        if self._has_extras():
            return False
        h0, *c0 = self._states_of(0, states)
        weights = self._weights_of(0)
        save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, h0, *c0, *weights))
        first = Recurrent(x, h0, c0[0] if c0 else None, weights, batch_sizes, None, self.mode, save)
        return RECURRENT.resolve(first).by_torch

    def _stack(self, x: Tensor, states: States, batch_sizes: Tensor | None) -> tuple[Tensor, States]:
        """The layers one after the other; x is ``[T, B, I]`` or packed ``[N, I]``."""
        found: list[States] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            weights, kept = self._weights_of(layer), self._zoneout(x)
            arguments = x, _form(self._states_of(layer, states)), weights, self.mode, batch_sizes, kept
            x, hidden = self._normed(layer, *arguments) if self.layer_norm else recurrent(*arguments)
            found.append(hidden if isinstance(hidden, tuple) else (hidden,))
        if len(found) == 1:
            return x, found[0]
        return x, tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def _states_of(self, layer: int, states: States) -> States:
        D = self._directions
        return states if self.num_layers == 1 else tuple(s[layer * D : (layer + 1) * D] for s in states)

    def _weights_of(self, layer: int) -> list[Tensor]:
        """A layer's, direction after direction; of the recurrent ones what a call's dropout leaves."""
        count = len(self._flat_weights) // self.num_layers
        weights = cast(list[Tensor], self._flat_weights[layer * count : (layer + 1) * count])
        if self.recurrent_dropout and self.training:
            for i in range(1, count, count // self._directions):
                weights[i] = F.dropout(weights[i], self.recurrent_dropout)
        return weights

    def _zoneout(self, x: Tensor) -> Tensor | None:
        """``[N, D * H]``: what part of the state before a number keeps; in training all or nothing."""
        if not self.zoneout:
            return None
        kept = x.new_empty(x.shape[:-1].numel(), self.hidden_size * self._directions)
        return kept.bernoulli_(self.zoneout) if self.training else kept.fill_(self.zoneout)

    # ---- layer_norm --------------------------------------------------------------------------------

    def _normed(
        self, layer: int, x: Tensor, hx: Any, weights: list[Tensor], mode: str, batch_sizes: Any, kept: Any
    ) -> tuple[Tensor, Any]:
        """A layer with LayerNorm on both products and an LSTM's cell, which no kernel computes."""
        h0, c0 = hx if mode == "LSTM" else (hx, None)
        places = self._places(layer)
        each = len(weights) // len(places)
        b_ih, b_hh = (weights[2::each], weights[3::each]) if self.bias else ([None] * len(places), None)
        gammas = self._norms("weight_ih", places)
        gates = [self._normed_product(x, *own) for own in zip(weights[::each], gammas, b_ih, strict=True)]
        rows = torch.cat(gates, -1).flatten(0, -2)
        y, hn, cn = layer_norm_scan(
            rows, h0, c0, weights[1::each], self._norms("weight_hh", places), b_hh,
            self._norms("weight_c", places), self._norms("bias_c", places), batch_sizes, kept, mode,
        )  # fmt: skip
        return y.unflatten(0, x.shape[:-1]), hn if cn is None else (hn, cn)

    def _norms(self, kind: str, places: list[str]) -> Any:
        """A parameter of the norms, direction after direction; None where the mode has no such."""
        names = [f"norm_{kind}_{place}" for place in places]
        return [getattr(self, name) for name in names] if hasattr(self, names[0]) else None

    def _normed_product(self, x: Tensor, weight: Tensor, gamma: Tensor, bias: Tensor | None) -> Tensor:
        """``LN(x W_ih^T)`` over all of a direction's gates, but of a GRU's n by itself: r meets it later."""
        H = self.hidden_size
        sizes = (2 * H, H) if self.mode == "GRU" else (len(weight),)
        biases = (None,) * len(sizes) if bias is None else bias.split(sizes)
        parts = zip(weight.split(sizes), gamma.split(sizes), biases, strict=True)
        return torch.cat([layer_norm(linear(x, w), (len(w),), g, b) for w, g, b in parts], -1)  # type: ignore[misc]


def _form(states: States) -> Any:
    """As torch's layers take and return them: h, or (h, c)."""
    return states if len(states) == 2 else states[0]


def _permuted(states: States, order: Tensor | None) -> States:
    return states if order is None else tuple(s.index_select(1, order) for s in states)
