"""The model against slower and plainer versions of its pieces, and against counts by hand."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT  # noqa: F401 (puts the repository on the path)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train

V, T = 50, 24


def small(dtype=torch.float32, vocab_size=V, seq_len=T, shaken=True, **changes):
    """A small model; shaken: all weights random, so that no branch is silent as at the start."""
    sizes = dict(DEPTH=4, WIDTH=64, HEAD_DIM=16, KV_HEADS=2, WINDOW_PATTERN="SSL", SHORT_WINDOW=1 / 4, SOFTCAP=15)
    model = train.GPT(train.hyperparameters("cpu", **{**sizes, **changes}), vocab_size, seq_len, dtype)
    generator = torch.Generator().manual_seed(1)
    model.initialize(generator)
    if shaken:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def tokens(batch=3, length=T, seed=2):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------- pieces

@pytest.mark.parametrize("base", [10_000, 200_000])
def test_rotary_embedding_is_a_complex_product(base):
    model = small(ROTARY_BASE=base)
    x = torch.randn(2, T, 4, 16, generator=torch.Generator().manual_seed(0))
    D = x.shape[-1]
    turned = torch.empty_like(x, dtype=torch.float64)
    for t in range(T):
        for d in range(D // 2):
            number = torch.complex(x[:, t, :, d].double(), x[:, t, :, d + D // 2].double())
            number = number * complex(math.cos(t * base ** (-2 * d / D)), math.sin(t * base ** (-2 * d / D)))
            turned[:, t, :, d], turned[:, t, :, d + D // 2] = number.real, number.imag
    torch.testing.assert_close(train.rotate(x, model.cos, model.sin).double(), turned, rtol=0, atol=1e-5)
    assert train.rotate(x.bfloat16(), model.cos, model.sin).dtype == torch.bfloat16


def test_norm():
    x = torch.randn(5, 64, dtype=torch.float64) * 10
    torch.testing.assert_close(train.norm(x), x / x.square().mean(-1, keepdim=True).sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(train.norm(x.float() * 1e-2), train.norm(x).float(), rtol=1e-3, atol=1e-4)  # scale falls out


def test_queries_and_keys_are_rotated_then_normed():
    seen = {}
    model = small()
    def spy(q, k, v, window):
        seen.update(q=q, k=k)
        return train.blocked_attention(q, k, v, window)
    model.attend = spy
    model(tokens())
    for x in seen.values():  # of mean square 1 per head, also after the rotation
        torch.testing.assert_close(x.square().mean(-1), torch.ones(x.shape[:-1]), rtol=1e-3, atol=0)
    assert seen["q"].shape == (3, T, 4, 16) and seen["k"].shape == (3, T, 2, 16)


def attention_values(attention, x, values):
    """What attention hands on as v."""
    seen = []
    cos, sin = torch.ones(T, 1, 8), torch.zeros(T, 1, 8)
    attention(x, values, cos, sin, lambda q, k, v, window: seen.append(v) or torch.zeros_like(q))
    return seen[0]


def test_the_value_gate_is_neutral_at_the_start_and_reads_32_channels():
    attention = small(shaken=False).blocks[-1].attention
    x, values = torch.randn(3, T, 64), torch.randn(3, T, 32)
    plain = attention.value(x).unflatten(-1, (2, 16)) + values.unflatten(-1, (2, 16))
    torch.testing.assert_close(attention_values(attention, x, values), plain)
    with torch.no_grad():
        attention.gate.weight.normal_()
    gate = 2 / (1 + torch.exp(-(x[..., :32] @ attention.gate.weight.T)))  # (B, T, KV)
    wanted = attention.value(x).unflatten(-1, (2, 16)) + gate[..., None] * values.unflatten(-1, (2, 16))
    torch.testing.assert_close(attention_values(attention, x, values), wanted)


@pytest.mark.parametrize("depth, with_values", [(1, [0]), (2, [1]), (3, [0, 2]), (4, [1, 3]), (9, [0, 2, 4, 6, 8])])
def test_value_embeddings_on_every_second_layer_and_the_last(depth, with_values):
    model = small(DEPTH=depth)
    assert sorted(map(int, model.value_tables)) == with_values
    assert [i for i, block in enumerate(model.blocks) if block.attention.gate is not None] == with_values
    model(tokens(), tokens(seed=3)).backward()
    assert all(table.weight.grad.abs().sum() > 0 for table in model.value_tables.values())


@pytest.mark.parametrize("pattern, depth, windows", [
    ("SSSL", 4, [6, 6, 6, 24]), ("SSSL", 6, [6, 6, 6, 24, 6, 24]), ("S", 3, [6, 6, 24]), ("L", 2, [24, 24]), ("LS", 2, [24, 24]), ("S", 1, [24]),
])
def test_the_window_pattern(pattern, depth, windows):
    model = small(WINDOW_PATTERN=pattern, DEPTH=depth)
    assert [block.attention.window for block in model.blocks] == windows
    seen = []
    model.attend = lambda q, k, v, window: seen.append(window) or q
    model(tokens())
    assert seen == windows


# ----------------------------------------------------------------------------------------------------- the whole, float64

def plain_forward(model, inputs):
    """The logits on whole arrays in float64, step by step, without the model's modules."""
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    hp, B = model.hp, len(inputs)
    heads, kv_heads = hp.WIDTH // hp.HEAD_DIM, hp.KV_HEADS or hp.WIDTH // hp.HEAD_DIM
    rms = lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    def turn(x):
        frequency = hp.ROTARY_BASE ** (-torch.arange(0, hp.HEAD_DIM, 2, dtype=torch.float64) / hp.HEAD_DIM)
        turns = torch.polar(torch.ones(1, dtype=torch.float64), torch.arange(T, dtype=torch.float64)[:, None] * frequency)[:, None]
        z = torch.complex(*x.chunk(2, -1)) * turns
        return torch.cat([z.real, z.imag], -1)
    x = rms(w["embedding.weight"][inputs])
    share = w["smear_scale"] * torch.sigmoid(x[..., :32] @ w["smear.weight"].T)
    x0 = x.clone()
    for t in range(1, T):
        x0[:, t] += share[:, t] * x[:, t - 1]
    x = x0
    for i in range(hp.DEPTH):
        name = f"blocks.{i}."
        x = w["stream_scale"][i] * x + w["x0_scale"][i] * x0
        h = rms(x)
        q = (h @ w[name + "attention.query.weight"].T).view(B, T, heads, -1)
        k = (h @ w[name + "attention.key.weight"].T).view(B, T, kv_heads, -1)
        v = (h @ w[name + "attention.value.weight"].T).view(B, T, kv_heads, -1)
        if f"value_tables.{i}.weight" in w:
            gate = 2 * torch.sigmoid(h[..., :32] @ w[name + "attention.gate.weight"].T)
            v = v + gate[..., None] * w[f"value_tables.{i}.weight"][inputs].view(B, T, kv_heads, -1)
        q, k = rms(turn(q)), rms(turn(k))
        k, v = (y.repeat_interleave(heads // kv_heads, dim=2) for y in (k, v))
        letter = "L" if i == hp.DEPTH - 1 else hp.WINDOW_PATTERN[i % len(hp.WINDOW_PATTERN)]
        distance = torch.arange(T)[:, None] - torch.arange(T)
        hidden = (distance < 0) | (distance > (T if letter == "L" else int(hp.SHORT_WINDOW * T)))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / hp.HEAD_DIM**0.5
        y = torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)
        x = x + y.flatten(2) @ w[name + "attention.out.weight"].T
        x = x + torch.relu(rms(x) @ w[name + "mlp.up.weight"].T) ** 2 @ w[name + "mlp.down.weight"].T
    return hp.SOFTCAP * torch.tanh(rms(x) @ w["head.weight"].T / hp.SOFTCAP)


@pytest.mark.parametrize("changes", [{}, dict(KV_HEADS=None, DEPTH=3), dict(KV_HEADS=1, WINDOW_PATTERN="L", SOFTCAP=5)])
def test_the_logits_are_those_of_a_plain_float64_model(changes):
    model = small(**changes)
    logits, wanted = model(tokens()), plain_forward(model, tokens())
    assert logits.dtype == torch.float32 and logits.shape == (3, T, V)
    assert wanted.std() > 1  # not a silent model
    torch.testing.assert_close(logits.double(), wanted, rtol=0, atol=2e-4)


def test_bf16_stays_near_float32():
    exact, near = small()(tokens()), small(torch.bfloat16)(tokens())
    assert near.dtype == torch.float32
    assert 0 < (near - exact).square().mean().sqrt() < 0.03 * exact.std()


def test_no_position_sees_a_later_one():
    model, inputs = small(), tokens()
    before = model(inputs)
    for t in (0, 1, 5, 6, 7, T - 2):
        changed = inputs.clone()
        changed[:, t + 1 :] = (changed[:, t + 1 :] + 1) % V
        after = model(changed)
        assert torch.equal(after[:, : t + 1], before[:, : t + 1])
        assert not torch.equal(after[:, t + 1], before[:, t + 1])


def test_the_loss_and_all_gradients_are_those_of_the_logits():
    model, inputs, targets = small(), tokens(), tokens(seed=3)
    loss = model(inputs, targets)
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    wanted = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6, msg=lambda text: f"{name}: {text}")


