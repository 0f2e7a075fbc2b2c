"""Every shipped config builds at its published size, and takes real steps at a reduced one."""

import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from eosin.configs.load import load_config, to_yaml
from eosin.data_curation.torchvision_import import import_timm
from eosin.pretrain.batch import Batch, Crops, Inputs
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.gradients import forward
from eosin.pretrain.masking import draw_masks
from eosin.pretrain.network import Network
from eosin.pretrain.optim import build_optimizer, clip_gradients, set_rates, step_unless_bad
from eosin.pretrain.rates import Rates
from eosin.pretrain.setup import set_up
from eosin.pretrain.views import draw_views
from eosin.pretrain.vit import Vit, VitConfig

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path.stem for path in (CONFIGS / "pretrain").glob("*.yaml"))
SIZES = sorted(path.stem for path in (CONFIGS / "size").glob("*.yaml"))
OWN_SIZE = ("demo", "smoke")  # recipes that say their network's size themselves
NEEDED = ["shards=s", "out=o"]
CPU = torch.device("cpu")


@functools.cache
def shipped(recipe: str, size: str | None = None, *overrides: str) -> PretrainConfig:
    files = [f"pretrain/{recipe}", *([] if size is None else [f"size/{size}"])]
    return load_config(PretrainConfig, files, [*NEEDED, *overrides])


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def timm_count(name: str, **changes: Any) -> int:
    timm = import_timm()
    with torch.device("meta"):
        return count(timm.create_model(name, num_classes=0, **changes))


REGISTERS: dict[str, Any] = {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5}
# Virchow2's encoder as its authors' config for timm gives it; the packed SwiGLU is set below
VIRCHOW2 = {**REGISTERS, "mlp_ratio": 5.3375}
TIMM = {  # size: an architecture of timm's with 4 registers, and changes to it
    "tiny": ("vit_tiny_patch16_224", {**REGISTERS, "patch_size": 14}),
    "small": ("vit_small_patch14_reg4_dinov2", {}),
    "base": ("vit_base_patch14_reg4_dinov2", {}),
    "large": ("vit_large_patch14_reg4_dinov2", {}),
    "huge": ("vit_huge_patch14_224", VIRCHOW2),
    "giant": ("vit_giant_patch14_reg4_dinov2", {}),
}


@pytest.mark.parametrize("size", SIZES)
def test_a_size_has_the_parameters_of_timms_model_and_a_mask_token(size: str) -> None:
    config = shipped("eosin", size).model
    with torch.device("meta"):
        ours = count(Vit(config))
    name, changes = TIMM[size]
    if size == "huge":
        changes = {**changes, "mlp_layer": import_timm().layers.SwiGLUPacked}
    assert ours == timm_count(name, img_size=224, **changes) + config.width
    comment = (CONFIGS / "size" / f"{size}.yaml").read_text()
    stated = re.search(r"about ([\d.]+) M parameters", comment)
    assert stated and float(stated[1]) == pytest.approx(ours / 1e6, rel=0.005)


