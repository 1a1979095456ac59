"""
Attention by the fastest backend that works here, behind one signature.

    attend(q, k, v, window) -> (B, T, n_head, D)

q (B, T, n_head, D), k and v (B, T, n_kv_head, D), n_kv_head dividing n_head. Position t reads itself
and the `window` positions before it, with scale 1 / sqrt(D). Any function of that signature will do
in place of these.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from autoresearch.kit.device import short
from autoresearch.kit.errors import first_line, out_of_shared_memory, root_cause


@dataclass(eq=False)
class Attend:
    """What `choose` returns: `attend(q, k, v, window)`, and what a run reports of it."""

    name: str
    function: Callable
    fell_back: str | None = None  # what went wrong with a better one

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        return self.function(q, k, v, window)


def choose(device: torch.device, dtype: torch.dtype, seq_len: int, windows: set[int]) -> Attend:
    """The first backend that works here. Prints why FlashAttention 3 is not the one."""
    fell_back = None
    reason = why_not_flash_attention_3(device, dtype)
    if reason is None:
        try:
            return Attend("flash3", flash_attention_3(load_flash_attention_3()))
        except Exception as error:
            reason = first_line(error)
            fell_back = f"FlashAttention 3 is not usable: {reason}"
    if device.type == "cuda":
        attend = Attend("flex", FlexAttention(seq_len, windows, device), fell_back)
    elif device.type == "cpu":
        attend = Attend("blocked", blocked_attention, fell_back)
    else:
        attend = Attend("sdpa", sdpa_attention, fell_back)
    print(f"attention: {attend.name}, because FlashAttention 3 is not usable: {reason}", flush=True)
    return attend


def describe(attend: Callable) -> tuple[str, str | None]:
    """(name, what went wrong with a better one), also for an agent's own function."""
    own_name = getattr(attend, "__name__", type(attend).__name__)
    return getattr(attend, "name", own_name), getattr(attend, "fell_back", None)


def shrink_blocks(attend: Callable, error: Exception) -> str | None:
    """After out of shared memory, FlexAttention gets smaller blocks, once.

    Returns the change in one line; None for another error or function.
    """
    flex = getattr(attend, "function", None)
    if not isinstance(flex, FlexAttention) or not out_of_shared_memory(error):
        return None
    if flex.kernel_options is not None:
        return None
    flex.kernel_options = FlexAttention.SMALL_BLOCKS
    return f"attention: smaller blocks, because {root_cause(error)}"


# ------------------------------------------------------------------------------ plain operations


def block_length(seq_len: int, window: int) -> int:
    """The smallest divisor of seq_len that is no shorter than the window."""
    length = min(max(window, 1), seq_len)
    while seq_len % length:
        length += 1
    return length


def with_previous_block(x: Tensor) -> Tensor:
    """x (B, blocks, n_kv_head, size, D) -> (B, blocks, n_kv_head, 2 * size, D)."""
    previous = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
    return torch.cat([previous, x], dim=3)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """By plain matrix products with a mask, for CPUs.

    The queries are cut into blocks no shorter than the window, so each needs only the keys of its
    own block and the one before: with short windows most products are never made. Fused by the
    compiler, on a CPU with bf16 two to four times as fast, forward and backward, as torch's
    scaled_dot_product_attention.
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
        k, v = with_previous_block(k), with_previous_block(v)
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


# --------------------------------------------------------------------------------- FlexAttention


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


# ------------------------------------------------------------------------------ FlashAttention 3

FLASH_3 = "kernels-community/flash-attn3"
FLASH_3_VERSION = 1


def why_not_flash_attention_3(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" or torch.version.hip:
        return "needs an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    supported = major == 8 or (major, minor) == (9, 0)
    if dtype != torch.bfloat16 or not supported:
        this = f"{short(dtype)} on {major}.{minor}"
        return f"needs bf16 and compute capability 8.x or 9.0, this is {this}"
    return None


def flash_attention_3(flash_attn_func: Callable) -> Callable:
    """`attend` by the kernel's function."""

    def attend(q, k, v, window):
        return flash_attn_func(q, k, v, causal=True, window_size=(window, 0))

    return attend


def load_flash_attention_3() -> Callable:
    """The kernel's flash_attn_func: downloaded once, later loaded without any request.

    Raises with the reason.
    """
    import requests
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars
    from kernels import get_kernel, get_local_kernel

    disable_progress_bars()
    for library in ("kernels", "huggingface_hub", "httpx"):
        logging.getLogger(library).setLevel(logging.ERROR)

    try:
        return get_local_kernel(cached_flash_attention_3()).flash_attn_func
    except Exception as error:  # not there, cut off while downloading, or built for another torch
        if constants.HF_HUB_OFFLINE:
            raise RuntimeError(f"HF_HUB_OFFLINE is set, and {error}") from error
        reason = first_line(error)
    requests.head(constants.ENDPOINT, timeout=3).close()  # a dead hub costs seconds, not minutes
    print(f"attention: downloading FlashAttention 3 ({reason})", flush=True)
    return get_kernel(FLASH_3, version=FLASH_3_VERSION).flash_attn_func


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
