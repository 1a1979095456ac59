"""The model against slower and plainer versions of its pieces, and against counts by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from drive import settings

import train
from autoresearch.kit.attention import blocked_attention

V, T = 50, 24


def small(
    dtype=torch.float32,
    vocab_size=V,
    seq_len=T,
    shaken=True,
    attend=blocked_attention,
    **changes,
):
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
    model = train.GPT(settings(**{**sizes, **changes}), vocab_size, seq_len, dtype, attend)
    generator = torch.Generator().manual_seed(1)
    model.init_weights(generator)
    if shaken:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def tokens(batch=3, length=T, seed=2):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("base", [10_000, 200_000])
def test_rotary_embedding_is_a_complex_product(base):
    model = small(ROPE_BASE=base)
    x = torch.randn(2, T, 4, 16, generator=torch.Generator().manual_seed(0))
    D = x.shape[-1]
    turned = torch.empty_like(x, dtype=torch.float64)
    for t in range(T):
        for d in range(D // 2):
            number = torch.complex(x[:, t, :, d].double(), x[:, t, :, d + D // 2].double())
            angle = t * base ** (-2 * d / D)
            number = number * complex(math.cos(angle), math.sin(angle))
            turned[:, t, :, d] = number.real
            turned[:, t, :, d + D // 2] = number.imag
    torch.testing.assert_close(
        train.rotate(x, model.cos, model.sin).double(), turned, rtol=0, atol=1e-5
    )
    assert train.rotate(x.bfloat16(), model.cos, model.sin).dtype == torch.bfloat16


def test_norm():
    x = torch.randn(5, 64, dtype=torch.float64) * 10
    wanted = x / x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(train.norm(x), wanted, rtol=1e-6, atol=0)
    scaled = train.norm(x.float() * 1e-2)  # the scale falls out
    torch.testing.assert_close(scaled, wanted.float(), rtol=1e-3, atol=1e-4)


def test_queries_and_keys_are_rotated_then_normed():
    seen = {}

    def spy(q, k, v, window):
        seen.update(q=q, k=k)
        return blocked_attention(q, k, v, window)

    small(attend=spy)(tokens())
    for x in seen.values():  # of mean square 1 per head, also after the rotation
        torch.testing.assert_close(x.square().mean(-1), torch.ones(x.shape[:-1]), rtol=1e-3, atol=0)
    assert seen["q"].shape == (3, T, 4, 16) and seen["k"].shape == (3, T, 2, 16)


def attention_values(attention, x, values):
    """What attention hands on as v."""
    seen = []

    def spy(q, k, v, window):
        seen.append(v)
        return torch.zeros_like(q)

    attention.attend = spy
    attention(x, values, torch.ones(T, 1, 8), torch.zeros(T, 1, 8))
    return seen[0]


def test_the_value_gate_is_neutral_at_the_start_and_reads_32_channels():
    attention = small(shaken=False).blocks[-1].attention
    x, values = torch.randn(3, T, 64), torch.randn(3, T, 32)
    plain = attention.value(x).unflatten(-1, (2, 16)) + values.unflatten(-1, (2, 16))
    torch.testing.assert_close(attention_values(attention, x, values), plain)
    with torch.no_grad():
        attention.gate.weight.normal_()
    gate = 2 / (1 + torch.exp(-(x[..., :32] @ attention.gate.weight.T)))  # (B, T, KV)
    wanted = attention.value(x).unflatten(-1, (2, 16)) + gate[..., None] * values.unflatten(
        -1, (2, 16)
    )
    torch.testing.assert_close(attention_values(attention, x, values), wanted)


@pytest.mark.parametrize(
    "depth, with_values", [(1, [0]), (2, [1]), (3, [0, 2]), (4, [1, 3]), (9, [0, 2, 4, 6, 8])]
)
def test_value_embeddings_on_every_second_layer_and_the_last(depth, with_values):
    model = small(N_LAYER=depth)
    assert sorted(map(int, model.value_embeddings)) == with_values
    assert [
        i for i, block in enumerate(model.blocks) if block.attention.gate is not None
    ] == with_values
    model(tokens(), tokens(seed=3)).backward()
    assert all(table.weight.grad.abs().sum() > 0 for table in model.value_embeddings.values())


@pytest.mark.parametrize(
    "pattern, windows",
    [
        ("SSSL", [6, 6, 6, 24]),
        ("SSSL", [6, 6, 6, 24, 6, 24]),
        ("S", [6, 6, 24]),
        ("L", [24, 24]),
        ("LS", [24, 24]),
        ("S", [24]),
    ],
)
def test_the_window_pattern(pattern, windows):
    seen = []

    def spy(q, k, v, window):
        seen.append(window)
        return q

    model = small(WINDOW_PATTERN=pattern, N_LAYER=len(windows), attend=spy)
    assert [block.attention.window for block in model.blocks] == windows
    model(tokens())
    assert seen == windows


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
    [{}, dict(N_KV_HEAD=None, N_LAYER=3), dict(N_KV_HEAD=1, WINDOW_PATTERN="L", SOFTCAP=5)],
)
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


def test_the_published_size_of_the_reference_start():
    hp = settings(N_LAYER=8, N_EMBD=512, HEAD_DIM=128, WINDOW_PATTERN="SSSL", SHORT_WINDOW=1 / 2)
    with torch.device("meta"):
        parameters, flops = train.GPT(hp, 8192, 2048).counts()
    assert round(parameters / 1e6, 1) == 50.3
    multiplied = 8 * 12 * 512**2 + 4 * 4 * 32 + 8192 * 512 + 32  # blocks, gates, head, smear
    assert flops == 6 * multiplied + 12 * 512 * (6 * 1024 + 2 * 2048)


def test_initial_weights():
    width, k = 256, 0.68
    model = small(
        N_EMBD=width,
        HEAD_DIM=64,
        INIT_SCALE=k,
        X0_INIT=0.05,
        vocab_size=2000,
        shaken=False,
    )
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
            within_one = (p.abs() < std).float().mean()
            assert abs(within_one - 0.6827) < 0.01, name
        elif kind == "uniform":
            assert 0.99 * bound < p.abs().max() <= bound, name
            assert abs(p.std() - bound / math.sqrt(3)) < 0.01 * bound, name
            assert abs((p.abs() < bound / 2).float().mean() - 0.5) < 0.02, name
        elif kind == "zero":
            assert not p.any(), name
        else:
            value = {"residual_scale": 1.0, "x0_scale": 0.05}[last]
            assert torch.equal(p, torch.tensor(value)), name


def test_the_same_seed_gives_the_same_start():
    def start(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in small(shaken=False).init_weights().parameters()])

    assert torch.equal(start(1), start(1)) and not torch.equal(start(1), start(2))


def test_a_new_parameter_keeps_the_start_its_module_gave_it():
    model = small(shaken=False)
    model.blocks[0].scale = torch.nn.Parameter(torch.full((64,), 3.0))
    model.init_weights()
    assert (model.blocks[0].scale == 3).all()


# ----------------------------------------------------------------------------- sizes, compiling


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(N_EMBD=100), "N_EMBD 100 is no multiple of 16"),
        (dict(N_KV_HEAD=3), "N_KV_HEAD 3 must divide the 4 heads"),
        (dict(HEAD_DIM=15, N_EMBD=60), "HEAD_DIM 15 is odd"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(AssertionError, match=message):
        small(**changes)


def test_every_size_has_every_setting_and_its_model_exists():
    assert list(train.SIZES) == ["h100", "gpu", "cpu"]
    names = [{name for name in dir(size) if name.isupper()} for size in train.SIZES.values()]
    assert names[0] == names[1] == names[2]
    for hp in train.SIZES.values():
        with torch.device("meta"):
            train.GPT(hp, 8192, 2048)


def test_trunk_logits_and_loss_piece_are_compiled_apart(monkeypatch):
    compiled = []

    def compile(function, dynamic):
        assert dynamic is False
        compiled.append(function.__name__)
        return lambda *arguments: function(*arguments)

    model, plain = small(), small()
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    monkeypatch.setattr(torch, "compile", compile)
    model.compile_parts()
    assert compiled == ["trunk", "logits", "cross_entropy_piece"]
    assert torch.equal(model(tokens()), plain(tokens()))
    assert model(tokens(), tokens(seed=3)) == plain(tokens(), tokens(seed=3))
