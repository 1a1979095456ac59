"""Attention: every backend that runs here against a plain float64 loop; which is chosen."""

import os

import pytest
import torch

from autoresearch.kit import attention
from autoresearch.kit.attention import FlexAttention, blocked_attention, sdpa_attention

CPU = torch.device("cpu")


def plain_attention(q, k, v, window):
    """Position t reads itself and the `window` positions before it: one query, one head at a time."""
    B, T, H, D = q.shape
    group = H // k.shape[2]
    y = []
    for t in range(T):
        first = max(0, t - window)
        for h in range(H):
            keys, values = k[:, first : t + 1, h // group], v[:, first : t + 1, h // group]
            weights = torch.softmax((keys @ q[:, t, h, :, None])[..., 0] / D**0.5, dim=-1)
            y.append((weights[..., None] * values).sum(1))
    return torch.stack(y, 1).view(B, T, H, D)


def random_qkv(T, kv_heads, heads=4, D=8, B=2):
    generator = torch.Generator().manual_seed(T + kv_heads)
    draw = lambda n: torch.randn(B, T, n, D, generator=generator)
    return draw(heads), draw(kv_heads), draw(kv_heads), draw(heads)  # q, k, v, upstream gradient


def windows_of(T):
    return sorted({1, 7, T // 8, T // 2, T - 1, T})


# 64 has every divisor it can want; of 60 few lie near a window; 37 is prime
@pytest.mark.parametrize("T", [64, 60, 37])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_and_its_gradients_are_those_of_a_float64_loop(T, kv_heads):
    q, k, v, upstream = random_qkv(T, kv_heads)
    for window in windows_of(T):
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        wanted = plain_attention(*exact, window)
        gradients = torch.autograd.grad(wanted, exact, upstream.double())
        for attend in (blocked_attention, sdpa_attention):
            inputs = [x.clone().requires_grad_() for x in (q, k, v)]
            y = attend(*inputs, window)
            assert y.shape == q.shape and y.dtype == q.dtype
            torch.testing.assert_close(y.double(), wanted, rtol=0, atol=5e-6)
            for got, gradient in zip(torch.autograd.grad(y, inputs, upstream), gradients):
                torch.testing.assert_close(got.double(), gradient, rtol=0, atol=2e-5)


@pytest.mark.skipif(
    os.environ.get("TORCH_COMPILE_DISABLE") == "1", reason="FlexAttention runs compiled only"
)
@pytest.mark.parametrize("T, kv_heads", [(64, 2), (37, 4)])
def test_flex_attention_is_that_of_a_float64_loop(T, kv_heads):
    q, k, v, _ = random_qkv(T, kv_heads)
    attend = FlexAttention(T, set(windows_of(T)), CPU)
    # The graph, without generated code: quick.
    compiled = torch.compile(attend, backend="eager", dynamic=False)
    for window in windows_of(T):
        wanted = plain_attention(q.double(), k.double(), v.double(), window)
        for f in (compiled, attend):  # uncompiled it is another backend in its place
            torch.testing.assert_close(f(q, k, v, window).double(), wanted, rtol=0, atol=5e-6)


# ----------------------------------------------------------------------------- which is chosen


BF16, FP32 = torch.bfloat16, torch.float32
CHOICES = [  # device, dtype, capability, ROCm; the choice, and why not FlashAttention 3
    ("cpu", BF16, None, None, "blocked", "needs an NVIDIA GPU"),
    ("mps", FP32, None, None, "sdpa", "needs an NVIDIA GPU"),
    ("cuda", BF16, (9, 4), "7.0", "flex", "needs an NVIDIA GPU"),
    ("cuda", BF16, (12, 0), None, "flex", "bfloat16 on 12.0"),
    ("cuda", FP32, (8, 0), None, "flex", "float32 on 8.0"),
    ("cuda", BF16, (9, 0), None, "flash3", None),
    ("cuda", BF16, (8, 6), None, "flash3", None),
]


@pytest.mark.parametrize("kind, dtype, capability, hip, name, reason", CHOICES)
def test_the_choice_and_its_reason(monkeypatch, capsys, kind, dtype, capability, hip, name, reason):
    def flash(*arguments, **options):
        return arguments, options

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(attention, "load_flash_attention_3", lambda: flash)
    monkeypatch.setattr(attention, "FlexAttention", lambda *_: "flex")
    attend = attention.choose(torch.device(kind), dtype, 64, {8, 64})
    # this device has no better one: nothing went wrong
    assert attention.describe(attend) == (name, None)
    out = capsys.readouterr().out
    if name == "flash3":
        wanted = ("q", "k", "v"), dict(causal=True, window_size=(8, 0))
        assert attend("q", "k", "v", 8) == wanted
        assert out == ""
    else:
        backends = dict(blocked=blocked_attention, sdpa=sdpa_attention, flex="flex")
        assert attend.function == backends[name]
        assert out.startswith(f"attention: {name}, because FlashAttention 3") and reason in out
