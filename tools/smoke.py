"""Use an installed wheel as a stranger would: only what it asks for beside it."""

import subprocess
import sys

import torch

import memloc_ext

x, ids = torch.ones(4, 100, 3, 3), torch.tensor([7, 8, 7, 9])
y = memloc_ext.ops.example_tied_dropout(x, ids, num_generalization=20, p_mem=0.1, seed=0)
if not (torch.equal(y[0], y[2]) and not torch.equal(y[0], y[1]) and bool((y[:, :20] == 1).all())):
    sys.exit("smoke: example_tied_dropout is wrong")
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
memloc_ext.nn.insert_example_tied_dropout(model, after=["1"])
with memloc_ext.example_ids(ids):
    model(torch.randn(4, 8)).sum().backward()
plan = memloc_ext.ops.plan_linear(64, 256, 768)  # by the host module, or by the operators' library without it
if plan.method != "gram" or plan.multiply_adds["direct"] != 64 * 256 * 768:
    sys.exit(f"smoke: the cost model says {plan}")
info = subprocess.run([sys.executable, "-m", "memloc_ext", "info"], capture_output=True, text=True, check=True).stdout
if memloc_ext.__version__ not in info or "example_tied_dropout" not in info:
    sys.exit(f"smoke: `python -m memloc_ext info` printed\n{info}")
print(info + "smoke: ok")
