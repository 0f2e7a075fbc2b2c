"""Which checkpoints stay, against the rules said one by one."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eosin.configs.errors import ConfigError
from eosin.pretrain.retention import Retention, best_step


@given(
    steps=st.sets(st.integers(1, 60)),
    keep=st.integers(1, 4),
    keep_every=st.integers(0, 9),
)
def test_the_newest_and_every_kth(steps: set[int], keep: int, keep_every: int) -> None:
    kept = Retention(every=1, keep=keep, keep_every=keep_every).kept(steps, Path("/none"))
    for step in steps:
        newer = sum(other > step for other in steps)
        for_good = keep_every > 0 and step in range(0, 100, keep_every)
        assert (step in kept) == (newer < keep or for_good)


def probes(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def val(step: int, score: float) -> dict[str, object]:
    return {"step": step, "split": "val", "score": score}


def test_the_best_is_that_of_the_validation_split_among_those_there_are(tmp_path: Path) -> None:
    file = probes(
        tmp_path / "probes.jsonl", val(1, 0.5), val(2, 0.9), val(3, 0.8), val(4, 0.8),
        {"step": 3, "split": "test", "score": 0.99}, val(9, 1.0), val(4, float("nan")),
    )  # fmt: skip
    assert best_step(file, {1, 2, 3, 4}) == 2
    assert best_step(file, {1, 3, 4}) == 3  # of equal ones the earlier
    assert Retention(every=1, keep=1).kept({1, 2, 3, 4}, file) == {2, 4}
    assert Retention(every=1, keep=1, keep_best=False).kept({1, 2, 3, 4}, file) == {4}


def test_the_last_score_of_a_step_counts(tmp_path: Path) -> None:
    file = probes(tmp_path / "probes.jsonl", val(1, 0.9), val(2, 0.5), val(1, 0.1))
    assert best_step(file, {1, 2}) == 2


def test_lines_that_are_no_score_count_for_nothing(tmp_path: Path) -> None:
    file = tmp_path / "probes.jsonl"
    assert best_step(file, {1}) is None
    file.write_text('\n[1]\n"x"\n{"step": 1}\n{"step": 1, "split": "val", "score": "0.9"}\n')
    assert best_step(file, {1}) is None
    with file.open("a") as lines:
        lines.write(json.dumps(val(1, 0.2)) + '\n{"step": 2, "split": "val", "sc')
    assert best_step(file, {1, 2}) == 1


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"every": 0}, "checkpoints.every must be at least 1"),
        ({"keep": 0}, "checkpoints.keep must be at least 1"),
        ({"keep_every": -500}, "checkpoints.keep_every must be at least 0"),
        ({"keep_every": 750}, "keep_every=750 must be a multiple of checkpoints.every=500"),
    ],
)
def test_bad_values_are_named(keys: dict[str, int], line: str) -> None:
    with pytest.raises(ConfigError, match=line.replace(".", r"\.")):
        Retention(**keys)  # type: ignore[arg-type]
