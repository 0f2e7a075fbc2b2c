"""Weights apart from construction: nothing is allocated twice, and nothing is left undefined."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch._guards import detect_fake_mode

M = TypeVar("M", bound=nn.Module)


def materialise(build: Callable[[], M], seed: int) -> M:
    """Builds a module on the meta device, then draws its weights on the CPU.

    The memory is filled with NaN before the module's `initialise(generator)` draws, so a parameter
    that was forgotten cannot pass for one that was drawn.

    Args:
        build: makes the module; it must not draw or read values.
        seed: of the CPU generator that `initialise` is given; the same weights on every machine.

    Returns:
        The module on the CPU.

    Raises:
        TypeError: the module has no `initialise`.
        ValueError: parameters or buffers are still NaN, by name; or are not floating point, so
            that nothing could show it.
    """
    if detect_fake_mode() is not None:  # tensors without values (`memory_plan`): nothing to draw
        return build()
    with torch.device("meta"):
        module = build()
    initialise = getattr(module, "initialise", None)
    if initialise is None:
        raise TypeError(f"{type(module).__name__} has no initialise(generator)")
    module.to_empty(device="cpu")
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    whole = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if whole:
        raise ValueError(f"not floating point, so not seen to be set: {', '.join(whole)}")
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.fill_(torch.nan)
        initialise(torch.Generator().manual_seed(seed))
    undefined = [
        name
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if bool(tensor.isnan().any())
    ]
    if undefined:
        raise ValueError(
            f"{type(module).__name__}.initialise left undefined: {', '.join(undefined)}"
        )
    return module
