"""``LSTM``, ``GRU`` and ``RNN``: torch's layers on the recurrent op, with what is usual beyond torch's."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bigkern.ops.linear import linear
from bigkern.ops.norm import layer_norm
from bigkern.ops.recurrent import RECURRENT, recurrent
from bigkern.reference.recurrent import layer_norm_scan

States = tuple[Tensor, ...]  # (h,), of an LSTM (h, c); () where none are given, for zeros


class _Recurrent(nn.RNNBase):
    """What the three share: torch's checks, then torch's whole stack or a loop over its layers on the op."""

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
            if not 0.0 <= p <= 1.0:
                raise ValueError(f"{name} must be a probability in [0, 1], not {p}")
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
        extras = {name: getattr(self, name) for name in ("layer_norm", "zoneout", "recurrent_dropout")}
        said = [f"{name}={value}" for name, value in extras.items() if value]
        return ", ".join([str(super().extra_repr()), *said])

    # ---- forward: torch's forms around a loop over the layers --------------------------------------

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
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
        states = _permuted(states, order)
        self._update_flat_weights()
        self._check(x, states, batch_sizes)
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

    def _check(self, x: Tensor, states: States, batch_sizes: Tensor | None) -> None:
        """torch's checks, of a packed batch's state too: torch's LSTM leaves that to the product to fail."""
        if states:
            self.check_forward_args(x, _form(states), batch_sizes)
        else:
            self.check_input(x, batch_sizes)

    def _is_stocks(self, x: Tensor, states: States, batch_sizes: Tensor | None) -> bool:
        """Whether torch's whole stack runs: nothing more than it is asked, and the first layer is stock's."""
        if len(x) == 0:
            return True  # sequences of no steps, which torch refuses
        if self.layer_norm or self.zoneout or (self.recurrent_dropout and self.training):
            return False
        first = x, self._states_of(0, states), self._weights_of(0), self.mode, batch_sizes
        return RECURRENT.resolve(*RECURRENT.bind(*first)).name == "torch"

    def _stack(self, x: Tensor, states: States, batch_sizes: Tensor | None) -> tuple[Tensor, States]:
        """The layers one after the other; x is ``[T, B, I]`` or packed ``[N, I]``."""
        found: list[States] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            hx, weights, kept = self._states_of(layer, states), self._weights_of(layer), self._zoneout(x)
            if self.layer_norm:
                x, hidden = self._normed(layer, x, hx, weights, batch_sizes, kept)
            else:
                x, hidden = recurrent(x, hx, weights, self.mode, batch_sizes, kept)
            found.append(hidden if isinstance(hidden, tuple) else (hidden,))
        return x, tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def _states_of(self, layer: int, states: States) -> Any:
        D = self._directions
        return _form(tuple(s[layer * D : (layer + 1) * D] for s in states))

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
        self, layer: int, x: Tensor, hx: Any, weights: list[Tensor], batch_sizes: Any, kept: Tensor | None
    ) -> tuple[Tensor, Any]:
        """A layer with LayerNorm on both products and an LSTM's cell, which no kernel computes."""
        _, h0, c0, *_ = RECURRENT.bind(x, hx, weights, self.mode, batch_sizes, kept)
        places = self._places(layer)
        each = len(weights) // len(places)
        b_ih, b_hh = (weights[2::each], weights[3::each]) if self.bias else ([None] * len(places), None)
        gammas = self._norms("weight_ih", places)
        gates = [self._normed_product(x, *own) for own in zip(weights[::each], gammas, b_ih, strict=True)]
        rows = torch.cat(gates, -1).flatten(0, -2)
        y, hn, cn = layer_norm_scan(
            rows, h0, c0, weights[1::each], self._norms("weight_hh", places), b_hh,
            self._norms("weight_c", places), self._norms("bias_c", places), batch_sizes, kept, self.mode,
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
    """As torch's layers take and return them: None, h, or (h, c)."""
    return states if len(states) == 2 else states[0] if states else None


def _permuted(states: States, order: Tensor | None) -> States:
    return states if order is None else tuple(s.index_select(1, order) for s in states)


class LSTM(_Recurrent, nn.LSTM):
    r"""Drop-in for :class:`torch.nn.LSTM`: same constructor, parameters, keys and errors.

    ``i, f, o = sigmoid(.)``, ``g = tanh(.)``, ``c = f c' + i g``, ``h = o tanh(c)``, where ``.`` is
    ``W_ih x + b_ih + W_hh h' + b_hh``

    Where the op's choice for the first layer is stock, torch's own forward runs all of them (cuDNN's stack);
    else a loop over the layers on :func:`bigkern.recurrent`. ``torch.compile`` breaks its graph at every
    subclass of torch's recurrent layers, and so runs these as they are, unless
    ``torch._dynamo.config.allow_rnn`` is set: then a layer is one opaque node.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device,
            dtype: as torch's.
        layer_norm: keyword only: ``.`` becomes ``LN(W_ih x) + b_ih + LN(W_hh h') + b_hh`` and ``h``
            ``o tanh(LN(c))``, with parameters ``norm_weight_ih_l0``, ``norm_weight_hh_l0``,
            ``norm_weight_c_l0``, ``norm_bias_c_l0`` and so on. A loop of torch's operations.
        zoneout: keyword only: probability with which a number of h stays as it was the step before; in eval
            h is the mean of both. c is not zoned out.
        recurrent_dropout: keyword only: probability with which an element of each weight_hh is dropped in
            training, one mask a call, at every step the same.

    Shapes: x ``[T, B, I]``, ``[B, T, I]`` with batch_first, ``[T, I]``, or a PackedSequence; ``hx = (h, c)``
    each ``[layers * directions, B, H]``. y ``[T, B, directions * H]`` likewise, and ``(h, c)``. float32,
    bfloat16, float16; float64 on stock.

    Saved for backward: a layer's input, initial states, weights, output, activated gates, and fp32 cells.

    Raises:
        torch's own errors; ValueError for a probability out of [0, 1], or projections with layer_norm or
            zoneout.

    Source: Hochreiter and Schmidhuber, Long Short-Term Memory (1997); Ba et al., Layer Normalization (2016);
    Krueger et al., Zoneout (2017); Wan et al., Regularization of Neural Networks using DropConnect (2013);
    Merity et al., Regularizing and Optimizing LSTM Language Models (2018); :class:`torch.nn.LSTM`.

    Example:
        >>> import torch, bigkern
        >>> y, (h, c) = bigkern.nn.LSTM(32, 64, num_layers=2, zoneout=0.1)(torch.randn(10, 4, 32))
        >>> y.shape, h.shape
        (torch.Size([10, 4, 64]), torch.Size([2, 4, 64]))
    """


class GRU(_Recurrent, nn.GRU):
    r"""Drop-in for :class:`torch.nn.GRU`: same constructor, parameters, keys and errors.

    ``r, z = sigmoid(W_ih x + b_ih + W_hh h' + b_hh)``, ``n = tanh(W_in x + b_in + r (W_hn h' + b_hn))``,
    ``h = (1 - z) n + z h'``

    Runs as :class:`LSTM` does.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as
            torch's.
        layer_norm: keyword only: LayerNorm of each product before its bias is added, of n's rows apart from
            those of r and z; parameters ``norm_weight_ih_l0``, ``norm_weight_hh_l0`` and so on.
        zoneout, recurrent_dropout: keyword only, as :class:`LSTM`'s.

    Shapes: as :class:`LSTM`'s, with ``hx = h``.

    Saved for backward: a layer's input, initial state, weights, output, activated gates, and fp32
    ``W_hn h' + b_hn``.

    Raises:
        torch's own errors; ValueError for a probability out of [0, 1].

    Source: Cho et al., Learning Phrase Representations using RNN Encoder-Decoder (2014); as :class:`LSTM`;
    :class:`torch.nn.GRU`.

    Example:
        >>> import torch, bigkern
        >>> y, h = bigkern.nn.GRU(32, 64, batch_first=True, bidirectional=True)(torch.randn(4, 10, 32))
        >>> y.shape, h.shape
        (torch.Size([4, 10, 128]), torch.Size([2, 4, 64]))
    """


class RNN(_Recurrent, nn.RNN):
    r"""Drop-in for :class:`torch.nn.RNN`: same constructor, parameters, keys and errors.

    ``h = tanh(W_ih x + b_ih + W_hh h' + b_hh)``, or relu

    Runs as :class:`LSTM` does.

    Args:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional, device,
            dtype: as torch's.
        layer_norm, zoneout, recurrent_dropout: keyword only, as :class:`GRU`'s, without the gates.

    Shapes: as :class:`LSTM`'s, with ``hx = h``.

    Saved for backward: a layer's input, initial state, weights and output.

    Raises:
        torch's own errors; ValueError for a probability out of [0, 1].

    Source: Elman, Finding Structure in Time (1990), and as :class:`LSTM`; :class:`torch.nn.RNN`.

    Example:
        >>> import torch, bigkern
        >>> y, h = bigkern.nn.RNN(32, 64, nonlinearity="relu")(torch.randn(10, 32))
        >>> y.shape, h.shape
        (torch.Size([10, 64]), torch.Size([1, 64]))
    """
