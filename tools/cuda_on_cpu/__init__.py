"""The CUDA operators on the CPU: every launch, index, barrier and shared byte of them, for machines without a GPU."""
