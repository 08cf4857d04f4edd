"""Example-tied dropout and gradient accounting under DistributedDataParallel, with the result of one process.

``torchrun --standalone --nproc-per-node 2 examples/data_parallel.py``, or without torchrun in one process.
"""

import gc

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import memloc_ext
from memloc_ext.nn import insert_example_tied_dropout

EPOCHS = 10
BATCH = 64  # of all processes together


def load():
    """Return images, labels of which every tenth is wrong, and which those are."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 8 - 1, torch.tensor(labels)
    wrong = torch.arange(len(y)) % 10 == 0
    return x, torch.where(wrong, (y + 1 + torch.arange(len(y)) // 10 % 9) % 10, y), wrong


def train(x, y):
    """Return the network and, the same in every process, the norm of each example's last gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    model = DistributedDataParallel(insert_example_tied_dropout(model, after=["1", "3"]))
    data = TensorDataset(x, y, torch.arange(len(y)))
    sampler = DistributedSampler(data, drop_last=True)
    loader = DataLoader(data, batch_size=BATCH // distributed.get_world_size(), sampler=sampler, drop_last=True)
    accountant = memloc_ext.GradientAccountant(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        norms = torch.zeros(len(y))
        for inputs, labels, ids in loader:
            optimizer.zero_grad()
            with memloc_ext.example_ids(ids), accountant:  # the numbers of this process's examples
                account = accountant.backward(F.cross_entropy(model(inputs), labels))
            norms[ids] = sum(account.sqnorm.values()).sqrt()
            optimizer.step()
    distributed.all_reduce(norms)  # each example was in one process
    return model.module, norms


def join():
    """Join the processes that torchrun started, or be the only one."""
    if distributed.is_torchelastic_launched():
        distributed.init_process_group("gloo")
    else:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)


def main():
    """Train in all processes; the first reports."""
    join()
    x, y, wrong = load()
    model, norms = train(x, y)
    if distributed.get_rank() == 0:
        right = model.eval()(x).argmax(1) == y  # memorization channels are off
        print(f"right labels learnt: {right[~wrong].float().mean():.1%}, wrong ones: {right[wrong].float().mean():.1%}")
        print(f"gradient norm, wrong over right labels: {norms[wrong].mean() / norms[~wrong].mean():.1f}")
    gc.collect()  # what is left of the wrapped network holds the group
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
