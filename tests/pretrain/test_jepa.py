"""Patch regression: the predictor crop by crop without padding, and the loss in loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eosin.pretrain.jepa import JepaConfig, Predictor, jepa_loss, sincos_positions

WIDTH = 10
CONFIG = JepaConfig(weight=1.0, depth=2, width=16, heads=2)
GRID = (2, 3)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def predictor(config: JepaConfig = CONFIG, scale: float = 8.0) -> Predictor:
    module = Predictor(config, WIDTH)
    module.initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():  # larger weights, so that attention tells tokens apart
        for p in module.parameters():
            p.mul_(scale if p.ndim > 1 else 1.0)
    return module


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    masks = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    seeds = normal(3, 6, WIDTH, seed=1), normal(3, WIDTH, seed=2), normal(3, 6, WIDTH, seed=3)
    return *seeds, masks.bool()


def naive_prediction(p: Predictor, visible: Tensor, cls: Tensor, mask: Tensor) -> Tensor:
    """One crop: CLS, then visible tokens, then a query for each masked place; [masked, D]."""
    places = []
    for n in range(6):
        row, column, place = n // 3, n % 3, []
        for coordinate in (row, column):
            angles = [coordinate / 10_000 ** (f / 4) for f in range(4)]
            place += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        places.append(torch.tensor(place))
    tokens = [p.embed(cls)] if p.config.use_cls else []
    tokens += [p.embed(visible[n]) + places[n] for n in range(6) if not mask[n]]
    tokens += [p.query + places[n] for n in range(6) if mask[n]]
    x = torch.stack(tokens)
    for block in p.blocks:
        q, k, v = block.qkv(block.norm1(x)).chunk(3, dim=-1)
        heads = []
        for h in range(2):
            s = slice(8 * h, 8 * h + 8)
            heads.append((q[:, s] @ k[:, s].T / math.sqrt(8)).softmax(-1) @ v[:, s])
        x = x + block.proj(torch.cat(heads, dim=-1))
        x = x + block.fc2(F.gelu(block.fc1(block.norm2(x))))
    return p.out(p.norm(x[len(x) - int(mask.sum()) :]))


@pytest.mark.parametrize("use_cls", [True, False])
def test_predictions_equal_those_of_each_crop_alone_without_masked_tokens(use_cls: bool) -> None:
    p = predictor(JepaConfig(depth=2, width=16, heads=2, use_cls=use_cls))
    patches, cls, _, masks = batch()
    out = p(patches, cls, masks, GRID)
    assert out.shape == (3, 6, WIDTH)
    for crop in range(2):
        expected = naive_prediction(p, patches[crop], cls[crop], masks[crop])
        torch.testing.assert_close(out[crop][masks[crop]], expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_each_crop_alone() -> None:
    """Of the loss in loops, by the tokens that are seen and by every weight."""
    patches, cls, teacher, masks = batch()
    found: list[list[Tensor | None]] = []
    for naive in (False, True):
        p = predictor(scale=2.0)
        seen, own = patches.clone().requires_grad_(), cls.clone().requires_grad_()
        if naive:
            loss = torch.zeros(())
            for crop in range(2):
                predicted = naive_prediction(p, seen[crop], own[crop], masks[crop])
                target = F.layer_norm(teacher[crop][masks[crop]], (WIDTH,), eps=1e-6)
                loss = loss + F.smooth_l1_loss(predicted, target) / 3
        else:
            loss = jepa_loss(p(seen, own, masks, GRID), teacher, masks, 3, CONFIG)
        loss.backward()
        found.append([loss.detach(), seen.grad, own.grad, *(w.grad for w in p.parameters())])
    for ours, expected in zip(*found, strict=True):
        assert ours is not None and expected is not None
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_the_students_tokens_at_masked_places_are_not_read() -> None:
    patches, cls, teacher, masks = batch()
    patches.requires_grad_()
    cls.requires_grad_()
    p = predictor()
    jepa_loss(p(patches, cls, masks, GRID), teacher, masks, 3, CONFIG).backward()
    assert patches.grad is not None and cls.grad is not None
    assert (patches.grad[masks] == 0).all()
    assert (patches.grad[:2][~masks[:2]].abs().sum(-1) > 0).all()
    assert (patches.grad[2] == 0).all() and cls.grad[:2].abs().min() > 0
    assert all(q.grad is not None and q.grad.abs().sum() > 0 for q in p.parameters())


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_loss_equals_loops_and_counts_each_masked_crop_alike(beta: float) -> None:
    predicted, _, teacher, masks = batch()
    config = JepaConfig(beta=beta)
    total = 0.0
    for crop in range(3):
        count = int(masks[crop].sum())
        for n in range(6):
            if masks[crop, n]:
                t = teacher[crop, n]
                t = (t - t.mean()) / (t.var(unbiased=False) + 1e-6).sqrt()
                for a, b in zip(predicted[crop, n].tolist(), t.tolist(), strict=True):
                    e = abs(a - b)
                    error = e * e / (2 * beta) if e < beta else e - beta / 2
                    total += error / WIDTH / count / 4
    loss = jepa_loss(predicted, teacher, masks, 4, config)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    without = jepa_loss(predicted[:2], teacher[:2], masks[:2], 4, config)
    torch.testing.assert_close(loss, without)


@pytest.mark.parametrize("crops", [0, 3])
def test_no_mask_gives_zero_with_a_graph(crops: int) -> None:
    patches, cls, teacher, masks = (x[:crops] for x in batch())
    patches.requires_grad_()
    p = predictor()
    nothing = torch.zeros_like(masks)
    loss = jepa_loss(p(patches, cls, nothing, GRID), teacher, nothing, 3, CONFIG)
    loss.backward()
    assert loss.item() == 0.0
    assert patches.grad is not None and not patches.grad.any()


def test_finite_on_large_and_constant_features() -> None:
    _, cls, _, masks = batch()
    for value in (0.0, 1.0, 1e15):
        patches = torch.full((3, 6, WIDTH), value).requires_grad_()
        predicted = predictor(scale=1.0)(patches, cls, masks, GRID)
        loss = jepa_loss(predicted, torch.full((3, 6, WIDTH), value), masks, 3, CONFIG)
        loss.backward()
        assert torch.isfinite(loss)
        assert patches.grad is not None and torch.isfinite(patches.grad).all()


def test_initialise_fills_every_parameter_from_the_generator() -> None:
    with torch.device("meta"):
        built = Predictor(CONFIG, WIDTH)
    modules = [built.to_empty(device="cpu"), Predictor(CONFIG, WIDTH)]
    for module in modules:
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(math.nan)
        module.initialise(torch.Generator().manual_seed(7))
    for a, b in zip(*(m.parameters() for m in modules), strict=True):
        assert torch.isfinite(a).all() and torch.equal(a, b)
    assert not list(built.buffers())
    assert modules[0].embed.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_positions_tell_all_places_of_a_rectangle_apart() -> None:
    places = sincos_positions((3, 5), 16, torch.device("cpu"))
    assert places.shape == (15, 16) and torch.pdist(places).min() > 0.1
    longer = sincos_positions((3, 9), 16, torch.device("cpu")).unflatten(0, (3, 9))
    torch.testing.assert_close(longer[:, :5].flatten(0, 1), places)  # a place has one code


def test_the_predictor_learns_what_the_visible_patches_tell() -> None:
    config = JepaConfig(depth=1, width=32, heads=2)
    p = predictor(config, scale=4.0)
    optimizer = torch.optim.Adam(p.parameters(), lr=3e-3)
    masks = batch()[3][:2].repeat(32, 1)
    losses = []
    for step in range(60):
        content = normal(64, 1, WIDTH, seed=step).expand(-1, 6, -1)  # a crop's patches are alike
        loss = jepa_loss(p(content, content[:, 0], masks, GRID), content, masks, 64, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])


def test_bf16_is_close_and_the_loss_stays_fp32() -> None:
    patches, cls, teacher, masks = batch()
    p = predictor(scale=1.0)
    exact = jepa_loss(p(patches, cls, masks, GRID), teacher, masks, 3, CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        loss = jepa_loss(p(patches, cls, masks, GRID), teacher, masks, 3, CONFIG)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=1e-2)


def test_config_refuses_shapes_that_do_not_fit() -> None:
    for bad in (
        {"weight": -1.0},
        {"depth": 0},
        {"width": 18},
        {"heads": 5},
        {"mlp_ratio": 0.0},
        {"beta": 0.0},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
            JepaConfig(**bad)  # type: ignore[arg-type]
