"""Networks in place of the classical masks: a timm network and an ONNX file, both trained here."""

import json
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from eosin.configs.errors import InputError
from eosin.data_curation.segmenter import load_segmenter, segmenter_digest
from eosin.data_curation.slide import Slide
from eosin.data_curation.synthetic import SyntheticConfig, read_truth, write_slides
from eosin.data_curation.tiles import TileConfig, tile
from eosin.data_curation.torchvision_import import import_timm

MPP = 4.0
NETWORK = "test_resnet.r160_in1k"


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    config = SyntheticConfig(n_slides=3, size_px=1024, seed=5, artefact_share=1.0, mpp=1.0)
    return write_slides(tmp_path_factory.mktemp("slides"), config, workers=1)


def picture(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.bool_]]:
    """The overview at `MPP`, its tissue and its pen."""
    with Slide(path) as slide:
        rgb, _ = slide.overview(MPP)
    truth = read_truth(path)
    size = (rgb.shape[1], rgb.shape[0])
    tissue, pen = (
        cv2.resize(plane.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
        for plane in (truth.tissue, truth.pen)
    )
    return rgb, tissue, pen


def dice(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))


def write(folder: Path, **values: object) -> Path:
    folder.mkdir(exist_ok=True)
    lines = {"mpp": MPP, "tissue": [1], "size_px": 96, "overlap_px": 16, **values}
    text = "\n".join(f"{key}: {json.dumps(value)}" for key, value in lines.items())
    (folder / "segmenter.yaml").write_text(text + "\n")
    load_segmenter.cache_clear()
    return folder


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory: pytest.TempPathFactory, slides: list[Path]) -> Path:
    """A random timm network with a head fitted by least squares: glass, tissue, pen."""
    torch.manual_seed(0)
    backbone = import_timm().create_model(NETWORK, features_only=True, pretrained=False).eval()
    rgb, tissue, pen = picture(slides[0])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    scaled = (torch.from_numpy(rgb) / 255 - mean) / std
    with torch.no_grad():
        maps = backbone(scaled.permute(2, 0, 1)[None])[0][0]
    size = (maps.shape[2], maps.shape[1])
    of_class = [~tissue & ~pen, tissue & ~pen, pen]
    shares = [
        cv2.resize(c.astype(np.float32), size, interpolation=cv2.INTER_AREA) for c in of_class
    ]
    inputs = torch.cat([maps.flatten(1).T, torch.ones(maps[0].numel(), 1)], 1)
    wanted = torch.from_numpy(np.stack(shares).reshape(3, -1).T.copy())
    solved = 12 * torch.linalg.lstsq(inputs, wanted).solution.T
    weights = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    weights |= {"head.weight": solved[:, :-1].contiguous(), "head.bias": solved[:, -1].contiguous()}
    folder = write(tmp_path_factory.mktemp("timm"), network=NETWORK, pen=[2], stage=0)
    save_file(weights, folder / "weights.safetensors")
    return folder


def test_a_timm_network_finds_tissue_and_pen(timm_folder: Path, slides: list[Path]) -> None:
    """Tissue on slides that it has not seen, too; their pens have other colours."""
    load_segmenter.cache_clear()
    network = load_segmenter(timm_folder)
    for place, path in enumerate(slides):
        rgb, tissue, pen = picture(path)
        found = network.find_tissue(rgb, (MPP, MPP))
        assert dice(found.tissue & ~pen, tissue & ~pen) > 0.85
        assert place or dice(found.pen, pen) > 0.5
        assert not (found.tissue & found.pen).any()


