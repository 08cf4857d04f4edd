"""Both distributed examples, in little, in each of the processes that torchrun started."""

import gc
from pathlib import Path

import torch
from load_example import load_example
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

EXAMPLES = 460
"""Seven batches, and some that are left over."""


def work(folder: Path) -> None:
    seen = {}
    for name in ("data_parallel", "fully_sharded"):
        example = load_example(name)
        example.EPOCHS = 2
        x, y, _ = example.load()
        model, norms = example.train(x[:EXAMPLES], y[:EXAMPLES])
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=False))
        seen[name] = {"state": state, "norms": norms}
        del model
    torch.save(seen, folder / f"rank{distributed.get_rank()}of{distributed.get_world_size()}.pt")


def main(folder: Path) -> None:
    load_example("data_parallel").join()
    work(folder)
    gc.collect()
    distributed.barrier()
    distributed.destroy_process_group()
