"""Differentially private training: clipped gradients of one backward pass, and the privacy that Opacus accounts."""

import torch
from opacus.accountants import RDPAccountant
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import memloc_ext

STEPS = 100
RATE = 0.1  # of the examples, in a batch
MAX_NORM = 1.0  # of an example's gradient
NOISE = 1.0  # standard deviation of the noise, in MAX_NORM
DELTA = 1e-4


def build():
    """Return a network without batch norm, which would mix the examples."""
    layers = nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))


def main():
    """Train, and say how well the network does and what an observer of it can learn of one example."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
    model, privacy = build(), RDPAccountant()
    accountant = memloc_ext.GradientAccountant(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    for _ in range(STEPS):
        chosen = torch.rand(len(y)) < RATE  # each example by itself, as the privacy accounting assumes
        optimizer.zero_grad()
        with accountant:
            loss = F.cross_entropy(model(x[chosen]), y[chosen], reduction="sum")
            accountant.backward(loss, loss_reduction="sum", max_norm=MAX_NORM)
        for p in model.parameters():
            p.grad = (p.grad + NOISE * MAX_NORM * torch.randn_like(p)) / (RATE * len(y))
        optimizer.step()
        privacy.step(noise_multiplier=NOISE, sample_rate=RATE)
    with torch.no_grad():
        right = model(x).argmax(1) == y
    print(
        f"labels learnt: {right.float().mean():.1%}, epsilon at delta {DELTA}: {privacy.get_epsilon(delta=DELTA):.2f}"
    )


if __name__ == "__main__":
    main()