# ------------------------------------------------------------------------------------------------------ counts and starts

def test_parameters_and_flops_by_hand():
    # depth 2, width 64, 4 heads of 16, 2 key/value heads, vocabulary 50, T 24, windows 6 and 24; the last layer has values
    attention = 64 * 64 + 64 * 32 + 64 * 32 + 64 * 64
    blocks = 2 * (attention + 64 * 256 + 256 * 64) + 32 * 2
    head = embedding = 50 * 64
    parameters = blocks + head + embedding + 50 * 32 + 2 + 2 + 32 + 1  # the last: the gate of the token before, its scale
    flops = 6 * (blocks + head + 32) + 12 * 4 * 16 * 6 + 12 * 4 * 16 * 24
    assert small(DEPTH=2).counts() == (parameters, flops)


def test_the_published_size_of_the_reference_start():
    hp = train.hyperparameters("h100", DEPTH=8, WIDTH=512, HEAD_DIM=128, WINDOW_PATTERN="SSSL", SHORT_WINDOW=1 / 2)
    with torch.device("meta"):
        parameters, flops = train.GPT(hp, 8192, 2048).counts()
    assert round(parameters / 1e6, 1) == 50.3
    assert flops == 6 * (8 * 12 * 512**2 + 4 * 4 * 32 + 8192 * 512 + 32) + 12 * 512 * (6 * 1024 + 2 * 2048)


