"""
train.py: a GPT, its optimizer and its training, for the time that was prepared (five minutes).

This is the file to change.

    uv run train.py        it takes no flags: edit the settings below

The rule: all that a run knows comes from its own `train` batches, drawn while the clock runs.
No weights or statistics from disk, the network or an earlier run; no loader of another split;
no state kept and nothing learned while it is scored; no helper files. prepare.py stays as it is.

The sections:
- settings: one constant a line; values that differ by size are in H100, GPU or CPU
- model: grouped queries, rotary embedding, query/key norm, sliding windows, value embeddings,
  smear (a gated token shift), squared ReLU, softcap
- optimizer: Muon (Polar Express, NorMuon, cautious decay) for matrices, AdamW for the rest
- loop: accumulate gradients, step, until the budget is spent

autoresearch/kit has the parts that any model needs (attention backends, loss in pieces, warm-up,
progress, failures). Call it, or write your own here instead.
"""

# ruff: noqa: E402  (report.begin comes before the imports that take seconds)
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from autoresearch.kit import report

if __name__ == "__main__":
    report.begin()

import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import prepare
from autoresearch.kit import attention, warmup
from autoresearch.kit.device import compute_dtype, pick_size, short, use_one_heap
from autoresearch.kit.loss import cross_entropy_piece, softcap, softcap_cross_entropy
from autoresearch.referee.provenance import device_name, training_device
from prepare import (
    Tokenizer,
    check_prepared,
    clock,
    evaluate_bpb,
    fingerprint,
    make_dataloader,
    manifest,
    seed,
    split_name,
)

# ----------------------------------------------------------------------------------- settings
# A size takes its own values first, then those of Settings. To change a setting for one size only,
# write it there.

SIZE = None  # "h100", "gpu" or "cpu"; None: by the device (kit/device.py, pick_size)


class Settings:
    # model
    N_KV_HEAD = None  # key/value heads; None: as many as query heads
    SOFTCAP = 15  # logits stay within +-15
    X0_INIT = 0.05  # b_i: x0's share in a layer's input; sweep: 0.0..0.2
    INIT_SCALE = 0.68  # k: uniform within +-k sqrt(3 / N_EMBD); sweep: 0.3..1.5 log
    SHORT_WINDOW = 1 / 8  # of the sequence
    GATE_CHANNELS = 32  # gates read the first channels of the stream
    # learning rates
    MUON_LR = 0.04  # sweep: 0.01..0.16 log
    SCALAR_LR = 0.5  # sweep: 0.1..2.0 log
    # weight decay
    MUON_WEIGHT_DECAY = 0.2  # cautious; falls to 0 over the budget; sweep: 0.0..0.6
    HEAD_WEIGHT_DECAY = 0.01
    EMBEDDING_WEIGHT_DECAY = 0.001
    VALUE_EMBEDDING_WEIGHT_DECAY = 0.003
    # momentum
    ADAM_BETA1 = 0.8
    ADAM_BETA2 = 0.95
    X0_BETA1 = 0.96  # of b_i
    MUON_MOMENTUM_START = 0.85
    MUON_MOMENTUM_END = 0.95  # sweep: 0.85..0.98
    MUON_MOMENTUM_WARMUP = 200  # steps from start to end
    # schedule, in shares of the budget
    WARMUP = 0.0  # sweep: 0.0..0.1
    FINAL_LR_FRAC = 0.05  # of the learning rate, left at the end; sweep: 0.0..0.2


class H100(Settings):  # a data center's card of 40 GB or more
    N_LAYER = 9
    N_EMBD = 640  # width of the residual stream
    HEAD_DIM = 128  # n_head = N_EMBD / HEAD_DIM
    WINDOW_PATTERN = "SSSSL"  # S short, L full; repeated over the layers, the last is always L
    ROPE_BASE = 200_000
    TOKENS_PER_STEP = 2**18
    DEVICE_BATCH_SIZE = 64  # rows at a time, if memory allows
    EVAL_BATCH_TOKENS = 2**16
    EMBEDDING_LR = 0.9  # of the value embeddings too; sweep: 0.1..2.0 log
    HEAD_LR = 0.005  # sweep: 0.001..0.02 log
    LR_WIDTH_POWER = -0.5  # both x (N_EMBD / 768) ** this
    WARMDOWN = 0.75  # sweep: 0.2..1.0