def onnx_network(path: Path) -> None:
    """Logits (0, 20 · (0.75 - green)): tissue where green is below 0.75. By onnx, not by us."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.zeros((2, 3, 1, 1), np.float32)
    weight[1, 1] = -20
    constants = [
        numpy_helper.from_array(weight, "weight"),
        numpy_helper.from_array(np.array([0, 15], np.float32), "bias"),
    ]
    node = helper.make_node("Conv", ["image", "weight", "bias"], ["logits"])
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, None, None])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 2, None, None])
    graph = helper.make_graph([node], "green", [image], [logits], constants)
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)


@pytest.mark.parametrize(("size_px", "overlap_px"), [(96, 16), (512, 64), (33, 3)])
def test_an_onnx_network_sees_every_pixel_once(
    tmp_path: Path, slides: list[Path], size_px: int, overlap_px: int
) -> None:
    """Its masks are those of the same rule on the whole picture, whatever the windows."""
    folder = write(
        tmp_path / "onnx", network="net.onnx", size_px=size_px, overlap_px=overlap_px,
        mean=[0, 0, 0], std=[1, 1, 1],
    )  # fmt: skip
    onnx_network(folder / "net.onnx")
    rgb, _, pen = picture(slides[0])
    found = load_segmenter(folder).find_tissue(rgb, (MPP, MPP))
    assert dice(found.pen, pen) > 0.85  # the classical mask: the network knows no pen
    assert np.array_equal(found.tissue, (rgb[..., 1] / 255 < 0.75) & ~found.pen)


def test_tiles_are_laid_by_the_network(tmp_path: Path, slides: list[Path]) -> None:
    folder = write(tmp_path / "onnx", network="net.onnx", mean=[0, 0, 0], std=[1, 1, 1])
    onnx_network(folder / "net.onnx")
    out = tmp_path / "tiles"
    options = {"slides": slides[1], "mpp": 1.0, "size_px": 64, "workers": 1}
    tile(TileConfig(out=out, segmenter=folder, **options))
    table = pq.read_table(out / "tiles.parquet").to_pylist()
    with Slide(slides[1]) as slide:
        rgb, _ = slide.overview(MPP)
    below = (rgb[..., 1] / 255 < 0.75).astype(np.float64)
    expected = [
        below[row["row"] * 16 : row["row"] * 16 + 16, row["column"] * 16 : row["column"] * 16 + 16]
        for row in table
    ]
    clean = [i for i, row in enumerate(table) if row["pen_fraction"] == 0]
    found = np.array([table[i]["tissue_fraction"] for i in clean])
    np.testing.assert_allclose(found, [expected[i].mean() for i in clean], atol=1e-6)
    # another network: tiled again
    onnx_network(folder / "net.onnx")
    config = write(folder, network="net.onnx", mean=[0, 0, 0], std=[1, 1, 1], threshold=0.9)
    tile(TileConfig(out=out, segmenter=config, **options))
    again = pq.read_table(out / "tiles.parquet").to_pylist()
    assert sum(r["tissue_fraction"] for r in again) < sum(r["tissue_fraction"] for r in table)


def test_what_is_no_segmenter_is_said(tmp_path: Path, timm_folder: Path) -> None:
    with pytest.raises(InputError, match=r"has no segmenter.yaml"):
        load_segmenter(tmp_path)
    with pytest.raises(InputError, match=r"net.onnx does not exist"):
        load_segmenter(write(tmp_path / "a", network="net.onnx"))
    (tmp_path / "a" / "net.onnx").write_bytes(b"no network")
    load_segmenter.cache_clear()
    with pytest.raises(InputError, match=r"net.onnx is no ONNX network"):
        load_segmenter(tmp_path / "a")
    with pytest.raises(InputError, match="threshold must lie between 0 and 1"):
        segmenter_digest(write(tmp_path / "a", network="net.onnx", threshold=2.0))
    with pytest.raises(InputError, match="less than half of size_px=96"):
        segmenter_digest(write(tmp_path / "a", network="net.onnx", overlap_px=48))
    write(tmp_path / "b", network=NETWORK)
    (tmp_path / "b" / "weights.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(InputError, match=f"no segmenter '{NETWORK}' in"):
        load_segmenter(tmp_path / "b")
    (tmp_path / "b" / "weights.safetensors").write_bytes(
        (timm_folder / "weights.safetensors").read_bytes()
    )
    other = load_segmenter(write(tmp_path / "b", network=NETWORK))
    with pytest.raises(InputError, match=r"head.weight is \(3, 32\), and stage -1"):
        other.find_tissue(np.zeros((50, 50, 3), np.uint8), (MPP, MPP))
    few = load_segmenter(write(tmp_path / "b", network=NETWORK, tissue=[1, 7], stage=0))
    with pytest.raises(InputError, match=r"its config names channel 7"):
        few.find_tissue(np.zeros((50, 50, 3), np.uint8), (MPP, MPP))
