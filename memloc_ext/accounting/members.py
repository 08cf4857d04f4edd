"""What a model consists of, from one walk: `torch.nn.Module` takes one for each kind."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class Members:
    """Everything once, in the order of `torch.nn.Module.named_modules`.

    Attributes:
        modules: Of the model, itself first.
        parameters: By name.
        buffers: Of its modules.
    """

    modules: list[nn.Module] = field(default_factory=list)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    buffers: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module) -> Members:
        """Return those of a model."""
        found, met, pending = cls(), set[int](), [("", model)]
        while pending:
            prefix, module = pending.pop()
            if id(module) in met:
                continue
            met.add(id(module))
            found.modules.append(module)
            for name, p in module._parameters.items():
                if p is not None and id(p) not in met:
                    met.add(id(p))
                    found.parameters[prefix + name] = p
            for buffer in module._buffers.values():
                if buffer is not None and id(buffer) not in met:
                    met.add(id(buffer))
                    found.buffers.append(buffer)
            if module._modules:
                children = reversed(module._modules.items())
                pending += [(f"{prefix}{name}.", child) for name, child in children if child is not None]
        return found
