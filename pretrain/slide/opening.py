"""A slide encoder folder, opened: three lines of Python, and what `eosin extract slides` stands on.

    from eosin.pretrain.slide.opening import open_slide_encoder
    encoder = open_slide_encoder("runs/slides/encoder")
    said = encoder.encode_slide([BagStore("bags")], "slide-1")  # .vector, .latents, .tokens

Legend: N tiles of a slide, W width, K latents.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eosin.configs.errors import InputError
from eosin.data_curation.bag_store import BagStore
from eosin.launch.artefacts import read_json
from eosin.pretrain.attention import choose_attention
from eosin.pretrain.slide.batch import Stream
from eosin.pretrain.slide.encoder import SlideEncoder, SlideModelConfig, SourceShape
from eosin.pretrain.slide.views import View

WEIGHTS, CONFIG, SUMS = "slide_encoder.safetensors", "config.json", "SHA256SUMS"
SCHEMA = 1


@dataclass(frozen=True)
class SourceRecord:
    """What a slide encoder knows of a source that it learnt from."""

    name: str
    dim: int
    tile_um: float
    """Side of its tiles."""
    encoder_digest: str | None
    """Of the tile encoder; None where the bags do not say."""
    transform_digest: str | None
    pooling: str | None


@dataclass(frozen=True)
class SlideVectors:
    """What a slide encoder says of one slide, fp32."""

    vector: npt.NDArray[np.float32]
    """[W]"""
    tokens: npt.NDArray[np.float32]
    """Contextual, row by row of the bags that were given, [N, W]; the stores one after another."""
    latents: npt.NDArray[np.float32] | None
    """[K, W], of an encoder with ``pool=latents``."""
    weights: npt.NDArray[np.float32] | None
    """How much of the vector is of each tile, [N], where the pooling has such."""


class OpenSlideEncoder:
    """A slide encoder, ready to encode. See `open_slide_encoder`.

    Args:
        network: with weights, on its device.
        sources: that it was trained on.
        name: of the folder, for messages.
        trained_on: groups that it was trained on, as `digest_of_group` has them.
    """

    def __init__(
        self,
        network: SlideEncoder,
        sources: Sequence[SourceRecord],
        name: str,
        trained_on: frozenset[str] = frozenset(),
    ) -> None:
        self.network, self.sources, self.name = network.eval(), tuple(sources), name
        self.trained_on = trained_on
        """`digest_of_group` of each group that it was trained on."""
        self.width = network.config.width

    def match(self, stores: Sequence[BagStore]) -> list[int]:
        """Which of the sources each store is of.

        Raises:
            InputError: a store is of another tile encoder, transform, width or tile size.
        """
        return [self._match(store, at) for at, store in enumerate(stores)]

    def encode_slide(self, stores: Sequence[BagStore], slide_id: str) -> SlideVectors:
        """One slide in all the stores that are given; rows in their order.

        Raises:
            InputError: a store does not match, or has no such slide.
        """
        numbers = self.match(stores)
        sets = [store.read(slide_id) for store in stores]
        return self.encode(
            [tokens.features for tokens in sets],
            [tokens.centre_um for tokens in sets],
            [tokens.section for tokens in sets],
            numbers,
        )

    @torch.no_grad()
    def encode(
        self,
        features: Sequence[npt.NDArray[np.floating]],
        centre_um: Sequence[npt.NDArray[np.floating]],
        section: Sequence[npt.NDArray[np.integer]] | None = None,
        sources: Sequence[int] | None = None,
    ) -> SlideVectors:
        """One slide of arrays.

        Args:
            features: of each source that is given, [N_s, D_s].
            centre_um: of its tiles, in micrometres, [N_s, 2].
            section: piece of tissue, [N_s]; None: one piece.
            sources: which of the encoder's sources they are; None: the first ones.

        Raises:
            InputError: widths differ, a feature or place is not finite, or there is no tile.
        """
        numbers = list(range(len(features))) if sources is None else list(sources)
        by_source: dict[int, tuple[Any, Any, Any]] = {}
        for at, number in enumerate(numbers):
            x, um = np.asarray(features[at]), np.asarray(centre_um[at], np.float64)
            wanted = self.sources[number].dim
            if x.ndim != 2 or x.shape[1] != wanted or um.shape != (len(x), 2):
                raise InputError(
                    f"{self.name}: features {list(x.shape)} and centres {list(um.shape)}; source "
                    f"'{self.sources[number].name}' wants [N, {wanted}] and [N, 2]"
                )
            if not (np.isfinite(x).all() and np.isfinite(um).all()):
                raise InputError(f"{self.name}: a feature or a place is not finite")
            own = np.ones(len(x), np.int64) if section is None else np.asarray(section[at])
            by_source[number] = x, um, own
        if not by_source or not any(len(x) for x, _, _ in by_source.values()):
            raise InputError(f"{self.name}: no tile is given, so there is nothing to encode")
        view = self._view(by_source)
        device = self.network.mask_token.device
        said = self.network(Stream.pack([view]).to(device))
        order = np.concatenate([np.flatnonzero(view.source == number) for number in numbers])
        tokens = said.tokens.float().cpu().numpy()[order]
        weights = None if said.weights is None else said.weights.float().cpu().numpy()[order]
        latents = None if said.latents is None else said.latents[0].float().cpu().numpy()
        return SlideVectors(said.vector[0].float().cpu().numpy(), tokens, latents, weights)

    @torch.no_grad()
    def encode_case(self, slides: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        """The vectors of a case's slides, [W] each, to the case's, [W]."""
        device = self.network.mask_token.device
        vectors = torch.from_numpy(np.stack(slides)).to(device)
        owner = torch.zeros(len(slides), dtype=torch.int64, device=device)
        found: npt.NDArray[np.float32] = self.network.case(vectors, owner, 1)[0].cpu().numpy()
        return found

    def _view(self, by_source: Mapping[int, tuple[Any, Any, Any]]) -> View:
        present = sorted(by_source)
        first = by_source[present[0]][1]
        middle = (first.min(axis=0) + first.max(axis=0)) / 2
        centres = np.concatenate([by_source[number][1] for number in present])
        return View(
            tuple(
                by_source[at][0] if at in by_source else np.empty((0, source.dim), np.float32)
                for at, source in enumerate(self.sources)
            ),
            np.repeat(present, [len(by_source[number][0]) for number in present]).astype(np.int64),
            ((centres - middle) / self.sources[present[0]].tile_um).astype(np.float32),
            np.concatenate([by_source[number][2] for number in present]).astype(np.int64),
        )

    def _match(self, store: BagStore, at: int) -> int:
        digest, transform = (store.meta.get(f"{x}_digest") for x in ("encoder", "transform"))
        fits = []
        for number, source in enumerate(self.sources):
            alike = source.dim == store.dim and abs(source.tile_um / store.tile_um - 1) < 0.02
            for mine, theirs in (
                (source.encoder_digest, digest),
                (source.transform_digest, transform),
                (source.pooling, store.meta.get("pooling")),
            ):
                alike = alike and (not mine or not theirs or mine == theirs)
            if alike:
                fits.append(number)
        if not fits:
            known = "; ".join(
                f"{s.name}: {s.dim} features of tiles of {s.tile_um:g} µm" for s in self.sources
            )
            raise InputError(
                f"{self.name} was trained on {known}, and bag store {at + 1} has {store.dim} "
                f"features of '{store.meta.get('encoder')}' of tiles of {store.tile_um:g} µm: "
                "another tile encoder, transform or scale"
            )
        return fits[0]


def open_slide_encoder(folder: str | Path, device: str = "cpu") -> OpenSlideEncoder:
    """Opens a slide encoder folder.

    Args:
        folder: that `eosin pretrain slides` wrote.
        device: where it runs.

    Raises:
        InputError: it is none, or a file is not what the folder's sums say.
    """
    path = Path(folder)
    tensors, config = read_weights(path), read_config(path)
    model = SlideModelConfig(**config["model"])
    sources = [SourceRecord(**source) for source in config["sources"]]
    where = torch.device(device)
    shapes = [SourceShape(source.name, source.dim) for source in sources]
    with torch.device("meta"):
        network = SlideEncoder(model, shapes, choose_attention("auto", where, torch.float32))
    network.load_state_dict({n: t.to(where) for n, t in tensors.items()}, assign=True)
    groups = frozenset(config["training"]["group_digests"])
    return OpenSlideEncoder(network.requires_grad_(False), sources, path.name, groups)


def digest_of_group(group: str) -> str:
    """What stands for a group in the folder, so that no patient is named in it."""
    return hashlib.sha256(group.encode()).hexdigest()[:16]


def read_config(folder: Path) -> dict[str, Any]:
    """What the folder says of its encoder.

    Raises:
        InputError: it is no slide encoder folder.
    """
    try:
        found: dict[str, Any] = read_json(folder / CONFIG)
        if found["slide_encoder"] != SCHEMA:
            raise InputError(
                f"{folder} was written by another version of eosin ({found['slide_encoder']})"
            )
        known = {field.name for field in dataclasses.fields(SlideModelConfig)}
        if set(found["model"]) != known:
            raise InputError(f"{folder / CONFIG}: 'model' is not what eosin writes")
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder} is no slide encoder folder ({error}); 'eosin pretrain slides' writes one"
        ) from error
    return found


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Its tensors, after their sum was checked.

    Raises:
        InputError: there are none, or they are not what was written.
    """
    path = folder / WEIGHTS
    try:
        lines = (folder / SUMS).read_text().splitlines()
        said = {line[66:]: line[:64] for line in lines}
        if hashlib.sha256(path.read_bytes()).hexdigest() != said.get(WEIGHTS):
            raise InputError(f"{path} is damaged: its sum is not that of {SUMS}")
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(
            f"{folder} is no slide encoder folder ({error}); 'eosin pretrain slides' writes one"
        ) from error
    return tensors
