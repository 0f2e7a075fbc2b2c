"""Encoders against bare timm, and descriptors against naive loops."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from eosin.configs.errors import InputError
from eosin.data_curation.encoder import NetworkEncoder, load_encoder
from eosin.data_curation.torchvision_import import import_timm

CPU = torch.device("cpu")
Writer = Callable[..., Path]


def tiles(*sizes: tuple[int, int], seed: int = 0) -> list[npt.NDArray[np.uint8]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def bare_timm(folder: Path, images: list[npt.NDArray[np.uint8]]) -> tuple[object, torch.Tensor]:
    """The model and its transformed input, as timm's own documentation has it."""
    timm = import_timm()
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    return model, torch.stack([transform(Image.fromarray(image)) for image in images])


@pytest.mark.parametrize(
    "pretrained_cfg",
    [{}, {"crop_pct": 1.0}, {"interpolation": "bilinear"}, {"crop_mode": "squash"}],
)
def test_the_network_sees_what_timms_own_transform_gives_it_to_the_bit(
    tmp_path: Path, write_encoder_folder: Writer, pretrained_cfg: dict[str, object]
) -> None:
    folder = write_encoder_folder(tmp_path / "tiny", pretrained_cfg=pretrained_cfg)
    images = tiles((32, 32), (50, 50), (50, 42), (20, 97))
    seen: list[torch.Tensor] = []
    encoder = load_encoder(str(folder), CPU)
    assert isinstance(encoder, NetworkEncoder)
    encoder._model.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder.embed(images)
    _, expected = bare_timm(folder, images)
    assert torch.equal(seen[0], expected)


@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_the_default_pooling_gives_the_features_that_bare_timm_gives(
    tmp_path: Path, write_encoder_folder: Writer, global_pool: str
) -> None:
    folder = write_encoder_folder(tmp_path / "tiny", global_pool=global_pool)
    images = tiles((40, 40), (40, 40))
    model, batch = bare_timm(folder, images)
    encoder = load_encoder(str(folder), CPU)
    assert encoder.pooling == {"token": "cls", "avg": "mean"}[global_pool]
    with torch.inference_mode():
        expected = model(batch).numpy()  # type: ignore[operator]
    features = encoder.embed(images)
    assert features.dtype == np.float32 and features.shape == (2, encoder.dim)
    np.testing.assert_allclose(features, expected, atol=1e-6)


def test_poolings_take_the_class_token_and_the_patch_tokens_but_no_register(
    tmp_path: Path, write_encoder_folder: Writer
) -> None:
    folder = write_encoder_folder(tmp_path / "tiny", reg_tokens=3)
    images = tiles((32, 32), (32, 32))
    model, batch = bare_timm(folder, images)
    with torch.inference_mode():
        tokens = model.forward_features(batch).numpy()  # type: ignore[attr-defined]
    assert tokens.shape == (2, 1 + 3 + 16, 32)
    cls, mean = tokens[:, 0], tokens[:, 4:].mean(axis=1)
    for pooling, expected in (
        ("cls", cls),
        ("mean", mean),
        ("clsmean", np.concatenate([cls, mean], axis=1)),
    ):
        encoder = load_encoder(f"{folder}@{pooling}", CPU)
        assert encoder.dim == expected.shape[1]
        np.testing.assert_allclose(encoder.embed(images), expected, atol=1e-5)
    encoder = load_encoder(str(folder), CPU)
    assert isinstance(encoder, NetworkEncoder)
    patches = encoder.patch_tokens(images)
    np.testing.assert_allclose(patches, tokens[:, 4:].reshape(2, 4, 4, 32), atol=1e-5)


def test_a_folder_may_state_its_pooling_and_timm_still_loads_it(
    tmp_path: Path, write_encoder_folder: Writer
) -> None:
    folder = write_encoder_folder(tmp_path / "run" / "encoder", eosin={"pooling": "clsmean"})
    encoder = load_encoder(str(tmp_path / "run"), CPU)
    assert (encoder.name, encoder.pooling, encoder.dim) == ("run", "clsmean", 64)
    assert load_encoder(f"{folder}@mean", CPU).pooling == "mean"
    import_timm().create_model(f"local-dir:{folder}", pretrained=True)


def test_the_digest_changes_with_weights_preprocessing_and_pooling(
    tmp_path: Path, write_encoder_folder: Writer
) -> None:
    plain = load_encoder(str(write_encoder_folder(tmp_path / "a")), CPU)
    same = load_encoder(str(write_encoder_folder(tmp_path / "b")), CPU)
    other_mean = write_encoder_folder(tmp_path / "c", pretrained_cfg={"mean": [0.5, 0.5, 0.5]})
    digests = {
        plain.digest,
        load_encoder(str(tmp_path / "a"), CPU, pooling="mean").digest,
        load_encoder(str(other_mean), CPU).digest,
        plain.random_twin(0).digest,
        plain.random_twin(1).digest,
    }
    assert same.digest == plain.digest
    assert len(digests) == 5


