"""Known mistakes of public trainers, and that a test of ours would fail on each.

A test says so with ``@pytest.mark.pitfall(3)``, or several numbers; ``-m pitfall`` runs them.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

PITFALLS = {
    1: "the blur's probability is inverted: what is written as 1.0, 0.1 is applied as 0.0, 0.9",
    2: "Sinkhorn needs a process group, counts one rank's rows, or writes into the logits it got",
    3: "exp overflows, or each row's own maximum is subtracted, which changes the targets",
    4: "padding rows enter Sinkhorn or the centre; a rank without masked patches deadlocks",
    5: "KoLeo is infinite on duplicates in 16 bits, undefined for one sample, finds itself nearest",
    6: "the density term has the wrong sign, so a collapse is rewarded",
    7: "pairs, masked crops or views counted wrongly; the logged total is not what is optimised",
    8: "masks: ratios not stratified, counts off, square grids alone, draws by worker",
    9: "masked patches lose their position, or registers and CLS token get a patch's",
    10: "learned positions resampled by the other convention, in 16 bits, or for squares alone",
    # Layouts of other projects (chunked blocks, split qkv, w12/w3) wait for their importers.
    11: "weights load in part and nobody is told; gate and value of SwiGLU are exchanged",
    12: "SwiGLU's hidden size, LayerNorm's epsilon or LayerScale's start is another one",
    # Heads in the layouts of other projects wait for their importers.
    13: "the gain of the weight-normed prototypes is frozen, not decayed, or there where none is",
    14: "parameter groups: tokens undecayed, layers off by one, patch embedding or freeze left out",
    15: "schedules are a step off, jump behind their end, or miss the batch's square root",
    16: "clipping over the wrong modules, an average before the step, in 16 bits, without buffers",
    17: "drop-path keeps a random count, is scaled by the rate, or drops the only sample",
    18: "packed crops differ from single ones, or see each other",
    # Two processes check what crosses ranks; whole steps under DDP and FSDP, and accumulation, wait
    # for training on several GPUs.
    19: "loss and gradients depend on how many processes the batch is spread over",
    # Resuming on another number of processes waits for training on several GPUs.
    20: "a resumed run is another run: moments, schedules, draws or the data's place are lost",
    21: "a NaN step reaches the weights, the moments, the average or the centre, or is not counted",
    22: "rotary positions: rounded to 16 bits, corner coordinates, 2π left out, jittered teacher",
    23: "a loss cannot be switched off without a crash",
    24: "compiled and eager steps differ, or each new number of masked patches compiles again",
}


def marks(source: Path) -> Iterator[tuple[str, set[str], list[int]]]:
    """Of every test: its name, the markers on it, and the numbers of its pitfalls."""
    for node in ast.parse(source.read_text()).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        names, numbers = set(), []
        for decorator in node.decorator_list:
            call = decorator if isinstance(decorator, ast.Call) else None
            name = ast.unparse(call.func if call else decorator)
            names.add(name.removeprefix("pytest.mark."))
            if call and name == "pytest.mark.pitfall":
                numbers += [ast.literal_eval(argument) for argument in call.args]
        yield node.name, names, numbers


@pytest.mark.parametrize("number", PITFALLS)
def test_every_pitfall_has_a_test_that_runs_without_a_gpu(number: int) -> None:
    found = [
        f"{source.stem}::{name}"
        for source in sorted(TESTS.rglob("test_*.py"))
        if source.parent.name != "gpu"
        for name, markers, numbers in marks(source)
        if number in numbers and not markers & {"slow", "gpu", "skip", "xfail"}
    ]
    assert found, f"no test guards against: {PITFALLS[number]}"


def test_marks_are_on_tests_and_name_pitfalls_that_there_are() -> None:
    assert list(PITFALLS) == list(range(1, 25))
    for source in TESTS.rglob("test_*.py"):
        for name, markers, numbers in marks(source):
            if "pitfall" in markers:
                assert name.startswith("test_") and numbers, f"{source.name}::{name}"
                assert set(numbers) <= set(PITFALLS), f"{source.name}::{name}"
