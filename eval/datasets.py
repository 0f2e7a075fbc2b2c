"""Public datasets, each in the layout in which its owner publishes it.

A dataset is a function from its folder to a `Listing`, with what is known of it. Published splits
are taken; where an owner or a benchmark has but one held-out split, that is test here, and val is
carved out of train by group, so that nothing is chosen on what is reported. A file ``groups.csv``
(path, group) in the folder says what the names of tiles do not: which of them belong together.

A new dataset is a function here and a line in `DATASETS`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eosin.configs.errors import InputError
from eosin.data_curation.embed import FileTile
from eosin.data_curation.images import read_text_table
from eosin.eval.archives import check_archives
from eosin.eval.hdf5_tiles import Hdf5Tile, count_tiles, read_column
from eosin.eval.listing import Listing, images_below, refuse_missing

TCGA_PATIENT = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What is known of a dataset."""

    read: Callable[[Path], Listing]
    about: str
    """Whose it is, its licence where its owner states one, and what to beware of."""
    tiles: dict[str, int]
    """Published sizes of splits; another size is a note, as owners publish new versions."""


def list_dataset(name: str, folder: Path) -> Listing:
    """The tiles of a public dataset.

    Raises:
        InputError: the folder is not laid out as its owner publishes it, or holds other bytes.
    """
    dataset = DATASETS[name]
    listing = _with_groups(dataset.read(folder), folder)
    notes = [f"{name}: {dataset.about}", *check_archives(name, folder)]
    splits = listing.splits or ["all"] * len(listing.tile_ids)
    found = {split: splits.count(split) for split in dataset.tiles}
    if found != dataset.tiles:
        notes.append(f"{name} has {found} tiles here, {dataset.tiles} as published")
    return replace(listing, notes=[*listing.notes, *notes])


def _with_groups(listing: Listing, folder: Path) -> Listing:
    table = folder / "groups.csv"
    if not table.is_file():
        return listing
    rows = read_text_table(table, ("path", "group"))
    known = dict(zip(rows["path"].to_pylist(), rows["group"].to_pylist(), strict=True))
    missing = [tile_id for tile_id in listing.tile_ids if tile_id not in known]
    if missing:
        raise InputError(f"{table} says no group for {len(missing)} tiles, such as {missing[0]}")
    return replace(listing, groups=[known[tile_id] for tile_id in listing.tile_ids])


def _files(
    folder: Path,
    paths: Sequence[Path],
    label: Callable[[Path], str],
    *,
    group: Callable[[Path], str] | None = None,
    split: Callable[[Path], str] | None = None,
) -> Listing:
    """A listing of image files, each with what its path says."""
    if not paths:
        raise InputError(f"{folder} holds no tiles in the layout of this dataset")
    return Listing(
        tile_ids=[str(path) for path in paths],
        images=[FileTile(folder / path) for path in paths],
        labels=[label(path) for path in paths],
        groups=None if group is None else [group(path) for path in paths],
        splits=None if split is None else [split(path) for path in paths],
    )


def _inside(folder: Path, *names: str) -> Path:
    """The first of some sub-folders that is there, or the folder itself when it is one of them."""
    for name in names:
        if (folder / name).is_dir():
            return folder / name
        if str(folder.resolve()).endswith(f"/{name}"):
            return folder
    raise InputError(f"{folder} has no {' or '.join(names)}, as its owner publishes it")


BACH_HELD_OUT = ((41, 59), (60, 90), (139, 169), (240, 258), (260, 273), (345, 368))
"""Of all 400 files in the order of their names, those that eva holds out, by patient."""


def read_bach(folder: Path) -> Listing:
    """``ICIAR2018_BACH_Challenge/Photos/CLASS/*.tif``, with eva's held-out files."""
    photos = _inside(folder, "ICIAR2018_BACH_Challenge/Photos", "Photos")
    paths = images_below(photos)
    held_out = {path for a, b in BACH_HELD_OUT for path in paths[a:b]}
    return _files(
        photos,
        paths,
        lambda path: path.parts[0],
        split=lambda path: "test" if path in held_out else "train",
    )


def read_bracs(folder: Path) -> Listing:
    """``BRACS_RoI/latest_version/SPLIT/N_CLASS/BRACS_264_N_1.png``; a group is a slide."""
    root = _inside(folder, "BRACS_RoI/latest_version", "latest_version")
    return _files(
        root,
        images_below(root),
        lambda path: path.parts[1].partition("_")[2],
        group=lambda path: "_".join(path.name.split("_")[:2]),
        split=lambda path: path.parts[0],
    )


BREAKHIS_HELD_OUT = {
    "18842D", "16184", "8168", "4372", "16716", "9146", "21978AB", "6241", "17901", "12465",
    "3411F", "18842", "2980", "15570C", "2985", "13413", "3909", "14134E", "2523", "19854C",
    "19979", "29960CD", "21998AB", "29960AB", "14946",
}  # fmt: skip
"""eva's held-out patients, all eight classes (36b8946)."""


