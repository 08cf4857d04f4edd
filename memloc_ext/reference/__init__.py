"""The specification of each operator in plain PyTorch: slow and obvious. Only tests and benchmarks import it."""
