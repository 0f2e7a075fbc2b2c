"""An encoder from Python: ``python:MODULE:FUNCTION``, for what no other form of ours can name.

FUNCTION takes a ``torch.device`` and gives a pair: a transform, from one RGB PIL image to a tensor,
and a network, a ``torch.nn.Module`` from a stack of those [B, …] to features [B, D]. MODULE is
imported, so it is code that the user trusts: it lies in the working folder or is installed. This is
how encoders come in whose own code has to run (CONCH, anything behind ``trust_remote_code``).
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from eosin.configs.errors import InputError
from eosin.data_curation.encoder_interface import Encoder, digest_of_weights
from eosin.launch.artefacts import stamp_of

EXAMPLE_PX = 224


class PythonEncoder(Encoder):
    """A transform and a network of the user's."""

    has_twin = False

    def __init__(self, spec: str, transform: Callable[..., Tensor], network: nn.Module,
                 source: str, device: torch.device) -> None:  # fmt: skip
        self._transform, self._network, self._device = transform, network.eval().to(device), device
        self.name, self.pooling = spec.replace(":", "_").replace(".", "_"), "own"
        self.mean, self.std, self.input_px = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), None
        grey = np.full((EXAMPLE_PX, EXAMPLE_PX, 3), 128, np.uint8)
        try:
            features = self.forward([self.prepare(grey)])
        except Exception as error:
            raise InputError(f"python:{spec} fails on a grey tile: {error!r}") from error
        self.dim = features.shape[1]
        # its code stands for the transform, which cannot be asked what it does
        self.transform_digest = stamp_of(spec=spec, source=source)
        self.digest = stamp_of(weights=digest_of_weights(network), transform=self.transform_digest)

    def prepare(self, tile: npt.NDArray[np.uint8]) -> Tensor:
        """What the transform makes of one RGB tile [H, W, 3]."""
        prepared: Tensor = self._transform(Image.fromarray(tile))
        return prepared

    def forward(self, prepared: Sequence[Tensor]) -> npt.NDArray[np.float32]:
        """The network's features [B, D].

        Raises:
            InputError: they are no tensor [B, D].
        """
        with torch.inference_mode():
            found = self._network(torch.stack(list(prepared)).to(self._device))
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(prepared):
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"encoder {self.name} gives {shape}, not features [B, D]")
        features: npt.NDArray[np.float32] = found.float().cpu().numpy()
        return features

    def random_twin(self, seed: int) -> Encoder:
        """Refused: how the network is started is its own affair."""
        raise InputError(f"encoder {self.name} comes from Python: it has no random-weights twin")


def load_python(spec: str, device: torch.device) -> Encoder:
    """The encoder of ``MODULE:FUNCTION``.

    Raises:
        InputError: it cannot be imported or made, or is no transform and network.
    """
    module_name, _, function_name = spec.partition(":")
    if not function_name:
        raise InputError(f"python:{spec} should be python:MODULE:FUNCTION")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
        function: Any = getattr(module, function_name)
        made = function(device)
        source = Path(inspect.getfile(module)).read_text()
    except Exception as error:
        raise InputError(f"python:{spec} cannot be had: {error!r}") from error
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[1], nn.Module):
        raise InputError(f"python:{spec} should give (transform, torch.nn.Module)")
    return PythonEncoder(spec, made[0], made[1], source, device)
