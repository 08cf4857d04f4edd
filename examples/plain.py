"""A small network and its training in plain PyTorch, on scikit-learn's handwritten digits with some wrong labels."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

EPOCHS = 40
EXAMPLES = 500


def build():
    """Return two convolutions and two linear layers."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Sequential(nn.Linear(128, 128), nn.ReLU()),
        nn.Linear(128, 10),
    )


def load():
    """Return images, labels of which every tenth is wrong, and which those are."""
    pixels, labels = (part[:EXAMPLES] for part in load_digits(return_X_y=True))
    x, y = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
    wrong = torch.arange(len(y)) % 10 == 0
    return x, torch.where(wrong, (y + 1 + torch.arange(len(y)) // 10 % 9) % 10, y), wrong


def main():
    """Train, and say how many of the right and of the wrong labels the network has learnt."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a network this small is no faster with more
    x, y, wrong = load()
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(EPOCHS):
        model.train()
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        right = model(x).argmax(1) == y
    print(f"right labels learnt: {right[~wrong].float().mean():.1%}, wrong ones: {right[wrong].float().mean():.1%}")


if __name__ == "__main__":
    main()
