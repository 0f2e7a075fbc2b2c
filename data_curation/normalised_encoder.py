"""An encoder that sees every tile in the staining of a reference."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eosin.configs.errors import InputError
from eosin.data_curation.embed_config import NormaliseConfig
from eosin.data_curation.encoder import NetworkEncoder, load_encoder
from eosin.data_curation.encoder_interface import Encoder
from eosin.data_curation.stain_library import StainCondition
from eosin.data_curation.stain_normaliser import StainNormaliser, load_normaliser
from eosin.launch.artefacts import stamp_of


class NormalisedEncoder(Encoder):
    """A network behind a `StainNormaliser`, both on the network's device."""

    def __init__(self, network: Encoder, normaliser: StainNormaliser, device: torch.device) -> None:
        self._network, self._normaliser, self._device = network, normaliser, device
        self.name = f"{network.name}-{normaliser.method}"
        self.dim, self.pooling, self.input_px = network.dim, network.pooling, network.input_px
        self.token_grid, self.has_twin = network.token_grid, network.has_twin
        self.mean, self.std = network.mean, network.std
        moved = normaliser.digest
        self.digest = stamp_of(network=network.digest, normaliser=moved)
        self.transform_digest = stamp_of(transform=network.transform_digest, normaliser=moved)

    def prepare(self, tile: npt.NDArray[np.uint8]) -> Tensor:
        """As the network prepares it, uint8 [3, input_px, input_px]."""
        return self._network.prepare(tile)

    def forward(self, prepared: Sequence[Tensor]) -> npt.NDArray[np.float32]:
        """Features [B, D]; each tile's own staining is measured on it."""
        return self.forward_from(prepared, None)

    def forward_from(
        self, prepared: Sequence[Tensor], sources: Sequence[StainCondition | None] | None
    ) -> npt.NDArray[np.float32]:
        """Features [B, D] of tiles whose slides are stained as `sources` say."""
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
            tiles = torch.stack(list(prepared)).to(self._device, torch.float32)
            moved = self._normaliser(tiles, sources).round().to(torch.uint8)
        return self._network.forward(list(moved))

    def random_twin(self, seed: int) -> Encoder:
        """The network at random weights, behind the same normaliser."""
        return NormalisedEncoder(self._network.random_twin(seed), self._normaliser, self._device)


def load_normalised(spec: str, device: torch.device, config: NormaliseConfig) -> Encoder:
    """`load_encoder`, behind a normaliser where the config asks for one.

    Raises:
        InputError: see both; or the encoder is a descriptor, which has no device to normalise on.
    """
    encoder = load_encoder(spec, device)
    normaliser = load_normaliser(config)
    if normaliser is None:
        return encoder
    if not isinstance(encoder, NetworkEncoder):
        raise InputError(f"normalise.library needs a network, and {spec} is a descriptor")
    return NormalisedEncoder(encoder, normaliser, device)
