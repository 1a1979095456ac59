"""The loss in pieces against torch's own on whole arrays, in float64."""

import pytest
import torch
import torch.nn.functional as F

from autoresearch.kit import loss
from autoresearch.kit.loss import softcap_cross_entropy

V = 50
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    "dtype, cap, piece", [(FP32, 15, 1), (FP32, 3, 7 * V), (FP32, 15, 2**25), (BF16, 15, 7 * V)]
)
def test_softcap_cross_entropy(monkeypatch, dtype, cap, piece):
    monkeypatch.setitem(loss.LOGITS_PER_PIECE, "cpu", piece)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(61, 16, generator=generator).to(dtype)
    weight = torch.randn(V, 16, generator=generator)
    targets = torch.randint(V, (61,), generator=generator)
    got = [y.clone().requires_grad_() for y in (x, weight)]
    exact = [y.double().requires_grad_() for y in (x, weight)]
    value = softcap_cross_entropy(*got, targets, cap)
    wanted = F.cross_entropy(cap * torch.tanh(exact[0] @ exact[1].T / cap), targets)
    share = 1e-5 if dtype == FP32 else 0.02
    torch.testing.assert_close(value.double(), wanted, rtol=share, atol=0)
    gradients = torch.autograd.grad(0.5 * wanted, exact)
    for ours, plain in zip(torch.autograd.grad(0.5 * value, got), gradients):
        assert (ours.double() - plain).norm() < share * plain.norm()


def test_the_pieces_are_of_one_size_so_that_one_is_compiled(monkeypatch):
    """And none has more logits than a piece may: memory never holds tokens times vocabulary."""
    monkeypatch.setitem(loss.LOGITS_PER_PIECE, "cpu", 24 * V)
    sizes = []

    def piece(x, *arguments):
        sizes.append(len(x))
        return loss.cross_entropy_piece(x, *arguments)

    targets = torch.zeros(60, dtype=torch.int64)
    softcap_cross_entropy(torch.randn(60, 16), torch.randn(V, 16), targets, 15, piece)
    assert sizes == [20, 20, 20]  # not 24, 24, 12


def test_a_cap_whose_exponential_float32_does_not_hold_is_refused():
    with pytest.raises(AssertionError, match="cap 100 must be above 0 and at most 64"):
        softcap_cross_entropy(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2).long(), 100)
