"""Bags: needles in haystacks, whole bags at test, places of tiles, and attention that finds
needles."""

import dataclasses
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score

from eosin.configs.errors import InputError
from eosin.data_curation.features import join_features
from eosin.data_curation.manifest import FEATURE_ROWS
from eosin.eval.attention_maps import ranks_of, write_attention
from eosin.eval.bags import BagsConfig, evaluate_bags, grid_cells
from eosin.eval.heads import registry
from eosin.eval.heads.abmil import GatedAttention
from eosin.eval.heads.packed import pack
from eosin.eval.heads.recipe import Recipe
from eosin.eval.heads.training import Bag, BagSplits, run_head
from eosin.eval.heads.transmil import SelfAttention, TransMil
from eosin.eval.results import load_results
from eosin.launch.cli import main

CPU = torch.device("cpu")
DIM = 16


def hurry(monkeypatch: pytest.MonkeyPatch, **recipe: float) -> None:
    """Every head by a shorter recipe."""
    for name, head in registry.HEADS.items():
        short = dataclasses.replace(head, recipe=Recipe(**recipe))
        monkeypatch.setitem(registry.HEADS, name, short)


def haystack(
    n: int, seed: int, tiles: int = 80
) -> tuple[list[Bag], npt.NDArray[np.int64], list[npt.NDArray[np.bool_]]]:
    """Bags of noise; those of class 1 hold three tiles along one direction. Where those are,
    too."""
    generator = np.random.default_rng(seed)
    needle = np.random.default_rng(99).normal(size=DIM)
    bags, labels, where = [], generator.permutation(np.arange(n) % 2), []
    for i in range(n):
        count = int(generator.integers(tiles // 2, tiles))
        features = generator.normal(size=(count, DIM))
        is_needle = np.zeros(count, np.bool_)
        if labels[i]:
            is_needle[generator.choice(count, 3, replace=False)] = True
            features[is_needle] += 1.3 * needle
        cells = np.stack(np.unravel_index(generator.permutation(400)[:count], (20, 20)), axis=1)
        bags.append(
            Bag(
                slide_id=f"s{seed}_{i}",
                tile_ids=[f"s{seed}_{i}_{t}" for t in range(count)],
                features=features.astype(np.float16),
                cells=cells,
            )
        )
        where.append(is_needle)
    return bags, labels, where


@pytest.mark.parametrize("make", [GatedAttention, pytest.param(TransMil, marks=pytest.mark.slow)])
def test_needles_in_haystacks_are_found(
    make: type[GatedAttention] | type[TransMil],
) -> None:
    recipe = Recipe(runs=1, epochs=10, rate=5e-4, bags_a_step=1)
    train, train_labels, _ = haystack(120, 0)
    val, val_labels, _ = haystack(40, 1)
    test, labels, where = haystack(80, 2)
    splits = BagSplits(
        train=train, train_labels=train_labels, val=val, val_labels=val_labels, test=test
    )
    outcome, weights = run_head(make, splits, 2, 0, CPU, "test", recipe)
    assert outcome.scores is not None
    assert roc_auc_score(labels, outcome.scores[:, 1]) >= 0.95
    means = np.stack([bag.features.astype(float).mean(axis=0) for bag in train])
    assert means.shape == (120, DIM)
    for bag, of_bag in zip(test, weights, strict=True):
        assert of_bag.shape == (len(bag.features),)
        assert of_bag.sum() == pytest.approx(1, abs=1e-4)
    if make is GatedAttention:  # its verdict is a weighted mean, so its weights must point there
        found = [
            is_needle[np.argmax(of_bag)]
            for of_bag, is_needle in zip(weights, where, strict=True)
            if is_needle.any()
        ]
        assert np.mean(found) > 0.8


def test_the_whole_bag_counts_at_test_and_its_order_does_not() -> None:
    bags, _, _ = haystack(1, 3)
    features = torch.from_numpy(bags[0].features.astype(np.float32))
    cells = torch.from_numpy(bags[0].cells)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    for make in (GatedAttention, TransMil):
        torch.manual_seed(0)
        head = make(DIM, 3).eval()
        logits, weights, *_ = head(pack([(features, cells)]))
        turned, turned_weights, *_ = head(pack([(features[order], cells[order])]))
        torch.testing.assert_close(turned, logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(turned_weights, weights[order], rtol=1e-4, atol=1e-6)
        for row in (0, len(features) - 1):  # no tile is left out
            changed = features.clone()
            changed[row] += 5
            assert (head(pack([(changed, cells)])).outputs - logits).abs().max() > 1e-6


def test_gated_attention_is_ilses_formula() -> None:
    torch.manual_seed(1)
    head = GatedAttention(DIM, 2).eval()
    bag = torch.randn(7, DIM)
    head.requires_grad_(False)
    h = torch.relu(bag @ head.embed[0].weight.T + head.embed[0].bias)
    scores = [
        float(
            head.weigh.weight[0] @ (torch.tanh(head.tanh(h[i])) * torch.sigmoid(head.gate(h[i])))
            + head.weigh.bias
        )
        for i in range(7)
    ]
    weights = np.exp(scores) / np.exp(scores).sum()
    pooled = sum(float(w) * h[i] for i, w in enumerate(weights))
    logits, found, *_ = head(pack([(bag, torch.zeros(7, 2, dtype=torch.int64))]))
    np.testing.assert_allclose(found.detach(), weights, rtol=1e-4)
    torch.testing.assert_close(logits[0], head.classify(pooled), rtol=1e-4, atol=1e-5)


def test_transmil_sees_neighbours_on_the_grid_and_weighs_as_it_attends() -> None:
    torch.manual_seed(2)
    head = TransMil(DIM, 2).eval()
    tiles = torch.randn(4, 256)
    cells = torch.tensor([[0, 0], [1, 0], [40, 0], [41, 0]])
    near = head._place(tiles, cells)
    moved = tiles.clone()
    moved[1] += 1
    changed = (head._place(moved, cells) - near).abs().sum(dim=1)
    assert changed[0] > 0 and changed[2] == 0 and changed[3] == 0
    layer = SelfAttention().eval()
    tokens = torch.randn(6, 256)
    q, k, v = layer._heads(tokens)
    dense = torch.softmax(q @ k.transpose(1, 2) * 32**-0.5, dim=2)
    expected = tokens + layer.output((dense @ v).transpose(0, 1).reshape(6, 256))
    torch.testing.assert_close(layer(tokens), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.weights_of_first(tokens), dense[:, 0].mean(dim=0))


def test_cells_are_places_on_the_smallest_step_and_doubles_are_refused() -> None:
    places = np.array([[1000.0, 50], [1224, 50], [1000, 498], [1672, 274]])
    assert grid_cells(places, "s").tolist() == [[0, 0], [1, 0], [0, 2], [3, 1]]
    assert grid_cells(places[:1], "s").tolist() == [[0, 0]]
    with pytest.raises(InputError, match="s has two tiles in one place"):
        grid_cells(np.concatenate([places, places[1:2]]), "s")
    with pytest.raises(InputError, match="tiles without a place"):
        grid_cells(np.array([[np.nan, 1]]), "s")


def write_store(folder: Path, bags: list[Bag]) -> None:
    columns: dict[str, list[object]] = {field.name: [] for field in FEATURE_ROWS}
    for bag in bags:
        for column, row in bag.cells.tolist():
            columns["tile_id"].append(f"{bag.slide_id}_{column}_{row}")
            columns["group"].append(bag.slide_id)
            columns["slide_id"].append(bag.slide_id)
            columns["level0_x"].append(448.0 * column)
            columns["level0_y"].append(448.0 * row)
            columns["mpp"].append(0.5)
            columns["stain"].append(None)
    table = pa.table(columns, schema=FEATURE_ROWS)
    join_features(
        folder, rows=table, dim=DIM, stamp=folder.name, parts=[bag.features for bag in bags],
        meta={"encoder": folder.name, "encoder_digest": folder.name, "pooling": "cls"},
    )  # fmt: skip


@pytest.fixture
def stores(tmp_path: Path) -> tuple[list[Path], Path]:
    """One store that knows needles, one of noise; 90 slides of 45 patients."""
    bags, labels, _ = haystack(90, 5, tiles=20)
    generator = np.random.default_rng(6)
    noise = [
        Bag(
            slide_id=bag.slide_id,
            tile_ids=bag.tile_ids,
            features=generator.normal(size=bag.features.shape).astype(np.float16),
            cells=bag.cells,
        )
        for bag in bags
    ]
    write_store(tmp_path / "good", bags)
    write_store(tmp_path / "noise", noise)
    lines = ["slide,label,group,split"]
    for i, (bag, label) in enumerate(zip(bags, labels, strict=True)):
        split = ["train", "train", "test", "val"][i // 2 % 4]
        lines.append(f"{bag.slide_id},{['benign', 'tumour'][label]},p{i // 2},{split}")
    table = tmp_path / "slides.csv"
    table.write_text("\n".join(lines) + "\n")
    return [tmp_path / "good", tmp_path / "noise"], table


@pytest.mark.slow
def test_stores_stand_in_one_table_by_every_head(
    stores: tuple[list[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch, runs=2, epochs=6, rate=5e-4, bags_a_step=1)
    folders, table = stores
    config = BagsConfig(features=folders, labels=table, out=tmp_path / "out", device="cpu")
    evaluate_bags(config)
    results = load_results(config.out / "results.json")
    assert set(results.protocols) == {
        "mean+linear/sklearn-l2@2", "mean+prototypes/simpleshot@1", "abmil/gated@2",
        "transmil/grid@2",
    }  # fmt: skip
    good, noise = (results.score(e, "abmil/gated@2", "auroc") for e in ("good", "noise"))
    assert good.value > 0.9 and 0.1 < noise.value < 0.85 and good.value > noise.value
    assert results.task.tiles["test"] == 22 and results.task.groups["test"] == 11
    assert good.spread is None and results.score("good", "abmil/gated@2").spread is not None
    attention = pq.read_table(config.out / "attention" / "good-abmil_gated_2.parquet")
    total = attention.group_by("slide_id").aggregate([("weight", "sum")])
    np.testing.assert_allclose(total["weight_sum"].to_numpy(), 1, atol=1e-4)
    page = (config.out / "report.html").read_text()
    assert "Attention" in page and "On 22 test slides of 11 groups" in page
    again = BagsConfig(**{**vars(config), "heads": ["abmil/gated@2"], "out": tmp_path / "again"})
    evaluate_bags(again)
    second = load_results(again.out / "results.json")
    assert {s.protocol for s in second.scores} == set(results.protocols) - {"transmil/grid@2"}
    for s in second.scores:  # the same again, whatever else is fitted beside it
        assert s == results.score(s.encoder, s.protocol, s.metric)


def test_bad_bags_are_one_line(
    stores: tuple[list[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders, table = stores
    text = table.read_text()
    for changed, message in (
        (text + "nowhere,benign,p99,train\n", "has no features of 1 labelled slides"),
        (text + text.splitlines()[1] + "\n", "more than once"),
        (text.replace("tumour", "benign"), "only one class"),
        (text.replace("p1,", "p0,").replace("p2,", "p0,"), "a group must not cross a split"),
    ):
        table.write_text(changed)
        arguments = ["eval", "bags", f"features=[{folders[0]}]", f"labels={table}"]
        assert main([*arguments, f"out={tmp_path / 'out'}"]) == 2
        assert message in capsys.readouterr().err
    assert main(["eval", "bags", "features=[]", f"labels={table}", "out=x"]) == 2
    assert main(["eval", "bags", "features=[a]", f"labels={table}", "out=x", "heads=[clam]"]) == 2
    assert "no head 'clam'" in capsys.readouterr().err


def test_files_of_clam_are_evaluated_as_bags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pieces of tissue a slide, each on a grid of its own; bad files are one line, exit 2."""
    hurry(monkeypatch, runs=1, epochs=6, rate=2e-3, bags_a_step=1)
    bags, labels, _ = haystack(48, 5)
    folder = tmp_path / "h5_files"
    folder.mkdir()
    for bag in bags:
        corners = bag.cells * 256
        corners[len(corners) // 2 :] += [6100, 33]
        with h5py.File(folder / f"{bag.slide_id}.h5", "w") as file:
            file["features"] = bag.features.astype(np.float32)
            coords = file.create_dataset("coords", data=corners)
            coords.attrs.update({"patch_size": 256, "patch_level": 0})
            coords.attrs["downsample"] = (1.0, 1.0)
    table = ["slide,label,group,split"]
    for i, (bag, label) in enumerate(zip(bags, labels.tolist(), strict=True)):
        split = "val" if i % 4 == 2 else "test" if i % 4 == 3 else "train"
        table.append(f"{bag.slide_id},{'ab'[label]},p{i},{split}")
    (tmp_path / "slides.csv").write_text("\n".join(table) + "\n")
    command = ["bags", f"files={folder}", f"out={tmp_path / 'bags'}", "encoder=resnet50"]
    assert main(command) == 2  # CLAM says no scale
    assert main([*command, "mpp=0.5"]) == 0
    out = tmp_path / "scores"
    assert main(["eval", "bags", f"features=[{tmp_path / 'bags'}]", f"out={out}", "device=cpu",
                 f"labels={tmp_path / 'slides.csv'}", "n_bootstrap=50"]) == 0  # fmt: skip
    scores = {
        row.protocol: row.value
        for row in load_results(out / "results.json").scores
        if row.metric == "auroc"
    }
    assert scores["abmil/gated@2"] > 0.8 and "transmil/grid@2" in scores


def test_heads_that_are_means_show_what_their_tiles_say(tmp_path: Path) -> None:
    """Their weights are equal: ranks of those would be the order of the tiles."""
    assert set(ranks_of(np.full(5, 0.2, np.float32))) == {0.5}
    np.testing.assert_allclose(
        ranks_of(np.array([3, 1, 1, 2], np.float32)), [1, 1 / 6, 1 / 6, 2 / 3]
    )
    train, labels, _ = haystack(24, 7, tiles=20)
    splits = BagSplits(train=train[:16], train_labels=labels[:16], val=train[16:20],
                       val_labels=labels[16:20], test=train[20:])  # fmt: skip
    recipe = Recipe(runs=2, epochs=2)
    _, maps = run_head(registry.HEADS["additive@1"].make, splits, 2, 0, CPU, "test", recipe)
    for bag, of_bag in zip(train[20:], maps, strict=True):
        assert of_bag.shape == (len(bag.features), 2)
        np.testing.assert_allclose(of_bag.sum(axis=1), 1, atol=1e-5)
    write_attention(train[20:], maps, tmp_path, "a", 2, "x")
    table = pq.read_table(tmp_path / "attention" / "a.parquet")
    assert table.column_names[-2:] == ["probability_0", "probability_1"]
    assert (tmp_path / "figures" / "attention-a.png").is_file()