class GPU(Settings):  # any other
    N_LAYER = 5
    N_EMBD = 512
    HEAD_DIM = 128
    WINDOW_PATTERN = "S"
    ROPE_BASE = 200_000
    TOKENS_PER_STEP = 2**16
    DEVICE_BATCH_SIZE = 32
    EVAL_BATCH_TOKENS = 2**15
    EMBEDDING_LR = 0.9  # sweep: 0.1..2.0 log
    HEAD_LR = 0.005  # sweep: 0.001..0.02 log
    LR_WIDTH_POWER = 0.0
    WARMDOWN = 0.6  # sweep: 0.2..1.0


class CPU(Settings):  # no GPU, or the demo
    N_LAYER = 3
    N_EMBD = 192
    HEAD_DIM = 64
    WINDOW_PATTERN = "SSSL"
    ROPE_BASE = 10_000
    TOKENS_PER_STEP = 2**13
    DEVICE_BATCH_SIZE = 32
    EVAL_BATCH_TOKENS = 2**11
    EMBEDDING_LR = 0.6  # sweep: 0.1..2.0 log
    HEAD_LR = 0.004  # sweep: 0.001..0.02 log
    LR_WIDTH_POWER = -0.5
    WARMDOWN = 0.75  # sweep: 0.2..1.0


SIZES = {"h100": H100, "gpu": GPU, "cpu": CPU}

# -------------------------------------------------------------------------------------- model


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of x (B, T, heads, D); cos and sin (T, 1, D/2).

    Channels d and d + D/2 are one complex number, turned by t * ROPE_BASE^(-2d/D).
    """
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class Linear(nn.Linear):
    """No bias; the weight stays in float32 and is multiplied in the dtype of x."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, hp: type[Settings], window: int, has_values: bool, attend: Callable):
        super().__init__()
        n_kv_head = hp.N_KV_HEAD or hp.N_EMBD // hp.HEAD_DIM
        self.head_dim = hp.HEAD_DIM
        self.window = window  # positions before its own that a position reads
        self.attend = attend
        self.query = Linear(hp.N_EMBD, hp.N_EMBD)
        self.key = Linear(hp.N_EMBD, n_kv_head * hp.HEAD_DIM)
        self.value = Linear(hp.N_EMBD, n_kv_head * hp.HEAD_DIM)
        self.out = Linear(hp.N_EMBD, hp.N_EMBD)
        self.gate = None
        if has_values:
            self.gate = Linear(min(hp.GATE_CHANNELS, hp.N_EMBD), n_kv_head)

    def forward(self, x: Tensor, values: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, T, n_embd); values: the layer's value embedding (B, T, n_kv_head * D), or None."""
        q = self.query(x).unflatten(-1, (-1, self.head_dim))  # (B, T, n_head, D)
        k = self.key(x).unflatten(-1, (-1, self.head_dim))  # (B, T, n_kv_head, D)
        v = self.value(x).unflatten(-1, (-1, self.head_dim))
        if values is not None:  # ResFormer (arXiv 2410.17897)
            values = values.unflatten(-1, (-1, self.head_dim))
            g = 2 * torch.sigmoid(self.gate(x[..., : self.gate.in_features]))  # 1 at the start
            v = v + g[..., None] * values
        q = norm(rotate(q, cos, sin))
        k = norm(rotate(k, cos, sin))
        y = self.attend(q, k, v, self.window)  # (B, T, n_head, D)
        return self.out(y.flatten(2))


