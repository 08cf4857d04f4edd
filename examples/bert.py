"""The probes on a BERT classifier of Hugging Face and a DataLoader of dictionaries; nothing is subclassed."""

import copy

import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

import memloc_ext

EPOCHS, LAYERS, TOKENS, VOCABULARY = 8, 2, 12, 50
HIDDEN = [f"bert.encoder.layer.{n}.intermediate.intermediate_act_fn" for n in range(LAYERS)]


def load():
    """Return batches of texts of different lengths, whose class their first word tells, but for every eighth one."""
    words, lengths = torch.randint(3, VOCABULARY, (160, TOKENS)), torch.randint(4, TOKENS + 1, (160,))
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    wrong = torch.arange(160) % 8 == 0
    labels = torch.where(wrong, words[:, 0] + 1, words[:, 0]) % 3
    fields = {"input_ids": words * mask, "attention_mask": mask, "labels": labels, "index": torch.arange(160)}
    items = [{name: values[n] for name, values in fields.items()} for n in range(160)]
    return DataLoader(items, batch_size=16, shuffle=True), wrong


def build():
    """Return a network with random weights."""
    size = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 64}
    none = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=TOKENS, num_labels=3, **size, **none)
    return BertForSequenceClassification(config)


def train(model, loader, wrong):
    """Train by AdamW; every epoch is accounted as it is trained. Return the last account and the initial state."""
    initial, optimizer = copy.deepcopy(model.state_dict()), torch.optim.AdamW(model.parameters(), lr=0.003)
    for _ in range(EPOCHS):
        account = memloc_ext.account_epoch(model, loader, memorized=wrong, optimizer=optimizer)
    return account, initial


def main():
    """Train, probe, and report."""
    torch.manual_seed(0)
    loader, wrong = load()
    model = build()
    account, initial = train(model, loader, wrong)
    print("account of the last epoch:", {row["group"]: round(row["auc"], 2) for row in account.rows()})
    rewound = memloc_ext.rewind(model, {0: initial}, loader, memorized=wrong)
    print("memorized, rewound:", {row["group"]: round(row["memorized"], 2) for row in rewound.rows()})
    retrained = memloc_ext.retrain(model, initial, loader, memorized=wrong, epochs=5)
    print("memorized, retrained:", {row["group"]: round(row["memorized"], 2) for row in retrained.rows()})
    found = memloc_ext.localize_dataset(model, loader, memorized=wrong, localized=4, max_units=6, edited=0)
    print("units that flip a text:", [row["units"] for row in found.rows() if row["status"] == "flipped"])

    tied = memloc_ext.nn.insert_example_tied_dropout(build(), after=HIDDEN, channel_dim=-1)
    train(tied, loader, wrong)
    print("example-tied dropout:", memloc_ext.accuracy(tied, loader, memorized=wrong).rows())


if __name__ == "__main__":
    main()
