"""The `eosin` command: ``eosin VERB [--config FILE]… [key.sub=value]…``.

A verb is a row of `VERBS`; its module is imported only when it runs, so `eosin --help` is instant.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eosin.configs.errors import ConfigError, EosinError
from eosin.configs.load import load_config, schema_yaml, to_yaml


@dataclass(frozen=True)
class Verb:
    """One verb: where its config and its function live."""

    module: str
    schema: str
    """Name of the config dataclass in `module`."""
    function: str
    """Name of the function in `module` that takes the config; raises `EosinError` on failure."""
    summary: str
    example: str
    positional: str = ""
    """Config key that a bare argument fills."""
    plan: str = ""
    """Name of the function in `module` that answers ``--dry-run`` with a text."""
    options: tuple[str, ...] = ()
    """Config keys that ``--key VALUE`` fills, too."""
    ranks: bool = False
    """Whether it runs as several processes that share the work."""
    pieces: str = ""
    """Name of the function in `module` that lists what is left to do, by piece, with its size; the
    config key `only` then names a file of pieces to do."""
    tail: str = ""
    """Config key that takes what follows ``--``."""

    def load_schema(self) -> type[Any]:
        """The config dataclass; imports the module."""
        schema: type[Any] = getattr(importlib.import_module(self.module), self.schema)
        return schema


VERBS: dict[str, Verb] = {
    "demo": Verb(
        "eosin.launch.demo",
        "DemoConfig",
        "demo",
        "synthetic slides, then the whole chain, to a report; minutes on a CPU",
        "eosin demo",
        plan="plan",
    ),
    "tile": Verb(
        "eosin.data_curation.tiles",
        "TileConfig",
        "tile",
        "slides to slides.parquet, tiles.parquet and overlays",
        "eosin tile slides=/data/slides out=tiles mpp=0.5",
        plan="plan",
        pieces="pieces",
    ),
    "shard": Verb(
        "eosin.data_curation.shards",
        "ShardConfig",
        "shard",
        "selected tiles of slides, or tile images, to WebDataset shards with an index",
        "eosin shard images=/data/tiles out=shards",
        plan="plan",
    ),
    "shard verify": Verb(
        "eosin.data_curation.verify",
        "VerifyConfig",
        "verify",
        "check every shard and record against its checksum, and name the damaged ones",
        "eosin shard verify shards",
        positional="shards",
    ),
    "shard energon": Verb(
        "eosin.data_curation.energon_index",
        "EnergonConfig",
        "write_energon",
        "index finished shards for Megatron-Energon, without reading them",
        "eosin shard energon shards",
        positional="shards",
    ),
    "curate": Verb(
        "eosin.data_curation.curate",
        "CurateConfig",
        "curate",
        "slides to shards in one resumable command: tile, select, shard",
        "eosin curate slides=/data/slides out=curated tile.mpp=0.5",
        plan="plan",
        pieces="pieces",
    ),
    "pretrain": Verb(
        "eosin.launch.training",
        "TrainingConfig",
        "pretrain",
        "shards to a run folder with an exported encoder; resumes when the folder exists",
        "eosin pretrain --config pretrain/smoke shards=curated/shards out=runs/first",
        plan="plan",
        ranks=True,
    ),
    "plan": Verb(
        "eosin.launch.plan",
        "PlanConfig",
        "plan",
        "a training's memory, traffic, time and cost on any number of GPUs, before it runs",
        "eosin plan --config pretrain/eosin --config size/large batch_size=2048 gpus=64 gpu=A100",
        options=("json",),
    ),
    "export": Verb(
        "eosin.pretrain.export",
        "ExportConfig",
        "export",
        "a run to an encoder folder that bare timm loads",
        "eosin export run=runs/first out=runs/first/encoder",
    ),
    "eval": Verb(
        "eosin.eval.run",
        "EvalConfig",
        "evaluate",
        "encoder on labelled tiles to results.json and report.html, floors beside it",
        "eosin eval encoder=runs/first/encoder task.tiles=/data/labels.csv out=runs/first/eval",
        plan="plan",
    ),
    "watch": Verb(
        "eosin.eval.watch_exports",
        "WatchConfig",
        "watch",
        "score each export of a running training (probe.where=job) as it appears, until it is done",
        "eosin watch run=runs/first probe.tiles=/data/labels.csv",
        plan="plan",
    ),
    "stain": Verb(
        "eosin.pretrain.stain_fit",
        "StainFitConfig",
        "fit_stain",
        "the stain statistics of a set of shards, as YAML for augment.stain",
        "eosin stain shards=curated/shards out=stain.yaml",
    ),
    "launch": Verb(
        "eosin.launch.submit",
        "LaunchConfig",
        "launch",
        "any verbs as jobs on Slurm, or here as several processes; queued again until done",
        "eosin launch nodes=4 gpus=8 -- pretrain shards=shards out=runs/big -- export run=runs/big",
        plan="plan",
        tail="command",
    ),
    "launch status": Verb(
        "eosin.launch.jobs",
        "StatusConfig",
        "status",
        "how the jobs of a launch stand",
        "eosin launch status launches/pretrain-1",
        positional="folder",
    ),
    "launch logs": Verb(
        "eosin.launch.jobs",
        "LogsConfig",
        "logs",
        "the end of the logs of a launch's jobs",
        "eosin launch logs launches/pretrain-1 stage=pretrain rank=0",
        positional="folder",
    ),
    "launch cancel": Verb(
        "eosin.launch.jobs",
        "CancelConfig",
        "cancel",
        "end the jobs of a launch, waiting or running",
        "eosin launch cancel launches/pretrain-1",
        positional="folder",
    ),
    "bench data": Verb(
        "eosin.launch.bench_data",
        "BenchDataConfig",
        "bench_data",
        "tiles/s a core from JPEG to crops by stage, against Pillow, torchvision and webdataset",
        "eosin bench data --json data.json",
        plan="plan",
        options=("json",),
    ),
    "bench step": Verb(
        "eosin.launch.bench_step",
        "BenchStepConfig",
        "bench_step",
        "a training step against a plain one: tiles/s, FLOP/s, memory, and time by part",
        "eosin bench step model.drop_path=0.3 threads=1 --json step.json",
        plan="plan",
        options=("json",),
    ),
    "bench layouts": Verb(
        "eosin.launch.bench_layouts",
        "BenchStepConfig",
        "bench_layouts",
        "the same step alone, replicated and sharded on one rank; and what a checkpoint costs it",
        "eosin bench layouts --config bench/step_gpu --json layouts.json",
        options=("json",),
    ),
    "doctor": Verb(
        "eosin.launch.doctor",
        "DoctorConfig",
        "doctor",
        "this machine: what eosin finds and would choose on it, and what to mend",
        "eosin doctor folder=runs --json doctor.json",
        options=("json",),
    ),
}

FLAGS = """\
  --config FILE    a YAML file, or the name of a shipped one; may be given several times
  --print-config   print the resolved config as YAML and stop
  --dry-run        say what would be done, how much and how long, and stop
  --debug          show tracebacks
  --help           this text"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Exit code 0: done; 1: the work failed; 2: bad usage, config or input; 75: it was interrupted,
    and the same command goes on.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Spinning OpenMP threads make two busy processes on two cores five times slower than one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    own = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:own]
    try:
        return _dispatch([a for a in arguments[:own] if a != "--debug"], arguments[own + 1 :])
    except EosinError as error:
        return _fail(str(error), error.exit_code, debug)
    except OSError as error:
        return _fail(_describe_os_error(error), 1, debug)
    except (MemoryError, RuntimeError) as error:
        # torch's out-of-memory error is a RuntimeError; torch is not imported here to ask for it
        if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError":
            raise
        return _fail("out of memory; lower batch_size or workers, or crop sizes", 1, debug)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from here", 130, debug)


