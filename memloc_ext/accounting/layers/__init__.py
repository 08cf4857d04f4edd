"""One file per kind of layer: how it runs forward and backward, and which calls it takes; `handlers` lists them all."""
