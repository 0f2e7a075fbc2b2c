"""A segmentation network in place of the classical masks, for those who have one.

A folder holds ``segmenter.yaml`` (`SegmenterConfig`) and the network: an ONNX file, or the weights
of a timm network with a linear head, ``weights.safetensors``. Neither can run code when loaded. It
runs on the CPU, in the process of the slide.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from eosin.configs.errors import ConfigError, InputError
from eosin.configs.load import load_config
from eosin.data_curation.glass import density_planes, estimate_glass
from eosin.data_curation.pen import find_pen
from eosin.data_curation.tissue import SMOOTHING_UM, Tissue
from eosin.launch.artefacts import file_digest

CONFIG_FILE, WEIGHTS_FILE = "segmenter.yaml", "weights.safetensors"

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """What a network wants to be given, and what its output channels mean."""

    network: str
    """An ONNX file of the folder (one input [1, 3, H, W], one output [1, C, H', W'] of logits), or
    the name of a timm network that gives feature maps."""
    mpp: float
    """µm/px of the pictures it was trained on."""
    tissue: list[int]
    """Output channels that are tissue; their probabilities are added."""
    pen: list[int] | None = None
    """Those that are pen; None: the classical mask of pen is used."""
    activation: Literal["softmax", "sigmoid"] = "softmax"
    """What makes probabilities of logits: one class a pixel, or each channel on its own."""
    threshold: float = 0.5
    """Probability from which a pixel belongs to a mask."""
    size_px: int = 512
    """Side of the square that it is given at once."""
    overlap_px: int = 64
    """What is seen beyond each edge of a square, and not used."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Normalisation of RGB in [0, 1]."""
    stage: int = -1
    """Of a timm network: which of its feature maps the head reads."""

    def __post_init__(self) -> None:
        if not self.mpp > 0:
            raise ValueError(f"mpp must be positive, not {self.mpp}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must lie between 0 and 1, not {self.threshold}")
        if not 0 <= 2 * self.overlap_px < self.size_px:
            raise ValueError(
                f"overlap_px must be less than half of size_px={self.size_px}: {self.overlap_px}"
            )
        if not self.tissue or min([*self.tissue, *(self.pen or [])]) < 0:
            raise ValueError("tissue and pen list output channels from 0; tissue at least one")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {self.std}")


class Segmenter(ABC):
    """A network that gives logits per pixel. Made by `load_segmenter`."""

    def __init__(self, config: SegmenterConfig) -> None:
        self.config = config

    @abstractmethod
    def logits(self, normalised: Floats) -> Floats:
        """[C, h, w] of one picture [3, H, W]."""

    def find_tissue(self, rgb: NDArray[np.uint8], mpp: tuple[float, float]) -> Tissue:
        """The masks of an overview, RGB uint8 [h, w, 3] at `SegmenterConfig.mpp`.

        Raises:
            InputError: the network has fewer output channels than the config names.
        """
        config = self.config
        shape = rgb.shape[:2]
        tissue, pen = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
        for window, probability in self._probabilities(rgb):
            tissue[window] = probability[config.tissue].sum(0) >= config.threshold
            if config.pen is not None:
                pen[window] = probability[config.pen].sum(0) >= config.threshold
        if config.pen is None:
            smooth = np.asarray(cv2.GaussianBlur(rgb, (0, 0), SMOOTHING_UM / config.mpp), np.uint8)
            pen = find_pen(density_planes(smooth, estimate_glass(rgb)), config.mpp)
        return Tissue(tissue=tissue & ~pen, pen=pen, mpp=mpp)

    def _probabilities(
        self, rgb: NDArray[np.uint8]
    ) -> Iterator[tuple[tuple[slice, slice], Floats]]:
        """Window by window: where it lies, and the probabilities there, [C, h, w]."""
        config, (height, width) = self.config, rgb.shape[:2]
        edge, step = config.overlap_px, config.size_px - 2 * config.overlap_px
        below, right = -height % step, -width % step
        border = cv2.BORDER_REPLICATE
        padded = cv2.copyMakeBorder(rgb, edge, edge + below, edge, edge + right, border)
        mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (config.mean, config.std))
        for y in range(0, height, step):
            for x in range(0, width, step):
                part = padded[y : y + config.size_px, x : x + config.size_px]
                picture = part.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
                logits = self.logits((picture - mean) / std)
                channels = max([*config.tissue, *(config.pen or [])]) + 1
                if logits.ndim != 3 or len(logits) < channels:
                    raise InputError(
                        f"the segmenter '{config.network}' gives logits of shape {logits.shape}; "
                        f"its config names channel {channels - 1}: [channels, height, width]"
                    )
                rows, columns = min(step, height - y), min(step, width - x)
                inner = self._at_pixels(logits)[:, edge : edge + rows, edge : edge + columns]
                yield (slice(y, y + rows), slice(x, x + columns)), self._activate(inner)

    def _at_pixels(self, logits: Floats) -> Floats:
        side = (self.config.size_px, self.config.size_px)
        grown = [cv2.resize(plane, side, interpolation=cv2.INTER_LINEAR) for plane in logits]
        return np.asarray(grown, np.float32)

    def _activate(self, logits: Floats) -> Floats:
        if self.config.activation == "sigmoid":
            return np.asarray(1 / (1 + np.exp(-logits)), np.float32)
        raised = np.exp(logits - logits.max(0))
        return np.asarray(raised / raised.sum(0), np.float32)


