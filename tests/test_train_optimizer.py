"""The optimizer against the singular value decomposition, torch's own AdamW, and a plain float64
transcription."""

import math
import os

import pytest
import torch
from drive import settings

import train
from train import AdamW, Muon, MuonAdamW

V, T = 50, 16


def small(**changes):
    """A model of two layers with all weights random, so that every decay has something to act on."""
    sizes = dict(
        N_LAYER=2, N_EMBD=64, HEAD_DIM=16, N_KV_HEAD=2, WINDOW_PATTERN="SL", SHORT_WINDOW=1 / 4
    )
    model = train.GPT(settings(**{**sizes, **changes}), V, T)
    generator = torch.Generator().manual_seed(1)
    model.init_weights(generator)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)
    return model


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adamw(p, lr, weight_decay=0.1, betas=(0.8, 0.95)):
    return AdamW(p, lr, weight_decay, betas)


# --------------------------------------------------------------------------- orthogonalisation


@pytest.mark.parametrize("shape", [(1, 48, 48), (3, 96, 32), (3, 32, 96), (2, 256, 64), (2, 8, 32)])
@pytest.mark.parametrize("scale", [1e-4, 1, 1e3])
def test_orthogonalize_is_near_the_polar_factor(shape, scale):
    g = draw(*shape) * scale
    u, spectrum, vh = torch.linalg.svd(g.double(), full_matrices=False)
    exact = train.orthogonalize(g, torch.float32).double()
    # Five steps lift what is not much smaller than the largest.
    reach = spectrum / spectrum[..., :1] > 1e-2
    assert reach.float().mean() > 0.9
    # In g's own basis: a polynomial of g stays diagonal there, whatever its singular values.
    own = u.mT @ exact @ vh.mT
    diagonal = own.diagonal(dim1=-2, dim2=-1)
    assert (own - torch.diag_embed(diagonal)).abs().max() < 1e-3
    # The band that the five polynomials leave.
    assert diagonal[reach].min() > 0.85 and diagonal[reach].max() < 1.15
    near = train.orthogonalize(g).double()  # as Muon calls it, in bf16
    assert near.isfinite().all() and (near - u @ vh).norm() < 0.15 * (u @ vh).norm()
    values = torch.linalg.svdvals(near)
    assert values.max() < 1.16 and values[reach].min() > 0.84


def test_orthogonalize_steps_each_matrix_of_a_stack_alone():
    g = draw(3, 40, 24)
    g[1] *= 100
    together = train.orthogonalize(g, torch.float32)
    for one, own in zip(together, g):
        torch.testing.assert_close(
            one, train.orthogonalize(own[None], torch.float32)[0], rtol=0, atol=1e-5
        )
    torch.testing.assert_close(
        together.mT, train.orthogonalize(g.mT.contiguous(), torch.float32), rtol=0, atol=1e-4
    )


def test_orthogonalize_of_zero_is_zero():
    assert not train.orthogonalize(torch.zeros(2, 8, 4)).any()


# --------------------------------------------------------------------------------------- AdamW


@pytest.mark.parametrize("betas", [(0.8, 0.95), (0.96, 0.95)])
def test_adamw_is_torchs_over_many_steps(betas):
    ours, theirs = draw(20, 8).requires_grad_(), draw(20, 8).double().requires_grad_()
    optimizer = MuonAdamW([adamw(ours, 0.02, betas=betas)], compiled=False)
    reference = torch.optim.AdamW([theirs], lr=0.02, betas=betas, eps=1e-10, weight_decay=0.1)
    for step in range(200):
        multiplier = 1 if step < 100 else 0.3
        reference.param_groups[0]["lr"] = 0.02 * multiplier
        # Down to where eps counts.
        ours.grad = draw(20, 8, seed=step) * (step % 7) * torch.logspace(-10, 1, 8)
        theirs.grad = ours.grad.double()
        optimizer.step(multiplier, 0.9, 1.0)
        reference.step()
        assert ours.grad is None
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-5)
    assert (ours - draw(20, 8)).abs().max() > 0.1


