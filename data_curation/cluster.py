"""The verb `cluster`: a feature store to clusters, clusters of clusters, and clusters in slides.

OUT holds ``clusters.parquet`` (`manifest.CLUSTERS`, in the order of the store), ``centroids_1.npy``
and on (float32 [K, D], in the space of the features), and ``clusters.json``, written last. Every
iteration of the first level is kept until then, so a killed command goes on there.
"""

import itertools
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save

from eosin.configs.errors import InputError
from eosin.data_curation.cluster_config import (
    MARKER_NAME,
    TABLE_NAME,
    ClusterConfig,
    ClusterOptions,
)
from eosin.data_curation.features import FeatureStore, open_features
from eosin.data_curation.hierarchy import build_level
from eosin.data_curation.kmeans import Progress, distances
from eosin.data_curation.kmeans_fit import FitSettings, fit
from eosin.data_curation.kmeans_points import share_of
from eosin.data_curation.manifest import CLUSTERS, write_table
from eosin.launch.artefacts import is_done, mark_done, replacing, stamp_of, write_bytes
from eosin.launch.process import World, choose_device, join_world
from eosin.launch.progress import Meter, format_seconds

FORMAT = 1
"""Raise it when the same features and config give other clusters."""
TILES_PER_CLUSTER = 200
"""Of the finest level where `levels` is left empty."""
_WORK = ".work"
_WAIT_S = 24 * 3600.0  # for the other ranks


def cluster(config: ClusterConfig) -> None:
    """Clusters what is not clustered yet; as one process, or as several that share the rows.

    Raises:
        InputError: there are no features, fewer than clusters, or one is not finite; or they do not
            lie slide by slide, and `within_slide` asks for it.
    """
    store = open_features(config.features)
    if config.within_slide and store.offsets is None:
        raise InputError(
            f"{config.features} does not lie slide by slide: within_slide is for tiles"
        )
    levels = resolve_levels(config, len(store.features))
    stamp = stamp_for(config, store, levels)
    device = choose_device(config.device)
    with join_world(device, timeout_s=_WAIT_S) as world:
        if not world.agreed(_is_finished(config.out, stamp)):
            _cluster(config, store, levels, stamp, device, world)
        elif world.leads:
            print(f"cluster: {config.out} is up to date")


def plan(config: ClusterConfig) -> str:
    """What `cluster` would do."""
    store = open_features(config.features)
    n, dim = store.features.shape
    levels = resolve_levels(config, n)
    fitted = min(n, config.points_per_centroid * levels[0]) if config.points_per_centroid else n
    flops = 2.0 * levels[0] * dim * (config.iterations * fitted + n)
    return (
        f"{n} tiles × {dim} features in {' > '.join(map(str, levels))} clusters; at most "
        f"{flops:.2g} operations on the first level, before what bounds save"
    )


