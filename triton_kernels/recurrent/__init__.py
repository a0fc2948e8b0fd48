"""A recurrent layer's scan, LSTM, GRU or RNN, over the gates that its input has been projected to.

    forward   a launch a step   gates [N, D G H], y of a step ago, W_hh  ->  y [N, D H], state, gates
    backward  a launch a step   dy, gates, dgates of a step ago, W_hh    ->  dgates [N, D G H], state's

N rows of all steps, step after step, as in torch's PackedSequence. D directions, both in every launch; the
second walks from the last step to the first. G gates in torch's order (i f g o, r z n). H hidden units.

A step needs all of the step before it, and the order of launches is all that sees to this: nothing waits
inside a kernel, and nothing on the host. A CUDA graph takes away what a launch costs the host.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
import triton
from torch import Tensor

from bigkern.triton_kernels.common import launch
from bigkern.triton_kernels.common.products import Tile
from bigkern.triton_kernels.recurrent.backward import scan_step_backward_kernel
from bigkern.triton_kernels.recurrent.forward import scan_step_kernel

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}

# bytes an element -> tiles: BM sequences, BN hidden units, BK terms of a sum at a time
FORWARD = {2: Tile(64, 32, 64, 4, 5), 4: Tile(32, 16, 32, 8, 4)}
BACKWARD = {2: Tile(32, 32, 128, 4, 5), 4: Tile(32, 32, 32, 8, 4)}

Steps = tuple[int, int, int, int]  # of each direction a step's first row, and how many sequences have one
NO_STEPS: Steps = (0, 0, 0, 0)


def recurrent_scan(
    gates: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_hh: Tensor,
    w_hh_reverse: Tensor | None,
    bias_n: Tensor | None,
    batch_sizes: Tensor | None,
    zoneout: Tensor | None,
    mode: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """``y [N, D*H]``, ``hn`` and ``cn [D, B, H]``, and, if save, fp32 ``reserve [N, D*H]``.

    gates ``[N, D*G*H]`` are x W_ih^T + biases, and, if save, become the activated ones; h0 and c0
    ``[D, B, H]``; weights ``[G*H, H]``; bias_n ``[D, H]``, GRU's b_hn; zoneout like y; batch_sizes ``[T]`` on
    the host. reserve holds an LSTM's cells, a GRU's W_hn h' + b_hn.
    """
    (N, _), (D, B, H) = gates.shape, h0.shape
    rows = gates.new_empty(N + B, D * H)  # y, and behind it h0: whatever h' a step reads is one of these
    rows[N:].view(B, D, H).copy_(h0.transpose(0, 1))
    y = rows[:N]
    reserve = torch.empty_like(y, dtype=torch.float32) if save and not mode.startswith("RNN") else None
    h, c = state(h0, h0), None if c0 is None else state(c0, c0)
    tile = tile_for(FORWARD, h0)
    grid = triton.cdiv(H, tile.BN), triton.cdiv(B, tile.BM), D
    steps = both_walks(batch_sizes, N, B)
    for before, now in pairwise(steps[:-1]):
        scan_step_kernel[grid](
            gates, w_hh, w_hh_reverse, bias_n, zoneout, y, h, c, reserve, *now, *before, N, B, H,
            MODE=mode, G=GATES[mode], SAVE=save, **options(tile),
        )  # fmt: skip
    return y, h.to(h0.dtype), None if c is None else c.to(h0.dtype), reserve


def recurrent_scan_backward(
    dy: Tensor | None,
    dhn: Tensor | None,
    dcn: Tensor | None,
    gates: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_hh: Tensor,
    w_hh_reverse: Tensor | None,
    batch_sizes: Tensor | None,
    zoneout: Tensor | None,
    y: Tensor,
    reserve: Tensor | None,
    mode: str,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """``dgates`` like gates, ``dhidden_n [N, D*H]`` of a GRU, ``dh0`` and ``dc0 [D, B, H]``.

    dgates is the gradient of the gates before their activation, dhidden_n that of W_hn h' + b_hn. gates, y
    and reserve are those that the forward left; gradients that are None count as zero.
    """
    (N, _), (D, B, H) = gates.shape, h0.shape
    dy = None if dy is None else dy.contiguous()
    dgates, dhidden_n = torch.empty_like(gates), torch.empty_like(y) if mode == "GRU" else None
    dh, dc = state(dhn, h0), None if c0 is None else state(dcn, c0)
    tile = tile_for(BACKWARD, h0)
    grid = triton.cdiv(H, tile.BN), triton.cdiv(B, tile.BM), D
    steps = both_walks(batch_sizes, N, B)
    for i in range(len(steps) - 2, -1, -1):  # the last launch has no step: it finishes dh0
        scan_step_backward_kernel[grid](
            dy, gates, h0, c0, w_hh, w_hh_reverse, zoneout, y, reserve, dgates, dhidden_n, dh, dc,
            *steps[i], *steps[i - 1], *steps[i + 1], B, H,
            MODE=mode, G=GATES[mode], **options(tile),
        )  # fmt: skip
    return dgates, dhidden_n, dh.to(h0.dtype), None if dc is None else dc.to(h0.dtype)


# ---- what the launches have in common ----------------------------------------------------------------


def both_walks(batch_sizes: Tensor | None, N: int, B: int) -> list[Steps]:
    """The steps of both directions in the order that each walks, between two that are none."""
    counts = [B] * (N // B if B else 0) if batch_sizes is None else batch_sizes.tolist()
    rows = accumulate(counts, initial=0)
    forward = list(zip(rows, counts, strict=False))
    return [NO_STEPS, *((*up, *down) for up, down in zip(forward, forward[::-1], strict=True)), NO_STEPS]


def state(given: Tensor | None, like: Tensor) -> Tensor:
    """A state to walk with: a copy in fp32, or zeros."""
    copy = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    return copy if given is None else copy.copy_(given)


def tile_for(table: dict[int, Tile], h0: Tensor) -> Tile:
    """The table's entry, made smaller as long as every tile still has a processor of its own.

    Rows that are not whole vectors have an address an element: smaller tiles hold these in registers.
    """
    D, B, H = h0.shape
    tile = table[h0.element_size()]
    if H % 16 != 0:
        tile = tile._replace(BM=32, BN=16, BK=tile.BK // 2)
    BM, BN = min(tile.BM, launch.padded(B)), min(tile.BN, launch.padded(H))
    processors = launch.multiprocessors(h0.device)
    while max(BM, BN) > 16 and 2 * D * triton.cdiv(B, BM) * triton.cdiv(H, BN) <= processors:
        BM, BN = (BM, BN // 2) if BN > 16 else (BM // 2, BN)
    return tile._replace(BM=BM, BN=BN, BK=min(tile.BK, launch.padded(H)))


def options(tile: Tile) -> dict[str, object]:
    return {
        "BM": tile.BM,
        "BN": tile.BN,
        "BK": tile.BK,
        "PRECISION": tile.precision,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **launch.OPTIONS,
    }
