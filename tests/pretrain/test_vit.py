"""The encoder against a naive reference, and packed crops against one crop at a time."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eosin.configs.errors import ConfigError
from eosin.pretrain.attention import Packing, choose_attention, sdpa_attention
from eosin.pretrain.drop_path import DropPath
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


def naive_forward(vit: Vit, image: Tensor, mask: Tensor | None) -> Tensor:
    """One image [3, H, W] → normalised tokens [P + N, D], written out with loops."""
    c, p = vit.config, {k: v.detach() for k, v in vit.named_parameters()}
    patch = c.patch_px
    rows, cols = image.shape[1] // patch, image.shape[2] // patch
    tokens = []
    for i in range(rows):
        for j in range(cols):
            square = image[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            token = p["patch_embed.proj.weight"].flatten(1) @ square.flatten()
            token = token + p["patch_embed.proj.bias"]
            if mask is not None and mask[i * cols + j]:
                token = p["mask_token"][0]
            tokens.append(token)
    positions = p["pos_embed"][0]
    if (rows, cols) != (c.grid, c.grid):
        square = positions.T.reshape(1, c.width, c.grid, c.grid)
        square = F.interpolate(square, size=(rows, cols), mode="bicubic", antialias=True)
        positions = square[0].flatten(1).T
    x = torch.cat([p["cls_token"][0], p["reg_token"][0], torch.stack(tokens) + positions])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (c.width,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)

    for i in range(c.depth):
        b = f"blocks.{i}."
        y = norm(x, b + "norm1") @ p[b + "attn.qkv.weight"].T + p[b + "attn.qkv.bias"]
        q, k, v = y.chunk(3, dim=-1)
        heads = []
        size = c.width // c.heads
        for h in range(c.heads):
            s = slice(h * size, (h + 1) * size)
            heads.append((q[:, s] @ k[:, s].T / math.sqrt(size)).softmax(-1) @ v[:, s])
        y = torch.cat(heads, dim=-1) @ p[b + "attn.proj.weight"].T + p[b + "attn.proj.bias"]
        x = x + p[b + "ls1.gamma"] * y
        y = norm(x, b + "norm2") @ p[b + "mlp.fc1.weight"].T + p[b + "mlp.fc1.bias"]
        if c.ffn == "swiglu":
            gate, value = y.chunk(2, dim=-1)
            y = gate * torch.sigmoid(gate) * value
        else:
            y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        y = y @ p[b + "mlp.fc2.weight"].T + p[b + "mlp.fc2.bias"]
        x = x + p[b + "ls2.gamma"] * y
    return norm(x, "norm")


@pytest.mark.parametrize("changes", [{}, {"ffn": "swiglu"}, {"registers": 0}])
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
        expected = naive_forward(vit, images[i], masks[i])
        torch.testing.assert_close(out.cls[i], expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            out.patches[i], expected[vit.config.prefix :], atol=1e-5, rtol=1e-5
        )


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


def test_a_changed_crop_changes_no_other() -> None:
    vit = make_vit()
    crops = [torch.randn(3, 3, 32, 32), torch.randn(2, 3, 16, 16)]
    before = vit(crops)
    crops[0][1] += 1.0
    after = vit(crops)
    assert torch.equal(before[0].cls[[0, 2]], after[0].cls[[0, 2]])
    assert torch.equal(before[1].patches, after[1].patches)
    assert not torch.allclose(before[0].cls[1], after[0].cls[1])


def test_sdpa_per_group_equals_attention_under_the_block_mask() -> None:
    packing = Packing(((2, 5), (3, 2)))
    q, k, v = torch.randn(3, packing.tokens, 2, 8).unbind(0)
    owner = torch.repeat_interleave(torch.arange(5), torch.tensor(packing.lengths))
    mask = owner[:, None] == owner[None]
    expected = F.scaled_dot_product_attention(
        *(t.transpose(0, 1) for t in (q, k, v)), attn_mask=mask
    ).transpose(0, 1)
    torch.testing.assert_close(sdpa_attention(q, k, v, packing), expected, atol=1e-6, rtol=1e-5)


def test_xformers_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(ConfigError, match="attention=xformers needs CUDA"):
        choose_attention("xformers", torch.device("cpu"), torch.float32)
    chosen = choose_attention("auto", torch.device("cpu"), torch.float32)
    assert chosen is sdpa_attention


def test_drop_path_keeps_an_exact_count_and_the_expectation() -> None:
    kept = DropPath(0.3, seed=0, step=5, group_size=10).kept(0, 0, 0, sequences=40, batch=20)
    assert len(kept) == 28 == len(kept.unique())
    for start in (0, 10, 20, 30):  # 7 of each group of 10 samples in each view
        assert int(((kept >= start) & (kept < start + 10)).sum()) == 7

    vit = make_vit(depth=1)
    block, packing, x = vit.blocks[0], Packing(((10, 4),)), torch.randn(40, 32)
    block.ls2.gamma.data.zero_()  # the attention branch alone, which is linear in what is kept
    with torch.no_grad():
        full = block(x, packing, None, 10)
        draws = [block(x, packing, DropPath(0.5, 0, s, 10), 10) for s in range(400)]
    mean = torch.stack(draws).mean(0)
    assert (mean - full).abs().mean() < 0.1 * (full - x).abs().mean()
    crops = [torch.randn(10, 3, 16, 16)]
    one = vit([crops[0][:1]], drop=DropPath(0.9, 0, 0, 1), batch=1)[0].cls
    torch.testing.assert_close(one, vit([crops[0][:1]])[0].cls)  # one sample is never dropped


def test_drop_path_draws_do_not_depend_on_how_the_batch_is_split() -> None:
    whole = DropPath(0.5, 1, 2, group_size=4).kept(1, 1, 0, sequences=8, batch=8)
    second = DropPath(0.5, 1, 2, group_size=4, first_group=1).kept(1, 1, 0, sequences=4, batch=4)
    assert torch.equal(whole[whole >= 4] - 4, second)


def test_hidden_sizes_are_the_published_ones() -> None:
    assert VitConfig(width=1024, heads=16, ffn="swiglu").hidden == 2736
    assert VitConfig(width=1536, heads=24, ffn="swiglu").hidden == 4096
    assert VitConfig(width=384, heads=6).hidden == 1536


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 5}, "heads=5"),
        ({"image_px": 30}, "image_px=30"),
        ({"registers": 9}, "registers=9"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_vit(**changes)
