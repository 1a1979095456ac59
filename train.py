"""
train.py: a GPT, its optimizer and five minutes of training. This is the file to change; everything fixed is in prepare.py.

    uv run train.py                 takes no flags: edit the constants below

Notable, in the order of the rooms:
- three sizes of defaults (H100 class; smaller GPUs; CPU and demo) in one table, picked by the device's peak
- attention: FlashAttention 3, FlexAttention, or plain matrix products cut into blocks, behind one signature
- grouped queries, rotary embedding, query/key norm, sliding windows, value embeddings and the token before by gates, squared ReLU, softcap
- logits and cross-entropy in pieces: no (tokens x vocabulary) array, in either direction
- Muon (Polar Express, NorMuon, cautious decay) for the matrices in the blocks, AdamW for everything else
- compiling and warming up use made-up tokens, off the clock, and leave no trace in weights or optimizer
"""
from __future__ import annotations

import time
_started = time.perf_counter()

import gc, os, signal
if __name__ == "__main__":
    gc.disable()  # looking for cycles costs a second while importing and compiling, and stalls a training step
    os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")
    # the compiler's cache leaves out graphs with a custom backward pass unless told; it knows them by their traced content, so edits count
    os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", "1")
    # Ctrl-C while the imports below take their seconds; run() takes over from here
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"\nFAIL: interrupted: no score\n"), os._exit(1)))
import contextlib, ctypes, math, re, resource, sys, traceback
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from prepare import Stop, Tokenizer, clock, device_name, evaluate_bpb, fail, fingerprint, make_dataloader, manifest, seed, split_name, training_device

# ------------------------------------------------------------------------------------------------------ hyperparameters

SIZES = ("h100", "gpu", "cpu")  # the columns below; a plain value instead of three holds in every size
SIZE = None  # None: cpu without a GPU and for the demo; h100 from 250 dense bf16 TFLOP/s; otherwise gpu. Or name one.

TABLE = dict(
    # model                       h100       gpu        cpu
    DEPTH                     = (9,         5,         5),         # layers
    WIDTH                     = (640,       512,       192),       # of the residual stream
    HEAD_DIM                  = (128,       128,       64),        # heads = WIDTH / HEAD_DIM
    KV_HEADS                  = None,                              # key/value heads; None: as many as heads
    WINDOW_PATTERN            = ("SSSSL",   "S",       "SSSL"),    # repeated over the layers; the last is L in any case
    SHORT_WINDOW              = (1 / 8,     1 / 8,     1 / 8),     # of the sequence; L sees all of it
    ROTARY_BASE               = (200_000,   200_000,   10_000),
    SOFTCAP                   = 15,                                # logits stay within +-15
    X0_START                  = 0.05,                              # b_i: share of the normed embedding mixed in before a layer
    INIT_SCALE                = 0.68,                              # k: matrices start uniform within +-k sqrt(3 / width)
    # batch
    TOKENS_PER_STEP           = (2**18,     2**16,     2**13),
    DEVICE_BATCH_SIZE         = (64,        32,        32),        # rows at a time: a wish, halved while memory runs out
    EVAL_TOKENS_AT_A_TIME     = (2**16,     2**15,     2**11),
    # learning rates and decay
    EMBEDDING_RATE            = (0.9,       0.9,       0.6),
    HEAD_RATE                 = (0.005,     0.005,     0.004),
    RATE_WIDTH_POWER          = (-0.5,      0.0,       -0.5),      # AdamW matrices' rates x (WIDTH / 768) ** this
    MUON_RATE                 = 0.04,
    SCALAR_RATE               = 0.5,
    MUON_DECAY                = 0.2,                               # cautious; falls to 0 over the budget
    HEAD_DECAY                = 0.01,
    EMBEDDING_DECAY           = 0.001,
    VALUE_TABLE_DECAY         = 0.003,
    # schedule, in shares of the budget
    WARM_UP                   = 0.0,
    WARM_DOWN                 = (0.75,      0.6,       0.75),
    FINAL_RATE                = 0.05,                              # share of the rate that is left at the end
    MUON_MOMENTUM             = [0.85, 0.95],                      # start, end; reached after MUON_MOMENTUM_STEPS
    MUON_MOMENTUM_STEPS       = 200,
)

def hyperparameters(size: str, **changes) -> SimpleNamespace:
    """The table's column for a size, every row an attribute; `changes` replace rows (for tests and benches)."""
    if size not in SIZES:
        raise ValueError(f"SIZE {size!r} is none of {', '.join(SIZES)}")
    if unknown := changes.keys() - TABLE:
        raise ValueError(f"no such hyperparameter: {', '.join(sorted(unknown))}")
    rows = {**TABLE, **changes}
    for name, value in rows.items():
        if isinstance(value, tuple):
            if len(value) != len(SIZES):
                raise ValueError(f"{name} {value} must be one value, or one for each of {', '.join(SIZES)}")
            rows[name] = value[SIZES.index(size)]
    return SimpleNamespace(**rows)