def read_breakhis(folder: Path) -> Listing:
    """``histology_slides/…/40X/SOB_B_A-14-22549AB-40-001.png``: 40×, eight classes, patients."""
    root = _inside(folder, "BreaKHis_v1/histology_slides", "histology_slides")
    paths = [path for path in images_below(root) if path.parent.name == "40X"]

    def patient(path: Path) -> str:
        return path.name.split("-")[2]

    return _files(
        root,
        paths,
        lambda path: path.name.split("-")[0].split("_")[-1],
        group=patient,
        split=lambda path: "test" if patient(path) in BREAKHIS_HELD_OUT else "train",
    )


def _read_crc(train: str) -> Callable[[Path], Listing]:
    def read(folder: Path) -> Listing:
        names = {train: "train", "CRC-VAL-HE-7K": "test"}
        for name in names:
            if not (folder / name).is_dir():
                raise InputError(f"{folder} has no {name}, as its owner publishes it")
        paths = [p for p in images_below(folder) if p.parts[0] in names]
        return _files(
            folder, paths, lambda path: path.parts[1], split=lambda path: names[path.parts[0]]
        )

    return read


def read_gleason(folder: Path) -> Listing:
    """Arvaniti's ``train_validation_patches_750`` and ``test_patches_750/patho_1``; cores."""
    arrays = {"ZT111": "train", "ZT199": "train", "ZT204": "train", "ZT76": "val"}
    paths = [
        path
        for path in images_below(folder)
        if path.parts[0] == "train_validation_patches_750"
        or path.parts[:2] == ("test_patches_750", "patho_1")
    ]
    names = ("benign", "gleason_3", "gleason_4", "gleason_5")
    return _files(
        folder,
        paths,
        lambda path: names[int(path.stem.split("_")[-1])],
        group=lambda path: path.stem.partition("_patch")[0],
        split=lambda path: arrays.get(path.name.split("_")[0], "test"),
    )


def read_mhist(folder: Path) -> Listing:
    """``annotations.csv`` and ``images/``; one image a polyp or more, patients not published."""
    rows = read_text_table(
        folder / "annotations.csv", ("Image Name", "Majority Vote Label", "Partition")
    )
    names = rows["Image Name"].to_pylist()
    paths = [folder / "images" / name for name in names]
    refuse_missing(paths, folder / "annotations.csv")
    return Listing(
        tile_ids=[f"images/{name}" for name in names],
        images=[FileTile(path) for path in paths],
        labels=rows["Majority Vote Label"].to_pylist(),
        splits=rows["Partition"].to_pylist(),
    )


def read_pcam(folder: Path) -> Listing:
    """``camelyonpatch_level_2_split_SPLIT_{x,y}.h5``, unzipped, and the slides of ``_meta.csv``."""
    tile_ids, images, labels, splits = [], [], [], []
    groups: list[str] | None = []
    for published, split in {"train": "train", "valid": "val", "test": "test"}.items():
        stem = f"camelyonpatch_level_2_split_{published}"
        file = folder / f"{stem}_x.h5"
        if not file.is_file():
            raise InputError(f"{file} does not exist; unzip PCam's files as they are published")
        count = count_tiles(file, "x")
        tile_ids += [f"{published}-{i:06d}" for i in range(count)]
        images += [Hdf5Tile(file, i) for i in range(count)]
        answers = read_column(folder / f"{stem}_y.h5", "y", count)
        labels += ["tumour" if int(float(y)) else "normal" for y in answers]
        splits += [split] * count
        meta = folder / f"{stem}_meta.csv"
        if groups is not None and meta.is_file():
            groups += read_text_table(meta, ("wsi",))["wsi"].to_pylist()
        else:
            groups = None
    return Listing(
        tile_ids=tile_ids, images=list(images), labels=labels, groups=groups, splits=splits
    )


def read_unitopatho(folder: Path) -> Listing:
    """``800/CLASS/*.png`` with ``train.csv`` and ``test.csv`` (image_id, wsi)."""
    root = _inside(folder, "800")
    slides: dict[str, str] = {}
    splits: dict[str, str] = {}
    for split in ("train", "test"):
        rows = read_text_table(root / f"{split}.csv", ("image_id", "wsi"))
        for name, slide in zip(rows["image_id"].to_pylist(), rows["wsi"].to_pylist(), strict=True):
            slides[name], splits[name] = slide, split
    paths = images_below(root)
    unknown = [path.name for path in paths if path.name not in splits]
    if unknown:
        raise InputError(f"{root}: neither train.csv nor test.csv knows {unknown[0]}")
    return _files(
        root,
        paths,
        lambda path: path.parts[0],
        group=lambda path: slides[path.name],
        split=lambda path: splits[path.name],
    )


def _patient(path: Path) -> str:
    found = TCGA_PATIENT.search(str(path))
    return found[0] if found else path.stem.split("_")[0]


def read_tcga_ut(folder: Path) -> Listing:
    """``CLASS/0/SLIDE/*.jpg``, 0.5 µm/px; groups are patients."""
    paths = [p for p in images_below(folder) if len(p.parts) > 2 and p.parts[1] == "0"]
    return _files(folder, paths, lambda path: path.parts[0], group=_patient)


