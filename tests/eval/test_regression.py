"""Ridge against scikit-learn, its metrics against scipy, the verb on tiles of known numbers."""

import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import pearsonr
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler

from eosin.eval import ridge
from eosin.eval.results import load_results
from eosin.eval.ridge import correlations, mean_correlation, mean_r2, moments, predict
from eosin.launch.cli import main

Writer = Callable[..., Path]


def made_up() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(260, 30)) * np.arange(1, 31)
    targets = features @ generator.normal(size=(30, 4)) / 20 + generator.normal(size=(260, 4)) + 5
    return features[:200], targets[:200], np.arange(200) % 4 == 0, features[200:]


def test_hests_ridge_is_that_of_its_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "COMPONENTS", 12)
    features, targets, is_val, asked = made_up()
    found, chosen = predict(ridge.HEST, features, targets, is_val, asked)
    scaler = StandardScaler().fit(features)
    pca = PCA(12, svd_solver="full").fit(scaler.transform(features))
    model = Ridge(alpha=100 / (12 * 4), fit_intercept=False, solver="lsqr", tol=1e-10)
    model.fit(pca.transform(scaler.transform(features)), targets)
    np.testing.assert_allclose(
        found, model.predict(pca.transform(scaler.transform(asked))), rtol=1e-4, atol=1e-4
    )
    assert chosen == {"components": 12.0}


def test_the_full_ridge_chooses_alpha_on_val_and_refits() -> None:
    features, targets, is_val, asked = made_up()
    found, chosen = predict(ridge.FULL, features, targets, is_val, asked)

    def fit(rows: np.ndarray, alpha: float, queries: np.ndarray) -> np.ndarray:
        scaler = StandardScaler().fit(features[rows])
        model = Ridge(alpha=alpha).fit(scaler.transform(features[rows]), targets[rows])
        return np.asarray(model.predict(scaler.transform(queries)))

    scores = []
    for alpha in ridge.ALPHAS:
        predictions = fit(~is_val, alpha, features[is_val])
        scores.append(
            np.mean([pearsonr(targets[is_val][:, t], predictions[:, t])[0] for t in range(4)])
        )
    best = ridge.ALPHAS[int(np.argmax(scores))]
    assert chosen == {"alpha": best}
    everything = np.ones(200, np.bool_)
    np.testing.assert_allclose(found, fit(everything, best, asked), rtol=1e-6)


def test_correlation_and_r2_are_scipys_and_scikit_learns_also_with_weights() -> None:
    generator = np.random.default_rng(1)
    y, p = generator.normal(size=(2, 90, 3))
    p += y
    groups = generator.integers(0, 6, 90)
    sums = moments(y, p, groups, 6)
    for weights in (np.ones(6), np.array([0, 1, 2, 0, 3, 1.0])):
        rows = np.repeat(np.arange(90), weights[groups].astype(int))
        drawn = np.tensordot(weights, sums, 1)
        each = [pearsonr(y[rows, t], p[rows, t])[0] for t in range(3)]
        np.testing.assert_allclose(correlations(drawn), each, rtol=1e-9)
        assert float(mean_correlation(drawn)) == pytest.approx(np.mean(each))
        expected = r2_score(y[rows], p[rows], multioutput="uniform_average")
        assert float(mean_r2(drawn)) == pytest.approx(expected)
    constant = moments(np.ones((9, 1)), np.arange(9.0)[:, None], np.zeros(9, np.int64), 1)
    assert float(mean_correlation(constant)[0]) == 0


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Tiles whose numbers are how red they are and how coarse their stripes; one is noise."""
    generator = np.random.default_rng(2)
    lines = ["path,redness,gene_a,gene_b,group,split"]
    for patient in range(20):
        for i in range(5):
            red, coarse = generator.uniform(0, 60), int(generator.integers(1, 5))
            stripes = 40 * (np.arange(32) // coarse % 2)[:, None, None]
            pixels = 100 + stripes + generator.normal(0, 5, (32, 32, 3)) + [red, 0, 0]
            name = f"{patient}_{i}.png"
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(tmp_path / name)
            split = ["train", "test", "train", "val"][patient % 4]
            noise = generator.normal()
            lines.append(f"{name},{red:.3f},{coarse},{noise:.3f},p{patient},{split}")
    (tmp_path / "genes.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "genes.csv"


def test_the_verb_scores_encoder_and_floors_on_every_target(
    table: Path, tmp_path: Path, write_encoder_folder: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, out = write_encoder_folder(tmp_path / "tiny"), tmp_path / "out"
    arguments = ["eval", "regression", f"encoder={encoder}", f"tiles={table}", f"out={out}"]
    assert main([*arguments, "targets=[redness,gene_*]", "device=cpu"]) == 0
    results = load_results(out / "results.json")
    assert results.task.classes == ["redness", "gene_a", "gene_b"]
    rows = list(csv.DictReader(io.StringIO((out / "targets.csv").read_text())))
    found = {(r["encoder"], r["protocol"], r["target"]): float(r["pearson"]) for r in rows}
    assert found["mean colour", ridge.FULL, "redness"] > 0.9
    assert abs(found["mean colour", ridge.FULL, "gene_a"]) < 0.6
    for score in results.scores:
        assert score.low <= score.value <= score.high
    mean = np.mean([found["mean colour", ridge.FULL, t] for t in results.task.classes])
    assert results.score("mean-colour", ridge.FULL, "pearson").value == pytest.approx(mean)
    assert len(results.differences) == 3 * 2 * 2
    assert "mean correlation over 3 targets" in " ".join(capsys.readouterr().out.split())
    first = (out / "results.json").read_bytes()
    assert main([*arguments, "targets=[redness,gene_*]", "device=cpu"]) == 0
    assert (out / "results.json").read_bytes() == first


@pytest.mark.parametrize(
    ("change", "targets", "message"),
    [
        (("", ""), "gene_z", "has no column 'gene_z'; it has path, redness"),
        ((",p0,", ",p1,"), "gene_a", "a group must not cross a split"),
        (("0_0.png,", "0_0.png,x"), "redness", "column 'redness' holds something that is no"),
        (("0_0.png,", "0_0.png,nan"), "redness", "no number"),
    ],
)
def test_bad_tables_are_one_line(
    table: Path, tmp_path: Path, change: tuple[str, str], targets: str, message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    table.write_text(table.read_text().replace(*change))
    arguments = ["eval", "regression", "encoder=builtin:mean-colour", f"tiles={table}"]
    assert main([*arguments, f"targets=[{targets}]", f"out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
