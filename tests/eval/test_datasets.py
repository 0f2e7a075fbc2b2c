"""Public datasets on tiny imitations of their owners' layouts; tars and HDF5 as tasks."""

import gzip
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import webdataset
from PIL import Image

from eosin.configs.errors import InputError
from eosin.eval.archives import ARCHIVES, check_archives
from eosin.eval.datasets import DATASETS, list_dataset
from eosin.eval.listing import Listing
from eosin.eval.tasks import Task, TaskConfig, load_task

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    generator = np.random.default_rng(0)

    def tiles(*names: str) -> None:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)

    return tiles


def facts(listing: Listing) -> dict[str, tuple[str, str | None, str | None]]:
    """Label, group and split by tile."""
    n = len(listing.tile_ids)
    groups, splits = listing.groups or [None] * n, listing.splits or [None] * n
    return dict(
        zip(listing.tile_ids, zip(listing.labels, groups, splits, strict=True), strict=True)
    )


def test_bach(tmp_path: Path, write: Write) -> None:
    root = "ICIAR2018_BACH_Challenge/Photos"
    names = [f"{c}/{c[:2].lower()}{i:03d}.tif" for c in ("Benign", "InSitu") for i in range(30)]
    write(*(f"{root}/{name}" for name in names))
    found = facts(list_dataset("bach", tmp_path))
    assert found["Benign/be000.tif"] == ("Benign", None, "train")
    # the 42nd to 59th file and the 61st on are held out: InSitu 11 to 28
    held_out = sorted(name for name, (_, _, split) in found.items() if split == "test")
    assert held_out == [f"InSitu/in{i:03d}.tif" for i in range(11, 29)]


def test_bracs(tmp_path: Path, write: Write) -> None:
    root = "BRACS_RoI/latest_version"
    write(f"{root}/train/0_N/BRACS_264_N_1.png", f"{root}/val/6_IC/BRACS_9_IC_2.png")
    assert facts(list_dataset("bracs", tmp_path)) == {
        "train/0_N/BRACS_264_N_1.png": ("N", "BRACS_264", "train"),
        "val/6_IC/BRACS_9_IC_2.png": ("IC", "BRACS_9", "val"),
    }


def test_breakhis(tmp_path: Path, write: Write) -> None:
    root = "BreaKHis_v1/histology_slides/breast"
    a = "benign/SOB/adenosis/SOB_B_A_14-22549AB/40X/SOB_B_A-14-22549AB-40-001.png"
    b = "malignant/SOB/ductal_carcinoma/SOB_M_DC_14-2523/40X/SOB_M_DC-14-2523-40-010.png"
    other = a.replace("/40X/", "/100X/").replace("-40-", "-100-")
    write(*(f"{root}/{name}" for name in (a, b, other)))
    assert facts(list_dataset("breakhis", tmp_path)) == {
        f"breast/{a}": ("A", "22549AB", "train"),
        f"breast/{b}": ("DC", "2523", "test"),
    }


@pytest.mark.parametrize(
    ("name", "train"),
    [("crc-100k", "NCT-CRC-HE-100K"), ("crc-100k-nonorm", "NCT-CRC-HE-100K-NONORM")],
)
def test_crc(tmp_path: Path, write: Write, name: str, train: str) -> None:
    write(f"{train}/ADI/ADI-AAAF.tif", "CRC-VAL-HE-7K/TUM/TUM-TCGA-X.tif", "other/ADI/x.tif")
    listing = list_dataset(name, tmp_path)
    assert facts(listing) == {
        f"{train}/ADI/ADI-AAAF.tif": ("ADI", None, "train"),
        "CRC-VAL-HE-7K/TUM/TUM-TCGA-X.tif": ("TUM", None, "test"),
    }
    assert (
        "{'train': 1, 'test': 1} tiles here, {'train': 100000, 'test': 7180}" in listing.notes[-1]
    )


def test_gleason(tmp_path: Path, write: Write) -> None:
    write(
        "train_validation_patches_750/ZT111_4_A_1_12/ZT111_4_A_1_12_patch_3_class_0.jpg",
        "train_validation_patches_750/ZT76_39_A_1_1/ZT76_39_A_1_1_patch_7_class_2.jpg",
        "test_patches_750/patho_1/ZT80_38_A_1_1/ZT80_38_A_1_1_patch_9_class_3.jpg",
        "test_patches_750/patho_2/ZT80_38_A_1_1/ZT80_38_A_1_1_patch_9_class_1.jpg",
    )
    assert set(facts(list_dataset("gleason", tmp_path)).values()) == {
        ("benign", "ZT111_4_A_1_12", "train"),
        ("gleason_4", "ZT76_39_A_1_1", "val"),
        ("gleason_5", "ZT80_38_A_1_1", "test"),
    }


