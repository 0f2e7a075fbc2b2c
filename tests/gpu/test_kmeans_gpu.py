"""k-means on a GPU: the labels of the CPU, to the row."""

import numpy as np
import pytest
import torch

from eosin.data_curation.kmeans import nearest
from eosin.data_curation.kmeans_fit import FitSettings, fit
from eosin.launch.process import World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
]


def test_labels_and_centroids_are_those_of_the_cpu_from_the_same_start() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20_000, 128)).astype(np.float16)
    starts = []
    on_cpu = fit(
        rows, 100, FitSettings(), world=World(), device=torch.device("cpu"), save=starts.append
    )
    begin = starts[0]
    moved = type(begin)(begin.centroids.cuda())
    on_gpu = fit(rows, 100, FitSettings(), world=World(), device=torch.device("cuda"), begin=moved)
    assert torch.equal(on_gpu.labels.cpu(), on_cpu.labels)
    assert np.array_equal(on_gpu.centroids, on_cpu.centroids)


def test_near_ties_are_decided_exactly() -> None:
    rng = np.random.default_rng(1)
    values = torch.from_numpy(rng.integers(-2, 3, (600, 8)).astype(np.float32) * 2**-10 + 512)
    rows, centroids = values[:500], values[500:]
    expected = nearest(rows, centroids)[0]
    assert torch.equal(nearest(rows.cuda(), centroids.cuda())[0].cpu(), expected)
