"""A copy of the code, so that a job runs what was submitted, whatever is edited meanwhile."""

import shutil
import subprocess
from pathlib import Path

from eosin.launch.artefacts import write_text

PACKAGES = ("configs", "launch", "data_curation", "pretrain", "eval")
"""Folders of the source, each the import package ``eosin.NAME``."""
COMMIT = "COMMIT"
"""File of a copy that says which commit it was made from."""


def copy_code(folder: Path) -> str:
    """Copies the code that runs now to ``folder/eosin``; put `folder` on PYTHONPATH to run it.

    Returns:
        The commit, as the file `COMMIT` has it.
    """
    source = Path(__file__).resolve().parent.parent
    for package in PACKAGES:
        shutil.copytree(
            source / package,
            folder / "eosin" / package,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    commit = read_commit() or "unknown (not a checkout)"
    write_text(folder / "eosin" / COMMIT, f"{commit}\n")
    return commit


def read_commit() -> str | None:
    """The commit of the code that runs now, and whether files differ from it; None if unknown."""
    root = Path(__file__).resolve().parent.parent
    if (root / COMMIT).is_file():
        return (root / COMMIT).read_text().strip()
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", *PACKAGES)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head} with changes" if changed else head


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
