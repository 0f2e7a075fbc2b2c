"""The memory that a training step will take, from a step on fake tensors: sizes without values.

The model, its losses and its optimiser are the trainer's own, so what is found is what a step
allocates. All fake tensors are on the CPU, whatever the target: torch without CUDA cannot follow
gradients on others. For a GPU the attention and loss kernels are those that a GPU gets, and autocast
is brought to give what it gives there (`_Stand`). Blocks run eagerly; compiled ones keep less.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from eosin.launch.stopwatch import watched
from eosin.pretrain.attention import AttentionFn, sdpa_attention, xformers_attention
from eosin.pretrain.batch import Batch, Crops, Inputs
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.distill import Distiller, Losses
from eosin.pretrain.memory_meter import MemoryMeter, Peak, storages
from eosin.pretrain.optim import build_optimizer, clip_gradients, set_rates, step_unless_bad
from eosin.pretrain.prototype_kernels import LossKernels, PlainKernels
from eosin.pretrain.step_guard import StepGuard
from eosin.pretrain.steps import BatchPlan
from eosin.pretrain.train import Rates, forward

WEIGHTS = "weights"
TEACHER = "teacher"
GRADIENTS = "gradients"
MOMENTS = "moments"
COPIES = "16-bit copies of weights"
INPUTS = "inputs"
ACTIVATIONS = "activations"
TEACHER_FORWARD = "teacher's activations"
LOSSES = "heads and losses"
BACKWARD = "backward"
OPTIMISER = "optimiser"
EMA = "EMA"
STATE = (WEIGHTS, TEACHER, MOMENTS)
"""What is there before a step and behind it."""

CANDIDATES = 16
"""Last steps of a run, of which the largest is planned."""

TargetDevice: TypeAlias = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class StepMemory:
    """Of one rank."""

    peak: Peak
    """The moment of the step at which most is held, by part."""
    state: dict[str, int]
    """Bytes of what stays between steps, by part."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.peak.total


