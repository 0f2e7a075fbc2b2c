"""The `eosin` command: ``eosin VERB [--config FILE]… [key.sub=value]…``.

A verb is a row of `verbs.VERBS`; its module is imported only when it runs, so that `eosin --help`
is instant.
"""

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from eosin.configs.errors import ConfigError, EosinError
from eosin.configs.load import load_config, schema_yaml, to_yaml
from eosin.launch.verbs import VERBS, Verb

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
    bare: list[str] = []
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
        elif "=" not in argument and verb.collects:
            bare.append(argument)
        else:
            overrides.append(argument)
    if bare:
        overrides.append(f"{verb.collects}={json.dumps(bare)}")
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
