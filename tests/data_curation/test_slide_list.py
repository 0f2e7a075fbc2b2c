from pathlib import Path

import pytest

from eosin.configs.errors import InputError
from eosin.data_curation.slide_list import list_slides


def touch(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def table(folder: Path, text: str) -> Path:
    return touch(folder / "slides.csv", text.encode())


def test_a_folder_is_searched_for_slides_and_nothing_else(tmp_path: Path) -> None:
    for name in ("b.SVS", "deep/a.x.ndpi", "notes.txt", ".hidden.svs", "mask.png"):
        touch(tmp_path / name)
    sources = list_slides(tmp_path)
    assert [source.slide_id for source in sources] == ["a_x", "b"]
    assert [source.group for source in sources] == ["a_x", "b"]
    assert all(source.path.is_absolute() and source.mpp is None for source in sources)


def test_the_files_of_a_dicom_series_are_one_slide(tmp_path: Path) -> None:
    def dicom(uid: bytes) -> bytes:
        return b"\0" * 128 + b"DICM" + b"\x20\x00\x0e\x00UI" + len(uid).to_bytes(2, "little") + uid

    touch(tmp_path / "one" / "1.dcm", dicom(b"1.2.3"))
    touch(tmp_path / "one" / "2.dcm", dicom(b"1.2.3"))
    touch(tmp_path / "two" / "1.dcm", dicom(b"1.2.4"))
    touch(tmp_path / "two" / "2.dcm", dicom(b"1.2.5"))
    assert [s.slide_id for s in list_slides(tmp_path)] == ["one", "two_1", "two_2"]


def test_a_table_gives_scale_group_and_stain(tmp_path: Path) -> None:
    for name in ("a.svs", "b.svs", "c.svs"):
        touch(tmp_path / "scans" / name)
    listed = table(
        tmp_path,
        "path,mpp,mpp_x,mpp_y,group,stain\n"
        "scans/a.svs,0.5,,,p1,HE\nscans/b.svs,,0.25,0.26,,\nscans/c.svs,,,,p1,\n",
    )
    a, b, c = list_slides(listed)
    assert (a.mpp, a.group, a.stain) == ((0.5, 0.5), "p1", "HE")
    assert (b.mpp, b.group, b.stain) == ((0.25, 0.26), "b", None)
    assert (c.mpp, c.group) == (None, "p1")
    assert a.path == (tmp_path / "scans" / "a.svs").absolute()


def test_other_columns_of_a_table_are_labels(tmp_path: Path) -> None:
    touch(tmp_path / "a.svs")
    touch(tmp_path / "b.svs")
    listed = table(tmp_path, ",path,split,mpp,organ\n0,a.svs,test,,007\n1,b.svs,,,\n")
    a, b = list_slides(listed)
    assert a.labels == {"split": "test", "organ": "007"}
    assert b.labels == {"split": None, "organ": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file\nx\n", "no column 'path'"),
        ("path\n", "no rows"),
        ("path\nmissing.svs\n", r"missing.svs \(line 2\)"),
        ("path,mpp\na.svs,half\n", "line 2: mpp 'half'"),
        ("path,mpp\na.svs,-1\n", "not a positive number"),
        ("path,mpp_x\na.svs,0.5\n", "mpp_x or mpp_y alone"),
        ("path\n\xff\xfe\n", "missing|UTF-8"),
        ("path,split,split\na.svs,test,train\n", "has the column 'split' more than once"),
        ("path,status\na.svs,done\n", "column name 'status' is reserved"),
    ],
)
def test_a_bad_table_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    touch(tmp_path / "a.svs")
    listed = touch(tmp_path / "slides.csv", text.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        list_slides(listed)


def test_two_slides_of_one_id_are_refused_by_name(tmp_path: Path) -> None:
    touch(tmp_path / "x" / "a.1.svs")
    touch(tmp_path / "y" / "a_1.svs")
    with pytest.raises(InputError, match=r"'a_1'.*a\.1\.svs.*a_1\.svs"):
        list_slides(tmp_path)


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no slide in"):
        list_slides(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        list_slides(tmp_path / "nowhere")
