"""Views of a sample: what takes the place of image crops where the image is a set of tokens.

A view is a window of a slide, some of its tokens, or all of them; of one source or of all that know
the slide. Every draw is a function of (seed, epoch, position, view). Legend: N tokens of a view, D
features.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from eosin.data_curation.bag_store import TokenSet
from eosin.pretrain.slide.sources import Sample, Slide, Sources

STREAM = 0x51DE  # keeps these draws apart from those of other modules under one seed
REGION = 1 << 20  # the number of the draw that views of one region share


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """How views are taken."""

    kind: Literal["window", "tokens", "whole"] = "window"
    """Squares of neighbouring tiles; tokens drawn from all over the slide; or the whole slide."""
    n_global: int = 2
    """Views that the teacher sees as well."""
    n_local: int = 0
    """Smaller views of the student alone."""
    global_tiles: int = 20
    """window: side of a global view in tiles of its first source."""
    local_tiles: int = 12
    """window: side of a local view."""
    region_tiles: int = 0
    """window: all views of a sample lie within one square of this side (TITAN: 16); 0: anywhere."""
    least_tissue: float = 0.25
    """window: share of its cells that hold a tile; after `tries` the fullest is taken."""
    tries: int = 3
    n_tokens: int = 2048
    """tokens: how many a view draws, from fewer all; whole: at most so many, evenly along the
    slide, 0: all."""
    dropped: float = 0.0
    """Share of the tokens of a view that the student is not given at all."""
    apart: list[Literal["slide", "source", "stain"]] = field(default_factory=list)
    """In what the views of a sample differ, as far as it has others: its slides, its sources (tile
    encoder, scale), its stains (the first view has the commonest)."""
    together: bool = True
    """A view holds the tokens of all sources that know the slide, at their places; else of one."""

    def __post_init__(self) -> None:
        low = {"n_global": 1, "n_local": 0, "global_tiles": 1, "local_tiles": 1, "tries": 1}
        for name, least in low.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.least_tissue <= 1 or not 0 <= self.dropped < 1:
            raise ValueError(
                f"least_tissue={self.least_tissue} and dropped={self.dropped} are shares"
            )
        if self.n_tokens < 0 or (self.kind == "tokens" and self.n_tokens < 1):
            raise ValueError(f"n_tokens={self.n_tokens} must be at least 1 for kind={self.kind}")
        if self.kind != "window" and self.n_local:
            raise ValueError(f"n_local={self.n_local} needs kind=window: others have one size")
        if 0 < self.region_tiles < self.global_tiles:
            raise ValueError(
                f"region_tiles={self.region_tiles} is smaller than global_tiles={self.global_tiles}"
            )
        if "source" in self.apart and self.together:
            raise ValueError("apart=[source] needs together=false: a view of one source")

    @property
    def n_views(self) -> int:
        """S: of a sample."""
        return self.n_global + self.n_local


@dataclass(frozen=True)
class View:
    """N tokens of one slide."""

    features: tuple[npt.NDArray[np.float16], ...]
    """Of each source, those of its tokens [n_s, D_s]; the sources' tokens follow one another."""
    source: npt.NDArray[np.int64]
    """Number of each token's source, [N], rising."""
    position: npt.NDArray[np.float32]
    """In tiles of the view's first source, from its middle, [N, 2]."""
    section: npt.NDArray[np.int64]
    """Piece of tissue, [N]."""

    def __len__(self) -> int:
        """N."""
        return len(self.source)

    def kept(self, tokens: npt.NDArray[np.int64]) -> "View":
        """Some of its tokens, given in rising order."""
        source = self.source[tokens]
        starts = np.searchsorted(self.source, np.arange(len(self.features)))
        features = tuple(
            part[tokens[source == number] - start]
            for number, (part, start) in enumerate(zip(self.features, starts, strict=True))
        )
        return View(features, source, self.position[tokens], self.section[tokens])


def draw_views(
    sources: Sources, sample: Sample, config: ViewsConfig, seed: int, epoch: int, position: int
) -> list[list[View]]:
    """The views of a sample: of each, one or more slides'.

    More than one only where `kind` is ``whole`` and the sample has several slides: then a view is
    all of them.

    Args:
        sources: of the bags.
        sample: of `sources`.
        config: of the views.
        seed: of the run.
        epoch: of the order.
        position: in it.
    """
    key = [STREAM, seed, epoch, position]
    if config.kind == "whole" and not config.apart:
        return [
            [_whole(sources, slide, config, np.random.default_rng([*key, view, at]))
             for at, slide in enumerate(sample.slides)]
            for view in range(config.n_views)
        ]  # fmt: skip
    chosen = _choose(sample, config, np.random.default_rng([*key, REGION]))
    views = []
    for number, (slide, of) in enumerate(chosen):
        rng = np.random.default_rng([*key, number])
        if config.kind == "window":
            shared = np.random.default_rng([*key, REGION + 1])
            view = _window(sources, slide, of, config, number, rng, shared)
        else:
            view = _tokens(sources, slide, of, config, rng)
        views.append([_without(view, config.dropped, rng)])
    return views


def whole_view(sources: Sources, slide: Slide) -> View:
    """All tokens of a slide, of all sources that know it, in the order of their stores."""
    sets = [sources.sources[number].store.read(slide.slide_id) for number in slide.sources]
    middle = (sets[0].centre_um.min(axis=0) + sets[0].centre_um.max(axis=0)) / 2
    return _view(sources, slide.sources, sets, middle)


