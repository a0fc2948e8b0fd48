"""Train the small CNN on 1,797 real images of digits, fold it, and count what it gets right."""

import torch

import bigkern
from bigkern.models import cnn


def main() -> None:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        print("the images come with scikit-learn: pip install scikit-learn")
        return
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8]
    labels = torch.tensor(digits.target)
    train, test = torch.randperm(len(images)).split([1500, 297])

    model = cnn.small_cnn(num_classes=10, in_channels=1, image_size=8, batch_norm=True)
    optimizer = bigkern.optim.AdamW(model.parameters(), lr=3e-3)
    for epoch in range(6):
        for batch in train[torch.randperm(len(train))].split(50):
            loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    folded = cnn.fold(model.eval())
    right = (folded(images[test]).argmax(1) == labels[test]).float().mean().item()
    print(f"{100 * right:.1f} % of {len(test)} unseen digits are right")


if __name__ == "__main__":
    main()
