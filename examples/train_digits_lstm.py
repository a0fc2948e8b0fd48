"""Read 1,797 real images of digits row by row with a bidirectional LSTM, and count what it gets right."""

import torch

import bigkern
from bigkern.models import RecurrentClassifier, RecurrentConfig


def main() -> None:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        print("the images come with scikit-learn: pip install scikit-learn")
        return
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16  # [1797, 8, 8]: 8 steps of 8 numbers
    labels = torch.tensor(digits.target)
    train, test = torch.randperm(len(images)).split([1500, 297])

    config = RecurrentConfig(cell="lstm", features=8, layers=2, width=128, bidirectional=True, classes=10)
    model = RecurrentClassifier(config)
    optimizer = bigkern.optim.AdamW(model.parameters(), lr=5e-3)
    for epoch in range(8):
        for batch in train[torch.randperm(len(train))].split(50):
            loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    right = (model.eval()(images[test]).argmax(1) == labels[test]).float().mean().item()
    print(f"{100 * right:.1f} % of {len(test)} unseen digits are right")


if __name__ == "__main__":
    main()