@pytest.mark.parametrize(
    ("stage", "recipe"),
    [("continue", "eosin"), ("high_resolution", "eosin"), ("gram", "dinov3")],
)
def test_a_stage_goes_behind_a_recipe_and_a_size(stage: str, recipe: str) -> None:
    files = [f"pretrain/{recipe}", "size/base", f"stage/{stage}"]
    start = "start.weights=w" if stage == "continue" else "start.run=r"
    config = load_config(PretrainConfig, files, [*NEEDED, start])
    before = shipped(recipe, "base")
    assert config.model.width == before.model.width and config.start.given
    assert config.steps < before.steps
    last = [Rates.at(config, config.steps - 1), Rates.at(before, before.steps // 2)]
    assert last[0].lr <= last[1].lr and last[0].momentum >= last[1].momentum
    assert f"stage/{stage}" in (CONFIGS / "stage" / f"{stage}.yaml").read_text()


def test_every_stage_is_tried() -> None:
    assert {p.stem for p in (CONFIGS / "stage").glob("*.yaml")} == {
        "continue", "heads", "high_resolution", "gram"
    }  # fmt: skip


def test_heads_are_learnt_while_the_backbone_stands_still() -> None:
    files = ["pretrain/eosin", "size/base", "stage/heads"]
    config = load_config(PretrainConfig, files, [*NEEDED, "start.weights=w"])
    rates = [Rates.at(config, step) for step in (0, config.steps // 2, config.steps - 1)]
    assert all(config.start.backbone_rate(step) == 0 for step in (0, config.steps - 1))
    assert rates[1].lr > rates[2].lr > 0 and not any(rate.freeze_last for rate in rates)


def test_dinov3s_swiglu_has_its_hidden_size_in_the_network_of_seven_billion() -> None:
    words = (CONFIGS / "pretrain" / "dinov3.yaml").read_text()
    assert "model.mlp_ratio=3\n#   model.swiglu_multiple=64" in words
    config = VitConfig(
        width=4096, depth=40, heads=32, patch_px=16, image_px=256, ffn="swiglu", mlp_ratio=3,
        swiglu_multiple=64, positions="rope",
    )  # fmt: skip
    with torch.device("meta"):
        ours = count(Vit(config))
    biases = 40 * 3 * 4096  # of queries, keys and values: the 7B has none
    assert ours - biases == timm_count("vit_7b_patch16_dinov3") + config.width


class Published(NamedTuple):
    """What a recipe's source says of its networks and of its run."""

    size: str
    encoder: tuple[int, int]  # millions of parameters, and the decimals to which they are given
    heads: dict[str, tuple[int, int, int, bool]]  # K, hidden, bottleneck, weight-normed
    batch: int  # of the whole run
    lr: float  # largest
    warmup: int  # steps
    frozen: int  # steps with fixed prototypes
    temperature: int  # steps of the teacher temperature's warm-up


SHARED = {"head": (65536, 2048, 256, True)}
LARGE = {"head": (131072, 2048, 384, True), "patch_head": (131072, 2048, 256, True)}
DINOV3 = {"head": (262144, 8192, 512, False), "patch_head": (98304, 4096, 384, False)}
NANOPATH = {"head": (131072, 2048, 384, True)}
PUBLISHED = {
    "dinov2": Published("large", (300, -2), SHARED, 2048, 4e-3 * 2**0.5, 12_500, 1250, 37_500),
    "uni": Published("large", (303, 0), SHARED, 3072, 4e-3 * 3**0.5, 12_500, 1250, 37_500),
    "dinov3": Published("large", (300, -2), DINOV3, 4096, 5e-5 * 4 * 2, 100_000, 5000, 100_000),
    "virchow2": Published("huge", (631, 0), LARGE, 4096, 2e-4 * 2, 100_000, 1250, 37_500),
    "midnight": Published("giant", (1100, -2), LARGE, 768, 3.031e-4, 100_000, 1250, 37_500),
    "nanopath": Published("small", (22, 0), NANOPATH, 128, 1e-4, 711, 71, 2130),
}  # fmt: skip


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipes_networks_have_the_published_number_of_parameters(recipe: str) -> None:
    source = PUBLISHED[recipe]
    config = shipped(recipe, source.size)
    with torch.device("meta"):
        network = Network(config.model, config.objective)
    millions, decimals = source.encoder
    assert round(count(network.backbone) / 1e6, decimals) == millions
    width = config.model.width
    found = {name: count(module) for name, module in network.named_children()}
    heads = {
        name: (width + 1) * h + (h + 1) * h + (h + 1) * b + k * (b + normed)
        for name, (k, h, b, normed) in source.heads.items()
    }
    if recipe == "nanopath":  # four blocks as wide as the encoder, a norm, a map in and one out
        blocks = 4 * (12 * width**2 + 13 * width)
        heads["predictor"] = blocks + 2 * width + 2 * (width + 1) * width + width
    assert {n: c for n, c in found.items() if n != "backbone"} == heads


def test_dinov3_has_the_parameters_of_timms_model_with_rotary_positions() -> None:
    config = shipped("dinov3", "large").model
    with torch.device("meta"):
        ours = count(Vit(config))
    key_biases = config.depth * config.width  # timm holds them as zeros that are no parameters
    timm = timm_count("vit_large_patch16_dinov3_qkvb")
    assert ours == timm + key_biases + config.width


@pytest.mark.pitfall(15)
@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipes_rates_are_the_sources_at_the_sources_batch(recipe: str) -> None:
    source = PUBLISHED[recipe]
    config = shipped(recipe, source.size, f"batch_size={source.batch}")
    slack = max(round(0.03 * source.warmup), 1)
    before, peak = (Rates.at(config, source.warmup + by).lr for by in (-slack, slack))
    assert max(Rates.at(config, s).lr for s in range(0, config.steps, 71)) <= source.lr * 1.0001
    assert before < source.lr * 0.999 and peak == pytest.approx(source.lr, rel=1e-3)
    frozen = [Rates.at(config, s).freeze_last for s in range(2 * source.frozen)]
    assert sum(frozen) == pytest.approx(source.frozen, rel=0.03)
    warm = source.temperature
    halfway = Rates.at(config, warm // 2).temperature
    assert halfway == pytest.approx(0.055, abs=0.001)
    assert Rates.at(config, round(1.03 * warm)).temperature == 0.07 > halfway


def test_uni_is_dinov2_but_for_its_batch() -> None:
    dinov2, uni = shipped("dinov2", "large"), shipped("uni", "large")
    assert (uni.batch_size, uni.group_size) == (3072 // 32, 3072 // 32)
    assert replace(uni, batch_size=64, group_size=64) == dinov2


@pytest.mark.pitfall(1, 8)
@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipes_crops_and_masks_are_drawn_as_in_its_source(recipe: str) -> None:
    config = shipped(recipe, PUBLISHED[recipe].size)
    positions = np.arange(400)
    views = draw_views(config.augment, 0, 0 * positions, positions, np.full((400, 2), 392))
    blurred = (views.blur_sigma_px[:, :3] > 0).mean(axis=0)
    own_blur = (0.35, 0.35, 0.35) if recipe == "nanopath" else (0.0, 0.9, 0.5)
    np.testing.assert_allclose(blurred, own_blur, atol=0.08)
    solarized = views.solarize[:, 1].mean()
    assert solarized == pytest.approx(0.2 if recipe in ("dinov2", "uni") else 0.0, abs=0.06)
    turned = views.quarter_turns[:, 0].any()
    assert turned == (recipe in ("virchow2", "nanopath"))
    zooms = np.sqrt(views.width_px * views.height_px) / config.augment.sizes_px
    assert (zooms.min() > 0.89 and zooms.max() < 1.11) == (recipe == "virchow2")

    grid = config.model.grid
    batch = [
        draw_masks(
            config.masks, seed=0, step=step, groups=range(2), group_size=config.group, views=2,
            grid=(grid, grid),
        ).sum(1)
        for step in range(4)
    ]  # fmt: skip
    masked_crops = {int((patches > 0).sum()) for patches in batch}
    if recipe == "nanopath":  # four blocks of 5 x 5 in every crop, which may overlap
        assert masked_crops == {4 * config.group}
        assert all(patches.min() >= 25 and patches.max() <= 100 for patches in batch)
    else:  # half of the crops, up to half of their patches
        assert masked_crops == {2 * config.group}
        assert max(patches.max() for patches in batch) <= grid**2 // 2
    assert (len({int(patches.sum()) for patches in batch}) == 1) == (recipe == "dinov3")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_goes_with_every_size_and_prints_as_it_reads(recipe: str, tmp_path: Path) -> None:
    configs = [shipped(recipe, size) for size in (SIZES if recipe not in OWN_SIZE else [None])]
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(configs[0]))
    assert load_config(PretrainConfig, [path]) == configs[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_head_comment_says_what_can_be_typed(recipe: str) -> None:
    lines = (CONFIGS / "pretrain" / f"{recipe}.yaml").read_text().splitlines()
    comment = [line[1:] for line in lines if line.startswith("#")]
    command = next(line for line in comment if line.strip().startswith("Command:"))
    files = re.findall(r"--config (\S+?)(?=[\s)]|$)", command)
    assert files[0] == f"pretrain/{recipe}"
    assert any(line.strip().startswith("Hardware:") for line in comment)
    words = [word.strip("'();,:.") for line in comment for word in line.split()]
    overrides = [w for w in words if re.match(r"[a-z_.]+=\S", w)]
    overrides = [w for w in overrides if not w.startswith(("shards=", "out="))]
    default = load_config(PretrainConfig, files, NEEDED)
    for override in overrides:  # each does something, and all go together
        assert load_config(PretrainConfig, files, [*NEEDED, override]) != default
    load_config(PretrainConfig, files, [*NEEDED, *overrides])
    if recipe in PUBLISHED:
        assert files[1] == f"size/{PUBLISHED[recipe].size}"
        assert len(overrides) >= (recipe in ("dinov3", "virchow2", "midnight"))


REDUCED = [
    "batch_size=4", "group_size=2", "augment.n_local=2", "model.width=32", "model.depth=2",
    "model.heads=2", "model.layer_scale=1.0", "objective.head.prototypes=64",
    "objective.head.hidden=32", "objective.head.bottleneck=16", "objective.jepa.width=32",
    "objective.jepa.heads=2", "optim.lr_reference_batch=0", "optim.lr.peak=1e-4",
]  # fmt: skip
REDUCED_PATCH_HEAD = [f"objective.patch_head.{x}" for x in ("prototypes=48", "hidden=32")]
GRAM = ["objective.gram.weight=2.0", "objective.gram.start=0"]


@pytest.mark.parametrize(
    ("recipe", "extra"), [*[(r, []) for r in RECIPES], ("dinov3", GRAM)], ids=str
)
def test_a_recipe_takes_two_steps_that_lower_its_loss_at_reduced_width(
    recipe: str, extra: list[str]
) -> None:
    reduced = [*REDUCED, *extra]
    if shipped(recipe).objective.patch_head is not None:
        reduced += [*REDUCED_PATCH_HEAD, "objective.patch_head.bottleneck=8"]
    config = shipped(recipe, None, *reduced)
    model = set_up(config, CPU, torch.float32).model
    optimizer = build_optimizer(model.student, config.model.depth, config.optim)
    batch, inputs = one_batch(config), Inputs(CPU, config.mean, config.std)
    rates = Rates.at(config, config.steps // 2)
    set_rates(optimizer, rates.lr, rates.weight_decay, freeze_last=rates.freeze_last)
    if extra:  # its teacher is not the student, so there is something to learn from it
        with torch.no_grad():
            for p in model.gram_teacher.parameters():
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    parts = list(model.student.children())
    for _ in range(2):
        losses, outputs = forward(config, model, batch, rates, inputs, torch.float32)
        optimizer.zero_grad()
        losses.total.backward()
        clip_gradients(parts, config.optim.clip_norm, config.optim.clip)
        step_unless_bad(optimizer, torch.zeros(()))
        with torch.no_grad():  # the same crops, masks and teacher
            after, _ = forward(config, model, batch, rates, inputs, torch.float32)
        assert torch.isfinite(torch.stack(losses)).all()
        assert after.total < losses.total
        model.update_teacher(outputs, rates.momentum)
    for name, p in model.named_parameters():
        fixed = name.endswith(".bias") or name.startswith("gram_teacher") or p.numel() == 0
        assert fixed or not torch.equal(p, start[name]), name
    terms = {name for name, value in losses._asdict().items() if value != 0}
    patches = "jepa" if recipe == "nanopath" else "ibot"
    anchored = {"gram"} if extra else set()
    assert terms == {"total", "dino_global", "dino_local", patches, "spread"} | anchored
    found = model.record_use(0, outputs)
    assert found is not None and (found.entropy > 0).all()
    assert model.health(0, outputs, found, 1, 1).read().values()


def one_batch(config: PretrainConfig) -> Batch:
    """Four tiles, each of its own colours."""
    generator = torch.Generator().manual_seed(0)

    def crops(views: int, side: int) -> torch.Tensor:
        coarse = torch.rand(views * 4, 3, 2, 2, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=side, mode="bilinear")
        return (smooth * 255).to(torch.uint8).unflatten(0, (views, 4)).permute(0, 1, 3, 4, 2)

    views = config.augment
    images = Crops(crops(2, views.global_px), crops(2, views.local_px))
    return Batch(0, images, config.batch_plan.masks_of(0), torch.arange(4), damaged={})


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_opens_with_what_it_is_and_how_to_use_it(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert "--config" in path.read_text()
