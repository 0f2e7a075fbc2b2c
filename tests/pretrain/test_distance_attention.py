"""Attention that falls with distance: against the whole matrix, in 16 bits, turned; its memory."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from eosin.pretrain.distance_attention import (
    Places,
    alibi_slopes,
    dense_distance_attention,
    distance_attention,
)

HEADS, CHANNELS = 4, 8
SIZES = (1, 700, 31, 30, 28, 1500, 3, 31)


def tokens_of(
    sizes: tuple[int, ...], seed: int = 0, sections: bool = False
) -> tuple[list[Tensor], Places]:
    """q, k, v, and places; the first token of every sequence has none."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    qkv = [torch.randn(total, HEADS, CHANNELS, generator=generator) for _ in range(3)]
    position = torch.randint(0, 60, (total, 2), generator=generator).float()
    placed = torch.ones(total, dtype=torch.bool)
    offsets = tuple(np.cumsum([0, *sizes]).tolist())
    placed[list(offsets[:-1])] = False
    section = torch.randint(0, 3, (total,), generator=generator) if sections else None
    return qkv, Places(position, placed, offsets, section)


@pytest.mark.parametrize("sections", [False, True])
def test_tiles_are_the_whole_matrix_forwards_and_backwards(sections: bool) -> None:
    qkv, places = tokens_of(SIZES, 0, sections)
    slopes = alibi_slopes(HEADS)
    given = torch.randn(sum(SIZES), HEADS, CHANNELS)
    found = []
    for attend in (distance_attention, dense_distance_attention):
        own = [x.clone().requires_grad_() for x in qkv]
        out = attend(*own, slopes, places)
        out.backward(given)
        found.append([out.detach(), *(x.grad for x in own)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_few_tokens_written_out() -> None:
    qkv, places = tokens_of((5,))
    q, k, v = qkv
    slopes = alibi_slopes(HEADS)
    assert slopes.tolist() == [2**-2, 2**-4, 2**-6, 2**-8]
    got = distance_attention(q, k, v, slopes, places)
    for head in range(HEADS):
        for i in range(5):
            scores = []
            for j in range(5):
                away = float((places.position[i] - places.position[j]).norm())
                away = away if i and j else 0.0  # the first has no place
                scores.append(float(q[i, head] @ k[j, head]) / CHANNELS**0.5
                              - float(slopes[head]) * away)  # fmt: skip
            shares = torch.tensor(scores).softmax(0)
            torch.testing.assert_close(got[i, head], shares @ v[:, head], atol=1e-5, rtol=1e-5)


def test_packed_sequences_and_pieces_do_not_see_each_other() -> None:
    qkv, places = tokens_of(SIZES, 1, sections=True)
    slopes = alibi_slopes(HEADS)
    out = distance_attention(*qkv, slopes, places)
    changed = [x.clone() for x in qkv]
    for x in changed:
        x[1:701] += 1  # the second sequence alone
    moved = distance_attention(*changed, slopes, places)
    assert torch.equal(moved[701:], out[701:]) and torch.equal(moved[:1], out[:1])
    assert places.section is not None
    inside = torch.arange(701, 2201)
    own = inside[places.placed[inside] & (places.section[inside] == 1)]
    others = inside[places.placed[inside] & (places.section[inside] == 2)]
    changed = [x.clone() for x in qkv]
    for x in changed:
        x[own] += 1
    moved = distance_attention(*changed, slopes, places)
    assert torch.equal(moved[others], out[others]) and not torch.equal(moved[own], out[own])


def test_turning_and_mirroring_change_nothing() -> None:
    qkv, places = tokens_of((900,), 2)
    slopes, position = alibi_slopes(HEADS), places.position
    out = distance_attention(*qkv, slopes, places)
    for turned in (
        position.flip(1), position * torch.tensor([-1.0, 1.0]),
        torch.stack([-position[:, 1], position[:, 0]], dim=1), position + 1000.0,
    ):  # fmt: skip
        again = distance_attention(*qkv, slopes, places._replace(position=turned))
        torch.testing.assert_close(again, out, atol=1e-5, rtol=1e-5)
    stretched = distance_attention(*qkv, slopes, places._replace(position=position * 2))
    assert not torch.allclose(stretched, out, atol=1e-3)


def test_in_16_bits_it_errs_less_than_the_whole_matrix_in_16_bits() -> None:
    qkv, places = tokens_of((1200,), 3)
    slopes = alibi_slopes(HEADS)
    halves = [x.bfloat16() for x in qkv]
    exact = dense_distance_attention(*(x.double() for x in halves), slopes.double(), places)
    errors = [
        (attend(*halves, slopes, places).double() - exact).abs().mean()
        for attend in (distance_attention, dense_distance_attention)
    ]
    assert errors[0] <= 1.5 * errors[1]


STEP = """
import sys, torch
from pathlib import Path
from eosin.pretrain.distance_attention import Places, alibi_slopes, distance_attention
torch.set_num_threads(1)
n = int(sys.argv[1])
def mib(name):
    [line] = [s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(name)]
    return int(line.split()[1]) / 1024
q, k, v = (torch.randn(n, 1, 16, requires_grad=True) for _ in range(3))
places = Places(torch.rand(n, 2) * 100, torch.ones(n, dtype=torch.bool), (0, n))
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = mib("VmRSS")
distance_attention(q, k, v, alibi_slopes(1), places).sum().backward()
print(mib("VmHWM") - before)
"""


@pytest.mark.slow
def test_memory_grows_with_the_tokens_and_not_with_their_square() -> None:
    """The whole matrix of 40,000 tokens and one head is 6 GiB in fp32, and twice that backwards."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    found = []
    for n in (5000, 10_000, 20_000, 40_000):
        command = [sys.executable, "-c", STEP, str(n)]
        said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found.append(float(said.stdout))
    print("MiB at 5, 10, 20 and 40 thousand tokens:", [round(mib) for mib in found])
    assert found[-1] < 200
    assert found[-1] < found[0] + 9 * max(found[1] - found[0], 4)  # on a line, with room for noise
