"""The probes on a multilayer perceptron and a data set of tensors, the features of wines; nothing is subclassed."""

import copy

import torch
from sklearn.datasets import load_wine
from torch import nn
from torch.utils.data import TensorDataset

import memloc_ext

EPOCHS = 20


def load():
    """Return features and classes of 178 wines as a data set, every tenth class wrong, and which those are."""
    features, classes = load_wine(return_X_y=True)
    x, y = torch.tensor(features, dtype=torch.float32), torch.tensor(classes)
    wrong = torch.arange(len(y)) % 10 == 0
    return TensorDataset((x - x.mean(0)) / x.std(0), torch.where(wrong, (y + 1) % 3, y)), wrong


def build():
    """Return two hidden layers of 64 units."""
    return nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))


def train(model, data, wrong):
    """Train by Adam; every epoch is accounted as it is trained. Return the last account and the initial state."""
    initial, optimizer = copy.deepcopy(model.state_dict()), torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(EPOCHS):
        account = memloc_ext.account_epoch(model, data, memorized=wrong, optimizer=optimizer, batch_size=32)
    return account, initial


def main():
    """Train, probe, and report."""
    torch.manual_seed(0)
    data, wrong = load()
    model = build()
    account, initial = train(model, data, wrong)
    print("account of the last epoch:", {row["group"]: round(row["auc"], 2) for row in account.rows()})
    rewound = memloc_ext.rewind(model, {0: initial}, data, memorized=wrong)
    print("memorized, rewound:", {row["group"]: round(row["memorized"], 2) for row in rewound.rows()})
    retrained = memloc_ext.retrain(model, initial, data, memorized=wrong, epochs=5, learning_rate=0.1)
    print("memorized, retrained:", {row["group"]: round(row["memorized"], 2) for row in retrained.rows()})
    found = memloc_ext.localize_dataset(model, data, memorized=wrong, localized=15, edited=0)
    print("units that flip an example:", [row["units"] for row in found.rows() if row["status"] == "flipped"])

    tied = memloc_ext.nn.insert_example_tied_dropout(build(), after=["1", "3"])
    train(tied, data, wrong)
    print("example-tied dropout:", memloc_ext.accuracy(tied, data, memorized=wrong).rows())


if __name__ == "__main__":
    main()
