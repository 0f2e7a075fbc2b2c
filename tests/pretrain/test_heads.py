"""The projection head against its formula, torch's own weight norm, and awkward tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eosin.pretrain.heads import HeadConfig, PrototypeHead


def make(**changes: object) -> PrototypeHead:
    sizes = {"prototypes": 24, "hidden": 16, "bottleneck": 8}
    head = PrototypeHead(12, HeadConfig(**{**sizes, **changes}))  # type: ignore[arg-type]
    head.initialise(torch.Generator().manual_seed(0))
    return head


def tokens(n: int = 7) -> Tensor:
    return torch.randn(n, 12, generator=torch.Generator().manual_seed(1))


def test_bottleneck_is_the_mlp_at_unit_length() -> None:
    head, x = make(), tokens()
    one, two, three = (head.mlp[i] for i in (0, 2, 4))
    for token, ours in zip(x, head.bottleneck(x), strict=True):
        h = F.gelu(one.weight @ token + one.bias)
        h = F.gelu(two.weight @ h + two.bias)
        h = three.weight @ h + three.bias
        torch.testing.assert_close(ours, h / h.square().sum().sqrt())


@pytest.mark.pitfall(13)
@pytest.mark.parametrize("last_layer", ["weight_norm", "plain"])
def test_logits_are_products_of_bottleneck_and_prototypes(last_layer: str) -> None:
    """The gain is a parameter of its own, or is not there."""
    head, x = make(last_layer=last_layer), tokens()
    rows = head.last_layer.weight.detach()
    if last_layer == "weight_norm":
        nn.init.uniform_(head.last_gain, 0.5, 2.0)
        rows = head.last_gain.detach() * rows / rows.square().sum(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(head.prototypes(), rows)
    torch.testing.assert_close(head.logits(x), head.bottleneck(x) @ rows.T)
    assert hasattr(head, "last_gain") == (last_layer == "weight_norm")


@pytest.mark.pitfall(13)
def test_weight_norm_and_its_gradients_are_torchs() -> None:
    head, upstream = make(), torch.randn(24, 8)
    nn.init.uniform_(head.last_gain, 0.5, 2.0)
    layer = nn.Linear(8, 24, bias=False)
    layer.weight = nn.Parameter(head.last_layer.weight.detach().clone())
    layer = nn.utils.parametrizations.weight_norm(layer, dim=0)
    theirs = layer.parametrizations["weight"]
    with torch.no_grad():
        theirs.original0.copy_(head.last_gain)
    torch.testing.assert_close(head.prototypes(), layer.weight)
    (head.prototypes() * upstream).sum().backward()
    (layer.weight * upstream).sum().backward()
    torch.testing.assert_close(head.last_gain.grad, theirs.original0.grad)
    torch.testing.assert_close(head.last_layer.weight.grad, theirs.original1.grad)


def test_initialisation_is_as_written_and_by_the_seed() -> None:
    head, again = make(hidden=64), make(hidden=64)
    for a, b in zip(head.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(not head.mlp[i].bias.any() for i in (0, 2, 4))
    assert float(head.mlp[2].weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert torch.equal(head.last_gain, torch.ones(24, 1))
    assert float(head.last_layer.weight.detach().abs().max()) <= 8**-0.5
    plain = make(last_layer="plain", prototypes=512)
    assert float(plain.last_layer.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_zero_tokens_empty_batches_and_16_bits_are_finite() -> None:
    head = make()
    with torch.no_grad():
        for parameter in head.mlp.parameters():
            parameter.zero_()
        head.last_layer.weight[3] = 0.0
    x = torch.zeros(2, 12, requires_grad=True)
    logits = head.logits(x)
    logits.sum().backward()
    assert not logits.any() and x.grad is not None and torch.isfinite(x.grad).all()
    assert torch.isfinite(head.last_layer.weight.grad[3]).all()
    assert head.bottleneck(tokens(0)).shape == (0, 8)

    head = make()
    with torch.autocast("cpu", torch.bfloat16):
        x, rows, logits = head.bottleneck(tokens()), head.prototypes(), head.logits(tokens())
    assert x.dtype == rows.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(x.norm(dim=1), torch.ones(7))  # the norm is not rounded to 16 bits
    torch.testing.assert_close(logits, x @ rows.T)
    assert (x - head.bottleneck(tokens())).abs().max() < 0.02


@pytest.mark.parametrize("name", ["prototypes", "hidden", "bottleneck"])
def test_sizes_that_are_not_positive_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        HeadConfig(**{name: 0})  # type: ignore[arg-type]
