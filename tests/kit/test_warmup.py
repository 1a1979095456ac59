"""Warming up: the batch that fits, no trace left, and a compiler that fails.

The steps are toys here: what is true of them is true of any model. test_train.py shows that a run of
the real one does not depend on its warm-up.
"""

import itertools
import re

import pytest
import torch
from forks import Forks

from autoresearch.kit import warmup


class Toy:
    """Steps on a device with room for so many rows. Each changes all there is to change."""

    def __init__(self, room=10**9, scoring_room=10**9):
        self.room = room
        self.scoring_room = scoring_room
        self.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        self.weight = torch.arange(3.0).requires_grad_()
        self.state = torch.arange(4.0)
        self.seen = []

    def train_step(self, batch, passes):
        self.seen.append(("training", batch, passes))
        assert passes == 1 or self.weight.grad is None  # a failed step left no gradient
        for _ in range(passes):
            (self.weight * torch.randn(3)).sum().backward()
        if batch > self.room:  # as late as a real one may come
            raise self.error
        with torch.no_grad():
            self.weight.add_(1)
        self.state.mul_(2)
        self.weight.grad = None

    def score_step(self, batch):
        self.seen.append(("scoring", batch))
        self.state.add_(1)
        if batch > self.scoring_room:
            raise self.error

    def fit(self, rows=8, wanted=8, eval_wanted=4, budget=1e9, remedy=None):
        tensors = [self.weight, self.state]
        warm = warmup.fit(
            self.train_step, self.score_step, tensors, rows, wanted, eval_wanted, budget, remedy
        )
        assert torch.equal(self.weight, torch.arange(3.0)) and self.weight.grad is None
        assert torch.equal(self.state, torch.arange(4.0))
        return warm.batch, warm.eval_batch


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")


def said(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if "compiling" not in line]


def test_two_steps_as_training_makes_them_then_a_scored_batch_and_no_trace(capsys):
    toy = Toy()
    assert toy.fit(rows=8, wanted=2, eval_wanted=4) == (2, 4)
    # two passes, for the second adds to gradients
    assert toy.seen == [("training", 2, 2), ("training", 2, 2), ("scoring", 4)]
    toy = Toy()
    toy.fit(rows=8, wanted=8)
    assert toy.seen[:2] == [("training", 8, 1)] * 2
    assert said(capsys) == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_halves_the_batch(capsys, error):
    toy = Toy(room=3)
    toy.error = error
    assert toy.fit() == (2, 4)
    lines = said(capsys)
    assert [re.findall(r"\d+", line) for line in lines] == [["8", "4"], ["4", "2"]]
    for line in lines:
        assert "out of memory training" in line and "the tokens a step stay the same" in line


def test_the_smaller_batch_still_divides_the_rows():
    assert Toy(room=5).fit(rows=9, wanted=9)[0] == 3
    assert Toy(room=5).fit(rows=12, wanted=12)[0] == 3  # 12, 6, 3: halves, as long as they divide


def test_an_evaluation_batch_that_does_not_fit_is_halved_alone(capsys):
    assert Toy(scoring_room=1).fit() == (8, 1)
    lines = said(capsys)
    assert len(lines) == 2 and all("out of memory scoring" in line for line in lines)


def test_no_room_for_one_row():
    with pytest.raises(SystemExit, match="FAIL: out of memory with a single row at a time: use"):
        Toy(room=0).fit()


def test_a_step_longer_than_the_budget_is_no_run(monkeypatch):
    """Two passes take a second, so the four of a step take two."""
    seconds = itertools.count()
    monkeypatch.setattr(warmup.time, "perf_counter", lambda: next(seconds))
    assert Toy().fit(rows=8, wanted=2, budget=2) == (2, 4)
    with pytest.raises(SystemExit, match="FAIL: a step takes 2 s and the budget is 1 s"):
        Toy().fit(rows=8, wanted=2, budget=1)


