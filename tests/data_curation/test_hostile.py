"""Hostile folders of shards, and shards cut at every block: refused, or every loss counted.

What they are and what must become of each is in ``hostile/corpus.py``. They are opened in processes
of their own, bounded in time and memory, that note what they are made to do.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hostile.corpus import GROUPS, RECORDS, Case
from hostile.folder import KEYS, VICTIM, sound
from hostile.images import EXECUTED
from hostile.truncations import beyond, cuts, truncations

from eosin.configs.errors import ConfigError, InputError
from eosin.data_curation.shard_reader import open_index
from eosin.data_curation.shard_store import open_store
from eosin.data_curation.shards import ShardConfig, shard

DOORS = ("reader", "verify", "loader", "device")
LOADERS = ("loader", "device")
TESTS = Path(__file__).parents[1]
ALL = set(range(len(KEYS)))
MAX_BYTES = 400_000_000
"""Memory that a door may take: a tile of 4096 × 4096 pixels has 50 MB, and Pillow copies it."""

Result = dict[str, Any]


def run_cases(work: Path, cases: list[Case]) -> dict[str, Result]:
    """What came of each case; a process more for each case that ends one."""
    found: dict[str, Result] = {}
    todo = [case.name for case in cases]
    while todo:
        process = subprocess.run(
            [sys.executable, "-m", "hostile.child", str(work), *todo],
            cwd=work,
            env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
        begun = [line["begin"] for line in lines if "begin" in line]
        found |= {line["end"]: line for line in lines if "end" in line}
        assert begun, process.stderr[-2000:]
        todo = todo[len(begun) :]
        if begun[-1] not in found:
            found[begun[-1]] = {"died": f"{process.returncode}: {process.stderr[-1500:]}"}
    assert not (work / EXECUTED).exists()
    return found


def check_unharmed(result: Result) -> None:
    """No door crashed, hung, took too much, was made to do something, or wrote lines of its own."""
    assert "died" not in result, result["died"]
    for door in DOORS:
        answer = result[door]
        assert "crash" not in answer, f"{door}: {answer['crash']}"
        assert not answer["events"], f"{door}: {answer['events']}"
        assert answer["bytes"] < MAX_BYTES, f"{door}: {answer['bytes'] / 1e6:.0f} MB"
        said = [answer.get("refused", ""), answer.get("failed", ""), *answer.get("problems", [])]
        for message in [*said, *answer.get("named", {}).values()]:
            assert message.isprintable(), f"{door}: {message!r:.300}"
            assert len(message) < 2000, f"{door}: {len(message)} characters"


def lost_rows(answer: Result) -> set[int]:
    """The rows that a door names as damaged; all of them, read or named, are the index's."""
    assert "named" in answer, answer
    named = {int(row) for row in answer["named"]}
    assert named | set(answer["read"]) == ALL and not named & set(answer["read"])
    return named


def check_case(case: Case, result: Result) -> None:
    """What `case` expects."""
    check_unharmed(result)
    reader = result["reader"]
    if case.expect == "refused":
        for door in ("reader", *LOADERS):
            assert case.name in result[door].get("refused", ""), f"{door}: {result[door]}"
    elif case.expect == "ended":
        for door in ("reader", *LOADERS):
            assert "cannot be read (3 attempts)" in result[door].get("failed", ""), result[door]
    elif case.expect == "lost" and "named" not in reader:
        assert all("named" not in result[door] for door in LOADERS)
    else:
        lost = lost_rows(reader)
        expected = {"skipped": {KEYS.index(VICTIM)}, "harmless": set()}
        assert lost == expected.get(case.expect, lost), reader
        assert all(lost_rows(result[door]) == lost for door in LOADERS)
    verified = result["verify"]
    assert bool("refused" in verified or verified["problems"]) == case.found, f"verify: {verified}"


def complaints(cases: list[Case], results: dict[str, Result]) -> list[str]:
    """What went otherwise than a case expects, a line each."""
    found = []
    for case in cases:
        try:
            check_case(case, results[case.name])
        except AssertionError as error:
            found.append(f"{case.name} ({case.what}; {case.expect}): {error!s:.400}")
    return found


@pytest.mark.parametrize("group", GROUPS)
def test_hostile_shards_are_refused_or_their_records_named(group: str, tmp_path: Path) -> None:
    results = run_cases(tmp_path, GROUPS[group])
    assert complaints(GROUPS[group], results) == []


