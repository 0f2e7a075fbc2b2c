"""Distillation from a frozen network: its targets, in its own way of seeing, and nothing of it
moves."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eosin.configs.errors import ConfigError, InputError
from eosin.configs.load import load_config
from eosin.data_curation.encoder_interface import digest_of_weights
from eosin.data_curation.shards import ShardConfig, shard
from eosin.launch.artefacts import read_json
from eosin.pretrain.attention import sdpa_attention
from eosin.pretrain.checkpoint import list_checkpoints, read_tensors
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.distill import Distiller, StepRates
from eosin.pretrain.flops import StepShape, executed_flops
from eosin.pretrain.frozen_teacher import (
    FrozenTeacher,
    TeacherConfig,
    TeacherShape,
    load_frozen_teacher,
)
from eosin.pretrain.heads import HeadConfig
from eosin.pretrain.initialise import materialise
from eosin.pretrain.network import Network, ObjectiveConfig
from eosin.pretrain.prototype_kernels import PlainKernels
from eosin.pretrain.step_plan import plan_step
from eosin.pretrain.train import pretrain
from eosin.pretrain.vit import VitConfig
from tests.naive import sinkhorn

SMALL = VitConfig(width=16, depth=1, heads=2, patch_px=8, image_px=32, registers=1)
LARGE = VitConfig(width=32, depth=2, heads=2, patch_px=4, image_px=16, registers=3)
HEAD = HeadConfig(prototypes=12, hidden=8, bottleneck=4)
WIDE = HeadConfig(prototypes=12, hidden=24, bottleneck=6)
MEAN, STD = (0.5, 0.6, 0.7), (0.2, 0.3, 0.4)


def teacher(objective: ObjectiveConfig | None = None, shape: VitConfig = LARGE) -> FrozenTeacher:
    network = materialise(lambda: Network(shape, objective or ObjectiveConfig(head=WIDE)), 7)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(1)
            )
    return FrozenTeacher(network, MEAN, STD, (0.4, 0.5, 0.6), (0.1, 0.2, 0.25))


@torch.no_grad()
def test_the_losses_are_those_of_the_frozen_networks_targets() -> None:
    """One step in loops: the teacher sees resized crops in its own normalisation."""
    frozen, objective = teacher(), ObjectiveConfig(head=HEAD)
    kernels = PlainKernels(torch.float32)
    model = Distiller(SMALL, objective, sdpa_attention, kernels, 2, 0, None, [frozen], masked=False)
    generator = torch.Generator().manual_seed(3)
    crops = torch.randn(2, 3, 3, 32, 32, generator=generator)  # [V, B, 3, H, W]
    masks = np.random.default_rng(0).random((6, 16)) < 0.3
    none = torch.empty(0, 3, 3, 16, 16)
    losses, outputs = model(crops, none, masks, StepRates(0.07))
    flat = crops.flatten(0, 1)
    pixels = flat * torch.tensor((0.1, 0.2, 0.25)).view(3, 1, 1)
    pixels = pixels + torch.tensor((0.4, 0.5, 0.6)).view(3, 1, 1)
    seen = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    seen = F.interpolate(seen, size=(16, 16), mode="bicubic", antialias=True)
    told, own = frozen.network, model.student
    tokens, ours = told.backbone([seen])[0], own.backbone([flat])[0]
    torch.testing.assert_close(outputs.features, tokens.cls, atol=1e-4, rtol=1e-4)
    where = torch.from_numpy(np.flatnonzero(masks))
    cls = told.head.logits(tokens.cls)
    patches = told.head.logits(tokens.patches.flatten(0, 1)[where])
    targets, patch_targets = sinkhorn(cls, 0.07), sinkhorn(patches, 0.07)
    said = F.log_softmax(own.head.logits(ours.cls) / 0.1, dim=1)
    pair = -(targets.unflatten(0, (2, 3)).flip(0).flatten(0, 1) * said).sum(1).mean()
    # two pairs of global views, and weights that add up to one over the pairs
    torch.testing.assert_close(losses.dino_global, pair, atol=1e-4, rtol=1e-4)
    hidden = F.log_softmax(own.head.logits(ours.patches.flatten(0, 1)[where]) / 0.1, dim=1)
    terms = -(patch_targets * hidden).sum(1)
    counts = masks.sum(axis=1)
    weights = torch.tensor([1 / max(counts[i // 16], 1) / 6 for i in where.tolist()])
    torch.testing.assert_close(losses.ibot, (terms * weights).sum().float(), atol=1e-4, rtol=1e-4)


def test_the_average_follows_the_student_and_the_teacher_stays() -> None:
    frozen = teacher()
    before = digest_of_weights(frozen)
    model = Distiller(
        SMALL, ObjectiveConfig(head=HEAD), sdpa_attention, PlainKernels(torch.float32), 2, 0, None,
        [frozen], masked=False,
    )  # fmt: skip
    masks = np.zeros((6, 16), np.bool_)
    masks[:, :5] = True
    crops = torch.randn(2, 3, 3, 32, 32)
    losses, outputs = model(crops, torch.randn(2, 3, 3, 16, 16), masks, StepRates(0.07))
    losses.total.backward()
    assert all(p.grad is None for p in frozen.parameters())
    with torch.no_grad():
        for p in model.student.parameters():
            p += 1
    student = model.student.backbone.norm.weight.detach()
    old = model.teacher.backbone.norm.weight.clone()
    model.update_teacher(outputs, 0.75)
    torch.testing.assert_close(model.teacher.backbone.norm.weight, 0.75 * old + 0.25 * student)
    assert digest_of_weights(frozen) == before


OTHER = VitConfig(width=24, depth=1, heads=2, patch_px=8, image_px=32, registers=0)
OTHER_OBJECTIVE = ObjectiveConfig(
    head=HeadConfig(prototypes=7, hidden=10, bottleneck=5),
    patch_head=HeadConfig(prototypes=9, hidden=10, bottleneck=5),
)


def two_teachers() -> tuple[list[FrozenTeacher], ObjectiveConfig]:
    """Of other sizes, patches and numbers of prototypes, with heads for CLS and patches apart."""
    objective = ObjectiveConfig(head=HEAD, patch_head=HEAD)
    first = teacher(ObjectiveConfig(head=WIDE, patch_head=WIDE))
    return [first, teacher(OTHER_OBJECTIVE, OTHER)], objective


def test_losses_of_two_teachers_are_the_mean_of_those_of_each() -> None:
    """Each alone, with the student's heads for it in the place of the first ones."""
    both, objective = two_teachers()
    kernels = PlainKernels(torch.float32)
    model = Distiller(SMALL, objective, sdpa_attention, kernels, 2, 0, None, both, masked=False)
    assert not hasattr(model.teacher, "further")  # nobody reads their average
    crops, local = torch.randn(2, 4, 3, 32, 32), torch.randn(1, 4, 3, 16, 16)
    masks = np.random.default_rng(0).random((8, 16)) < 0.3
    losses, _ = model(crops, local, masks, StepRates(0.07))
    losses.total.backward()
    alone = []
    for number, one in enumerate(both):
        own = one.heads_for(objective)
        apart = Distiller(SMALL, own, sdpa_attention, kernels, 2, 0, None, [one], masked=False)
        apart.student.backbone.load_state_dict(model.student.backbone.state_dict())
        heads = model.student if number == 0 else model.student.further[number - 1]
        apart.student.head.load_state_dict(heads.head.state_dict())
        apart.student.patch_head.load_state_dict(heads.patch_head.state_dict())
        found, _ = apart(crops, local, masks, StepRates(0.07))
        found.total.backward()
        alone.append((found, apart.student))
    assert alone[0][1].head.last_layer.weight.shape[0] == 12
    assert alone[1][1].patch_head.last_layer.weight.shape[0] == 9
    for name in ("dino_global", "dino_local", "ibot"):
        mean = sum(getattr(found, name) for found, _ in alone) / 2
        torch.testing.assert_close(getattr(losses, name), mean, atol=1e-5, rtol=1e-5)
    got = model.student.backbone.patch_embed.proj.weight.grad
    expected = sum(student.backbone.patch_embed.proj.weight.grad for _, student in alone) / 2
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
    ours = model.student.further[0].head.last_layer.weight.grad
    torch.testing.assert_close(
        ours, alone[1][1].head.last_layer.weight.grad / 2, atol=1e-6, rtol=1e-4
    )


