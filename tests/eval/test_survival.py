"""Survival: figures against scikit-survival, a hazard that is known, labels that say nothing."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eosin.configs.errors import InputError
from eosin.eval.concordance import concordance, pairs_of, uno_weights
from eosin.eval.results import load_results
from eosin.eval.survival import SurvivalConfig, evaluate_survival, load_cohort
from eosin.eval.survival_curves import kaplan_meier
from eosin.launch.cli import main
from tests.eval.test_bags import DIM, Bag, hurry, write_store

Floats = npt.NDArray[np.float64]


def drawn(n: int, seed: int, ties: bool) -> tuple[Floats, npt.NDArray[np.bool_], Floats]:
    generator = np.random.default_rng(seed)
    times = generator.exponential(5, n)
    risks = np.round(generator.normal(size=n), 1)
    return np.ceil(times) if ties else times, generator.random(n) < 0.6, risks


def as_records(events: npt.NDArray[np.bool_], times: Floats) -> npt.NDArray[np.void]:
    pairs = list(zip(events, times, strict=True))
    return np.array(pairs, dtype=[("event", "?"), ("time", "f8")])


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_both_figures_are_those_of_scikit_survival(seed: int, ties: bool) -> None:
    metrics = pytest.importorskip("sksurv.metrics")
    times, events, risks = drawn(90, seed, ties)
    fold, ones = np.zeros(90, np.int64), np.ones((1, 90))
    expected = metrics.concordance_index_censored(events, times, risks)[0]
    assert concordance(pairs_of(times, events, risks, fold), ones)[0] == pytest.approx(
        expected, abs=1e-6
    )
    back = concordance(pairs_of(times, events, -risks, fold), ones)[0]
    assert back == pytest.approx(1 - expected, abs=1e-6)
    train_times, train_events, _ = drawn(200, seed + 50, ties)
    known = times < train_times[~train_events].max()
    t, e, r = times[known], events[known], risks[known]
    pairs = pairs_of(t, e, r, fold[known], uno_weights(t, train_times, train_events))
    expected = metrics.concordance_index_ipcw(
        as_records(train_events, train_times), as_records(e, t), r
    )[0]
    assert concordance(pairs, ones[:, known])[0] == pytest.approx(expected, abs=1e-6)


def test_pairs_are_taken_within_folds_and_weights_are_copies() -> None:
    times, events, risks = drawn(60, 7, True)
    fold = np.arange(60) % 3
    shifted = risks + 100 * fold  # folds have no common scale
    whole = concordance(pairs_of(times, events, risks, fold), np.ones((1, 60)))
    np.testing.assert_allclose(
        concordance(pairs_of(times, events, shifted, fold), np.ones((1, 60))), whole
    )
    weights = np.random.default_rng(0).integers(0, 3, (4, 60)).astype(float)
    found = concordance(pairs_of(times, events, risks, fold), weights)
    for row, value in zip(weights.astype(int), found, strict=True):
        points = counts = 0.0
        for i in range(60):
            for j in range(60):
                later = times[i] < times[j] or (times[i] == times[j] and not events[j])
                if fold[i] == fold[j] and events[i] and later:
                    counts += row[i] * row[j]
                    apart = risks[i] - risks[j]
                    points += row[i] * row[j] * (0.5 if abs(apart) < 1e-8 else float(apart > 0))
        assert value == pytest.approx(points / counts)


def test_curves_are_kaplan_and_meiers() -> None:
    nonparametric = pytest.importorskip("sksurv.nonparametric")
    times, events, _ = drawn(80, 3, True)
    at, share = kaplan_meier(times, events)
    expected_at, expected = nonparametric.kaplan_meier_estimator(events, times)
    np.testing.assert_allclose(share, expected[np.isin(expected_at, at)], atol=1e-12)


def patients(folder: Path, n: int, seed: int, shuffled: bool = False) -> tuple[Path, Path]:
    """Two slides a patient, whose hazard grows with the share of tiles along one direction."""
    generator = np.random.default_rng(seed)
    needle = np.random.default_rng(99).normal(size=DIM)
    bags, rows = [], []
    for patient in range(n):
        share = generator.random()
        time = generator.exponential(np.exp(-7 * (share - 0.5)) * 10)
        lost = generator.exponential(25)
        for slide in range(2):
            features = generator.normal(size=(24, DIM))
            features[: round(24 * share)] += 1.5 * needle
            cells = np.stack(np.unravel_index(np.arange(24), (6, 4)), axis=1)
            name = f"s{patient}_{slide}"
            bags.append(
                Bag(slide_id=name, tile_ids=[f"{name}_{t}" for t in range(24)],
                    features=features.astype(np.float16), cells=cells)
            )  # fmt: skip
            rows.append([name, f"{min(time, lost):.3f}", str(int(time <= lost)), f"p{patient}"])
    if shuffled:
        order = generator.permutation(n)
        known = [row[1:3] for row in rows[::2]]
        for number, row in enumerate(rows):
            row[1:3] = known[order[number // 2]]
    write_store(folder / "store", bags)
    table = folder / "patients.csv"
    table.write_text("\n".join(["slide,time,event,group", *(",".join(r) for r in rows)]) + "\n")
    return folder / "store", table


@pytest.mark.parametrize("loss", ["cox", pytest.param("hazard", marks=pytest.mark.slow)])
def test_a_known_hazard_is_found(
    loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch, epochs=15 if loss == "cox" else 50, patience=10)
    store, table = patients(tmp_path, 90, 0)
    config = SurvivalConfig(
        features=[store], table=table, out=tmp_path / "out", device="cpu", folds=3, inner_folds=2,
        loss=loss, n_bootstrap=300,
    )  # fmt: skip
    evaluate_survival(config)
    results = load_results(config.out / "results.json")
    assert set(results.protocols) == {"mean@1", "abmil/gated@2"}
    score = results.score("store", "abmil/gated@2", "c_index")
    print(f"{loss}: C {score.value:.3f} [{score.low:.3f}, {score.high:.3f}]")
    assert score.value >= 0.75 and score.low > 0.5
    rows = pq.read_table(config.out / "predictions.parquet").to_pylist()
    own = [row for row in rows if row["head"] == "abmil/gated@2"]
    assert len(own) == 90 and len({row["group"] for row in own}) == 90
    # the figure of the file is the figure of the results, by the library
    metrics = pytest.importorskip("sksurv.metrics")
    points = counts = 0.0
    for fold in range(3):
        part = [row for row in own if row["fold"] == fold]
        found = metrics.concordance_index_censored(
            *(np.array([row[name] for row in part]) for name in ("event", "time", "risk"))
        )
        points += found[1] + 0.5 * found[3]
        counts += found[1] + found[2] + found[3]
    assert score.value == pytest.approx(points / counts, abs=1e-6)
    with Image.open(config.out / "curves.png") as picture:
        assert picture.size[0] > 500


@pytest.mark.slow
def test_times_that_say_nothing_give_a_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch, epochs=12, patience=6)
    store, table = patients(tmp_path, 90, 1, shuffled=True)
    config = SurvivalConfig(
        features=[store], table=table, out=tmp_path / "out", device="cpu", folds=3, inner_folds=2
    )
    evaluate_survival(config)
    for score in load_results(config.out / "results.json").scores:
        assert score.low <= 0.5 <= score.high, score


def test_what_is_no_cohort_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "patients.csv"
    for text, words in (
        ("slide,time,event\na,1,1\n", "no column 'group'"),
        ("slide,time,event,group\na,x,1,p\n", "'time' holds something that is no number"),
        ("slide,time,event,group\na,-1,1,p\n", "time must be at least 0"),
        ("slide,time,event,group\na,1,2,p\n", "event 0 or 1"),
        ("slide,time,event,group\na,1,1,p\nb,2,1,p\n", "group 'p' has more than one time"),
        ("slide,time,event,group\na,1,1,p\na,1,1,p\n", "more than once"),
        ("slide,time,event,group\na,1,0,p\nb,2,0,q\n", "no event came"),
    ):
        table.write_text(text)
        with pytest.raises(InputError, match=words):
            load_cohort(table)
    command = ["eval", "survival", "features=[x]", f"table={table}", "out=y"]
    assert main([*command, "heads=[clam/sb@1]"]) == 2
    assert "learns from classes alone" in capsys.readouterr().err


def test_too_few_events_for_the_intervals_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, table = patients(tmp_path, 24, 0)
    command = ["eval", "survival", f"features=[{store}]", f"table={table}", "device=cpu",
               f"out={tmp_path / 'out'}", "loss=hazard", "n_intervals=40", "folds=2",
               "inner_folds=2"]  # fmt: skip
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "too few for 40 intervals: give n_intervals= or folds= lower" in said
