"""Patch a model that you already have, see what changed and why, and take it back."""

import torch

import bigkern

layer = torch.nn.TransformerEncoderLayer(256, 8, 1024, dropout=0.0, batch_first=True, norm_first=True)
model = torch.nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
x = torch.randn(4, 64, 256)
before = model(x)

print(bigkern.patch(model))
print("largest difference:", (model(x) - before).abs().max().item())

bigkern.unpatch(model)
print("after unpatch:     ", (model(x) - before).abs().max().item())