class _Onnx(Segmenter):
    def __init__(self, config: SegmenterConfig, file: Path) -> None:
        super().__init__(config)
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError(f"{file} needs onnxruntime: pip install 'eosin[onnx]'") from error
        if not file.is_file():
            raise InputError(f"{file} does not exist")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its errors share no class
            raise InputError(f"{file} is no ONNX network: {str(error).splitlines()[0]}") from error
        self._input = self._session.get_inputs()[0].name

    def logits(self, normalised: Floats) -> Floats:
        found = self._session.run(None, {self._input: normalised[None]})[0]
        return np.asarray(found[0], np.float32)


class _Timm(Segmenter):
    """Weights are ``backbone.…`` as timm names them, ``head.weight`` [C, D], ``head.bias`` [C]."""

    def __init__(self, config: SegmenterConfig, file: Path) -> None:
        super().__init__(config)
        import torch  # takes seconds, and most runs have no segmenter
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from eosin.data_curation.torchvision_import import import_timm

        self._torch = torch
        torch.set_num_threads(1)
        try:
            weights = load_file(file)
            backbone = import_timm().create_model(
                config.network, features_only=True, pretrained=False
            )
            self._head = weights.pop("head.weight"), weights.pop("head.bias")
            names = {name.removeprefix("backbone."): value for name, value in weights.items()}
            backbone.load_state_dict(names)
        except (OSError, SafetensorError, RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"no segmenter '{config.network}' in {file}: {reason}") from error
        self._backbone = backbone.eval()

    def logits(self, normalised: Floats) -> Floats:
        torch = self._torch
        with torch.inference_mode():
            maps = self._backbone(torch.from_numpy(normalised)[None])[self.config.stage]
            weight, bias = self._head
            if weight.shape[1:] != maps.shape[1:2]:
                raise InputError(
                    f"the segmenter's head.weight is {tuple(weight.shape)}, and stage "
                    f"{self.config.stage} of {self.config.network} has {maps.shape[1]} features"
                )
            found = torch.einsum("bdhw,cd->bchw", maps, weight)[0] + bias[:, None, None]
        return np.asarray(found.numpy(), np.float32)


@lru_cache(maxsize=1)
def load_segmenter(folder: Path) -> Segmenter:
    """The segmenter of a folder; a process loads it once.

    Raises:
        InputError: a file is missing or damaged, or the config is wrong.
    """
    config = _read_config(folder)
    if config.network.endswith(".onnx"):
        return _Onnx(config, folder / Path(config.network).name)
    return _Timm(config, folder / WEIGHTS_FILE)


def segmenter_digest(folder: Path) -> str:
    """Of the config and the network's file: other masks have another.

    Raises:
        InputError: a file is missing, or the config is wrong.
    """
    config = _read_config(folder)
    onnx = config.network.endswith(".onnx")
    file = folder / (Path(config.network).name if onnx else WEIGHTS_FILE)
    if not file.is_file():
        raise InputError(f"{file} does not exist")
    return f"{file_digest(folder / CONFIG_FILE)}:{file_digest(file)}"


def _read_config(folder: Path) -> SegmenterConfig:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise InputError(f"{folder} is no segmenter: it has no {CONFIG_FILE}")
    try:
        return load_config(SegmenterConfig, [file])
    except ConfigError as error:
        raise InputError(f"{file}: {error}") from error
