"""Choosing protocols, running all of them, few labels, and what is saved of it."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from eosin.data_curation.embed import FileTile
from eosin.data_curation.manifest import PREDICTIONS, write_table
from eosin.eval import few_labels, linear_eva
from eosin.eval.predictions import outcome_from, predictions_table, read_predictions
from eosin.eval.probe import Labelled, Outcome
from eosin.eval.protocols import DESCRIPTIONS, USUAL, choose, run_protocols
from eosin.eval.tasks import Task


def made_up(n: int = 300) -> tuple[Labelled, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, n)
    features = generator.normal(size=(n, 6)) + 2 * np.eye(6)[labels]
    features = features.astype(np.float32)
    cut = 2 * n // 3
    known = Labelled(features=features[:cut], labels=labels[:cut], is_val=np.arange(cut) % 4 == 0)
    return known, features[cut:], labels[cut:]


def task_of(labels: np.ndarray) -> Task:
    n = len(labels)
    return Task(
        name="t",
        classes=["a", "b", "c"],
        tile_ids=[f"{i}.png" for i in range(n)],
        images=[FileTile(Path(f"{i}.png")) for i in range(n)],
        labels=labels,
        groups=[f"g{i % 5}" for i in range(n)],
        splits=np.full(n, "test"),
        data_digest="d",
        digest="d",
        notes=(),
        origins=None,
    )


def test_names_patterns_and_usual_stand_for_protocols_in_their_order() -> None:
    assert choose(["usual"]) == USUAL
    assert choose(["*"]) == list(DESCRIPTIONS)
    assert choose(["knn/*", "linear/uni-torch@1"]) == [
        "linear/uni-torch@1", "knn/uni20@1", "knn/dino@1", "knn/thunder@1"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no protocol 'knn/uni21@1'; there are linear/"):
        choose(["usual", "knn/uni21@1"])
    with pytest.raises(ValueError, match="no protocol is named"):
        choose([])


def test_all_protocols_do_well_on_easy_tiles_and_all_that_they_say_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_eva, "RATE", 1e-2)
    monkeypatch.setattr(linear_eva, "STEPS", 300)
    known, test_features, labels = made_up()
    ran = {name: o for name, o, _ in run_protocols(choose(["*"]), known, test_features, 3, 0)}
    left_out = {f"fewshot/simpleshot-{s}@1" for s in (64, 128, 256)}  # some 67 tiles a class
    assert set(DESCRIPTIONS) - set(ran) <= left_out
    for name, outcome in ran.items():
        np.testing.assert_allclose(outcome.votes.sum(axis=1), 1)
        # UNI's rule for C, with its plain norm, leaves no weights for six features
        least = {"linear/uni-torch@1": 0.3, "fewshot/simpleshot-1@1": 0.6, "ratio/linear-1@1": 0.6}
        assert (outcome.predictions == labels).mean() > least.get(name, 0.8), name
        if outcome.probabilities:
            assert outcome.scores is not None
            np.testing.assert_allclose(outcome.scores.sum(axis=1), 1, atol=1e-5)
    table = predictions_table(task_of(labels), {"e": ran})
    path = tmp_path / "predictions.parquet"
    write_table(table, path, PREDICTIONS)
    assert pq.read_table(path).num_rows == len(ran) * len(labels)
    read = read_predictions(path)
    for name, outcome in ran.items():
        again = outcome_from(read, 3, "e", name)
        np.testing.assert_allclose(again.votes, outcome.votes, atol=1e-7)
        if outcome.scores is None:
            assert again.scores is None
        else:
            np.testing.assert_array_equal(again.scores, outcome.scores)
        assert again.probabilities == outcome.probabilities
        own = np.arange(len(labels)), labels
        for metric, values in outcome.values.items():
            np.testing.assert_array_equal(again.values[metric][own], values[own])


def test_a_share_of_labels_is_nested_in_the_larger_and_has_every_class() -> None:
    known, _, _ = made_up()
    draws = [set(few_labels.draw_share(known, p, 0, 1).tolist()) for p in few_labels.SHARES]
    for small, large in itertools.pairwise(draws):
        assert small < large
    assert draws[-1] == set(range(len(known.labels)))
    rows = few_labels.draw_share(known, 10, 0, 1)
    for is_val in (False, True):
        counts = np.bincount(known.labels[rows][known.is_val[rows] == is_val], minlength=3)
        whole = np.bincount(known.labels[known.is_val == is_val], minlength=3)
        np.testing.assert_array_equal(counts, np.maximum(1, np.round(whole / 10)))
    assert set(few_labels.draw_share(known, 10, 0, 2).tolist()) != set(rows.tolist())


def test_no_protocol_is_given_test_labels_so_votes_cannot_depend_on_them() -> None:
    """The signature says it; this says that nothing is cached between calls either."""
    known, test_features, _ = made_up()
    names = choose(["linear/sklearn*", "knn/*", "fewshot/simpleshot@1", "ratio/*"])
    first = {n: o for n, o, _ in run_protocols(names, known, test_features, 3, 0)}
    other = Labelled(features=known.features, labels=(known.labels + 1) % 3, is_val=known.is_val)
    list(run_protocols(names, other, test_features, 3, 0))
    again: dict[str, Outcome] = {
        n: o for n, o, _ in run_protocols(names, known, test_features, 3, 0)
    }
    for name in first:
        np.testing.assert_array_equal(first[name].votes, again[name].votes)
        assert first[name].chosen == again[name].chosen
