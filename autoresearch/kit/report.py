"""
What a run prints: the progress line, the summary, and every failure as one line.

    report.begin()       first of all: no options, no garbage collection
    progress = report.Progress(tokens_per_step, budget)
    report.summary(...)
    report.guard(main)   last of all

It imports torch nowhere at its top: `begin` has to come before the seconds that takes.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from autoresearch.common import Fail, cores, file_problem, prepare_output, seed, split_name
from autoresearch.kit.errors import first_line, out_of_memory
from autoresearch.referee.clock import clock, fail
from autoresearch.referee.manifest import fingerprint, manifest
from autoresearch.referee.provenance import device_name, driver_version, peak_memory_mb

_STARTED = time.perf_counter()  # train.py imports this first

# ------------------------------------------------------------------------------- how a run ends


def begin():
    """Refuses options; from here on an error while train.py is imported is one FAIL line, too."""
    if len(sys.argv) > 1:
        raise Fail(
            "train.py takes no options: its settings are the constants in it, and a run's seconds "
            "are what `uv run prepare.py ... --time-budget N` prepared"
        )
    prepare_output()
    if cores() < (os.cpu_count() or 1):  # OpenMP does not see a container's quota
        os.environ.setdefault("OMP_NUM_THREADS", str(cores()))
    # Looking for cycles costs a second while importing and compiling, and stalls a training step.
    gc.disable()
    os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")
    # Triton's default changes with its version, and it warns where none is set.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    sys.excepthook = lambda kind, error, trace: end_failed(error)


def guard(main: Callable[[], float]) -> NoReturn:
    """Calls main(), which returns the score, and ends the process: with 0, or after one FAIL line."""
    try:
        if main() is None:
            fail("main() returned without a score")
    except BaseException as error:
        end_failed(error)
    sys.stdout.flush()
    os._exit(0)  # the interpreter's own way out takes a second and may hang


def end_failed(error: BaseException) -> NoReturn:
    """Ends the process with 1: the ledger has the reason, and the log's last line is `FAIL: ...`."""
    sys.stdout.flush()  # what was said stands before the traceback
    if not isinstance(error, Fail):
        try:
            fail(explain(error))
        except Fail as failure:
            error = failure
    if sys.stdout.isatty():
        print()  # below the progress
    sys.stdout.flush()
    print(error, file=sys.stderr, flush=True)
    os._exit(1)


def explain(error: BaseException) -> str:
    """What the FAIL line says; the traceback is printed before it where it can help."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted: no score"
    if isinstance(error, SystemExit):
        return f"exit({error.code!r}) was called before the end of main(): no score"
    if out_of_memory(error):
        return (
            "out of memory: lower DEVICE_BATCH_SIZE (the tokens a step can stay), N_LAYER or N_EMBD"
        )
    traceback.print_exception(error)
    if isinstance(error, OSError) and error.errno:
        return f"{file_problem(error)} (the traceback is above)"
    return f"{first_line(error)} (the traceback is above)"


# ------------------------------------------------------------------------------ while it trains

LINE_SHARE = 0.05  # of the budget between two lines of a log


class Progress:
    """The progress line, the loss curve, and the end of a run whose loss diverged.

    On a terminal one line rewritten in place, otherwise a plain line about every 5% of the budget.
    """

    def __init__(self, tokens_per_step: int, budget: float):
        self.tokens_per_step = tokens_per_step
        self.budget = budget  # seconds
        self.steps = 0
        self.closed = None  # when training ended, by time.perf_counter()
        self.terminal = sys.stdout.isatty()
        self.tenths = [[] for _ in range(10)]  # the losses, by tenth of the budget
        self.unread = None  # the last step: (share of the budget where it began, loss)
        self.since_line = []  # the losses since the last line
        self.line_time = time.perf_counter()  # of the last line
        self.next_line = 0.0  # share of the budget
        start_up = self.line_time - _STARTED
        print(f"training for {budget} s, after {start_up:.1f} s of start-up", flush=True)

    def add(self, share: float, loss):
        """A step that began at this share of the budget; loss: a 0-dim tensor.

        Reads the loss of the step before: waiting for this one's would leave a GPU idle.
        """
        self.read()
        self.steps += 1
        self.unread = (share, loss)
        if loss.device.type == "cpu":  # it is there already
            self.read()

    def read(self):
        """Reads the last step's loss. Fails the run where it is above 100 or not a number."""
        if self.unread is None:
            return
        share, loss = self.unread
        self.unread = None
        loss = loss.item()
        if not loss <= 100:
            advice = "Lower the rates or undo the last change"
            fail(f"loss diverged at step {self.steps}: it is {loss}. {advice}")
        clock.note_loss(loss)
        self.tenths[min(9, int(share * 10))].append(loss)
        self.since_line.append(loss)
        if self.terminal or share >= self.next_line:
            self.print_line(share)
            self.next_line = share + LINE_SHARE

    def print_line(self, share: float):
        now = time.perf_counter()
        count = len(self.since_line)
        loss = sum(self.since_line) / count
        rate = count * self.tokens_per_step / (now - self.line_time)
        line = f"{share:6.1%}  step {self.steps:5}  loss {loss:.4f}  {rate:9,.0f} tokens/s"
        line += f"  {(1 - share) * self.budget:4.0f} s left"
        # One write, so that a line that is interrupted has its end.
        print(f"\r{line}\033[K" if self.terminal else f"{line}\n", end="", flush=True)
        self.since_line = []
        self.line_time = now

    def close(self):
        """The last loss is read. Training is over, and the scoring begins."""
        self.read()
        if self.terminal:
            print("\r\033[K", end="", flush=True)
        print(f"scoring after {self.steps} steps", flush=True)
        self.closed = time.perf_counter()

    def curve(self) -> list[float]:
        """The mean loss of each tenth of the budget; without a step in it, the one before."""
        means = []
        for losses in self.tenths:
            means.append(sum(losses) / len(losses) if losses else means[-1])
        return means


