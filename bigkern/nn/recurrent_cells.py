"""``LSTMCell``, ``GRUCell`` and ``RNNCell``: torch's cells, on the recurrent op where that runs a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bigkern.core import registry
from bigkern.nn.torchscript import ScriptsAsStock
from bigkern.ops.recurrent import recurrent
from bigkern.ops.recurrent.backends import RECURRENT, declined
from bigkern.ops.recurrent.call import Recurrent


class _Cell(ScriptsAsStock, nn.RNNCellBase):
    """What the three share: a step of the op, or torch's own forward."""

    mode: str

    def forward(self, input: Any, hx: Any = None) -> Any:
        if self._is_declined(input):
            return super().forward(input, hx)
        states = () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if not self._fits(input, states):
            return super().forward(input, hx)  # torch's own checks are to judge these
        step = self.step(input, states)
        if RECURRENT.resolve(RECURRENT.bind(*step)).by_torch:
            return super().forward(input, hx)
        _, state = recurrent(*step)
        shape = (*input.shape[:-1], self.hidden_size)
        return tuple(s.view(shape) for s in state) if self.mode == "LSTM" else state.view(shape)

    def _is_declined(self, input: Tensor) -> bool:
        """Whether stock would be chosen by sizes alone: to ask more would cost more than the step."""
        if registry.forced():
            return False
        if input.is_cpu:
            return True
        weights = [self.weight_ih, self.weight_hh]
        states: Any = None
        call = Recurrent(input[None], states, states, weights, None, None, self.mode, torch.is_grad_enabled())
        return declined(call)

    def _fits(self, input: Tensor, states: tuple[Tensor, ...]) -> bool:
        """Whether shapes and dtypes are what the op expects."""
        shape = (*input.shape[:-1], self.hidden_size)
        return (
            input.dim() in (1, 2)
            and input.shape[-1] == self.input_size
            and len(states) in (0, 2 if self.mode == "LSTM" else 1)
            and all(s.shape == shape for s in states)
            and all(t.dtype == input.dtype for t in (*states, *self.parameters()))
        )

    def step(self, input: Tensor, states: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """The op's arguments for one step: x ``[1, B, I]``, states ``[1, B, H]``."""
        x = input.reshape(1, -1, self.input_size)
        states = tuple(s.reshape(1, -1, self.hidden_size) for s in states)
        hx = states if len(states) == 2 else states[0] if states else None
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return x, hx, [w for w in weights if w is not None], self.mode


class LSTMCell(_Cell, nn.LSTMCell):
    r"""Drop-in for :class:`torch.nn.LSTMCell`: same constructor, parameters, keys and errors.

    ``i, f, o = sigmoid(.)``, ``g = tanh(.)``, ``c = f c' + i g``, ``h = o tanh(c)``, where ``.`` is
    ``W_ih x + b_ih + W_hh h' + b_hh``

    One step of :func:`bigkern.recurrent` where that is chosen or forced; on a CPU torch's own forward is as
    fast for a single step, and runs. Whole sequences are :class:`LSTM`'s, and so are layer_norm, zoneout and
    recurrent_dropout.

    Args:
        input_size, hidden_size, bias, device, dtype: as torch's.

    Shapes: x ``[B, I]`` or ``[I]``, h and c ``[B, H]`` or ``[H]``; float32, bfloat16, float16; float64 on
    stock.

    Saved for backward: x, h', c', the weights, h, activated gates, and fp32 c.

    Raises:
        torch's own errors.

    Source: Hochreiter and Schmidhuber, Long Short-Term Memory (1997); :class:`torch.nn.LSTMCell`.

    Example:
        >>> import torch, bigkern
        >>> h, c = bigkern.nn.LSTMCell(32, 64)(torch.randn(4, 32))
        >>> h.shape
        torch.Size([4, 64])
    """

    mode = "LSTM"


class GRUCell(_Cell, nn.GRUCell):
    r"""Drop-in for :class:`torch.nn.GRUCell`: same constructor, parameters, keys and errors.

    ``r, z = sigmoid(W_ih x + b_ih + W_hh h' + b_hh)``, ``n = tanh(W_in x + b_in + r (W_hn h' + b_hn))``,
    ``h = (1 - z) n + z h'``

    Runs as :class:`LSTMCell` does.

    Args:
        input_size, hidden_size, bias, device, dtype: as torch's.

    Shapes: x ``[B, I]`` or ``[I]``, h ``[B, H]`` or ``[H]``; float32, bfloat16, float16; float64 on stock.

    Saved for backward: x, h', the weights, h, activated gates, and fp32 ``W_hn h' + b_hn``.

    Raises:
        torch's own errors.

    Source: Cho et al., Learning Phrase Representations using RNN Encoder-Decoder (2014);
    :class:`torch.nn.GRUCell`.

    Example:
        >>> import torch, bigkern
        >>> bigkern.nn.GRUCell(32, 64)(torch.randn(4, 32), torch.randn(4, 64)).shape
        torch.Size([4, 64])
    """

    mode = "GRU"


class RNNCell(_Cell, nn.RNNCell):
    r"""Drop-in for :class:`torch.nn.RNNCell`: same constructor, parameters, keys and errors.

    ``h = tanh(W_ih x + b_ih + W_hh h' + b_hh)``, or relu

    Runs as :class:`LSTMCell` does.

    Args:
        input_size, hidden_size, bias, nonlinearity, device, dtype: as torch's.

    Shapes: x ``[B, I]`` or ``[I]``, h ``[B, H]`` or ``[H]``; float32, bfloat16, float16; float64 on stock.

    Saved for backward: x, h', the weights and h.

    Raises:
        torch's own errors.

    Source: Elman, Finding Structure in Time (1990); :class:`torch.nn.RNNCell`.

    Example:
        >>> import torch, bigkern
        >>> bigkern.nn.RNNCell(32, 64, nonlinearity="relu")(torch.randn(32)).shape
        torch.Size([64])
    """

    @property
    def mode(self) -> str:  # type: ignore[override]
        return {"tanh": "RNN_TANH", "relu": "RNN_RELU"}.get(self.nonlinearity, "")
