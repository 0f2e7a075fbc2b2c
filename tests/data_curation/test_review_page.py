"""The pathologist's page: what it shows is what is there, and what is said on it is obeyed."""

import base64
import csv
import json
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import simplejpeg
from browser import open_page

from eosin.configs.errors import ConfigError, InputError
from eosin.configs.load import load_config
from eosin.data_curation.cluster_sheets import choose
from eosin.data_curation.manifest import SELECTION, read_table
from eosin.data_curation.review_page import ReviewPageConfig, review_page
from eosin.data_curation.slide import Slide
from eosin.data_curation.synthetic import SyntheticConfig, write_slide
from eosin.launch.cli import main

HOSTILE = '</script><img src="http://example.org/x">'


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three synthetic slides, curated in eight clusters of two levels; an organ has a bad name."""
    folder = tmp_path_factory.mktemp("set")
    config = SyntheticConfig(n_slides=3, size_px=1024, artefact_share=0, seed=2)
    paths = [write_slide(folder / "slides", index, config) for index in range(3)]
    with (folder / "slides.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "organ"])
        writer.writerows(zip(paths, ["colon", "colon", HOSTILE], strict=True))
    words = [
        f"slides={folder / 'slides.csv'}",
        f"out={folder}",
        "embed.encoder=builtin:stain-texture",
    ]
    words += ["tile.mpp=0.5", "tile.size_px=128", "cluster.levels=[8,3]", "tile.workers=1"]
    words += ["sample.tree=[level_1]", "sample.total=60", "shard.workers=1"]
    assert main(["curate", *words]) == 0
    return folder


def page_of(curated: Path, out: Path, **keys: Any) -> str:
    given = {"tiles": curated, "clusters": curated / "clusters", "out": out} | keys
    review_page(load_config(ReviewPageConfig, [], [f"{k}={v}" for k, v in given.items()]))
    return out.read_text("utf-8")


class Elements(HTMLParser):
    """Every element's name and attributes, and the texts of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_nearest_median_and_farthest_are_each_shown_once() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 4, 7, 9, 10, 40):
        distance = rng.random(n).astype(np.float32)
        near, middle, far = choose(distance, 3)
        order = np.argsort(distance).tolist()
        assert near == order[:3]
        assert len({*near, *middle, *far}) == len([*near, *middle, *far]) == min(n, 9)
        if n >= 6:
            assert far == order[-3:]
        if n == 40:
            assert abs(np.mean([order.index(place) for place in middle]) - 19.5) <= 1


def test_the_page_shows_the_tiles_their_places_and_their_counts(
    curated: Path, tmp_path: Path
) -> None:
    page = page_of(curated, tmp_path / "review.html", selection=curated / "selection.parquet")
    elements = Elements(page)
    clusters = pq.read_table(curated / "clusters" / "clusters.parquet")
    sizes = Counter(clusters["level_1"].to_pylist())
    shown = [int(str(card["data-number"])) for card in elements.of("article")]
    assert shown == sorted(sizes, key=lambda number: (-sizes[number], number))
    # The first tile of the first sheet is the nearest of the largest cluster.
    largest = clusters.filter(pc.equal(clusters["level_1"], shown[0])).sort_by("distance")
    titles = [str(cell["title"]) for cell in elements.of("b") if "title" in cell]
    assert titles[0].startswith(largest["tile_id"][0].as_py())
    tiles = pq.read_table(curated / "tiles.parquet").to_pylist()
    slides = {row["slide_id"]: row for row in pq.read_table(curated / "slides.parquet").to_pylist()}
    tile = next(row for row in tiles if row["tile_id"] == largest["tile_id"][0].as_py())
    slide = slides[tile["slide_id"]]
    with Slide(Path(slide["path"])) as opened:
        pixels = opened.read_tile(tile["level0_x"], tile["level0_y"], 128, 0.5)
    images = [str(image["src"]) for image in elements.of("img")]
    assert all(image.startswith("data:image/jpeg;base64,") for image in images)
    sheet = simplejpeg.decode_jpeg(base64.b64decode(images[0].partition(",")[2]))
    assert cv2.PSNR(np.ascontiguousarray(sheet[:128, :128]), pixels) > 30
    # Marks on the slides: one a tile of the cluster, where the tile lies.
    marks = page.split("<article")[1].split("<svg")[1].split("</svg>")[0]
    rects = [attributes for attributes in Elements(marks).of("rect")]
    name, count = Counter(largest["slide_id"].to_pylist()).most_common(1)[0]
    assert len(rects) == count
    inside = {row["tile_id"]: row for row in tiles}
    first = inside[
        next(
            r["tile_id"]
            for r in clusters.to_pylist()
            if r["level_1"] == shown[0] and r["slide_id"] == name
        )
    ]
    scale = 150 / slides[name]["width_px"]
    assert float(str(rects[0]["x"])) == pytest.approx(first["level0_x"] * scale, abs=0.6)
    assert float(str(rects[0]["y"])) == pytest.approx(first["level0_y"] * scale, abs=0.6)
    assert float(str(rects[0]["width"])) == pytest.approx(128 * scale, abs=0.1)
    # Balance before and after, as in selection.json.
    balance = json.loads((curated / "selection.json").read_text())["balance"]["level_1"]
    for when in ("before", "after"):
        assert f"<td>{balance[when]['evenness']:.3f}</td>" in page


