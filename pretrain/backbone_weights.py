"""The weights of an encoder folder of ours, back into our network: every tensor or none."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from eosin.configs.errors import InputError
from eosin.pretrain.export import timm_name
from eosin.pretrain.vit import Vit


@torch.no_grad()
def load_backbone(vit: Vit, folder: Path) -> None:
    """Loads ``FOLDER/model.safetensors`` into `vit`, in place.

    The folder has no mask token (a frozen teacher is shown whole crops), so that of `vit` stays.

    Args:
        vit: a network of the same shape.
        folder: what `eosin pretrain` or `eosin export` wrote.

    Raises:
        InputError: the file is missing or unreadable, or its tensors are not those of the network.
    """
    path = folder / "model.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: {error}; give the folder of an encoder") from error
    state = {name: p for name, p in vit.state_dict().items() if name != "mask_token" and p.numel()}
    named = {timm_name(vit.config, name): p for name, p in state.items()}
    missing, extra = sorted(named.keys() - tensors.keys()), sorted(tensors.keys() - named.keys())
    unlike = [
        name for name in named if name in tensors and named[name].shape != tensors[name].shape
    ]
    if missing or extra or unlike:
        problems = (("missing", missing), ("unexpected", extra), ("of another shape", unlike))
        said = [f"{len(names)} {what} ({names[0]})" for what, names in problems if names]
        raise InputError(
            f"{path} is not an encoder of this shape: of {len(named)} tensors {', '.join(said)}; "
            "give one that was trained with the same model"
        )
    for name, parameter in named.items():
        parameter.copy_(tensors[name])
