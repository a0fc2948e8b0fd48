"""Swap one layer: the constructor, the parameters and the result stay torch's."""

import torch

import bigkern

x = torch.randn(8, 128, 256)
stock = torch.nn.LayerNorm(256)
ours = bigkern.nn.LayerNorm(256)  # the only change
ours.load_state_dict(stock.state_dict())

print("largest difference:", (ours(x) - stock(x)).abs().max().item())
print(bigkern.explain("norm", x, (256,), ours.weight, ours.bias))
