"""How a training lies over its processes: one alone, replicas (DDP), or shards (FSDP2).

Weights, moments and teacher are fp32 everywhere. A replica holds all of them; a shard holds its
part of each and gathers a block's weights, in the precision of the products, while it runs. The
teacher lies as the student does: replicated, it costs nothing to keep up; sharded, what it gathers
is one pass of 16-bit weights a step, where a whole copy would have to be given the student's new
weights in fp32.

Past this file nobody asks which layout it is: optimiser, clipping and moving averages work on
`local_part.local`, which is the parameters themselves or this rank's shards of them.
"""

import inspect
import itertools
import warnings
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from eosin.configs.errors import ConfigError
from eosin.launch.process import World
from eosin.pretrain.collectives import Collective, sum_over_ranks

ParallelName: TypeAlias = Literal["auto", "none", "ddp", "fsdp", "hybrid"]

STATE_BYTES = 20
"""Of a parameter that is trained and replicated: weight, gradient, two moments, the teacher's."""
REPLICATED_SHARE = 0.4
"""Of a GPU's memory that all replicated state may take; the rest is for activations."""


def choose_parallel(
    name: ParallelName, world: World, parameters: int, memory_bytes: int | None
) -> ParallelName:
    """The layout for this many processes; ``auto`` replicates what fits and shards what does not.

    Args:
        name: as asked for.
        world: the processes.
        parameters: of the student.
        memory_bytes: of one device; None where it is not known to matter (CPUs).

    Raises:
        ConfigError: one process for a layout of several, or several for one.
    """
    if world.group is None:
        if name not in ("auto", "none"):
            raise ConfigError(
                f"parallel={name} needs several processes: start them with 'eosin launch' or "
                "torchrun, or use parallel=auto"
            )
        return "none"
    if name == "none":
        raise ConfigError(f"parallel=none, but there are {world.size} processes; use parallel=auto")
    if name != "auto":
        return name
    if memory_bytes is None or parameters * STATE_BYTES <= REPLICATED_SHARE * memory_bytes:
        return "ddp"
    return "hybrid" if 1 < world.local_size < world.size else "fsdp"


class Pair(nn.Module):
    """Networks that are laid out together: a student, and those that teach it."""

    student: nn.Module

    def units(self) -> list[tuple[nn.Module, list[nn.Module]]]:
        """Each network, with the parts of it whose weights are gathered together, in their order.

        What belongs to no part is gathered with the network.
        """
        raise NotImplementedError


class Layout:
    """A model laid out over the processes.

    Args:
        model: on its device; its weights are equal on all ranks.
        name: as `choose_parallel` gave it.
        world: the processes.
        dtype: of the products, which gathered weights have.
        shard_ranks: hybrid: ranks that share one copy; 0: those of a node.

    Raises:
        ConfigError: `shard_ranks` does not divide the ranks.
    """

    def __init__(
        self,
        model: "Pair",
        name: ParallelName,
        world: World,
        dtype: torch.dtype,
        shard_ranks: int = 0,
    ) -> None:
        self.name = name
        self.step: nn.Module = model
        """What is called for the losses: the model, or what wraps it."""
        self.over_shards: Collective | None = None
        """Sums over the ranks that hold the parts of one copy; None where each holds all."""
        if name == "ddp":
            self.step = DistributedDataParallel(
                model, process_group=world.group, gradient_as_bucket_view=True, **_own_buffers()
            )
        elif name in ("fsdp", "hybrid"):
            mesh = _mesh(name, world, next(model.parameters()).device, shard_ranks)
            shard(model, mesh, dtype)
            self.over_shards = sum_over_ranks(mesh.get_group(mesh.ndim - 1))

    def accumulate(self, more: bool) -> None:
        """Whether gradients of the coming backward pass stay here, because more are to be added."""
        step: Any = self.step
        if self.name == "ddp":
            step.require_backward_grad_sync = not more
        elif self.name != "none":
            step.student.set_requires_gradient_sync(not more)


def _own_buffers() -> dict[str, Any]:
    """That buffers are not sent around in every forward, by the name that this torch has for it."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return {name: False}


def _mesh(name: ParallelName, world: World, device: torch.device, shard_ranks: int) -> DeviceMesh:
    """The ranks: [shard], or [replicate, shard] with the ranks of a copy next to each other."""
    if name == "fsdp":
        return init_device_mesh(device.type, (world.size,), mesh_dim_names=("shard",))
    parts = shard_ranks or world.local_size
    if world.size % parts:
        raise ConfigError(f"shard_ranks={parts} must divide the {world.size} ranks")
    sizes = (world.size // parts, parts)
    return init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard"))


def shard(model: Pair, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Leaves each rank its part of every parameter (FSDP2, arXiv 2304.11277 and torch's docs).

    Each of a network's units asks for the next one's weights before it runs: forwards and, in the
    student, backwards.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # autocast sees to them
    )
    # what a network returns are parts of one tensor, and nobody changes them in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for root, units in model.units():
        for unit in (*units, root):
            # a root would keep what it gathered: right for a backward pass, but a teacher has none,
            # and would go on with the weights of its first step
            reshard = None if root is model.student else True
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        for unit, following in itertools.pairwise(units):
            assert isinstance(unit, FSDPModule) and isinstance(following, FSDPModule)
            unit.set_modules_to_forward_prefetch([following])
            following.set_modules_to_backward_prefetch([unit])