def _dispatch(arguments: list[str], tail: list[str]) -> int:
    name, rest = split_verb(arguments)
    if name is None:
        print(_usage())
        return 0
    verb = VERBS[name]
    files, overrides, flags = parse_arguments(rest, verb)
    module = importlib.import_module(verb.module)
    schema = verb.load_schema()
    if "--help" in flags:
        print(_verb_help(name, verb, schema))
        return 0
    config = load_config(schema, files, overrides)
    if tail:
        if not verb.tail:
            raise ConfigError(f"'eosin {name}' takes nothing after '--'")
        config = replace(config, **{verb.tail: tail})
    if "--print-config" in flags:
        print(to_yaml(config), end="")
        return 0
    if "--dry-run" in flags:
        if not verb.plan:
            raise ConfigError(f"'eosin {name}' is short: it has no --dry-run")
        plan: Callable[[Any], str] = getattr(module, verb.plan)
        print(plan(config))
        return 0
    run: Callable[[Any], None] = getattr(module, verb.function)
    run(config)
    return 0


def split_verb(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The verb that arguments begin with, and the others; None where help is asked for.

    Raises:
        ConfigError: no such verb.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        return None, []
    two = " ".join(arguments[:2])
    if two in VERBS:
        return two, arguments[2:]
    if arguments[0] in VERBS:
        return arguments[0], arguments[1:]
    raise ConfigError(f"no verb '{arguments[0]}'; there are: {', '.join(VERBS)}")


def parse_arguments(arguments: list[str], verb: Verb) -> tuple[list[str], list[str], set[str]]:
    """Config files, overrides and flags among the arguments behind a verb.

    Raises:
        ConfigError: a flag that there is not, or one that lacks its value.
    """
    files: list[str] = []
    overrides: list[str] = []
    flags: set[str] = set()
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config":
            file = next(rest, None)
            if file is None:
                raise ConfigError("--config needs a file after it")
            files.append(file)
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        elif argument.startswith("--") and argument[2:].partition("=")[0] in verb.options:
            key, _, value = argument[2:].partition("=")
            value = value or next(rest, "")
            if not value:
                raise ConfigError(f"--{key} needs a value after it")
            overrides.append(f"{key}={value}")
        elif argument in ("-h", "--help"):
            flags.add("--help")
        elif argument in ("--print-config", "--dry-run"):
            flags.add(argument)
        elif argument.startswith("-"):
            raise ConfigError(f"no flag '{argument}'; flags are:\n{FLAGS}")
        elif "=" not in argument and verb.positional:
            overrides.append(f"{verb.positional}={argument}")
        else:
            overrides.append(argument)
    return files, overrides, flags


def _usage() -> str:
    width = max(map(len, VERBS))
    rows = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        "eosin turns whole-slide images into a pathology encoder, and proves what it is worth.\n\n"
        f"usage: eosin VERB [--config FILE]… [key.sub=value]…\n\nverbs:\n{rows}\n\n"
        f"flags:\n{FLAGS}\n\n"
        "'eosin VERB --help' shows an example and every key with its default."
    )


def _verb_help(name: str, verb: Verb, schema: type[Any]) -> str:
    doc = (schema.__doc__ or "").strip()
    return (
        f"eosin {name}: {verb.summary}\n\nexample:\n  {verb.example}\n\n{doc}\n\n"
        f"keys and defaults (??? is required):\n\n{schema_yaml(schema)}\nflags:\n{FLAGS}"
    )


def _describe_os_error(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}; what was finished before is kept"


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    rank = f"[rank {os.environ.get('RANK', '?')}]" if "WORLD_SIZE" in os.environ else ""
    print(f"eosin{rank}: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