# --------------------------------------------------------------------------------------------------------------- device

def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:300]}"

def out_of_memory(error: BaseException) -> bool:
    """Of any device: CPU and MPS raise plain RuntimeErrors, and a compiler wraps what happens while it tunes."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(re.search("out of memory|can't allocate memory", str(error)))

PEAK_TFLOPS = {  # dense bf16, from the vendors' data sheets; the first name found in the device's name counts
    "GB200": 2500, "B200": 2250, "H200": 989.5, "H100 PCIe": 756, "H100": 989.5, "H800": 989.5, "A100": 312, "A800": 312,
    "L40S": 362, "L40": 181, "L4": 121, "A40": 149.7, "A10": 125, "RTX 5090": 209.5, "RTX 4090": 165, "RTX 4080": 97.5,
    "RTX 3090 Ti": 80, "RTX 3090": 71, "RTX 3080": 59.5, "RTX A6000": 154.8, "MI300X": 1307, "MI250X": 383,
}

def peak_tflops(name: str) -> float:
    """Dense bf16 TFLOP/s of a device by its name; 0 where it is not in the table."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name)), 0.0)

def pick_size(device: torch.device, corpus: str) -> str:
    if SIZE is not None:
        return SIZE
    if device.type != "cuda" or corpus == "demo":
        return "cpu"
    return "h100" if peak_tflops(device_name(device)) >= 250 else "gpu"

def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies it fast, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    try:  # Linux: the processor's own words; x86 has avx512_bf16 and amx_bf16, Arm bf16
        flags = set(re.findall(r"^(?:flags|Features)\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)[0].split())
    except (OSError, IndexError):
        flags = set()
    return torch.bfloat16 if device.type == "cpu" and flags & {"avx512_bf16", "amx_bf16", "bf16"} else torch.float32

# ------------------------------------------------------------------------------------------------------------ attention
# attend(q, k, v, window): q (B, T, H, D), k and v (B, T, KV, D), KV dividing H -> (B, T, H, D). Position t reads itself and
# the `window` positions before it, with scale 1 / sqrt(D).

def blocked_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Scaled-dot-product attention by plain matrix products with a mask.

    The queries are cut into blocks no shorter than the window, so each needs only the keys of its own block and the one
    before: with short windows most products are never made. Fused by the compiler, on a CPU with bf16 two to four times as
    fast, forward and backward, as torch's scaled_dot_product_attention (bench/RESULTS.md).
    """
    B, T, H, D = q.shape
    KV, size = k.shape[2], next(n for n in range(min(max(window, 1), T), T + 1) if T % n == 0)
    q = q.view(B, T // size, size, KV, H // KV, D).permute(0, 1, 3, 4, 2, 5).flatten(3, 4)  # (B, blocks, KV, group x size, D)
    k, v = (x.view(B, T // size, size, KV, D).transpose(2, 3) for x in (k, v))  # (B, blocks, KV, size, D)
    row = torch.arange(size, device=q.device)[:, None]
    column = torch.arange(size, device=q.device)
    if size < T:  # the block before stands in front of each
        k, v = (torch.cat([F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], x], dim=3) for x in (k, v))
        column = torch.arange(-size, size, device=q.device)
    visible = (column <= row) & (column >= row - window)
    first = torch.arange(T // size, device=q.device)[:, None, None] == 0  # nothing stands before the first block
    visible = (visible & ~(first & (column < 0)))[None, :, None].repeat(1, 1, 1, H // KV, 1)
    scores = (q @ k.mT).float() * D**-0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).to(v.dtype)
    y = (weights @ v).unflatten(3, (H // KV, size))  # (B, blocks, KV, group, size, D)
    return y.permute(0, 1, 4, 2, 3, 5).reshape(B, T, H, D)

def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    T = q.shape[1]
    distance = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance <= window)).transpose(1, 2)

def flex_attention_for(seq_len: int, windows: set[int], device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    def mask_of(window):
        return create_block_mask(lambda b, h, i, j: (j <= i) & (j >= i - window), None, None, seq_len, seq_len, device=device)
    masks = {window: mask_of(window) for window in windows}
    def attend(q, k, v, window):
        if not torch.compiler.is_compiling():  # uncompiled it is slow at best, and with TORCH_COMPILE_DISABLE=1 it raises
            return sdpa_attention(q, k, v, window)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flex_attention(q, k, v, block_mask=masks[window], enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)
    return attend

FLASH_3 = "kernels-community/flash-attn3"

def load_flash_attention_3():
    """The kernel's flash_attn_func: from the local cache without the network, else from the hub. Raises with the reason."""
    import logging, requests
    from huggingface_hub import constants
    from kernels import get_kernel
    logging.getLogger("kernels").setLevel(logging.ERROR)  # not a warning for every look into the cache
    asked_offline = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = True
        kernel = get_kernel(FLASH_3, version=1)
    except Exception as not_cached:
        if asked_offline:
            raise RuntimeError("not in the local cache, and HF_HUB_OFFLINE is set") from not_cached
        requests.head(constants.ENDPOINT, timeout=3).close()  # a dead hub costs seconds, not minutes of retries
        constants.HF_HUB_OFFLINE = False
        kernel = get_kernel(FLASH_3, version=1)
    finally:
        constants.HF_HUB_OFFLINE = asked_offline
    return kernel.flash_attn_func

def choose_attention(device: torch.device, dtype: torch.dtype, seq_len: int, windows: set[int]):
    """(name, attend): the first that works here. Says in one line why a better one does not."""
    try:
        if device.type != "cuda" or torch.version.hip:
            raise RuntimeError("needs an NVIDIA GPU")
        major, minor = torch.cuda.get_device_capability(device)
        if dtype != torch.bfloat16 or not (major == 8 or (major, minor) == (9, 0)):
            raise RuntimeError(f"needs bf16 and compute capability 8.x or 9.0, this is {str(dtype).removeprefix('torch.')} on {major}.{minor}")
        flash = load_flash_attention_3()
        return "flash3", lambda q, k, v, window: flash(q, k, v, causal=True, window_size=(window, 0))
    except Exception as error:
        reason = first_line(error)
    if device.type == "cuda":
        name, attend = "flex", flex_attention_for(seq_len, windows, device)
    else:
        name, attend = ("blocked", blocked_attention) if device.type == "cpu" else ("sdpa", sdpa_attention)
    print(f"attention: {name}, because FlashAttention 3 is not usable: {reason}", flush=True)
    return name, attend

# ---------------------------------------------------------------------------------------------------------------- model

def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864): channels d and d + D/2 of x (B, T, H, D) are one complex number, turned by t * base^(-2d/D)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)

