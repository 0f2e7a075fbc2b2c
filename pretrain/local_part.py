"""What one rank holds of a tensor that may lie in shards over several (DTensor)."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing its memory: the tensor itself where it is whole.

    The same object in every call, so an optimiser may hold it in place of the parameter.
    """
    if isinstance(tensor, DTensor):
        part: Tensor = tensor._local_tensor
        return part
    return tensor


def like(tensor: Tensor, part: Tensor) -> Tensor:
    """A tensor that lies as `tensor` does, of which this rank holds `part`."""
    if not isinstance(tensor, DTensor):
        return part
    whole: Tensor = DTensor.from_local(
        part,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    return whole


@torch.no_grad()
def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's whole tensors on the CPU, gathered one by one; every rank comes here."""
    state = {}
    for name, tensor in module.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        state[name] = whole.detach().to("cpu", copy=True)
    return state
