"""Archives whose members are not what an archive of tiles has; the records lie sound among them."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
from hostile import images
from hostile.folder import KEYS, seal, sound, write_index, write_sound


def _extended(kind: bytes, content: bytes, size: int | None = None) -> bytes:
    """A header of an extended kind (`x`, `g`, `L`), its content, and what it says of its size."""
    info = tarfile.TarInfo("extended")
    info.type, info.size = kind, len(content) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def _member(name: str, kind: bytes, target: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info.tobuf(tarfile.GNU_FORMAT)


def _with(prefix: bytes) -> Callable[[Path], None]:
    """The sound folder with headers before the records of the first shard; the index knows."""

    def build(folder: Path) -> None:
        write_sound(folder)
        tar = folder / "000000.tar"
        tar.write_bytes(prefix + tar.read_bytes())
        rows = pq.read_table(folder / "index.parquet")
        offsets = rows["offset"].to_pylist()
        moved = [at + len(prefix) if row < 4 else at for row, at in enumerate(offsets)]
        at = rows.column_names.index("offset")
        write_index(folder, rows.set_column(at, rows.schema.field("offset"), [moved]))
        seal(folder)

    return build


def _bare(folder: Path) -> None:
    """The records' bytes at their places, and zeros where the headers should be."""
    write_sound(folder)
    tar = folder / "000000.tar"
    data = bytearray(tar.read_bytes())
    for offset in pq.read_table(folder / "index.parquet")["offset"].to_pylist()[:4]:
        data[offset - 512 : offset] = bytes(512)
    tar.write_bytes(data)
    seal(folder)


def _pax(**fields: str) -> bytes:
    records = b""
    for key, value in fields.items():
        key = key.replace("_", ".")
        text = f" {key}={value}\n"
        length = len(text) + 2
        length += len(str(length)) - 2
        records += f"{length}{text}".encode()
    return records


def _compressed(folder: Path) -> None:
    """A shard that is an archive of 100 MB, compressed."""
    write_sound(folder)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as file:
        info = tarfile.TarInfo("a.jpg")
        info.size = 30_000_000
        file.addfile(info, io.BytesIO(bytes(info.size)))
    tar = folder / "000000.tar"
    tar.write_bytes(tar.read_bytes() + buffer.getvalue())
    seal(folder)


ARCHIVES: list[tuple[str, str, Callable[[Path], None], bool]] = [
    (
        "link",
        "a member that links out",
        _with(_member("l.jpg", tarfile.SYMTYPE, "/etc/passwd")),
        True,
    ),
    (
        "hard_link",
        "a hard link out",
        _with(_member("h.jpg", tarfile.LNKTYPE, "../../etc/passwd")),
        True,
    ),
    ("device", "a device", _with(_member("d.jpg", tarfile.CHRTYPE)), True),
    ("pipe", "a named pipe", _with(_member("p.jpg", tarfile.FIFOTYPE)), True),
    ("absolute", "an absolute path", _with(_member("/etc/passwd", tarfile.REGTYPE)), True),
    ("parent", "a path that climbs", _with(_member("../../x.jpg", tarfile.REGTYPE)), True),
    (
        "pax_size",
        "a size of 2^60 in a PAX header",
        _with(_extended(b"x", _pax(size=str(1 << 60)))),
        True,
    ),
    (
        "pax_text",
        "a size that is no number in a PAX header",
        _with(_extended(b"x", _pax(size="many"))),
        True,
    ),
    ("pax_bomb", "a PAX header that says it has 6 GB", _with(_extended(b"x", b"", 6 << 30)), True),
    (
        "pax_global",
        "a PAX header for all members behind it",
        _with(_extended(b"g", _pax(path="../../x"))),
        True,
    ),
    (
        "pax_encoding",
        "a PAX header in an unknown encoding",
        _with(_extended(b"x", _pax(hdrcharset="x", path="y"))),
        True,
    ),
    ("name_bomb", "a long name of 2^62 bytes", _with(_extended(b"L", b"", 1 << 62)), True),
    ("name_endless", "a long name of 2^70 bytes", _with(_extended(b"L", b"", 1 << 70)), True),
    ("name_chain", "5,000 long names in a row", _with(_extended(b"L", b"a\0") * 5000), True),
    (
        "size_back",
        "a member of -512 bytes: its own header again",
        _with(_extended(b"0", b"", -512)),
        True,
    ),
    (
        "sparse",
        "a sparse member with a map without an end",
        _with(_member("s.jpg", tarfile.GNUTYPE_SPARSE)),
        True,
    ),
    (
        "sparse_pax",
        "a sparse member of the PAX kind",
        _with(
            _extended(
                b"x",
                _pax(
                    GNU_sparse_major="1",
                    GNU_sparse_minor="0",
                    GNU_sparse_name="x",
                    GNU_sparse_realsize="1",
                ),
            )
        ),
        True,
    ),
    ("bare", "no headers, but the bytes at their places", _bare, True),
    ("appended", "a compressed archive behind the end", _compressed, False),
]
assert all(sound(key).data for key in KEYS) and images.EXECUTED
