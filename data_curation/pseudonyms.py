"""Names of slides and patients replaced by keyed hashes, the same wherever the same key is used.

HMAC-SHA-256 (RFC 2104): without the key nobody can tell whose a hash is, nor try out names; with it
the owner can make any name's hash again.
"""

import hashlib
import hmac
from pathlib import Path

from eosin.configs.errors import InputError

PREFIX = "anon-"
"""By which a pseudonym is told from a name."""
_DIGITS = 24  # hexadecimal: 96 bits
_LEAST_BYTES = 16


class Pseudonyms:
    """Makes pseudonyms.

    Args:
        key_file: a file of at least 16 random bytes, e.g. by ``openssl rand -hex 32``; white space
            around them does not count.

    Raises:
        InputError: it is missing or too short.
    """

    def __init__(self, key_file: Path) -> None:
        if not key_file.is_file():
            raise InputError(f"{key_file} does not exist; make a key: openssl rand -hex 32")
        self._key = key_file.read_bytes().strip()
        if len(self._key) < _LEAST_BYTES:
            raise InputError(
                f"{key_file} holds {len(self._key)} bytes: a key that short can be guessed; make "
                "one: openssl rand -hex 32"
            )

    def of(self, name: str) -> str:
        """The pseudonym of a name; one that is a pseudonym already stays."""
        if name.startswith(PREFIX):
            return name
        digest = hmac.new(self._key, name.encode(), hashlib.sha256).hexdigest()
        return PREFIX + digest[:_DIGITS]

    def stamp(self) -> str:
        """Tells keys apart without telling the key."""
        return self.of("the stamp of this key")
