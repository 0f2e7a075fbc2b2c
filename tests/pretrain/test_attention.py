"""Packed attention against SDPA under the materialised block mask, forward and backward."""

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eosin.configs.errors import ConfigError
from eosin.pretrain import attention
from eosin.pretrain.attention import (
    AttentionFn,
    AttentionName,
    Packing,
    choose_attention,
    sdpa_attention,
    varlen_attention,
    xformers_attention,
)

PACKING = Packing(((2, 5), (3, 2)))


def block_mask(packing: Packing) -> Tensor:
    owner = torch.repeat_interleave(torch.tensor(packing.lengths))
    return owner[:, None] == owner[None]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """The reference: every token sees the whole stream, but for the mask."""
    heads_first = (t.transpose(0, 1) for t in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=block_mask(packing))
    return out.transpose(0, 1)


def forward_and_backward(function: AttentionFn, packing: Packing) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(packing.tokens, 3, 2, 8, generator=generator).requires_grad_()
    out = function(*qkv.unbind(1), packing)
    out.mul(torch.randn(out.shape, generator=generator)).sum().backward()
    assert qkv.grad is not None
    return [out.detach(), qkv.grad]


@pytest.mark.pitfall(18)
def test_sdpa_per_group_equals_attention_under_the_block_mask() -> None:
    expected = forward_and_backward(masked_attention, PACKING)
    for ours, theirs in zip(forward_and_backward(sdpa_attention, PACKING), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_a_packing_says_where_sequences_start() -> None:
    assert PACKING.lengths == [5, 5, 2, 2, 2] and PACKING.longest == 5
    assert PACKING.boundaries.tolist() == [0, 5, 10, 12, 14, 16] and PACKING.tokens == 16


def scores(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    raw = torch.einsum("tbhc,sbhc->bhts", q.transpose(0, 1), k.transpose(0, 1))
    return (raw * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)


def plain_forward(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any) -> tuple[Tensor, Tensor]:
    s = scores(q, k, attn_bias.mask)
    return torch.einsum("bhts,bshc->bthc", s.softmax(-1), v), s.logsumexp(-1)


def plain_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, attn_bias: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Flash attention's backward (arXiv 2205.14135, algorithm 4) without tiles."""
    p = (scores(q, k, attn_bias.mask) - lse[..., None]).exp()  # [1, H, T, T]
    dv = torch.einsum("bhts,bthc->bshc", p, grad)
    dp = torch.einsum("bthc,bshc->bhts", grad, v)
    ds = p * (dp - (grad * out).sum(-1).transpose(1, 2)[..., None]) * q.shape[-1] ** -0.5
    return torch.einsum("bhts,bshc->bthc", ds, k), torch.einsum("bhts,bthc->bshc", ds, q), dv


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Something that answers as xformers does, on the CPU: what surrounds it is under test."""

    class BlockDiagonalMask:
        def __init__(self, lengths: list[int]) -> None:
            self.mask = block_mask(Packing(tuple((1, length) for length in lengths)))

        @classmethod
        def from_seqlens(cls, lengths: list[int], *, device: torch.device) -> "BlockDiagonalMask":
            assert isinstance(device, torch.device)
            return cls(lengths)

    ops = ModuleType("xformers.ops")
    ops.fmha = SimpleNamespace(  # type: ignore[attr-defined]
        BlockDiagonalMask=BlockDiagonalMask,
        memory_efficient_attention_forward_requires_grad=plain_forward,
        memory_efficient_attention_backward=plain_backward,
    )
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    attention._block_diagonal_mask.cache_clear()
    yield
    attention._block_diagonal_mask.cache_clear()


@pytest.mark.usefixtures("stand_in")
def test_the_operator_around_xformers_hands_over_the_right_tensors() -> None:
    expected = forward_and_backward(masked_attention, PACKING)
    found = forward_and_backward(xformers_attention, PACKING)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    forward_and_backward(xformers_attention, PACKING)
    masks = attention._block_diagonal_mask.cache_info()
    assert masks.misses == 1 and masks.hits == 3  # one mask a packing, forward and backward


@pytest.mark.usefixtures("stand_in")
def test_the_operator_around_xformers_is_opaque_to_the_compiler_and_its_shapes_are_true() -> None:
    q, k, v = (torch.randn(16, 2, 8).requires_grad_() for _ in range(3))
    arguments = (q, k, v, [2, 5, 3, 2])
    torch.library.opcheck(torch.ops.eosin.block_diagonal_attention.default, arguments)


@pytest.mark.usefixtures("stand_in")
def test_padded_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def padded(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any) -> tuple[Tensor, Tensor]:
        return q, torch.zeros(5, q.shape[2], 32)

    fmha = sys.modules["xformers.ops"].fmha
    monkeypatch.setattr(fmha, "memory_efficient_attention_forward_requires_grad", padded)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    with pytest.raises(RuntimeError, match="no packed kernel for 8 channels"):
        forward_and_backward(xformers_attention, PACKING)


@pytest.mark.parametrize("name", ["xformers", "varlen"])
def test_fused_kernels_are_refused_where_they_cannot_run(name: AttentionName) -> None:
    with pytest.raises(ConfigError, match=f"attention={name} needs CUDA"):
        choose_attention(name, torch.device("cpu"), torch.float32)
    with pytest.raises(ConfigError, match=r"16-bit precision, not cuda in torch\.float32"):
        choose_attention(name, torch.device("cuda"), torch.float32)
    assert choose_attention("auto", torch.device("cpu"), torch.bfloat16) is sdpa_attention
    assert choose_attention("auto", torch.device("cuda"), torch.float32) is sdpa_attention


def test_auto_takes_xformers_then_varlen_then_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")

    def chosen(capability: tuple[int, int]) -> AttentionFn:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return choose_attention("auto", cuda, torch.bfloat16)

    monkeypatch.setattr(attention, "_lacks_xformers", lambda device: "it is not installed")
    assert chosen((9, 0)) is varlen_attention
    assert chosen((7, 5)) is sdpa_attention
    with pytest.raises(ConfigError, match=r"attention=varlen, but .* compute capability"):
        choose_attention("varlen", cuda, torch.float16)
    with pytest.raises(ConfigError, match="attention=xformers, but it is not installed"):
        choose_attention("xformers", cuda, torch.float16)
    monkeypatch.setattr(attention, "_lacks_xformers", lambda device: None)
    assert chosen((9, 0)) is xformers_attention
