"""What a training step takes on one of any number of ranks: memory and traffic, before it runs.

A step of the trainer's own model, losses and optimiser is taken on tensors without values
(`valueless`), so what is found is what a step allocates and exchanges. Blocks run eagerly:
compiled ones keep less for the backward pass.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from eosin.launch.process import World
from eosin.launch.stopwatch import watched
from eosin.pretrain.batch import Batch, Crops, Inputs
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.distill import Distiller, Losses
from eosin.pretrain.frozen_teacher import FrozenTeacher, read_shape
from eosin.pretrain.gradients import take_gradients
from eosin.pretrain.local_part import local
from eosin.pretrain.memory_meter import COLLECTIVE_NAMESPACES, MemoryMeter, Peak, storages
from eosin.pretrain.optim import (
    build_optimizer,
    clip_gradients,
    forget_gradients,
    hand_gradients,
    set_rates,
    step_unless_bad,
)
from eosin.pretrain.parallel import Layout, ParallelName, choose_parallel
from eosin.pretrain.rates import Rates
from eosin.pretrain.setup import Training
from eosin.pretrain.start import freeze
from eosin.pretrain.step_guard import StepGuard
from eosin.pretrain.steps import BatchPlan
from eosin.pretrain.traffic_meter import Collective, TrafficMeter
from eosin.pretrain.valueless import (
    TargetDevice,
    as_autocast_on_cuda,
    as_first_rank,
    kernels_of,
    no_processes,
    no_values,
)

WEIGHTS = "weights"
TEACHER = "teacher"
GRADIENTS = "gradients"
MOMENTS = "moments"
COPIES = "16-bit copies of weights"
UNSHARDED = "gathered weights"
BUFFERS = "buffers of collectives"
INPUTS = "inputs"
ACTIVATIONS = "activations"
TEACHER_FORWARD = "teacher's activations"
LOSSES = "heads and losses"
BACKWARD = "backward"
OPTIMISER = "optimiser"
EMA = "EMA"
FIGURES = "health figures"
"""Of log steps alone."""
TARGETS = "targets"
SPREAD = "gathered features"
STATE = (WEIGHTS, TEACHER, MOMENTS)
"""What is there before a step and behind it."""

CANDIDATES = 16
"""Last steps of a run, of which the largest is planned."""

BUCKET_BYTES = 25 * 2**20
FIRST_BUCKET_BYTES = 2**20
"""Of DistributedDataParallel."""


@dataclass(frozen=True)
class StepPlan:
    """One step on one rank."""

    parallel: ParallelName
    """The layout."""
    peak: Peak
    """The moment at which most memory is held, by part."""
    state: dict[str, int]
    """Bytes that stay between steps, by part."""
    collectives: list[Collective]
    """Of the step, in order."""
    state_bytes: int
    """Of a checkpoint, all ranks together: weights, teachers, moments, buffers."""


def plan_step(
    config: PretrainConfig,
    target: TargetDevice,
    dtype: torch.dtype,
    *,
    ranks: int = 1,
    on_node: int = 8,
    memory_bytes: int | None = None,
) -> StepPlan:
    """A step of `config` on rank 0 of so many.

    Args:
        config: of the training.
        target: where it will run.
        dtype: of the matrix products.
        ranks: that share the batch.
        on_node: of them on one node.
        memory_bytes: of a device, by which ``parallel=auto`` chooses; None: it does not matter.

    Raises:
        ConfigError: a layout that so many ranks do not allow, or a batch that they cannot share.
    """
    with no_processes(ranks, on_node) as world, no_values():
        plan = config.plan_of(world)
        number = largest_step(config, plan)
        step = PlannedStep(config, target, dtype, world, memory_bytes)
        return watch_step(step, blank_batch(plan, number))


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


class PlannedStep:
    """The trainer's step, taken where tensors may have no values and ranks no processes.

    Args:
        config: of the training.
        target: where it will run.
        dtype: of the matrix products.
        world: as this rank sees it.
        memory_bytes: see `plan_step`.
    """

    def __init__(
        self,
        config: PretrainConfig,
        target: TargetDevice,
        dtype: torch.dtype,
        world: World,
        memory_bytes: int | None = None,
    ) -> None:
        attention, kernels = kernels_of(config.attention, config.loss_kernels, target, dtype)
        frozen = [
            FrozenTeacher(of.build(attention), of.mean, of.std, config.mean, config.std)
            for of in map(read_shape, config.teacher.runs)
        ]
        model = Distiller(
            config.model, config.objective, attention, kernels, config.group, config.seed,
            world.group, frozen, masked=not frozen or config.teacher.masked,
        )  # fmt: skip
        model.student.backbone.recompute(config.recompute)
        if target == "cuda" and detect_fake_mode() is not None:
            as_autocast_on_cuda(model)
        self.state_bytes = sum(
            tensor.nbytes
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if not name.startswith("frozen.")  # they are read from their own runs
        )
        self.state_bytes += 2 * sum(p.nbytes for p in model.student.parameters())  # moments
        freeze(
            model.student, config.start.train_blocks, config.model.depth, config.model.low_rank,
            masked=not frozen or config.teacher.masked,
        )  # fmt: skip
        parameters = sum(p.numel() for p in model.student.parameters())
        name = choose_parallel(config.parallel, world, parameters, memory_bytes)
        layout: Any
        if detect_fake_mode() is None:
            layout = Layout(model, name, world, dtype, config.shard_ranks)
        elif name == "ddp":
            layout = Replicas(model, world)
        else:
            with as_first_rank():
                layout = Layout(model, name, world, dtype, config.shard_ranks)
        device = torch.device("cpu")
        optimizer = build_optimizer(model.student, config.model.depth, config.optim)
        self.training = Training(config, world, device, dtype, model, layout, optimizer, name)
        self.inputs = Inputs(device, config.mean, config.std)
        self.parts = dict(model.student.named_children())
        self.guard = StepGuard(
            Path(os.devnull),
            limit=config.max_bad_steps,
            count=0,
            first_step=0,
            terms=Losses._fields,
            modules=list(self.parts),
            world=world,
        )

    def make_moments(self) -> None:
        """What the first step leaves: moments, here of no gradient."""
        for group in self.training.optimizer.param_groups:
            for part in group["params"]:
                part.grad = torch.zeros_like(part)
        self.training.optimizer.step()
        self.training.optimizer.zero_grad()

    def take(self, batch: Batch, watch: "StepWatch") -> None:
        """One step, as in `train.train`."""
        t, config = self.training, self.training.config
        student, rates = t.model.student, Rates.at(config, batch.step)
        watch.switch(INPUTS)
        losses, outputs = take_gradients(t, batch, rates, self.inputs)
        watch.memory.label(_gradients(student), GRADIENTS)
        watch.switch(OPTIMISER)
        norms = clip_gradients(
            self.parts.values(), config.optim.clip_norm, config.optim.clip, t.layout.over_shards
        )
        bad = self.guard.judge(batch.step, batch.rows, torch.stack(losses), norms)
        set_rates(t.optimizer, rates.lr, rates.weight_decay, freeze_last=rates.freeze_last)
        hand_gradients(student)
        step_unless_bad(t.optimizer, bad)
        forget_gradients(student)
        watch.switch(EMA)
        t.model.update_teacher(outputs, rates.momentum, bad)
        watch.switch(FIGURES)
        t.model.record_use(batch.step, outputs, bad)
        watch.switch("")


class Replicas:
    """`DistributedDataParallel` with gradients as views of its buckets: it reads memory itself.

    Args:
        model: whose student is replicated.
        world: the ranks.
    """

    name: ParallelName = "ddp"
    over_shards = None

    def __init__(self, model: Distiller, world: World) -> None:
        self.step: nn.Module = model
        self._waits = False
        self.buckets: list[Tensor] = []
        held: list[nn.Parameter] = []
        for parameter in reversed(list(model.student.parameters())):
            held.append(parameter)
            limit = BUCKET_BYTES if self.buckets else FIRST_BUCKET_BYTES
            if sum(p.nbytes for p in held) >= limit:
                self._fill(held, world)
                held = []
        if held:
            self._fill(held, world)

    def accumulate(self, more: bool) -> None:
        """See `Layout`."""
        self._waits = more

    def _fill(self, parameters: list[nn.Parameter], world: World) -> None:
        bucket = parameters[0].new_zeros(sum(p.numel() for p in parameters))
        self.buckets.append(bucket)
        missing = len(parameters)
        views = dict(zip(parameters, bucket.split([p.numel() for p in parameters]), strict=True))

        def ready(parameter: nn.Parameter) -> None:
            nonlocal missing
            assert parameter.grad is not None
            parameter.grad = views[parameter].copy_(parameter.grad.flatten()).view_as(parameter)
            if self._waits:
                return
            missing -= 1
            if missing == 0:
                dist.all_reduce(bucket, group=world.group)
                missing = len(parameters)

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(ready)


class StepWatch:
    """Memory and traffic of a step, each told what is going on.

    Args:
        step: whose parts are watched, from here on.
    """

    def __init__(self, step: PlannedStep) -> None:
        self.step, self.memory, self.traffic = step, MemoryMeter(), TrafficMeter()
        self.memory.resized, self.memory.label_of = UNSHARDED, self._label
        self._weights: set[int] = set()
        model: Any = step.training.model
        student, *others = (network.backbone for network in model.networks())
        for backbone in (student, *others):
            part = ACTIVATIONS if backbone is student else TEACHER_FORWARD
            backbone.rows = watched(lambda: self, part, backbone.rows)
        model.forward = self._then_backward(model.forward)
        model._gather_rows = watched(lambda: self, SPREAD, model._gather_rows)
        model._targets = watched(lambda: self, TARGETS, model._targets)

    def switch(self, part: str) -> str:
        """See `launch.stopwatch.Watch`."""
        self.traffic.part = part
        return self.memory.switch(part)

    def stop(self) -> None:
        """See `launch.stopwatch.Watch`."""
        self.switch("")

    def __enter__(self) -> "StepWatch":
        self.memory.__enter__()
        self.traffic.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.traffic.__exit__(*error)
        self.memory.__exit__(*error)

    def begin(self) -> dict[str, int]:
        """Labels what stays between steps, and forgets what came before; its bytes."""
        t = self.step.training
        self.memory.label(map(local, (*t.model.parameters(), *t.model.buffers())), TEACHER)
        self.memory.label(map(local, t.model.student.parameters()), WEIGHTS)
        moments = (value for state in t.optimizer.state.values() for value in state.values())
        self.memory.label((m for m in moments if isinstance(m, Tensor)), MOMENTS)
        self.memory.label(getattr(t.layout, "buckets", ()), GRADIENTS)
        weights = map(local, t.model.parameters())
        self._weights = {s._cdata for weight in weights for s in storages(weight)}
        held = self.memory.held()
        self.memory.forget()
        self.traffic.seen.clear()
        return {name: held[name] for name in (*STATE, GRADIENTS) if name in held}

    def _then_backward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """What comes after the losses is taken for their backward pass, until it is said to end."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.switch(LOSSES)
            out = forward(*args, **kwargs)
            self.switch(BACKWARD)
            return out

        return call

    def _label(self, func: Any, args: tuple[Any, ...], part: str) -> str:
        if func.namespace in COLLECTIVE_NAMESPACES:
            return BUFFERS
        if func is torch.ops.aten._to_copy.default:
            [storage] = storages(local(args[0]))
            return COPIES if storage._cdata in self._weights else part
        return part


def watch_step(step: PlannedStep, batch: Batch) -> StepPlan:
    """Memory and traffic of a step that is not the first.

    Args:
        step: within `no_values`, or on real tensors.
        batch: of this rank.
    """
    step.make_moments()
    with StepWatch(step) as watch:
        state = watch.begin()
        step.take(batch, watch)
    t = step.training
    seen = list(watch.traffic.seen)
    return StepPlan(t.layout.name, watch.memory.peak(), state, seen, step.state_bytes)


def _gradients(student: nn.Module) -> list[Tensor]:
    return [local(p.grad) for p in student.parameters() if p.grad is not None]
