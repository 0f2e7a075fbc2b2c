"""Positions against hand-written resampling, timm's rotary embedding, and their own properties."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from eosin.data_curation.torchvision_import import import_timm
from eosin.pretrain.positions import (
    Interpolation,
    Jitter,
    RopeConfig,
    learned_positions,
    rope_angles,
    rotate,
    spread_over,
    turns,
)


def cubic(a: float) -> Callable[[float], float]:
    """Keys' convolution kernel (1981), equation 4."""

    def kernel(x: float) -> float:
        x = abs(x)
        if x < 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    return kernel


def resampling(old: int, new: int, convention: Interpolation) -> NDArray[np.float64]:
    """One axis as a matrix [new, old], in float64 and with loops."""
    weights = np.zeros((new, old))
    for i in range(new):
        if convention == "antialias":  # a = -1/2, widened when it shrinks, cut at the border
            step = old / new
            wide, centre, kernel = max(step, 1.0), (i + 0.5) * step, cubic(-0.5)
            for j in range(old):
                weights[i, j] = kernel((j + 0.5 - centre) / wide)
            weights[i] /= weights[i].sum()
        else:  # a = -3/4, four taps, the border repeated
            centre, kernel = (i + 0.5) * old / (new + 0.1) - 0.5, cubic(-0.75)
            for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
                weights[i, min(max(j, 0), old - 1)] += kernel(j - centre)
    return weights


@pytest.mark.pitfall(10)
@pytest.mark.parametrize("convention", ["antialias", "offset"])
@pytest.mark.parametrize(("grid", "size"), [(37, (16, 16)), (16, (7, 7)), (16, (23, 5))])
def test_learned_positions_follow_the_published_conventions(
    grid: int, size: tuple[int, int], convention: Interpolation
) -> None:
    table = torch.randn(1, grid**2, 3, generator=torch.Generator().manual_seed(0))
    found = learned_positions(table, grid, size, convention)
    square = table[0].double().numpy().reshape(grid, grid, 3)
    vertical, horizontal = (resampling(grid, side, convention) for side in size)
    expected = np.einsum("iy,jx,yxd->ijd", vertical, horizontal, square).reshape(1, -1, 3)
    assert np.abs(found.numpy() - expected).max() < 1e-5


