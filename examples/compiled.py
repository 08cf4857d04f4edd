"""Example-tied dropout in a compiled training, and the norm of each example's gradient, from an uncompiled pass."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import memloc_ext
from memloc_ext.nn import insert_example_tied_dropout

EPOCHS = 10


def build():
    """Return a network with example-tied dropout behind its two hidden layers."""
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    return insert_example_tied_dropout(model, after=["2", "4"], p_gen=0.2, p_mem=0.1, seed=0)


def load():
    """Return images, labels of which every tenth is wrong, and which those are."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 8 - 1, torch.tensor(labels)
    wrong = torch.arange(len(y)) % 10 == 0
    return x, torch.where(wrong, (y + 1 + torch.arange(len(y)) // 10 % 9) % 10, y), wrong


def gradient_error(model, compiled, x, y, ids):
    """Return the largest error of a compiled gradient, relative to its norm: compilers have been wrong, silently."""
    with memloc_ext.example_ids(ids):
        pairs = [torch.autograd.grad(F.cross_entropy(run(x), y), list(model.parameters())) for run in (model, compiled)]
    return max(float((a - b).norm() / a.norm()) for a, b in zip(*pairs, strict=True))


def train(x, y, ids):
    """Return the compiled network."""
    model = build()
    compiled = torch.compile(model, fullgraph=True)
    error = gradient_error(model, compiled, x[:64], y[:64], ids[:64])
    print(f"largest relative error of a compiled gradient: {error:.0e}")
    # batches of one size are compiled once
    loader = DataLoader(TensorDataset(x, y, ids), batch_size=64, shuffle=True, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(EPOCHS):
        for inputs, labels, numbers in loader:
            optimizer.zero_grad()
            with memloc_ext.example_ids(numbers):
                F.cross_entropy(compiled(inputs), labels).backward()
            optimizer.step()
    return compiled


def account(compiled, x, y, ids):
    """Return the norm of each example's gradient; inside of an accountant, compiled code runs as it was written."""
    with memloc_ext.GradientAccountant(compiled) as accountant, memloc_ext.example_ids(ids):
        found = accountant.backward(F.cross_entropy(compiled(x), y), weight_grads=False)
    return sum(found.sqnorm.values()).sqrt()


def main():
    """Train compiled, then account the trained network."""
    torch.manual_seed(0)
    x, y, wrong = load()
    ids = torch.arange(len(y))
    compiled = train(x, y, ids)
    norms = account(compiled, x, y, ids)
    with torch.compiler.set_stance("force_eager"):  # one pass is not worth another compilation
        right = compiled.eval()(x).argmax(1) == y  # memorization channels are off
    print(f"right labels learnt: {right[~wrong].float().mean():.1%}, wrong ones: {right[wrong].float().mean():.1%}")
    print(f"gradient norm, wrong over right labels: {norms[wrong].mean() / norms[~wrong].mean():.1f}")


if __name__ == "__main__":
    main()
