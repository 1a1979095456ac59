"""
train.py: a GPT, its optimizer and five minutes of training. This is the file to change.

    uv run train.py        it takes no flags: edit the table of hyperparameters below

The rule: all that a run knows comes from its own `train` batches, drawn while the clock runs.
No weights or statistics from disk, the network or an earlier run; no loader of another split;
no state kept and nothing learned while it is scored; no helper files. prepare.py stays as it is.

Notable, in the order of the rooms:
- three sizes of defaults (H100 class; smaller GPUs; CPU and demo), picked by the device
- attention: FlashAttention 3, FlexAttention, or plain matrix products, behind one signature
- model: grouped queries, rotary embedding, query/key norm, sliding windows, value embeddings,
  a gate to the token before, squared ReLU, softcap
- loss: logits and cross-entropy in pieces, never a (tokens x vocabulary) array
- optimizer: Muon (Polar Express, NorMuon, cautious decay) for matrices, AdamW for the rest
- loop: compiling and warming up use made-up tokens, off the clock, and leave no trace
"""

# ruff: noqa: E402  (the first lines act before the imports, which take seconds)
from __future__ import annotations

import time

STARTED = time.perf_counter()

import atexit
import gc
import os
import signal
import sys


def end_at_once(*_):
    os.write(2, b"\nFAIL: interrupted: no score\n")
    os._exit(1)