def test_mhist(tmp_path: Path, write: Write) -> None:
    write("images/MHIST_aaa.png", "images/MHIST_aab.png")
    (tmp_path / "annotations.csv").write_text(
        "Image Name,Majority Vote Label,Number of Annotators,Partition\n"
        "MHIST_aaa.png,SSA,6,train\nMHIST_aab.png,HP,0,test\n"
    )
    assert facts(list_dataset("mhist", tmp_path)) == {
        "images/MHIST_aaa.png": ("SSA", None, "train"),
        "images/MHIST_aab.png": ("HP", None, "test"),
    }
    (tmp_path / "images/MHIST_aab.png").unlink()
    with pytest.raises(InputError, match="1 of 2 tiles do not exist"):
        list_dataset("mhist", tmp_path)


@pytest.mark.parametrize("meta", [True, False])
def test_pcam(tmp_path: Path, meta: bool) -> None:
    generator = np.random.default_rng(0)
    pixels = {}
    for split in ("train", "valid", "test"):
        stem = tmp_path / f"camelyonpatch_level_2_split_{split}"
        pixels[split] = generator.integers(0, 256, (3, 96, 96, 3), dtype=np.uint8)
        with h5py.File(f"{stem}_x.h5", "w") as file:
            file["x"] = pixels[split]
        with h5py.File(f"{stem}_y.h5", "w") as file:
            file["y"] = np.array([0, 1, 1], np.uint8).reshape(3, 1, 1, 1)
        if meta:
            lines = [f"{i},True,True,camelyon16_{split}_{i // 2},0,0" for i in range(3)]
            header = ",tumor_patch,center_tumor_patch,wsi,coord_x,coord_y"
            Path(f"{stem}_meta.csv").write_text("\n".join([header, *lines]) + "\n")
    listing = list_dataset("pcam", tmp_path)
    group = "camelyon16_valid_1" if meta else None
    assert facts(listing)["valid-000002"] == ("tumour", group, "val")
    row = listing.tile_ids.index("test-000001")
    np.testing.assert_array_equal(listing.images[row].read(), pixels["test"][1])
    (tmp_path / "camelyonpatch_level_2_split_test_x.h5").unlink()
    with pytest.raises(InputError, match=r"test_x\.h5 does not exist; unzip"):
        list_dataset("pcam", tmp_path)


def test_unitopatho(tmp_path: Path, write: Write) -> None:
    write("800/TA.LG/a_ROI__1.png", "800/NORM/b_ROI__2.png")
    (tmp_path / "800/train.csv").write_text("image_id,wsi\na_ROI__1.png,a.ndpi\n")
    (tmp_path / "800/test.csv").write_text("image_id,wsi\nb_ROI__2.png,b.ndpi\n")
    assert facts(list_dataset("unitopatho", tmp_path)) == {
        "TA.LG/a_ROI__1.png": ("TA.LG", "a.ndpi", "train"),
        "NORM/b_ROI__2.png": ("NORM", "b.ndpi", "test"),
    }
    write("800/HP/c.png")
    with pytest.raises(InputError, match=r"neither train.csv nor test.csv knows c.png"):
        list_dataset("unitopatho", tmp_path)


def test_datasets_of_tcga_group_by_patient(tmp_path: Path, write: Write) -> None:
    slide = "TCGA-OR-A5J1-01Z-00-DX1.600C7D8C"
    write(
        f"ut/Adrenocortical_carcinoma/0/{slide}/1.jpg",
        f"ut/Adrenocortical_carcinoma/1/{slide}/1.jpg",
    )
    assert list(facts(list_dataset("tcga-ut", tmp_path / "ut")).values()) == [
        ("Adrenocortical_carcinoma", "TCGA-OR-A5J1", None)
    ]
    root = "cc/tissue_classification"
    write(f"{root}/cancer/TCGA-A3-3306-01Z_xi_1.png", f"{root}/blood/HE12_3_xi_4.png")
    assert set(facts(list_dataset("ccrcc", tmp_path / "cc")).values()) == {
        ("cancer", "TCGA-A3-3306", "train"),
        ("blood", "HE12", "test"),
    }
    write(
        "msi/CRC_DX_TRAIN/MSS/blk-AAAA-TCGA-AA-3655-01Z-00-DX1.png",
        "msi/CRC_DX_TEST/MSIMUT/blk-BBBB-TCGA-AA-3666-01Z-00-DX1.png",
    )
    assert set(facts(list_dataset("msi", tmp_path / "msi")).values()) == {
        ("MSS", "TCGA-AA-3655", "train"),
        ("MSIMUT", "TCGA-AA-3666", "test"),
    }