@dataclass(frozen=True)
class StreamedShapes:
    """The shapes of `prototype_triton.TritonKernels`, without values."""

    dtype: torch.dtype
    processors: int = 132
    """Of the GPU; they decide in how many parts a small matrix is walked through."""

    @property
    def dense_elements(self) -> int:
        """No matrix is held."""
        return 0

    def log_sum_exp(self, a: Tensor, b: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """See `LossKernels`."""
        return a.new_empty((self._parts(a, b), len(a)), dtype=torch.float32)[0]

    def softmax_average(
        self, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `LossKernels`."""
        shape = self._parts(a, b), len(a), values.shape[1]
        averages = a.new_empty(shape, dtype=torch.float32)
        return averages[0].clone(), a.new_empty(len(a), dtype=torch.float32)

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
            out += a.new_empty((parts, *out.shape), dtype=torch.float32).sum(dim=0)

    def _parts(self, a: Tensor, b: Tensor) -> int:
        row_tiles, column_tiles = -(-len(a) // 128), -(-len(b) // 128)
        return max(min(2 * self.processors // max(row_tiles, 1), column_tiles), 1)


class _Stand(TorchFunctionMode):
    """Stands in where the host would read values, and where CUDA's autocast differs from the CPU's.

    Args:
        like_cuda: whether the target is a GPU.
    """

    def __init__(self, like_cuda: bool) -> None:
        super().__init__()
        self.like_cuda = like_cuda

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the call, or what stands for it."""
        fake = bool(args) and isinstance(args[0], FakeTensor)
        if fake and func is Tensor.tolist:  # of the pairs of views: no view is its own target
            students, teachers = args[0].shape
            return [[float(s != t) for t in range(teachers)] for s in range(students)]
        if func is Tensor.numpy:
            with _disable_current_modes():
                return func(*args, **(kwargs or {}))
        if func is torch.addcmul and self.like_cuda and torch.is_autocast_enabled("cpu"):
            args = tuple(a.float() if a.dtype == torch.bfloat16 else a for a in args)
        return func(*args, **(kwargs or {}))


class _HostReads(TorchDispatchMode):
    """Leaves tensors that are made of arrays as they are, and reads single numbers as zero.

    The host looks at rows and masks, which are arrays, and at the range of held logits, where zero
    stands for one that needs no other way through the losses.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs every other operation."""
        if func is torch.ops.aten.lift_fresh.default:
            return args[0]
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 0.0
        if func is torch.ops.aten._fused_sgd_.default:
            return None  # changes its arguments in place; fake tensors have no form of it
        return func(*args, **(kwargs or {}))


@contextmanager
def no_values(like_cuda: bool) -> Iterator[None]:
    """Within it new tensors have sizes alone; what is made from arrays may take part.

    Args:
        like_cuda: whether the target is a GPU.
    """
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        # of a copied module: torch looks whether the memory is there
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        with _HostReads(), _Stand(like_cuda):
            yield


def largest_step(config: PretrainConfig, plan: BatchPlan) -> int:
    """One of the last steps, when every term is on: that with the largest crops, then masks."""
    steps = range(max(config.steps - CANDIDATES, 0), config.steps)
    return max(steps, key=lambda step: (plan.augment_of(step).global_px, plan.masks_of(step).sum()))


def blank_batch(plan: BatchPlan, step: int) -> Batch:
    """A batch of `step` whose pixels nobody reads."""
    sizes = plan.augment_of(step)

    def crops(number: int, side: int) -> Tensor:
        return torch.empty((number, plan.local_batch, side, side, 3), dtype=torch.uint8)

    images = Crops(crops(sizes.n_global, sizes.global_px), crops(sizes.n_local, sizes.local_px))
    return Batch(step, images, plan.masks_of(step), torch.arange(plan.local_batch), damaged={})


def kernels_of(
    config: PretrainConfig, device: TargetDevice, dtype: torch.dtype
) -> tuple[AttentionFn, LossKernels]:
    """What the trainer would choose on the target, in a form that runs on fake tensors here."""
    sixteen_bit = device == "cuda" and dtype == torch.bfloat16
    packed = sixteen_bit and config.attention != "sdpa"
    streams = sixteen_bit and config.loss_kernels != "plain"
    return (
        xformers_attention if packed else sdpa_attention,
        StreamedShapes(dtype) if streams else PlainKernels(dtype),
    )


class PlannedStep:
    """The trainer's step, taken where tensors may be fake.

    Args:
        config: of the training.
        device: of the target.
        dtype: of the matrix products.
        ranks: that share the batch; None for one process.
    """

    def __init__(
        self,
        config: PretrainConfig,
        device: TargetDevice,
        dtype: torch.dtype,
        ranks: dist.ProcessGroup | None = None,
    ) -> None:
        self.config, self.dtype = config, dtype
        attention, kernels = kernels_of(config, device, dtype)
        self.model = Distiller(
            config.model, config.objective, attention, kernels, config.group, config.seed, ranks
        )
        self.model.student.backbone.recompute(config.recompute)
        self.optimizer = build_optimizer(self.model.student, config.model.depth, config.optim)
        self.inputs = Inputs(torch.device("cpu"), config.mean, config.std)
        self.parts = dict(self.model.student.named_children())
        self.guard = StepGuard(
            Path(os.devnull),
            limit=config.max_bad_steps,
            count=0,
            first_step=0,
            terms=Losses._fields,
            modules=list(self.parts),
        )

    def take(self, batch: Batch, meter: MemoryMeter) -> None:
        """One step, as in `train.train`; the meter is told of its parts and of the gradients."""
        config, model, rates = self.config, self.model, Rates.at(self.config, batch.step)
        meter.switch(INPUTS)
        losses, outputs = forward(config, model, batch, rates, self.inputs, self.dtype)
        meter.switch(BACKWARD)
        losses.total.backward()
        meter.label(_gradients(model), GRADIENTS)
        meter.switch(OPTIMISER)
        norms = clip_gradients(self.parts.values(), config.optim.clip_norm, config.optim.clip)
        bad = self.guard.judge(batch.step, batch.rows, torch.stack(losses), norms)
        set_rates(self.optimizer, rates.lr, rates.weight_decay, freeze_last=rates.freeze_last)
        step_unless_bad(self.optimizer, bad)
        self.optimizer.zero_grad()
        meter.switch(EMA)
        model.update_teacher(outputs, rates.momentum, bad)
        meter.switch(LOSSES)
        model.record_use(batch.step, outputs, bad)
        meter.stop()


def measure_step(step: PlannedStep, batches: Sequence[Batch]) -> StepMemory:
    """Memory of the last of the steps on `batches`, the first of which makes the moments.

    Args:
        step: on fake tensors within `no_values`, or on real ones.
        batches: two or more.
    """
    meter = MemoryMeter()
    model: Any = step.model
    model.teacher.backbone.rows = watched(
        lambda: meter, TEACHER_FORWARD, model.teacher.backbone.rows
    )
    model.student.backbone.rows = watched(lambda: meter, ACTIVATIONS, model.student.backbone.rows)
    model.forward = watched(lambda: meter, LOSSES, model.forward, goes_on=True)
    of_weights: set[int] = set()
    meter.label_of = _copies_of(of_weights)
    with meter:
        _label_state(meter, step, of_weights)
        *first, last = batches
        for batch in first:
            step.take(batch, meter)
        _label_state(meter, step, of_weights)
        state = meter.held()
        meter.forget()
        step.take(last, meter)
    return StepMemory(meter.peak(), {name: state.get(name, 0) for name in STATE})


def plan_memory(
    config: PretrainConfig, device: TargetDevice, dtype: torch.dtype, ranks: int = 1
) -> StepMemory:
    """Memory of one of `ranks` ranks, each with its part of the batch.

    Raises:
        ConfigError: the batch cannot be split over the ranks.
    """
    plan = replace(config.batch_plan, rank=0, world=ranks)
    number = largest_step(config, plan)
    with no_values(device == "cuda"):
        batch = blank_batch(plan, number)
        return measure_step(PlannedStep(config, device, dtype), [batch, batch])


def _gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def _label_state(meter: MemoryMeter, step: PlannedStep, of_weights: set[int]) -> None:
    """Labels what stays between steps, and notes which storages are weights."""
    model = step.model
    meter.label([*model.parameters(), *model.buffers()], TEACHER)
    meter.label(model.student.parameters(), WEIGHTS)
    moments = (value for state in step.optimizer.state.values() for value in state.values())
    meter.label((m for m in moments if isinstance(m, Tensor)), MOMENTS)
    of_weights.update(s._cdata for p in model.parameters() for s in storages(p))


def _copies_of(weights: set[int]) -> Any:
    """Labels copies of weights in another type as such."""
    to_copy = torch.ops.aten._to_copy.default

    def label(func: Any, args: tuple[Any, ...], part: str) -> str:
        if func is to_copy and any(s._cdata in weights for s in storages(args[0])):
            return COPIES
        return part

    return label
