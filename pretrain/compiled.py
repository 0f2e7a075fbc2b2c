"""torch.compile of a module's forward, and of nothing around it."""

import torch
from torch import nn


def compile_forward(module: nn.Module, *, dynamic: bool, backend: str) -> None:
    """Compiles a module's forward to one graph, when it first runs.

    Its hooks stay outside, where a layout that shards weights gathers them (`nn.Module.compile`
    would trace them too, and break the graph).

    Args:
        module: of which `forward` is replaced.
        dynamic: whether sizes may change without another compilation.
        backend: of `torch.compile`.
    """
    module.forward = torch.compile(module.forward, fullgraph=True, dynamic=dynamic, backend=backend)