def test_lc25000_says_that_it_leaks_unless_groups_are_given(tmp_path: Path, write: Write) -> None:
    a = "colon_image_sets/colon_n/colonn1.jpeg"
    b = "lung_image_sets/lung_aca/lungaca1.jpeg"
    write(f"lung_colon_image_set/{a}", f"lung_colon_image_set/{b}")
    listing = list_dataset("lc25000", tmp_path)
    assert facts(listing) == {a: ("colon_n", None, None), b: ("lung_aca", None, None)}
    assert "without a groups.csv that says which, splits leak" in listing.notes[0]
    (tmp_path / "groups.csv").write_text(f"path,group\n{a},g1\n{b},g2\n")
    assert list_dataset("lc25000", tmp_path).groups == ["g1", "g2"]
    (tmp_path / "groups.csv").write_text(f"path,group\n{a},g1\n")
    with pytest.raises(InputError, match="says no group for 1 tiles, such as lung_image_sets"):
        list_dataset("lc25000", tmp_path)


def test_starc9(tmp_path: Path, write: Write) -> None:
    write("Training_data/ADI/1.png", "Validation_data/SMALL/TUM/2.png")
    assert set(facts(list_dataset("starc-9", tmp_path)).values()) == {
        ("ADI", None, "train"),
        ("TUM", None, "test"),
    }


