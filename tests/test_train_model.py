"""The model against a plain float64 transcription, and against counts by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from drive import settings

import train

V, T = 50, 24


def small(dtype=torch.float32, vocab_size=V, shaken=True, **changes):
    """A small model; shaken: all weights random, so that no branch is silent as at the start."""
    sizes = dict(
        N_LAYER=4,
        N_EMBD=64,
        HEAD_DIM=16,
        N_KV_HEAD=2,
        WINDOW_PATTERN="SSL",
        SHORT_WINDOW=1 / 4,
        SOFTCAP=15,
    )
    model = train.GPT(settings(**{**sizes, **changes}), vocab_size, T, dtype)
    generator = torch.Generator().manual_seed(1)
    model.init_weights(generator)
    if shaken:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def tokens(seed=2):
    return torch.randint(V, (3, T), generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------- the whole, float64


def plain_forward(model, inputs):
    """The logits on whole arrays in float64, step by step, without the model's modules."""
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    hp, B = model.hp, len(inputs)
    n_head = hp.N_EMBD // hp.HEAD_DIM
    n_kv_head = hp.N_KV_HEAD or n_head

    def rms(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turn(x):
        channel = torch.arange(0, hp.HEAD_DIM, 2, dtype=torch.float64)
        position = torch.arange(T, dtype=torch.float64)[:, None]
        angle = position * hp.ROPE_BASE ** (-channel / hp.HEAD_DIM)
        turns = torch.polar(torch.ones(1, dtype=torch.float64), angle)[:, None]
        z = torch.complex(*x.chunk(2, -1)) * turns
        return torch.cat([z.real, z.imag], -1)

    x = rms(w["embedding.weight"][inputs])
    share = w["smear_scale"] * torch.sigmoid(x[..., :32] @ w["smear_gate.weight"].T)
    x0 = x.clone()
    for t in range(1, T):
        x0[:, t] += share[:, t] * x[:, t - 1]
    x = x0
    for i in range(hp.N_LAYER):
        name = f"blocks.{i}."
        x = w[name + "residual_scale"] * x + w[name + "x0_scale"] * x0
        h = rms(x)
        q = (h @ w[name + "attention.query.weight"].T).view(B, T, n_head, -1)
        k = (h @ w[name + "attention.key.weight"].T).view(B, T, n_kv_head, -1)
        v = (h @ w[name + "attention.value.weight"].T).view(B, T, n_kv_head, -1)
        if f"value_embeddings.{i}.weight" in w:
            gate = 2 * torch.sigmoid(h[..., :32] @ w[name + "attention.gate.weight"].T)
            values = w[f"value_embeddings.{i}.weight"][inputs].view(B, T, n_kv_head, -1)
            v = v + gate[..., None] * values
        q, k = rms(turn(q)), rms(turn(k))
        k = k.repeat_interleave(n_head // n_kv_head, dim=2)
        v = v.repeat_interleave(n_head // n_kv_head, dim=2)
        letter = hp.WINDOW_PATTERN[i % len(hp.WINDOW_PATTERN)]
        window = int(hp.SHORT_WINDOW * T)
        if letter == "L" or i == hp.N_LAYER - 1:
            window = T
        distance = torch.arange(T)[:, None] - torch.arange(T)
        hidden = (distance < 0) | (distance > window)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / hp.HEAD_DIM**0.5
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        y = torch.einsum("bhts,bshd->bthd", weights, v)
        x = x + y.flatten(2) @ w[name + "attention.out.weight"].T
        squared = torch.relu(rms(x) @ w[name + "mlp.up.weight"].T) ** 2
        x = x + squared @ w[name + "mlp.down.weight"].T
    return hp.SOFTCAP * torch.tanh(rms(x) @ w["head.weight"].T / hp.SOFTCAP)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(N_KV_HEAD=None, N_LAYER=3, WINDOW_PATTERN="S"),
        dict(N_KV_HEAD=1, WINDOW_PATTERN="LS", SOFTCAP=5, ROPE_BASE=200_000),
    ],
)
def test_the_logits_are_those_of_a_plain_float64_model(changes):
    model = small(**changes)
    assert model.blocks[-1].attention.gate is not None  # the last layer has a value embedding
    assert len(model.value_embeddings) == math.ceil(model.hp.N_LAYER / 2)
    logits, wanted = model(tokens()), plain_forward(model, tokens())
    assert logits.dtype == torch.float32 and logits.shape == (3, T, V)
    assert wanted.std() > 1  # not a silent model
    torch.testing.assert_close(logits.double(), wanted, rtol=0, atol=2e-4)


def test_bf16_stays_near_float32():
    exact, near = small()(tokens()), small(torch.bfloat16)(tokens())
    assert near.dtype == torch.float32
    assert 0 < (near - exact).square().mean().sqrt() < 0.03 * exact.std()


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
        assert torch.allclose(got[name], p.grad, rtol=1e-4, atol=1e-6), name


# --------------------------------------------------------------------------- counts and starts


def test_parameters_and_flops_by_hand():
    # 2 layers, width 64, 4 heads of 16, 2 key/value heads, vocabulary 50, T 24, windows 6 and 24;
    # the last layer has a value embedding
    attention = 64 * 64 + 64 * 32 + 64 * 32 + 64 * 64
    blocks = 2 * (attention + 64 * 256 + 256 * 64) + 32 * 2
    head = embedding = 50 * 64
    smear = 32
    scales = 2 + 2 + 1
    parameters = blocks + head + embedding + 50 * 32 + smear + scales
    flops = 6 * (blocks + head + smear) + 12 * 4 * 16 * 6 + 12 * 4 * 16 * 24
    assert small(N_LAYER=2).counts() == (parameters, flops)


def test_initial_weights():
    width, k = 256, 0.68
    changes = dict(N_EMBD=width, HEAD_DIM=64, INIT_SCALE=k, X0_INIT=0.05)
    model = small(vocab_size=2000, shaken=False, **changes)
    bound = k * math.sqrt(3 / width)
    kinds = dict(
        normal=("embedding", "head"),
        uniform=("query", "key", "value", "up", *map(str, range(4))),  # 0 to 3: value embeddings
        zero=("out", "down", "gate", "smear_gate", "smear_scale"),
        scale=("residual_scale", "x0_scale"),
    )
    for name, p in model.named_parameters():
        last = name.removesuffix(".weight").split(".")[-1]
        (kind,) = [kind for kind, names in kinds.items() if last in names]
        if kind == "normal":
            std = {"embedding": 1, "head": 0.001}[last]
            assert abs(p.std() / std - 1) < 0.01 and abs(p.mean() / std) < 0.01, name
            assert abs((p.abs() < std).float().mean() - 0.6827) < 0.01, name
        elif kind == "uniform":
            assert 0.99 * bound < p.abs().max() <= bound, name
            assert abs(p.std() - bound / math.sqrt(3)) < 0.01 * bound, name
        elif kind == "zero":
            assert not p.any(), name
        else:
            value = {"residual_scale": 1.0, "x0_scale": 0.05}[last]
            assert torch.equal(p, torch.tensor(value)), name


def test_every_size_has_every_setting_and_its_model_exists():
    assert list(train.SIZES) == ["h100", "gpu", "cpu"]
    names = [{name for name in dir(size) if name.isupper()} for size in train.SIZES.values()]
    assert names[0] == names[1] == names[2]
    for hp in train.SIZES.values():
        with torch.device("meta"):
            train.GPT(hp, 8192, 2048)
