"""Where a slide encoder starts from: another run's encoder, or a folder's.

Its poolings may be new (a case transformer on a self-supervised encoder); all else must be there.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from eosin.configs.errors import EosinError, InputError
from eosin.pretrain.checkpoint import first_whole, list_checkpoints
from eosin.pretrain.slide.learner import SlideLearner
from eosin.pretrain.slide.opening import WEIGHTS, read_weights
from eosin.pretrain.start import StartConfig

TEACHER = "model.teacher.backbone."
FRESH = ("pool.", "case.")


@torch.no_grad()
def start_from(model: SlideLearner, config: StartConfig) -> str:
    """Loads the encoder that `config` names into student and teacher, in place.

    Returns:
        What was loaded, in words.

    Raises:
        InputError: it cannot be read, or is another network.
    """
    path = config.run or config.weights
    assert path is not None
    tensors = _read(path)
    own = model.student.backbone.state_dict()
    missing = sorted(n for n in own.keys() - tensors.keys() if not n.startswith(FRESH))
    extra = sorted(n for n in tensors.keys() - own.keys() if not n.startswith(FRESH))
    if missing or extra:
        odd = f"has no {missing[0]}" if missing else f"has {extra[0]} too"
        raise InputError(f"{path} {odd}: it is another slide encoder than model= says")
    taken = 0
    for name, tensor in own.items():
        if name not in tensors:
            continue
        if tensors[name].shape != tensor.shape:
            raise InputError(
                f"{path}: {name} is {list(tensors[name].shape)} there and {list(tensor.shape)} "
                "here; give it the model= and the stores of that encoder"
            )
        tensor.copy_(tensors[name])
        taken += 1
    model.teacher.backbone.load_state_dict(own)
    return f"{path}: {taken} of {len(own)} tensors of the encoder; the others are drawn"


def _read(path: Path) -> Mapping[str, Tensor]:
    if (path / WEIGHTS).is_file():
        return read_weights(path)
    found = first_whole(list_checkpoints(path / "checkpoints"), TEACHER)
    if found is None:
        raise EosinError(f"start: {path} is no slide encoder folder, and has no whole checkpoint")
    return found[1]
