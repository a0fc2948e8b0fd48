"""``LSTM``, ``GRU`` and ``RNN``: torch's layers on the recurrent op, with what is usual beyond torch's."""

from __future__ import annotations

from torch import nn

from bigkern.nn.recurrent_base import RecurrentBase


class LSTM(RecurrentBase, nn.LSTM):
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


class GRU(RecurrentBase, nn.GRU):
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


class RNN(RecurrentBase, nn.RNN):
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
