"""The encoder against a naive reference, and packed crops against one crop at a time."""

import shutil
from collections.abc import Iterator
from typing import Any

import naive
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eosin.pretrain.attention import Packing
from eosin.pretrain.drop_path import DropPath
from eosin.pretrain.positions import Jitter, RopeConfig
from eosin.pretrain.recompute import Recompute
from eosin.pretrain.stream import cls_rows, patch_rows, plan_blocks
from eosin.pretrain.vit import Vit, VitConfig


def make_vit(**changes: object) -> Vit:
    config = VitConfig(
        **{  # type: ignore[arg-type]
            "width": 32, "depth": 2, "heads": 2, "patch_px": 8, "image_px": 32, "registers": 2,
            "layer_scale": 0.5, **changes,
        }
    )  # fmt: skip
    vit = Vit(config)
    generator = torch.Generator().manual_seed(0)
    vit.initialise(generator)
    with torch.no_grad():  # so that no parameter is at a value that hides it
        for parameter in vit.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return vit


@pytest.mark.pitfall(9)
@pytest.mark.parametrize(
    "changes",
    [{}, {"ffn": "swiglu"}, {"registers": 0}, {"interpolation": "offset"}, {"positions": "rope"}],
)
@pytest.mark.parametrize("size", [(32, 32), (16, 16), (24, 40)])
def test_forward_equals_the_naive_reference(
    changes: dict[str, object], size: tuple[int, int]
) -> None:
    vit = make_vit(**changes)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    patches = size[0] * size[1] // 64
    masks = torch.arange(2 * patches).reshape(2, patches) % 3 == 0
    out = vit([images], [masks])[0]
    for i in range(2):
        expected = naive.vit(dict(vit.named_parameters()), vit.config, images[i], masks[i])
        torch.testing.assert_close(out.cls[i], expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            out.patches[i], expected[vit.config.prefix :], atol=1e-5, rtol=1e-5
        )


@pytest.mark.pitfall(18)
def test_packed_crops_equal_one_crop_at_a_time_forward_and_backward() -> None:
    vit = make_vit()
    generator = torch.Generator().manual_seed(2)
    crops = [torch.randn(3, 3, 32, 32, generator=generator),
             torch.randn(4, 3, 16, 16, generator=generator)]  # fmt: skip
    packed = vit(crops)
    sum(out.cls.square().sum() + out.patches.sin().sum() for out in packed).backward()
    together = [p.grad.clone() for p in vit.parameters() if p.grad is not None]
    vit.zero_grad()
    for group, out in zip(crops, packed, strict=True):
        for i in range(len(group)):
            alone = vit([group[i : i + 1]])[0]
            torch.testing.assert_close(alone.cls[0], out.cls[i], atol=1e-5, rtol=1e-5)
            (alone.cls.square().sum() + alone.patches.sin().sum()).backward()
    apart = [p.grad for p in vit.parameters() if p.grad is not None]
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


@pytest.mark.pitfall(18)
def test_a_changed_crop_changes_no_other() -> None:
    vit = make_vit()
    crops = [torch.randn(3, 3, 32, 32), torch.randn(2, 3, 16, 16)]
    before = vit(crops)
    crops[0][1] += 1.0
    after = vit(crops)
    assert torch.equal(before[0].cls[[0, 2]], after[0].cls[[0, 2]])
    assert torch.equal(before[1].patches, after[1].patches)
    assert not torch.allclose(before[0].cls[1], after[0].cls[1])


@pytest.mark.pitfall(18)
@pytest.mark.parametrize("drop", [None, DropPath(0.5, 0, 3, group_size=2)])
@pytest.mark.parametrize(("group", "index"), [(0, 1), (1, 4)])
def test_a_crop_of_nans_reaches_no_other(group: int, index: int, drop: DropPath | None) -> None:
    """Through no branch, kept or left out, and no row that is read."""
    vit, crops = make_vit(positions="rope"), some_crops()
    wanted = torch.from_numpy(cls_rows(vit.packing([(n, h, w) for n, _, h, w in CROPS])))
    before = vit.rows(crops, None, wanted, drop=drop, batch=2)
    crops[group][index] = torch.nan
    after = vit.rows(crops, None, wanted, drop=drop, batch=2)
    spoilt = 4 * group + index
    others = [row for row in range(10) if row != spoilt]
    assert torch.equal(before[others], after[others])
    assert bool(before.isfinite().all()) and bool(after[spoilt].isnan().all())