@pytest.mark.parametrize("name", DATASETS)
def test_another_folder_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        list_dataset(name, tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def zip_of(folder: Path, archive: str, *names: str) -> str:
    """Packs files of a folder into it, as an owner publishes them; the MD5 of that."""
    with zipfile.ZipFile(folder / archive, "w") as file:
        for name in names:
            file.write(folder / name, name)
    return hashlib.md5((folder / archive).read_bytes()).hexdigest()


def test_archives_are_held_against_what_is_published_and_tiles_against_archives(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = "NCT-CRC-HE-100K/ADI/ADI-A.tif"
    write(tile, "CRC-VAL-HE-7K/ADI/ADI-B.tif")
    assert any(
        "none of its archives is here" in n for n in list_dataset("crc-100k", tmp_path).notes
    )
    md5 = zip_of(tmp_path, "NCT-CRC-HE-100K.zip", tile)
    with pytest.raises(InputError, match=rf"has the MD5 {md5}, and 6fd702d1"):
        list_dataset("crc-100k", tmp_path)
    published = {**ARCHIVES["crc-100k"], "NCT-CRC-HE-100K.zip": md5}
    monkeypatch.setitem(ARCHIVES, "crc-100k", published)
    notes = "\n".join(list_dataset("crc-100k", tmp_path).notes)
    assert "NCT-CRC-HE-100K.zip has its published MD5, and 1 files are as in it" in notes
    assert "no archive is here to check the rest: CRC-VAL-HE-7K.zip" in notes
    data = bytearray((tmp_path / tile).read_bytes())
    data[-1] ^= 1
    (tmp_path / tile).write_bytes(data)
    with pytest.raises(InputError, match=r"ADI-A\.tif is not as in NCT-CRC-HE-100K\.zip"):
        list_dataset("crc-100k", tmp_path)
    (tmp_path / tile).unlink()
    write("NCT-CRC-HE-100K/ADI/ADI-C.tif")
    with pytest.raises(InputError, match=r"ADI-A\.tif is missing"):
        list_dataset("crc-100k", tmp_path)


def test_an_unpacked_gzip_file_is_held_against_its_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "camelyonpatch_level_2_split_test_y.h5"
    packed = gzip.compress(b"labels" * 1000)
    (tmp_path / f"{name}.gz").write_bytes(packed)
    md5 = hashlib.md5(packed).hexdigest()
    monkeypatch.setitem(ARCHIVES, "pcam", {f"{name}.gz": md5})
    (tmp_path / name).write_bytes(b"labels" * 1000)
    assert check_archives("pcam", tmp_path) == [
        f"{name}.gz has its published MD5, and 1 files are as in it"
    ]
    (tmp_path / name).write_bytes(b"labelS" * 1000)
    with pytest.raises(InputError, match="is not as in"):
        check_archives("pcam", tmp_path)


def test_another_task_than_the_digest_says_is_refused(tmp_path: Path) -> None:
    write_samples(tmp_path)
    digest = load_task(TaskConfig(tiles=tmp_path), seed=0).digest
    assert load_task(TaskConfig(tiles=tmp_path, digest=digest), seed=0).digest == digest
    with pytest.raises(InputError, match=r"is another task than task\.digest=abc: "):
        load_task(TaskConfig(tiles=tmp_path, digest="abc"), seed=0)


def write_samples(root: Path) -> dict[str, bytes]:
    """A WebDataset of 24 samples in two splits, by its own writer; the bytes by key."""
    generator, images = np.random.default_rng(1), {}
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        with webdataset.TarWriter(str(root / split / "000.tar")) as writer:
            for i in range(12):
                buffer = io.BytesIO()
                pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(buffer, "PNG")
                label = {"label": "ab"[i % 2], "group": f"{split}{i // 3}"}
                writer.write({"__key__": f"tile{i}", "png": buffer.getvalue(), "json": label})
                images[f"{split}/000.tar/tile{i}"] = buffer.getvalue()
    return images


def test_a_webdataset_is_a_task(tmp_path: Path) -> None:
    images = write_samples(tmp_path)
    task = load_task(TaskConfig(tiles=tmp_path), seed=0)
    assert task.classes == ["a", "b"] and task.tile_ids == sorted(images)
    splits = task.splits.tolist()
    for row, tile_id in enumerate(task.tile_ids):
        expected = np.asarray(Image.open(io.BytesIO(images[tile_id])))
        np.testing.assert_array_equal(task.images[row].read(), expected)
        assert splits[row] == "test" if tile_id.startswith("test") else splits[row] != "test"
    assert {g for g, s in zip(task.groups, splits, strict=True) if s == "test"} == {
        f"test{i}" for i in range(4)
    }


def test_tars_that_are_no_labelled_samples_are_refused_by_name(tmp_path: Path) -> None:
    def tar(**members: bytes) -> Path:
        path = tmp_path / "x.tar"
        with tarfile.open(path, "w") as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name.replace("_", "."))
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return path

    tar(a_png=b"x")
    with pytest.raises(InputError, match="sample 'a' has no label"):
        load_task(TaskConfig(tiles=tmp_path), 0)
    tar(a_cls=b"1")
    with pytest.raises(InputError, match="sample 'a' has a label and no image"):
        load_task(TaskConfig(tiles=tmp_path), 0)
    tar(
        a_png=b"x", a_json=json.dumps({"label": "u", "group": "g"}).encode(), b_png=b"y", b_cls=b"v"
    )
    with pytest.raises(InputError, match="b has no group, though other samples have one"):
        load_task(TaskConfig(tiles=tmp_path), 0)
    tar(a_png=b"x").write_bytes(b"no tar at all" * 100)
    with pytest.raises(InputError, match="no readable WebDataset tar"):
        load_task(TaskConfig(tiles=tmp_path), 0)


def hdf5_task(path: Path, **arrays: np.ndarray) -> Task:
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
    return load_task(TaskConfig(tiles=path), seed=0)


def test_hdf5_is_a_task(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    y, group = np.arange(24) % 2, np.array([f"p{i // 2}".encode() for i in range(24)])
    task = hdf5_task(tmp_path / "a.h5", x=x, y=y, group=group)
    assert task.classes == ["0", "1"] and task.groups[3] == "p1"
    np.testing.assert_array_equal(task.images[5].read(), x[5])
    with pytest.raises(InputError, match="'y' holds 23 values for 24 tiles"):
        hdf5_task(tmp_path / "b.h5", x=x, y=y[:23])
    with pytest.raises(InputError, match=r"'x' is float64 \[24, 8, 8, 3\], not uint8"):
        hdf5_task(tmp_path / "c.h5", x=x / 255, y=y)
    with pytest.raises(InputError, match="has no array 'x'; it has y"):
        hdf5_task(tmp_path / "d.h5", y=y)
    (tmp_path / "e.h5").write_bytes(b"nothing")
    with pytest.raises(InputError, match="no readable HDF5 file"):
        load_task(TaskConfig(tiles=tmp_path / "e.h5"), 0)
