"""
A run's time and its end: the budget, the watchdog, and the one place where a run fails.

The clock starts with the first training batch and stops when the score is asked for.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import time
from pathlib import Path

from autoresearch.common import Fail, lock, sha256_of, utc
from autoresearch.referee.ledger import append_record
from autoresearch.referee.manifest import fingerprint, manifest, set_dir
from autoresearch.referee.provenance import describe_run, imported_files, peak_memory_mb
from autoresearch.referee.tampering import opened, replaced

START_LIMIT = 1200  # seconds to compile and warm up in: a slow machine with cold caches needs many
SAMPLE_SHARE = 0.05  # of the budget between two samples of a run's pace and loss

_now = time.monotonic  # bound here: whatever is done to `time` later, the clock keeps its own


class Clock:
    """The run's time. Everybody may use `elapsed`, `progress`, `expired` and `note_loss`.

    A step ends when the loop reads one of the first three, so the batches that a gradient is
    accumulated over are one step.
    """

    __slots__ = (
        "_made _began _ended _budget _script _script_sha256 _device _run _tokens _batches _steps "
        "_looked _step_began _longest_step _pace _losses _next_sample _conditions _set_lock"
    ).split()

    def __init__(self):
        self._made = _now()
        self._began = None
        self._ended = None
        self._budget = None  # seconds
        main_file = getattr(sys.modules["__main__"], "__file__", None)
        self._script = Path(main_file or "train.py").resolve()
        self._script_sha256 = None
        if self._script.is_file():  # now: as it is read, not as it is edited later
            self._script_sha256 = sha256_of(self._script)
        self._device = None
        self._run = None  # what the ledger says of it
        self._tokens = 0  # handed out, as are the batches
        self._batches = 0
        self._steps = 0
        self._looked = True  # has the loop read the clock since it drew the last batch?
        self._step_began = None
        self._longest_step = 0.0  # seconds
        self._pace = []  # [seconds, tokens handed out before]
        self._losses = []  # noted since the last sample
        self._next_sample = 0.0  # seconds
        self._conditions = {}
        self._set_lock = None  # while it is held, prepare.py does not replace the prepared set

    @property
    def elapsed(self) -> float:
        """Training seconds so far."""
        self._looked = True
        return self._seconds()

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, 0 to 1."""
        budget = self._budget or manifest()["time_budget"]
        return min(self.elapsed / budget, 1.0)

    @property
    def expired(self) -> bool:
        return self.progress >= 1.0

    def note_loss(self, loss: float):
        """A step's training loss, for the night to show while the run lasts. Scores nothing."""
        self._losses.append(float(loss))

    def _seconds(self) -> float:
        if self._began is None:
            return 0.0
        end = _now() if self._ended is None else self._ended
        return end - self._began

    # ------------------------------------------------------------------ called by locked code

    def expect(self, device):
        """A training loader exists. The first one begins the run and starts the watchdog."""
        if self._budget is None:
            self._device = device
            self._run = describe_run(self._script, self._script_sha256, device)
            self._budget = manifest()["time_budget"]
            self._next_sample = SAMPLE_SHARE * self._budget
            self._set_lock = lock(set_dir(), shared=True, wait=False)
            arm_watchdog(START_LIMIT)
            report_phase("compiling")

    def describe(self, **conditions):
        """Adds to the ledger's lines what changes a run's speed without being its code."""
        self._conditions |= conditions

    def hand_out(self, tokens: int):
        """A training batch of so many tokens leaves the loader."""
        if self._began is None:
            self._start()
        now = _now()
        if self._looked:
            self._longest_step = max(self._longest_step, now - self._step_began)
            self._step_began = now
            self._steps += 1
            self._looked = False
        if now - self._began >= self._next_sample:
            self._sample(now - self._began)
        self._batches += 1
        self._tokens += tokens

    def _start(self):
        if self._run is not None:  # None: the run has failed, and somebody caught it
            self._run["startup_seconds"] = round(_now() - self._made, 1)
            append_record({"event": "start", **self._run, **self._conditions, "time": utc()})
        if self._device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
        arm_watchdog(training_limit(self._budget))
        report_phase("training", percent=0)
        self._began = self._step_began = _now()

    def _sample(self, seconds: float):
        self._pace.append([round(seconds, 3), self._tokens])
        loss = sum(self._losses) / len(self._losses) if self._losses else None
        percent = round(100 * seconds / self._budget, 1)
        done = dict(steps=self._steps, tokens=self._tokens, seconds=seconds)
        report_phase("training", percent=percent, loss=loss, **done)
        self._losses = []
        interval = SAMPLE_SHARE * self._budget
        self._next_sample = (seconds // interval + 1) * interval

    def ask_score(self, device):
        """Stops the clock. Raises Fail for a run that gets no score whatever its model is."""
        if self._ended is not None:
            fail("this run has been scored already: one score for one training")
        if self._run is None or self._began is None:
            fail(
                "no training batch was drawn, or the run has failed: a score is for what a run "
                'learned from make_dataloader(tokenizer, B, T, "train")'
            )
        if device.type != "cpu":  # queued work is training too
            import torch

            torch.accelerator.synchronize(device)
        self._ended = _now()
        self._sample(self._seconds())
        report_phase("scoring")
        tolerance = max(self._longest_step, 0.01 * self._budget)
        if self._seconds() > self._budget + tolerance:
            fail(
                f"trained {round(self._seconds(), 1):g} s on a {self._budget} s budget: "
                "stop before the step that would not fit"
            )
        now, before = fingerprint(), self._run["fingerprint"]
        if now != before:
            fail(
                "the prepared set or the code that measures was changed during the run: its "
                f"fingerprint is {now}, this run began with {before}. Run again"
            )

    def end(self, **result):
        """Writes the run's last line in the ledger, with score=... or failure=... . Only once."""
        run = self._run
        self._run = None
        self.unlock()
        if run is None:
            return
        measured = {
            "training_seconds": round(self._seconds(), 3),
            "tokens": self._tokens,
            "batches": self._batches,
            "steps": self._steps,
            "longest_step_seconds": round(self._longest_step, 3),
            "peak_memory_mb": round(peak_memory_mb(self._device), 1),
            "pace": self._pace,
            "imported": imported_files(self._script),
            "replaced": replaced(),
            "opened": opened(),
        }
        time_and_result = {"time": utc(), **measured, **result}
        append_record({"event": "end", **run, **self._conditions, **time_and_result})

    def unlock(self):
        if self._set_lock is not None:
            self._set_lock.close()
            self._set_lock = None


clock = Clock()


def fail(message: str):
    """Ends the run without a score: into the ledger, then as Fail."""
    clock.end(failure=message)
    raise Fail(message)


def training_limit(budget: float) -> float:
    """Seconds from the first batch to the process's end, the score included."""
    return max(2 * budget, budget + 300)


def arm_watchdog(seconds: float):
    """Ends this process after so many seconds, whatever hangs, with exit code 1 and a traceback.

    Each call replaces the one before. The timer is a thread of C that needs no GIL. Nobody stops
    it: a process that hangs after its score must end too. Children live on, and the ledger has no
    end of this run.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)


def report_phase(phase: str, **values):
    """Appends a line for the night to the file that $AUTORESEARCH_PROGRESS names, if any."""
    path = os.environ.get("AUTORESEARCH_PROGRESS")
    if path:
        with contextlib.suppress(OSError), open(path, "a") as file:  # no reason to lose a run
            file.write(json.dumps({"phase": phase, "time": utc(), **values}) + "\n")
