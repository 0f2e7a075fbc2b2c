"""Loading any encoder: a timm folder (ours or another's), a timm model, a colour descriptor.

An encoder is a frozen network with its preprocessing and its pooling, and its digest names all
three. The preprocessing is timm's own evaluation transform, as the folder's config states it.
Shapes: B tiles, N tokens, D features.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from eosin.configs.errors import InputError
from eosin.data_curation.converted_encoders import CONVERTED, Converted, load_converted
from eosin.data_curation.descriptors import HISTOGRAM_BINS, colour_histogram, mean_colour
from eosin.data_curation.encoder_interface import (
    Encoder,
    EncoderTokens,
    Tiles,
    digest_of_weights,
)
from eosin.data_curation.published_encoders import PUBLISHED, Published, load_published
from eosin.data_curation.python_encoder import load_python
from eosin.data_curation.stain_texture import DIM as STAIN_TEXTURE_DIM
from eosin.data_curation.stain_texture import stain_texture
from eosin.data_curation.tile_print import DIM as PRINT_DIM
from eosin.data_curation.tile_print import VERSION as PRINT_VERSION
from eosin.data_curation.tile_print import tile_print
from eosin.data_curation.torchvision_import import import_timm
from eosin.launch.artefacts import stamp_of
from eosin.launch.process import choose_device

POOLINGS = ("cls", "mean", "clsmean", "native", "cls4", "tokens")
"""Class token; mean of the patch tokens; both, one behind the other; what the network itself
feeds its classifier (the only choice where there are no tokens); class tokens of the last four
blocks, the last one last; class token and all patch tokens, row by row."""
LAST_BLOCKS = [-4, -3, -2, -1]
"""Whose class tokens ``cls4`` takes."""

_LAYER_SCALES = ("gamma", "gamma_1", "gamma_2")
"""What timm's networks call the parameters of LayerScale."""


class DescriptorEncoder(Encoder):
    """A colour descriptor behind the interface of an encoder."""

    has_twin = False

    def __init__(
        self,
        name: str,
        dim: int,
        version: int,
        describe: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]],
    ) -> None:
        self.name, self.dim, self.pooling = name, dim, "none"
        self.mean, self.std, self.input_px = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), None
        self.transform_digest = stamp_of(transform="none")
        self.digest = stamp_of(builtin=name, dim=dim, version=version)
        self._describe = describe

    def prepare(self, tile: npt.NDArray[np.uint8]) -> Tensor:
        """The descriptor of one tile, [D]."""
        return torch.from_numpy(self._describe(_checked(tile)))

    def forward(self, prepared: Sequence[Tensor]) -> npt.NDArray[np.float32]:
        """Stacks descriptors to [B, D]."""
        return torch.stack(list(prepared)).numpy()

    def random_twin(self, seed: int) -> Encoder:
        """Refused: a descriptor has no weights."""
        raise InputError(f"builtin:{self.name} has no weights, so it has no random-weights twin")