def _choose(
    sample: Sample, config: ViewsConfig, rng: np.random.Generator
) -> list[tuple[Slide, tuple[int, ...]]]:
    """The slide, and the sources, of each view."""
    slides = list(sample.slides)
    order = [slides[at] for at in rng.permutation(len(slides))]
    if "stain" in config.apart:
        stains = [slide.stain for slide in slides]
        anchor = max(sorted({s or "" for s in stains}), key=[s or "" for s in stains].count)
        own = [slide for slide in order if (slide.stain or "") == anchor]
        others = [slide for slide in order if (slide.stain or "") != anchor] or own
        order = [own[0], *(others[at % len(others)] for at in range(config.n_views - 1))]
    elif "slide" not in config.apart:
        order = order[:1]
    chosen = []
    first = int(rng.integers(1 << 30))
    for view in range(config.n_views):
        slide = order[view % len(order)]
        of = slide.sources
        if not config.together:
            turn = first + (view if "source" in config.apart else 0)
            of = (of[turn % len(of)],)
        chosen.append((slide, of))
    return chosen


def _window(
    sources: Sources,
    slide: Slide,
    of: tuple[int, ...],
    config: ViewsConfig,
    number: int,
    rng: np.random.Generator,
    shared: np.random.Generator,
) -> View:
    tiles = config.global_tiles if number < config.n_global else config.local_tiles
    first = sources.sources[of[0]]
    centres, side_um = first.store.centres(slide.slide_id), tiles * first.tile_um
    region: tuple[npt.NDArray[np.float64], float] | None = None
    if config.region_tiles:
        region_um = config.region_tiles * first.tile_um
        corner = _corner(centres, region_um, first.tile_um, shared)
        inside = ((centres >= corner) & (centres < corner + region_um)).all(axis=1)
        centres, region = centres[inside], (corner, region_um)
    best, most = None, -1
    for _ in range(config.tries):
        corner = _corner(centres, side_um, first.tile_um, rng)
        if region is not None:
            corner = np.clip(corner, region[0], region[0] + region[1] - side_um)
        count = int(((centres >= corner) & (centres < corner + side_um)).all(axis=1).sum())
        if count > most:
            best, most = corner, count
        if count >= config.least_tissue * tiles**2:
            break
    assert best is not None
    sets = [
        sources.sources[at].store.window(
            slide.slide_id, (float(best[0]), float(best[1])), (side_um, side_um)
        )
        for at in of
    ]
    return _view(sources, of, sets, best + side_um / 2)


def _corner(
    centres: npt.NDArray[np.float64], side_um: float, tile_um: float, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Of a square that holds a tile drawn from all, which lies anywhere in it, on the lattice."""
    tile = centres[rng.integers(len(centres))]
    cells = max(round(side_um / tile_um), 1)
    corner: npt.NDArray[np.float64] = tile - (rng.integers(cells, size=2) + 0.5) * tile_um
    return corner


def _tokens(
    sources: Sources,
    slide: Slide,
    of: tuple[int, ...],
    config: ViewsConfig,
    rng: np.random.Generator,
) -> View:
    sets = [sources.sources[at].store.read(slide.slide_id) for at in of]
    middle = (sets[0].centre_um.min(axis=0) + sets[0].centre_um.max(axis=0)) / 2
    view = _view(sources, of, sets, middle)
    if config.kind == "whole":
        return _thinned(view, config.n_tokens, rng)
    if len(view) <= config.n_tokens:
        return view
    return view.kept(np.sort(rng.choice(len(view), config.n_tokens, replace=False)))


def _whole(sources: Sources, slide: Slide, config: ViewsConfig, rng: np.random.Generator) -> View:
    view = _thinned(whole_view(sources, slide), config.n_tokens, rng)
    return _without(view, config.dropped, rng)


def _thinned(view: View, at_most: int, rng: np.random.Generator) -> View:
    """Evenly along the stored order, which is by blocks of neighbours: every part keeps a share."""
    if not at_most or len(view) <= at_most:
        return view
    places = (np.arange(at_most) + rng.random()) * len(view) / at_most
    return view.kept(places.astype(np.int64))


def _without(view: View, share: float, rng: np.random.Generator) -> View:
    left_out = min(int(share * len(view)), len(view) - 1)
    if left_out <= 0:
        return view
    return view.kept(np.sort(rng.choice(len(view), len(view) - left_out, replace=False)))


def _view(
    sources: Sources,
    of: tuple[int, ...],
    sets: list[TokenSet],
    middle_um: npt.NDArray[np.float64],
) -> View:
    by_number = dict(zip(of, sets, strict=True))
    features = tuple(
        by_number[number].features if number in by_number else np.empty((0, s.dim), np.float16)
        for number, s in enumerate(sources.sources)
    )
    ordered = [by_number[number] for number in sorted(by_number)]
    centres = np.concatenate([tokens.centre_um for tokens in ordered])
    return View(
        features,
        np.repeat(sorted(by_number), [len(tokens) for tokens in ordered]).astype(np.int64),
        ((centres - middle_um) / sources.sources[of[0]].tile_um).astype(np.float32),
        np.concatenate([tokens.section for tokens in ordered]).astype(np.int64),
    )
