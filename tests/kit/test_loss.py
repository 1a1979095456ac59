"""The loss in pieces against torch's own on whole arrays, in float64."""

import pytest
import torch
import torch.nn.functional as F
from largest import LargestTensor

from autoresearch.kit import loss
from autoresearch.kit.loss import softcap_cross_entropy

V = 50


@pytest.mark.parametrize("piece", [1, 7 * V, 2**25])
@pytest.mark.parametrize("cap", [15, 3])
def test_softcap_cross_entropy(monkeypatch, piece, cap):
    monkeypatch.setitem(loss.LOGITS_PER_PIECE, "cpu", piece)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(61, 16, generator=generator)
    weight = torch.randn(V, 16, generator=generator)
    targets = torch.randint(V, (61,), generator=generator)
    got = [y.clone().requires_grad_() for y in (x, weight)]
    exact = [y.double().requires_grad_() for y in (x, weight)]
    value = softcap_cross_entropy(*got, targets, cap)
    wanted = F.cross_entropy(cap * torch.tanh(exact[0] @ exact[1].T / cap), targets)
    torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(0.5 * wanted, exact)
    for ours, plain in zip(torch.autograd.grad(0.5 * value, got), gradients):
        assert plain.abs().max() > 1e-4
        torch.testing.assert_close(ours.double(), plain, rtol=1e-4, atol=1e-8)


def test_the_loss_in_bf16_stays_near():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator)
    weight = torch.randn(V, 16, generator=generator)
    targets = torch.arange(64) % V
    near = [x.bfloat16().requires_grad_(), weight.clone().requires_grad_()]
    exact = [y.double().requires_grad_() for y in (x, weight)]
    value = softcap_cross_entropy(*near, targets, 15)
    wanted = F.cross_entropy(15 * torch.tanh(exact[0] @ exact[1].T / 15), targets)
    torch.testing.assert_close(value.double(), wanted, rtol=1e-2, atol=0)
    ours, plain = torch.autograd.grad(value, near), torch.autograd.grad(wanted, exact)
    assert ours[0].dtype == torch.bfloat16 and ours[1].dtype == torch.float32
    for a, b in zip(ours, plain):
        assert (a.double() - b).norm() < 0.02 * b.norm()


def test_the_loss_never_holds_tokens_times_vocabulary(monkeypatch):
    monkeypatch.setitem(loss.LOGITS_PER_PIECE, "cpu", 2**14)
    N, width, vocabulary = 512, 16, 1024
    x = torch.randn(N, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.zeros(N, dtype=torch.int64)
    with LargestTensor() as largest:
        softcap_cross_entropy(x, weight, targets, 15).backward()
    assert largest.numel == 2**14 < N * vocabulary / 16


def test_the_pieces_are_of_one_size_so_that_one_is_compiled(monkeypatch):
    monkeypatch.setitem(loss.LOGITS_PER_PIECE, "cpu", 24 * V)
    sizes = []

    def piece(x, *arguments):
        sizes.append(len(x))
        return loss.cross_entropy_piece(x, *arguments)

    targets = torch.zeros(60, dtype=torch.int64)
    softcap_cross_entropy(torch.randn(60, 16), torch.randn(V, 16), targets, 15, piece)
    assert sizes == [20, 20, 20]  # not 24, 24, 12


@pytest.mark.parametrize("cap", [0, 100])
def test_a_cap_whose_exponential_float32_does_not_hold_is_refused(cap):
    with pytest.raises(AssertionError, match=f"cap {cap} must be above 0 and at most 64"):
        softcap_cross_entropy(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2).long(), cap)
