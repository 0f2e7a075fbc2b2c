"""A small shard cut at every block: as it is found, and with everything else made to agree."""

from functools import partial
from pathlib import Path

from hostile.corpus import Case
from hostile.folder import KEYS, archive, seal, sound, write_sound

BLOCK = 512


def cuts() -> list[int]:
    """Sizes, in bytes, at which the first shard is cut."""
    data, _ = archive([sound(key) for key in KEYS[:4]])
    return list(range(0, len(data), BLOCK))


def beyond(cut: int) -> set[int]:
    """Rows of the first shard whose bytes are not all there."""
    records = [sound(key) for key in KEYS[:4]]
    _, offsets = archive(records)
    ends = [at + len(record.data) for at, record in zip(offsets, records, strict=True)]
    return {row for row, end in enumerate(ends) if end > cut}


def truncations() -> list[Case]:
    """Two cases a cut; `beyond` says which rows the second must name."""
    return [
        Case(
            name=f"cut_{'sealed' if sealed else 'plain'}_{cut}",
            what=f"the first shard cut at {cut} bytes",
            expect="lost" if sealed else "refused",
            build=partial(_build, cut=cut, sealed=sealed),
            found=not sealed or bool(beyond(cut)),
        )
        for cut in cuts()
        for sealed in (False, True)
    ]


def _build(folder: Path, cut: int, sealed: bool) -> None:
    write_sound(folder)
    tar = folder / "000000.tar"
    tar.write_bytes(tar.read_bytes()[:cut])
    if sealed:
        seal(folder)
