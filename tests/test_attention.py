"""Attention: every backend that runs here against a plain float64 loop; which is chosen; how FlashAttention 3 is loaded."""
import json
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT  # noqa: F401 (puts the repository on the path)

import train

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


# 64 has every divisor it can want; of 60 and 90 few lie near a window; 49 and 35 have almost none; 37 is prime
@pytest.mark.parametrize("T", [64, 60, 90, 49, 35, 37])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_and_its_gradients_are_those_of_a_float64_loop(T, kv_heads):
    q, k, v, upstream = random_qkv(T, kv_heads)
    for window in windows_of(T):
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        wanted = plain_attention(*exact, window)
        gradients = torch.autograd.grad(wanted, exact, upstream.double())
        for attend in (train.blocked_attention, train.sdpa_attention):
            inputs = [x.clone().requires_grad_() for x in (q, k, v)]
            y = attend(*inputs, window)
            assert y.shape == q.shape and y.dtype == q.dtype
            torch.testing.assert_close(y.double(), wanted, rtol=0, atol=5e-6)
            for got, gradient in zip(torch.autograd.grad(y, inputs, upstream), gradients):
                torch.testing.assert_close(got.double(), gradient, rtol=0, atol=2e-5)

@pytest.mark.skipif(os.environ.get("TORCH_COMPILE_DISABLE") == "1", reason="FlexAttention runs compiled only")
@pytest.mark.parametrize("T, kv_heads", [(64, 2), (90, 1), (37, 4)])
def test_flex_attention_is_that_of_a_float64_loop(T, kv_heads):
    q, k, v, _ = random_qkv(T, kv_heads)
    attend = train.flex_attention_for(T, set(windows_of(T)), CPU)
    compiled = torch.compile(attend, backend="eager", dynamic=False)  # the graph, without generated code: quick
    for window in windows_of(T):
        wanted = plain_attention(q.double(), k.double(), v.double(), window)
        for f in (compiled, attend):  # uncompiled it is another backend in its place
            torch.testing.assert_close(f(q, k, v, window).double(), wanted, rtol=0, atol=5e-6)



@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: FlexAttention has no backward pass on a CPU")
def test_the_gradients_of_flex_attention():
    device = torch.device("cuda")
    q, k, v, upstream = random_qkv(128, 2, D=16)
    flex = torch.compile(train.flex_attention_for(128, {7, 128}, device))
    for window in (7, 128):
        exact, inputs = ([x.double().requires_grad_() for x in (q, k, v)], [x.to(device).requires_grad_() for x in (q, k, v)])
        wanted, y = plain_attention(*exact, window), flex(*inputs, window)
        torch.testing.assert_close(y.cpu().double(), wanted, rtol=0, atol=2e-2)
        for got, gradient in zip(torch.autograd.grad(y, inputs, upstream.to(device)), torch.autograd.grad(wanted, exact, upstream.double())):
            torch.testing.assert_close(got.cpu().double(), gradient, rtol=0, atol=5e-2)


@pytest.mark.parametrize("attend", [train.blocked_attention, train.sdpa_attention])
def test_attention_in_bf16_stays_near(attend):
    q, k, v, _ = random_qkv(64, 2)
    wanted = plain_attention(*(x.double() for x in (q, k, v)), 8)
    y = attend(*(x.bfloat16() for x in (q, k, v)), 8)
    assert y.dtype == torch.bfloat16
    assert (y.double() - wanted).square().mean().sqrt() < 0.01 * wanted.square().mean().sqrt()


def test_blocked_attention_makes_only_the_products_it_needs():
    q, k, v, _ = random_qkv(64, 4)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            largest = max([largest] + [x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)])
            return result

    with Watch():
        train.blocked_attention(q, k, v, 8)
    assert largest == 2 * 4 * 64 * 16  # B x H x T scores of a block and the one before, not of all 64 positions


# ------------------------------------------------------------------------------------------------------- which is chosen