def test_two_teachers_tell_the_parts_of_a_step_what_they_tell_the_whole() -> None:
    both, objective = two_teachers()
    kernels = PlainKernels(torch.float32)
    model = Distiller(SMALL, objective, sdpa_attention, kernels, 2, 0, None, both, masked=False)
    crops, none = torch.randn(2, 4, 3, 32, 32), torch.empty(0, 4, 3, 16, 16)
    masks = np.zeros((8, 16), np.bool_)
    masks[:, :4] = True
    whole, _ = model(crops, none, masks, StepRates(0.07))
    parts = [(crops[:, at : at + 2], masks[:4]) for at in (0, 2)]
    taught = model.teach(parts, 0.07)
    assert [len(of_part) for of_part in taught] == [2, 2]
    found = [
        model(part, none[:, :2], seen, StepRates(0.07), None, None, told)[0]
        for (part, seen), told in zip(parts, taught, strict=True)
    ]
    mean = sum(part.dino_global + part.ibot for part in found) / 2
    torch.testing.assert_close(mean, whole.dino_global + whole.ibot, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("number", [1, 2])
def test_the_operations_of_teachers_are_what_torch_counts(number: int) -> None:
    both, objective = two_teachers()
    kernels = PlainKernels(torch.float32, 24)  # everything is streamed
    frozen = both[-number:]
    own = frozen[0].heads_for(objective)
    model = Distiller(SMALL, own, sdpa_attention, kernels, 2, 0, None, frozen, masked=False)
    crops, local = torch.randn(2, 4, 3, 32, 32), torch.randn(1, 4, 3, 16, 16)
    masks = np.zeros((8, 16), np.bool_)
    masks[:, :3] = True
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(crops, local, masks, StepRates(0.07))[0].total.backward()
    size = StepShape(batch=4, global_px=32, local_px=16, n_local=1, masked=24, group_size=2)
    shapes = [
        TeacherShape(one.network.backbone.config, one.network.objective, MEAN, STD)
        for one in frozen
    ]
    flops = executed_flops(SMALL, own, size, shapes)
    # a pass of Sinkhorn over little looks to torch like a product of matrices now and then
    assert counter.get_total_flops() == pytest.approx(flops.hardware, rel=1e-2)
    assert flops.teacher.forward != executed_flops(SMALL, own, size).teacher.forward


TINY = [
    "steps=4", "batch_size=4", "group_size=2", "threads=1", "log_every=1", "checkpoints.every=2",
    "augment={global_px: 32, local_px: 16, n_local: 2}",
]  # fmt: skip
BIG = ["model={width: 32, depth: 3, heads: 2, patch_px: 8, image_px: 32, registers: 2}",
       "objective.head={prototypes: 32, hidden: 16, bottleneck: 8}"]  # fmt: skip
LITTLE = ["model={width: 16, depth: 1, heads: 2, patch_px: 16, image_px: 32}",
          "objective.head={prototypes: 32, hidden: 8, bottleneck: 4}"]  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (folder / "tiles").mkdir()
    for i in range(12):
        image = cv2.resize(rng.integers(0, 255, (6, 6, 3), np.uint8), (48, 48))
        cv2.imwrite(str(folder / "tiles" / f"{i}.png"), image)
    shard(ShardConfig(images=folder / "tiles", out=folder / "shards", workers=1))
    return folder / "shards"


def config_for(shards: Path, out: Path, *overrides: str) -> PretrainConfig:
    return load_config(PretrainConfig, (), [f"shards={shards}", f"out={out}", *TINY, *overrides])


@pytest.mark.pitfall(20)
def test_a_student_is_made_from_a_run_exported_and_resumed(shards: Path, tmp_path: Path) -> None:
    pretrain(config_for(shards, tmp_path / "big", *BIG))
    whole = [*LITTLE, f"teacher.run={tmp_path / 'big'}"]
    pretrain(config_for(shards, tmp_path / "little", *whole))
    saved = read_tensors(list_checkpoints(tmp_path / "little" / "checkpoints")[0])
    assert not any("frozen" in name for name in saved)  # it is not written again with every one
    assert (tmp_path / "little" / "encoder" / "model.safetensors").is_file()
    config = read_json(tmp_path / "little" / "encoder" / "config.json")
    assert config["num_features"] == 16
    shutil.copytree(tmp_path / "little", tmp_path / "stopped")
    shutil.rmtree(list_checkpoints(tmp_path / "stopped" / "checkpoints")[0])
    (tmp_path / "stopped" / "done.json").unlink()
    pretrain(config_for(shards, tmp_path / "stopped", *whole))
    again = read_tensors(list_checkpoints(tmp_path / "stopped" / "checkpoints")[0])
    assert all(torch.equal(tensor, again[name]) for name, tensor in saved.items())
    # another teacher under the same name is noticed
    shutil.rmtree(tmp_path / "big")
    pretrain(config_for(shards, tmp_path / "big", *BIG, "seed=3"))
    (tmp_path / "stopped" / "done.json").unlink()
    with pytest.raises(ConfigError, match="learnt from a teacher of other weights"):
        pretrain(config_for(shards, tmp_path / "stopped", *whole))


@pytest.mark.slow
def test_a_student_of_two_runs_is_planned_stopped_and_made(shards: Path, tmp_path: Path) -> None:
    pretrain(config_for(shards, tmp_path / "big", *BIG))
    pretrain(config_for(shards, tmp_path / "other", *LITTLE, "objective.head.prototypes=24"))
    taught = [f"teacher.run={tmp_path / 'big'}", f"teacher.also=[{tmp_path / 'other'}]"]
    whole = [*LITTLE, *taught, "accumulate=2", "objective.spread.over=group"]
    pretrain(config_for(shards, tmp_path / "both", *whole))
    found = list_checkpoints(tmp_path / "both" / "checkpoints")
    saved = read_tensors(found[0])
    assert saved["model.student.further.0.head.last_layer.weight"].shape[0] == 24
    assert not any("frozen" in n or n.startswith("model.teacher.further") for n in saved)
    shutil.rmtree(found[0])
    (tmp_path / "both" / "done.json").unlink()
    pretrain(config_for(shards, tmp_path / "both", *whole))
    again = read_tensors(list_checkpoints(tmp_path / "both" / "checkpoints")[0])
    assert all(torch.equal(tensor, again[name]) for name, tensor in saved.items())
    # the student is a teacher itself, with the heads of its first one
    pretrain(config_for(shards, tmp_path / "next", *LITTLE, f"teacher.run={tmp_path / 'both'}"))
    step = [plan_step(config_for(shards, tmp_path / "x", *LITTLE, *of), "cpu", torch.float32)
            for of in ([], taught[:1], taught)]  # fmt: skip
    assert step[0].state["teacher"] < step[1].state["teacher"] < step[2].state["teacher"]
    held = sum(tensor.nbytes for tensor in saved.values())
    assert step[2].state_bytes == pytest.approx(held, rel=0.02)


def test_teachers_that_cannot_teach_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        pretrain(config_for(shards, tmp_path / "a", *LITTLE, f"teacher.run={tmp_path}"))
    pretrain(config_for(shards, tmp_path / "big", *BIG, "objective.ibot=0", "steps=2"))
    with pytest.raises(ConfigError, match="keeps one centre"):
        taught = [f"teacher.run={tmp_path / 'big'}", f"teacher.also=[{tmp_path / 'x'}]"]
        pretrain(config_for(shards, tmp_path / "a", *LITTLE, *taught, "objective.targets=centre"))
    for bad, words in (({"also": [tmp_path]}, "name the first"),
                       ({"run": tmp_path, "also": [tmp_path]}, "same teacher twice")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            TeacherConfig(**bad)
    mean = (0.5, 0.5, 0.5)
    for objective, words in (
        (ObjectiveConfig(head=HEAD, ibot=0), "has 32 prototypes and objective.head 12"),
        (ObjectiveConfig(head=HeadConfig(prototypes=32)), "no objective.patch_head to learn from"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_frozen_teacher(tmp_path / "big", objective, mean, mean, sdpa_attention)