def test_initial_weights():
    width, k = 256, 0.68
    model = small(WIDTH=width, HEAD_DIM=64, KV_HEADS=2, DEPTH=4, INIT_SCALE=k, X0_START=0.05, vocab_size=2000, shaken=False)
    span = k * math.sqrt(3 / width)
    for name, p in model.named_parameters():
        last = name.removesuffix(".weight").split(".")[-1]
        if name == "embedding.weight" or name == "head.weight":
            std = 1 if name == "embedding.weight" else 0.001
            assert abs(p.std() / std - 1) < 0.01 and abs(p.mean() / std) < 0.01, name
            assert abs((p.abs() < std).float().mean() - 0.6827) < 0.01, name  # normal: so many within one deviation
        elif last in ("query", "key", "value", "up") or name.startswith("value_tables"):
            assert p.abs().max() <= span and p.abs().max() > 0.99 * span, name
            assert abs(p.std() - span / math.sqrt(3)) < 0.01 * span and abs((p.abs() < span / 2).float().mean() - 0.5) < 0.02, name
        elif last in ("out", "down", "gate", "smear", "smear_scale"):
            assert not p.any(), name
        else:
            assert torch.equal(p, torch.full((4,), {"stream_scale": 1.0, "x0_scale": 0.05}[name])), name


def test_the_same_seed_gives_the_same_start():
    def start(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in small(shaken=False).initialize().parameters()])
    assert torch.equal(start(1), start(1)) and not torch.equal(start(1), start(2))


def test_a_new_parameter_keeps_the_start_its_module_gave_it():
    model = small(shaken=False)
    model.blocks[0].scale = torch.nn.Parameter(torch.full((64,), 3.0))
    model.initialize()
    assert (model.blocks[0].scale == 3).all()


# ------------------------------------------------------------------------------------------------------------------ loss

@pytest.mark.parametrize("piece", [1, 7 * V, 64 * V, 2**25])
@pytest.mark.parametrize("cap", [15, 3])
def test_softcap_cross_entropy(monkeypatch, piece, cap):
    monkeypatch.setitem(train.LOSS_PIECE, "cpu", piece)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(61, 16, generator=generator), torch.randn(V, 16, generator=generator)
    targets = torch.randint(V, (61,), generator=generator)
    got, exact = ([y.to(dtype).requires_grad_() for y in (x, weight)] for dtype in (torch.float32, torch.float64))
    loss = train.SoftcapCrossEntropy.apply(*got, targets, cap)
    wanted = F.cross_entropy(cap * torch.tanh(exact[0] @ exact[1].T / cap), targets)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    for ours, plain in zip(torch.autograd.grad(0.5 * loss, got), torch.autograd.grad(0.5 * wanted, exact)):
        assert plain.abs().max() > 1e-4
        torch.testing.assert_close(ours.double(), plain, rtol=1e-4, atol=1e-8)