def test_adamw_on_bf16_parameters_calculates_in_float32():
    start = draw(20, 8).bfloat16()
    ours = start.clone().requires_grad_()
    optimizer = MuonAdamW([adamw(ours, 0.05)], compiled=False)
    assert all(state.dtype == torch.float32 for state in optimizer.state_tensors())
    wanted = start.double().requires_grad_()
    reference = torch.optim.AdamW([wanted], lr=0.05, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    for step in range(50):
        ours.grad = draw(20, 8, seed=step).bfloat16()
        wanted.grad = ours.grad.double()
        optimizer.step(1.0, 0.9, 1.0)
        reference.step()
        with torch.no_grad():
            wanted.copy_(wanted.bfloat16())  # the rounding of the store is all that bf16 adds
        difference = (ours.double() - wanted).abs()
        assert (difference <= 0.008 * wanted.abs() + 1e-6).all()
        with torch.no_grad():
            wanted.copy_(ours)  # one rounding to the other neighbour does not add up
    assert (wanted - start.double()).abs().max() > 0.2


# ---------------------------------------------------------------------- the whole, transcribed


class PlainOptimizer:
    """Every parameter on its own in float64, by the formulas, in numbers that the test names."""

    def __init__(self, model, adamw, orthogonalize):
        self.value = {name: p.detach().double().clone() for name, p in model.named_parameters()}
        self.adamw_settings = (
            adamw  # {first part of the name, or a scalar's last: (lr, weight decay, betas)}
        )
        self.orthogonalize = orthogonalize
        self.state = {}
        self.steps = 0
        # Where float32 may round g to the other side of 0, which decides over that element's decay.
        self.unsure = {name: torch.zeros(p.shape) > 0 for name, p in model.named_parameters()}

    def step(self, gradients, lr_multiplier, momentum, decay_multiplier):
        self.steps += 1
        for name, p in self.value.items():
            g = gradients[name].double()
            if name.startswith("blocks.") and p.ndim == 2:
                self.muon(name, p, g, 0.04 * lr_multiplier, momentum, 0.2 * decay_multiplier)
            else:
                own = name.split(".")[-1 if p.ndim == 0 else 0]
                lr, weight_decay, betas = self.adamw_settings[own]
                self.adamw(name, p, g, lr * lr_multiplier, weight_decay, betas)

    def adamw(self, name, p, g, lr, weight_decay, betas):
        if name not in self.state:
            self.state[name] = torch.zeros_like(p), torch.zeros_like(p)
        exp_avg, exp_avg_sq = self.state[name]
        exp_avg += (1 - betas[0]) * (g - exp_avg)
        exp_avg_sq += (1 - betas[1]) * (g * g - exp_avg_sq)
        p -= lr * weight_decay * p
        unbiased = exp_avg / (1 - betas[0] ** self.steps)
        unbiased_sq = exp_avg_sq / (1 - betas[1] ** self.steps)
        p -= lr * unbiased / (unbiased_sq.sqrt() + 1e-10)

    def muon(self, name, p, g, lr, momentum, weight_decay):
        rows, columns = p.shape
        if name not in self.state:
            self.state[name] = torch.zeros_like(p), torch.zeros(max(rows, columns)).double()
        momentum_buffer, second_momentum = self.state[name]
        momentum_buffer += (1 - momentum) * (g - momentum_buffer)
        g = self.orthogonalize(g + momentum * (momentum_buffer - g))
        mean_square = (g * g).mean(1 if rows >= columns else 0)
        second_momentum += 0.05 * (mean_square - second_momentum)
        root = second_momentum.clamp(min=1e-10).sqrt()
        scaled = g / (root[:, None] if rows >= columns else root[None, :])
        g = scaled * (g.norm() / scaled.norm())
        self.unsure[name] |= g.abs() < 1e-4 * g.abs().mean()
        decayed = torch.where(g * p >= 0, p, torch.zeros_like(p))
        p -= lr * max(1, rows / columns) ** 0.5 * (g + weight_decay * decayed)


def polar_express(g):
    """Float64, one matrix, always X X^T of the smaller side."""
    steps = [
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ]
    tall = g.shape[0] > g.shape[1]
    x = (g.T if tall else g) / (1.02 * g.norm() + 1e-6)
    for a, b, c in steps:
        A = x @ x.T
        x = a * x + (b * A + c * A @ A) @ x
    return x.T if tall else x


def random_gradients(model, step):
    return {
        name: draw(*p.shape, seed=1000 * step + i)
        for i, (name, p) in enumerate(model.named_parameters())
    }


@pytest.fixture
def float32_orthogonalize(monkeypatch):
    """bf16 is a test of its own above: here the formulas, to many digits."""
    exact = train.orthogonalize
    monkeypatch.setattr(train, "orthogonalize", lambda g: exact(g, torch.float32))


@pytest.mark.parametrize("power, scale", [(-0.5, (64 / 768) ** -0.5), (0.0, 1.0)])
def test_whole_steps_are_those_of_a_float64_transcription(float32_orthogonalize, power, scale):
    model = small(
        LR_WIDTH_POWER=power,
        EMBEDDING_LR=0.9,
        HEAD_LR=0.005,
        MUON_LR=0.04,
        SCALAR_LR=0.5,
        MUON_WEIGHT_DECAY=0.2,
        HEAD_WEIGHT_DECAY=0.01,
        EMBEDDING_WEIGHT_DECAY=0.001,
        VALUE_EMBEDDING_WEIGHT_DECAY=0.003,
    )
    betas = (0.8, 0.95)
    adamw = dict(
        embedding=(0.9 * scale, 0.001, betas),
        value_embeddings=(0.9 * scale, 0.003, betas),
        head=(0.005 * scale, 0.01, betas),
        smear_gate=(0.01, 0, betas),
        smear_scale=(0.005, 0, betas),
        residual_scale=(0.005, 0, betas),
        x0_scale=(0.5, 0, (0.96, 0.95)),
    )
    plain = PlainOptimizer(model, adamw, polar_express)
    optimizer = MuonAdamW(train.param_groups(model), compiled=False)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(4):
        gradients = random_gradients(model, step)
        for name, p in model.named_parameters():
            p.grad = gradients[name].clone()
        given = (1.0 - 0.2 * step, 0.85 + 0.02 * step, 1 - 0.25 * step)
        optimizer.step(*given)
        plain.step(gradients, *given)
        for name, p in model.named_parameters():
            moved = (plain.value[name] - start[name]).norm()
            apart = (p.detach().double() - plain.value[name]).abs()
            unsure = plain.unsure[name]
            assert moved > 1e-4, (step, name)
            assert apart[~unsure].norm() < 2e-4 * moved, (step, name)
            assert not (apart[unsure] > 0.01).any(), (step, name)
            assert unsure.double().mean() < 0.002, (step, name)


def test_equal_shapes_are_stepped_together():
    model = small()
    optimizer = MuonAdamW(train.param_groups(model), compiled=False)
    stacks = [group.params for group in optimizer.groups if isinstance(group, Muon)]
    assert sum(map(len, stacks)) == sum(p.ndim == 2 for p in model.blocks.parameters())
    assert sorted((tuple(params[0].shape), len(params)) for params in stacks) == [
        ((2, 32), 1),
        ((32, 64), 4),
        ((64, 64), 4),
        ((64, 256), 2),
        ((256, 64), 2),
    ]


@pytest.mark.skipif(
    os.environ.get("TORCH_COMPILE_DISABLE") == "1", reason="it is the compiled step that is tested"
)
def test_the_compiled_step_is_the_uncompiled_one(float32_orthogonalize):
    after = []
    for compiled in (False, True):
        tall, vector = [draw(48, 16, seed=1), draw(48, 16, seed=2)], draw(40)
        groups = [Muon(tall, 0.04, 0.2), adamw(vector, 0.1)]
        optimizer = MuonAdamW(groups, compiled=compiled)
        for step in range(3):
            for i, p in enumerate([*tall, vector]):
                p.grad = draw(*p.shape, seed=10 * step + i)
            optimizer.step(1 - 0.3 * step, 0.85 + 0.05 * step, 1 - 0.3 * step)
        after.append([*tall, vector, *optimizer.state_tensors()])
    assert (after[0][0] - draw(48, 16, seed=1)).abs().max() > 0.01
    for plain, fused in zip(*after):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------ schedules and groups


def test_the_learning_lr_multiplier():
    hp = settings(WARMUP=0.1, WARMDOWN=0.5, FINAL_LR_FRAC=0.2)
    wanted = {0: 0, 0.05: 0.5, 0.1: 1, 0.3: 1, 0.5: 1, 0.75: 0.6, 1: 0.2}
    assert {p: pytest.approx(train.lr_multiplier(hp, p)) for p in wanted} == wanted
    flat = settings(WARMUP=0.0, WARMDOWN=0.0, FINAL_LR_FRAC=0.0)
    assert [train.lr_multiplier(flat, p) for p in (0, 0.5, 1)] == [1, 1, 1]
    whole = settings(WARMUP=0.0, WARMDOWN=1.0, FINAL_LR_FRAC=0.0)
    assert [train.lr_multiplier(whole, p) for p in (0, 0.25, 1)] == [1, 0.75, 0]


def test_the_momentum():
    hp = settings(MUON_MOMENTUM_START=0.85, MUON_MOMENTUM_END=0.95, MUON_MOMENTUM_WARMUP=200)
    assert [train.muon_momentum(hp, step) for step in (0, 100, 200, 5000)] == pytest.approx(
        [0.85, 0.9, 0.95, 0.95]
    )


def test_every_parameter_has_exactly_one_group():
    model = small()
    stepped = [id(p) for group in train.param_groups(model) for p in group.params]
    assert sorted(stepped) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("name", ["bias", "blocks.1.scale", "blocks.0.mlp.weight"])
def test_a_parameter_without_a_group_is_named(name):
    model = small()
    place, _, last = name.rpartition(".")
    setattr(model.get_submodule(place), last, torch.nn.Parameter(torch.ones(64)))
    with pytest.raises(AssertionError, match=f"no optimizer group has {name}:"):
        train.param_groups(model)


# -------------------------------------------------------------------------------------- learns


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_falls_on_a_tiny_set(dtype):
    hp = settings(N_LAYER=2, N_EMBD=32, HEAD_DIM=16, N_KV_HEAD=1, WINDOW_PATTERN="SL")
    model = train.GPT(hp, V, T, dtype).init_weights(torch.Generator().manual_seed(0))
    optimizer = MuonAdamW(train.param_groups(model), compiled=False)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(V, (8, T + 1), generator=generator)  # nothing but memory helps
    losses = []
    for step in range(80):
        loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        optimizer.step(
            train.lr_multiplier(hp, step / 80), train.muon_momentum(hp, step), 1 - step / 80
        )
        losses.append(loss.item())
    assert abs(losses[0] - math.log(V)) < 0.05 and losses[-1] < 0.3, losses[::10]
