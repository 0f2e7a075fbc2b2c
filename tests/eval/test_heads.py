"""Heads on packed bags: each bag as if it were alone, each head as if it were alone, in any order;
memory that a large bag takes; the papers' formulas written out."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor

from eosin.eval.heads.abmil import GatedAttention
from eosin.eval.heads.additive import Additive
from eosin.eval.heads.aims import Classes
from eosin.eval.heads.clam import Clam
from eosin.eval.heads.contrastive import Contrastive
from eosin.eval.heads.dsmil import Dsmil
from eosin.eval.heads.head import Dropout, Head
from eosin.eval.heads.losses import (
    balanced_weights,
    cross_entropy,
    ordinal,
    ordinal_class,
    supervised_contrast,
)
from eosin.eval.heads.maxima import MaxPooling
from eosin.eval.heads.means import MeanPooling
from eosin.eval.heads.mhim import Mhim
from eosin.eval.heads.packed import (
    Packed,
    bag_max,
    bag_mean,
    bag_softmax,
    bag_sum,
    pack,
    top_rows,
)
from eosin.eval.heads.packmil import PackMil, focal_yes_no
from eosin.eval.heads.recipe import Recipe
from eosin.eval.heads.registry import HEADS, choose_heads
from eosin.eval.heads.training import Bag, BagSplits, Member, batches_of, fit_members, run_head
from tests.eval.test_bags import haystack

CPU = torch.device("cpu")
DIM, CLASSES = 12, 3
SIZES = (1, 7, 500, 3)
SQUARE = ("transmil/grid@2", "spatial/alibi@1")
"""Heads that take a time that grows with the square of the bag."""


def bags_of(sizes: tuple[int, ...], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        side = int(np.ceil(size**0.5)) + 1
        flat = torch.randperm(side * side, generator=generator)[:size]
        cells = torch.stack([flat % side, flat // side], dim=1)
        found.append((torch.randn(size, DIM, generator=generator), cells))
    return found


def made(name: str, **options: int) -> Head:
    torch.manual_seed(0)
    head = HEADS[name].make(DIM, CLASSES, **options)
    with torch.no_grad():  # a class token and queries of zero tell nothing apart
        for parameter in head.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return head


def test_sums_and_softmax_are_those_of_each_bag() -> None:
    packed = pack(bags_of(SIZES))
    values, scores = torch.randn(len(packed.features), 5), torch.randn(len(packed.features), 2) * 9
    weights = torch.rand(len(values))
    at = 0
    found = (bag_sum(values, packed), bag_sum(values, packed, weights), bag_mean(values, packed),
             bag_max(values, packed))  # fmt: skip
    soft = bag_softmax(scores, packed)
    for bag, size in enumerate(SIZES):
        own, w = values[at : at + size], weights[at : at + size, None]
        expected = (own.sum(0), (own * w).sum(0), own.mean(0), own.amax(0))
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got[bag], wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(soft[at : at + size], scores[at : at + size].softmax(0))
        at += size
    assert packed.bag.tolist() == [b for b, size in enumerate(SIZES) for _ in range(size)]
    with pytest.raises(ValueError, match="at least one tile"):
        pack(bags_of((3, 0)))
    with pytest.raises(ValueError, match="left without tiles"):
        packed.take(torch.arange(5))


def test_top_rows_are_each_bags_own() -> None:
    packed = pack(bags_of(SIZES))
    scores = torch.randn(len(packed.features))
    for largest in (True, False):
        got = top_rows(scores, packed, 8, largest).tolist()
        expected, at = [], 0
        for size in SIZES:
            own = scores[at : at + size].argsort(descending=largest)[:8] + at
            expected += own.tolist()
            at += size
        assert got == expected


@pytest.mark.parametrize("name", HEADS)
def test_a_packed_batch_is_its_bags_one_by_one(name: str) -> None:
    """Verdicts and gradients; nothing is padded, so nothing of another bag is seen."""
    head, bags = made(name).eval(), bags_of(SIZES)
    targets = torch.tensor([0, 2, 1, 2])
    together = head(pack(bags))
    alone = [head(pack([bag])) for bag in bags]
    torch.testing.assert_close(
        together.outputs, torch.cat([v.outputs for v in alone]), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        together.weights, torch.cat([v.weights for v in alone]), atol=1e-6, rtol=1e-4
    )
    at = 0
    for size in SIZES:
        own = together.weights[at : at + size].detach()
        assert float(own.sum()) == pytest.approx(1, abs=1e-5)
        at += size
    if together.tile_outputs is not None:  # they add up to the verdict
        means = bag_mean(together.tile_outputs, pack(bags))
        torch.testing.assert_close(means, together.outputs, atol=1e-5, rtol=1e-5)
    if isinstance(head, Mhim):
        return  # its verdict is its teacher's, which is not trained; its student is gated attention
    F.cross_entropy(head(pack(bags)).outputs, targets).backward()
    got = {n: p.grad.clone() for n, p in head.named_parameters() if p.grad is not None}
    head.zero_grad()
    for bag, target in zip(bags, targets, strict=True):
        (F.cross_entropy(head(pack([bag])).outputs, target[None]) / len(bags)).backward()
    for name_of, grad in got.items():
        torch.testing.assert_close(
            grad, head.get_parameter(name_of).grad, atol=1e-5, rtol=1e-4, msg=name_of
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in HEADS if n not in SQUARE and n != "mhim/v2@1"])
def test_a_bag_of_a_hundred_thousand_stands_beside_one_of_one(name: str) -> None:
    head, bags = made(name).eval(), bags_of((1, 7, 500, 100_000))
    targets = torch.tensor([0, 2, 1, 2])
    verdict = head(pack(bags))
    F.cross_entropy(verdict.outputs, targets).backward()
    got = {n: p.grad.clone() for n, p in head.named_parameters() if p.grad is not None}
    head.zero_grad()
    for number, bag in enumerate(bags):
        own = head(pack([bag])).outputs
        torch.testing.assert_close(verdict.outputs[number], own[0], atol=1e-5, rtol=1e-5)
        (F.cross_entropy(own, targets[number, None]) / len(bags)).backward()
    for name_of, grad in got.items():
        other = head.get_parameter(name_of).grad
        torch.testing.assert_close(grad, other, atol=1e-5, rtol=1e-4, msg=name_of)


@pytest.mark.parametrize("name", HEADS)
def test_order_and_company_change_nothing(name: str) -> None:
    head, bags = made(name).eval(), bags_of(SIZES)
    with torch.no_grad():
        before = head(pack(bags[:3]))
        features, cells = bags[2]
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(1))
        turned = head(pack([*bags[:2], (features[order], cells[order]), *bags_of((40,), 9)]))
        torch.testing.assert_close(turned.outputs[:3], before.outputs, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            turned.weights[8:508], before.weights[8:508][order], atol=1e-6, rtol=1e-3
        )
        for row in (0, len(features) - 1):  # at test every tile counts
            changed = features.clone()
            changed[row] += 50
            moved = head(pack([(changed, cells)])).outputs - before.outputs[2]
            assert moved.abs().max() > 1e-6


@pytest.mark.parametrize("name", HEADS)
def test_training_draws_are_functions_of_the_key(name: str) -> None:
    head, packed = made(name).train(), pack(bags_of(SIZES))
    targets, criterion = torch.tensor([0, 2, 1, 2]), cross_entropy()

    def loss(key: int) -> float:
        head.reseed(key)
        torch.manual_seed(key + 17)  # the global state plays no part
        return float(head.training_loss(packed, targets, criterion).detach())

    assert loss(3) == loss(3)
    if any(isinstance(m, Dropout) and m.share > 0 for m in head.modules()):
        assert loss(3) != loss(4)


def haystack_bags(n: int, seed: int) -> tuple[list[Bag], npt.NDArray[np.int64]]:
    bags, labels, _ = haystack(n, seed, tiles=24)
    return bags, labels


@pytest.mark.parametrize("name", ["abmil/gated@2", "mhim/v2@1", "packmil@1", "clam/sb@1"])
def test_many_heads_in_one_pass_are_each_as_it_is_alone(name: str) -> None:
    bags, labels = haystack_bags(24, 0)
    rows = np.arange(24)
    members = [
        Member(seed=seed, train=rows[rows % 3 != fold], val=rows[rows % 3 == fold])
        for fold in range(3)
        for seed in (0, 7)
    ]
    recipe = Recipe(epochs=3, rate=1e-3, tiles_a_step=60)
    make = HEADS[name].make
    together = fit_members(make, bags, Classes(labels, 2), members, recipe, 5, CPU)
    for member, fitted in zip(members, together, strict=True):
        [solo] = fit_members(make, bags, Classes(labels, 2), [member], recipe, 5, CPU)
        assert solo.epoch == fitted.epoch
        for key, tensor in fitted.head.state_dict().items():
            torch.testing.assert_close(
                solo.head.state_dict()[key], tensor, atol=1e-6, rtol=1e-6, msg=key
            )
    states = [f.head.state_dict()["classify.bias"] for f in together if "classify.bias" in
              f.head.state_dict()]  # fmt: skip
    assert all(not torch.equal(states[0], other) for other in states[1:])


def test_labels_of_bags_that_are_not_ones_own_are_not_looked_at() -> None:
    """A member's held-out labels may be anything: neither weights nor epochs see them."""
    bags, labels = haystack_bags(18, 1)
    rows = np.arange(18)
    member = Member(seed=0, train=rows[:9], val=rows[9:13])
    recipe = Recipe(epochs=2)
    poisoned = labels.copy()
    poisoned[13:] = 1 - poisoned[13:]
    states = [
        fit_members(GatedAttention, bags, Classes(of, 2), [member], recipe, 0, CPU)[
            0
        ].head.state_dict()
        for of in (labels, poisoned)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def test_batches_hold_every_bag_once_within_their_bounds() -> None:
    bags, _ = haystack_bags(30, 2)
    recipe = Recipe(bags_a_step=4, tiles_a_step=50)
    epochs = [list(batches_of(bags, recipe, 0, epoch)) for epoch in (1, 2)]
    for batches in epochs:
        assert sorted(np.concatenate(batches).tolist()) == list(range(30))
        for batch in batches:
            size = sum(len(bags[row].features) for row in batch.tolist())
            assert len(batch) <= 4 and (size <= 50 or len(batch) == 1)
    assert not np.array_equal(np.concatenate(epochs[0]), np.concatenate(epochs[1]))


CHUNKED = """
import json, resource, sys, torch
from eosin.eval.heads.abmil import GatedAttention
from eosin.eval.heads.packed import Packed
torch.set_num_threads(1)
chunk, tiles = int(sys.argv[1]), int(sys.argv[2])
head = GatedAttention(1024, 2, 512, 256, 0.25, chunk)
def bag(n):
    return Packed(torch.randn(n, 1024), torch.tensor([0, n]), torch.zeros(n, 2, dtype=torch.int64))
def step(packed):
    torch.nn.functional.cross_entropy(head(packed).outputs, torch.tensor([1])).backward()
step(bag(64))
packed = bag(tiles)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(packed)
print(json.dumps({"mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}))
"""


def step_mib(chunk: int, tiles: int) -> float:
    """What a step adds to the memory of a process that holds its input already."""
    command = [sys.executable, "-c", CHUNKED, str(chunk), str(tiles)]
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return float(json.loads(done.stdout.splitlines()[-1])["mib"])


@pytest.mark.slow
def test_a_large_bag_fits() -> None:
    """100,000 tiles of 1,024 features, AB-MIL of 512 and 256 in fp32, beyond its input."""
    whole, chunked = step_mib(0, 100_000), step_mib(8192, 100_000)
    print(f"whole {whole:.0f} MiB, in chunks of 8,192 {chunked:.0f} MiB")
    assert whole < 1.5 * 1000**3 / 2**20
    assert chunked < 300 * 1000**2 / 2**20


@pytest.mark.parametrize("sizes", [(100,), (1, 7, 50, 3, 30), (20, 20, 20)])
def test_chunks_change_nothing(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    plain = GatedAttention(DIM, CLASSES, 16, 8, 0.0)
    chunked = GatedAttention(DIM, CLASSES, 16, 8, 0.0, chunk_tiles=13)
    chunked.load_state_dict(plain.state_dict())
    packed, targets = pack(bags_of(sizes)), torch.arange(len(sizes)) % CLASSES
    packed = packed._replace(features=packed.features * 20)  # scores that differ much
    verdicts = [head(packed) for head in (plain, chunked)]
    torch.testing.assert_close(verdicts[1].outputs, verdicts[0].outputs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(verdicts[1].weights, verdicts[0].weights, atol=1e-6, rtol=1e-4)
    for verdict in verdicts:
        F.cross_entropy(verdict.outputs, targets).backward()
    for (name, a), b in zip(plain.named_parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_dropped_channels_of_a_chunk_are_the_same_when_it_is_computed_again() -> None:
    """Else the gradient would be of another network: held against finite differences."""
    torch.manual_seed(0)
    head = GatedAttention(DIM, 2, 8, 4, 0.5, chunk_tiles=6).double().train()
    packed = pack([(f.double(), c) for f, c in bags_of((9, 5))])
    weight = head.weigh.weight

    def loss() -> Tensor:
        head.reseed(4)
        return F.cross_entropy(head(packed).outputs, torch.tensor([0, 1]))

    loss().backward()
    assert weight.grad is not None
    for column in range(4):
        with torch.no_grad():
            weight[0, column] += 1e-5
            up = float(loss())
            weight[0, column] -= 2e-5
            down = float(loss())
            weight[0, column] += 1e-5
        assert float(weight.grad[0, column]) == pytest.approx((up - down) / 2e-5, abs=1e-7)


def test_dsmil_is_its_two_streams_written_out() -> None:
    head = made("dsmil@1").eval()
    assert isinstance(head, Dsmil)
    [(features, cells)] = bags_of((9,))
    h = head.embed(features)
    said = h @ head.instances.weight.T + head.instances.bias
    top = said.amax(0)
    queries, values = head.query(h), head.value(h)
    pooled = []
    for c in range(CLASSES):
        critical = queries[int(said[:, c].argmax())]
        weights = (queries @ critical / 128**0.5).softmax(0)
        pooled.append(weights @ values)
    stream = F.conv1d(torch.stack(pooled)[None], head.classify.weight, head.classify.bias)[0, :, 0]
    got = head(pack([(features, cells)])).outputs[0]
    torch.testing.assert_close(got, (top + stream) / 2, atol=1e-5, rtol=1e-5)
    both = head.training_loss(pack([(features, cells)]), torch.tensor([1]), cross_entropy())
    expected = (F.cross_entropy(top[None], torch.tensor([1]))
                + F.cross_entropy(stream[None], torch.tensor([1]))) / 2  # fmt: skip
    torch.testing.assert_close(both, expected, atol=1e-5, rtol=1e-5)


def test_clams_instances_are_the_extremes_of_each_bag() -> None:
    head = made("clam/sb@1").eval()
    assert isinstance(head, Clam)
    bags, targets = bags_of((40, 5, 17)), torch.tensor([2, 0, 2])
    packed = pack(bags)
    terms = []
    for bag, target in zip(bags, targets.tolist(), strict=True):
        verdict, h = head(pack([bag])), head.embed(bag[0])
        order = verdict.weights.argsort(descending=True, stable=True)
        high, low = order[:8], order.flip(0)[:8]
        own = []
        for label, classifier in enumerate(head.instances):
            said = classifier(h)
            zero, one = (torch.tensor(v) for v in (0, 1))
            if label == target:
                own += [F.cross_entropy(said[i], one) for i in high]
                own += [F.cross_entropy(said[i], zero) for i in low]
            else:
                own += [F.cross_entropy(said[i], zero) for i in high]
        terms.append(torch.stack(own).mean())
    slides = F.cross_entropy(head(packed).outputs, targets)
    expected = 0.7 * slides + 0.3 * torch.stack(terms).mean()
    got = head.training_loss(packed, targets, cross_entropy())
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="must be int64"):
        head.training_loss(packed, torch.rand(3, 2), cross_entropy())


def test_mhim_hides_the_easiest_and_parts_the_rest() -> None:
    head, packed = made("mhim/v2@1"), pack(bags_of((200, 1, 2, 57)))
    assert isinstance(head, Mhim)
    told = head.teacher.eval()(packed)
    easy = head._class_aware(packed, told)
    kept, rest = head._parts(packed, easy)
    for bag, size in enumerate((200, 1, 2, 57)):
        rows = packed.offsets[bag] + torch.arange(size)
        own, others = (set(rows.tolist()) & set(part.tolist()) for part in (kept, rest))
        hidden = set(rows.tolist()) - own - others
        count = int(size * 0.03)
        assert len(hidden) == count and len(own) == max(1, int((size - count) * 0.9))
        assert others and (size < 3 or not own & others)
        if hidden:
            assert min(easy[list(hidden)]) >= max(easy[list(own | others)])
    # the teacher follows by its momentum, the queries by theirs; neither has gradients
    before = [p.clone() for p in head.teacher.parameters()]
    queries = head.recycler.queries.clone()
    head.train().training_loss(packed, torch.tensor([0, 1, 2, 0]), cross_entropy()).backward()
    assert all(p.grad is None for p in head.teacher.parameters())
    with torch.no_grad():
        for p in head.student.parameters():
            p += 1
    head.after_step()
    for old, new, student in zip(
        before, head.teacher.parameters(), head.student.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.9997 * old + 0.0003 * student)
    assert head._condensed is not None
    torch.testing.assert_close(head.recycler.queries, 0.9999 * queries + 0.0001 * head._condensed)


def test_packmil_parts_every_tile_once_and_mixes_four_slides() -> None:
    head, packed = made("packmil@1").train(), pack(bags_of((1, 40, 30, 8, 21, 5)))
    assert isinstance(head, PackMil)
    head.reseed(1)
    main, rest = head._parts(packed)
    assert sorted([*main.tolist(), *rest.tolist()]) == list(range(len(packed.features)))
    assert set(packed.bag[main].tolist()) == set(range(6)) and 0 in main.tolist()
    logits, truth = torch.randn(2, 3), torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    p = logits.sigmoid()
    expected = torch.where(truth > 0, -0.25 * (1 - p) ** 2 * p.log(),
                           -0.75 * p**2 * (1 - p).log()).mean()  # fmt: skip
    torch.testing.assert_close(focal_yes_no(logits, truth), expected)


def test_losses_are_their_formulas() -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(6, 3), torch.tensor([0, 1, 2, 1, 1, 0])
    weights = balanced_weights(torch.tensor([2, 3, 1]))
    torch.testing.assert_close(weights, torch.tensor([1.0, 2 / 3, 2.0]))
    assert balanced_weights(torch.tensor([2, 0])).tolist() == [0.5, 0.0]
    p = outputs.softmax(1)[torch.arange(6), targets]
    expected = -(weights[targets] * (1 - p) ** 2 * p.log()).mean()
    torch.testing.assert_close(cross_entropy(weights, 2.0)(outputs, targets), expected)
    torch.testing.assert_close(cross_entropy()(outputs, targets), F.cross_entropy(outputs, targets))
    # ordered classes: two questions for three classes
    questions = torch.randn(6, 2)
    yes = questions.sigmoid()
    loss = 0.0
    for i, target in enumerate(targets.tolist()):
        for k in range(2):
            loss -= float((yes[i, k] if target > k else 1 - yes[i, k]).log()) / 6
    assert float(ordinal(questions, targets)) == pytest.approx(loss, abs=1e-5)
    assert ordinal_class(torch.tensor([[-1.0, -2], [1, -1], [2, 1]])).tolist() == [0, 1, 2]


def test_contrast_is_khoslas_second_equation() -> None:
    torch.manual_seed(0)
    unit, targets = F.normalize(torch.randn(5, 4), dim=1), [0, 1, 0, 0, 2]
    terms = []
    for i in range(5):
        like = [j for j in range(5) if j != i and targets[j] == targets[i]]
        if like:
            below = sum(float((unit[i] @ unit[a] / 0.1).exp()) for a in range(5) if a != i)
            terms.append(-np.mean([float(unit[i] @ unit[j] / 0.1) - np.log(below) for j in like]))
    got = supervised_contrast(unit, torch.tensor(targets), 0.1)
    assert float(got) == pytest.approx(np.mean(terms), abs=1e-5)
    assert float(supervised_contrast(unit[:2], torch.tensor([0, 1]), 0.1)) == 0
    head = made("abmil/contrastive@1").eval()
    assert isinstance(head, Contrastive)
    packed, labels = pack(bags_of((4, 5, 6))), torch.tensor([0, 0, 1])
    head.progress = 1.0
    own = F.cross_entropy(head(packed).outputs, labels)
    torch.testing.assert_close(head.training_loss(packed, labels, cross_entropy()), own)
    head.progress = 0.0
    other = float(head.training_loss(packed, labels, cross_entropy()).detach())
    assert other != pytest.approx(float(own.detach()))


def test_an_additive_head_and_mean_and_max_are_what_they_are_called() -> None:
    [(features, cells)] = bags_of((11,))
    packed = pack([(features, cells)])
    mean, top, sums = made("mean@1").eval(), made("max@1").eval(), made("additive@1").eval()
    assert isinstance(mean, MeanPooling) and isinstance(top, MaxPooling)
    assert isinstance(sums, Additive)
    torch.testing.assert_close(
        mean(packed).outputs[0], mean.classify(mean.embed(features).mean(0)), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(top(packed).outputs[0], top.classify(top.embed(features).amax(0)))
    verdict = sums(packed)
    assert verdict.tile_outputs is not None and verdict.tile_outputs.shape == (11, CLASSES)
    one = sums(Packed(features[3:4], torch.tensor([0, 1]), cells[3:4])).outputs[0]
    torch.testing.assert_close(verdict.tile_outputs[3], one, atol=1e-5, rtol=1e-5)


def test_heads_are_chosen_by_name_or_pattern() -> None:
    assert choose_heads(["usual"]) == ["abmil/gated@2", "transmil/grid@2"]
    assert choose_heads(["abmil/*"]) == ["abmil/gated@2", "abmil/contrastive@1"]
    assert choose_heads(["*"]) == list(HEADS)
    with pytest.raises(ValueError, match="no head 'clan'; there are mean@1"):
        choose_heads(["clan"])


def splits_of(n: int) -> Iterator[tuple[list[Bag], npt.NDArray[np.int64]]]:
    for seed, count in enumerate((n, n // 2, n)):
        yield haystack(count, 20 + seed)[:2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["abmil/gated@2", "mhim/v2@1", "packmil@1"])
def test_needles_are_found(name: str) -> None:
    """Three tiles of up to eighty along one direction."""
    (train, train_labels), (val, val_labels), (test, labels) = splits_of(120)
    splits = BagSplits(
        train=train, train_labels=train_labels, val=val, val_labels=val_labels, test=test
    )
    recipe = Recipe(epochs=30, rate=5e-4, runs=1)
    outcome, _ = run_head(HEADS[name].make, splits, 2, 0, CPU, name, recipe)
    assert outcome.scores is not None
    area = roc_auc_score(labels, outcome.scores[:, 1])
    print(f"{name}: AUROC {area:.3f}")
    assert area >= 0.95


def arranged(n: int, seed: int) -> tuple[list[Bag], npt.NDArray[np.int64]]:
    """Slides of two tissues in equal amounts: side by side, or mixed, which is their class."""
    generator = np.random.default_rng(seed)
    direction = np.random.default_rng(99).normal(size=16)
    bags, labels = [], generator.permutation(np.arange(n) % 2)
    cells = np.stack(np.meshgrid(np.arange(8), np.arange(8)), -1).reshape(-1, 2)
    for i in range(n):
        tissue = cells[:, generator.integers(2)] >= 4
        if labels[i]:
            tissue = generator.permutation(tissue)
        features = generator.normal(size=(64, 16)) + np.where(tissue, 1, -1)[:, None] * direction
        order = generator.permutation(64)
        bags.append(
            Bag(slide_id=f"{seed}_{i}", tile_ids=[str(t) for t in range(64)],
                features=features[order].astype(np.float16), cells=cells[order].astype(np.int64))
        )  # fmt: skip
    return bags, labels


@pytest.mark.slow
def test_what_lies_beside_what_is_seen_by_heads_that_know_places_alone() -> None:
    (train, train_labels), (val, val_labels), (test, labels) = (
        arranged(count, seed) for seed, count in enumerate((120, 40, 80))
    )
    splits = BagSplits(
        train=train, train_labels=train_labels, val=val, val_labels=val_labels, test=test
    )
    areas = {}
    for name, rate in (("mean@1", 2e-3), ("spatial/alibi@1", 1e-3), ("transmil/grid@2", 5e-4)):
        recipe = Recipe(runs=1, epochs=20, rate=rate)
        outcome, _ = run_head(HEADS[name].make, splits, 2, 0, CPU, name, recipe)
        assert outcome.scores is not None
        areas[name] = roc_auc_score(labels, outcome.scores[:, 1])
    print(areas)
    assert 0.35 < areas["mean@1"] < 0.65  # chance: an AUROC of 80 slides has an error of 0.065
    assert areas["spatial/alibi@1"] > 0.7 and areas["transmil/grid@2"] > 0.9
