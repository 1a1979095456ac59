"""The optimizer against the singular value decomposition, torch's own AdamW, and a plain float64
transcription."""

import pytest
import torch
from drive import settings
from test_train_model import small

import train
from train import AdamW, Muon, MuonAdamW


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------- orthogonalisation


@pytest.mark.parametrize("shape", [(1, 48, 48), (3, 96, 32), (2, 8, 32)])
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


# --------------------------------------------------------------------------------------- AdamW


@pytest.mark.parametrize("dtype, share", [(torch.float32, 1e-5), (torch.bfloat16, 0.008)])
def test_adamw_is_torchs_but_for_the_rounding_of_what_is_stored(dtype, share):
    start, betas = draw(20, 8).to(dtype), (0.96, 0.95)
    ours, wanted = start.clone().requires_grad_(), start.double().requires_grad_()
    optimizer = MuonAdamW([AdamW(ours, 0.05, 0.1, betas)], compiled=False)
    reference = torch.optim.AdamW([wanted], lr=0.05, betas=betas, eps=1e-10, weight_decay=0.1)
    for step in range(50):
        multiplier = reference.param_groups[0]["lr"] / 0.05
        # Down to where eps counts.
        ours.grad = (draw(20, 8, seed=step) * torch.logspace(-10, 1, 8)).to(dtype)
        wanted.grad = ours.grad.double()
        optimizer.step(multiplier, 0.9, 1.0)
        reference.step()
        reference.param_groups[0]["lr"] *= 0.99
        assert ours.grad is None
        with torch.no_grad():
            assert ((ours.double() - wanted).abs() <= share * wanted.abs() + 1e-6).all()
            wanted.copy_(ours)  # so that roundings do not add up
    assert (wanted - start.double()).abs().max() > 0.2


# ---------------------------------------------------------------------- the whole, transcribed


class PlainOptimizer:
    """Every parameter on its own in float64, by the formulas, in numbers that the test names."""

    def __init__(self, model, adamw, orthogonalize):
        self.value = {name: p.detach().double().clone() for name, p in model.named_parameters()}
        # {first part of the name, or a scalar's last: (lr, weight decay, betas)}
        self.adamw_settings = adamw
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
    tall = g.shape[0] > g.shape[1]
    x = (g.T if tall else g) / (1.02 * g.norm() + 1e-6)
    for a, b, c in train.POLAR_EXPRESS:
        A = x @ x.T
        x = a * x + (b * A + c * A @ A) @ x
    return x.T if tall else x


def test_whole_steps_are_those_of_a_float64_transcription(monkeypatch):
    orthogonalize = train.orthogonalize  # in bf16 it has its own test, above
    monkeypatch.setattr(
        train, "orthogonalize", lambda g, dtype=None: orthogonalize(g, torch.float32)
    )
    model = small(
        N_LAYER=2,
        LR_WIDTH_POWER=-0.5,
        EMBEDDING_LR=0.9,
        HEAD_LR=0.005,
        MUON_LR=0.04,
        SCALAR_LR=0.5,
        MUON_WEIGHT_DECAY=0.2,
        HEAD_WEIGHT_DECAY=0.01,
        EMBEDDING_WEIGHT_DECAY=0.001,
        VALUE_EMBEDDING_WEIGHT_DECAY=0.003,
    )
    scale, betas = (64 / 768) ** -0.5, (0.8, 0.95)
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
        gradients = {}
        for i, (name, p) in enumerate(model.named_parameters()):
            gradients[name] = draw(*p.shape, seed=1000 * step + i)
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


def test_a_step_clears_the_gradients_so_that_the_next_does_not_add_to_them():
    model = small()
    optimizer = MuonAdamW(train.param_groups(model), compiled=False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(1.0, 0.85, 1.0)
    assert [name for name, p in model.named_parameters() if p.grad is not None] == []


def test_equal_shapes_are_stepped_together():
    model = small(N_LAYER=2)
    optimizer = MuonAdamW(train.param_groups(model), compiled=False)
    stacks = [group.params for group in optimizer.groups if isinstance(group, Muon)]
    assert sorted((tuple(params[0].shape), len(params)) for params in stacks) == [
        ((2, 32), 1),
        ((32, 64), 4),
        ((64, 64), 4),
        ((64, 256), 2),
        ((256, 64), 2),
    ]


# ------------------------------------------------------------------------ schedules and groups


def test_the_learning_rate_multiplier():
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


def test_a_parameter_without_a_group_is_named():
    model = small()
    model.blocks[1].scale = torch.nn.Parameter(torch.ones(64))
    with pytest.raises(AssertionError, match="no optimizer group has blocks.1.scale:"):
        train.param_groups(model)
