"""How channels are taken out of a model, for `memloc_ext.nn.without_memorization`.

In the order of reading: `recording`, what a pass did; `kept`, which channels may go; `folding`, factors that go into
weights; `surgery`, what is cut. The dependency graph of torch-pruning does the first two for the layer types in its
table; it does not know that a tensor is zero in places, nor fold factors, and GPT-2's ``Conv1D`` is not in the table. A
symbolic trace by ``torch.fx`` does not follow hooks, or code that branches on its inputs.
"""