class NetworkEncoder(Encoder):
    """A timm network in evaluation mode, with its preprocessing and pooling."""

    def __init__(
        self,
        model: Any,
        rebuild: Callable[[], Any],
        name: str,
        device: torch.device,
        pooling: str | None,
        input_px: int | None = None,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> None:
        """Takes a network of timm.

        Args:
            model: with its weights.
            rebuild: makes it anew at random weights.
            name: for tables and files.
            device: where it runs.
            pooling: one of `POOLINGS`; None: as its own head pools.
            input_px: instead of its own.
            preprocessing: of timm's data config, instead of what the network's says.
        """
        timm = import_timm()
        self._rebuild, self._preprocessing = rebuild, dict(preprocessing or {})
        self._model = model.eval().requires_grad_(False).to(device)
        self._device, self.name = device, name
        self.pooling = _resolve_pooling(model, pooling, name)
        config = timm.data.resolve_model_data_config(model) | self._preprocessing
        if input_px is not None:
            config["input_size"] = (3, input_px, input_px)
        channels, height, width = config["input_size"]
        if channels != 3 or height != width:
            raise InputError(f"encoder {name} wants input {config['input_size']}, not square RGB")
        _check_input_px(model, height, name)
        self.input_px = height
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        # Resizing and cropping only: uint8 goes to the device and is normalised there.
        self._geometry = timm.data.create_transform(**config, is_training=False, normalize=False)
        self._mean = torch.tensor(self.mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(self.std, device=device).view(3, 1, 1)
        width_out = model.num_features
        if self.pooling == "native":
            width_out = getattr(model, "head_hidden_size", None) or width_out
        self.dim = width_out * {"clsmean": 2, "cls4": 4}.get(self.pooling, 1)
        if self.pooling == "tokens":
            rows, columns = (height // px for px in model.patch_embed.patch_size)
            self.token_grid, self.dim = (rows, columns), width_out * (1 + rows * columns)
        self.transform_digest = stamp_of(transform=config)
        weights = digest_of_weights(model)
        architecture = str(model.pretrained_cfg.get("architecture"))
        self.digest = stamp_of(
            weights=weights,
            architecture=architecture,
            transform=self.transform_digest,
            pooling=self.pooling,
        )

    def prepare(self, tile: npt.NDArray[np.uint8]) -> Tensor:
        """One RGB tile [H, W, 3] resized and cropped to uint8 [3, input_px, input_px]."""
        prepared: Tensor = self._geometry(Image.fromarray(_checked(tile)))
        return prepared

    def forward(self, prepared: Sequence[Tensor]) -> npt.NDArray[np.float32]:
        """Features [B, D] of tiles from `prepare`, in float32."""
        with torch.inference_mode():
            pooled = self._pool(self._normalised(prepared))
        features: npt.NDArray[np.float32] = pooled.float().cpu().numpy()
        return features

    @property
    def network(self) -> Any:
        """The network of timm."""
        return self._model

    def transform(self, image: Image.Image) -> Tensor:
        """One RGB picture, resized, cropped and normalised, fp32 [3, input_px, input_px]."""
        pixels = self.prepare(np.asarray(image.convert("RGB")))
        return (pixels / 255 - self._mean.cpu()) / self._std.cpu()

    def __call__(self, images: Tensor) -> Tensor:
        """Features [B, D], fp32, where the network is, of images [B, 3, H, W] from `transform`."""
        with torch.no_grad():  # what is returned may be trained on
            return self._pool(images.to(self._device)).float()

    def tokens(self, images: Tensor, layers: Sequence[int] = ()) -> EncoderTokens:
        """All tokens of images from `transform`.

        Args:
            images: [B, 3, H, W].
            layers: blocks whose patch tokens are wanted as well, from 0 or, negative, from the end;
                after the final norm.

        Raises:
            InputError: the network has no tokens.
        """
        model, prefix = self._model, getattr(self._model, "num_prefix_tokens", None)
        if prefix is None:
            raise InputError(f"encoder {self.name} has no patch tokens")
        with torch.no_grad():  # what is returned may be trained on
            given = images.to(self._device)
            found = model.forward_features(given).float()  # [B, N, D]
            rows = images.shape[2] // model.patch_embed.patch_size[0]
            patches = found[:, prefix:]
            between = ()
            if layers:
                between = tuple(
                    layer.float().unflatten(1, (rows, -1))
                    for layer in model.forward_intermediates(
                        given, indices=list(layers), norm=True, output_fmt="NLC",
                        intermediates_only=True,
                    )
                )  # fmt: skip
        return EncoderTokens(
            found[:, 0], patches.mean(dim=1), patches.unflatten(1, (rows, -1)), between
        )

    def patch_tokens(self, tiles: Tiles) -> npt.NDArray[np.float32]:
        """Patch tokens [B, rows, columns, D] of tiles, without class and register tokens.

        Raises:
            InputError: the network has no tokens.
        """
        prefix = getattr(self._model, "num_prefix_tokens", None)
        if prefix is None:
            raise InputError(f"encoder {self.name} has no patch tokens")
        with torch.inference_mode():
            given = self._normalised([self.prepare(tile) for tile in tiles])
            tokens = self._model.forward_features(given)[:, prefix:]  # [B, N, D]
        side = round(tokens.shape[1] ** 0.5)  # inputs are square
        grid: npt.NDArray[np.float32] = tokens.unflatten(1, (side, side)).float().cpu().numpy()
        return grid

    def random_twin(self, seed: int) -> Encoder:
        """The same network, preprocessing and pooling at timm's random initialisation.

        But LayerScale is 1: at its usual start of 1e-5 the blocks are all but switched off, and
        the class tokens of two tiles differ by that little, at the edge of float16. The floor is
        the network with its blocks at work.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # no accelerator's generator is touched
            model = self._rebuild()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.rpartition(".")[2] in _LAYER_SCALES:
                    parameter.fill_(1.0)
        return NetworkEncoder(
            model,
            self._rebuild,
            f"{self.name}-random",
            self._device,
            self.pooling,
            self.input_px,
            self._preprocessing,
        )

    def _normalised(self, prepared: Sequence[Tensor]) -> Tensor:
        """The network's input [B, 3, H, W]."""
        batch = torch.stack(list(prepared)).to(self._device, torch.float32)
        # The same operations in the same order as ToTensor and Normalize: equal to the bit.
        return batch.div_(255).sub_(self._mean).div_(self._std)

    def _pool(self, images: Tensor) -> Tensor:
        """Features [B, D] of the network's input."""
        model = self._model
        if self.pooling == "cls4":
            between = model.forward_intermediates(
                images, indices=LAST_BLOCKS, norm=True, output_fmt="NLC", intermediates_only=True,
                return_prefix_tokens=True,
            )  # fmt: skip
            return torch.cat([prefix[:, 0] for _, prefix in between], dim=1)
        tokens: Tensor = model.forward_features(images)  # [B, N, D], or a map
        if self.pooling == "native":
            native: Tensor = model.forward_head(tokens, pre_logits=True)
            return native
        if self.pooling == "tokens":
            patches = tokens[:, model.num_prefix_tokens :]
            return torch.cat([tokens[:, :1], patches], dim=1).flatten(1)
        parts = []
        if self.pooling in ("cls", "clsmean"):
            parts.append(tokens[:, 0])
        if self.pooling in ("mean", "clsmean"):
            parts.append(tokens[:, model.num_prefix_tokens :].mean(dim=1))
        # Networks that pool by the mean normalise after pooling instead of before.
        norm = getattr(model, "fc_norm", None) or torch.nn.Identity()
        return torch.cat([norm(part) for part in parts], dim=1)  # [B, D]


def load_encoder(
    spec: str,
    device: torch.device | None = None,
    pooling: str | None = None,
    input_px: int | None = None,
) -> Encoder:
    """The encoder that `spec` names.

    Args:
        spec: a folder with ``config.json`` and ``model.safetensors`` as timm writes them, or a run
            folder with such an ``encoder/`` in it; ``timm:NAME`` with pretrained weights (NAME may
            be ``hf-hub:ORG/MODEL``); ``published:NAME`` or ``published:NAME:FOLDER``, see
            `published_encoders` and `converted_encoders`; ``python:MODULE:FUNCTION``, see
            `python_encoder`; ``builtin:stain-texture``, ``builtin:mean-colour``,
            ``builtin:colour-histogram`` or ``builtin:tile-print``. A suffix ``@cls``, ``@mean``,
            ``@clsmean``, ``@native``, ``@cls4`` or ``@tokens`` chooses the pooling.
        device: where the network runs; None: a GPU where there is one.
        pooling: one of `POOLINGS`; else the suffix, else what the folder's config states under
            ``{"eosin": {"pooling": …}}``, else what the network's own head uses.
        input_px: side of the network's input instead of its own, where it takes others.

    Raises:
        InputError: no such encoder, or a folder that does not hold one.
    """
    device = device or choose_device("auto")
    source, at, suffix = spec.rpartition("@")
    if at and suffix in POOLINGS:
        spec, pooling = source, pooling or suffix
    if pooling is not None and pooling not in POOLINGS:
        raise InputError(f"no pooling '{pooling}'; there are: {', '.join(POOLINGS)}")
    kind, _, name = spec.partition(":")
    if kind == "builtin":
        return _builtin(name)
    if kind == "python":
        if pooling is not None:
            raise InputError(f"{spec} pools by itself; leave @{pooling} out")
        return load_python(name, device)
    if kind == "published":
        name, _, where = name.partition(":")
        return _published(name, Path(where) if where else None, device, pooling, input_px)
    if kind == "timm":
        model, fresh = _pretrained(name), partial(_at_random, name)
        return NetworkEncoder(model, fresh, name.replace("/", "_"), device, pooling, input_px)
    folder = _find_folder(Path(spec))
    name = folder.resolve().parent.name if folder.resolve().name == "encoder" else ""
    return NetworkEncoder(
        _load_folder(folder),
        partial(_at_random, f"local-dir:{folder}"),
        name or folder.resolve().name,
        device,
        pooling or _stated_pooling(folder),
        input_px,
    )


def _published(
    name: str, folder: Path | None, device: torch.device, pooling: str | None, input_px: int | None
) -> Encoder:
    if name not in CONVERTED and name not in PUBLISHED:
        raise InputError(
            f"no published encoder '{name}'; there are: {', '.join((*PUBLISHED, *CONVERTED))}"
        )
    if name in CONVERTED:
        known: Converted | Published = CONVERTED[name]
        model, fresh = load_converted(name, folder)
    else:
        known = PUBLISHED[name]
        model = load_published(name, folder)
        source = f"hf-hub:{known.hub}" if folder is None else f"local-dir:{folder}"
        fresh = partial(_at_random, source, **known.all_arguments())
    preprocessing, pooling = known.preprocessing(), pooling or known.pooling
    return NetworkEncoder(model, fresh, name, device, pooling, input_px, preprocessing)


def _at_random(source: str, **arguments: Any) -> Any:
    """A network of timm at its random start."""
    return import_timm().create_model(source, pretrained=False, **arguments)


def _builtin(name: str) -> Encoder:
    if name == "mean-colour":
        return DescriptorEncoder(name, 3, 1, mean_colour)
    if name == "colour-histogram":
        return DescriptorEncoder(name, HISTOGRAM_BINS**3, 1, colour_histogram)
    if name == "stain-texture":
        return DescriptorEncoder(name, STAIN_TEXTURE_DIM, 1, stain_texture)
    if name == "tile-print":
        return DescriptorEncoder(name, PRINT_DIM, PRINT_VERSION, tile_print)
    raise InputError(
        f"no builtin encoder '{name}'; there are: mean-colour, colour-histogram, stain-texture, "
        "tile-print"
    )


def _pretrained(name: str) -> Any:
    timm = import_timm()
    if ":" not in name and not timm.is_model(name):
        raise InputError(f"timm knows no model '{name}'; see timm.list_models()")
    try:
        return timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"timm:{name}: its pretrained weights are neither cached nor to be had "
            f"({_short(error)}); download them where there is a network, or name a folder"
        ) from error


def _find_folder(path: Path) -> Path:
    for folder in (path, path / "encoder"):
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return folder
    if path.is_dir():
        raise InputError(f"{path} holds no encoder: no config.json with a model.safetensors")
    raise InputError(
        f"no encoder '{path}': neither a folder, nor timm:, published:, python: or builtin:NAME"
    )


def _load_folder(folder: Path) -> Any:
    try:
        # No further arguments: timm then loads strictly, and a missing tensor cannot pass.
        return import_timm().create_model(f"local-dir:{folder}", pretrained=True)
    except SafetensorError as error:
        raise InputError(f"{folder / 'model.safetensors'} is damaged: {_short(error)}") from error
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{folder} is not an encoder that timm loads: {_short(error)}") from error


def _stated_pooling(folder: Path) -> str | None:
    """The pooling that the folder's config recommends; timm ignores the key."""
    config = json.loads((folder / "config.json").read_text())
    stated: str | None = config.get("eosin", {}).get("pooling")
    if stated is not None and stated not in POOLINGS:
        raise InputError(f"{folder / 'config.json'} states an unknown pooling '{stated}'")
    return stated


def _resolve_pooling(model: Any, pooling: str | None, name: str) -> str:
    has_tokens = hasattr(model, "num_prefix_tokens")
    has_cls = has_tokens and getattr(model, "cls_token", None) is not None
    if pooling is None:
        own = {"token": "cls", "": "cls", "avg": "mean"}.get(getattr(model, "global_pool", "?"))
        pooling = own if own and has_tokens else "native"
        return "mean" if pooling == "cls" and not has_cls else pooling
    if pooling != "native" and not has_tokens:
        raise InputError(f"encoder {name} has no tokens: its pooling is 'native', not '{pooling}'")
    if pooling in ("cls", "clsmean", "cls4", "tokens") and not has_cls:
        raise InputError(f"encoder {name} has no class token: choose @mean, not @{pooling}")
    return pooling


def _check_input_px(model: Any, input_px: int, name: str) -> None:
    embedding = getattr(model, "patch_embed", None)
    own_px = getattr(embedding, "img_size", None)
    if own_px is not None and not getattr(model, "dynamic_img_size", False):
        if tuple(own_px) != (input_px, input_px):
            raise InputError(f"encoder {name} takes {own_px[0]} px and no other, not {input_px}")
        return
    patch_px = getattr(embedding, "patch_size", None)
    if patch_px is not None and input_px % patch_px[0]:
        raise InputError(f"encoder {name}: {input_px} px is not a multiple of {patch_px[0]}")


def _checked(tile: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    if tile.dtype != np.uint8 or tile.ndim != 3 or tile.shape[2] != 3:
        raise ValueError(f"a tile is uint8 [H, W, 3], not {tile.dtype} {list(tile.shape)}")
    return tile


def _short(error: Exception) -> str:
    """The error's text on one line, cut to a readable length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else f"{text[:157]}…"
