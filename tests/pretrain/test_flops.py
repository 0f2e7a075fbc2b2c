"""Counted operations against torch's own counter, and against the published figures."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eosin.pretrain.attention import sdpa_attention
from eosin.pretrain.distill import Distiller, StepRates
from eosin.pretrain.drop_path import DropPath
from eosin.pretrain.flops import StepShape, backbone_flops, executed_flops, nominal_flops
from eosin.pretrain.gram import GramConfig
from eosin.pretrain.heads import HeadConfig
from eosin.pretrain.jepa import JepaConfig
from eosin.pretrain.network import ObjectiveConfig
from eosin.pretrain.plain_step import PlainDistiller
from eosin.pretrain.prototype_kernels import PlainKernels
from eosin.pretrain.spread import SpreadConfig
from eosin.pretrain.vit import VitConfig

SHAPE = {"width": 24, "depth": 3, "heads": 2, "patch_px": 8, "image_px": 32}
HEAD = HeadConfig(prototypes=40, hidden=20, bottleneck=12)
BATCH, GROUP, MASKED = 8, 4, 3

CASES = {
    "gelu, shared head": ({}, {}),
    "swiglu, own patch head": (
        {"ffn": "swiglu"},
        {"patch_head": HeadConfig(prototypes=16, hidden=8, bottleneck=4)},
    ),
    "cls alone, spread over groups": (
        {"registers": 0},
        {"ibot": 0.0, "spread": SpreadConfig(over="group")},
    ),
}


def configs(case: str, drop_path: float = 0.0) -> tuple[VitConfig, ObjectiveConfig]:
    model, objective = CASES[case]
    return (
        VitConfig(**SHAPE, drop_path=drop_path, **model),
        ObjectiveConfig(head=HEAD, **objective),
    )


def shape(**changes: int) -> StepShape:
    return StepShape(
        batch=BATCH, global_px=32, local_px=16, n_local=2, masked=2 * BATCH * MASKED,
        group_size=GROUP, **changes,
    )  # fmt: skip


def counted(model: torch.nn.Module, *arguments: object, side: int = 32) -> int:
    """What torch counts in one forward and backward; attention as products of matrices."""
    crops = torch.randn(2, BATCH, 3, side, side), torch.randn(2, BATCH, 3, 16, 16)
    masks = np.zeros((2 * BATCH, (side // 8) ** 2), dtype=bool)
    masks[:, :MASKED] = True  # as many in each crop, so that shares of crops are shares of rows
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(*crops, masks, *arguments)
        losses = out[0] if isinstance(out[0], tuple) else out
        losses.total.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("case", CASES)
def test_nominal_is_what_torch_counts_in_the_plain_step(case: str) -> None:
    model, objective = configs(case)
    plain = PlainDistiller(model, objective, group_size=GROUP)
    assert counted(plain, 0.05) == nominal_flops(model, objective, shape()).hardware


@pytest.mark.parametrize("chunk", [24, 2**24], ids=["streamed", "held"])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_executed_is_what_torch_counts_in_the_products_step(
    case: str, drop_path: float, chunk: int
) -> None:
    model, objective = configs(case, drop_path)
    kernels = PlainKernels(torch.float32, chunk)
    ours = Distiller(model, objective, sdpa_attention, kernels, GROUP, seed=0)
    drop = DropPath(drop_path, 0, 0, GROUP) if drop_path else None
    flops = executed_flops(model, objective, shape(held_logits=kernels.dense_elements))
    assert (flops.recomputed == 0) == (chunk > 1000)
    got = counted(ours, StepRates(0.05), drop)
    # where logits are held, half of Sinkhorn's products with a vector look like matrices to torch
    assert got == pytest.approx(flops.hardware, rel=5e-4 if chunk > 1000 else 1e-9)


def test_a_step_that_leaves_nothing_out_saves_only_rows_of_the_last_block() -> None:
    model, objective = configs("gelu, shared head")
    lean, full = executed_flops(model, objective, shape()), nominal_flops(model, objective, shape())
    assert lean.heads == full.heads and lean.prototypes == full.prototypes
    assert lean.student.total < full.student.total and lean.model < full.model
    half = executed_flops(configs("gelu, shared head", 0.5)[0], objective, shape())
    embed = backbone_flops(model, [(2 * BATCH, 32), (2 * BATCH, 16)], kept=0.0).total
    assert half.student.total - embed == (lean.student.total - embed) / 2
    assert half.teacher == lean.teacher


# GFLOP of one tile through student and teacher, as derived from the published runs
PUBLISHED = {
    "dinov3 ViT-L/16": (1024, 24, 16, 16, "gelu", 0, 96, 425, 246),
    "dinov2 ViT-L/14": (1024, 24, 16, 14, "gelu", 0, 98, 568, 324),
    "OpenMidnight ViT-g/14": (1536, 40, 24, 14, "swiglu", 4, 98, 2200, 1216),
    "nanopath ViT-S/14": (384, 12, 6, 14, "gelu", 0, 98, 43, 25),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_backbones_cost_what_is_published(name: str) -> None:
    width, depth, heads, patch_px, ffn, registers, local_px, student, teacher = PUBLISHED[name]
    model = VitConfig(
        width=width, depth=depth, heads=heads, patch_px=patch_px, ffn=ffn, registers=registers
    )
    groups = [(2, 224), (8, local_px)]
    got = [backbone_flops(model, g).forward / 1e9 for g in (groups, groups[:1])]
    assert got == pytest.approx([student, teacher], rel=0.02, abs=1)


def test_dinov2_large_executes_what_is_published_less_the_last_blocks_rows() -> None:
    model = VitConfig(width=1024, depth=24, heads=16, patch_px=14, registers=0, drop_path=0.4)
    head = HeadConfig(prototypes=131072)
    objective = ObjectiveConfig(head=head, patch_head=head)
    batch = 30  # so that 0.6 of it is a whole number
    masked = round(2 * batch * 0.5 * 0.3 * 256)
    flops = executed_flops(
        model, objective, StepShape(batch=batch, global_px=224, local_px=98, masked=masked)
    )
    per_tile = flops.model / batch / 1e9
    assert 0.94 * 1374 < per_tile < 1374


SMALL_JEPA = JepaConfig(weight=1.0, depth=2, width=16, heads=2)
ANCHORED = {  # 16 patches a crop of width 24: fewer rows than channels, but more in a batch
    "gram of images": {"gram": GramConfig(weight=1.0)},
    "gram of the batch, from channels": {"gram": GramConfig(weight=1.0, level="batch")},
    "gram without negatives, of unmasked": {
        "gram": GramConfig(weight=1.0, level="batch", remove_negative=True, tokens="unmasked")
    },
    "jepa": {"ibot": 0.0, "jepa": SMALL_JEPA},
    "jepa without cls beside ibot and gram": {
        "jepa": replace(SMALL_JEPA, use_cls=False),
        "gram": GramConfig(weight=1.0),
    },
}


@pytest.mark.parametrize("gram", [True, False], ids=["gram on", "gram off"])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("case", ANCHORED)
def test_gram_and_jepa_are_what_torch_counts(case: str, drop_path: float, gram: bool) -> None:
    model = VitConfig(**SHAPE, drop_path=drop_path)
    objective = ObjectiveConfig(head=HEAD, **ANCHORED[case])
    ours = Distiller(model, objective, sdpa_attention, PlainKernels(torch.float32, 24), GROUP, 0)
    drop = DropPath(drop_path, 0, 0, GROUP) if drop_path else None
    flops = executed_flops(model, objective, shape(gram=gram))
    got = counted(ours, StepRates(0.05, gram=gram), drop)
    assert got == pytest.approx(flops.hardware, rel=1e-9)
    assert (flops.gram.total > 0) == (gram and objective.gram.weight > 0)
    assert (flops.predictor.total > 0) == (objective.jepa.weight > 0)


def test_gram_at_high_resolution_takes_the_way_over_channels() -> None:
    model = VitConfig(**{**SHAPE, "image_px": 64})  # 64 patches of width 24
    objective = ObjectiveConfig(head=HEAD, gram=GramConfig(weight=1.0), spread=SpreadConfig())
    ours = Distiller(model, objective, sdpa_attention, PlainKernels(torch.float32, 24), GROUP, 0)
    wide = replace(shape(), global_px=64)
    got = counted(ours, StepRates(0.05, gram=True), None, side=64)
    assert got == pytest.approx(executed_flops(model, objective, wide).hardware, rel=1e-9)
