"""`torch.compile`: the compilers it calls, and whether a small function comes out right."""

import os
import shutil
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from eosin.configs.errors import printable
from eosin.launch.checks import Finding

AREA = "compile"

_QUICK = {
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of processes, which would outlive this one
    "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",  # ten seconds, for later kernels
    "TORCHINDUCTOR_VEC_ISA_OK": "0",  # no programs that ask what the processor can do
}
"""Read when inductor is imported, which torch does with the first compilation."""
_COMPILERS = ("g++", "clang++", "gcc", "clang", "cc")


@dataclass(frozen=True, kw_only=True)
class Compiling:
    """What compiling takes, and how it went."""

    compilers: tuple[str, ...]
    """Those found, the one that CXX or CC names first."""
    has_headers: bool
    """Whether Python.h is there."""
    on_gpu: bool
    """Whether training would compile: it does on a GPU."""
    seconds: float = 0.0
    """To compile and run."""
    failure: str = ""
    """What it raised, or that the result was wrong."""


def check(folder: Path) -> list[Finding]:
    """Compiles a small function, afresh."""
    return judge(look())


def look() -> Compiling:
    """The facts; leaves no cache."""
    named = [os.environ[name] for name in ("CXX", "CC") if os.environ.get(name)]
    with tempfile.TemporaryDirectory(prefix="eosin-doctor-") as cache:
        os.environ |= {**_QUICK, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
        on_gpu = torch.cuda.is_available()
        start = time.perf_counter()
        try:
            failure = _compiled("cuda" if on_gpu else "cpu")
        except Exception as error:  # of dynamo, inductor, triton, a compiler
            lines = [line for line in str(error).splitlines() if line.strip()]
            failure = printable(f"{type(error).__name__}: {lines[0] if lines else ''}")[:200]
        seconds = time.perf_counter() - start
    return Compiling(
        compilers=tuple(c for c in (*named, *_COMPILERS) if shutil.which(c.split()[0])),
        has_headers=(Path(sysconfig.get_path("include")) / "Python.h").is_file(),
        on_gpu=on_gpu,
        seconds=seconds,
        failure=failure,
    )


def _compiled(device: str) -> str:
    """Runs a compiled function beside itself; what is wrong, or nothing."""

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return (F.gelu(x) * weight).sum(dim=1)

    x = torch.linspace(-2, 2, 256, device=device).reshape(16, 16)
    weight = torch.linspace(0, 1, 16, device=device)
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    right = torch.allclose(compiled(x, weight), function(x, weight), atol=1e-5)
    return "" if right else "the compiled result is another"


def judge(facts: Compiling) -> list[Finding]:
    """The row."""
    found = f"{facts.compilers[0] if facts.compilers else 'no compiler'}"
    choice = "compile=blocks" if facts.on_gpu else "compile=none: auto compiles on a GPU alone"
    if not facts.failure:
        found += f"; compiled and right in {facts.seconds:.1f} s"
        return [Finding(AREA, "torch.compile", found, choice)]
    if not facts.compilers:
        advice = "install a compiler (apt install g++, or module load gcc)"
    elif not facts.has_headers:
        found += "; no Python.h"
        advice = "install Python's headers (apt install python3-dev)"
    else:
        advice = "update torch or the compiler"
    return [
        Finding(
            AREA, "torch.compile", f"{found}; {facts.failure}", choice,
            "mend" if facts.on_gpu else "note", f"{advice}, or set compile=none",
        )
    ]  # fmt: skip