def tanh(x: Tensor) -> Tensor:
    """By one exponential, which a CPU's vector unit does three times as fast as torch.tanh (bench/RESULTS.md)."""
    return 1 - 2 / (torch.exp(2 * x) + 1)

class Linear(nn.Linear):
    """No bias; the weight stays in float32 and is multiplied in the dtype of x."""
    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

class Attention(nn.Module):
    GATE_CHANNELS = 32

    def __init__(self, width: int, head_dim: int, kv_heads: int, window: int, has_values: bool):
        super().__init__()
        self.head_dim, self.window = head_dim, window
        self.query, self.key, self.value = Linear(width, width), Linear(width, kv_heads * head_dim), Linear(width, kv_heads * head_dim)
        self.out = Linear(width, width)
        self.gate = Linear(min(self.GATE_CHANNELS, width), kv_heads) if has_values else None

    def forward(self, x: Tensor, values: Tensor | None, cos: Tensor, sin: Tensor, attend) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)) for f in (self.query, self.key, self.value))  # (B, T, heads, D)
        if values is not None:  # ResFormer (arXiv 2410.17897): g is 1 at the start, where the gate's weight is 0
            g = 2 * torch.sigmoid(self.gate(x[..., : self.gate.in_features]))  # (B, T, KV)
            v = v + g[..., None] * values.unflatten(-1, (-1, self.head_dim))
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        return self.out(attend(q, k, v, self.window).flatten(2))

class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())

class Block(nn.Module):
    def __init__(self, *attention):
        super().__init__()
        self.attention, self.mlp = Attention(*attention), MLP(attention[0])

    def forward(self, x: Tensor, *context) -> Tensor:
        x = x + self.attention(norm(x), *context)
        return x + self.mlp(norm(x))

