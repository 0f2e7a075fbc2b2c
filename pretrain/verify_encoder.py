"""The verb `export verify`: whether an encoder folder is whole and gives its features here.

Each stage is checked apart, so that what differs is named: the files, the config, timm's loading,
the preprocessing, the features, their pooling, and their drift in 16 bits on this machine.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eosin.configs.errors import EosinError, InputError
from eosin.data_curation.torchvision_import import import_beside_torchvision, import_timm
from eosin.pretrain.export import CHECKSUMS
from eosin.pretrain.golden import HALVES

TOLERANCE = 1e-4
"""Of features, over the largest entry: fp32 on another processor sums in another order."""
PIXEL_TOLERANCE = 1e-5
"""Of the prepared tile; another version of Pillow may round a pixel otherwise (1 / 255 / std)."""


@dataclass(frozen=True, kw_only=True)
class VerifyEncoderConfig:
    """Checks an encoder folder on this machine."""

    encoder: Path
    """Folder that `eosin export` or `eosin pretrain` wrote, or a download of it."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    stage: str
    fine: bool
    words: str


def verify_encoder(config: VerifyEncoderConfig) -> None:
    """Prints what each check finds.

    Raises:
        InputError: the folder holds no encoder.
        EosinError: something differs; the message says how many checks.
    """
    findings = []
    for finding in check_encoder(config.encoder):
        print(f"{'ok     ' if finding.fine else 'DIFFERS'} {finding.stage}: {finding.words}")
        findings.append(finding)
    wrong = [finding.stage for finding in findings if not finding.fine]
    if wrong:
        raise EosinError(f"{config.encoder}: {len(wrong)} checks differ: {', '.join(wrong)}")
    print(f"{config.encoder} is whole, and gives its features here")