def end_unfinished():
    """Where the last line of this file is never reached: an error or an exit while it is read."""
    error = getattr(sys, "last_value", None)
    what = "train.py ended before run()" if error is None else f"{type(error).__name__}: {error}"
    sys.stdout.flush()
    print(f"FAIL: {' '.join(what.split())}: no score", file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(
            "FAIL: train.py takes no options: its settings are the table in it, and a run's seconds "
            "are what `uv run prepare.py ... --time-budget N` prepared"
        )
    atexit.register(end_unfinished)
    # Looking for cycles costs a second while importing and compiling, and stalls a training step.
    gc.disable()
    os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")
    # Triton's default changes with its version; said, it also warns of nothing.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    # Ctrl-C during the imports; run() takes over from here.
    signal.signal(signal.SIGINT, end_at_once)

import contextlib
import ctypes
import json
import logging
import math
import re
import resource
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from prepare import (
    Stop,
    Tokenizer,
    check_prepared,
    clock,
    describe_run,
    device_name,
    driver_version,
    evaluate_bpb,
    fail,
    fingerprint,
    make_dataloader,
    manifest,
    seed,
    split_name,
    training_device,
)

# ----------------------------------------------------------------------------- hyperparameters

SIZES = ("h100", "gpu", "cpu")  # the table's columns; a plain value holds in every size
# None: cpu without a GPU and for the demo, h100 on a data centre's card of 40 GB or more, else gpu.
SIZE = None

# fmt: off
TABLE = dict(
    # model                         h100      gpu       cpu
    N_LAYER                      = (9,        5,        3),
    N_EMBD                       = (640,      512,      192),      # width of the residual stream
    HEAD_DIM                     = (128,      128,      64),       # n_head = N_EMBD / HEAD_DIM
    N_KV_HEAD                    = None,                           # key/value heads; None: n_head
    WINDOW_PATTERN               = ("SSSSL",  "S",      "SSSL"),   # repeated; the last layer is always L
    SHORT_WINDOW                 = (1 / 8,    1 / 8,    1 / 8),    # S: of the sequence; L sees it all
    ROPE_BASE                    = (200_000,  200_000,  10_000),
    SOFTCAP                      = 15,                             # logits stay within +-15
    X0_INIT                      = 0.05,                           # b_i: x0's share in a layer's input
    INIT_SCALE                   = 0.68,                           # k: uniform within +-k sqrt(3 / N_EMBD)
    # batch
    TOKENS_PER_STEP              = (2**18,    2**16,    2**13),
    DEVICE_BATCH_SIZE            = (64,       32,       32),       # rows at a time, if memory allows
    EVAL_BATCH_TOKENS            = (2**16,    2**15,    2**11),
    # learning rates and weight decay
    EMBEDDING_LR                 = (0.9,      0.9,      0.6),      # of the value embeddings too
    HEAD_LR                      = (0.005,    0.005,    0.004),
    LR_WIDTH_POWER               = (-0.5,     0.0,      -0.5),     # both x (N_EMBD / 768) ** this
    MUON_LR                      = 0.04,
    SCALAR_LR                    = 0.5,
    MUON_WEIGHT_DECAY            = 0.2,                            # cautious; falls to 0 over the budget
    HEAD_WEIGHT_DECAY            = 0.01,
    EMBEDDING_WEIGHT_DECAY       = 0.001,
    VALUE_EMBEDDING_WEIGHT_DECAY = 0.003,
    # schedule, in shares of the budget
    WARMUP                       = 0.0,
    WARMDOWN                     = (0.75,     0.6,      0.75),
    FINAL_LR_FRAC                = 0.05,                           # of the learning rate, left at the end
    MUON_MOMENTUM                = [0.85, 0.95],                   # start, end; a tuple would be per size
    MUON_MOMENTUM_WARMUP         = 200,                            # steps from start to end
)
# fmt: on


def hyperparameters(size: str, **changes) -> SimpleNamespace:
    """The table's column for a size, each row an attribute; `changes` replace rows.

    Raises ValueError for an unknown size or row, or a row with another number of columns.
    """
    if size not in SIZES:
        raise ValueError(f"SIZE {size!r} is none of {', '.join(SIZES)}")
    unknown = changes.keys() - TABLE
    if unknown:
        raise ValueError(f"no such hyperparameter: {', '.join(sorted(unknown))}")
    column = {}
    for name, value in {**TABLE, **changes}.items():
        if not isinstance(value, tuple):
            column[name] = value
        elif len(value) == len(SIZES):
            column[name] = value[SIZES.index(size)]
        else:
            each = ", ".join(SIZES)
            raise ValueError(f"{name} {value} must be one value, or one for each of {each}")
    return SimpleNamespace(**column)


# -------------------------------------------------------------------------------------- device

# Dense bf16 with float32 sums, from the vendors' data sheets; the longest name found in the
# device's name counts.
# fmt: off
PEAK_TFLOPS = {
    "GB300": 2500, "GB200": 2500, "B300": 2250, "B200": 2250,
    "GH200": 989.5, "H200 NVL": 835.5, "H200": 989.5, "H100 NVL": 835.5, "H100 PCIe": 756, "H100": 989.5,
    "H800": 989.5, "H20": 148, "A100": 312, "A800": 312, "A30": 165, "A40": 149.7, "A10": 125, "A10G": 70,
    "L40S": 362, "L40": 181, "L20": 119.5, "L4": 121,
    "RTX PRO 6000": 503.8, "RTX 6000 Ada": 364.2, "RTX 5000 Ada": 261.1,
    "RTX A6000": 154.8, "RTX A5000": 111.1,
    "RTX 5090": 209.5, "RTX 5080": 112.6, "RTX 5070 Ti": 87.9, "RTX 5070": 61.7,
    "RTX 4090": 165, "RTX 4080 SUPER": 104.4, "RTX 4080": 97.5, "RTX 4070 Ti SUPER": 88.2,
    "RTX 4070 Ti": 80.2, "RTX 4070 SUPER": 71, "RTX 4070": 58.3, "RTX 4060 Ti": 44.1, "RTX 4060": 30.2,
    "RTX 3090 Ti": 80, "RTX 3090": 71, "RTX 3080 Ti": 68.2, "RTX 3080": 59.5, "RTX 3070": 40.6,
    "RTX 3060": 25.5,
    "MI355X": 2516.6, "MI350X": 2306.9, "MI325X": 1307, "MI300X": 1307, "MI250X": 383, "MI210": 181,
}
# fmt: on


def peak_tflops(name: str) -> float:
    """Dense bf16 TFLOP/s of a device by its name; 0 where it is not in the table.

    Also 0 for the laptop part of a name (another chip, at the power its maker allows it) and for
    a MIG slice of a device.
    """
    if re.search(r"\b(Laptop|Mobile|Max-Q|MIG)\b", name):
        return 0.0
    found = [part for part in PEAK_TFLOPS if re.search(rf"\b{part}\b", name)]
    return PEAK_TFLOPS[max(found, key=len)] if found else 0.0


def pick_size(device: torch.device, corpus: str) -> str:
    """h100 on a data centre's card with the memory for it, whatever its name; see TABLE."""
    if SIZE is not None:
        return SIZE
    if device.type != "cuda" or corpus == "demo":
        return "cpu"
    card = torch.cuda.get_device_properties(device)
    capability = (card.major, card.minor)
    # 8.6 is the desktop's Ampere, also where it has 48 GB. ROCm counts otherwise: memory decides.
    fast = torch.version.hip or capability == (8, 0) or capability >= (8, 9)
    return "h100" if fast and card.total_memory >= 38 * 2**30 else "gpu"


def cpu_flags() -> set[str]:
    """What the processor says it can do; empty where it does not say (anything but Linux)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    line = re.search(r"^(?:flags|Features)\s*: (.*)", text, re.M)
    return set(line[1].split()) if line else set()


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies it fast, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        fast = bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})  # x86, x86, Arm
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["-"]
    return f"{type(error).__name__}: {lines[0][:300]}"


def cause(error: BaseException) -> str:
    """One line of what lies below the errors that a compiler wraps around it."""
    while inner := getattr(error, "inner_exception", None) or error.__cause__:
        error = inner
    if "Traceback (most recent call last)" in str(error):  # of a worker process
        return str(error).strip().splitlines()[-1][:300]
    return first_line(error)


def out_of_memory(error: BaseException) -> bool:
    """Of any device: CPU and MPS raise plain RuntimeErrors, and a compiler wraps what it meets."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return bool(re.search("out of memory|can't allocate memory", str(error)))


def out_of_shared_memory(error: BaseException) -> bool:
    """Triton's OutOfResources: one block of a kernel needs more than a multiprocessor has."""
    return "out of resource" in f"{error} {cause(error)}"


def use_one_heap():
    """Lets glibc keep freed memory: mapping it afresh halves a CPU run's speed (RESULTS.md)."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt  # see mallopt(3)
        mallopt(-8, 1)  # M_ARENA_MAX
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD


def peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, else KiB
    return resident / 2**20 if sys.platform == "darwin" else resident / 2**10


# ----------------------------------------------------------------------------------- attention
# All have one signature, attend(q, k, v, window) -> (B, T, n_head, D): q (B, T, n_head, D), k and
# v (B, T, n_kv_head, D), n_kv_head dividing n_head. Position t reads itself and the `window`
# positions before it, with scale 1 / sqrt(D).


def block_length(seq_len: int, window: int) -> int:
    """The smallest divisor of seq_len that is no shorter than the window."""
    length = min(max(window, 1), seq_len)
    while seq_len % length:
        length += 1
    return length


def with_block_before(x: Tensor) -> Tensor:
    """x (B, blocks, n_kv_head, size, D) -> (B, blocks, n_kv_head, 2 * size, D)."""
    before = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
    return torch.cat([before, x], dim=3)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Scaled-dot-product attention by plain matrix products with a mask.

    The queries are cut into blocks no shorter than the window, so each needs only the keys of its
    own block and the one before: with short windows most products are never made. Fused by the
    compiler, on a CPU with bf16 two to four times as fast, forward and backward, as torch's
    scaled_dot_product_attention (bench/RESULTS.md).
    """
    B, T, n_head, D = q.shape
    n_kv_head = k.shape[2]
    group = n_head // n_kv_head  # query heads that share a key/value head
    size = block_length(T, window)
    blocks = T // size

    q = q.view(B, blocks, size, n_kv_head, group, D).permute(0, 1, 3, 4, 2, 5)
    q = q.flatten(3, 4)  # (B, blocks, n_kv_head, group * size, D)
    k = k.view(B, blocks, size, n_kv_head, D).transpose(2, 3)  # (B, blocks, n_kv_head, size, D)
    v = v.view(B, blocks, size, n_kv_head, D).transpose(2, 3)

    row = torch.arange(size, device=q.device)[:, None]
    column = torch.arange(size, device=q.device)
    if blocks > 1:
        k, v = with_block_before(k), with_block_before(v)
        column = torch.arange(-size, size, device=q.device)
    visible = (column <= row) & (column >= row - window)
    first = torch.arange(blocks, device=q.device)[:, None, None] == 0
    visible = visible & ~(first & (column < 0))  # nothing stands before the first block
    visible = visible[None, :, None].repeat(1, 1, 1, group, 1)

    scores = (q @ k.mT).float() * D**-0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).to(v.dtype)
    y = (weights @ v).unflatten(3, (group, size))  # (B, blocks, n_kv_head, group, size, D)
    return y.permute(0, 1, 4, 2, 3, 5).reshape(B, T, n_head, D)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    T = q.shape[1]
    position = torch.arange(T, device=q.device)
    distance = position[:, None] - position
    visible = (distance >= 0) & (distance <= window)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2)


class FlexAttention:
    """`attend` by FlexAttention, for the given windows."""

    # A third of the shared memory that the compiler's own choice takes, for cards with less of it.
    SMALL_BLOCKS = {
        "fwd_BLOCK_M": 64,
        "fwd_BLOCK_N": 32,
        "bwd_BLOCK_M1": 32,
        "bwd_BLOCK_N1": 32,
        "bwd_BLOCK_M2": 32,
        "bwd_BLOCK_N2": 32,
        "num_stages": 1,
    }

    def __init__(self, seq_len: int, windows: set[int], device: torch.device):
        from torch.nn.attention.flex_attention import create_block_mask

        def block_mask(window):
            def visible(b, h, i, j):
                return (j <= i) & (j >= i - window)

            return create_block_mask(visible, None, None, seq_len, seq_len, device=device)

        self.masks = {window: block_mask(window) for window in windows}
        self.kernel_options = None  # the compiler's choice

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        if not torch.compiler.is_compiling():  # uncompiled it is slow at best, or raises
            return sdpa_attention(q, k, v, window)
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = flex_attention(
            q,
            k,
            v,
            block_mask=self.masks[window],
            enable_gqa=q.shape[1] != k.shape[1],
            kernel_options=self.kernel_options,
        )
        return y.transpose(1, 2)


