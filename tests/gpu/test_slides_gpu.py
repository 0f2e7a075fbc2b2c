"""On a GPU: a step of slide self-distillation is that of the CPU, and trains in bf16."""

import pytest
import torch

from eosin.launch.bench_slides import BenchSlidesConfig, sides

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
]

SMALL = {"width": 64, "depth": 2, "heads": 4, "prototypes": 128, "dim": 32, "batch_size": 4}


def test_a_step_is_that_of_the_cpu() -> None:
    config = BenchSlidesConfig(**SMALL)  # type: ignore[arg-type]
    found = []
    for device in ("cpu", "cuda"):
        ours, padded = sides(config, torch.device(device), torch.float32)
        found += [ours.step().item(), padded.step().item()]
    assert found == pytest.approx([found[0]] * 4, rel=1e-4)


def test_16_bits_stay_close() -> None:
    config = BenchSlidesConfig(**SMALL)  # type: ignore[arg-type]
    losses = [
        sides(config, torch.device("cuda"), dtype)[0].step().item()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
