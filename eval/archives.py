"""Published checksums of public datasets: of the archives, and through them of every tile.

Owners publish archives, with an MD5 each where they lie on Zenodo; nobody publishes checksums of
what comes out of them. So an archive that still lies beside its tiles is held against the published
MD5, and the tiles against the CRC-32 that the archive has of each: what is scored is then what was
published, to the last bit.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from eosin.configs.errors import InputError
from eosin.launch.progress import Meter

_ZENODO_CRC = {"CRC-VAL-HE-7K.zip": "2fd1651b4f94ebd818ebf90ad2b6ce06"}
ARCHIVES: dict[str, dict[str, str]] = {
    "bach": {"ICIAR2018_BACH_Challenge.zip": "8ae1801334aa943c44627c1eef3631b2"},
    "crc-100k": {"NCT-CRC-HE-100K.zip": "6fd702d11df6292bc054397ae038a464", **_ZENODO_CRC},
    "crc-100k-nonorm": {
        "NCT-CRC-HE-100K-NONORM.zip": "035777cf327776a71a05c95da6d6325f", **_ZENODO_CRC
    },
    "pcam": {
        "camelyonpatch_level_2_split_train_x.h5.gz": "1571f514728f59376b705fc836ff4b63",
        "camelyonpatch_level_2_split_train_y.h5.gz": "35c2d7259d906cfc8143347bb8e05be7",
        "camelyonpatch_level_2_split_valid_x.h5.gz": "d5b63470df7cfa627aeec8b9dc0c066e",
        "camelyonpatch_level_2_split_valid_y.h5.gz": "2b85f58b927af9964a4c15b8f7e8f179",
        "camelyonpatch_level_2_split_test_x.h5.gz": "d8c2d60d490dbd479f8199bdfa0cf6ec",
        "camelyonpatch_level_2_split_test_y.h5.gz": "60a7035772fbdb7f34eb86d4420cf66a",
    },
}  # fmt: skip
"""Dataset → archive → MD5. Sources: Zenodo 3632035 (bach), 1214456 (crc), as eva (71e53f0) and
others state them; torchvision (08485c0) for pcam. Of the other datasets none was found."""


@dataclass(frozen=True)
class Member:
    """A file as its archive has it."""

    path: Path
    """Where it lies when the archive is unpacked beside itself."""
    size: int
    """Bytes; modulo 2^32 in a gzip file."""
    crc: int


def check_archives(name: str, folder: Path) -> list[str]:
    """Holds archives of a dataset, where they are, against what is published and what is unpacked.

    Args:
        name: of the dataset.
        folder: of the dataset, in which its archives were unpacked and may still lie.

    Returns:
        What was and what could not be checked, a line each.

    Raises:
        InputError: an archive is not the published one, or a file is not the archive's.
    """
    published = ARCHIVES.get(name)
    if published is None:
        return [f"{name}: no checksums are published for it that we know of"]
    found = {archive: folder / archive for archive in published if (folder / archive).is_file()}
    if not found:
        return [
            f"{name}: not held against its published checksums, as none of its archives is here "
            f"({', '.join(published)})"
        ]
    notes = []
    for archive, path in found.items():
        digest = _md5(path)
        if digest != published[archive]:
            raise InputError(
                f"{path} has the MD5 {digest}, and {published[archive]} is published: download it "
                "again, or remove it if these tiles are another version"
            )
        members = list(_members(path))
        for member in members:
            _check_member(member, path)
        notes.append(f"{archive} has its published MD5, and {len(members)} files are as in it")
    absent = [archive for archive in published if archive not in found]
    if absent:
        notes.append(f"{name}: no archive is here to check the rest: {', '.join(absent)}")
    return notes


def _md5(path: Path) -> str:
    state = hashlib.md5(usedforsecurity=False)
    megabytes = path.stat().st_size >> 20
    with path.open("rb") as file, Meter(f"checksum of {path.name}", megabytes, "MB") as meter:
        while block := file.read(1 << 23):
            state.update(block)
            meter.advance(len(block) >> 20)
    return state.hexdigest()


def _members(path: Path) -> Iterator[Member]:
    if path.suffix == ".gz":
        with path.open("rb") as file:  # a gzip file ends with CRC-32 and size, RFC 1952
            file.seek(-8, 2)
            tail = file.read(8)
        crc, size = int.from_bytes(tail[:4], "little"), int.from_bytes(tail[4:], "little")
        yield Member(path.with_suffix(""), size, crc)
        return
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            hidden = any(part.startswith((".", "__")) for part in Path(info.filename).parts)
            if not info.is_dir() and not hidden:
                yield Member(path.parent / info.filename, info.file_size, info.CRC)


def _check_member(member: Member, archive: Path) -> None:
    if not member.path.is_file():
        raise InputError(f"{member.path} is missing, and {archive.name} has it: unpack it again")
    crc, size = 0, 0
    with member.path.open("rb") as file:
        while block := file.read(1 << 22):
            crc, size = zlib.crc32(block, crc), size + len(block)
    if (crc, size % (1 << 32)) != (member.crc, member.size % (1 << 32)):
        raise InputError(f"{member.path} is not as in {archive.name}: unpack it again")
