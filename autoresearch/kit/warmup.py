"""
Compiling and warming up, off the clock: find the batch that fits, put everything back.

    model.trunk = warmup.compile(model.trunk)
    warm = warmup.fit(model, forward_backward, optimizer_step, attend, device_batch=64, ...)

Nothing here knows a model's inside: `fit` calls it on dummy batches, and afterwards all tensors have
the values they had.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autoresearch import compiler
from autoresearch.common import file_problem
from autoresearch.kit.attention import shrink_blocks
from autoresearch.kit.errors import out_of_memory, refusal, root_cause
from autoresearch.referee.clock import fail


@dataclass
class Warm:
    """What `fit` found."""

    batch: int  # rows at a time in training
    parts: int  # batches of a step
    eval_batch: int  # rows at a time in scoring
    compiled: bool
    fell_back: str | None  # why it is not compiled, where compiling failed


def compile(function: Callable) -> Callable:
    """torch.compile for shapes that stay; the function itself where $TORCH_COMPILE_DISABLE is 1."""
    # torch.compile honours the variable too, but first imports the compiler, which takes seconds.
    return torch.compile(function, dynamic=False) if _compiles() else function


def compile_training(function: Callable) -> Callable:
    """`compile` where gradients are recorded, the function itself elsewhere.

    For CPUs in float32: a graph for scoring takes 10 s to compile, and saves an eighth of scoring's
    few seconds. In bf16 it makes scoring three times as fast.
    """
    compiled = compile(function)
    return lambda *args: (compiled if torch.is_grad_enabled() else function)(*args)


def _compiles() -> bool:
    return os.environ.get("TORCH_COMPILE_DISABLE") != "1"


def fit(
    model: torch.nn.Module,
    forward_backward: Callable[[torch.nn.Module, Tensor, Tensor, int], Tensor],
    optimizer_step: Callable[[], None],
    attend: Callable,
    *,
    restore: list[Tensor],
    vocab_size: int,
    seq_len: int,
    tokens_per_step: int,
    device_batch: int,
    eval_tokens: int,
    eval_rows: int,
    budget: float,
) -> Warm:
    """Runs and so compiles a training step and a scoring step, with the largest batches that fit.

    forward_backward(model, inputs, targets, parts) adds one part's gradients; optimizer_step() uses
    them. restore: tensors that change beside the model's own. device_batch: rows at a time to try
    first; the batch stays a divisor of a step's rows. eval_tokens: a scoring batch's, to try first;
    eval_rows: the rows to score. budget: seconds.

    After out of memory the batch gets smaller; after out of shared memory, FlexAttention's blocks.
    Where compiling fails, a fresh cache is tried, then no compiler. Each prints one line; any other
    error is raised. Raises Fail where one row is too much, a step takes longer than the budget, or
    a parameter gets no gradient.
    """
    assert tokens_per_step % seq_len == 0, (
        f"TOKENS_PER_STEP is no multiple of {seq_len}, the sequence"
    )
    rows = tokens_per_step // seq_len
    wanted = min(device_batch, rows)
    assert rows % wanted == 0, f"DEVICE_BATCH_SIZE {wanted} must divide the {rows} rows of a step"
    # A batch that the rows to score cannot fill would be compiled for nothing.
    eval_wanted = max(1, min(eval_tokens // seq_len, eval_rows))

    tensors = [*model.parameters(), *model.buffers(), *restore]
    saved = [tensor.detach().clone() for tensor in tensors]
    device = tensors[0].device
    generator = torch.Generator().manual_seed(0)
    step_seconds = 0.0

    def dummy_batch(batch: int) -> Tensor:
        return torch.randint(vocab_size, (batch, seq_len), generator=generator).to(device)

    def train_step(batch: int):
        nonlocal step_seconds
        model.train()
        # The second pass adds to gradients, which takes memory of its own.
        passes = min(2, rows // batch)
        for _ in range(2):  # the second finds everything compiled and all memory allocated
            step_began = time.perf_counter()
            for _ in range(passes):
                forward_backward(model, dummy_batch(batch), dummy_batch(batch), passes)
            require_gradients(model)
            optimizer_step()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            step_seconds = (time.perf_counter() - step_began) * (rows // batch) / passes

    def score_step(batch: int):
        model.eval()
        with torch.no_grad():
            model(dummy_batch(batch))

    print("compiling: a minute or two the first time, seconds when the cache has it", flush=True)
    began = time.perf_counter()
    fitting = _Fitting(tensors, attend)
    batch = fitting.largest("training", train_step, wanted, rows)
    eval_batch = fitting.largest("scoring", score_step, eval_wanted, eval_wanted)
    with torch.no_grad():
        for tensor, value in zip(tensors, saved):
            tensor.copy_(value)
            tensor.grad = None
    gc.collect()  # it is off during a run, and compiling leaves cycles that hold gigabytes
    print(f"compiling and warm-up took {time.perf_counter() - began:.1f} s", flush=True)
    if step_seconds > budget:
        fail(
            f"a step takes {step_seconds:.0f} s and the budget is {budget} s: use fewer tokens a "
            "step, fewer layers or a smaller width"
        )
    compiled = _compiles() and fitting.uncompiled is None
    return Warm(batch, rows // batch, eval_batch, compiled, fitting.uncompiled)


def require_gradients(model: torch.nn.Module):
    idle = [name for name, p in model.named_parameters() if p.grad is None]
    if idle:
        fail(f"no gradient reaches {', '.join(idle)}: use it in forward or remove it")


class _Fitting:
    """Calls a step until it succeeds: with a smaller batch, smaller blocks, or uncompiled."""

    def __init__(self, tensors: list[Tensor], attend: Callable):
        self.tensors = tensors
        self.attend = attend
        self.fresh_cache = None  # its folder, once a fresh one was made
        self.uncompiled = None  # the reason, once the compiler is off
        if _compiles():
            use_compiler_cache(compiler_caches()[-1])

    def largest(self, what: str, step: Callable[[int], None], batch: int, rows: int) -> int:
        """The largest batch that `step` has room for: `batch`, or a smaller divisor of rows."""
        while True:
            try:
                step(batch)
                return batch
            except Exception as error:
                if out_of_memory(error):
                    batch = smaller(what, batch, rows)
                elif change := shrink_blocks(self.attend, error):
                    print(change, flush=True)
                elif self.uncompiled or not _compiles():
                    raise
                else:
                    self.recompile_or_not(error)
            # Only here: inside `except` the error's frames still hold tensors.
            for tensor in self.tensors:
                tensor.grad = None
            gc.collect()
            torch.cuda.empty_cache()

    def recompile_or_not(self, error: Exception):
        # A process killed while compiling leaves half a file in the cache, which fails forever.
        from torch._inductor.utils import clear_caches

        reason = root_cause(error)
        caches = compiler_caches()
        refused = refusal(error)  # another folder beside it would meet the same
        if refused:
            problem = file_problem(refused, refused.filename or caches[-1])
            reason = f"{problem}, or set TORCHINDUCTOR_CACHE_DIR to another folder"
        if self.fresh_cache is None and not refused:
            self.fresh_cache = Path(f"{caches[0]}-fresh-{len(caches)}")
            self.fresh_cache.mkdir(exist_ok=True)  # another run may have made it just now
            use_compiler_cache(self.fresh_cache)
            torch.compiler.reset()
            clear_caches()  # of what was read from the old folder
            print(
                f"compiling failed ({reason}): once more with a fresh cache, {self.fresh_cache}, "
                f"in case {caches[-1]} is damaged",
                flush=True,
            )
        else:
            if self.fresh_cache:
                shutil.rmtree(self.fresh_cache, ignore_errors=True)  # it was not the cache
            print(f"not compiled, because compiling failed: {reason}", flush=True)
            torch.compiler.set_stance("force_eager")
            self.uncompiled = reason


def smaller(what: str, batch: int, rows: int) -> int:
    """The next divisor of rows, about half as large. Prints one line."""
    if batch == 1:
        fail("out of memory with a single row at a time: use fewer layers or a smaller width")
    half = batch // 2
    while rows % half:
        half -= 1
    print(
        f"out of memory {what} {batch} rows at a time: trying {half}, "
        "the tokens a step stay the same",
        flush=True,
    )
    return half


def compiler_caches() -> list[Path]:
    """The compiler's cache folder, and fresh ones made beside it where the one before was damaged."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    first = compiler.place(Path(re.sub(r"-fresh-\d+$", "", cache_dir())))
    caches = [first]
    while (following := Path(f"{first}-fresh-{len(caches)}")).is_dir():
        caches.append(following)
    return caches


def use_compiler_cache(folder: Path):
    """Inductor and Triton use this folder from now on."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