def test_a_random_twin_is_a_function_of_its_seed_and_leaves_the_global_generator_alone(
    tmp_path: Path, write_encoder_folder: Writer
) -> None:
    folder = write_encoder_folder(tmp_path / "tiny", init_values=1e-5)
    encoder = load_encoder(f"{folder}@clsmean", CPU)
    state = torch.random.get_rng_state()
    twin, again = encoder.random_twin(3), encoder.random_twin(3)
    assert torch.equal(torch.random.get_rng_state(), state)
    images = tiles((32, 32), (32, 32))
    np.testing.assert_array_equal(twin.embed(images), again.embed(images))
    assert np.abs(twin.embed(images) - encoder.embed(images)).max() > 0.1
    assert (twin.dim, twin.pooling, twin.mean) == (encoder.dim, encoder.pooling, encoder.mean)
    assert twin.transform_digest == encoder.transform_digest
    # The class token of the twin sees the tile, though LayerScale would start at 1e-5.
    assert np.abs(np.diff(twin.embed(images)[:, :32], axis=0)).max() > 0.01


def test_another_input_size_is_taken_where_the_network_takes_it_and_refused_elsewhere(
    tmp_path: Path, write_encoder_folder: Writer
) -> None:
    dynamic = write_encoder_folder(tmp_path / "dynamic", dynamic_img_size=True)
    encoder = load_encoder(str(dynamic), CPU, input_px=64)
    assert isinstance(encoder, NetworkEncoder)
    assert encoder.patch_tokens(tiles((64, 64))).shape == (1, 8, 8, 32)
    with pytest.raises(InputError, match="not a multiple of 8"):
        load_encoder(str(dynamic), CPU, input_px=60)
    with pytest.raises(InputError, match="takes 32 px and no other"):
        load_encoder(str(write_encoder_folder(tmp_path / "fixed")), CPU, input_px=64)


def test_a_convolutional_network_has_its_own_pooling_alone(tmp_path: Path) -> None:
    timm = import_timm()
    with torch.random.fork_rng():
        model = timm.create_model("test_efficientnet", num_classes=0)
    encoder = NetworkEncoder(model, "test_efficientnet", "net", CPU, None)
    images = tiles((160, 160))
    assert encoder.pooling == "native"
    batch = torch.stack([encoder.prepare(image) for image in images]).float()
    batch = (batch / 255 - encoder._mean) / encoder._std
    with torch.inference_mode():
        expected = model(batch).numpy()
    np.testing.assert_allclose(encoder.embed(images), expected, atol=1e-5)
    assert encoder.dim == expected.shape[1]
    with pytest.raises(InputError, match="no tokens"):
        NetworkEncoder(model, "test_efficientnet", "net", CPU, "cls")
    with pytest.raises(InputError, match="no patch tokens"):
        encoder.patch_tokens(images)


def test_broken_encoders_end_in_one_clear_line(
    tmp_path: Path, write_encoder_folder: Writer
) -> None:
    good = write_encoder_folder(tmp_path / "good")

    def broken(name: str, **config: object) -> Path:
        folder = write_encoder_folder(tmp_path / name)
        text = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**text, **config}))
        return folder

    not_json = broken("not_json")
    (not_json / "config.json").write_text("{")
    cut = broken("cut")
    (cut / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:-100])
    (tmp_path / "empty").mkdir()
    cases = {
        str(tmp_path / "nowhere"): "neither a folder",
        str(tmp_path / "empty"): "no config.json",
        str(not_json): "not an encoder that timm loads",
        str(cut): "damaged",
        str(broken("unknown", architecture="vit_enormous")): "vit_enormous",
        str(broken("misfit", model_args={"embed_dim": 32, "depth": 2})): "not an encoder",
        str(broken("badpool", eosin={"pooling": "max"})): "unknown pooling 'max'",
        f"{good}@max": "neither a folder",
        "timm:vit_enormous": "knows no model",
        "builtin:grey": "mean-colour, colour-histogram",
    }
    for spec, message in cases.items():
        with pytest.raises(InputError, match=message) as error:
            load_encoder(spec, CPU)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no pooling 'max'"):
        load_encoder(str(good), CPU, pooling="max")


def test_weights_that_cannot_be_had_are_an_error_and_never_random(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timm = import_timm()

    def offline(*_: object, **__: object) -> None:
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match="neither cached nor to be had"):
        load_encoder("timm:vit_tiny_patch16_224", CPU)


def test_mean_colour_and_histogram_match_naive_loops() -> None:
    (tile,) = tiles((7, 5))
    counts = np.zeros((8, 8, 8))
    for r, g, b in tile.reshape(-1, 3):
        counts[r // 32, g // 32, b // 32] += 1
    histogram = load_encoder("builtin:colour-histogram", CPU).embed([tile])
    np.testing.assert_allclose(histogram[0], np.sqrt(counts.ravel() / 35), atol=1e-6)
    mean = load_encoder("builtin:mean-colour", CPU).embed([tile])
    np.testing.assert_allclose(mean[0], tile.mean(axis=(0, 1)) / 255, atol=1e-6)
    with pytest.raises(InputError, match="no weights"):
        load_encoder("builtin:mean-colour", CPU).random_twin(0)


def test_what_is_not_an_rgb_uint8_tile_is_refused() -> None:
    encoder = load_encoder("builtin:mean-colour", CPU)
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)):
        with pytest.raises(ValueError, match="uint8"):
            encoder.embed([wrong])  # type: ignore[list-item]
