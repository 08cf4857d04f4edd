"""Whether something may be held in memory as a whole."""

from __future__ import annotations

import os

import torch


def fits(num_bytes: int, device: torch.device) -> bool:
    """Return whether ``num_bytes`` take at most half of the memory that is free on ``device``.

    The other half is for the model and its activations. Devices other than CUDA are taken to share the host's memory.
    """
    return 2 * num_bytes <= free_bytes(device)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that the driver (CUDA) or the operating system reports as available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            kib = dict(line.split()[:2] for line in lines)
        return 1024 * int(kib["MemAvailable:"])
    except (OSError, KeyError):  # not Linux: all of the memory is the closest that the standard library can tell
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
