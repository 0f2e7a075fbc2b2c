"""Robustness against croma, the reference implementation, and on origins that were put in."""

import warnings

import numpy as np
import pandas as pd
import pytest

from eosin.configs.errors import InputError
from eosin.eval.confounding import KS, confounding

croma = pytest.importorskip("croma")


def made_up(
    biology: float, origin: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    generator = np.random.default_rng(seed)
    n = 240
    slides = generator.integers(0, 24, n)
    origins = slides % 3
    labels = generator.integers(0, 2, n)
    features = generator.normal(size=(n, 12))
    features += biology * generator.normal(size=(2, 12))[labels]
    features += origin * generator.normal(size=(3, 12))[origins]
    return (
        features.astype(np.float32),
        labels,
        [f"centre{o}" for o in origins],
        [f"slide{s}" for s in slides],
    )


@pytest.mark.parametrize(("biology", "origin"), [(1.0, 0.3), (0.3, 1.0), (0.6, 0.6)])
def test_every_figure_is_cromas(biology: float, origin: float) -> None:
    features, labels, origins, groups = made_up(biology, origin)
    manifest = pd.DataFrame(
        {
            "sample_id": [str(i) for i in range(len(labels))],
            "image_path": [f"{i}.png" for i in range(len(labels))],
            "label": [f"class{c}" for c in labels],
            "group_id": groups,
            "centre": origins,
        }
    )
    for k in (5, 0):
        ours = confounding(features, labels, origins, groups, k=k)
        given = {"confounder_column": "centre", "k_candidates": [k] if k else list(KS)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ri = croma.RI.compute(features.astype(np.float64), manifest, **given)
            mari = croma.MaRI.compute(features.astype(np.float64), manifest, **given)
            margin = croma.CRoMa.compute(
                features.astype(np.float64), manifest, confounder_column="centre"
            )
        assert ours.k == ri.k
        assert ours.ri == pytest.approx(ri.value, abs=1e-6)
        assert ours.support == pytest.approx(ri.support, abs=1e-6)
        assert ours.tau == pytest.approx(mari.tau, abs=1e-5)
        assert ours.mari == pytest.approx(mari.value, abs=1e-5)
        assert ours.croma == pytest.approx(margin.value, abs=1e-5)
        assert ours.croma_tail == pytest.approx(margin.ltm_alpha, abs=2e-3)
        assert ours.croma_support == 1
        assert ours.low < ours.ri < ours.high


def test_an_encoder_of_tissue_is_robust_and_one_of_origin_is_not() -> None:
    tissue = confounding(*made_up(2.0, 0.0))
    scanner = confounding(*made_up(0.0, 2.0))
    assert tissue.ri > 0.9 and tissue.croma is not None and tissue.croma > 0.1
    assert scanner.ri < 0.3 and scanner.croma is not None and scanner.croma < -0.1
    assert tissue.accuracy > 0.95 and scanner.accuracy < 0.65


def test_tiles_of_the_own_group_are_never_neighbours() -> None:
    features, labels, origins, groups = made_up(1.0, 0.3)
    # a copy of each tile in its own group, under the other class: it would be the first neighbour
    doubled = confounding(
        np.concatenate([features, features]), np.concatenate([labels, labels]),
        origins * 2, groups * 2, k=10,
    )  # fmt: skip
    single = confounding(features, labels, origins, groups, k=5)
    assert doubled.ri == pytest.approx(single.ri, abs=0.01)


def test_one_origin_is_refused_and_few_neighbours_are_said() -> None:
    features, labels, _, groups = made_up(1.0, 0.3)
    with pytest.raises(InputError, match="two origins and two groups; there are 1 and 24"):
        confounding(features, labels, ["here"] * len(labels), groups)
    # two classes that lie in two centres: no neighbour is of either kind
    apart = confounding(features, labels, [f"c{c}" for c in labels], groups, k=5)
    assert apart.support == 0 and apart.ri == 0.5 and apart.croma is None