@pytest.mark.pitfall(17)
def test_drop_path_keeps_an_exact_count_and_the_expectation() -> None:
    uneven = DropPath(0.3, seed=0, step=0, group_size=8)
    assert (uneven.keep, uneven.scale) == (5, 8 / 5)  # of what is kept, not 1 / (1 - rate)
    kept = DropPath(0.3, seed=0, step=5, group_size=10).kept(0, 0, 0, sequences=40, batch=20)
    assert len(kept) == 28 == len(kept.unique())
    for start in (0, 10, 20, 30):  # 7 of each group of 10 samples in each view
        assert int(((kept >= start) & (kept < start + 10)).sum()) == 7

    vit = make_vit(depth=1)
    block, packing, x = vit.blocks[0], Packing(((10, 4),)), torch.randn(40, 32)
    block.ls2.gamma.data.zero_()  # the attention branch alone, which is linear in what is kept
    with torch.no_grad():
        full = block(x, plan_blocks(packing, 1, x.device)[0])
        drops = [DropPath(0.5, 0, step, 10) for step in range(400)]
        plans = [plan_blocks(packing, 1, x.device, drop=drop, batch=10)[0] for drop in drops]
        draws = [block(x, rows) for rows in plans]
    mean = torch.stack(draws).mean(0)
    assert (mean - full).abs().mean() < 0.1 * (full - x).abs().mean()
    crops = [torch.randn(10, 3, 16, 16)]
    one = vit([crops[0][:1]], drop=DropPath(0.9, 0, 0, 1), batch=1)[0].cls
    torch.testing.assert_close(one, vit([crops[0][:1]])[0].cls)  # one sample is never dropped


@pytest.mark.pitfall(17)
def test_drop_path_draws_do_not_depend_on_how_the_batch_is_split() -> None:
    whole = DropPath(0.5, 1, 2, group_size=4).kept(1, 1, 0, sequences=8, batch=8)
    second = DropPath(0.5, 1, 2, group_size=4, first_group=1).kept(1, 1, 0, sequences=4, batch=4)
    assert torch.equal(whole[whole >= 4] - 4, second)


@pytest.mark.pitfall(17)
def test_a_layers_draw_depends_on_no_other_layer_and_branches_differ() -> None:
    drop = DropPath(0.5, 1, 2, group_size=8)
    deep, shallow = drop.draw(6, 0, 16, 16), drop.draw(2, 0, 16, 16)
    assert np.array_equal(deep[:2], shallow)
    for layer, branch in ((0, 0), (1, 1)):
        kept = drop.kept(layer, branch, 0, sequences=16, batch=16).numpy()
        assert np.array_equal(kept, deep[layer, branch])
    assert len({deep[layer, branch].tobytes() for layer in range(6) for branch in (0, 1)}) > 8
    assert not np.array_equal(deep, drop.draw(6, 1, 16, 16))  # another crop group


CROPS = ((4, 3, 32, 32), (6, 3, 16, 24))  # two global and three local views of two samples


def some_crops() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator) for shape in CROPS]


def some_rows(vit: Vit, seed: int = 0) -> tuple[Tensor, NDArray[np.bool_]]:
    """All CLS rows, and those of a few masked patches of the first group."""
    packing = vit.packing([(n, h, w) for n, _, h, w in CROPS])
    masks = np.random.default_rng(seed).random((4, 16)) < 0.2
    patches = patch_rows(packing, 0, vit.config.prefix, np.flatnonzero(masks))
    return torch.from_numpy(np.concatenate([cls_rows(packing), patches])), masks


def gradients(vit: Vit, loss: Tensor) -> list[Tensor]:
    vit.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in vit.parameters() if p.grad is not None]


