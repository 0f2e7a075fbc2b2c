"""The command: exit codes, one-line errors, help, and no heavy import before it is needed."""

import subprocess
import sys
from pathlib import Path

import pytest

from eosin.launch.cli import main
from eosin.launch.verbs import VERBS


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eosin.launch.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example_and_its_keys(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*verb.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert VERBS[verb].example in text and "keys and defaults" in text


def test_help_lists_the_verbs_without_importing_torch() -> None:
    code = (
        "import sys; from eosin.launch.cli import main; main(['--help']);"
        "heavy = {'torch', 'timm', 'pyarrow', 'cv2', 'openslide'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fly"], "no verb 'fly'"),
        (["tile", "slides=x", "out=y", "mp=0.5"], "Did you mean: 'mpp'"),
        (["tile", "slides=x", "out=y", "size_px=fine"], "size_px: Value 'fine'"),
        (["tile", "slides=x", "out=y", "mpp=fine"], "mpp is a number of µm per pixel, or native"),
        (["tile", "out=y"], "required and not given: slides"),
        (["tile", "--fast"], "no flag '--fast'"),
        (["tile", "--config"], "--config needs a file"),
        (["pretrain", "--config", "nowhere", "shards=a", "out=b"], "no config file 'nowhere'"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_print_config_is_yaml_that_the_command_takes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["pretrain", "--config", "pretrain/smoke", "shards=a", "out=b", "--print-config"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(first)
    assert main(["pretrain", "--config", str(tmp_path / "again.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == first


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fly", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["tile", "slides={missing}", "out={out}"],
        ["tile", "slides={empty}", "out={out}"],
        ["curate", "slides={empty}", "out={out}"],
        ["shard", "images={missing}", "out={out}"],
        ["shard", "images={empty}", "out={out}"],
        ["shard", "verify", "{empty}"],
        ["pretrain", "shards={empty}", "out={out}"],
        ["export", "run={empty}", "out={out}"],
        ["eval", "encoder={missing}", "task.tiles={empty}", "out={out}"],
    ],
    ids=lambda a: " ".join(a[:2]),
)
def test_missing_and_empty_folders_are_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"missing": tmp_path / "missing", "empty": tmp_path / "empty", "out": tmp_path / "out"}
    places["empty"].mkdir()
    assert main([a.format(**places) for a in arguments]) in (1, 2)
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("eosin: ") and str(tmp_path) in error[-1]
    assert sum(line.startswith("eosin: ") for line in error) == 1


def test_a_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "tiles").mkdir()
    from PIL import Image

    Image.new("RGB", (32, 32), "purple").save(tmp_path / "tiles" / "a.png")
    code = main(["shard", f"images={tmp_path / 'tiles'}", f"out={tmp_path / 'file' / 'out'}"])
    assert code in (1, 2)
    assert "eosin: " in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_module_runs_as_a_command() -> None:
    done = run("tile", "nonsense")
    assert done.returncode == 2 and done.stderr.startswith("eosin: ")