def check_encoder(folder: Path) -> Iterator[Finding]:
    """Every check, in order; those that cannot be made any more are left out.

    Raises:
        InputError: the folder holds no encoder.
    """
    for name in (CHECKSUMS, "config.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no encoder of eosin: it has no {name}")
    yield from _files(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        ours: dict[str, Any] = config["eosin"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        yield Finding("config", False, f"config.json is not what eosin writes ({error!r})")
        return
    yield from _versions(ours)
    timm = import_timm()
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as error:  # timm and safetensors raise by kind of damage
        yield Finding(
            "loading", False, f"timm does not load it: {' '.join(str(error).split())[:160]}"
        )
        return
    tensors = len(model.state_dict())
    yield Finding("loading", True, f"bare timm loads it, strictly ({tensors} tensors)")
    try:
        golden = load_file(folder / "golden" / "features.safetensors")
        with Image.open(folder / "golden" / "tile.png") as picture:
            tile = picture.convert("RGB")
        expected = {name: golden[name] for name in ("input", "cls", "mean")}
    except (OSError, SafetensorError, KeyError) as error:
        yield Finding("golden", False, f"its golden tile or features cannot be read ({error!r})")
        return
    data = timm.data.resolve_model_data_config(model)
    seen: Tensor = timm.data.create_transform(**data, is_training=False)(tile)
    yield _preprocessing(seen, expected["input"])
    yield from _features(model, expected, str(ours.get("pooling", "cls")))
    yield from _drift(model, expected, ours.get("golden_drift") or {})
    yield from _other_forms(folder, expected)


def _other_forms(folder: Path, expected: dict[str, Tensor]) -> Iterator[Finding]:
    """ONNX and transformers, where the folder has them and this machine the library."""
    image, cls = expected["input"][None], expected["cls"]
    for form, library in (("onnx", "onnxruntime"), ("transformers", "transformers")):
        if not (folder / form).is_dir():
            continue
        if importlib.util.find_spec(library) is None:
            yield Finding(form, True, f"not checked: {library} is not installed here")
            continue
        try:
            found = _run_onnx(folder, image) if form == "onnx" else _run_transformers(folder, image)
        except Exception as error:  # of another library, on a file that may be damaged
            yield Finding(form, False, f"cannot be run: {' '.join(str(error).split())[:160]}")
            continue
        off = _distance(found, cls) if found.shape == cls.shape else float("inf")
        yield Finding(form, off <= TOLERANCE, f"CLS is off by {off:.1g} of its largest entry")


def _run_onnx(folder: Path, image: Tensor) -> Tensor:
    import onnxruntime

    path = str(folder / "onnx" / "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [features] = session.run(["features"], {"images": image.numpy()})
    return torch.from_numpy(features)[0]


def _run_transformers(folder: Path, image: Tensor) -> Tensor:
    library: Any = import_beside_torchvision("transformers")
    model = library.AutoModel.from_pretrained(folder / "transformers", local_files_only=True)
    with torch.no_grad():
        tokens: Tensor = model.eval()(pixel_values=image).last_hidden_state
    return tokens[0, 0]


def _files(folder: Path) -> Iterator[Finding]:
    lines = [line.split("  ", 1) for line in (folder / CHECKSUMS).read_text().splitlines()]
    sums = {line[-1]: line[0] for line in lines}
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    missing = sorted(sums.keys() - there)
    other = [
        name
        for name, digest in sorted(sums.items())
        if name in there and hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest
    ]
    if missing or other:
        words = [f"missing: {', '.join(missing)}"] if missing else []
        words += [f"not what was written: {', '.join(other)}"] if other else []
        yield Finding("files", False, "; ".join(words))
        return
    beside = sorted(there - sums.keys() - {CHECKSUMS})
    more = f", and {len(beside)} that it does not name ({beside[0]})" if beside else ""
    yield Finding("files", True, f"{len(sums)} files have their checksums{more}")


def _versions(ours: dict[str, Any]) -> Iterator[Finding]:
    made = ours.get("made_with") or {}
    here = {name: metadata.version(name) for name in ("torch", "timm")}
    words = f"torch {here['torch']}, timm {here['timm']} here"
    if made:
        words += f"; made with {', '.join(f'{n} {v}' for n, v in made.items())}"
    yield Finding("versions", True, words)


def _preprocessing(seen: Tensor, expected: Tensor) -> Finding:
    if seen.shape != expected.shape:
        return Finding(
            "preprocessing", False,
            f"the transform gives {list(seen.shape)}, and {list(expected.shape)} was written: "
            "another input size",
        )  # fmt: skip
    off = float((seen - expected).abs().max())
    if off <= PIXEL_TOLERANCE:
        return Finding("preprocessing", True, "timm's transform gives the golden input")
    # x' = (p - m') / s' is a line of x = (p - m) / s where only the normalisation differs
    lines = [np.polyfit(e.flatten().numpy(), s.flatten().numpy(), 1) for e, s in
             zip(expected, seen, strict=True)]  # fmt: skip
    fits = torch.stack([e * float(k) + float(d) for e, (k, d) in zip(expected, lines, strict=True)])
    only = float((fits - seen).abs().max()) <= 1e-3
    what = (
        "mean or std differ" if only else "resizing or cropping differs (crop_pct, interpolation)"
    )
    return Finding("preprocessing", False, f"the input is off by up to {off:.3g}: {what}")


def _features(model: Any, expected: dict[str, Tensor], pooling: str) -> Iterator[Finding]:
    """Features of the golden input itself, so that preprocessing plays no part."""
    with torch.no_grad():
        given = model(expected["input"][None])[0]
        tokens = model.forward_features(expected["input"][None])[0]
    prefix = model.num_prefix_tokens
    network = {"cls": tokens[0], "mean": tokens[prefix:].mean(dim=0)}
    off = {name: _distance(network[name], expected[name]) for name in network}
    worst = max(off, key=lambda name: off[name])
    if off[worst] > TOLERANCE:
        yield Finding(
            "features", False,
            f"'{worst}' is off by {off[worst]:.2g} of its largest entry: other weights or another "
            "network",
        )  # fmt: skip
    else:
        yield Finding("features", True, f"as written, to {off[worst]:.1g} of the largest entry")
    wanted = expected["mean" if pooling == "mean" else "cls"]
    if given.shape == wanted.shape and _distance(given, wanted) <= TOLERANCE:
        yield Finding("pooling", True, f"the network gives '{pooling}'")
        return
    found = [n for n, f in network.items() if given.shape == f.shape and _distance(given, f) < 1e-6]
    said = f"'{found[0]}'" if found else f"something else ({list(given.shape)})"
    yield Finding("pooling", False, f"the network gives {said}, and '{pooling}' was written")


def _drift(model: Any, expected: dict[str, Tensor], written: dict[str, Any]) -> Iterator[Finding]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, image = model.to(device), expected["input"][None].to(device)
    for name, dtype in HALVES.items():
        with torch.no_grad(), torch.autocast(device, dtype):
            half = model.forward_features(image)[0, 0].float().cpu()
        cosine = float(torch.cosine_similarity(half, expected["cls"], dim=0))
        before = written.get(name, {}).get("cosine")
        said = f"cosine {cosine:.6f} with fp32 on this {device}"
        if before is not None:
            said += f", {before:.6f} where it was made"
        fine = before is None or 1 - cosine <= 4 * (1 - before) + 1e-4
        yield Finding(name, fine, said)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())
