"""The probes on a GPT-2 of Hugging Face that predicts tokens, and a data set of tensors; nothing is subclassed."""

import copy

import torch
from torch.utils.data import TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

import memloc_ext

EPOCHS, LAYERS, TOKENS, VOCABULARY = 10, 2, 10, 50
ACTIVATIONS = [f"transformer.h.{n}.mlp.act" for n in range(LAYERS)]


def load():
    """Return sequences that count in threes, of which every tenth ends in tokens that only memory can tell."""
    tokens = (torch.arange(200)[:, None] + 3 * torch.arange(TOKENS)) % VOCABULARY
    random = torch.arange(200) % 10 == 0
    tokens[random, TOKENS // 2 :] = torch.randint(VOCABULARY, (int(random.sum()), TOKENS // 2))
    labels = torch.where(torch.arange(TOKENS) < TOKENS // 2, -100, tokens)  # the second half is to be predicted
    return TensorDataset(tokens, labels), random


def build():
    """Return a network with random weights."""
    size = {"vocab_size": VOCABULARY, "n_positions": TOKENS, "n_embd": 32, "n_layer": LAYERS, "n_head": 2}
    none = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(**size, **none))


def train(model, data, random):
    """Train by AdamW; every epoch is accounted as it is trained. Return the last account and the initial state."""
    initial, optimizer = copy.deepcopy(model.state_dict()), torch.optim.AdamW(model.parameters(), lr=0.01)
    how = {"memorized": random, "task": "tokens", "optimizer": optimizer, "batch_size": 20}
    for _ in range(EPOCHS):
        account = memloc_ext.account_epoch(model, data, **how)
    return account, initial


def main():
    """Train, probe, and report."""
    torch.manual_seed(0)
    data, random = load()
    model = build()
    account, initial = train(model, data, random)
    print("account of the last epoch:", {row["group"]: round(row["auc"], 2) for row in account.rows()})
    rewound = memloc_ext.rewind(model, {0: initial}, data, memorized=random, task="tokens")
    print("memorized, rewound:", {row["group"]: round(row["memorized"], 2) for row in rewound.rows()})
    retrained = memloc_ext.retrain(model, initial, data, memorized=random, task="tokens", epochs=5)
    print("memorized, retrained:", {row["group"]: round(row["memorized"], 2) for row in retrained.rows()})
    how = {"localized": 8, "max_units": 10, "edited": 0}
    found = memloc_ext.localize_dataset(model, data, memorized=random, task="tokens", **how)
    print("units that flip a sequence:", [row["units"] for row in found.rows() if row["status"] == "flipped"])

    tied = memloc_ext.nn.insert_example_tied_dropout(build(), after=ACTIVATIONS, channel_dim=-1)
    train(tied, data, random)
    print("example-tied dropout:", memloc_ext.accuracy(tied, data, memorized=random, task="tokens"))


if __name__ == "__main__":
    main()
