"""Swap the optimizer in the middle of a run: the state dict is torch's, both ways, in every storage."""

import torch

import bigkern

model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 1))
x = torch.randn(512, 64)
y = x.square().mean(1, keepdim=True)


def train(optimizer: torch.optim.Optimizer, steps: int) -> float:
    for _ in range(steps):
        loss = torch.nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


stock = torch.optim.AdamW(model.parameters(), lr=1e-2)
print("50 steps of torch.optim.AdamW:          loss", train(stock, 50))

ours = bigkern.optim.AdamW(model.parameters(), lr=1e-2)  # the only change
ours.load_state_dict(stock.state_dict())
print("50 more steps of bigkern.optim.AdamW:   loss", train(ours, 50))

small = bigkern.optim.AdamW(model.parameters(), state_dtype=torch.uint8, max_norm=1.0)
small.load_state_dict(ours.state_dict())  # the moments in a quarter of the bytes
print("50 more, 8-bit moments, clipped:        loss", train(small, 50))

stock.load_state_dict(small.torch_state_dict())
print("and 50 of torch.optim.AdamW again:      loss", train(stock, 50))
