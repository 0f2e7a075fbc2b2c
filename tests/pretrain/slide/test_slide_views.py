"""Views and what is hidden of them: functions of (seed, epoch, position), of tiles that are
there."""

from pathlib import Path

import numpy as np
import pytest
from slide_bags import TILE_UM, write_slides

from eosin.configs.errors import ConfigError, InputError
from eosin.pretrain.order import MixtureConfig
from eosin.pretrain.slide.hiding import HidingConfig, draw_hidden
from eosin.pretrain.slide.sources import Sources
from eosin.pretrain.slide.steps import SlidePlan, SlideSteps
from eosin.pretrain.slide.views import View, ViewsConfig, draw_views, whole_view

KINDS = ["halves", "patches"] * 3


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("bags")
    groups = ["p0", "p0", "p1", "p1", "p2", "p2"]
    stains = ["H&E", "ER", "H&E", "ER", "H&E", "H&E"]
    write_slides(folder / "fine", KINDS, groups=groups, stains=stains, side=24)
    write_slides(
        folder / "coarse", KINDS, groups=groups, stains=stains, side=24, scale=2, encoder="other",
        dim=8,
    )  # fmt: skip
    return [folder / "fine", folder / "coarse"]


def features_of(view: View) -> np.ndarray:
    return np.concatenate([part.ravel() for part in view.features])


def test_a_window_holds_the_tiles_of_a_square_of_all_sources(stores: list[Path]) -> None:
    sources = Sources(stores, None, "slide")
    config = ViewsConfig(n_global=2, n_local=1, global_tiles=8, local_tiles=4, least_tissue=0.0)
    for at, sample in enumerate(sources.samples):
        [slide] = sample.slides
        views = draw_views(sources, sample, config, 3, 1, at)
        assert [len(of) for of in views] == [1, 1, 1]
        for (view,), side in zip(views, (8, 8, 4), strict=True):
            assert np.abs(view.position).max() <= side / 2
            whole = [s.store.read(slide.slide_id) for s in sources.sources]
            fine = view.position[view.source == 0]
            assert len(np.unique(fine, axis=0)) == len(fine)
            for number, tokens in enumerate(whole):  # each feature is that of a tile at its place
                of = {
                    row.tobytes(): um
                    for row, um in zip(tokens.features, tokens.centre_um, strict=True)
                }
                own = view.position[view.source == number] * TILE_UM
                um = np.array([of[row.tobytes()] for row in view.features[number]])
                offset = um - own
                np.testing.assert_allclose(
                    offset, np.broadcast_to(offset[0], offset.shape), atol=1e-2
                )
                corner = offset[0] - side * TILE_UM / 2
                inside = (
                    (tokens.centre_um >= corner - 1e-6)
                    & (tokens.centre_um < corner + side * TILE_UM - 1e-6)
                ).all(axis=1)
                assert inside.sum() == len(own)


