"""Example-tied dropout and gradient accounting in PyTorch Lightning: a callback, and one method of the module."""

from contextlib import ExitStack

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import memloc_ext
from memloc_ext.nn import insert_example_tied_dropout

EPOCHS = 8


class PerExample(lightning.Callback):
    """Names the examples of each batch, and keeps the norm of each one's last gradient."""

    def __init__(self, examples):
        self.norms, self.opened = torch.zeros(examples), ExitStack()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        """Open both, for forward and backward."""
        self.ids = batch[2].cpu()
        self.opened.enter_context(memloc_ext.example_ids(batch[2]))
        self.opened.enter_context(module.accountant)

    def on_after_backward(self, trainer, module):
        """Keep the norms; where gradients accumulate, Lightning has divided the loss."""
        norms = sum(module.account.sqnorm.values()).sqrt() * trainer.accumulate_grad_batches
        self.norms[self.ids] = norms.cpu()

    def on_train_batch_end(self, *_):
        """Close both."""
        self.opened.close()

    on_exception = on_train_batch_end  # an interrupted step's too


class Digits(lightning.LightningModule):
    """A network whose two hidden layers have example-tied dropout."""

    def __init__(self):
        super().__init__()
        net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        self.net = insert_example_tied_dropout(net, after=["1", "3"])
        self.accountant = memloc_ext.GradientAccountant(self.net)

    def training_step(self, batch, batch_idx):
        """Return the loss, as ever."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def backward(self, loss):
        """Account the backward pass."""
        self.account = self.accountant.backward(loss)

    def configure_optimizers(self):
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def load():
    """Return images, labels of which every tenth is wrong, and which those are."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 8 - 1, torch.tensor(labels)
    wrong = torch.arange(len(y)) % 10 == 0
    return x, torch.where(wrong, (y + 1 + torch.arange(len(y)) // 10 % 9) % 10, y), wrong


def train(x, y):
    """Return the network and the norm of each example's last gradient."""
    loader = DataLoader(TensorDataset(x, y, torch.arange(len(y))), batch_size=64, shuffle=True)
    module, examples = Digits(), PerExample(len(y))
    names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet = dict.fromkeys(names, False)
    trainer = lightning.Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=[examples], **quiet)
    trainer.fit(module, loader)
    return module.net, examples.norms


def main():
    """Train, and report."""
    lightning.seed_everything(0)
    x, y, wrong = load()
    model, norms = train(x, y)
    right = model.eval()(x).argmax(1) == y  # memorization channels are off
    print(f"right labels learnt: {right[~wrong].float().mean():.1%}, wrong ones: {right[wrong].float().mean():.1%}")
    print(f"gradient norm, wrong over right labels: {norms[wrong].mean() / norms[~wrong].mean():.1f}")


if __name__ == "__main__":
    main()
