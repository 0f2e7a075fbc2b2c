"""The HTML report."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from eosin.configs.errors import InputError
from eosin.eval.report import Picture, Section, write_report
from eosin.eval.results import (
    Difference,
    EncoderRecord,
    Results,
    Score,
    TaskRecord,
    load_results,
    save_results,
)

PROTOCOLS = {
    "linear/sklearn-l2@1": "logistic regression",
    "knn/uni20@1": "20 nearest neighbours",
}
HOSTILE = "<script>alert('x')</script> & \"quoted\""


def made_results(test_groups: int = 20, gain: float = 0.2) -> Results:
    """Scores that are all different numbers; `gain` is the lower end of every difference."""
    encoders = [
        EncoderRecord(name=n, label=n.upper(), kind=kind, pooling="cls", dim=384, digest=n * 8)
        for n, kind in (("net", "encoder"), ("twin", "random"), ("mean", "floor"))
    ]
    draw = np.random.default_rng(0)
    scores, differences = [], []
    for protocol in PROTOCOLS:
        for metric in ("balanced_accuracy", "accuracy", "macro_f1"):
            for encoder in encoders:
                low, value, high = np.sort(draw.uniform(0.1, 0.9, 3)).tolist()
                chosen = {"C": 0.0316} if protocol.startswith("linear") else {}
                scores.append(
                    Score(
                        encoder=encoder.name,
                        protocol=protocol,
                        metric=metric,
                        value=value,
                        low=low,
                        high=high,
                        chosen=chosen,
                    )
                )
            for baseline in ("twin", "mean"):
                value, high = np.sort(draw.uniform(0.3, 0.6, 2)).tolist()
                differences.append(
                    Difference(
                        encoder="net",
                        baseline=baseline,
                        protocol=protocol,
                        metric=metric,
                        value=value,
                        low=gain,
                        high=high,
                    )
                )
    task = TaskRecord(
        name="made",
        classes=["fat", HOSTILE],
        tiles={"train": 1234, "val": 56, "test": 789},
        groups={"train": 41, "val": 9, "test": test_groups},
        digest="7a5k",
    )
    return Results(
        task=task,
        encoders=encoders,
        scores=scores,
        differences=differences,
        bootstrap_draws=1000,
        seed=17,
        protocols=PROTOCOLS,
    )


def made_predictions() -> pa.Table:
    label = [0, 0, 1, 1]
    return pa.table(
        {
            "encoder": ["net"] * 4 + ["twin"] * 4,
            "protocol": ["knn/uni20@1"] * 8,
            "label": label * 2,
            "prediction": [0, 1, 1, 1, 1, 1, 0, 0],
        }
    )


def picture(folder: Path, name: str = "tiles.png") -> Picture:
    Image.new("RGB", (40, 20), "purple").save(folder / name)
    return Picture(path=folder / name, caption=f"a picture called {HOSTILE}")


class Page(HTMLParser):
    """Words, tags and addresses of a page; fails on tags that do not nest."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words, self.tags, self.addresses = "", [], []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []
        self.words = " ".join(self.words.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += data + " "


def write(folder: Path, results: Results, **options: object) -> Page:
    write_report(folder / "report.html", results, made_predictions(), **options)  # type: ignore[arg-type]
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_every_number_of_the_results_is_in_the_report(tmp_path: Path) -> None:
    results = made_results()
    words = write(tmp_path, results).words
    for score in results.scores:
        assert f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]" in words
    for d in results.differences:
        assert f"{d.value:+.3f} yes [{d.low:+.3f}, {d.high:+.3f}]" in words
    for fact in ("1,234", "56", "789", "41", "9", "20", "1,000", "Seed 17", "7a5k", "C = 0.0316"):
        assert fact in words
    for encoder in results.encoders:
        assert {encoder.label, encoder.digest, encoder.pooling} <= set(words.split())
    for name, meaning in PROTOCOLS.items():
        assert name in words and meaning in words


def test_the_verdict_says_in_words_what_the_knn_scores_come_to(tmp_path: Path) -> None:
    results = made_results()
    score = results.score("net", "knn/uni20@1")
    words = write(tmp_path, results).words
    assert (
        f"On 789 test tiles of 20 groups in 2 classes, NET reaches {score.value:.3f} "
        f"[{score.low:.3f}, {score.high:.3f}] kNN balanced accuracy; chance is 0.500." in words
    )
    twin = results.score("twin", "knn/uni20@1").value
    assert f"better by more than the interval than TWIN ({twin:.3f})? yes" in words
    words = write(tmp_path, made_results(gain=-0.01)).words
    assert f"better by more than the interval than TWIN ({twin:.3f})? no" in words
    assert "yes [" not in words


def test_without_knn_and_twin_the_verdict_rests_on_what_there_is(tmp_path: Path) -> None:
    results = made_results()
    linear = [s for s in results.scores if s.protocol.startswith("linear")]
    words = write(tmp_path, replace(results, scores=linear, differences=[])).words
    assert "linear probe balanced accuracy; chance is" in words
    assert (
        "gained by training" not in words and "better by more than the interval than" not in words
    )


