"""The one way to import timm, also where torchvision and torch are of different builds.

torch has a CPU build for Linux; torchvision has none on the public registry, and its CUDA wheel
beside CPU torch fails on import because it cannot load its C++ operators. Evaluation needs none
of them, only the transforms, so the two operators that the import insists on are declared
(without an implementation: calling one still raises). A pair that matches is left alone.
"""

import importlib.util
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_timm() -> Any:
    """The timm module. Takes seconds the first time: call it where it is used."""
    return import_beside_torchvision("timm")


def import_beside_torchvision(name: str) -> Any:
    """A module that imports torchvision."""
    if "torchvision" not in sys.modules and _operators_cannot_load():
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", _SCHEMA)
    return import_module(name)


def _operators_cannot_load() -> bool:
    """Whether this is CPU torch with a torchvision whose operators do not load into it."""
    found = importlib.util.find_spec("torchvision")
    if torch.version.cuda is not None or found is None or found.origin is None:
        return False
    libraries = sorted(Path(found.origin).parent.glob("_C*.so"))
    if not libraries or hasattr(torch.ops.torchvision, "nms"):
        return False
    try:
        torch.ops.load_library(libraries[0])  # what torchvision itself does; a second time is free
    except OSError:
        return True
    return False