def test_cut_shards_are_refused_at_once_or_the_records_beyond_the_cut_named(
    tmp_path: Path,
) -> None:
    results = run_cases(tmp_path, truncations())
    assert complaints(truncations(), results) == []
    seconds = []
    for cut in cuts():
        plain = results[f"cut_plain_{cut}"]
        assert f"000000.tar has {cut} bytes" in plain["reader"]["refused"]
        seconds.append(plain["reader"]["s"])
        named = results[f"cut_sealed_{cut}"]["reader"]["named"]
        assert {int(row) for row in named} == beyond(cut)
        for row, reason in named.items():
            assert f"000000.tar, record '{KEYS[int(row)]}'" in reason
        problems = results[f"cut_sealed_{cut}"]["verify"]["problems"]
        assert all(any(f"'{KEYS[row]}'" in line for line in problems) for row in beyond(cut))
    assert sorted(seconds)[len(seconds) // 2] < 0.05


def test_hostile_images_are_named_and_left_out(tmp_path: Path) -> None:
    """Through ``eosin shard images=``: what is no tile is in failed.parquet, all else read."""
    folder = tmp_path / "tiles"
    folder.mkdir()
    cases = [case for case in RECORDS if case.expect == "skipped" and "told" not in case.name]
    for case in cases:
        case.build(tmp_path / case.name)
        rows = pq.read_table(tmp_path / case.name / "index.parquet").to_pylist()
        row = rows[KEYS.index(VICTIM)]
        data = (tmp_path / case.name / "000000.tar").read_bytes()
        image = data[row["offset"] : row["offset"] + row["size"]]
        (folder / f"{case.name}.{row['suffix']}").write_bytes(image)
    for key in KEYS:
        (folder / f"{key}.jpg").write_bytes(sound(key).data)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "folder.jpg").mkdir()
    (folder / "endless.jpg").symlink_to("/dev/zero")
    shard(ShardConfig(images=folder, out=tmp_path / "out", workers=1, max_failed=1.0))
    index = open_index(tmp_path / "out")["key"].to_pylist()
    failed = pq.read_table(tmp_path / "out" / "failed.parquet").to_pylist()
    assert index == sorted(KEYS)
    assert sorted(row["key"] for row in failed) == sorted(case.name for case in cases)
    assert all(row["reason"].isprintable() for row in failed)
    assert not Path(EXECUTED).exists()


def test_a_table_that_names_what_is_no_file_loses_those_rows(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "a.jpg").write_bytes(sound("a1").data)
    names = ["a.jpg", "pipe.jpg", "/dev/zero", "/etc/passwd", "pipe:touch x|", "s3://b/c.jpg"]
    (tmp_path / "t.csv").write_text("\n".join(["path", *names, ""]))
    out = tmp_path / "out"
    shard(ShardConfig(images=tmp_path / "t.csv", out=out, workers=1, max_failed=1.0))
    assert open_index(out)["path"].to_pylist() == ["a.jpg"]
    failed = pq.read_table(out / "failed.parquet")["source"].to_pylist()
    assert sorted(failed) == sorted(names[1:])


def test_a_file_name_with_control_characters_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a\n\x1b[31m.jpg").write_bytes(sound("a1").data)
    with pytest.raises(InputError, match=r"a\\n\\x1b") as error:
        shard(ShardConfig(images=tmp_path, out=tmp_path / "out", workers=1))
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "url",
    ["pipe:touch executed|", "http://a/b::s3://c", "${HOME}/shards", "zip://a::b", "s3://a/b\nc"],
)
def test_an_address_that_expands_or_runs_is_refused(url: str) -> None:
    with pytest.raises((ConfigError, InputError)) as error:
        open_store(url)
    assert str(error.value).isprintable() and not Path(EXECUTED).exists()


def test_the_process_notices_what_it_looks_for(tmp_path: Path) -> None:
    """What opens a program, a secret or a pickle is seen, or the corpus would prove nothing."""
    code = f"""
import os, pickle, subprocess
from pathlib import Path
from hostile import images
from hostile.child import Watch, _enter
def door(folder):
    pickle.loads(images.pickled())
    subprocess.run(["true"])
    (folder / "outside").mkdir()
    (folder / "outside/secret.txt").write_text("")
    raise MemoryError("as when there is too little")
answer = _enter(door, Path({str(tmp_path)!r}), Watch())
seen = " ".join(answer["events"])
assert all(s in seen for s in ("pickle.find_class", "os.system", "subprocess.Popen", "open")), seen
assert "MemoryError" in answer["crash"]
"""
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    assert (tmp_path / EXECUTED).exists()
