"""Train a small Llama-style decoder on a paragraph, and let it go on: sampled, and by beam search."""

import textwrap

import torch

from bigkern.models import GPT, TransformerConfig
from bigkern.optim import AdamW

text = torch.tensor(list(textwrap.fill.__doc__.encode()))
config = TransformerConfig(
    context=96, layers=2, heads=4, kv_heads=2, width=128,
    positions="rotary", norm="rms", activation="swiglu", bias=False,
)  # fmt: skip
model = GPT(config)
optimizer = AdamW(model.parameters(), lr=3e-3)

for step in range(200):
    starts = torch.randint(len(text) - 65, (8,)).tolist()
    batch = torch.stack([text[start : start + 65] for start in starts])
    logits = model(batch[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 49:
        print(f"step {step + 1}: loss {loss.item():.3f}")

prompt = torch.tensor([list(b"Reformat the")])
for name, how in {"sampled": {"top_p": 0.9, "seed": 0}, "4 beams": {"beams": 4}}.items():
    print(f"{name}: {bytes(model.generate(prompt, 80, **how)[0].tolist())!r}")
