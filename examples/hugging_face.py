"""A small GPT-2 in Hugging Face's Trainer: example-tied dropout in its MLPs, norms per sequence, neurons localized."""

from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import memloc_ext
from memloc_ext.nn import dropout_mode, insert_example_tied_dropout

EPOCHS = 20
LAYERS, TOKENS, VOCABULARY = 2, 12, 50
ACTIVATIONS = [f"transformer.h.{n}.mlp.act" for n in range(LAYERS)]
SITES = [f"gpt.{name}" for name in ACTIVATIONS]


def build():
    """Return a network with random weights, each of whose neurons in an MLP belongs to all or to some sequences."""
    size = {"vocab_size": VOCABULARY, "n_positions": TOKENS, "n_embd": 32, "n_layer": LAYERS, "n_head": 2}
    none = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": None, "eos_token_id": None}
    gpt = GPT2LMHeadModel(GPT2Config(**size, **none))
    return insert_example_tied_dropout(gpt, ACTIVATIONS, p_gen=0.2, p_mem=0.2, channel_dim=-1)


def load():
    """Return sequences that count in threes, and which of them end in tokens that only memory can tell."""
    first = torch.arange(200)[:, None] % VOCABULARY
    tokens = (first + 3 * torch.arange(TOKENS)) % VOCABULARY
    random = torch.arange(200) % 10 == 0
    tokens[random, TOKENS // 2 :] = torch.randint(VOCABULARY, (int(random.sum()), TOKENS // 2))
    return tokens, random


class PerSequence(Trainer):
    """Tells the network whose each token is, and keeps the norm of what each sequence last added to a gradient."""

    def __init__(self, model, tokens, **arguments):
        data = [{"input_ids": row, "labels": row, "ids": torch.full_like(row, n)} for n, row in enumerate(tokens)]
        super().__init__(model, TrainingArguments(remove_unused_columns=False, **arguments), train_dataset=data)
        self.accountant, self.norms = memloc_ext.GradientAccountant(model), torch.zeros(len(data))
        self.accelerator.backward = self.backward

    def training_step(self, model, inputs, *arguments):
        """Run the Trainer's own step inside of both; ids are those of the tokens, a row's are all the same here."""
        ids = inputs.pop("ids")
        with memloc_ext.example_ids(ids), self.accountant:
            loss = super().training_step(model, inputs, *arguments)
        self.norms[ids[:, 0].cpu()] = sum(self.account.sqnorm.values()).sqrt().cpu()
        return loss

    def backward(self, loss, **_):
        """Account the loss as the Trainer has scaled it: whatever that is, it is a sum over sequences."""
        self.account = self.accountant.backward(loss, loss_reduction="sum")


class LastToken(nn.Module):
    """Logits of the token behind a sequence, as those of a classifier."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def forward(self, tokens):
        """Return ``[batch, vocabulary]``."""
        return self.gpt(tokens).logits[:, -1]


def localize(gpt, tokens, rows, others):
    """Search the neurons that some sequences' last tokens rest on; every sequence runs with its own."""
    x, y = tokens[:, :-1], tokens[:, -1]
    with dropout_mode(gpt, "train"), memloc_ext.example_ids(rows):
        reference = x[others], y[others], others
        return memloc_ext.localize(LastToken(gpt), x[rows], y[rows], reference=reference, sites=SITES, noise=0, eot=1)


def train(tokens):
    """Return the network and the norm of what each sequence last added to a gradient."""
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    settings = {"num_train_epochs": EPOCHS, "per_device_train_batch_size": 20, "learning_rate": 0.01, "use_cpu": True}
    with TemporaryDirectory() as directory:
        trainer = PerSequence(build(), tokens, output_dir=directory, **settings, **quiet)
        trainer.train()
    return trainer.model, trainer.norms


def main():
    """Train, and report."""
    set_seed(0)
    tokens, random = load()
    gpt, norms = train(tokens)
    for mode in ("train", "drop"):  # each sequence with its own neurons, and without
        with dropout_mode(gpt, mode), memloc_ext.example_ids(torch.arange(len(tokens))):
            right = gpt(tokens).logits[:, -2].argmax(1) == tokens[:, -1]
        rule, memorized = (right[kind].float().mean() for kind in (~random, random))
        print(f"{mode}: last token right after the rule {rule:.1%}, of random ones {memorized:.1%}")
    print(f"gradient norm, random over rule: {norms[random].mean() / norms[~random].mean():.1f}")
    found = localize(gpt, tokens, random.nonzero()[:10, 0], (~random).nonzero()[:50, 0])
    print("neurons that flip a random sequence:", [len(one.units) for one in found if one.status == "flipped"])


if __name__ == "__main__":
    main()