def resolve_levels(options: ClusterOptions, n_rows: int) -> list[int]:
    """The clusters of each level.

    Raises:
        InputError: more clusters than tiles.
    """
    levels = options.levels or [max(1, n_rows // TILES_PER_CLUSTER)]
    if n_rows < levels[0]:
        raise InputError(f"levels={levels}: {n_rows} tiles cannot have {levels[0]} clusters")
    return levels


def settings_of(options: ClusterOptions) -> FitSettings:
    """Of the first level's fit."""
    return FitSettings(
        iterations=options.iterations,
        tolerance=options.tolerance,
        points_per_centroid=options.points_per_centroid,
        seed=options.seed,
    )


def stamp_for(options: ClusterOptions, store: FeatureStore, levels: list[int]) -> str:
    """The stamp of the finished clusters; the device is not part of it."""
    keys = ("iterations", "tolerance", "points_per_centroid", "cosine", "resamples", "closest")
    chosen = {name: getattr(options, name) for name in (*keys, "within_slide", "seed")}
    return stamp_of(
        stage="cluster", format=FORMAT, features=store.meta["stamp"], levels=levels, **chosen
    )


def _is_finished(out: Path, stamp: str) -> bool:
    return is_done(out / MARKER_NAME, stamp) and (out / TABLE_NAME).is_file()


def _cluster(
    config: ClusterConfig,
    store: FeatureStore,
    levels: list[int],
    stamp: str,
    device: torch.device,
    world: World,
) -> None:
    started = time.monotonic()
    work = _Work(config.out / _WORK, stamp, world)
    n = len(store.features)
    with Meter(f"cluster {n} tiles", config.iterations, "iterations", shown=world.leads) as meter:

        def save_progress(progress: Progress) -> None:
            meter.advance(progress.iterations - meter.done, note=f"inertia {progress.inertia:.6g}")
            work.save(progress)

        try:
            found = fit(
                store.features,
                levels[0],
                settings_of(config),
                world=world,
                device=device,
                unit=config.cosine,
                begin=work.load(device),
                save=save_progress,
            )
        except ValueError as error:
            raise InputError(f"{config.features}: {error}") from error
    placed = torch.from_numpy(found.centroids).to(device)
    columns = {
        "level_1": found.labels.cpu().numpy(),
        "distance": distances(found.points, placed, found.labels).cpu().numpy(),
    }
    if config.within_slide:
        columns |= _within_slides(config, store, device, world)
    work.keep_rows(columns)
    world.barrier()
    if world.leads:
        centroids = [found.centroids + found.frame.centre]
        parents: list[NDArray[np.int32]] = []
        for k in levels[1:]:
            level = build_level(
                centroids[-1],
                k,
                settings_of(config),
                resamples=config.resamples,
                closest=config.closest,
                device=device,
            )
            centroids.append(level.centroids)
            parents.append(level.parents)
        table = _table(store, work.all_rows(), parents)
        facts = {"inertia": found.inertia, "iterations": found.iterations, "levels": levels}
        _write(config.out, table, centroids, stamp, facts | {"repaired": found.repaired})
        work.remove()
        seconds = format_seconds(time.monotonic() - started)
        print(
            f"cluster: {n} tiles in {' > '.join(map(str, levels))} clusters, "
            f"{found.iterations} iterations, mean squared distance {found.inertia:.4g}, "
            f"in {seconds} → {config.out}"
        )
    world.barrier()


class _Work:
    """What a killed command goes on from, and what the ranks hand to the first."""

    def __init__(self, folder: Path, stamp: str, world: World) -> None:
        self.folder, self.world = folder, world
        if world.leads and not is_done(folder / "stamp.json", stamp):
            shutil.rmtree(folder, ignore_errors=True)
            mark_done(folder / "stamp.json", stamp)
        world.barrier()

    def save(self, progress: Progress) -> None:
        """Rank 0 writes it down."""
        if self.world.leads:
            numbers = [progress.iterations, progress.inertia, progress.repaired, progress.is_last]
            state = {
                "centroids": progress.centroids.cpu(),
                "numbers": torch.tensor(numbers, dtype=torch.float64),
            }
            write_bytes(self.folder / "progress.safetensors", save(state))

    def load(self, device: torch.device) -> Progress | None:
        """What was written down, the same on every rank."""
        path = self.folder / "progress.safetensors"
        if not self.world.agreed(path.is_file()):
            return None
        try:
            state = load_file(path)
        except OSError as error:
            raise InputError(
                f"rank {self.world.rank} cannot read {path}, which rank 0 wrote: out must lie on "
                "storage that all processes share"
            ) from error
        iterations, inertia, repaired, is_last = state["numbers"].tolist()
        self.world.barrier()  # before rank 0 writes the next
        return Progress(
            state["centroids"].to(device), int(iterations), inertia, int(repaired), bool(is_last)
        )

    def keep_rows(self, columns: dict[str, NDArray[Any]]) -> None:
        """This rank's rows of the table."""
        state = {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in columns.items()}
        write_bytes(self.folder / f"rows_{self.world.rank:05d}.safetensors", save(state))

    def all_rows(self) -> dict[str, NDArray[Any]]:
        """The rows of all ranks, in their order."""
        parts = [
            load_file(self.folder / f"rows_{rank:05d}.safetensors")
            for rank in range(self.world.size)
        ]
        return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def _within_slides(
    config: ClusterConfig, store: FeatureStore, device: torch.device, world: World
) -> dict[str, NDArray[Any]]:
    """Clusters of each slide alone: this rank's rows of ``slide_cluster`` and ``slide_distance``.

    A slide whose rows lie in the shares of two ranks is fitted by both, with the same result.
    """
    assert store.offsets is not None  # `cluster` has seen to it
    n, mine = len(store.features), share_of(len(store.features), world)
    clusters, apart = np.full(n, -1, np.int32), np.zeros(n, np.float32)
    bags = list(itertools.pairwise(store.offsets.tolist()))
    touched = [bag for bag in bags if bag[0] < mine.stop and bag[1] > mine.start]
    with Meter("cluster slides", len(touched), "slides", shown=world.leads) as meter:
        for start, stop in touched:
            rows = store.features[start:stop]
            k = min(config.within_slide, stop - start)
            found = fit(
                rows, k, settings_of(config), world=World(), device=device, unit=config.cosine
            )
            placed = torch.from_numpy(found.centroids).to(device)
            clusters[start:stop] = found.labels.cpu().numpy()
            apart[start:stop] = distances(found.points, placed, found.labels).cpu().numpy()
            meter.advance(1)
    span = slice(mine.start, mine.stop)
    return {"slide_cluster": clusters[span], "slide_distance": apart[span]}


def _table(
    store: FeatureStore, rows: dict[str, NDArray[Any]], parents: list[NDArray[np.int32]]
) -> pa.Table:
    """As `manifest.CLUSTERS`, with the further levels and the slides' clusters behind."""
    slides = store.rows["slide_id"].fill_null("")
    columns: dict[str, Any] = {"tile_id": store.rows["tile_id"], "slide_id": slides}
    columns["level_1"], columns["distance"] = rows["level_1"], rows["distance"]
    label = rows["level_1"]
    for number, above in enumerate(parents, start=2):
        label = above[label]
        columns[f"level_{number}"] = label
    for name in ("slide_cluster", "slide_distance"):
        if name in rows:
            columns[name] = rows[name]
    return pa.table(columns)


def _write(
    out: Path,
    table: pa.Table,
    centroids: list[NDArray[np.float32]],
    stamp: str,
    facts: dict[str, Any],
) -> None:
    (out / MARKER_NAME).unlink(missing_ok=True)
    for old in out.glob("centroids_*.npy"):
        old.unlink()
    for number, values in enumerate(centroids, start=1):
        with replacing(out / f"centroids_{number}.npy") as partial, partial.open("wb") as file:
            np.save(file, values, allow_pickle=False)
    write_table(table, out / TABLE_NAME, CLUSTERS)
    sizes = np.bincount(table["level_1"].to_numpy(), minlength=len(centroids[0]))
    mark_done(
        out / MARKER_NAME,
        stamp,
        tiles=table.num_rows,
        largest=int(sizes.max()),
        median=float(np.median(sizes)),
        empty=int((sizes == 0).sum()),
        **facts,
    )
