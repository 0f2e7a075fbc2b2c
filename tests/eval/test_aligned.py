"""Aligned tiles: cosine and top-k against a loop, copies, and the verb."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eosin.eval.aligned import KS, compare_pairs, sum_up
from eosin.launch.cli import main

Writer = Callable[..., Path]
CPU = torch.device("cpu")


def made_up(scanner: float, stain: float) -> tuple[np.ndarray, list[str], list[tuple[str, str]]]:
    """12 places on 2 scanners and 2 stainings, each of which moves features so far."""
    generator = np.random.default_rng(0)
    content = generator.normal(size=(12, 8))
    moves = {name: generator.normal(size=8) for name in ("s0", "s1", "HE", "HRH")}
    features, places, slides = [], [], []
    for s in ("s0", "s1"):
        for c in ("HE", "HRH"):
            for place in generator.permutation(12):
                noise = 0.3 * generator.normal(size=8)
                features.append(content[place] + scanner * moves[s] + stain * moves[c] + noise)
                places.append(f"p{place:02d}")
                slides.append((s, c))
    return np.array(features, np.float32), places, slides


def test_pairs_are_those_of_a_loop() -> None:
    features, places, slides = made_up(0.5, 1.0)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    pairs = list(compare_pairs(features, places, slides, CPU))
    assert len(pairs) == 6
    assert [p.kind for p in pairs] == ["staining", "scanner", "both", "both", "scanner", "staining"]
    for pair in pairs:
        rows = [i for i, s in enumerate(slides) if " ".join(s) in (pair.first, pair.second)]
        cosines, hits = [], dict.fromkeys(KS, 0)
        for i in rows:
            match = next(j for j in rows if j != i and places[j] == places[i])
            others = [j for j in rows if j != i]
            ranked = sorted(others, key=lambda j: -float(unit[i] @ unit[j]))
            cosines.append(float(unit[i] @ unit[match]))
            for k in KS:
                hits[k] += ranked.index(match) < k
        assert pair.cosine == pytest.approx(np.mean(cosines), abs=1e-5)
        assert pair.top == pytest.approx({k: h / len(rows) for k, h in hits.items()})


def test_an_encoder_that_ignores_the_scanner_finds_every_place_across_it() -> None:
    blind = sum_up(list(compare_pairs(*made_up(0.0, 3.0), CPU)))
    assert isinstance(blind["scanner"], dict) and isinstance(blind["staining"], dict)
    assert blind["scanner"]["top_1"][1] > 0.8 > blind["staining"]["top_1"][1]
    medians = [
        blind["cosine"][1],
        *(blind[k]["top_10"][1] for k in ("scanner", "staining", "both")),
    ]  # type: ignore[index]
    assert blind["mean"] == pytest.approx(np.mean(medians))


def test_copies_of_one_tile_do_not_count_as_found() -> None:
    features = np.ones((8, 3), np.float32)
    places, slides = [f"p{i}" for i in range(4)] * 2, [("a", "x")] * 4 + [("b", "x")] * 4
    (pair,) = compare_pairs(features, places, slides, CPU)
    assert pair.cosine == pytest.approx(1) and pair.top[1] <= 0.25


@pytest.fixture
def table(tmp_path: Path) -> Path:
    generator = np.random.default_rng(1)
    lines = ["path,place,scanner,staining"]
    for place in range(6):
        tile = generator.integers(60, 200, (32, 32, 3))
        for scanner, gain in (("left", 1.0), ("right", 0.9)):
            for staining, shift in (("HE", 0), ("HRH", 25)):
                pixels = np.clip(tile * gain + [shift, 0, 0], 0, 255).astype(np.uint8)
                name = f"{scanner}_{staining}_{place}.png"
                Image.fromarray(pixels).save(tmp_path / name)
                lines.append(f"{name},{place + 1},{scanner},{staining}")
    (tmp_path / "plism.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "plism.csv"


def test_the_verb_compares_all_pairs_of_every_row(
    table: Path, tmp_path: Path, write_encoder_folder: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, out = write_encoder_folder(tmp_path / "tiny"), tmp_path / "out"
    arguments = ["eval", "aligned", f"encoder={encoder}", f"tiles={table}", f"out={out}"]
    assert main([*arguments, "device=cpu"]) == 0
    found = json.loads((out / "aligned.json").read_text())["encoders"]
    assert set(found) == {"tiny-cls", "tiny-random-cls", "mean-colour", "colour-histogram"}
    rows = list(csv.DictReader(io.StringIO((out / "pairs.csv").read_text())))
    assert len(rows) == 4 * 6
    for figures in found.values():
        assert figures["scanner"]["pairs"] == 2 and figures["both"]["pairs"] == 2
        assert 0 <= figures["mean"] <= 1
    assert "medians over pairs" in " ".join(capsys.readouterr().out.split())


def test_a_place_that_is_missing_is_named(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = table.read_text()
    arguments = ["eval", "aligned", "encoder=x", f"tiles={table}", f"out={tmp_path / 'out'}"]
    table.write_text("\n".join(text.splitlines()[:-1]) + "\n")
    assert main(arguments) == 2
    assert "slide right HRH has place '6' 0 times" in capsys.readouterr().err
    table.write_text(text.replace("right", "left").replace("left_", "right_", 0))
    assert main(arguments) == 2
    assert "more than once" in capsys.readouterr().err
