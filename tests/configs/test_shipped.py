"""Every shipped config builds, at its published size, and takes real steps at a reduced one."""

from pathlib import Path

import pytest
import torch

from eosin.configs.load import load_config
from eosin.pretrain.attention import sdpa_attention
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.diagnostics import measure_health
from eosin.pretrain.distill import Distiller
from eosin.pretrain.loader import Batch
from eosin.pretrain.train import Rates, forward
from eosin.pretrain.vit import Vit

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path.stem for path in (CONFIGS / "pretrain").glob("*.yaml"))
NEEDED = ["shards=s", "out=o"]
# timm's counts for vit_*_patch14_dinov2 without position embeddings and CLS position, in millions
SIZES = {"tiny": 5.46, "small": 21.6, "base": 85.7, "large": 303.2, "giant": 1134.8}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_the_published_number_of_parameters(size: str) -> None:
    config = load_config(PretrainConfig, ["pretrain/small", f"size/{size}"], NEEDED)
    with torch.device("meta"):
        vit = Vit(config.model)
    count = sum(p.numel() for n, p in vit.named_parameters() if n != "pos_embed") / 1e6
    assert count == pytest.approx(SIZES[size], rel=0.01)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_takes_a_step_that_lowers_its_loss_at_reduced_width(recipe: str) -> None:
    reduced = [
        "batch_size=4", "group_size=2", "augment.n_local=2", "model.width=32", "model.depth=2",
        "model.heads=2", "model.layer_scale=1.0", "objective.head.prototypes=64",
        "objective.head.hidden=32", "objective.head.bottleneck=16",
    ]  # fmt: skip
    config = load_config(PretrainConfig, [f"pretrain/{recipe}"], [*NEEDED, *reduced])
    model = Distiller(config.model, config.objective, sdpa_attention, config.seed)
    generator = torch.Generator().manual_seed(0)

    def crops(views: int, side: int) -> torch.Tensor:
        coarse = torch.rand(views * 4, 3, 2, 2, generator=generator)  # each tile its own colours
        smooth = torch.nn.functional.interpolate(coarse, size=side, mode="bilinear")
        return (smooth * 255).to(torch.uint8).unflatten(0, (views, 4))

    views = config.augment
    batch = Batch(
        0, crops(2, views.global_px), crops(2, views.local_px), torch.arange(4), damaged={}
    )
    rates = Rates.at(config, config.steps // 2)
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=1e-5)
    totals = []
    for _ in range(2):
        losses, outputs = forward(config, model, batch, rates, torch.device("cpu"), torch.float32)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        totals.append(float(losses.total.detach()))
    assert all(torch.isfinite(torch.tensor(totals))) and totals[1] < totals[0]
    assert measure_health(outputs).teacher_entropy > 0


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_opens_with_what_it_is_and_how_to_use_it(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert "--config" in path.read_text()