@pytest.mark.parametrize("drop", [None, DropPath(0.5, 0, 3, group_size=2)])
@pytest.mark.parametrize("changes", [{}, {"positions": "rope"}, {"ffn": "swiglu", "registers": 0}])
def test_wanted_rows_equal_those_of_the_whole_forward_with_their_gradients(
    changes: dict[str, object], drop: DropPath | None
) -> None:
    vit = make_vit(**changes)
    crops, (wanted, masks) = some_crops(), some_rows(vit)
    seen = [torch.from_numpy(masks), None]
    groups = vit(crops, seen, drop=drop, batch=2)
    expected = torch.cat([*(g.cls for g in groups), groups[0].patches[torch.from_numpy(masks)]])
    rows = vit.rows(crops, seen, wanted, drop=drop, batch=2)
    torch.testing.assert_close(rows, expected, atol=1e-6, rtol=1e-6)
    weights = torch.randn(rows.shape, generator=torch.Generator().manual_seed(3))
    theirs = gradients(vit, (expected * weights).sum())
    for a, b in zip(gradients(vit, (rows * weights).sum()), theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

    shuffled = wanted.flip(0).repeat(2)  # any order, any row twice
    again = vit.rows(crops, seen, shuffled, drop=drop, batch=2)
    torch.testing.assert_close(again, rows.flip(0).repeat(2, 1), atol=1e-6, rtol=1e-6)


def test_the_last_feed_forward_and_norm_see_the_wanted_rows_alone() -> None:
    vit = make_vit()
    crops, (wanted, _) = some_crops(), some_rows(vit)
    seen: dict[str, int] = {}
    for name in ("blocks.1.mlp", "blocks.1.attn.proj", "norm", "blocks.0.mlp"):
        vit.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen.__setitem__(name, len(inputs[0]))
        )
    vit.rows(crops, None, wanted)
    tokens = seen.pop("blocks.0.mlp")
    assert tokens == 4 * 19 + 6 * 9 and set(seen.values()) == {len(wanted)}


def test_rows_of_tokens_are_found_where_the_stream_holds_them() -> None:
    packing, prefix = Packing(((2, 6), (3, 4))), 2
    names = [
        (g, s, t) for g, (n, m) in enumerate(packing.groups) for s in range(n) for t in range(m)
    ]
    assert [names[row] for row in cls_rows(packing)] == [
        (g, s, 0) for g, n in ((0, 2), (1, 3)) for s in range(n)
    ]
    found = patch_rows(packing, 1, prefix, np.array([0, 3, 5]))
    assert [names[row] for row in found] == [(1, 0, 2), (1, 1, 3), (1, 2, 3)]


@pytest.mark.parametrize("wanted", [torch.tensor([0.0]), torch.tensor([130]), torch.tensor([-1])])
def test_rows_that_there_are_not_are_refused(wanted: Tensor) -> None:
    with pytest.raises(ValueError, match="wanted"):
        make_vit().rows(some_crops(), None, wanted)


@pytest.fixture
def compiler() -> Iterator[Any]:
    dynamo = pytest.importorskip("torch._dynamo")
    dynamo.reset()
    dynamo.utils.counters.clear()
    yield dynamo
    dynamo.reset()


# torch's tracer reads .grad of activations, and hides the warning only where warnings are shown
NOISE = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def steps_alike(vit: Vit, compiled: Vit, dynamo: Any, steps: int) -> None:
    """Compiled rows and gradients equal the eager ones, and no step after the first compiles."""
    crops, drop = some_crops(), DropPath(0.5, 0, 0, group_size=2)
    sizes = set()
    for step in range(steps):
        wanted, _ = some_rows(vit, step)
        sizes.add(len(wanted))
        results = []
        for network in (vit, compiled):
            rows = network.rows(crops, None, wanted, drop=drop, batch=2, jitter=Jitter(0, step))
            with torch.no_grad():
                teacher = network(crops[:1])[0].patches
            results.append([rows.detach(), teacher, *gradients(network, rows.sin().sum())])
        for ours, theirs in zip(*results, strict=True):
            scale = max(float(theirs.abs().max()), 1.0)
            assert float((ours - theirs).abs().max()) <= 1e-5 * scale
        if step == 0:
            graphs = dynamo.utils.counters["stats"]["unique_graphs"]
    assert len(sizes) > 2
    # one for a block and one for the last block of the student, one for the teacher
    assert dynamo.utils.counters["stats"]["unique_graphs"] == graphs == 3
    assert not dynamo.utils.counters["graph_break"]


@pytest.mark.pitfall(24)
@NOISE
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_blocks_trace_to_one_graph_each_and_never_again(mode: Recompute, compiler: Any) -> None:
    vit = make_vit(depth=3, positions="rope", rope=RopeConfig(shift=0.1, stretch=2.0))
    compiled = Vit(vit.config)
    compiled.load_state_dict(vit.state_dict())
    compiled.compile_blocks(backend="aot_eager")
    compiled.recompute(mode)
    steps_alike(vit, compiled, compiler, 5)