@pytest.mark.parametrize("kind, dtype, capability, hip, name, reason", [
    ("cpu", torch.bfloat16, None, None, "blocked", "needs an NVIDIA GPU"),
    ("mps", torch.float32, None, None, "sdpa", "needs an NVIDIA GPU"),
    ("cuda", torch.bfloat16, (9, 4), "7.0", "flex", "needs an NVIDIA GPU"),
    ("cuda", torch.bfloat16, (7, 5), None, "flex", "bfloat16 on 7.5"),
    ("cuda", torch.bfloat16, (10, 0), None, "flex", "bfloat16 on 10.0"),
    ("cuda", torch.bfloat16, (12, 0), None, "flex", "bfloat16 on 12.0"),
    ("cuda", torch.float32, (8, 0), None, "flex", "float32 on 8.0"),
    ("cuda", torch.bfloat16, (9, 0), None, "flash3", None),
    ("cuda", torch.bfloat16, (8, 6), None, "flash3", None),
])
def test_the_choice_and_its_reason(monkeypatch, capsys, kind, dtype, capability, hip, name, reason):
    calls = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(train, "load_flash_attention_3", lambda: lambda *args, **kwargs: calls.append((args, kwargs)))
    flex = lambda *args: calls.append(args)
    monkeypatch.setattr(train, "flex_attention_for", lambda seq_len, windows, device: flex)
    chosen, attend = train.choose_attention(torch.device(kind), dtype, 64, {8, 64})
    assert chosen == name
    lines = capsys.readouterr().out.splitlines()
    if name == "flash3":
        attend("q", "k", "v", 8)
        assert lines == [] and calls == [(("q", "k", "v"), dict(causal=True, window_size=(8, 0)))]
    else:
        assert attend is {"blocked": train.blocked_attention, "sdpa": train.sdpa_attention, "flex": flex}[name]
        assert len(lines) == 1 and name in lines[0] and "FlashAttention 3" in lines[0] and reason in lines[0]


# ------------------------------------------------------------------------------------------------------- FlashAttention 3

@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty hub cache, and a Hopper card as far as choose_attention can see."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(train, "flex_attention_for", lambda *_: None)
    for name in ("KERNELS_CACHE", "LOCAL_KERNELS", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return SimpleNamespace(cache=tmp_path / "hub", constants=constants)


def write_kernel(directory, answer: str):
    """A stand-in kernel for any device, in the layout of kernel-builder."""
    directory.mkdir(parents=True)
    (directory / "metadata.json").write_text(json.dumps({
        "name": "flash-attn3", "id": f"flash_attn3_{answer}", "version": 1, "license": "MIT", "backend": {"type": "cpu"}, "python-depends": []}))
    (directory / "__init__.py").write_text(f"def flash_attn_func(q, k, v, causal, window_size):\n    return '{answer}', window_size\n")


def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_cached_kernel_is_used_without_the_network(hub, monkeypatch, capsys):
    repository = hub.cache / "kernels--kernels-community--flash-attn3"
    write_kernel(repository / "snapshots" / ("a" * 40) / "build" / "torch-universal", "cached")
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text("a" * 40)
    no_network(monkeypatch)
    name, attend = train.choose_attention(torch.device("cuda"), torch.bfloat16, 64, {64})
    assert name == "flash3" and attend(1, 2, 3, 7) == ("cached", (7, 0))
    assert capsys.readouterr() == ("", "")
    assert hub.constants.HF_HUB_OFFLINE is False  # put back


def test_a_local_kernel_directory_is_used_without_the_network(hub, monkeypatch, tmp_path):
    write_kernel(tmp_path / "mine" / "build" / "torch-universal", "local")
    monkeypatch.setenv("LOCAL_KERNELS", f"{train.FLASH_3}={tmp_path / 'mine'}")
    no_network(monkeypatch)
    name, attend = train.choose_attention(torch.device("cuda"), torch.bfloat16, 64, {64})
    assert name == "flash3" and attend(1, 2, 3, 7) == ("local", (7, 0))


def test_offline_and_not_cached(hub, monkeypatch, capsys):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    no_network(monkeypatch)
    assert train.choose_attention(torch.device("cuda"), torch.bfloat16, 64, {64})[0] == "flex"
    assert "not in the local cache" in capsys.readouterr().out


class Unavailable(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503)
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("kind", ["closed", "silent", "unavailable"])
def test_a_dead_hub_costs_a_few_seconds_and_one_line(hub, monkeypatch, capfd, kind):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Unavailable) if kind == "unavailable" else socket.create_server(("127.0.0.1", 0))
    port = server.socket.getsockname()[1] if kind == "unavailable" else server.getsockname()[1]
    if kind == "unavailable":
        threading.Thread(target=server.serve_forever, daemon=True).start()
    if kind == "closed":
        server.close()
    monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    began = time.monotonic()
    name, _ = train.choose_attention(torch.device("cuda"), torch.bfloat16, 64, {64})
    assert name == "flex" and time.monotonic() - began < 5
    out, err = capfd.readouterr()
    assert err == "" and len(out.splitlines()) == 1 and out.startswith("attention: flex, because FlashAttention 3 is not usable: ")
    assert hub.constants.HF_HUB_OFFLINE is False
    server.server_close() if kind == "unavailable" else server.close()
