"""The slide encoder: packed as each slide alone, its places, and what does not change it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eosin.pretrain.drop_path import DropPath
from eosin.pretrain.slide.batch import Stream
from eosin.pretrain.slide.encoder import SlideEncoder, SlideModelConfig, SourceShape
from eosin.pretrain.slide.views import View

DIM = 10
SHAPES = [SourceShape("a", DIM), SourceShape("b", 6)]
TINY = {"width": 16, "depth": 2, "heads": 2, "registers": 1, "layer_scale": 1.0}


def view_of(n: int, seed: int, sources: int = 1, side: int = 40) -> View:
    """Tiles at cells of their own, of one or two sources, in two pieces of tissue."""
    rng = np.random.default_rng(seed)
    features, source, position = [], [], []
    for number in range(len(SHAPES)):
        count = n if number < sources else 0
        cells = rng.permutation(side * side)[:count]
        position.append(np.stack(np.divmod(cells, side), axis=1))
        features.append(rng.standard_normal((count, SHAPES[number].dim)).astype(np.float16))
        source += [number] * count
    where = np.concatenate(position).astype(np.float32)
    section = (where[:, 0] > side / 2).astype(np.int64)
    return View(tuple(features), np.array(source), where, section)


def encoder_of(seed: int = 0, sources: int = 2, **config: object) -> SlideEncoder:
    network = SlideEncoder(SlideModelConfig(**{**TINY, **config}), SHAPES[:sources])  # type: ignore[arg-type]
    network.initialise(torch.Generator().manual_seed(seed))
    with torch.no_grad():  # larger than the usual start, so that attention matters
        for parameter in network.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2
            )
    return network


def moved(view: View, position: np.ndarray) -> View:
    return View(view.features, view.source, position.astype(np.float32), view.section)


CASES = [
    {"position": "alibi"},
    {"position": "alibi", "sections": True},
    {"position": "rope", "pool": "mean"},
    {"position": "fragments", "heads": 4, "pool": "attention"},
    {"position": "none", "pool": "latents", "latents": 3},
    {"position": "none", "depth": 0, "pool": "attention"},
    {"position": "alibi", "ffn": "swiglu", "adapter": "mlp"},
]


@pytest.mark.parametrize("config", CASES, ids=str)
def test_packed_is_each_slide_alone(config: dict[str, object]) -> None:
    network = encoder_of(**config)
    views = [view_of(1, 0, 2), view_of(7, 1), view_of(130, 2, 2), view_of(520, 3)]
    packed = network(Stream.pack(views))
    packed.vector.square().sum().backward()
    together = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    starts = np.cumsum([0, *map(len, views)])
    for at, view in enumerate(views):
        alone = network(Stream.pack([view]))
        torch.testing.assert_close(packed.vector[at], alone.vector[0], atol=1e-5, rtol=1e-5)
        own = packed.tokens[starts[at] : starts[at + 1]]
        torch.testing.assert_close(own, alone.tokens, atol=1e-5, rtol=1e-5)
        alone.vector.square().sum().backward()
    for name, parameter in network.named_parameters():
        if name in together and "attn.qkv.bias" not in name:
            torch.testing.assert_close(
                together[name], parameter.grad, atol=2e-4, rtol=1e-3, msg=name
            )


@pytest.mark.parametrize("config", CASES, ids=str)
def test_the_order_of_tiles_does_not_matter(config: dict[str, object]) -> None:
    network, view = encoder_of(sources=1, **config).eval(), view_of(60, 5)
    order = np.random.default_rng(0).permutation(60)
    turned = View(
        (view.features[0][order],), view.source, view.position[order], view.section[order]
    )
    view = View(view.features[:1], view.source, view.position, view.section)
    one, other = network(Stream.pack([view])), network(Stream.pack([turned]))
    torch.testing.assert_close(one.vector, other.vector, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.tokens[order], other.tokens, atol=1e-5, rtol=1e-5)


def turns_of(position: np.ndarray) -> list[np.ndarray]:
    x, y = position.T
    return [np.stack(to, axis=1) for to in ((-x, y), (x, -y), (-y, x), (y, x), (-x, -y))]


def test_distance_is_blind_to_turns_and_rotary_places_are_not() -> None:
    view = view_of(80, 6)
    for position, blind in (("alibi", True), ("rope", False), ("fragments", False)):
        network = encoder_of(position=position, heads=2).eval()
        whole = network(Stream.pack([view])).vector.detach()
        for turn in turns_of(view.position):
            other = network(Stream.pack([moved(view, turn)])).vector.detach()
            change = float((other - whole).abs().max() / whole.abs().max())
            assert (change < 1e-5) if blind else (change > 1e-4), (position, change)
        if blind:  # rotary tiles know where they are from the view's middle
            shifted = network(Stream.pack([moved(view, view.position + np.array([13.0, -7.0]))]))
            torch.testing.assert_close(shifted.vector, whole, atol=2e-5, rtol=2e-4)
    bag = encoder_of(position="none").eval()
    assert torch.equal(
        bag(Stream.pack([view])).vector,
        bag(Stream.pack([moved(view, view.position * 5)])).vector,
    )


def test_pieces_of_tissue_are_apart_where_they_should_be() -> None:
    view = view_of(80, 7)
    changed = View(
        (view.features[0] + (view.section[:, None] == 1).astype(np.float16), view.features[1]),
        view.source, view.position, view.section,
    )  # fmt: skip
    first = view.section == 0
    apart = encoder_of(sections=True, registers=0, pool="mean").eval()
    one, other = (apart(Stream.pack([v])).tokens[first] for v in (view, changed))
    assert torch.equal(one, other)
    whole = encoder_of(registers=0, pool="mean").eval()
    one, other = (whole(Stream.pack([v])).tokens[first] for v in (view, changed))
    assert (one - other).abs().max() > 1e-3


def test_hidden_tiles_say_nothing_and_all_others_are_seen() -> None:
    network = encoder_of().eval()
    view = view_of(30, 8)
    hidden = torch.zeros(30, dtype=torch.bool)
    hidden[[3, 4, 20]] = True
    whole = network(Stream.pack([view]), hidden).vector
    for tile in range(30):
        features = view.features[0].copy()
        features[tile] += 1
        other = View((features, view.features[1]), view.source, view.position, view.section)
        change = (network(Stream.pack([other]), hidden).vector - whole).abs().max()
        assert (change == 0) if hidden[tile] else (change > 1e-6)


def test_dropped_branches_are_those_of_the_same_samples_in_any_company() -> None:
    network = encoder_of(position="rope", pool="mean")
    views = [view_of(20 + at, at) for at in range(8)]  # 2 views of 4 samples
    owner = np.arange(8)
    whole = network(Stream.pack(views), None, DropPath(0.5, 0, 3, 2, 0), owner, (4, 2, 2)).vector
    for rank in range(2):
        ours = [rank * 2, rank * 2 + 1, 4 + rank * 2, 5 + rank * 2]
        part = network(
            Stream.pack([views[at] for at in ours]), None, DropPath(0.5, 0, 3, 2, rank),
            np.arange(4), (2, 2, 2),
        ).vector  # fmt: skip
        torch.testing.assert_close(part, whole[ours], atol=1e-5, rtol=1e-5)
    full = network(Stream.pack(views)).vector
    assert (full - whole).abs().max() > 1e-3


def test_latents_and_weights() -> None:
    view = view_of(50, 9)
    said = encoder_of(pool="latents", latents=3, position="none")(Stream.pack([view, view]))
    assert said.latents.shape == (2, 3, 16)
    torch.testing.assert_close(said.vector, said.latents.mean(dim=1))
    said = encoder_of(pool="attention")(Stream.pack([view, view_of(9, 1)]))
    assert said.weights[:50].sum().item() == pytest.approx(1, abs=1e-5)
    assert said.weights[50:].sum().item() == pytest.approx(1, abs=1e-5)


def test_cases_are_their_slides_in_any_order() -> None:
    network = encoder_of(case="transformer", case_depth=1).eval()
    vectors = torch.randn(5, 16)
    owner = torch.tensor([0, 0, 0, 1, 1])
    whole = network.case(vectors, owner, 2)
    torch.testing.assert_close(network.case(vectors[:3], owner[:3], 1)[0], whole[0])
    torch.testing.assert_close(
        network.case(vectors[[2, 0, 1]], owner[:3], 1)[0], whole[0], atol=1e-5, rtol=1e-5
    )
    assert (network.case(vectors[:2], owner[:2], 1)[0] - whole[0]).abs().max() > 1e-4


def test_operations_are_those_that_torch_counts(tmp_path: Path) -> None:
    from eosin.configs.load import load_config
    from eosin.pretrain.slide.config import SlideConfig
    from eosin.pretrain.slide.flops import forward_flops

    for ffn, adapter in (("gelu", "gelu"), ("swiglu", "mlp")):
        config = load_config(
            SlideConfig,
            [],
            [
                f"out={tmp_path}", f"bags.stores=[{tmp_path}]", "objective.regress={}",
                f"model={{width: 16, depth: 2, heads: 2, registers: 1, position: rope, pool: mean, "
                f"ffn: {ffn}, adapter: {adapter}}}",
            ],
        )  # fmt: skip
        network = SlideEncoder(config.model, SHAPES)
        network.initialise(torch.Generator())
        views = [view_of(30, 0, 2), view_of(30, 1, 2)]
        stream = Stream.pack(views)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            network(stream)
        counts = [len(x) for x in stream.places]
        found = forward_flops(config, [s.dim for s in SHAPES], stream.lengths, counts)
        assert counter.get_total_flops() == found


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"width": 15}, "width=15 is not a multiple"),
        ({"depth": 0, "pool": "cls"}, "depth=0 has no class token"),
        ({"position": "rope", "width": 12, "heads": 2}, "multiple of 4 channels"),
        ({"drop_path": 1.0}, "drop_path"),
    ],
)
def test_shapes_that_do_not_fit(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlideModelConfig(**config)  # type: ignore[arg-type]