def test_names_are_text_and_nothing_comes_from_elsewhere(curated: Path, tmp_path: Path) -> None:
    page = page_of(curated, tmp_path / "review.html")
    elements = Elements(page)
    assert len(elements.of("script")) == 2
    assert HOSTILE not in page and any(HOSTILE in text for text in elements.texts)
    for _, attributes in elements.found:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    policy = next(m["content"] for m in elements.of("meta") if "http-equiv" in m)
    assert policy is not None and policy.startswith("default-src 'none'")


def test_what_cannot_be_read_is_said_and_not_made_up(curated: Path, tmp_path: Path) -> None:
    path = Path(pq.read_table(curated / "slides.parquet")["path"][0].as_py())
    moved = path.rename(path.with_suffix(".away"))
    try:
        page = page_of(curated, tmp_path / "review.html")
    finally:
        moved.rename(path)
    assert page.count('<b class="failed"') > 0 and "cannot be read: " in page


def test_wrong_levels_columns_and_reviews_are_refused(curated: Path, tmp_path: Path) -> None:
    for keys, said in (
        ({"level": 3}, "no level_3; there are: level_1, level_2"),
        ({"by": "[organs]"}, "no column 'organs'"),
        ({"selection": tmp_path / "none.parquet"}, "tells no balance"),
        ({"clusters": tmp_path}, "holds no finished clusters"),
    ):
        with pytest.raises((ConfigError, InputError), match=said):
            page_of(curated, tmp_path / "review.html", **keys)
    other = {"schema_version": 1, "clusters_stamp": "x", "level": 1, "clusters": {}}
    (tmp_path / "review.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="review of other clusters"):
        page_of(curated, tmp_path / "review.html", review=tmp_path / "review.json")


def test_what_is_judged_in_a_browser_is_obeyed_by_the_draw(curated: Path, tmp_path: Path) -> None:
    page_of(curated, tmp_path / "review.html")
    saved = tmp_path / "review.json"
    clusters = pq.read_table(curated / "clusters" / "clusters.parquet")
    sizes = Counter(clusters["level_1"].to_pylist())
    first, second, third, fourth = (number for number, _ in sizes.most_common(4))
    with open_page(tmp_path / "review.html", tmp_path, tmp_path / "profile") as page:
        said = "document.getElementById('said').textContent"
        assert page.run(said) == f"0 of {len(sizes)} judged, 0 rejected"
        page.type_into(f"#cluster-{first} .name", "tumour, solid")
        page.type_into(f"#cluster-{first} .weight", "2,5")
        page.type_into(f"#cluster-{second} .name", "stroma")
        page.click(f"#cluster-{third} .reject")
        page.type_into(f"#cluster-{fourth} .merged", "4711")
        assert "There is no cluster 4711" in page.run(
            f"document.querySelector('#cluster-{fourth} .problem').textContent"
        )
        assert page.run("document.getElementById('save').disabled") is True
        page.run(f"document.querySelector('#cluster-{fourth} .merged').value = ''")
        page.type_into(f"#cluster-{fourth} .merged", str(second))
        assert page.run(said) == f"4 of {len(sizes)} judged, 1 rejected"
        # A page that was closed by mistake comes back as it was.
        page.run("window.before = true; location.reload()")
        page.wait_for(f"!window.before && {said.replace(').', ')?.')}?.startsWith('4 of')")
        page.click("#save")
        until = time.monotonic() + 30
        while not saved.is_file():
            assert time.monotonic() < until
            time.sleep(0.05)
    review = json.loads(saved.read_text())
    assert review["clusters"] == {
        str(first): {
            "name": "tumour, solid",
            "merged_into": None,
            "weight": 2.5,
            "rejected": False,
        },
        str(second): {"name": "stroma", "merged_into": None, "weight": 1, "rejected": False},
        str(third): {"name": "", "merged_into": None, "weight": 1, "rejected": True},
        str(fourth): {"name": "", "merged_into": second, "weight": 1, "rejected": False},
    }
    words = [f"tiles={curated}", f"clusters={curated / 'clusters'}", f"review={saved}"]
    words += ["tree=[level_1]", "total=40", f"out={tmp_path / 'selection.parquet'}"]
    assert main(["sample", *words]) == 0
    drawn = read_table(tmp_path / "selection.parquet", SELECTION)
    label = dict(zip(clusters["tile_id"].to_pylist(), clusters["level_1"].to_pylist(), strict=True))
    taken = Counter(label[name] for name in drawn["tile_id"].to_pylist())
    assert third not in taken
    strata = Counter(drawn["stratum"].to_pylist())
    assert str(fourth) not in strata
    others = [count for name, count in strata.items() if name not in (str(first), "unknown")]
    assert strata[str(first)] == pytest.approx(2.5 * max(others), abs=2)
    again = page_of(curated, tmp_path / "again.html", review=saved)
    assert "tumour, solid" in again