@pytest.mark.pitfall(10)
def test_learned_positions_are_timms_and_in_fp32() -> None:
    timm = import_timm()
    table = torch.randn(1, 16 * 16, 8).bfloat16()
    found = learned_positions(table, 16, (7, 9), "antialias")
    assert found.dtype == torch.float32
    theirs = timm.layers.resample_abs_pos_embed(
        table.float(), new_size=[7, 9], old_size=[16, 16], num_prefix_tokens=0
    )
    torch.testing.assert_close(found, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("convention", ["antialias", "offset"])
def test_a_table_that_fits_is_not_touched_and_every_entry_learns(
    convention: Interpolation,
) -> None:
    table = torch.randn(1, 16, 2).requires_grad_()
    assert learned_positions(table, 4, (4, 4), convention) is table
    learned_positions(table, 4, (8, 6), convention).square().sum().backward()
    assert table.grad is not None and bool((table.grad != 0).all())


@pytest.mark.pitfall(22)
@pytest.mark.parametrize(("size", "base"), [((16, 16), 100.0), ((3, 7), 30.0)])
def test_rotations_are_timms(size: tuple[int, int], base: float) -> None:
    timm = import_timm()
    theirs = timm.layers.RotaryEmbeddingDinoV3(32, temperature=base, rotate_half=True)
    sin, cos = theirs.get_embed(size).chunk(2, dim=-1)  # each [N, C], both halves alike
    angles = rope_angles(size, 32, RopeConfig(base=base))
    table = torch.from_numpy(turns(angles, prefix=0))
    ours_cos, ours_sin = table.chunk(2, dim=-1)
    torch.testing.assert_close(ours_cos.repeat(1, 2), cos, atol=3e-6, rtol=0)
    torch.testing.assert_close(ours_sin.repeat(1, 2), sin, atol=3e-6, rtol=0)

    heads = torch.randn(5, size[0] * size[1], 32)  # [H, N, C]
    expected = timm.layers.apply_rot_embed_cat(heads, theirs.get_embed(size), half=True)
    found = rotate(heads.transpose(0, 1), table).transpose(0, 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_prefix_tokens_are_not_turned_and_no_length_changes() -> None:
    table = torch.from_numpy(turns(rope_angles((2, 3), 8, RopeConfig()), prefix=3))
    packed = spread_over([(2, 9)], [table])
    x = torch.randn(18, 2, 4, 8)
    out = rotate(x, packed)
    assert torch.equal(out[[0, 1, 2, 9, 10, 11]], x[[0, 1, 2, 9, 10, 11]])
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotate(x[9:], table), out[9:])
    assert not torch.allclose(out[3:9], x[3:9])


def test_scores_depend_on_the_distance_alone() -> None:
    side = 6
    table = torch.from_numpy(turns(rope_angles((side, side), 16, RopeConfig()), prefix=0))
    q, k = torch.randn(2, 16).double()
    turned_q = rotate(q.expand(side * side, 16), table).unflatten(0, (side, side))
    turned_k = rotate(k.expand(side * side, 16), table).unflatten(0, (side, side))
    near = (turned_q[:-2, :-1] * turned_k[2:, 1:]).sum(-1)  # two down, one to the right, anywhere
    torch.testing.assert_close(near, near[0, 0].expand_as(near), atol=1e-5, rtol=0)
    assert float(near[0, 0]) != pytest.approx(float(turned_q[0, 0] @ turned_k[0, 0]), abs=1e-3)


@pytest.mark.pitfall(22)
def test_rotations_are_taken_in_fp32_whatever_the_input() -> None:
    table = torch.from_numpy(turns(rope_angles((8, 8), 16, RopeConfig()), prefix=0))
    x = torch.randn(64, 16).bfloat16()
    out = rotate(x, table)
    assert table.dtype == torch.float32 and out.dtype == torch.bfloat16
    assert torch.equal(out, rotate(x.float(), table).bfloat16())


@pytest.mark.pitfall(22)
def test_jitter_is_a_pure_function_of_the_step_within_its_bounds() -> None:
    config = RopeConfig(shift=0.2, stretch=1.5, rescale=2.0)
    assert np.array_equal(
        rope_angles((4, 4), 8, config, Jitter(1, 2), 1),
        rope_angles((4, 4), 8, config, Jitter(1, 2), 1),
    )
    draws = [Jitter(0, step).factors(config, group) for step in range(1000) for group in (0, 1)]
    assert len({shift.tobytes() for shift, _ in draws}) == 2000
    shifts = np.array([shift for shift, _ in draws])  # [2000, 2]
    logs = np.log([factor for _, factor in draws])
    assert 0.195 < np.abs(shifts).max() <= 0.2 and np.abs(shifts.mean(0)).max() < 0.01
    assert np.abs(logs).max() <= math.log(1.5) + math.log(2.0)
    both, apart = logs.mean(1), logs[:, 0] - logs[:, 1]
    assert np.abs(both.mean()) < 0.03 and np.abs(apart.mean()) < 0.03
    # the variances of uniform logarithms: a shared one, and one an axis
    assert apart.var() == pytest.approx(2 * math.log(1.5) ** 2 / 3, rel=0.1)
    assert both.var() == pytest.approx(math.log(2) ** 2 / 3 + math.log(1.5) ** 2 / 6, rel=0.1)


def test_jitter_shifts_and_then_stretches_the_coordinates() -> None:
    config, jitter = RopeConfig(shift=0.2, stretch=1.5), Jitter(0, 0)
    shift, factor = jitter.factors(config, 0)
    still, moved = (rope_angles((2, 4), 4, config, j) for j in (None, jitter))  # [8, 2]: one period
    expected = (still / (2 * math.pi) + shift) * factor * 2 * math.pi
    assert np.allclose(moved, expected)
    none = RopeConfig()
    assert np.array_equal(rope_angles((2, 4), 4, none, jitter), rope_angles((2, 4), 4, none))


@pytest.mark.parametrize(
    "changes", [{"base": 1.0}, {"shift": -0.1}, {"stretch": 0.5}, {"rescale": 0.0}]
)
def test_what_is_no_period_shift_or_factor_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(
        ValueError, match="=".join(str(part) for part in next(iter(changes.items())))
    ):
        RopeConfig(**changes)
