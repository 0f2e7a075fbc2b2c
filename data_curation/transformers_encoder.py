"""Published encoders in the form of the `transformers` library: its own DINOv2, no code of others.

``published:midnight-12k`` and ``published:phikon-v2`` (with ``:FOLDER`` for a download). The
library is an extra (``pip install eosin[transformers]``) and is imported only for these. Code that
a repository brings along is never run: encoders that need it (Hibou, GenBio-PathFM) come in by
``python:``, see `python_encoder`. Shapes: B tiles, N tokens, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from eosin.configs.errors import InputError
from eosin.data_curation.encoder_interface import Encoder, digest_of_weights
from eosin.data_curation.published_encoders import IMAGENET
from eosin.data_curation.torchvision_import import import_beside_torchvision
from eosin.launch.artefacts import stamp_of

INPUT_PX = 224
POOLINGS = ("cls", "mean", "clsmean")
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True, kw_only=True)
class PublishedDino:
    """What is known of an encoder beside its weights."""

    hub: str
    """``ORG/NAME`` on the Hugging Face hub."""
    pooling: str
    """What its publication evaluates."""
    normalisation: tuple[tuple[float, float, float], tuple[float, float, float]]
    """Mean and standard deviation."""


PUBLISHED_DINO = {
    "midnight-12k": PublishedDino(hub="kaiko-ai/midnight", pooling="clsmean", normalisation=HALF),
    "phikon-v2": PublishedDino(hub="owkin/phikon-v2", pooling="cls", normalisation=IMAGENET),
}
"""By the name behind ``published:``. Sources: their model cards and eva (73b61a7)."""


class TransformersEncoder(Encoder):
    """A DINOv2 of `transformers` in evaluation mode: tiles at 224 px, bicubic, the middle."""

    def __init__(
        self, model: Any, name: str, known: PublishedDino, pooling: str, device: torch.device
    ) -> None:
        self._model = model.eval().requires_grad_(False).to(device)
        self._known, self._device = known, device
        self.name, self.pooling, self.input_px = name, pooling, INPUT_PX
        self.mean, self.std = known.normalisation
        # class token first, then registers where the architecture has them, then patches
        self._prefix = 1 + int(getattr(model.config, "num_register_tokens", 0) or 0)
        self.dim = int(model.config.hidden_size) * (2 if pooling == "clsmean" else 1)
        self._mean = torch.tensor(self.mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(self.std, device=device).view(3, 1, 1)
        self.transform_digest = stamp_of(
            transform="bicubic, shorter side, middle", px=INPUT_PX, mean=self.mean, std=self.std
        )
        self.digest = stamp_of(
            weights=digest_of_weights(model), transform=self.transform_digest, pooling=pooling
        )

    def prepare(self, tile: npt.NDArray[np.uint8]) -> Tensor:
        """One RGB tile [H, W, 3] with its shorter side at 224 px and cut in the middle, uint8."""
        image = Image.fromarray(tile)
        scale = INPUT_PX / min(image.size)
        size = tuple(max(INPUT_PX, round(side * scale)) for side in image.size)
        resized = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        left, top = ((side - INPUT_PX) // 2 for side in size)
        pixels = np.asarray(resized.crop((left, top, left + INPUT_PX, top + INPUT_PX)))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)

    def forward(self, prepared: Sequence[Tensor]) -> npt.NDArray[np.float32]:
        """Features [B, D] in float32."""
        batch = torch.stack(list(prepared)).to(self._device, torch.float32)
        batch = batch.div_(255).sub_(self._mean).div_(self._std)
        with torch.inference_mode():
            tokens = self._model(pixel_values=batch).last_hidden_state  # [B, N, D]
        parts = []
        if self.pooling in ("cls", "clsmean"):
            parts.append(tokens[:, 0])
        if self.pooling in ("mean", "clsmean"):
            parts.append(tokens[:, self._prefix :].mean(dim=1))
        features: npt.NDArray[np.float32] = torch.cat(parts, dim=1).float().cpu().numpy()
        return features

    def random_twin(self, seed: int) -> Encoder:
        """The same network and preprocessing at the library's random start; LayerScale is 1."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = type(self._model)(self._model.config)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("lambda1"):  # what the library calls LayerScale
                    parameter.fill_(1.0)
        return TransformersEncoder(
            model, f"{self.name}-random", self._known, self.pooling, self._device
        )


def load_transformers(
    name: str, folder: Path | None, pooling: str | None, device: torch.device
) -> Encoder:
    """A published encoder of `PUBLISHED_DINO`.

    Args:
        name: of it.
        folder: where its files were downloaded to; None: the hub, or its cache.
        pooling: instead of its own.
        device: where it runs.

    Raises:
        InputError: the library is missing, or the weights cannot be had or do not fit.
    """
    known = PUBLISHED_DINO[name]
    if pooling is not None and pooling not in POOLINGS:
        raise InputError(f"published:{name} pools by {', '.join(POOLINGS)}, not '{pooling}'")
    try:
        library = import_beside_torchvision("transformers")
    except ImportError as error:
        raise InputError(
            f"published:{name} needs the transformers library: pip install 'eosin[transformers]'"
        ) from error
    if folder is not None and not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no download of {known.hub}: it has no config.json")
    try:
        model, report = library.AutoModel.from_pretrained(
            known.hub if folder is None else str(folder),
            local_files_only=folder is not None,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"published:{name}: {known.hub} cannot be had or loaded ({reason}); download it where "
            f"there is a network and write published:{name}:FOLDER"
        ) from error
    lost = sorted(report.get("missing_keys", [])) + sorted(report.get("unexpected_keys", []))
    if lost:
        raise InputError(
            f"published:{name}: {len(lost)} tensors are missing or too many, such as {lost[0]}"
        )
    return TransformersEncoder(model, name, known, pooling or known.pooling, device)