class MLP(nn.Module):
    def __init__(self, hp: type[Settings]):
        super().__init__()
        self.up = Linear(hp.N_EMBD, 4 * hp.N_EMBD)
        self.down = Linear(4 * hp.N_EMBD, hp.N_EMBD)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, hp: type[Settings], window: int, has_values: bool, attend: Callable):
        super().__init__()
        # Of each block its own, not rows of one tensor: then equal layers share compiled kernels.
        # 0-dim: a float32 tensor with a dimension would make the stream float32.
        self.residual_scale = nn.Parameter(torch.empty(()))  # a_i
        self.x0_scale = nn.Parameter(torch.empty(()))  # b_i
        self.attention = Attention(hp, window, has_values, attend)
        self.mlp = MLP(hp)

    def forward(
        self, x: Tensor, x0: Tensor, values: Tensor | None, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """x, and x0 at the first layer (B, T, n_embd); values: see Attention."""
        x = self.residual_scale * x + self.x0_scale * x0
        x = x + self.attention(norm(x), values, cos, sin)
        return x + self.mlp(norm(x))


def layer_windows(hp: type[Settings], seq_len: int) -> list[int]:
    """How many positions before its own a layer reads, by its letter in WINDOW_PATTERN."""
    lengths = {"L": seq_len, "S": max(1, int(hp.SHORT_WINDOW * seq_len))}
    letters = [hp.WINDOW_PATTERN[i % len(hp.WINDOW_PATTERN)] for i in range(hp.N_LAYER)]
    letters[-1] = "L"
    return [lengths[letter] for letter in letters]


class GPT(nn.Module):
    """model(inputs) -> logits, float32 (B, T, V).
    model(inputs, targets) -> mean cross-entropy in nats, a scalar.

    inputs and targets: int64 (B, T). attend(q, k, v, window): see kit/attention.py. dtype: of the
    residual stream.
    """

    def __init__(
        self,
        hp: type[Settings],
        vocab_size: int,
        seq_len: int,
        dtype: torch.dtype = torch.float32,
        attend: Callable = attention.blocked_attention,
    ):
        super().__init__()
        n_head = hp.N_EMBD // hp.HEAD_DIM
        n_kv_head = hp.N_KV_HEAD or n_head
        assert hp.N_EMBD % hp.HEAD_DIM == 0, f"N_EMBD {hp.N_EMBD} is no multiple of {hp.HEAD_DIM}"
        assert hp.HEAD_DIM % 2 == 0, f"HEAD_DIM {hp.HEAD_DIM} is odd: channels rotate in pairs"
        assert n_head % n_kv_head == 0, f"N_KV_HEAD {n_kv_head} must divide the {n_head} heads"
        # every second layer has a value embedding, the last always
        has_values = [(hp.N_LAYER - 1 - i) % 2 == 0 for i in range(hp.N_LAYER)]

        self.hp = hp
        self.seq_len = seq_len
        self.dtype = dtype
        self.loss_piece = cross_entropy_piece
        self.embedding = nn.Embedding(vocab_size, hp.N_EMBD)
        self.head = Linear(hp.N_EMBD, vocab_size)
        self.smear_gate = Linear(min(hp.GATE_CHANNELS, hp.N_EMBD), 1)
        self.smear_scale = nn.Parameter(torch.empty(1))
        self.value_embeddings = nn.ModuleDict()
        for i in range(hp.N_LAYER):
            if has_values[i]:
                self.value_embeddings[str(i)] = nn.Embedding(vocab_size, n_kv_head * hp.HEAD_DIM)
        self.blocks = nn.ModuleList()
        for window, values in zip(layer_windows(hp, seq_len), has_values):
            self.blocks.append(Block(hp, window, values, attend))

        frequency = hp.ROPE_BASE ** (-torch.arange(0, hp.HEAD_DIM, 2) / hp.HEAD_DIM)
        angle = torch.arange(seq_len)[:, None] * frequency
        self.register_buffer("cos", angle.cos()[:, None], persistent=False)  # (T, 1, D/2)
        self.register_buffer("sin", angle.sin()[:, None], persistent=False)

    def init_weights(self, generator: torch.Generator | None = None) -> GPT:
        """In place, on the CPU in float32: then a seed gives the same weights for every device."""
        bound = self.hp.INIT_SCALE * math.sqrt(3 / self.hp.N_EMBD)

        def uniform(weight):
            nn.init.uniform_(weight, -bound, bound, generator=generator)

        nn.init.normal_(self.embedding.weight, generator=generator)
        nn.init.normal_(self.head.weight, std=0.001, generator=generator)
        nn.init.zeros_(self.smear_gate.weight)
        nn.init.zeros_(self.smear_scale)
        for embedding in self.value_embeddings.values():
            uniform(embedding.weight)
        for block in self.blocks:
            nn.init.ones_(block.residual_scale)
            nn.init.constant_(block.x0_scale, self.hp.X0_INIT)
            uniform(block.attention.query.weight)
            uniform(block.attention.key.weight)
            uniform(block.attention.value.weight)
            uniform(block.mlp.up.weight)
            nn.init.zeros_(block.attention.out.weight)  # a block adds nothing at the start
            nn.init.zeros_(block.mlp.down.weight)
            if block.attention.gate is not None:
                nn.init.zeros_(block.attention.gate.weight)
        return self

    def compile_parts(self, compile: Callable = warmup.compile):
        """In place, by parts: the loss is a loop over pieces, which compiled whole is unrolled."""
        self.trunk = compile(self.trunk)
        self.logits = compile(self.logits)
        self.loss_piece = warmup.compile(self.loss_piece)  # in autograd.Function, without gradients

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.trunk(inputs)
        if targets is None:
            return self.logits(x)
        return softcap_cross_entropy(
            x.flatten(0, 1), self.head.weight, targets.flatten(), self.hp.SOFTCAP, self.loss_piece
        )

    def trunk(self, inputs: Tensor) -> Tensor:
        """All but the head: (B, T, n_embd)."""
        T = inputs.shape[1]
        cos, sin = self.cos[:T], self.sin[:T]
        x = norm(self.embedding(inputs).to(self.dtype))
        x = x + self.smear(x)
        x0 = x
        for i, block in enumerate(self.blocks):
            values = None
            if str(i) in self.value_embeddings:
                values = self.value_embeddings[str(i)](inputs).to(self.dtype)
            x = block(x, x0, values, cos, sin)
        return norm(x)

    def logits(self, x: Tensor) -> Tensor:
        return softcap(self.head(x), self.hp.SOFTCAP)

    def smear(self, x: Tensor) -> Tensor:
        """Token shift: each position's gated share of the one before. x (B, T, n_embd)."""
        gate = torch.sigmoid(self.smear_gate(x[..., : self.smear_gate.in_features]))  # (B, T, 1)
        previous = F.pad(x, (0, 0, 1, 0))[:, :-1]
        return (self.smear_scale * gate).to(x.dtype) * previous

    def counts(self) -> tuple[int, float]:
        """(parameters, FLOPs a token, forward and backward)."""
        matrices = [p for p in self.blocks.parameters() if p.ndim == 2]
        matrices += [self.head.weight, self.smear_gate.weight]
        multiplied = sum(p.numel() for p in matrices)
        attention_flops = 0
        for block in self.blocks:
            attention_flops += 12 * self.hp.N_EMBD * min(block.attention.window, self.seq_len)
        parameters = sum(p.numel() for p in self.parameters())
        return parameters, 6 * multiplied + attention_flops


def build_model(
    hp: type[Settings], vocab_size: int, seq_len: int, device: torch.device, dtype: torch.dtype
) -> tuple[GPT, Callable]:
    """(the model at its start on the device, its attention function)."""
    attend = attention.choose(device, dtype, seq_len, set(layer_windows(hp, seq_len)))
    model = GPT(hp, vocab_size, seq_len, dtype, attend).init_weights().to(device)
    if device.type == "cuda":
        model.embedding.to(dtype)
        model.value_embeddings.to(dtype)
    return model, attend


# ---------------------------------------------------------------------------------- optimizer
# Another optimizer: a class like AdamW and Muon below, used in param_groups. It has `params`, `lr`
# and `weight_decay`, and `state`, tensors by name that exist from the start.

POLAR_EXPRESS = (  # arXiv 2505.16932, five steps
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(g: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The polar factor, roughly, of each matrix in g (n, rows, columns), by Polar Express.

    dtype: bf16 is enough, but a CPU without it takes ten times as long as in float32.
    """
    tall = g.size(-2) > g.size(-1)
    x = (g.mT if tall else g).to(dtype)
    x = x / (1.02 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        A = x @ x.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # bA + cA^2
        x = torch.baddbmm(x, B, x, beta=a)  # aX + BX
    return x.mT if tall else x


def muon_update(
    p: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    second_momentum: Tensor,
    momentum: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """One Muon step on equal-shaped matrices p (n, rows, columns): returns the new p.

    Nesterov momentum, Polar Express, NorMuon (arXiv 2510.05491), cautious decay. The two buffers
    change in place; second_momentum is (n, rows, 1), or (n, 1, columns) for wide matrices.
    momentum, lr and weight_decay are 0-dim, so that one compiled step serves every value.
    """
    rows, columns = p.shape[-2:]
    grad = grad.float()
    momentum_buffer.lerp_(grad, 1 - momentum)
    g = orthogonalize(grad.lerp(momentum_buffer, momentum), dtype).float()

    mean_square = g.square().mean(dim=-1 if rows >= columns else -2, keepdim=True)
    second_momentum.lerp_(mean_square, 0.05)
    scaled = g * second_momentum.clamp_min(1e-10).rsqrt()
    frobenius = g.norm(dim=(-2, -1), keepdim=True)
    g = scaled * (frobenius / scaled.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))

    lr = lr * max(1, rows / columns) ** 0.5
    return p - lr * (g + weight_decay * p * (g * p >= 0))


def adamw_update(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    betas: tuple[float, float],
    eps: float = 1e-10,
):
    """One AdamW step (arXiv 1711.05101) in place, counted from 1.

    The averages and all arithmetic are float32, whatever p is stored in.
    """
    beta1, beta2 = betas
    grad = grad.float()
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.lerp_(grad.square(), 1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt() + eps
    decayed = p.float() * (1 - lr * weight_decay)
    p.copy_(decayed - lr / (1 - beta1**step) * exp_avg / denominator)


class AdamW:
    """Steps one parameter."""

    def __init__(self, p: nn.Parameter, lr: float, weight_decay: float, betas: tuple[float, float]):
        self.params = [p]
        # Tensors, so that other values compile nothing anew, and of each group its own, so that
        # equal groups share a compiled kernel.
        self.lr = torch.tensor(float(lr), device=p.device)
        self.weight_decay = torch.tensor(float(weight_decay), device=p.device)
        self.betas = betas
        self.state = {
            "exp_avg": torch.zeros(p.shape, device=p.device),
            "exp_avg_sq": torch.zeros(p.shape, device=p.device),
            "step": torch.zeros((), device=p.device),
        }

    def step(self, lr: Tensor, momentum: Tensor, decay_multiplier: Tensor):
        p = self.params[0]
        self.state["step"].add_(1)
        decay = self.weight_decay
        adamw_update(p, p.grad, **self.state, lr=lr, weight_decay=decay, betas=self.betas)


class Muon:
    """Steps matrices of one shape, stacked."""

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float):
        n, (rows, columns), device = len(params), params[0].shape, params[0].device
        second = (n, rows, 1) if rows >= columns else (n, 1, columns)
        self.params = params
        self.lr = torch.tensor(float(lr), device=device)
        self.weight_decay = torch.tensor(float(weight_decay), device=device)
        self.dtype = compute_dtype(device)
        self.state = {
            "momentum_buffer": torch.zeros((n, rows, columns), device=device),
            "second_momentum": torch.zeros(second, device=device),
        }

    def step(self, lr: Tensor, momentum: Tensor, decay_multiplier: Tensor):
        new = muon_update(
            torch.stack(self.params),
            torch.stack([p.grad for p in self.params]),
            **self.state,
            momentum=momentum,
            lr=lr,
            weight_decay=self.weight_decay * decay_multiplier,
            dtype=self.dtype,
        )
        torch._foreach_copy_(self.params, new.unbind())  # one kernel, not one for each


class MuonAdamW:
    """Steps all groups in one compiled call."""

    def __init__(self, groups: list, compiled: bool = True):
        device = groups[0].params[0].device
        self.groups = groups
        self.lr_multiplier = torch.zeros((), device=device)
        self.momentum = torch.zeros((), device=device)
        self.decay_multiplier = torch.zeros((), device=device)
        self.step_groups = warmup.compile(self._step_groups) if compiled else self._step_groups

    def state_tensors(self) -> list[Tensor]:
        return [tensor for group in self.groups for tensor in group.state.values()]

    @torch.no_grad()
    def step(self, lr_multiplier: float, momentum: float, decay_multiplier: float):
        """One step. lr_multiplier is everybody's; momentum and decay_multiplier are Muon's."""
        self.lr_multiplier.fill_(lr_multiplier)  # waits for nothing; a copy from the host would
        self.momentum.fill_(momentum)
        self.decay_multiplier.fill_(decay_multiplier)
        self.step_groups()
        for group in self.groups:
            for p in group.params:
                p.grad = None

    def _step_groups(self):
        for group in self.groups:
            group.step(self.lr_multiplier * group.lr, self.momentum, self.decay_multiplier)


def param_groups(model: GPT) -> list[AdamW | Muon]:
    """Which parameter is stepped how. Each must stand in one group."""
    hp = model.hp
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    value_embeddings = list(model.value_embeddings.parameters())
    residual_scales = [block.residual_scale for block in model.blocks]
    x0_scales = [block.x0_scale for block in model.blocks]
    width_lr = (hp.N_EMBD / 768) ** hp.LR_WIDTH_POWER
    embedding_lr = hp.EMBEDDING_LR * width_lr

    def adamw(params, lr, weight_decay=0.0, beta1=hp.ADAM_BETA1):
        return [AdamW(p, lr, weight_decay, (beta1, hp.ADAM_BETA2)) for p in params]

    def muon(params, lr, weight_decay):
        same_shape = {}
        for p in params:
            same_shape.setdefault(p.shape, []).append(p)
        return [Muon(params, lr, weight_decay) for params in same_shape.values()]

    groups = [
        *adamw([model.embedding.weight], embedding_lr, hp.EMBEDDING_WEIGHT_DECAY),
        *adamw(value_embeddings, embedding_lr, hp.VALUE_EMBEDDING_WEIGHT_DECAY),
        *adamw([model.head.weight], hp.HEAD_LR * width_lr, hp.HEAD_WEIGHT_DECAY),
        *adamw([model.smear_gate.weight], hp.SCALAR_LR * 0.02),
        *adamw([model.smear_scale, *residual_scales], hp.SCALAR_LR * 0.01),
        *adamw(x0_scales, hp.SCALAR_LR, beta1=hp.X0_BETA1),
        *muon(matrices, hp.MUON_LR, hp.MUON_WEIGHT_DECAY),
    ]
    grouped = {id(p) for group in groups for p in group.params}
    missing = [name for name, p in model.named_parameters() if id(p) not in grouped]
    assert not missing, f"no optimizer group has {', '.join(missing)}: add to one in param_groups"
    return groups


def lr_multiplier(hp: type[Settings], progress: float) -> float:
    """1, but rising from 0 over WARMUP and falling to FINAL_LR_FRAC over WARMDOWN."""
    up = progress / hp.WARMUP if progress < hp.WARMUP else 1.0
    left = min(1.0, (1 - progress) / hp.WARMDOWN) if hp.WARMDOWN else 1.0
    return up * (left + (1 - left) * hp.FINAL_LR_FRAC)


def muon_momentum(hp: type[Settings], step: int) -> float:
    low, high = hp.MUON_MOMENTUM_START, hp.MUON_MOMENTUM_END
    return low + (high - low) * min(step / hp.MUON_MOMENTUM_WARMUP, 1)


# ------------------------------------------------------------------------------------ the loop


def forward_backward(model: GPT, inputs: Tensor, targets: Tensor, parts: int) -> Tensor:
    """Adds the gradient of one of the step's equal parts; returns what it adds to the mean loss."""
    loss = model(inputs, targets) / parts
    loss.backward()
    return loss.detach()


def train(
    model: GPT,
    optimizer: MuonAdamW,
    hp: type[Settings],
    loader,
    parts: int,
    budget: float,
    progress: report.Progress,
):
    """Trains until a step as long as a late one would not fit the budget (seconds).

    loader: (inputs, targets, epoch), of which `parts` make a step (gradient accumulation).
    """
    model.train()
    step = 0
    step_seconds = 0.0
    step_ended = clock.elapsed
    while clock.elapsed + step_seconds < budget:
        began = clock.progress
        loss = 0.0
        for _ in range(parts):
            inputs, targets, _ = next(loader)
            loss = loss + forward_backward(model, inputs, targets, parts)
        share = clock.progress
        optimizer.step(lr_multiplier(hp, share), muon_momentum(hp, step), 1 - share)
        step += 1
        progress.add(began, loss)
        now = clock.elapsed
        step_seconds = max(now - step_ended, 0.9 * step_seconds)  # one slow step may come again
        step_ended = now
    progress.close()


def main() -> float:
    """Trains once and scores. Returns the score, which is printed too."""
    # What is trained, and on what.
    device, split = training_device(), split_name()
    check_prepared(split)
    if device.type == "cpu":
        use_one_heap()
    dtype = compute_dtype(device)
    size = SIZE or pick_size(device, manifest()["corpus"])
    hp = SIZES[size]
    T, budget = prepare.MAX_SEQ_LEN, prepare.TIME_BUDGET
    tokenizer = Tokenizer.from_directory()
    vocab_size = tokenizer.get_vocab_size()

    # The model and its optimizer.
    torch.manual_seed(seed())
    torch.set_float32_matmul_precision("high")
    model, attend = build_model(hp, vocab_size, T, device, dtype)
    # In float32 a CPU gains little from compiling all but the training, and starts 20 s later.
    everything = device.type != "cpu" or dtype != torch.float32
    model.compile_parts(warmup.compile if everything else warmup.compile_training)
    optimizer = MuonAdamW(param_groups(model), compiled=everything)
    attention_name, attention_fell_back = attention.describe(attend)
    print(
        f"{device_name(device)}: size {size}, {short(dtype)}, {attention_name} attention, "
        f"{model.counts()[0] / 1e6:.1f} M parameters, {hp.TOKENS_PER_STEP} tokens a step, "
        f"{manifest()['corpus']}, fingerprint {fingerprint()}",
        flush=True,
    )

    # Compile and warm up, off the clock. The loader's watchdog covers that too.
    loader = make_dataloader(tokenizer, hp.DEVICE_BATCH_SIZE, T, "train", device)
    warm = warmup.fit(
        model,
        forward_backward,
        lambda: optimizer.step(lr_multiplier=0.0, momentum=0.0, decay_multiplier=0.0),
        attend,
        restore=optimizer.state_tensors(),
        vocab_size=vocab_size,
        seq_len=T,
        tokens_per_step=hp.TOKENS_PER_STEP,
        device_batch=hp.DEVICE_BATCH_SIZE,
        eval_tokens=hp.EVAL_BATCH_TOKENS,
        eval_rows=manifest()["eval_rows"][split],
        budget=budget,
    )
    if warm.batch != hp.DEVICE_BATCH_SIZE:
        loader = make_dataloader(tokenizer, warm.batch, T, "train", device)
    conditions = {"attention": attention_name, "compiled": warm.compiled, "dtype": short(dtype)}
    fell_back = [reason for reason in (attention_fell_back, warm.fell_back) if reason]
    clock.describe(**conditions, fell_back=fell_back)
    torch.manual_seed(seed())  # the same random numbers in training, however it warmed up

    # Train, on the clock, and score.
    progress = report.Progress(hp.TOKENS_PER_STEP, budget)
    train(model, optimizer, hp, loader, warm.parts, budget, progress)
    bpb = evaluate_bpb(model, tokenizer, warm.eval_batch)
    report.summary(bpb, progress, device, model.counts(), hp.N_LAYER, warm.batch, conditions)
    return bpb


if __name__ == "__main__":
    report.guard(main)