def test_a_remedy_is_asked_once_an_error_and_its_answer_is_a_line(capsys):
    toy = Toy(room=3)
    toy.error = RuntimeError("OutOfMemoryError: out of resource: shared memory, Required: 131072")
    asked = []

    def remedy(error):
        asked.append(error)
        toy.room = 8
        return "attention: smaller blocks"

    assert toy.fit(remedy=remedy) == (8, 4)
    assert asked == [toy.error] and said(capsys) == ["attention: smaller blocks"]


def test_an_error_that_nothing_answers_is_raised():
    toy = Toy(room=3)
    toy.error = KeyError("wdith")
    with pytest.raises(KeyError, match="wdith"):
        toy.fit(remedy=lambda error: None)


def test_uncompiled_on_request_is_no_fall_back():
    function = lambda: 7
    assert warmup.compile(function) is function
    warm = warmup.fit(lambda *_: 0, lambda _: 0, [torch.zeros(1)], 2, 2, 2, 1e9)
    assert (warm.compiled, warm.fell_back) == (False, None)


# ------------------------------------------------------------------------- the compiler's cache


@pytest.fixture(scope="module")
def processes():
    environment = {
        # What is compiled to try the processor and for later kernels takes longest.
        "TORCHINDUCTOR_VEC_ISA_OK": "0",
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
        "TORCH_COMPILE_DISABLE": "0",
    }
    forks = Forks("import torch, torch._dynamo, torch._inductor.compile_fx", **environment)
    yield forks
    forks.close()


@pytest.fixture
def warmed_up(processes, tmp_path):
    """Another process compiles tanh(3 x) in the cache `tmp_path / "cache"`: what it says of it."""

    def warmed_up(before=""):
        python = f"""
import os, pathlib, signal, threading, time
import torch
from autoresearch.kit import warmup

{before}
f = warmup.compile(lambda x: torch.tanh(x * 3))
step = lambda batch, passes=1: f(torch.ones(batch))
warm = warmup.fit(step, step, [torch.zeros(1)], 2, 2, 2, 1e9)
assert torch.allclose(f(torch.ones(2)), torch.tensor(3.0).tanh())
print("compiled:", warm.compiled, "fell back:", warm.fell_back)
"""
        ran = processes.run(
            python,
            TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
            TORCH_COMPILE_DISABLE=None,
        )
        assert ran.lines and "Traceback" not in ran.log, ran.log
        failed = [line for line in ran.lines if line.startswith("compiling failed")]
        return [line for line in ran.lines if "compiled" in line], failed

    return warmed_up


COMPILED = ["compiled: True fell back: None"]


def test_a_damaged_cache_is_left_for_a_fresh_one(warmed_up, tmp_path):
    """Half a library in it, as a kill while compiling leaves it, would fail in every later run."""
    cache = tmp_path / "cache"
    assert warmed_up() == (COMPILED, [])
    libraries = list(cache.rglob("*.so"))
    assert libraries
    for library in libraries:
        library.write_bytes(b"")
    outcome, (failed,) = warmed_up()
    assert outcome == COMPILED and "file too short" in failed
    fresh = f"once more with a fresh cache, {cache}-fresh-1, in case {cache} is damaged"
    assert failed.endswith(fresh)
    assert warmed_up() == (COMPILED, [])  # by now everybody uses the fresh one
    assert list((tmp_path / "cache-fresh-1").rglob("*.so"))


def test_a_kill_while_compiling_does_not_leave_later_runs_uncompiled(warmed_up):
    kill = "os.setsid(); threading.Timer(1.0, os.killpg, (0, signal.SIGKILL)).start()"
    warmed_up(kill)
    assert warmed_up()[0] == COMPILED


def test_what_does_not_compile_runs_uncompiled(warmed_up, tmp_path):
    no_compiler = "import torch._inductor.config\ntorch._inductor.config.cpp.cxx = ('/bin/false',)"
    lines, failed = warmed_up(no_compiler)
    (first,) = failed
    assert "InvalidCxxCompiler" in first
    said, outcome = lines
    assert said.startswith("not compiled, because compiling failed: InvalidCxxCompiler")
    assert outcome.startswith("compiled: False fell back: InvalidCxxCompiler")
    assert not (tmp_path / "cache-fresh-1").exists()  # it was not the cache's fault
