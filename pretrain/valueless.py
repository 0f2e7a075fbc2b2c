"""Tensors without values, and ranks without processes: a step can be taken for its sizes alone.

All tensors are on the CPU, whatever the target: torch without CUDA cannot follow gradients on
others. For a GPU, the attention and loss kernels have the shapes of those that a GPU gets, and
what autocast does otherwise there is done by `as_autocast_on_cuda`.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from eosin.launch.process import World
from eosin.pretrain.attention import (
    AttentionFn,
    AttentionName,
    sdpa_attention,
    xformers_attention,
)
from eosin.pretrain.block import LayerScale
from eosin.pretrain.prototype_kernels import LossKernelName, LossKernels, PlainKernels

TargetDevice: TypeAlias = Literal["cuda", "cpu"]


@contextmanager
def no_values() -> Iterator[None]:
    """Within it new tensors have sizes alone; what is made from arrays may take part."""
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")  # of memory that is not there; the rest is for who trains
        with _HostReads(), _HostLists():
            yield


@contextmanager
def with_values() -> Iterator[None]:
    """Real tensors again, inside `no_values`."""
    with _disable_current_modes():
        yield


@contextmanager
def as_first_rank() -> Iterator[None]:
    """Where a layout is made of tensors without values: the numbers of ranks have their values.

    Of what a tensor is cut into, the first rank's piece alone is made: a thousand ranks would cost
    minutes.
    """
    with with_values(), _FirstPiece():
        yield


@contextmanager
def no_processes(ranks: int, on_node: int) -> Iterator[World]:
    """The world as rank 0 of so many sees it; collectives do nothing, and take no time.

    Args:
        ranks: in all.
        on_node: of them on one node.

    Raises:
        RuntimeError: this process has process groups already.
    """
    if ranks == 1:
        yield World()
        return
    if dist.is_initialized():
        raise RuntimeError("a process with process groups cannot plan for other ones")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        group = dist.group.WORLD
        assert isinstance(group, dist.ProcessGroup)
        yield World(size=ranks, local_size=min(on_node, ranks), group=group, host=group)
    finally:
        dist.destroy_process_group()


def kernels_of(
    attention: AttentionName, losses: LossKernelName, target: TargetDevice, dtype: torch.dtype
) -> tuple[AttentionFn, LossKernels]:
    """What the trainer chooses on the target, in a form that runs without values, here."""
    sixteen_bit = target == "cuda" and dtype == torch.bfloat16
    return (
        xformers_attention if sixteen_bit and attention != "sdpa" else sdpa_attention,
        StreamedShapes(dtype) if sixteen_bit and losses != "plain" else PlainKernels(dtype),
    )


def as_autocast_on_cuda(model: nn.Module) -> None:
    """Brings residual branches to the stream's type before they are added.

    There autocast does so for `torch.addcmul`, which keeps them for the backward pass; the CPU's
    kernel takes both types as they come.
    """

    def widened(add: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(x: Tensor, branch: Tensor, rows: Tensor | None, scale: float) -> Tensor:
            return add(x, branch.to(x.dtype) if rows is None else branch, rows, scale)

        return forward

    for module in model.modules():
        if isinstance(module, LayerScale):
            module.forward = widened(module.forward)  # type: ignore[method-assign]


@dataclass(frozen=True)
class StreamedShapes:
    """The shapes of `prototype_triton.TritonKernels`, and the memory it takes, without values."""

    dtype: torch.dtype
    processors: int = 132
    """Of the GPU (an H100 has 132): in how many parts a small matrix is walked through."""

    @property
    def dense_elements(self) -> int:
        """No matrix is held."""
        return 0

    def log_sum_exp(self, a: Tensor, b: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """See `LossKernels`."""
        return a.new_empty((self._parts(a, b), len(a)), dtype=torch.float32).amax(dim=0)

    def softmax_average(
        self, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `LossKernels`."""
        shape = self._parts(a, b), len(a), values.shape[1]
        averages = a.new_empty(shape, dtype=torch.float32)
        average = averages[0] if len(averages) == 1 else (averages * 1.0).sum(dim=0)
        return average, average.new_empty(len(a))

    def add_weighted(
        self,
        out: Tensor,
        a: Tensor,
        b: Tensor,
        row_bias: Tensor | None,
        bias: Tensor,
        scale: float,
        values: Tensor,
    ) -> None:
        """See `LossKernels`."""
        if (parts := self._parts(a, b)) > 1:
            out += out.new_empty((parts, *out.shape)).sum(dim=0)

    def _parts(self, a: Tensor, b: Tensor) -> int:
        row_tiles, column_tiles = -(-len(a) // 64), -(-len(b) // 64)
        return max(min(2 * self.processors // max(row_tiles, 1), column_tiles, 64), 1)


class _HostReads(TorchDispatchMode):
    """What the host sees: arrays as they are, single numbers as zero.

    The host looks at rows and masks, which are arrays, and at the range of held logits, where zero
    stands for one that needs no other way through the losses.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs every other operation."""
        aten = torch.ops.aten
        if func is aten.lift_fresh.default:
            return args[0]
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 0.0
        if func is aten._fused_sgd_.default:
            return None  # it changes its arguments alone, and has no form without values
        return func(*args, **(kwargs or {}))


class _FirstPiece(TorchFunctionMode):
    """`torch.chunk` of which all pieces but the first are empty."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs every other call."""
        if func is not torch.chunk:
            return func(*args, **(kwargs or {}))
        (tensor, pieces), dim = args[:2], (kwargs or {}).get("dim", 0)
        first = tensor.narrow(dim, 0, -(-tensor.shape[dim] // pieces))
        return (first, *[first.new_empty(0)] * (pieces - 1))


class _HostLists(TorchFunctionMode):
    """Stands in where the host would read whole tensors."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the call, or what stands for it."""
        if func is Tensor.numpy:  # of a real tensor, which is not to become a fake one on the way
            with with_values():
                return func(*args, **(kwargs or {}))
        if func is Tensor.tolist and isinstance(args[0], FakeTensor):
            # the weights of pairs of views: no view is its own target
            students, teachers = args[0].shape
            return [[float(s != t) for t in range(teachers)] for s in range(students)]
        return func(*args, **(kwargs or {}))