class GPT(nn.Module):
    """model(inputs) -> logits, float32 (B, T, V); model(inputs, targets) -> mean cross-entropy in nats, a scalar.

    attend: see the room on attention; blocked_attention until another is set. Raises ValueError for sizes that do not fit.
    """
    def __init__(self, hp: SimpleNamespace, vocab_size: int, seq_len: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        heads, odd = divmod(hp.WIDTH, hp.HEAD_DIM)
        kv_heads = hp.KV_HEADS or heads
        for fits, problem in (
            (hp.DEPTH >= 1, f"DEPTH {hp.DEPTH} must be at least 1"),
            (not (odd or heads % kv_heads or hp.HEAD_DIM % 2),
             f"WIDTH {hp.WIDTH} must be a multiple of HEAD_DIM {hp.HEAD_DIM} (even), and its {heads} heads of KV_HEADS {kv_heads}"),
            (re.fullmatch("[SL]+", hp.WINDOW_PATTERN), f"WINDOW_PATTERN {hp.WINDOW_PATTERN!r} must be letters S and L"),
            (0 < (hp.SOFTCAP or 0) <= 64, f"SOFTCAP {hp.SOFTCAP} must be above 0, and at most 64: the loss takes its exponential in float32"),
        ):
            if not fits:
                raise ValueError(problem)
        pattern = [hp.WINDOW_PATTERN[i % len(hp.WINDOW_PATTERN)] for i in range(hp.DEPTH - 1)] + ["L"]
        windows = [seq_len if letter == "L" else max(1, int(hp.SHORT_WINDOW * seq_len)) for letter in pattern]
        has_values = [i % 2 == (hp.DEPTH - 1) % 2 for i in range(hp.DEPTH)]
        self.hp, self.seq_len, self.dtype, self.attend = hp, seq_len, dtype, blocked_attention
        self.embedding, self.head = nn.Embedding(vocab_size, hp.WIDTH), Linear(hp.WIDTH, vocab_size)
        self.smear, self.smear_scale = Linear(min(Attention.GATE_CHANNELS, hp.WIDTH), 1), nn.Parameter(torch.empty(1))
        self.value_tables = nn.ModuleDict({str(i): nn.Embedding(vocab_size, kv_heads * hp.HEAD_DIM) for i in range(hp.DEPTH) if has_values[i]})
        self.stream_scale, self.x0_scale = nn.Parameter(torch.empty(hp.DEPTH)), nn.Parameter(torch.empty(hp.DEPTH))  # a_i, b_i
        self.blocks = nn.ModuleList(Block(hp.WIDTH, hp.HEAD_DIM, kv_heads, windows[i], has_values[i]) for i in range(hp.DEPTH))
        angle = torch.arange(seq_len)[:, None] * hp.ROTARY_BASE ** (-torch.arange(0, hp.HEAD_DIM, 2) / hp.HEAD_DIM)
        self.register_buffer("cos", angle.cos()[:, None], persistent=False)  # (T, 1, D/2)
        self.register_buffer("sin", angle.sin()[:, None], persistent=False)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> GPT:
        """Initial weights, in place: the same for a seed on every device, while it is still on the CPU in float32."""
        span, draw = self.hp.INIT_SCALE * math.sqrt(3 / self.hp.WIDTH), {"generator": generator}
        starts = {  # by the first pattern that the name matches; a parameter that none matches keeps what its module gave it
            r"embedding\.weight": lambda p: p.normal_(**draw),
            r"head\.weight": lambda p: p.normal_(std=0.001, **draw),
            r".*\.(query|key|value|up)\.weight|value_tables\..*": lambda p: p.uniform_(-span, span, **draw),
            r".*\.(out|down|gate)\.weight|smear.*": lambda p: p.zero_(),  # projections back into the stream; gates
            r"stream_scale": lambda p: p.fill_(1),
            r"x0_scale": lambda p: p.fill_(self.hp.X0_START),
        }
        for name, p in self.named_parameters():
            next((start for pattern, start in starts.items() if re.fullmatch(pattern, name)), lambda p: p)(p)
        return self

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        T = inputs.shape[1]
        cos, sin = self.cos[:T], self.sin[:T]
        x = norm(self.embedding(inputs).to(self.dtype))  # (B, T, width)
        g = self.smear_scale * torch.sigmoid(self.smear(x[..., : self.smear.in_features]))  # (B, T, 1): 0 at the start
        x = x0 = x + g.to(x.dtype) * F.pad(x, (0, 0, 1, 0))[:, :-1]  # a share of the token before: -0.007 bits (bench/RESULTS.md)
        for i, block in enumerate(self.blocks):
            values = self.value_tables[str(i)](inputs).to(self.dtype) if str(i) in self.value_tables else None
            x = block(self.stream_scale[i] * x + self.x0_scale[i] * x0, values, cos, sin, self.attend)
        x = norm(x)
        if targets is not None:
            return SoftcapCrossEntropy.apply(x.flatten(0, 1), self.head.weight, targets.flatten(), self.hp.SOFTCAP)
        return self.hp.SOFTCAP * tanh(self.head(x).float() / self.hp.SOFTCAP)

    def counts(self) -> tuple[int, float]:
        """(parameters, FLOPs a token, forward and backward)."""
        of = lambda *modules: sum(p.numel() for module in modules for p in module.parameters())
        products = 6 * of(self.blocks, self.head, self.smear)
        attention = sum(12 * self.hp.WIDTH * min(block.attention.window, self.seq_len) for block in self.blocks)
        return of(self), products + attention

LOSS_PIECE = {"cpu": 2**22}  # logits at a time: what a CPU's cache holds; elsewhere 2**25

class SoftcapCrossEntropy(torch.autograd.Function):
    """mean over tokens of cross_entropy(cap * tanh(x @ W.T / cap), target), piece by piece, the gradients at once.

    x (N, width), weight (V, width), targets (N,). Only one piece of logits exists at any time, so memory does not grow with
    N x V. The cap bounds the logits, so the softmax needs no maximum subtracted: exp(15) x V is small for float32.
    """
    @staticmethod
    def forward(ctx, x, weight, targets, cap):
        N, V = x.shape[0], weight.shape[0]
        w, ids = weight.to(x.dtype), torch.arange(V, device=x.device)
        loss, dx, dw = x.new_zeros((), dtype=torch.float32), [], torch.zeros_like(w, dtype=torch.float32)
        for piece, target in zip(x.split(n := max(1, LOSS_PIECE.get(x.device.type, 2**25) // V)), targets.split(n)):
            z, target = F.linear(piece, w), target[:, None]
            bounded = tanh(z.float() / cap)
            exp = torch.exp(cap * bounded)
            total = exp.sum(-1, keepdim=True)
            loss = loss + (total.log().sum() - cap * tanh(z.gather(1, target).float() / cap).sum())
            dlogits = ((exp * (1 / (N * total)) - torch.where(target == ids, 1 / N, 0.0)) * (1 - bounded * bounded)).to(x.dtype)
            dx.append(dlogits @ w)
            dw = dw + (dlogits.mT @ piece).float()
        ctx.save_for_backward(torch.cat(dx), dw.to(weight.dtype))
        return loss / N

    @staticmethod
    def backward(ctx, upstream):
        dx, dw = ctx.saved_tensors
        return upstream.to(dx.dtype) * dx, upstream * dw, None, None

# ------------------------------------------------------------------------------------------------------------ optimizer

POLAR_EXPRESS = (  # arXiv 2505.16932, five steps
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

def orthogonalize(g: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly, of each in g (n, rows, columns): the polar factor by Polar Express."""
    tall = g.size(-2) > g.size(-1)
    x = (g.mT if tall else g).to(dtype)
    x = x / (1.02 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        A = x @ x.mT
        x = a * x + (b * A + c * (A @ A)) @ x
    return x.mT if tall else x

def muon_update(p: Tensor, grad: Tensor, buffer: Tensor, second: Tensor, momentum: Tensor, rate: Tensor, decay: Tensor) -> Tensor:
    """One Muon step on equal-shaped matrices p (n, rows, columns): returns the new p; buffer and second change in place.

    Nesterov momentum, Polar Express, NorMuon (arXiv 2510.05491; second: (n, rows, 1), or (n, 1, columns) for wide ones),
    cautious decay. momentum, rate and decay are 0-dim tensors, so that a compiled step serves every value.
    """
    grad = grad.float()
    buffer.lerp_(grad, 1 - momentum)
    g = orthogonalize(grad.lerp(buffer, momentum)).float()
    along = -1 if p.size(-2) >= p.size(-1) else -2
    second.lerp_(g.square().mean(dim=along, keepdim=True), 0.05)
    scaled = g * second.clamp_min(1e-10).rsqrt()
    g = scaled * (g.norm(dim=(-2, -1), keepdim=True) / scaled.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))
    rate = rate * max(1, p.size(-2) / p.size(-1)) ** 0.5
    return p - rate * (g + decay * p * (g * p >= 0))

def adamw_update(p: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: Tensor, rate: Tensor, decay: Tensor, betas, eps: float):
    """One AdamW step (arXiv 1711.05101) in place; the moments and all arithmetic in float32, whatever p is stored in."""
    grad, value = grad.float(), p.float()
    mean.lerp_(grad, 1 - betas[0])
    square.lerp_(grad.square(), 1 - betas[1])
    denominator = (square / (1 - betas[1] ** step)).sqrt() + eps
    p.copy_(value * (1 - rate * decay) - rate / (1 - betas[0] ** step) * mean / denominator)

class Optimizer:
    """Steps groups of parameters by Muon or AdamW. A group: kind, params, rate and decay (both read once, here), and for AdamW betas.

    `multiplier` scales all rates; `momentum` and `decay_share` are Muon's. State: tensors only, made at once, so that
    `state_tensors` can be saved and put back.
    """
    EPS = 1e-10

    def __init__(self, groups: list[dict], compiled: bool = True):
        self.groups = groups
        self.batches = []  # (group, parameters stepped together, their state)
        for group in groups:
            if group["kind"] not in ("muon", "adamw"):
                raise ValueError(f"kind {group['kind']!r} of an optimizer group is neither muon nor adamw")
            stacks = {}
            for p in group["params"]:
                stacks.setdefault(p.shape if group["kind"] == "muon" else id(p), []).append(p)
            for params in stacks.values():
                shapes = params[0].shape, params[0].shape, ()
                if group["kind"] == "muon":
                    n, (rows, columns) = len(params), params[0].shape
                    shapes = (n, rows, columns), (n, rows, 1) if rows >= columns else (n, 1, columns)
                self.batches.append((group, params, [torch.zeros(shape, device=params[0].device) for shape in shapes]))
        device = groups[0]["params"][0].device  # what changes is in tensors: other values compile nothing anew
        self.constants = torch.tensor([(group["rate"], group["decay"]) for group, _, _ in self.batches], device=device)
        self.schedule = [torch.zeros((), device=device) for _ in range(3)]  # multiplier, momentum, decay_share
        self.apply = torch.compile(self._apply, dynamic=False) if compiled else self._apply

    def state_tensors(self) -> list[Tensor]:
        return [tensor for _, _, state in self.batches for tensor in state]

    @torch.no_grad()
    def step(self, multiplier: float, momentum: float, decay_share: float):
        for tensor, value in zip(self.schedule, (multiplier, momentum, decay_share)):
            tensor.fill_(value)  # waits for nothing, which a copy from the host would
        self.apply()
        for p in (p for group in self.groups for p in group["params"]):
            p.grad = None

    def _apply(self):
        multiplier, momentum, decay_share = self.schedule
        for (group, params, state), (rate, decay) in zip(self.batches, self.constants):
            rate = multiplier * rate
            if group["kind"] == "muon":
                new = muon_update(torch.stack(params), torch.stack([p.grad for p in params]), *state, momentum, rate, decay * decay_share)
                for p, value in zip(params, new):
                    p.copy_(value)
            else:
                state[2].add_(1)
                adamw_update(params[0], params[0].grad, *state, rate, decay, group["betas"], self.EPS)

def parameter_groups(model: GPT) -> list[dict]:
    """Which parameter is stepped how: the first pattern its name matches. Raises ValueError naming one that none matches."""
    hp, betas = model.hp, (0.8, 0.95)
    scale = (hp.WIDTH / 768) ** hp.RATE_WIDTH_POWER
    rules = [
        (r"embedding\.weight", dict(kind="adamw", rate=hp.EMBEDDING_RATE * scale, decay=hp.EMBEDDING_DECAY, betas=betas)),
        (r"value_tables\..*", dict(kind="adamw", rate=hp.EMBEDDING_RATE * scale, decay=hp.VALUE_TABLE_DECAY, betas=betas)),
        (r"head\.weight", dict(kind="adamw", rate=hp.HEAD_RATE * scale, decay=hp.HEAD_DECAY, betas=betas)),
        (r"smear\.weight", dict(kind="adamw", rate=hp.SCALAR_RATE * 0.02, decay=0.0, betas=betas)),
        (r"smear_scale|stream_scale", dict(kind="adamw", rate=hp.SCALAR_RATE * 0.01, decay=0.0, betas=betas)),
        (r"x0_scale", dict(kind="adamw", rate=hp.SCALAR_RATE, decay=0.0, betas=(0.96, 0.95))),
        (r"blocks\..*\.weight", dict(kind="muon", rate=hp.MUON_RATE, decay=hp.MUON_DECAY)),
    ]
    groups = [dict(rule, params=[]) for _, rule in rules]
    for name, p in model.named_parameters():
        match = next((i for i, (pattern, _) in enumerate(rules) if re.fullmatch(pattern, name)), None)
        if match is None or groups[match]["kind"] == "muon" and p.ndim != 2:
            raise ValueError(f"parameter {name} {tuple(p.shape)} has no optimizer group: add a rule in parameter_groups (muon takes matrices only)")
        groups[match]["params"].append(p)
    return [group for group in groups if group["params"]]

def rate_multiplier(hp: SimpleNamespace, progress: float) -> float:
    """1, but rising from 0 over WARM_UP and falling to FINAL_RATE over WARM_DOWN."""
    up = progress / hp.WARM_UP if progress < hp.WARM_UP else 1.0
    left = min(1.0, (1 - progress) / hp.WARM_DOWN) if hp.WARM_DOWN else 1.0
    return up * (left + (1 - left) * hp.FINAL_RATE)

def muon_momentum(hp: SimpleNamespace, step: int) -> float:
    low, high = hp.MUON_MOMENTUM
    return low + (high - low) * min(step / hp.MUON_MOMENTUM_STEPS, 1)

# ------------------------------------------------------------------------------------------------------------- the loop

def rows_at_a_time(tokens_per_step: int, seq_len: int, wish: int) -> int:
    """The device batch: the wish, or all the rows of a step where those are fewer. Raises Stop where they do not divide."""
    rows, rest = divmod(tokens_per_step, seq_len)
    if rest or rows < 1:
        near = [n * seq_len for n in (rows, rows + 1) if n > 0]
        raise Stop(f"TOKENS_PER_STEP {tokens_per_step} must be a whole number of rows of {seq_len} tokens, such as {' or '.join(map(str, near))}")
    if wish < 1 or rows % min(wish, rows):
        near = sorted((n for n in range(1, rows + 1) if rows % n == 0), key=lambda n: (abs(n - wish), n))[:2]
        raise Stop(f"DEVICE_BATCH_SIZE {wish} does not divide the {rows} rows of TOKENS_PER_STEP {tokens_per_step}: the nearest that do are "
                   + " and ".join(map(str, sorted(near))))
    return min(wish, rows)

def warm_up(model: GPT, compiled, optimizer: Optimizer, rows: int, device_batch: int, eval_batch: int) -> tuple[int, int]:
    """Compiles and runs everything on made-up tokens, then puts weights and optimizer back. Returns the two batches that fit.

    Out of memory: the next smaller batch that divides the rows of a step. What does not compile runs uncompiled.
    """
    device, vocab_size = model.cos.device, model.embedding.num_embeddings
    tensors = [*model.parameters(), *model.buffers(), *optimizer.state_tensors()]
    saved, generator = [tensor.detach().clone() for tensor in tensors], torch.Generator().manual_seed(0)
    made_up = lambda batch: torch.randint(vocab_size, (batch, model.seq_len), generator=generator).to(device)

    def training(batch):
        compiled.train()
        for _ in range(2):  # the second finds everything compiled and all memory allocated
            for _ in range(min(2, rows // batch)):  # gradients to add to take memory of their own
                compiled(made_up(batch), made_up(batch)).backward()
            if idle := [name for name, p in model.named_parameters() if p.grad is None]:
                raise Stop(f"no gradient reaches {', '.join(idle)}: use it in forward or remove it")
            optimizer.step(0.0, 0.0, 0.0)

    def scoring(batch):
        compiled.eval()
        with torch.no_grad():
            compiled(made_up(batch))

    fitting, eager = [], False
    for work, batch, whole in (training, device_batch, rows), (scoring, eval_batch, eval_batch):
        while True:
            try:
                work(batch)
                break
            except Exception as error:
                if out_of_memory(error):
                    if batch == 1:
                        fail("out of memory with a single row at a time: lower DEPTH or WIDTH")
                    smaller = next(n for n in range(batch // 2, 0, -1) if whole % n == 0)
                    print(f"out of memory {work.__name__} {batch} rows at a time: trying {smaller}, the tokens a step stay the same", flush=True)
                    batch = smaller
                elif eager:
                    raise
                else:
                    print(f"not compiled, because compiling failed: {first_line(error)}", flush=True)
                    torch.compiler.set_stance("force_eager")
                    eager = True
            model.zero_grad(set_to_none=True)
            gc.collect()  # only here, where the error's frames hold no tensor any more
            torch.cuda.empty_cache()
        fitting.append(batch)
    compiled.train()
    with torch.no_grad():
        for tensor, value in zip(tensors, saved):
            tensor.copy_(value)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of the attempts and the copies
    return tuple(fitting)

class Reporter:
    """Progress: one line rewritten in place on a terminal, a plain line about every 5% of the budget otherwise."""
    def __init__(self, tokens_per_step: int):
        self.tokens_per_step, self.terminal, self.next = tokens_per_step, sys.stdout.isatty(), 0.0

    def step(self, step: int, progress: float, loss: float, seconds: float):
        if self.terminal or progress >= self.next:
            self.next = progress + 0.05
            line = f"{progress:6.1%}  step {step:5}  loss {loss:.4f}  {self.tokens_per_step / seconds:9,.0f} tokens/s"
            print(f"\r{line}\033[K" if self.terminal else line, end="" if self.terminal else "\n", flush=True)

def use_one_heap():
    """Lets glibc keep freed memory instead of giving it back: mapping it afresh costs a CPU run half its speed (bench/RESULTS.md)."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            for option, value in ((-8, 1), (-4, 0), (-1, -1)):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD: see mallopt(3)
                libc.mallopt(option, value)

def main():
    from prepare import MAX_SEQ_LEN, TIME_BUDGET
    laps = [("imports", _started, time.perf_counter())]
    lap = lambda name: laps.append((name, laps[-1][2], time.perf_counter()))
    device, split = training_device(), split_name()
    if device.type == "cpu":
        use_one_heap()
    dtype, hp = compute_dtype(device), hyperparameters(size := pick_size(device, manifest()["corpus"]))
    device_batch = rows_at_a_time(hp.TOKENS_PER_STEP, MAX_SEQ_LEN, hp.DEVICE_BATCH_SIZE)
    rows, eval_batch = hp.TOKENS_PER_STEP // MAX_SEQ_LEN, max(1, hp.EVAL_TOKENS_AT_A_TIME // MAX_SEQ_LEN)
    tokenizer = Tokenizer.from_directory()

    torch.manual_seed(seed())
    torch.set_float32_matmul_precision("high")
    model = GPT(hp, tokenizer.get_vocab_size(), MAX_SEQ_LEN, dtype).initialize().to(device)
    if device.type == "cuda":
        for table in (model.embedding, *model.value_tables.values()):
            table.to(dtype)
    attention, model.attend = choose_attention(device, dtype, MAX_SEQ_LEN, {block.attention.window for block in model.blocks})
    optimizer = Optimizer(parameter_groups(model))
    compiled = torch.compile(model, dynamic=False)
    parameters, flops = model.counts()
    peak = peak_tflops(device_name(device))
    print(f"{device_name(device)}: size {size}, {str(dtype).removeprefix('torch.')}, {attention} attention, {parameters / 1e6:.1f} M parameters, "
          f"{hp.TOKENS_PER_STEP} tokens a step, fingerprint {fingerprint()}", flush=True)
    if not peak:
        print("mfu_percent will be 0: the peak of this device is not in PEAK_TFLOPS", flush=True)
    lap("model")
    loader = make_dataloader(tokenizer, device_batch, MAX_SEQ_LEN, "train", device)  # now: its watchdog covers compiling too
    wish, (device_batch, eval_batch) = device_batch, warm_up(model, compiled, optimizer, rows, device_batch, eval_batch)
    torch.manual_seed(seed())  # again: whatever draws in training, dropout say, draws as if nothing had warmed up
    if device_batch != wish:
        loader = make_dataloader(tokenizer, device_batch, MAX_SEQ_LEN, "train", device)
    lap("compiling and warm-up")
    print("start-up: " + ", ".join(f"{name} {end - begin:.1f} s" for name, begin, end in laps), flush=True)

    reporter, step, smooth, curve, unread = Reporter(hp.TOKENS_PER_STEP), 0, 0.0, [], None
    def read(loss):  # of the step before: waiting for the current one would leave a GPU idle
        nonlocal smooth
        if not (value := loss.item()) <= 100:  # also where it is NaN
            fail(f"loss diverged at step {step}: it is {value}. Lower the rates or undo the last change")
        smooth = value if step == 1 else 0.9 * smooth + 0.1 * value
    began, seconds = time.perf_counter(), 0.0
    while clock.elapsed + seconds < TIME_BUDGET:
        total = 0.0
        for _ in range(rows // device_batch):
            inputs, targets, _ = next(loader)
            loss = compiled(inputs, targets) * (device_batch / rows)
            loss.backward()
            total = total + loss.detach()
        progress = clock.progress
        optimizer.step(rate_multiplier(hp, progress), muon_momentum(hp, step), 1 - progress)
        if unread is not None:
            read(unread)
            reporter.step(step, progress, smooth, seconds)
            curve += [smooth] * (min(9, int(progress * 10)) - len(curve))
        unread, step = total, step + 1
        seconds, began = time.perf_counter() - began, time.perf_counter()
    read(unread)
    curve += [smooth] * (10 - len(curve))
    print("\r\033[K" if reporter.terminal else "", end="", flush=True)
    print(f"scoring after {step} steps", flush=True)
    began = time.perf_counter()
    bpb = evaluate_bpb(compiled, tokenizer, eval_batch)
    print(f"scored in {time.perf_counter() - began:.1f} s", flush=True)

    if device.type == "cuda":
        peak_mb = torch.cuda.max_memory_allocated() / 2**20
    else:  # no memory of its own: the process's
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    tokens = step * hp.TOKENS_PER_STEP
    summary = {
        f"{split}_bpb": f"{bpb:.6f}", "training_seconds": f"{clock.elapsed:.1f}", "total_seconds": f"{time.perf_counter() - _started:.1f}",
        "peak_vram_mb": f"{peak_mb:.1f}", "mfu_percent": f"{100 * flops * tokens / clock.elapsed / peak / 1e12 if peak else 0:.2f}",
        "total_tokens_M": f"{tokens / 1e6:.1f}", "num_steps": step, "num_params_M": f"{parameters / 1e6:.1f}", "depth": hp.DEPTH,
        "device": device_name(device), "attention": attention, "device_batch_size": device_batch, "seed": seed(),
        "fingerprint": fingerprint(), "loss_curve": " ".join(f"{loss:.3f}" for loss in curve),
    }
    print("---\n" + "\n".join(f"{key}: {value}" for key, value in summary.items()), flush=True)

def run() -> int:
    """main() with every failure as one `FAIL: ` line, the last of the log. Returns the exit code."""
    try:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            main()
        except KeyboardInterrupt:
            fail("interrupted: no score")
        except Exception as error:
            if out_of_memory(error):
                fail("out of memory while training: lower DEVICE_BATCH_SIZE (the tokens a step can stay), DEPTH or WIDTH")
            traceback.print_exc()
            text = first_line(error)
            lost = isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in text
            fail(f"the device failed ({text}): look at nvidia-smi, then run again" if lost else f"{text} (the traceback is above)")
    except Stop as stop:
        print(end="\n" if sys.stdout.isatty() else "", flush=True)  # below the progress
        print(stop, file=sys.stderr, flush=True)
        return 1
    return 0

if __name__ == "__main__":
    code = run()
    sys.stdout.flush()
    os._exit(code)  # the interpreter's own way out takes a second and may hang
