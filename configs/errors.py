"""Errors that are for people: one line that says what, where, and what to do.

The command prints the message alone and exits with `exit_code`; a traceback is shown only with
`--debug`.
"""

_LONGEST = 1000


def printable(text: str) -> str:
    """`text` in one line, at most `_LONGEST` characters: names in it may come from anyone."""
    cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)


class EosinError(Exception):
    """Base of every error that a user can mend. Exit code 1: the work failed."""

    exit_code = 1


class ConfigError(EosinError):
    """Bad usage or configuration. Exit code 2."""

    exit_code = 2


class InputError(EosinError):
    """An input file, folder or table that cannot be used as asked. Exit code 2."""

    exit_code = 2


class TooManyFailedError(EosinError):
    """More slides or tiles failed than `max_failed` allows; all others are finished and kept."""


class InterruptedRunError(EosinError):
    """A run that ended before its end through no fault of its own: the same command goes on.

    Exit code 75 (EX_TEMPFAIL of sysexits.h), by which `eosin launch` knows to queue it again.
    """

    exit_code = 75