@pytest.mark.pitfall(24)
@NOISE
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, inside the compiler
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of torch needs a C++ one")
def test_compiled_blocks_equal_eager_ones(compiler: Any) -> None:
    vit = make_vit(depth=3, positions="rope")
    compiled = Vit(vit.config)
    compiled.load_state_dict(vit.state_dict())
    compiled.compile_blocks()
    steps_alike(vit, compiled, compiler, 5)


class Live(TorchDispatchMode):
    """Remembers every storage that an operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.made[reference.cdata] = reference, storage.nbytes()
        return out

    def bytes(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def test_recomputing_keeps_less_and_changes_no_gradient() -> None:
    vit = make_vit(depth=3, positions="rope", ffn="swiglu")
    crops, (wanted, _) = some_crops(), some_rows(vit)
    drop = DropPath(0.5, 0, 3, group_size=2)
    kept, grads = {}, {}
    modes: tuple[Recompute, ...] = ("none", "selective", "full")
    for mode in modes:
        vit.recompute(mode)
        with Live() as live:
            rows = vit.rows(crops, None, wanted, drop=drop, batch=2)
            kept[mode] = live.bytes()
        grads[mode] = gradients(vit, rows.sin().sum())
    assert kept["full"] < 0.5 * kept["selective"] and kept["selective"] < 0.8 * kept["none"]
    for mode in modes[1:]:
        for a, b in zip(grads["none"], grads[mode], strict=True):
            assert torch.equal(a, b)


@pytest.mark.pitfall(22)
def test_jitter_moves_a_rotary_network_and_no_learned_one() -> None:
    moved = {}
    for positions in ("learned", "rope"):
        vit = make_vit(positions=positions, rope=RopeConfig(rescale=2.0))
        still, jittered = (
            vit(some_crops(), jitter=jitter)[0].cls for jitter in (None, Jitter(0, 1))
        )
        moved[positions] = not torch.allclose(still, jittered)
        assert not torch.allclose(still, vit([some_crops()[0].flip(3)])[0].cls)
    assert moved == {"learned": False, "rope": True}


def test_bf16_stays_within_its_rounding_of_fp32() -> None:
    vit = make_vit(positions="rope")
    crops, (wanted, _) = some_crops(), some_rows(vit)
    for drop in (None, DropPath(0.5, 0, 3, group_size=2)):
        exact = vit.rows(crops, None, wanted, drop=drop, batch=2).detach()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            rounded = vit.rows(crops, None, wanted, drop=drop, batch=2)
        assert rounded.dtype == torch.float32
        assert float((rounded - exact).abs().max()) < 0.05 * float(exact.abs().max())


@pytest.mark.pitfall(12)
@pytest.mark.parametrize(
    ("width", "ratio", "multiple", "hidden"),
    [
        (1024, 4.0, 8, 2736),  # DINOv2 L, when it is given SwiGLU
        (1536, 4.0, 8, 4096),  # DINOv2 g
        (1280, 4.0, 8, 3416),  # Virchow2's H
        (1280, 6.0, 8, 5120),  # DINOv3 H+
        (4096, 3.0, 64, 8192),  # DINOv3 7B
    ],
)
def test_hidden_sizes_are_the_published_ones(
    width: int, ratio: float, multiple: int, hidden: int
) -> None:
    config = VitConfig(
        width=width, heads=16, ffn="swiglu", mlp_ratio=ratio, swiglu_multiple=multiple
    )
    assert config.hidden == hidden
    assert VitConfig(width=width, heads=16, mlp_ratio=ratio).hidden == width * ratio


@pytest.mark.pitfall(12)
def test_norms_and_layer_scale_start_as_published() -> None:
    vit = Vit(VitConfig(width=32, depth=2, heads=2, patch_px=8, image_px=32))
    vit.initialise(torch.Generator().manual_seed(0))
    x = 1e-3 * torch.randn(4, 32)  # of a variance near the constant, so that it is seen
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0)[:, None] + 1e-6).sqrt()
    norms = [m for m in vit.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 2 * 2 + 1
    for norm in norms:
        torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=1e-4)
    gammas = [p for name, p in vit.named_parameters() if name.endswith(".gamma")]
    assert len(gammas) == 4 and all(bool((gamma == 1e-5).all()) for gamma in gammas)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 5}, "heads=5"),
        ({"image_px": 30}, "image_px=30"),
        ({"registers": 9}, "registers=9"),
        ({"swiglu_multiple": 0}, "swiglu_multiple=0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio=0"),
        ({"positions": "rope", "width": 36, "heads": 6}, "positions=rope"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_vit(**changes)
