"""
Compiling and warming up, off the clock: find the batch that fits, put everything back.

    model.trunk = warmup.compile(model.trunk)
    warm = warmup.fit(train_step, score_step, restore=tensors, rows=128, wanted=64, ...)

Nothing here knows a model: `fit` calls the two functions on whatever they make up, and afterwards
the tensors have the values they had.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autoresearch.kit.errors import out_of_memory, root_cause
from autoresearch.referee.clock import fail


@dataclass
class Warm:
    """What `fit` found."""

    batch: int  # rows at a time that fit in training
    eval_batch: int  # and in scoring
    compiled: bool
    fell_back: str | None  # why it is not compiled, where compiling failed


def compile(function: Callable) -> Callable:
    """torch.compile for shapes that stay; the function itself where $TORCH_COMPILE_DISABLE is 1."""
    # torch.compile honours the variable too, but first imports the compiler, which takes seconds.
    return torch.compile(function, dynamic=False) if _compiles() else function


def _compiles() -> bool:
    return os.environ.get("TORCH_COMPILE_DISABLE") != "1"


def fit(
    train_step: Callable[[int, int], None],
    score_step: Callable[[int], None],
    restore: Iterable[Tensor],
    rows: int,
    wanted: int,
    eval_wanted: int,
    budget: float,
    remedy: Callable[[Exception], str | None] | None = None,
) -> Warm:
    """Runs and so compiles both steps, with the largest batches that fit.

    train_step(batch, passes): a whole training step, optimizer included, of so many passes over
    `batch` rows each, on a dummy batch. score_step(batch): a forward pass in eval mode. restore: all
    tensors that either changes; they get their values back and lose their gradients. rows: of a step;
    the batch stays a divisor of it. wanted, eval_wanted: rows at a time to try first. budget: seconds,
    of which a step must not take more.

    What can go wrong is answered in one line each: out of memory, by a smaller batch (Fail where one
    row is too much); an error that `remedy` has an answer to, which it returns as a line; and else
    the compiler, by a fresh folder for its cache, then by running uncompiled. What fails even so is
    raised.
    """
    tensors = list(restore)
    saved = [tensor.detach().clone() for tensor in tensors]
    fitting = _Fitting(tensors, remedy)
    print("compiling: a minute or two the first time, seconds when the cache has it", flush=True)
    began = time.perf_counter()
    step_seconds = 0.0

    def train(batch: int):
        nonlocal step_seconds
        # The second pass adds to gradients, which takes memory of its own.
        passes = min(2, rows // batch)
        for _ in range(2):  # the second finds everything compiled and all memory allocated
            step_began = time.perf_counter()
            train_step(batch, passes)
            if tensors[0].device.type != "cpu":
                torch.accelerator.synchronize()
            step_seconds = (time.perf_counter() - step_began) * (rows // batch) / passes

    batch = fitting.largest("training", train, wanted, rows)
    eval_batch = fitting.largest("scoring", score_step, eval_wanted, eval_wanted)
    with torch.no_grad():
        for tensor, value in zip(tensors, saved):
            tensor.copy_(value)
            tensor.grad = None
    print(f"compiling and warm-up took {time.perf_counter() - began:.1f} s", flush=True)
    if step_seconds > budget:
        fail(
            f"a step takes {step_seconds:.0f} s and the budget is {budget} s: use fewer tokens a "
            "step, fewer layers or a smaller width"
        )
    is_compiled = _compiles() and fitting.uncompiled is None
    return Warm(batch, eval_batch, is_compiled, fitting.uncompiled)


class _Fitting:
    def __init__(self, tensors: list[Tensor], remedy: Callable | None):
        self.tensors = tensors
        self.remedy = remedy or (lambda error: None)
        self.fresh_cache = None  # the folder, once there is one
        self.uncompiled = None  # why, once it is so
        if _compiles():
            use_compiler_cache(compiler_caches()[-1])

    def largest(self, what: str, step: Callable[[int], None], batch: int, rows: int) -> int:
        """The largest batch that `step` has room for: this one, or a smaller divisor of rows."""
        while True:
            try:
                step(batch)
                return batch
            except Exception as error:
                if out_of_memory(error):
                    batch = smaller(what, batch, rows)
                elif answer := self.remedy(error):
                    print(answer, flush=True)
                elif self.uncompiled or not _compiles():
                    raise
                else:
                    self.recompile_or_not(error)
            # Only here, where the error's frames hold no tensor any more.
            for tensor in self.tensors:
                tensor.grad = None
            gc.collect()
            torch.cuda.empty_cache()

    def recompile_or_not(self, error: Exception):
        # A process killed while compiling leaves half a file in the cache, which fails forever.
        from torch._inductor.utils import clear_caches

        reason = root_cause(error)
        if self.fresh_cache is None:
            caches = compiler_caches()
            self.fresh_cache = Path(f"{caches[0]}-fresh-{len(caches)}")
            self.fresh_cache.mkdir(exist_ok=True)  # another run may be where this one is
            use_compiler_cache(self.fresh_cache)
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


def smaller(what: str, batch: int, rows: int) -> int:
    """The next divisor of rows, about half as large; says so in one line."""
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
    """The compiler's cache folder, and those made beside it because the one before was damaged."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    first = Path(re.sub(r"-fresh-\d+$", "", cache_dir()))
    caches = [first]
    while (following := Path(f"{first}-fresh-{len(caches)}")).is_dir():
        caches.append(following)
    return caches


def use_compiler_cache(folder: Path):
    """From here on the compilers keep what they make in this folder."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
