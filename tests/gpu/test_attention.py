"""What only a GPU can show of the encoder: fused attention, compiled blocks, no waiting."""

import functools
import importlib.util

import numpy as np
import pytest
import torch
from torch import Tensor

from eosin.pretrain.attention import (
    AttentionFn,
    Packing,
    choose_attention,
    sdpa_attention,
    varlen_attention,
    xformers_attention,
)
from eosin.pretrain.drop_path import DropPath
from eosin.pretrain.recompute import Recompute
from eosin.pretrain.stream import cls_rows, patch_rows
from eosin.pretrain.vit import Vit, VitConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

NEEDS_XFORMERS = pytest.mark.skipif(
    importlib.util.find_spec("xformers") is None, reason="xformers is not installed"
)
FUSED = [
    pytest.param(varlen_attention, id="varlen"),
    pytest.param(xformers_attention, id="xformers", marks=NEEDS_XFORMERS),
]
ALL = [pytest.param(sdpa_attention, id="sdpa"), *FUSED]
BF16 = 0.02  # of the largest value: 8 bits, and sums in another order


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float = BF16) -> None:
    scale = float(theirs.float().abs().max())
    assert float((ours.float() - theirs.float()).abs().max()) <= tolerance * scale


@pytest.mark.pitfall(18)
@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("groups", [((4, 261), (16, 54)), ((1, 7),), ((3, 1), (2, 300), (5, 64))])
def test_fused_kernels_equal_sdpa_forward_and_backward(
    groups: tuple[tuple[int, int], ...], fused: AttentionFn
) -> None:
    packing = Packing(groups)
    results = []
    for function, dtype in ((fused, torch.bfloat16), (sdpa_attention, torch.float32)):
        generator = torch.Generator("cuda").manual_seed(0)
        shape = (packing.tokens, 3, 6, 64)  # slices of one projection, as in the network
        drawn = torch.randn(shape, device="cuda", generator=generator).bfloat16()
        qkv = drawn.to(dtype).requires_grad_()
        out = function(*qkv.unbind(1), packing)
        weights = torch.randn(out.shape, device="cuda", generator=generator).bfloat16()
        (out * weights).sum().backward()
        assert qkv.grad is not None
        results.append((out.detach(), *qkv.grad.unbind(1)))
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs)


@NEEDS_XFORMERS
def test_the_operator_around_xformers_keeps_what_the_compiler_assumes() -> None:
    q, k, v = (
        torch.randn(98, 2, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    )
    operator = torch.ops.eosin.block_diagonal_attention.default
    torch.library.opcheck(operator, (q, k, v, [2, 37, 3, 8]), rtol=0.02, atol=0.02)


@NEEDS_XFORMERS
def test_auto_takes_xformers_in_16_bits_alone() -> None:
    cuda = torch.device("cuda")
    assert choose_attention("auto", cuda, torch.bfloat16) is xformers_attention
    assert choose_attention("auto", cuda, torch.float32) is sdpa_attention


def test_varlen_is_chosen_by_name() -> None:
    cuda = torch.device("cuda")
    assert choose_attention("varlen", cuda, torch.bfloat16) is varlen_attention


SIZES = [(8, 56, 56), (16, 28, 28)]  # two global and four local views of four samples


@functools.cache
def state() -> dict[str, Tensor]:
    vit = Vit(network_config())
    vit.initialise(torch.Generator().manual_seed(0))
    return vit.state_dict()


def network_config() -> VitConfig:
    return VitConfig(
        width=128, depth=3, heads=2, patch_px=14, image_px=56, layer_scale=0.5, positions="rope"
    )


def network(attention: AttentionFn) -> Vit:
    vit = Vit(network_config(), attention)
    vit.load_state_dict(state())
    return vit.cuda()


def one_step(vit: Vit, step: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Wanted rows of one step, and their gradients; nothing here waits for the device."""
    generator = torch.Generator("cuda").manual_seed(step)
    crops = [torch.randn(n, 3, h, w, device="cuda", generator=generator) for n, h, w in SIZES]
    packing = vit.packing(SIZES)
    masked = np.flatnonzero(np.random.default_rng(step).random(8 * 16) < 0.2)
    rows = np.concatenate([cls_rows(packing), patch_rows(packing, 0, vit.config.prefix, masked)])
    drop = DropPath(0.5, 0, step, group_size=4)
    vit.zero_grad()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        out = vit.rows(crops, None, torch.from_numpy(rows), drop=drop, batch=4)
    (out * torch.randn(out.shape, device="cuda", generator=generator)).sum().backward()
    grads = [p.grad for p in vit.parameters() if p.grad is not None]
    return [out.detach(), *(g.clone() for g in grads)]


@pytest.mark.parametrize("attention", ALL)
def test_a_bf16_step_stays_near_the_fp32_one(attention: AttentionFn) -> None:
    exact = one_step(network(sdpa_attention), 0, torch.float32)
    for ours, theirs in zip(one_step(network(attention), 0), exact, strict=True):
        assert_near(ours, theirs, 0.05)


@pytest.mark.parametrize("attention", ALL)
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputing_changes_no_gradient(mode: Recompute, attention: AttentionFn) -> None:
    plain = one_step(network(attention), 0)
    vit = network(attention)
    vit.recompute(mode)
    for ours, theirs in zip(one_step(vit, 0), plain, strict=True):
        assert_near(ours, theirs, 0.01)  # scattered sums come in any order


# torch's tracer reads .grad of activations, and hides the warning only where warnings are shown
@pytest.mark.pitfall(24)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("attention", ALL)
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_compiled_blocks_equal_eager_ones_and_compile_once(
    mode: Recompute, attention: AttentionFn
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    vit, compiled = network(attention), network(attention)
    compiled.compile_blocks()
    compiled.recompute(mode)
    for step in range(6):
        for ours, theirs in zip(one_step(compiled, step), one_step(vit, step), strict=True):
            assert_near(ours, theirs, 0.05)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize("attention", ALL)
def test_a_step_never_waits_for_the_device(attention: AttentionFn) -> None:
    vit = network(attention)
    one_step(vit, 0)  # masks are cached, kernels loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one_step(vit, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