def read_ccrcc(folder: Path) -> Listing:
    """``tissue_classification/CLASS/*``: TCGA's tiles are train, Helsinki's test, as in UNI."""
    root = _inside(folder, "tissue_classification")
    return _files(
        root,
        images_below(root),
        lambda path: path.parts[0],
        group=_patient,
        split=lambda path: "train" if "TCGA" in path.name else "test",
    )


def read_lc25000(folder: Path) -> Listing:
    """``{colon,lung}_image_sets/CLASS/*.jpeg``."""
    root = folder / "lung_colon_image_set"
    root = root if root.is_dir() else folder
    paths = [p for p in images_below(root) if p.parts[0] in ("colon_image_sets", "lung_image_sets")]
    return _files(root, paths, lambda path: path.parts[1])


def read_starc9(folder: Path) -> Listing:
    """A folder that begins with train, and one with val or test; in each, one folder a class."""

    def split(path: Path) -> str:
        name = path.parts[0].lower()
        return "train" if name.startswith("train") else "test"

    paths = [p for p in images_below(folder) if re.match(r"train|val|test", p.parts[0].lower())]
    return _files(folder, paths, lambda path: path.parent.name, split=split)


def read_msi(folder: Path) -> Listing:
    """Kather's ``CRC_DX_TRAIN`` and ``CRC_DX_TEST`` with MSIMUT and MSS; groups are patients."""
    splits = {"CRC_DX_TRAIN": "train", "CRC_DX_TEST": "test"}
    paths = [p for p in images_below(folder) if p.parts[0] in splits]
    return _files(
        folder,
        paths,
        lambda path: path.parts[1],
        group=_patient,
        split=lambda path: splits[path.parts[0]],
    )


DATASETS: dict[str, Dataset] = {
    "bach": Dataset(
        read=read_bach,
        about="Aresta et al. 2019, ICIAR 2018; eva's split by patient, who is not in the names: "
        "val is carved by tile",
        tiles={"train": 268, "test": 132},
    ),
    "bracs": Dataset(
        read=read_bracs,
        about="Brancati et al. 2022, CC BY-NC; the owner's splits",
        tiles={"train": 3657, "val": 312, "test": 570},
    ),
    "breakhis": Dataset(
        read=read_breakhis,
        about="Spanhol et al. 2016, CC BY; eva's held-out patients, 40×",
        tiles={"train": 1471, "test": 524},
    ),
    "crc-100k": Dataset(
        read=_read_crc("NCT-CRC-HE-100K"),
        about="Kather et al. 2018, CC BY; colour-normalised (Macenko), and classes differ in JPEG "
        "artefacts and colour: look at the floors (arXiv 2409.11546)",
        tiles={"train": 100_000, "test": 7180},
    ),
    "crc-100k-nonorm": Dataset(
        read=_read_crc("NCT-CRC-HE-100K-NONORM"),
        about="Kather et al. 2018, CC BY; not colour-normalised: another task than crc-100k",
        tiles={"train": 100_000, "test": 7180},
    ),
    "gleason": Dataset(
        read=read_gleason,
        about="Arvaniti et al. 2018, CC0; arrays as splits, the first pathologist's labels in test",
        tiles={"train": 15_303, "val": 2482, "test": 4967},
    ),
    "mhist": Dataset(
        read=read_mhist,
        about="Wei et al. 2021, on request; patients are not published: val is carved by tile",
        tiles={"train": 2175, "test": 977},
    ),
    "pcam": Dataset(
        read=read_pcam,
        about="Veeling et al. 2018, CC0; the owner's splits",
        tiles={"train": 262_144, "val": 32_768, "test": 32_768},
    ),
    "unitopatho": Dataset(
        read=read_unitopatho,
        about="Barbano et al. 2021, CC BY; the owner's splits, 800 µm",
        tiles={"train": 6270, "test": 2399},
    ),
    "tcga-ut": Dataset(
        read=read_tcga_ut,
        about="Komura et al. 2022, CC BY-NC-SA; no splits are published with it: carved by "
        "patient. From TCGA, on which many encoders were trained",
        tiles={"all": 271_710},
    ),
    "ccrcc": Dataset(
        read=read_ccrcc,
        about="Brummer et al. 2023, CC BY; trained on TCGA, tested on Helsinki, as in UNI",
        tiles={},
    ),
    "lc25000": Dataset(
        read=read_lc25000,
        about="Borkowski et al. 2019; rotated and flipped copies of some 1,250 images: without a "
        "groups.csv that says which, splits leak and scores are worthless",
        tiles={"all": 25_000},
    ),
    "starc-9": Dataset(
        read=read_starc9,
        about="Subramanian et al. 2025, CC BY; the owner's training and validation sets; patients "
        "are not in the names",
        tiles={},
    ),
    "msi": Dataset(
        read=read_msi,
        about="Kather et al. 2019, CC BY; CRC DX, the owner's splits by patient; from TCGA",
        tiles={},
    ),
}
"""By name. Splits of eva are as in kaiko-ai/eva 05cadc7 (bach) and 36b8946 (breakhis)."""
