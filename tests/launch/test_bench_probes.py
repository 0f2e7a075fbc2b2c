"""`eosin bench probes`: baselines that do the same work, and rows that are written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from eosin.eval import fewshot, knn
from eosin.eval.heads.survival import cox_loss
from eosin.launch.bench_cox import double_loop, patients
from eosin.launch.bench_probes import (
    BenchProbesConfig,
    fewshot_sides,
    made_up,
    naive_episode,
)
from eosin.launch.cli import main

SMALL = BenchProbesConfig(
    tiles=1500, queries=200, dim=24, classes=4, groups=20, repeats=1, loop_rounds=3
)


def test_a_naive_episode_predicts_what_ours_does() -> None:
    tiles = made_up(SMALL)
    known = tiles.labelled
    members = [np.flatnonzero(known.labels == c) for c in range(4)]
    supports = fewshot.draw_supports(members, 16, 0)[:3]
    ours = fewshot.episodes(known, tiles.queries, 4, 16, 0)
    for episode, support in enumerate(supports):
        theirs = naive_episode(
            torch.from_numpy(known.features[support]), torch.from_numpy(tiles.queries), tiles.labels
        )
        assert (theirs != ours[episode]).mean() < 0.01  # a tie may fall otherwise


def test_both_sides_of_few_shot_give_seconds() -> None:
    ours, baseline = fewshot_sides(made_up(SMALL))
    assert ours() > 0 and baseline() > 0


@pytest.mark.parametrize("classes", [2, 4])
def test_the_command_prints_and_writes_rows(
    classes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "probes.json"
    overrides = ["tiles=1500", "queries=200", "dim=24", f"classes={classes}", "groups=20"]
    overrides += ["repeats=1", "loop_rounds=3", "suite=['knn/*']"]
    assert main(["bench", "probes", *overrides, "--json", str(file)]) == 0
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    assert {name.split()[0] for name in rows} == {"sweep", "fewshot", "knn", "bootstrap", "cox"}
    worst = rows["sweep objective, the worst of 45"]
    assert worst["ours"] < 1 + 1e-4 and worst["baseline"] == 1
    suite = json.loads((tmp_path / "probes.suite.json").read_text())
    assert set(suite) == set(knn.FAMILY.protocols)
    assert "all 3 protocols" in capsys.readouterr().out


def test_coxs_baseline_is_the_same_loss() -> None:
    risks, targets = patients(64)
    torch.testing.assert_close(double_loop(risks, targets), cox_loss(risks, targets))


def test_bad_settings_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "probes", "classes=1"]) == 2
    assert "classes=1" in capsys.readouterr().err
    assert main(["bench", "probes", "suite=[nonsense]"]) == 2
    assert "no protocol 'nonsense'" in capsys.readouterr().err
