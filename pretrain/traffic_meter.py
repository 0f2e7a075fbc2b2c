"""Bytes that collectives move, by part: counted on real ranks, or where there are no processes."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALL_REDUCE = "all-reduce"
ALL_GATHER = "all-gather"
REDUCE_SCATTER = "reduce-scatter"

_KINDS = {
    "allreduce_": ALL_REDUCE,
    "allreduce_coalesced_": ALL_REDUCE,
    "_allgather_base_": ALL_GATHER,
    "_reduce_scatter_base_": REDUCE_SCATTER,
}


@dataclass(frozen=True)
class Collective:
    """One call, on one rank."""

    kind: str
    part: str
    """What was going on."""
    payload: int
    """Bytes of the whole tensor: that which is reduced, or that which is gathered."""
    members: tuple[int, ...]
    """Ranks that take part."""
    dimensions: int
    """Of the tensor: layouts move flat memory, the objective rows."""

    @property
    def sent(self) -> float:
        """Bytes that a rank sends, and receives, by the ring algorithm."""
        passes, ranks = 2 if self.kind == ALL_REDUCE else 1, len(self.members)
        return passes * self.payload * (ranks - 1) / ranks

    def on_node(self, size: int) -> int:
        """Members on the node of the first of them, where nodes have `size` ranks in a row."""
        first = self.members[0] // size
        return sum(rank // size == first for rank in self.members)


class TrafficMeter(TorchDispatchMode):
    """Notes every collective while it is entered; `part` names what is going on."""

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.seen: list[Collective] = []
        self._members: dict[str, tuple[int, ...]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the operation, and notes it if it is a collective.

        Raises:
            NotImplementedError: a collective that none of our layouts uses.
        """
        if func.namespace == "c10d":
            self._note(func, args)
        return func(*args, **(kwargs or {}))

    def _note(self, func: Any, args: tuple[Any, ...]) -> None:
        name = func._schema.name.removeprefix("c10d::")
        if name not in _KINDS:
            raise NotImplementedError(f"the bytes that {name} moves are not counted")
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        groups = [a for a in args if isinstance(a, torch.ScriptObject)]
        group = ProcessGroup.unbox(groups[0]).group_name
        if group not in self._members:
            ranks = dist.get_process_group_ranks(_resolve_process_group(group))
            self._members[group] = tuple(ranks)
        # of a gathering and a scattering the larger of two tensors is the whole
        whole = tensors if _KINDS[name] == ALL_REDUCE else [max(tensors, key=lambda t: t.numel())]
        size = sum(tensor.nbytes for tensor in whole)
        of = self._members[group]
        self.seen.append(Collective(_KINDS[name], self.part, size, of, whole[0].dim()))