# -------------------------------------------------------------------------------- after the score

# Up to four times, old text is worth about as much as new (Muennighoff et al., arXiv 2305.16264).
MANY_TIMES = 4


def train_tokens() -> int:
    """How many tokens the training split holds."""
    return sum(file["tokens"]["train"] for file in manifest()["tokens"])


def summary(
    bpb: float,
    progress: Progress,
    device,
    counts: tuple[int, float],
    depth: int,
    batch: int,
    conditions: dict,
):
    """The log's last lines, `key: value`. People's scripts read the first nine keys in this order.

    bpb: the score; progress: closed; device: a torch.device; counts: (parameters, FLOPs a token,
    forward and backward); batch: rows at a time; conditions: attention, compiled, dtype.
    """
    import torch

    from autoresearch.kit.device import peak_tflops

    now = time.perf_counter()
    print(f"scored in {now - progress.closed:.1f} s", flush=True)
    parameters, flops_per_token = counts
    tokens = progress.steps * progress.tokens_per_step
    peak = peak_tflops(device_name(device))
    if not peak:
        print(f"mfu_percent is 0: the peak of {device_name(device)} is not known", flush=True)
    if (times := tokens / train_tokens()) > MANY_TIMES:
        print(
            f"the training text was read {times:.1f} times: it may be learnt by heart; more text, or a "
            "smaller budget (prepare.py --time-budget), scores better",
            flush=True,
        )
    mfu = flops_per_token * tokens / clock.elapsed / (peak * 1e12) if peak else 0.0
    values = {
        f"{split_name()}_bpb": f"{bpb:.6f}",
        "training_seconds": f"{clock.elapsed:.1f}",
        "total_seconds": f"{now - _STARTED:.1f}",
        "peak_vram_mb": f"{peak_memory_mb(device):.1f}",
        "mfu_percent": f"{100 * mfu:.2f}",
        "total_tokens_M": f"{tokens / 1e6:.1f}",
        "num_steps": progress.steps,
        "num_params_M": f"{parameters / 1e6:.1f}",
        "depth": depth,
        "device": device_name(device),
        "attention": conditions["attention"],
        "device_batch_size": batch,
        "seed": seed(),
        "fingerprint": fingerprint(),
        "loss_curve": " ".join(f"{loss:.3f}" for loss in progress.curve()),
        "compiled": "yes" if conditions["compiled"] else "no",
        "dtype": conditions["dtype"],
        "torch": torch.__version__,
        "driver": driver_version() or "none",
    }
    print("---")
    for key, value in values.items():
        print(f"{key}: {value}", flush=True)