def test_views_are_a_function_of_seed_epoch_and_position(stores: list[Path]) -> None:
    sources = Sources(stores, None, "slide")
    config = ViewsConfig(global_tiles=6)
    sample = sources.samples[0]
    one, again, other = (
        [features_of(view) for [view] in draw_views(sources, sample, config, *key)]
        for key in ((0, 1, 2), (0, 1, 2), (0, 2, 2))
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert not np.array_equal(one[0], one[1])


def test_views_of_a_region_lie_within_one_square(stores: list[Path]) -> None:
    sources = Sources(stores[:1], None, "slide")
    config = ViewsConfig(n_global=2, n_local=6, global_tiles=6, local_tiles=3, region_tiles=8)
    store = sources.sources[0].store
    for at, sample in enumerate(sources.samples):
        found = []
        tokens = store.read(sample.slides[0].slide_id)
        of = {row.tobytes(): um for row, um in zip(tokens.features, tokens.centre_um, strict=True)}
        for [view] in draw_views(sources, sample, config, 0, 0, at):
            found += [of[row.tobytes()] for row in view.features[0]]
        spread = np.ptp(np.array(found), axis=0)
        assert (spread <= 7 * TILE_UM + 1e-6).all()


def test_tokens_and_whole_slides(stores: list[Path]) -> None:
    sources = Sources(stores[:1], None, "slide")
    [slide] = sources.samples[0].slides
    n = len(whole_view(sources, slide))
    drawn = draw_views(
        sources, sources.samples[0], ViewsConfig(kind="tokens", n_tokens=50), 0, 0, 0
    )
    assert [len(view) for [view] in drawn] == [50, 50]
    config = ViewsConfig(kind="whole", n_global=1, n_tokens=100)
    [[view]] = draw_views(sources, sources.samples[0], config, 0, 0, 0)
    assert len(view) == 100
    parts, _ = np.histogram(np.searchsorted(*_ranks(view, sources, slide.slide_id)), 10, (0, n))
    assert parts.min() >= 9  # evenly along the slide
    config = ViewsConfig(kind="whole", n_global=1, n_tokens=0, dropped=0.25)
    [[view]] = draw_views(sources, sources.samples[0], config, 0, 0, 0)
    assert len(view) == n - n // 4


def _ranks(view: View, sources: Sources, slide_id: str) -> tuple[np.ndarray, np.ndarray]:
    tokens = sources.sources[0].store.read(slide_id)
    of = {row.tobytes(): at for at, row in enumerate(tokens.features)}
    return np.arange(len(tokens)), np.array([of[row.tobytes()] for row in view.features[0]])


def test_views_apart_in_slide_source_and_stain(stores: list[Path]) -> None:
    by_group = Sources(stores, None, "group")
    config = ViewsConfig(kind="tokens", n_tokens=9, apart=["source"], together=False)
    for at in range(8):
        [[one], [two]] = draw_views(by_group, by_group.samples[0], config, 0, 0, at)
        assert set(one.source) != set(two.source) and len(set(one.source)) == 1
    two_stains = Sources(stores[:1], None, "group", stains=2)
    assert [sample.key for sample in two_stains.samples] == ["p0", "p1"]  # p2 has H&E alone
    assert two_stains.left_out == 1
    config = ViewsConfig(kind="tokens", n_tokens=9, apart=["stain"])
    store = two_stains.sources[0].store
    known = {
        row.tobytes(): store.read(slide_id).stain
        for slide_id in store.slide_ids
        for row in store.read(slide_id).features
    }
    for at in range(8):
        views = draw_views(two_stains, two_stains.samples[1], config, 0, 0, at)
        stains = [{known[row.tobytes()] for row in view.features[0]} for [view] in views]
        assert stains in ([{"ER"}, {"H&E"}], [{"H&E"}, {"ER"}])
        assert stains[0] == {"ER"}  # of equally common ones the first by name, always


def test_a_budget_is_spent_on_tiles_that_are_there(stores: list[Path]) -> None:
    sources = Sources(stores[:1], None, "slide")
    config = ViewsConfig(n_global=2, global_tiles=10)
    views = [
        view
        for at, sample in enumerate(sources.samples)
        for [view] in draw_views(sources, sample, config, 0, 0, at)
    ]
    hiding = HidingConfig(share=0.5, ratio=(0.2, 0.4))
    hidden = draw_hidden(hiding, views, seed=0, step=5, group=0)
    shares = sorted(mask.mean() for mask in hidden)
    assert sum(share > 0 for share in shares) == len(views) // 2
    for k, share in enumerate(shares[len(views) // 2 :]):  # one from each slice of the range
        low = 0.2 + 0.2 * k / (len(views) // 2)
        assert low - 0.02 <= share <= low + 0.2 / (len(views) // 2) + 0.02
    neighbours = []
    for view, mask in zip(views, hidden, strict=True):
        if mask.any():
            away = np.abs(view.position[:, None] - view.position[None]).max(axis=2)
            near = (away > 0) & (away <= 1.01)
            neighbours.append((near & mask[:, None] & mask).sum() / (near & mask[:, None]).sum())
    assert np.mean(neighbours) > 0.5  # blocks: 0.3 of all tiles would be by chance
    again = draw_hidden(hiding, views, seed=0, step=5, group=0)
    assert all(np.array_equal(a, b) for a, b in zip(hidden, again, strict=True))


def test_whole_sources_are_hidden(stores: list[Path]) -> None:
    sources = Sources(stores, None, "slide")
    views = [draw_views(sources, s, ViewsConfig(), 0, 0, 0)[0][0] for s in sources.samples]
    hidden = draw_hidden(HidingConfig(kind="sources", share=1), views, seed=0, step=0, group=0)
    seen = []
    for view, mask in zip(views, hidden, strict=True):
        [visible] = set(view.source[~mask])
        assert visible not in set(view.source[mask])
        seen.append(visible)
    assert set(seen) == {0, 1}


def batch_parts(batch: object) -> list[np.ndarray]:
    stream = batch.stream  # type: ignore[attr-defined]
    parts = [x.numpy() for x in (*stream.features, stream.position, batch.rows)]  # type: ignore[attr-defined]
    return [*parts, batch.hidden, np.array(stream.lengths)]  # type: ignore[attr-defined]


def test_two_ranks_share_what_one_takes(stores: list[Path]) -> None:
    sources = Sources(stores[:1], None, "slide")
    common = {"views": ViewsConfig(global_tiles=6), "hiding": HidingConfig(), "batch_size": 4}
    whole = SlideSteps(sources, SlidePlan(**common, seed=1, group_size=2))  # type: ignore[arg-type]
    halves = [
        SlideSteps(sources, SlidePlan(**common, seed=1, group_size=2, rank=rank, world=2))  # type: ignore[arg-type]
        for rank in range(2)
    ]
    seen = []
    for step in range(5):
        one = whole[step]
        parts = [steps[step] for steps in halves]
        assert np.array_equal(one.rows, np.concatenate([p.rows for p in parts]))
        seen += one.rows.tolist()
        views = np.split(one.hidden, np.cumsum(one.stream.lengths)[:-1])
        for rank, part in enumerate(parts):
            own = np.split(part.hidden, np.cumsum(part.stream.lengths)[:-1])
            ours = [views[v * 4 + rank * 2 + s] for v in range(2) for s in range(2)]
            assert all(np.array_equal(a, b) for a, b in zip(own, ours, strict=True))
    assert sorted(seen[:6]) == list(range(6))  # an epoch shows each once
    assert sorted(seen[6:12]) == list(range(6))


def test_workers_make_the_same_batches(stores: list[Path]) -> None:
    from eosin.pretrain.loader import serve

    sources = Sources(stores, None, "slide")
    plan = SlidePlan(
        views=ViewsConfig(global_tiles=6), hiding=HidingConfig(), batch_size=3, seed=1, group_size=3
    )
    found = [
        list(serve(SlideSteps(sources, plan), range(3), workers=n, prefetch=1)) for n in (0, 1)
    ]
    for one, other in zip(*found, strict=True):
        for a, b in zip(batch_parts(one), batch_parts(other), strict=True):
            assert np.array_equal(a, b)


def test_a_table_chooses_groups_splits_and_mixture(stores: list[Path], tmp_path: Path) -> None:
    table = tmp_path / "slides.csv"
    table.write_text(
        "slide,group,split,organ\ns000,a,train,breast\ns001,a,test,breast\ns002,b,train,lung\n"
        "s003,b,train,lung\n"
    )
    sources = Sources(stores[:1], table, "slide")
    assert [s.key for s in sources.samples] == ["s000", "s002", "s003"]  # no test patient's slide
    assert [s.group for s in sources.samples] == [0, 1, 1]
    plan = SlidePlan(
        views=ViewsConfig(global_tiles=4), hiding=None, batch_size=1, seed=0, group_size=1,
        mixture=MixtureConfig(column="organ", weights={"breast": 2, "lung": 1}),
    )  # fmt: skip
    rows = [int(SlideSteps(sources, plan)[step].rows[0]) for step in range(30)]
    assert rows.count(0) == 20
    with pytest.raises(InputError, match="no such column"):
        sources.strata("colour")
    table.write_text("slide\ns000\nnobody\n")
    with pytest.raises(InputError, match="in no store of bags, the first is 'nobody'"):
        Sources(stores[:1], table, "slide")
    with pytest.raises(ConfigError, match="6 samples, fewer than one batch of 7"):
        plan = SlidePlan(views=ViewsConfig(), hiding=None, batch_size=7, seed=0, group_size=7)
        SlideSteps(Sources(stores[:1], None, "slide"), plan)