def test_the_best_of_each_column_and_only_it_is_bold(tmp_path: Path) -> None:
    write(tmp_path, made_results())
    html = (tmp_path / "report.html").read_text()
    results = made_results()
    best = [
        max(results.score(e.name, protocol).value for e in results.encoders)
        for protocol in PROTOCOLS
    ]
    table = html[html.index('<table class="scores"') :]
    assert re.findall(r"<td><b>([\d.]+)</b>", " ".join(table.split()).replace("> <", "><")) == [
        f"{value:.3f}" for value in best
    ]


def test_few_test_groups_are_warned_about(tmp_path: Path) -> None:
    assert "covers somewhat less than it says" not in write(tmp_path, made_results(20)).words
    assert "The test split has 11 groups." in write(tmp_path, made_results(11)).words


def test_the_report_needs_nothing_but_itself(tmp_path: Path) -> None:
    section = Section(title="Tiles", text="Some.", pictures=(picture(tmp_path),))
    page = write(tmp_path, made_results(), sections=[section])
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert page.tags.count("img") == 4  # scores, two confusion matrices, the section's
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    html = (tmp_path / "report.html").read_text()
    assert "http:" not in html and "https:" not in html and "url(" not in html
    assert str(tmp_path) not in html


def test_hostile_names_stay_words(tmp_path: Path) -> None:
    results = made_results()
    encoders = [replace(e, label=f"{e.label} {HOSTILE}") for e in results.encoders]
    section = Section(title=HOSTILE, text=HOSTILE, pictures=(picture(tmp_path),))
    page = write(
        tmp_path,
        replace(results, encoders=encoders, protocols={HOSTILE: HOSTILE}),
        sections=[section],
        title=HOSTILE,
        command=HOSTILE,
    )
    assert "script" not in page.tags
    assert page.words.count("<script>alert('x')</script>") >= 12


def test_sections_stand_in_the_order_given_with_paragraphs(tmp_path: Path) -> None:
    sections = [
        Section(title="Slides", text="First\nparagraph.\n\nSecond one."),
        Section(title="Curves", text=""),
    ]
    page = write(tmp_path, made_results(), sections=sections)
    assert "Slides First paragraph. Second one. Curves" in page.words
    assert page.words.rindex("Curves") < page.words.rindex("Provenance")
    html = (tmp_path / "report.html").read_text()
    assert "<p>First paragraph.</p><p>Second one.</p>" in html


def test_the_same_results_give_the_same_bytes_wherever_they_are_written(tmp_path: Path) -> None:
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        section = Section(title="Tiles", text="Some.", pictures=(picture(folder),))
        write(folder, made_results(), sections=[section])
    one, two = (sorted((tmp_path / name).rglob("*.*")) for name in ("one", "two"))
    assert [p.name for p in one] == [p.name for p in two]
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_without_predictions_there_is_no_confusion_matrix(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", made_results(), None)
    page = Page((tmp_path / "report.html").read_text())
    assert page.tags.count("img") == 1
    assert "Confusion" not in page.words


def test_a_missing_score_leaves_a_dash(tmp_path: Path) -> None:
    results = made_results()
    kept = [s for s in results.scores if (s.encoder, s.protocol) != ("mean", "linear/sklearn-l2@1")]
    assert "MEAN 384 features –" in write(tmp_path, replace(results, scores=kept)).words


def test_pictures_keep_their_bytes_and_dense_ones_their_size_on_the_page(tmp_path: Path) -> None:
    Image.new("RGB", (400, 200), "purple").save(tmp_path / "dense.png", dpi=(192, 192))
    Image.new("RGB", (400, 200), "purple").save(tmp_path / "scan.jpg", dpi=(25400, 25400))
    pictures = tuple(
        Picture(path=tmp_path / name, caption=name) for name in ("dense.png", "scan.jpg")
    )
    write(tmp_path, made_results(), sections=[Section(title="T", text="", pictures=pictures)])
    html = (tmp_path / "report.html").read_text()
    assert 'width="200" height="100" alt="dense.png"' in html
    assert 'width="400" height="200" alt="scan.jpg"' in html
    assert "data:image/jpeg;base64," in html


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "tiles.png").write_text("not a picture")
    broken = Picture(path=tmp_path / "tiles.png", caption="")
    with pytest.raises(InputError, match=r"tiles\.png is no PNG or JPEG"):
        write(tmp_path, made_results(), sections=[Section(title="T", text="", pictures=(broken,))])
    assert not (tmp_path / "report.html").exists()


def test_results_with_their_protocols_survive_the_file(tmp_path: Path) -> None:
    save_results(made_results(), tmp_path / "results.json")
    assert load_results(tmp_path / "results.json") == made_results()
