"""The house rules that a reviewer would otherwise have to remember."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("configs", "launch", "data_curation", "pretrain", "eval")
# Lower layers first; a file may import its own layer and those before it.
LAYERS = ("configs", "launch-base", "data_curation", "pretrain", "eval", "launch-top")
LAUNCH_TOP = {
    "cli",
    "demo",
    "plan",
    "plan_curation",
    "doctor",
    "chain",
    "local",
    "submit",
    "training",
}  # and all that is called bench… or check…
FORBIDDEN_NAMES = {"utils", "common", "helpers", "misc", "core", "base", "manager", "factory"}
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def layer_of(module: str) -> str:
    _, folder, *rest = module.split(".")
    if folder != "launch":
        return folder
    top = bool(rest) and (rest[0] in LAUNCH_TOP or rest[0].startswith(("bench", "check")))
    return "launch-top" if top else "launch-base"


def imported_modules(source: Path) -> list[str]:
    tree = ast.parse(source.read_text())
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            names.append(node.module or "")
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    assert "eosin" not in names, f"{source}: import the full path, not 'from eosin import …'"
    return [name for name in names if name.startswith("eosin.")]


def module_of(source: Path) -> str:
    return ".".join(("eosin", *source.relative_to(ROOT).with_suffix("").parts))


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(source: Path) -> None:
    allowed = LAYERS[: LAYERS.index(layer_of(module_of(source))) + 1]
    for module in imported_modules(source):
        assert layer_of(module) in allowed, f"{source.name} imports {module}"


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_named_by_the_field_and_fit_one_idea(source: Path) -> None:
    assert source.stem not in FORBIDDEN_NAMES
    assert len(source.read_text().splitlines()) <= 450
    tree = ast.parse(source.read_text())
    assert ast.get_docstring(tree), "a module says what it is"
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), "no module-global state"
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 90, f"{node.name} has {length} lines"


def test_every_package_is_shipped() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        "eosin." + ".".join(p.parent.relative_to(ROOT).parts)
        for package in PACKAGES
        for p in (ROOT / package).rglob("__init__.py")
    }
    assert found == set(setup["packages"])
    for package in found:
        folder = setup["package-dir"].get(package)
        if folder is not None:
            assert (ROOT / folder / "py.typed").is_file()


def test_nothing_unpickles_or_runs_a_shell() -> None:
    for source in SOURCES:
        tree = ast.parse(source.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not {"pickle", "dill", "shelve"} & {a.name for a in node.names}, source
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"eval", "exec", "os.system"}, source
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                if name == "torch.load":  # of foreign weights alone, which run nothing
                    assert source.name == "weight_files.py", source
                    assert keywords.get("weights_only") == "True", source
                assert keywords.get("shell") != "True", source
                assert keywords.get("allow_pickle") != "True", source