FLASH_3 = "kernels-community/flash-attn3"
FLASH_3_VERSION = 1


def cached_flash_attention_3() -> Path:
    """The newest snapshot of the kernel in the hub's cache. Raises FileNotFoundError.

    get_kernel itself, told to stay offline, finds none: it asks for the branch v1, and a download
    leaves only its commit behind. The version stands in the kernel's own metadata, if at all.
    """
    from huggingface_hub import constants

    cache = Path(os.environ.get("KERNELS_CACHE") or constants.HF_HUB_CACHE)
    snapshots = cache / f"kernels--{FLASH_3.replace('/', '--')}" / "snapshots"
    found = []
    for path in snapshots.glob("*/build/*/metadata.json"):
        version = json.loads(path.read_text()).get("version", FLASH_3_VERSION)
        if version == FLASH_3_VERSION:
            found.append(path.parents[2])
    if not found:
        raise FileNotFoundError(f"{FLASH_3} version {FLASH_3_VERSION} is not in the local cache")
    return max(found, key=lambda snapshot: snapshot.stat().st_mtime)


def load_flash_attention_3() -> Callable:
    """The kernel's flash_attn_func: downloaded once, later loaded without any request.

    Raises with the reason. $LOCAL_KERNELS, where it names the kernel, comes before the cache.
    """
    import requests
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars
    from kernels import get_kernel, get_local_kernel

    disable_progress_bars()
    for library in ("kernels", "huggingface_hub", "httpx"):
        logging.getLogger(library).setLevel(logging.ERROR)

    if FLASH_3 in os.environ.get("LOCAL_KERNELS", ""):
        return get_kernel(FLASH_3, version=FLASH_3_VERSION).flash_attn_func
    try:
        return get_local_kernel(cached_flash_attention_3()).flash_attn_func
    except Exception as error:  # not there, cut off while downloading, or built for another torch
        if constants.HF_HUB_OFFLINE:
            raise RuntimeError(f"HF_HUB_OFFLINE is set, and {error}") from error
        reason = first_line(error)
    requests.head(constants.ENDPOINT, timeout=3).close()  # a dead hub costs seconds, not minutes
    print(f"attention: downloading FlashAttention 3 ({reason})", flush=True)
    return get_kernel(FLASH_3, version=FLASH_3_VERSION).flash_attn_func


def flash_attention_3(flash_attn_func: Callable) -> Callable:
    """`attend` by the kernel's function."""

    def attend(q, k, v, window):
        return flash_attn_func(q, k, v, causal=True, window_size=(window, 0))

    return attend


