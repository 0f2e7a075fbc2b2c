"""Layers of configuration, and what a wrong key or value is told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from eosin.configs.errors import ConfigError
from eosin.configs.load import find_config, load_config, schema_yaml, to_yaml


@dataclass(frozen=True, kw_only=True)
class Inner:
    patch_px: int = 16
    kind: Literal["plain", "fused"] = "plain"
    range: tuple[float, float] = (0.1, 0.2)

    def __post_init__(self) -> None:
        if self.patch_px < 1:
            raise ValueError(f"patch_px must be positive, not {self.patch_px}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    out: Path
    inner: Inner = field(default_factory=Inner)
    lr: float = 1e-3
    name: str | None = None


def test_later_layers_win_and_types_are_kept(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("out: a\nlr: 1e-4\ninner: {patch_px: 8, range: [1, 2]}\n")
    two.write_text("lr: 0.5\n")
    config = load_config(Outer, [one, two], ["inner.kind=fused", "name=x"])
    expected = Outer(
        out=Path("a"), lr=0.5, name="x", inner=Inner(patch_px=8, kind="fused", range=(1.0, 2.0))
    )
    assert config == expected


def test_the_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(Outer, (), ["out=/a/b", "lr=1e-5", "inner.range=[0.3,0.4]"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert "python" not in path.read_text()
    assert load_config(Outer, [path]) == config
    assert "out: ???" in schema_yaml(Outer)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["out=x", "inner.patchpx=3"], "Did you mean: 'patch_px'"),
        (["out=x", "lr=fast"], "lr: Value 'fast'"),
        (["out=x", "inner.kind=other"], r"expected one of \['plain', 'fused'\]"),
        (["out=x", "inner.patch_px=0"], "patch_px must be positive, not 0"),
        ([], "required and not given: out"),
        (["out=x", "lr"], "'lr' is not of the form key=value"),
        (["out=x", "inner=3"], "inner"),
        (["out=x", "name=[a"], "not key=value in YAML"),
        (["out=x", "name=a: b: c"], "not key=value in YAML"),
        (["out=x", "name=${nowhere}"], "nowhere"),
        (["out=x", "name.0=a"], "name"),
    ],
)
def test_a_wrong_key_or_value_is_one_clear_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        load_config(Outer, (), overrides)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config file 'nowhere'.*pretrain/smoke"):
        find_config("nowhere")
    broken, listed = tmp_path / "broken.yaml", tmp_path / "list.yaml"
    broken.write_text("a: [1\n")
    listed.write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not valid YAML"):
        load_config(Outer, [broken])
    with pytest.raises(ConfigError, match=r"list\.yaml must hold keys and values"):
        load_config(Outer, [listed])