def test_the_loss_in_bf16_stays_near():
    generator = torch.Generator().manual_seed(0)
    x, weight, targets = torch.randn(64, 16, generator=generator), torch.randn(V, 16, generator=generator), torch.arange(64) % V
    near, exact = [x.bfloat16().requires_grad_(), weight.clone().requires_grad_()], [y.double().requires_grad_() for y in (x, weight)]
    loss = train.SoftcapCrossEntropy.apply(*near, targets, 15)
    wanted = F.cross_entropy(15 * torch.tanh(exact[0] @ exact[1].T / 15), targets)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-2, atol=0)
    ours, plain = torch.autograd.grad(loss, near), torch.autograd.grad(wanted, exact)
    assert ours[0].dtype == torch.bfloat16 and ours[1].dtype == torch.float32
    for a, b in zip(ours, plain):
        assert (a.double() - b).norm() < 0.02 * b.norm()


def test_the_loss_never_holds_tokens_times_vocabulary(monkeypatch):
    monkeypatch.setitem(train.LOSS_PIECE, "cpu", 2**14)
    N, width, vocabulary = 512, 16, 1024
    x, weight = torch.randn(N, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            largest = max([largest] + [y.numel() for y in tree_leaves(result) if isinstance(y, torch.Tensor)])
            return result

    with Watch():
        train.SoftcapCrossEntropy.apply(x, weight, torch.zeros(N, dtype=torch.int64), 15).backward()
    assert largest == 2**14 < N * vocabulary / 16


# ---------------------------------------------------------------------------------------------------- sizes that do not fit

@pytest.mark.parametrize("changes, parts", [
    (dict(WIDTH=100), ["100", "16"]),
    (dict(KV_HEADS=3), ["3", "4 heads"]),
    (dict(HEAD_DIM=15, WIDTH=60), ["15", "even"]),
    (dict(WINDOW_PATTERN="SXL"), ["SXL"]),
    (dict(WINDOW_PATTERN=""), ["''"]),
    (dict(SOFTCAP=100), ["100", "64"]),
    (dict(SOFTCAP=None), ["SOFTCAP None"]),
    (dict(DEPTH=0), ["DEPTH 0"]),
])
def test_sizes_that_do_not_fit_are_named(changes, parts):
    with pytest.raises(ValueError) as error:
        small(**changes)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_the_table(monkeypatch):
    assert train.hyperparameters("h100", DEPTH=3).DEPTH == 3
    monkeypatch.setitem(train.TABLE, "WIDTH", (1, 2, 3))
    monkeypatch.setitem(train.TABLE, "SOFTCAP", 7)
    assert [(hp.WIDTH, hp.SOFTCAP) for hp in map(train.hyperparameters, ("h100", "gpu", "cpu"))] == [(1, 7), (2, 7), (3, 7)]
    with pytest.raises(ValueError, match="DEPHT"):
        train.hyperparameters("cpu", DEPHT=3)
    with pytest.raises(ValueError, match="SIZE 'big' is none of h100, gpu, cpu"):
        train.hyperparameters("big")
    monkeypatch.setitem(train.TABLE, "DEPTH", (9, 5))
    with pytest.raises(ValueError, match=r"DEPTH \(9, 5\) must be one value, or one for each of"):
        train.hyperparameters("cpu")


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989.5), ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 3090 Ti", 80),
    ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("AMD EPYC", 0), ("Intel(R) Xeon(R)", 0),
])
def test_the_peak_by_the_device_name(name, peak):
    assert train.peak_tflops(name) == peak


@pytest.mark.parametrize("kind, corpus, name, size", [
    ("cpu", "climbmix", "AMD EPYC", "cpu"), ("mps", "climbmix", "Apple M3", "cpu"), ("cuda", "demo", "NVIDIA H100 80GB HBM3", "cpu"),
    ("cuda", "climbmix", "NVIDIA H100 80GB HBM3", "h100"), ("cuda", "text", "NVIDIA GeForce RTX 3090", "gpu"), ("cuda", "text", "unknown", "gpu"),
])
def test_the_size_by_device_and_corpus(monkeypatch, kind, corpus, name, size):
    monkeypatch.setattr(train, "device_name", lambda device: name)
    assert train.pick_size(torch.device(kind), corpus) == size
    monkeypatch.setattr(train, "SIZE", "gpu")
    assert train.pick_size(torch.device(kind), corpus) == "gpu"