def why_not_flash_attention_3(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" or torch.version.hip:
        return "needs an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    supported = major == 8 or (major, minor) == (9, 0)
    if dtype != torch.bfloat16 or not supported:
        this = f"{short(dtype)} on {major}.{minor}"
        return f"needs bf16 and compute capability 8.x or 9.0, this is {this}"
    return None


def choose_attention(
    device: torch.device, dtype: torch.dtype, seq_len: int, windows: set[int]
) -> tuple[str, Callable, str | None]:
    """The first that works here: (name, attend, what went wrong with a better one).

    None went wrong where this device or dtype has no better one. Either is printed.
    """
    failure = None
    reason = why_not_flash_attention_3(device, dtype)
    if reason is None:
        try:
            flash = load_flash_attention_3()
            return "flash3", flash_attention_3(flash), None
        except Exception as error:
            reason = first_line(error)
            failure = f"FlashAttention 3 is not usable: {reason}"
    if device.type == "cuda":
        name, attend = "flex", FlexAttention(seq_len, windows, device)
    elif device.type == "cpu":
        name, attend = "blocked", blocked_attention
    else:
        name, attend = "sdpa", sdpa_attention
    print(f"attention: {name}, because FlashAttention 3 is not usable: {reason}", flush=True)
    return name, attend, failure


# ---------------------------------------------------------------------------------------- loss

# What a CPU's cache holds; on a GPU, 128 MB of float32.
LOGITS_AT_A_TIME = {"cpu": 2**22, "cuda": 2**25, "mps": 2**25}


def tanh(x: Tensor) -> Tensor:
    """By one exponential: three times as fast as torch.tanh on a CPU (bench/RESULTS.md)."""
    return 1 - 2 / (torch.exp(2 * x) + 1)


def cross_entropy_piece(
    x: Tensor, weight: Tensor, targets: Tensor, dw: Tensor, cap: float, n_tokens: int
) -> tuple[Tensor, Tensor]:
    """(sum of the piece's losses, in nats; d mean / dx). d mean / d weight is added to dw.

    x (n, n_embd) and weight (V, n_embd) of one dtype, targets (n,), dw (V, n_embd) float32; the
    mean is over n_tokens, of all pieces. The cap bounds the logits, so the softmax needs no
    maximum subtracted: exp(15) x V is small for float32.
    """
    target = targets[:, None]
    z = F.linear(x, weight)
    bounded = tanh(z.float() / cap)  # logits = cap * bounded
    exp = torch.exp(cap * bounded)
    total = exp.sum(-1, keepdim=True)
    target_logits = cap * tanh(z.gather(1, target).float() / cap)
    loss = total.log().sum() - target_logits.sum()
    # d mean / d logits = (softmax - one-hot) / n_tokens; d logits / d z = 1 - tanh^2
    softmax = exp * (1 / (n_tokens * total))
    one_hot = torch.where(target == torch.arange(len(weight), device=x.device), 1 / n_tokens, 0.0)
    dz = ((softmax - one_hot) * (1 - bounded * bounded)).to(x.dtype)
    dw += (dz.mT @ x).float()
    return loss, dz @ weight


class SoftcapCrossEntropy(torch.autograd.Function):
    """mean over tokens of cross_entropy(cap * tanh(x @ W.T / cap), target), with its gradients.

    x (N, n_embd), weight (V, n_embd), targets (N,); piece: cross_entropy_piece, or what the
    compiler made of it. Only one piece of logits exists at any time, so memory does not grow with
    N x V. The pieces are equal where that is possible, so that one is compiled and serves all.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, cap, piece):
        N, V = x.shape[0], weight.shape[0]
        pieces = math.ceil(N * V / LOGITS_AT_A_TIME[x.device.type])
        rows = math.ceil(N / pieces)
        w = weight.to(x.dtype)
        dw = torch.zeros_like(w, dtype=torch.float32)
        loss = torch.zeros((), device=x.device)
        dx = []
        for piece_x, piece_targets in zip(x.split(rows), targets.split(rows)):
            piece_loss, piece_dx = piece(piece_x, w, piece_targets, dw, cap, N)
            loss += piece_loss
            dx.append(piece_dx)
        ctx.save_for_backward(torch.cat(dx), dw.to(weight.dtype))
        return loss / N

    @staticmethod
    def backward(ctx, upstream):
        dx, dw = ctx.saved_tensors
        return upstream.to(dx.dtype) * dx, upstream * dw, None, None, None


# --------------------------------------------------------------------------------------- model

GATE_CHANNELS = 32  # gates read the first channels of the stream, or all of a narrower one


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of x (B, T, heads, D).

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
    def __init__(self, n_embd: int, head_dim: int, n_kv_head: int, window: int, has_values: bool):
        super().__init__()
        self.head_dim = head_dim
        self.window = window
        self.query = Linear(n_embd, n_embd)
        self.key = Linear(n_embd, n_kv_head * head_dim)
        self.value = Linear(n_embd, n_kv_head * head_dim)
        self.out = Linear(n_embd, n_embd)
        self.gate = Linear(min(GATE_CHANNELS, n_embd), n_kv_head) if has_values else None

    def init_weights(self, bound: float, generator: torch.Generator | None):
        nn.init.uniform_(self.query.weight, -bound, bound, generator=generator)
        nn.init.uniform_(self.key.weight, -bound, bound, generator=generator)
        nn.init.uniform_(self.value.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.out.weight)  # a block adds nothing at the start
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)

    def forward(
        self, x: Tensor, values: Tensor | None, cos: Tensor, sin: Tensor, attend: Callable
    ) -> Tensor:
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
        y = attend(q, k, v, self.window)
        return self.out(y.flatten(2))


class MLP(nn.Module):
    def __init__(self, n_embd: int):
        super().__init__()
        self.up = Linear(n_embd, 4 * n_embd)
        self.down = Linear(4 * n_embd, n_embd)

    def init_weights(self, bound: float, generator: torch.Generator | None):
        nn.init.uniform_(self.up.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.down.weight)  # a block adds nothing at the start

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, n_embd: int, head_dim: int, n_kv_head: int, window: int, has_values: bool):
        super().__init__()
        # Of each block its own, not rows of one tensor: then equal layers share compiled kernels.
        # 0-dim: a float32 tensor with a dimension would make the stream float32.
        self.residual_scale = nn.Parameter(torch.empty(()))  # a_i
        self.x0_scale = nn.Parameter(torch.empty(()))  # b_i
        self.attention = Attention(n_embd, head_dim, n_kv_head, window, has_values)
        self.mlp = MLP(n_embd)

    def init_weights(self, bound: float, x0_scale: float, generator: torch.Generator | None):
        nn.init.ones_(self.residual_scale)
        nn.init.constant_(self.x0_scale, x0_scale)
        self.attention.init_weights(bound, generator)
        self.mlp.init_weights(bound, generator)

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        values: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        attend: Callable,
    ) -> Tensor:
        """x, and x0 at the first layer (B, T, n_embd); values: see Attention."""
        x = self.residual_scale * x + self.x0_scale * x0
        x = x + self.attention(norm(x), values, cos, sin, attend)
        return x + self.mlp(norm(x))


def check_shape(hp: SimpleNamespace):
    """Raises ValueError, with the numbers, for rows of the table that do not fit together."""
    if hp.N_LAYER < 1:
        raise ValueError(f"N_LAYER {hp.N_LAYER} must be at least 1")
    if hp.HEAD_DIM < 2 or hp.HEAD_DIM % 2:
        raise ValueError(f"HEAD_DIM {hp.HEAD_DIM} must be even: channels are rotated in pairs")
    if hp.N_EMBD % hp.HEAD_DIM:
        raise ValueError(f"N_EMBD {hp.N_EMBD} must be a multiple of HEAD_DIM {hp.HEAD_DIM}")
    n_head = hp.N_EMBD // hp.HEAD_DIM
    if hp.N_KV_HEAD and n_head % hp.N_KV_HEAD:
        raise ValueError(f"N_KV_HEAD {hp.N_KV_HEAD} must divide the {n_head} heads")
    if not hp.SOFTCAP or not 0 < hp.SOFTCAP <= 64:
        why = "the loss takes its exponential in float32"
        raise ValueError(f"SOFTCAP {hp.SOFTCAP} must be above 0, and at most 64: {why}")


def layer_windows(hp: SimpleNamespace, seq_len: int) -> list[int]:
    """How many positions before its own a layer reads, by its letter in WINDOW_PATTERN."""
    lengths = {"L": seq_len, "S": max(1, int(hp.SHORT_WINDOW * seq_len))}
    pattern = hp.WINDOW_PATTERN
    if not pattern or set(pattern) - set(lengths):
        raise ValueError(f"WINDOW_PATTERN {pattern!r} must be letters S and L")
    letters = [pattern[i % len(pattern)] for i in range(hp.N_LAYER)]
    letters[-1] = "L"
    return [lengths[letter] for letter in letters]


class GPT(nn.Module):
    """model(inputs) -> logits, float32 (B, T, V).
    model(inputs, targets) -> mean cross-entropy in nats, a scalar.

    inputs and targets: int64 (B, T). attend: see the room on attention; blocked_attention until
    another is set. Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        hp: SimpleNamespace,
        vocab_size: int,
        seq_len: int,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        check_shape(hp)
        windows = layer_windows(hp, seq_len)
        n_kv_head = hp.N_KV_HEAD or hp.N_EMBD // hp.HEAD_DIM
        # every second layer has a value embedding, the last always
        has_values = [(hp.N_LAYER - 1 - i) % 2 == 0 for i in range(hp.N_LAYER)]

        self.hp = hp
        self.seq_len = seq_len
        self.dtype = dtype
        self.attend = blocked_attention
        self.loss_piece = cross_entropy_piece
        self.embedding = nn.Embedding(vocab_size, hp.N_EMBD)
        self.head = Linear(hp.N_EMBD, vocab_size)
        self.smear = Linear(min(GATE_CHANNELS, hp.N_EMBD), 1)
        self.smear_scale = nn.Parameter(torch.empty(1))
        self.value_embeddings = nn.ModuleDict()
        for i in range(hp.N_LAYER):
            if has_values[i]:
                self.value_embeddings[str(i)] = nn.Embedding(vocab_size, n_kv_head * hp.HEAD_DIM)
        self.blocks = nn.ModuleList()
        for window, values in zip(windows, has_values):
            self.blocks.append(Block(hp.N_EMBD, hp.HEAD_DIM, n_kv_head, window, values))

        frequency = hp.ROPE_BASE ** (-torch.arange(0, hp.HEAD_DIM, 2) / hp.HEAD_DIM)
        angle = torch.arange(seq_len)[:, None] * frequency
        self.register_buffer("cos", angle.cos()[:, None], persistent=False)  # (T, 1, D/2)
        self.register_buffer("sin", angle.sin()[:, None], persistent=False)

    def init_weights(self, generator: torch.Generator | None = None) -> GPT:
        """In place, on the CPU in float32: then a seed gives the same weights for every device."""
        bound = self.hp.INIT_SCALE * math.sqrt(3 / self.hp.N_EMBD)
        nn.init.normal_(self.embedding.weight, generator=generator)
        nn.init.normal_(self.head.weight, std=0.001, generator=generator)
        nn.init.zeros_(self.smear.weight)
        nn.init.zeros_(self.smear_scale)
        for embedding in self.value_embeddings.values():
            nn.init.uniform_(embedding.weight, -bound, bound, generator=generator)
        for block in self.blocks:
            block.init_weights(bound, self.hp.X0_INIT, generator)
        return self

    def compile_parts(self):
        """In place, by parts: the loss is a loop over pieces, which compiled whole is unrolled."""
        self.trunk = torch.compile(self.trunk, dynamic=False)
        self.logits = torch.compile(self.logits, dynamic=False)
        self.loss_piece = torch.compile(self.loss_piece, dynamic=False)

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.trunk(inputs)
        if targets is None:
            return self.logits(x)
        return SoftcapCrossEntropy.apply(
            x.flatten(0, 1), self.head.weight, targets.flatten(), self.hp.SOFTCAP, self.loss_piece
        )

    def trunk(self, inputs: Tensor) -> Tensor:
        """All but the head: (B, T, n_embd)."""
        T = inputs.shape[1]
        cos, sin = self.cos[:T], self.sin[:T]
        x = norm(self.embedding(inputs).to(self.dtype))
        x = x + self.share_of_token_before(x)
        x0 = x
        for i, block in enumerate(self.blocks):
            values = None
            if str(i) in self.value_embeddings:
                values = self.value_embeddings[str(i)](inputs).to(self.dtype)
            x = block(x, x0, values, cos, sin, self.attend)
        return norm(x)

    def logits(self, x: Tensor) -> Tensor:
        cap = self.hp.SOFTCAP
        return cap * tanh(self.head(x).float() / cap)

    def share_of_token_before(self, x: Tensor) -> Tensor:
        """x (B, T, n_embd), moved by one position and gated: -0.007 bits (bench/RESULTS.md)."""
        gate = torch.sigmoid(self.smear(x[..., : self.smear.in_features]))  # (B, T, 1)
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        return (self.smear_scale * gate).to(x.dtype) * before

    def counts(self) -> tuple[int, float]:
        """(parameters, FLOPs a token, forward and backward)."""

        def count(*modules):
            return sum(p.numel() for module in modules for p in module.parameters())

        matrices = [p for p in self.blocks.parameters() if p.ndim == 2]
        products = 6 * (sum(p.numel() for p in matrices) + count(self.head, self.smear))
        attention = 0
        for block in self.blocks:
            attention += 12 * self.hp.N_EMBD * min(block.attention.window, self.seq_len)
        return count(self), products + attention


# ----------------------------------------------------------------------------------- optimizer
# Another optimizer: a class like AdamW and Muon below, its name in KINDS, and its parameters in
# parameter_groups. `for_group` makes its parts, each with the `params` that are stepped together and
# `state`, tensors by name; `step` gets 0-dim tensors and uses those it needs.

POLAR_EXPRESS = (  # arXiv 2505.16932, five steps
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(g: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The polar factor, roughly, of each matrix in g (n, rows, columns), by Polar Express."""
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
) -> Tensor:
    """One Muon step on equal-shaped matrices p (n, rows, columns): returns the new p.

    Nesterov momentum, Polar Express, NorMuon (arXiv 2510.05491), cautious decay. The two buffers
    change in place; second_momentum is (n, rows, 1), or (n, 1, columns) for wide matrices.
    momentum, lr and weight_decay are 0-dim, so that one compiled step serves every value.
    """
    rows, columns = p.shape[-2:]
    grad = grad.float()
    momentum_buffer.lerp_(grad, 1 - momentum)
    g = orthogonalize(grad.lerp(momentum_buffer, momentum)).float()

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

    def __init__(self, p: nn.Parameter, betas: tuple[float, float]):
        self.params = [p]
        self.betas = betas
        self.state = {
            "exp_avg": torch.zeros(p.shape, device=p.device),
            "exp_avg_sq": torch.zeros(p.shape, device=p.device),
            "step": torch.zeros((), device=p.device),
        }

    @classmethod
    def for_group(cls, group: dict) -> list[AdamW]:
        return [cls(p, group["betas"]) for p in group["params"]]

    def step(self, lr: Tensor, weight_decay: Tensor, momentum: Tensor, decay_multiplier: Tensor):
        p = self.params[0]
        self.state["step"].add_(1)
        adamw_update(p, p.grad, **self.state, lr=lr, weight_decay=weight_decay, betas=self.betas)


class Muon:
    """Steps matrices of one shape, stacked."""

    def __init__(self, params: list[nn.Parameter]):
        n, (rows, columns), device = len(params), params[0].shape, params[0].device
        second = (n, rows, 1) if rows >= columns else (n, 1, columns)
        self.params = params
        self.state = {
            "momentum_buffer": torch.zeros((n, rows, columns), device=device),
            "second_momentum": torch.zeros(second, device=device),
        }

    @classmethod
    def for_group(cls, group: dict) -> list[Muon]:
        same_shape = {}
        for p in group["params"]:
            same_shape.setdefault(p.shape, []).append(p)
        return [cls(params) for params in same_shape.values()]

    def step(self, lr: Tensor, weight_decay: Tensor, momentum: Tensor, decay_multiplier: Tensor):
        new = muon_update(
            torch.stack(self.params),
            torch.stack([p.grad for p in self.params]),
            **self.state,
            momentum=momentum,
            lr=lr,
            weight_decay=weight_decay * decay_multiplier,
        )
        torch._foreach_copy_(self.params, new.unbind())  # one kernel, not one for each


KINDS = {"adamw": AdamW, "muon": Muon}


class Optimizer:
    """Steps all groups in one compiled call.

    A group: kind (of KINDS), params, lr, weight_decay (both read once, here), and AdamW's betas.
    All state exists from the start, so that `state_tensors` can be saved and put back.
    """

    def __init__(self, groups: list[dict], compiled: bool = True):
        self.parts = []
        self.lrs = []
        self.weight_decays = []
        for group in groups:
            if group["kind"] not in KINDS:
                kinds = " nor ".join(KINDS)
                raise ValueError(f"kind {group['kind']!r} of a group is neither {kinds}")
            for part in KINDS[group["kind"]].for_group(group):
                device = part.params[0].device
                self.parts.append(part)
                # Tensors, so that other values compile nothing anew; of each part its own, so
                # that equal parts share a compiled kernel.
                self.lrs.append(torch.tensor(group["lr"], device=device))
                self.weight_decays.append(torch.tensor(group["weight_decay"], device=device))
        self.lr_multiplier = torch.zeros((), device=device)
        self.momentum = torch.zeros((), device=device)
        self.decay_multiplier = torch.zeros((), device=device)
        self.step_parts = self._step_parts
        if compiled:
            self.step_parts = torch.compile(self._step_parts, dynamic=False)

    def state_tensors(self) -> list[Tensor]:
        return [tensor for part in self.parts for tensor in part.state.values()]

    @torch.no_grad()
    def step(self, lr_multiplier: float, momentum: float, decay_multiplier: float):
        """One step. lr_multiplier is everybody's; momentum and decay_multiplier are Muon's."""
        self.lr_multiplier.fill_(lr_multiplier)  # waits for nothing; a copy from the host would
        self.momentum.fill_(momentum)
        self.decay_multiplier.fill_(decay_multiplier)
        self.step_parts()
        for part in self.parts:
            for p in part.params:
                p.grad = None

    def _step_parts(self):
        for part, lr, weight_decay in zip(self.parts, self.lrs, self.weight_decays):
            part.step(self.lr_multiplier * lr, weight_decay, self.momentum, self.decay_multiplier)


def parameter_groups(model: GPT) -> list[dict]:
    """Which parameter is stepped how. Raises ValueError naming one that stands in no group."""
    hp = model.hp
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    value_embeddings = list(model.value_embeddings.parameters())
    residual_scales = [block.residual_scale for block in model.blocks]
    x0_scales = [block.x0_scale for block in model.blocks]
    width_lr = (hp.N_EMBD / 768) ** hp.LR_WIDTH_POWER
    embedding_lr = hp.EMBEDDING_LR * width_lr

    def adamw(params, lr, weight_decay=0.0, betas=(0.8, 0.95)):
        return dict(kind="adamw", params=params, lr=lr, weight_decay=weight_decay, betas=betas)

    groups = [
        adamw([model.embedding.weight], embedding_lr, hp.EMBEDDING_WEIGHT_DECAY),
        adamw(value_embeddings, embedding_lr, hp.VALUE_EMBEDDING_WEIGHT_DECAY),
        adamw([model.head.weight], hp.HEAD_LR * width_lr, hp.HEAD_WEIGHT_DECAY),
        adamw([model.smear.weight], hp.SCALAR_LR * 0.02),
        adamw([model.smear_scale, *residual_scales], hp.SCALAR_LR * 0.01),
        adamw(x0_scales, hp.SCALAR_LR, betas=(0.96, 0.95)),
        dict(kind="muon", params=matrices, lr=hp.MUON_LR, weight_decay=hp.MUON_WEIGHT_DECAY),
    ]
    grouped = {id(p) for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        if id(p) not in grouped:
            raise ValueError(
                f"parameter {name} {tuple(p.shape)} has no optimizer group: "
                "add it to one in parameter_groups (muon takes matrices only)"
            )
    return groups


def lr_multiplier(hp: SimpleNamespace, progress: float) -> float:
    """1, but rising from 0 over WARMUP and falling to FINAL_LR_FRAC over WARMDOWN."""
    up = progress / hp.WARMUP if progress < hp.WARMUP else 1.0
    left = min(1.0, (1 - progress) / hp.WARMDOWN) if hp.WARMDOWN else 1.0
    return up * (left + (1 - left) * hp.FINAL_LR_FRAC)


def muon_momentum(hp: SimpleNamespace, step: int) -> float:
    low, high = hp.MUON_MOMENTUM
    return low + (high - low) * min(step / hp.MUON_MOMENTUM_WARMUP, 1)


# ------------------------------------------------------------------------------------- warm-up


def rows_at_a_time(tokens_per_step: int, seq_len: int, wanted: int) -> int:
    """The device batch: the wanted one, or all the rows of a step where those are fewer.

    Raises Stop, with the nearest values that fit, where they do not divide.
    """
    rows, rest = divmod(tokens_per_step, seq_len)
    if rest or rows < 1:
        nearest = [str(n * seq_len) for n in (rows, rows + 1) if n > 0]
        raise Stop(
            f"TOKENS_PER_STEP {tokens_per_step} must be a whole number of rows of {seq_len} "
            f"tokens, such as {' or '.join(nearest)}"
        )
    if wanted < 1 or rows % min(wanted, rows):
        divisors = [n for n in range(1, rows + 1) if rows % n == 0]
        nearest = sorted(sorted(divisors, key=lambda n: abs(n - wanted))[:2])
        raise Stop(
            f"DEVICE_BATCH_SIZE {wanted} does not divide the {rows} rows of TOKENS_PER_STEP "
            f"{tokens_per_step}: the nearest that do are {' and '.join(map(str, nearest))}"
        )
    return min(wanted, rows)


def own_compiler_cache(folder: Path):
    """From here on the compilers keep what they make in this folder."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")


def compiler_caches() -> list[Path]:
    """The compiler's cache folder, and those made beside it because the one before was damaged."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    first = Path(re.sub(r"-fresh-\d+$", "", cache_dir()))
    caches = [first]
    while (following := Path(f"{first}-fresh-{len(caches)}")).is_dir():
        caches.append(following)
    return caches


class WarmUp:
    """Compiles and runs everything on made-up tokens, and finds the batches that fit.

    What can go wrong, each answered once and said in one line: out of memory, by the next smaller
    batch that divides the rows; a kernel of FlexAttention too large for this card, by smaller
    blocks; what does not compile, by a fresh folder for the compiler's cache (one that was killed
    while compiling leaves half a file there, which fails for ever), and then by running uncompiled.
    """

    def __init__(self, model: GPT, optimizer: Optimizer):
        self.model = model
        self.optimizer = optimizer
        self.generator = torch.Generator().manual_seed(0)
        self.fresh_cache = None  # the folder, once there is one
        self.uncompiled = None  # why, once it is so
        self.step_seconds = 0.0  # a step's passes, without the optimizer

    def run(self, rows: int, device_batch: int, eval_batch: int) -> tuple[int, int]:
        """The device batch and the evaluation batch that fit; rows: those of a step.

        Weights, buffers and optimizer state are afterwards what they were.
        """
        model = self.model
        tensors = [*model.parameters(), *model.buffers(), *self.optimizer.state_tensors()]
        saved = [tensor.detach().clone() for tensor in tensors]
        device_batch = self.fit("training", self.train, device_batch, rows)
        eval_batch = self.fit("scoring", self.score, eval_batch, eval_batch)
        self.model.train()
        with torch.no_grad():
            for tensor, value in zip(tensors, saved):
                tensor.copy_(value)
        del saved
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return device_batch, eval_batch

    def made_up(self, batch: int) -> Tensor:
        shape = (batch, self.model.seq_len)
        ids = torch.randint(self.model.head.out_features, shape, generator=self.generator)
        return ids.to(self.model.cos.device)

    def train(self, batch: int, rows: int):
        self.model.train()
        for _ in range(2):  # the second finds everything compiled and all memory allocated
            began = time.perf_counter()
            passes = min(2, rows // batch)  # gradients to add to take memory of their own
            for _ in range(passes):
                self.model(self.made_up(batch), self.made_up(batch)).backward()
            if self.model.cos.device.type != "cpu":
                torch.accelerator.synchronize()
            self.step_seconds = (time.perf_counter() - began) * (rows // batch) / passes
            idle = [name for name, p in self.model.named_parameters() if p.grad is None]
            if idle:
                raise Stop(f"no gradient reaches {', '.join(idle)}: use it in forward or remove it")
            self.optimizer.step(lr_multiplier=0.0, momentum=0.0, decay_multiplier=0.0)

    def score(self, batch: int, rows: int):
        self.model.eval()
        with torch.no_grad():
            self.model(self.made_up(batch))

    def fit(self, name: str, work: Callable, batch: int, rows: int) -> int:
        """The largest batch that `work` has room for: this one, or a smaller divisor of rows."""
        while True:
            try:
                work(batch, rows)
                return batch
            except Exception as error:
                if out_of_memory(error):
                    batch = self.smaller(name, batch, rows)
                elif self.uncompiled:
                    raise
                elif out_of_shared_memory(error) and self.can_shrink_blocks():
                    self.shrink_blocks(error)
                else:
                    self.recompile_or_not(error)
            # Only here, where the error's frames hold no tensor any more.
            self.model.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()

    def can_shrink_blocks(self) -> bool:
        attend = self.model.attend
        return isinstance(attend, FlexAttention) and attend.kernel_options is None

    def shrink_blocks(self, error: Exception):
        self.model.attend.kernel_options = FlexAttention.SMALL_BLOCKS
        print(f"attention: smaller blocks, because {cause(error)}", flush=True)

    def recompile_or_not(self, error: Exception):
        from torch._inductor.utils import clear_caches

        reason = cause(error)
        if self.fresh_cache is None:
            caches = compiler_caches()
            self.fresh_cache = Path(f"{caches[0]}-fresh-{len(caches)}")
            self.fresh_cache.mkdir(exist_ok=True)  # another run may be where this one is
            own_compiler_cache(self.fresh_cache)
            torch.compiler.reset()
            clear_caches()  # what it remembers of the old folder
            print(
                f"compiling failed ({reason}): once more with a fresh cache, {self.fresh_cache}, "
                f"in case {caches[-1]} is damaged",
                flush=True,
            )
        else:
            shutil.rmtree(self.fresh_cache, ignore_errors=True)  # it was not the cache
            print(f"not compiled, because compiling failed: {reason}", flush=True)
            torch.compiler.set_stance("force_eager")
            self.uncompiled = reason

    def smaller(self, name: str, batch: int, rows: int) -> int:
        if batch == 1:
            fail("out of memory with a single row at a time: lower N_LAYER or N_EMBD")
        smaller = batch // 2
        while rows % smaller:
            smaller -= 1
        print(
            f"out of memory {name} {batch} rows at a time: trying {smaller}, "
            "the tokens a step stay the same",
            flush=True,
        )
        return smaller


# ------------------------------------------------------------------------------------ the loop


class Progress:
    """What the loop reports: the progress line, the loss curve, and a loss that diverged.

    On a terminal one line rewritten in place, otherwise a plain line about every 5% of the budget.
    """

    def __init__(self, tokens_per_step: int, budget: float):
        self.tokens_per_step = tokens_per_step
        self.budget = budget  # seconds
        self.terminal = sys.stdout.isatty()
        self.tenths = [[] for _ in range(10)]  # the losses, by tenth of the budget
        self.unread = None  # the last step: (number, share of the budget where it began, loss)
        self.since_line = []  # the losses since the last line
        self.line_time = time.perf_counter()  # of the last line
        self.next_line = 0.0  # share of the budget

    def add(self, step: int, progress: float, loss: Tensor):
        """Reads the step before: waiting for this one's loss would leave a GPU idle."""
        self.read()
        self.unread = (step, progress, loss)
        if loss.device.type == "cpu":  # it is there already
            self.read()

    def read(self):
        """Reads the last step. Fails the run where its loss is above 100 or not a number."""
        if self.unread is None:
            return
        step, progress, loss = self.unread
        self.unread = None
        loss = loss.item()
        if not loss <= 100:
            advice = "Lower the rates or undo the last change"
            fail(f"loss diverged at step {step}: it is {loss}. {advice}")
        self.tenths[min(9, int(progress * 10))].append(loss)
        self.since_line.append(loss)
        if self.terminal or progress >= self.next_line:
            self.print_line(step, progress)
            self.next_line = progress + 0.05

    def print_line(self, step: int, progress: float):
        now = time.perf_counter()
        count = len(self.since_line)
        loss = sum(self.since_line) / count
        rate = count * self.tokens_per_step / (now - self.line_time)
        line = f"{progress:6.1%}  step {step:5}  loss {loss:.4f}  {rate:9,.0f} tokens/s"
        line += f"  {(1 - progress) * self.budget:4.0f} s left"
        if self.terminal:
            print(f"\r{line}\033[K", end="", flush=True)
        else:
            print(line, flush=True)
        self.since_line = []
        self.line_time = now

    def close(self):
        self.read()
        if self.terminal:
            print("\r\033[K", end="", flush=True)

    def pace(self) -> str:
        """Tokens a second, and in the fastest tenth: far apart where something else ran, too."""
        steps = [len(losses) for losses in self.tenths]
        mean, fastest = sum(steps) / 10, max(steps)
        per_second = 10 * self.tokens_per_step / self.budget
        return (
            f"{mean * per_second:,.0f} tokens/s, {fastest * per_second:,.0f} in the fastest tenth"
        )

    def curve(self) -> list[float]:
        """The mean loss of each tenth of the budget; without a step in it, the one before."""
        means = []
        for losses in self.tenths:
            means.append(sum(losses) / len(losses) if losses else means[-1])
        return means


def train(
    model: GPT,
    optimizer: Optimizer,
    hp: SimpleNamespace,
    loader,
    accumulation_steps: int,
    budget: float,
    report: Progress,
) -> int:
    """Trains until a step as long as a late one would not fit the budget (seconds). The steps made."""
    step = 0
    step_seconds = 0.0
    step_ended = time.perf_counter()
    while clock.elapsed + step_seconds < budget:
        progress_before = clock.progress
        step_loss = 0.0
        for _ in range(accumulation_steps):
            inputs, targets, _ = next(loader)
            loss = model(inputs, targets) / accumulation_steps
            loss.backward()
            step_loss = step_loss + loss.detach()
        progress = clock.progress
        optimizer.step(lr_multiplier(hp, progress), muon_momentum(hp, step), 1 - progress)
        step += 1
        report.add(step, progress_before, step_loss)
        now = time.perf_counter()
        step_seconds = max(now - step_ended, 0.9 * step_seconds)  # one slow step may come again
        step_ended = now
    report.close()
    return step


def build_model(
    hp: SimpleNamespace, vocab_size: int, seq_len: int, device: torch.device, dtype: torch.dtype
) -> tuple[GPT, str, str | None]:
    """(the model at its start, on the device; its attention's name; what kept it from a better)."""
    model = GPT(hp, vocab_size, seq_len, dtype).init_weights().to(device)
    if device.type == "cuda":
        model.embedding.to(dtype)
        model.value_embeddings.to(dtype)
    windows = {block.attention.window for block in model.blocks}
    attention, model.attend, why = choose_attention(device, dtype, seq_len, windows)
    return model, attention, why


def main() -> float:
    """Trains once and scores. The score, which is printed too."""
    from prepare import MAX_SEQ_LEN, TIME_BUDGET

    # What is trained, and on what.
    imported = time.perf_counter()
    device, split = training_device(), split_name()
    check_prepared(split)
    if device.type == "cpu":
        use_one_heap()
    dtype = compute_dtype(device)
    size = pick_size(device, manifest()["corpus"])
    hp = hyperparameters(size)
    rows = hp.TOKENS_PER_STEP // MAX_SEQ_LEN
    wanted_batch = rows_at_a_time(hp.TOKENS_PER_STEP, MAX_SEQ_LEN, hp.DEVICE_BATCH_SIZE)
    eval_rows = manifest()["eval_rows"][split]  # fewer than a batch would compile once more
    eval_batch = max(1, min(hp.EVAL_BATCH_TOKENS // MAX_SEQ_LEN, eval_rows))
    tokenizer = Tokenizer.from_directory()

    # The model and its optimizer.
    torch.manual_seed(seed())
    torch.set_float32_matmul_precision("high")
    vocab_size = tokenizer.get_vocab_size()
    try:
        model, attention, why_attention = build_model(hp, vocab_size, MAX_SEQ_LEN, device, dtype)
        optimizer = Optimizer(parameter_groups(model))
    except Exception as error:
        if not out_of_memory(error):
            raise
        fail("out of memory building the model: lower N_EMBD or N_LAYER")
    model.compile_parts()
    n_params, flops_per_token = model.counts()
    peak = peak_tflops(device_name(device))
    print(
        f"{device_name(device)}: size {size}, {short(dtype)}, {attention} attention, "
        f"{n_params / 1e6:.1f} M parameters, {hp.TOKENS_PER_STEP} tokens a step, "
        f"{manifest()['corpus']}, fingerprint {fingerprint()}",
        flush=True,
    )
    if not peak:
        why = f"the peak of {device_name(device)} is not in PEAK_TFLOPS"
        print(f"mfu_percent will be 0: {why}", flush=True)
    built = time.perf_counter()

    # Compile and warm up, off the clock.
    print("compiling: a minute or two the first time, seconds when the cache has it", flush=True)
    own_compiler_cache(compiler_caches()[-1])
    # The loader exists before the warm-up: its watchdog covers compiling too.
    loader = make_dataloader(tokenizer, wanted_batch, MAX_SEQ_LEN, "train", device)
    warm_up = WarmUp(model, optimizer)
    device_batch, eval_batch = warm_up.run(rows, wanted_batch, eval_batch)
    if device_batch != wanted_batch:
        loader = make_dataloader(tokenizer, device_batch, MAX_SEQ_LEN, "train", device)
    compiled = not warm_up.uncompiled and os.environ.get("TORCH_COMPILE_DISABLE") != "1"
    conditions = {"attention": attention, "compiled": compiled, "dtype": short(dtype)}
    describe_run(**conditions, fell_back=[*filter(None, [why_attention, warm_up.uncompiled])])
    if warm_up.step_seconds > TIME_BUDGET:
        fail(
            f"a step takes {warm_up.step_seconds:.0f} s and the budget is {TIME_BUDGET} s: lower "
            "TOKENS_PER_STEP, N_LAYER or N_EMBD"
        )
    torch.manual_seed(seed())  # whatever draws in training draws as if nothing had warmed up
    warm = time.perf_counter()
    print(
        f"start-up: imports {imported - STARTED:.1f} s, model {built - imported:.1f} s, "
        f"compiling and warm-up {warm - built:.1f} s",
        flush=True,
    )

    # Train, on the clock.
    print(f"training for {TIME_BUDGET} s", flush=True)
    report = Progress(hp.TOKENS_PER_STEP, TIME_BUDGET)
    accumulation_steps = rows // device_batch
    steps = train(model, optimizer, hp, loader, accumulation_steps, TIME_BUDGET, report)

    # Score.
    print(f"scoring after {steps} steps: {report.pace()}", flush=True)
    began = time.perf_counter()
    bpb = evaluate_bpb(model, tokenizer, eval_batch)
    print(f"scored in {time.perf_counter() - began:.1f} s", flush=True)

    # The summary: the keys and their order are what night.py and people's scripts read.
    tokens = steps * hp.TOKENS_PER_STEP
    mfu = flops_per_token * tokens / clock.elapsed / (peak * 1e12) if peak else 0.0
    summary = {
        f"{split}_bpb": f"{bpb:.6f}",
        "training_seconds": f"{clock.elapsed:.1f}",
        "total_seconds": f"{time.perf_counter() - STARTED:.1f}",
        "peak_vram_mb": f"{peak_memory_mb(device):.1f}",
        "mfu_percent": f"{100 * mfu:.2f}",
        "total_tokens_M": f"{tokens / 1e6:.1f}",
        "num_steps": steps,
        "num_params_M": f"{n_params / 1e6:.1f}",
        "depth": hp.N_LAYER,
        "device": device_name(device),
        "attention": attention,
        "device_batch_size": device_batch,
        "seed": seed(),
        "fingerprint": fingerprint(),
        "loss_curve": " ".join(f"{loss:.3f}" for loss in report.curve()),
        "compiled": "yes" if compiled else "no",
        "dtype": short(dtype),
        "torch": torch.__version__,
        "driver": driver_version() or "none",
    }
    print("---")
    for key, value in summary.items():
        print(f"{key}: {value}", flush=True)
    return bpb


def explain(error: Exception) -> str:
    """What a failure of main() says; the traceback goes before it where it can help."""
    if out_of_memory(error):
        return (
            "out of memory while training: lower DEVICE_BATCH_SIZE (the tokens a step can stay), "
            "N_LAYER or N_EMBD"
        )
    traceback.print_exc()
    text = first_line(error)
    if isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in text:
        return f"the device failed ({text}): look at nvidia-smi, then run again"
    return f"{text} (the traceback is above)"


def run() -> int:
    """main(), with every failure as one `FAIL: ` line, the last of the log. The exit code."""
    try:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if main() is None:
                fail("main() returned without a score")
        except KeyboardInterrupt:
            fail("interrupted: no score")
        except Stop:
            raise
        except SystemExit as error:
            fail(f"exit({error.code!r}) was called before the end of main(): no score")
        except Exception as error:
            fail(explain(error))
    except Stop as stop:
        if sys.stdout.isatty():
            print()  # below the progress
        sys.stdout.flush()
        print(stop, file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    code = run()
    sys.stdout.flush()
    os._exit(code)  # the interpreter's own way out takes a second and may hang
