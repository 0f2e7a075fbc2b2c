"""What shall become records: labels and sources, row by row, and how they are named and filtered.

`images.py` makes them from existing tile images, `slide_tiles.py` from tiled slides; `shards.py`
deals them out to shards.
"""

import errno
import re
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from eosin.configs.errors import ConfigError, InputError
from eosin.data_curation.manifest import INDEX, Status, make_id

MAX_KEY_CHARS = 90
"""Such a key with its suffix fits the 100 bytes of a USTAR name: no extended header is needed."""

LABELS = pa.schema(
    [INDEX.field(n) for n in ("key", "group", "slide_id", "mpp", "cluster", "stain")]
)
"""What is known of a record before it is read: these columns of the index, the user's behind."""


@dataclass(frozen=True, kw_only=True)
class Records:
    """The records to be written, one row each in both tables, sorted by key or by slide.

    `labels` has the columns of `LABELS` and the user's own, which go into the index; `source` says
    where a record comes from. Its column ``identity`` (size and time of the file) decides with the
    rest whether a finished shard is still the right one; ``path`` does not, so that moved data are
    not read again.
    """

    labels: pa.Table
    source: pa.Table

    def __len__(self) -> int:
        return int(self.labels.num_rows)

    def take(self, rows: Sequence[int]) -> "Records":
        """These rows, in this order."""
        return Records(labels=self.labels.take(rows), source=self.source.take(rows))


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a record is not in its shard."""

    status: Status
    reason: str


def draw(seed: int, name: str) -> int:
    """A uniform 64-bit number that depends on `seed` and `name` alone (XXH3-64).

    Sorting by it shuffles, and taking the smallest few chooses, without regard to what else there
    is: with more data, or another order of it, the choice among the old names stays.
    """
    return xxhash.xxh3_64_intdigest(name.encode(), seed)


def make_keys(names: Sequence[str]) -> list[str]:
    """Unique keys of ``[A-Za-z0-9_-]``, at most `MAX_KEY_CHARS` long, for unique `names`.

    Dots go too: readers of WebDataset cut a member's name at its first one. A key that is too long
    or that two names share gets a hash of its name behind.
    """
    plain = [make_id(name) for name in names]
    times = Counter(plain)
    keys = [
        key if len(key) <= MAX_KEY_CHARS and times[key] == 1 else _hashed(key, name)
        for key, name in zip(plain, names, strict=True)
    ]
    if len(set(keys)) < len(keys):
        twice = next(key for key, count in Counter(keys).items() if count > 1)
        raise InputError(f"two tiles would both be called '{twice}'; rename one of them")
    return keys


def _hashed(key: str, name: str) -> str:
    digest = xxhash.xxh3_64_hexdigest(name.encode())
    return f"{key[: MAX_KEY_CHARS - len(digest) - 1]}-{digest}"


def file_identity(file: Path) -> str:
    """Size and time of change; empty for a file that is not there."""
    try:
        found = file.stat()
    except ValueError:  # a zero in the name
        return ""
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            return ""
        raise
    if not stat.S_ISREG(found.st_mode):  # a pipe or a device might never end
        return ""
    return f"{found.st_size}:{found.st_mtime_ns}"


def keep_rows(table: pa.Table, rules: Sequence[str]) -> pa.Table:
    """The rows of `table` for which every rule holds.

    Args:
        table: any table.
        rules: ``column=value|value`` or ``column!=value|value``, compared as text; an empty cell
            equals the empty value.

    Raises:
        ConfigError: a rule has another form, or names a column that is not there.
        InputError: no row is left.
    """
    mask = pa.array([True] * table.num_rows)
    for rule in rules:
        column, negated, values = _parse_rule(rule)
        if column not in table.column_names:
            raise ConfigError(
                f"keep: '{rule}' names no column; there are: {', '.join(table.column_names)}"
            )
        text = pc.fill_null(table[column].cast(pa.string()), "")
        hit = pc.is_in(text, value_set=pa.array(values, pa.string()))
        mask = pc.and_(mask, pc.invert(hit) if negated else hit)
    kept = table.filter(mask)
    if rules and table.num_rows and not kept.num_rows:
        raise InputError(f"keep: no tile of {table.num_rows} satisfies {', '.join(rules)}")
    return kept


def check_rules(rules: Sequence[str]) -> None:
    """Raises ValueError when a rule has not the form that `keep_rows` reads."""
    for rule in rules:
        _parse_rule(rule)


def _parse_rule(rule: str) -> tuple[str, bool, list[str]]:
    match = re.fullmatch(r"([^=!]+)(!?)=(.*)", rule)
    if match is None:
        raise ConfigError(f"keep: '{rule}' is not column=value|value or column!=value|value")
    return match[1], bool(match[2]), match[3].split("|")
