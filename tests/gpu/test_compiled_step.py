"""On a GPU: student and teacher with compiled blocks and heads, against the eager ones."""

import numpy as np
import pytest
import torch
from torch import Tensor

from eosin.pretrain.attention import sdpa_attention
from eosin.pretrain.distill import Distiller, StepRates
from eosin.pretrain.drop_path import DropPath
from eosin.pretrain.heads import HeadConfig
from eosin.pretrain.network import ObjectiveConfig
from eosin.pretrain.prototype_kernels import PlainKernels
from eosin.pretrain.vit import VitConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
]

DEVICE = torch.device("cuda")
BATCH, PATCHES = 4, 16


def make() -> Distiller:
    """Two heads; fp32, so that the two differ by rounding alone."""
    model = VitConfig(width=64, depth=2, heads=2, patch_px=8, image_px=32, layer_scale=0.5)
    objective = ObjectiveConfig(
        head=HeadConfig(prototypes=96, hidden=32, bottleneck=16),
        patch_head=HeadConfig(prototypes=64, hidden=48, bottleneck=8),
    )
    kernels = PlainKernels(torch.float32)
    return Distiller(model, objective, sdpa_attention, kernels, group_size=2, seed=0).to(DEVICE)


def one_step(distiller: Distiller, step: int) -> dict[str, Tensor]:
    """Losses and gradients of a step; how many patches are masked changes with it."""
    generator = torch.Generator().manual_seed(step)
    crops, local = (
        torch.randn(n, BATCH, 3, px, px, generator=generator).to(DEVICE)
        for n, px in ((2, 32), (3, 16))
    )
    masks = np.random.default_rng(step).random((2 * BATCH, PATCHES)) < 0.05 * (step + 2)
    distiller.zero_grad()
    drop = DropPath(0.5, seed=0, step=step, group_size=2)
    losses, outputs = distiller(crops, local, masks, StepRates(0.07), drop)
    losses.total.backward()
    distiller.update_teacher(outputs, 0.9)
    gradients = {k: p.grad for k, p in distiller.student.named_parameters() if p.grad is not None}
    return losses._asdict() | gradients | {"features": outputs.features}


# torch's tracer reads .grad of activations, and hides the warning only where warnings are shown
@pytest.mark.pitfall(24)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # fp32 is meant here
def test_a_compiled_step_is_the_eager_one_and_compiles_no_more_after_three() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = make(), make()
    compiled.compile()
    graphs = 0
    for step in range(6):
        expected, found = one_step(eager, step), one_step(compiled, step)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            scale = max(float(value.detach().abs().max()), 1e-3) if value.numel() else 1.0
            difference = (found[name] - value).detach().abs()
            assert value.numel() == 0 or float(difference.max()) <= 1e-3 * scale, (step, name)
        counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert step < 3 or counted == graphs, f"step {step} compiled again"
        graphs = counted
    assert graphs >= 4 and not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()
