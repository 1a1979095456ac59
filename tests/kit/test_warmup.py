"""Warming up: the batch that fits, no trace left, and a compiler that fails."""

import itertools
import os
import re

import pytest
import torch
from forks import Forks

from autoresearch.kit import attention, warmup

T = 3  # the sequence


class Toy(torch.nn.Module):
    """A model and its training on a device with room for so many rows.

    Every step changes all there is to change.
    """

    def __init__(self, room=10**9, scoring_room=10**9):
        super().__init__()
        self.room = room
        self.scoring_room = scoring_room
        self.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        self.weight = torch.nn.Parameter(torch.arange(3.0))
        self.register_buffer("calls", torch.zeros(()))
        self.momentum = torch.arange(4.0)
        self.seen = []

    def forward(self, inputs):
        assert not self.training and not torch.is_grad_enabled()
        self.seen.append(("scoring", len(inputs)))
        self.calls.add_(1)
        if len(inputs) > self.scoring_room:
            raise self.error

    def forward_backward(self, model, inputs, targets, parts):
        assert self.training and inputs.shape == targets.shape == (len(inputs), T)
        self.seen.append(("training", len(inputs), parts))
        (self.weight * torch.randn(3)).sum().backward()
        if len(inputs) > self.room:
            raise self.error

    def optimizer_step(self):
        with torch.no_grad():
            self.weight.add_(1)
        self.momentum.mul_(2)
        self.weight.grad = None

    def fit(self, rows=8, device_batch=8, eval_rows=4, budget=1e9, attend=None):
        warm = warmup.fit(
            self,
            self.forward_backward,
            self.optimizer_step,
            attend,
            restore=[self.momentum],
            vocab_size=10,
            seq_len=T,
            tokens_per_step=rows * T,
            device_batch=device_batch,
            eval_tokens=8 * T,
            eval_rows=eval_rows,
            budget=budget,
        )
        assert torch.equal(self.weight, torch.arange(3.0)) and self.weight.grad is None
        assert torch.equal(self.momentum, torch.arange(4.0)) and self.calls == 0
        assert warm.parts * warm.batch == rows
        return warm.batch, warm.eval_batch


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")


def test_two_steps_as_training_makes_them_then_a_scored_batch_and_no_trace():
    toy = Toy()
    assert toy.fit(rows=8, device_batch=2) == (2, 4)
    # two passes, for the second adds to gradients
    assert toy.seen == [("training", 2, 2)] * 4 + [("scoring", 4)]
    toy = Toy()
    assert toy.fit(rows=8, device_batch=64, eval_rows=100) == (8, 8)
    assert toy.seen == [("training", 8, 1)] * 2 + [("scoring", 8)]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_halves_the_batch(capsys, error):
    toy = Toy(room=3, scoring_room=1)
    toy.error = error
    assert toy.fit() == (2, 1)
    out = capsys.readouterr().out
    assert re.findall(r"^out of memory (\w+ \d+) rows at a time: trying (\d)", out, re.M) == [
        ("training 8", "4"),
        ("training 4", "2"),
        ("scoring 4", "2"),
        ("scoring 2", "1"),
    ]


def test_the_smaller_batch_still_divides_the_rows():
    assert Toy(room=5).fit(rows=9, device_batch=9)[0] == 3


def test_no_room_for_one_row():
    with pytest.raises(SystemExit, match="FAIL: out of memory with a single row at a time: use"):
        Toy(room=0).fit()


def test_a_step_longer_than_the_budget_is_no_run(monkeypatch):
    """Two passes take a second, so the four of a step take two."""
    seconds = itertools.count()
    monkeypatch.setattr(warmup.time, "perf_counter", lambda: next(seconds))
    assert Toy().fit(rows=8, device_batch=2, budget=2) == (2, 4)
    with pytest.raises(SystemExit, match="FAIL: a step takes 2 s and the budget is 1 s"):
        Toy().fit(rows=8, device_batch=2, budget=1)


def test_too_little_shared_memory_is_answered_by_smaller_blocks(capsys):
    toy = Toy(room=3)
    toy.error = RuntimeError("OutOfMemoryError: out of resource: shared memory, Required: 131072")
    flex = attention.FlexAttention(64, {8}, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="shared memory"):  # once; here it does not help
        toy.fit(attend=attention.Attend("flex", flex))
    assert flex.kernel_options == attention.FlexAttention.SMALL_BLOCKS
    assert "attention: smaller blocks, because RuntimeError" in capsys.readouterr().out


def test_a_parameter_that_gets_no_gradient_is_named():
    toy = Toy()
    toy.unused = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(SystemExit, match="FAIL: no gradient reaches unused: use it in forward or"):
        toy.fit()


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
import torch
from autoresearch.kit import warmup

{before}
f = warmup.compile(lambda x: torch.tanh(x * 3))

class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("buffer", torch.zeros(1))

    def forward(self, inputs, *_):
        return f(torch.ones(len(inputs)))

warm = warmup.fit(
    Toy(), lambda model, *given: model(*given), lambda: None, None, restore=[], vocab_size=2, seq_len=1,
    tokens_per_step=2, device_batch=2, eval_tokens=2, eval_rows=2, budget=1e9,
)
assert torch.allclose(f(torch.ones(2)), torch.tensor(3.0).tanh())
print("compiled:", warm.compiled, "fell back:", warm.fell_back)
"""
        cache = str(tmp_path / "cache")
        ran = processes.run(python, TORCHINDUCTOR_CACHE_DIR=cache, TORCH_COMPILE_DISABLE=None)
        assert ran.lines and "Traceback" not in ran.log, ran.log
        failed = [line for line in ran.lines if line.startswith("compiling failed")]
        return [line for line in ran.lines if "compiled" in line], failed

    return warmed_up


COMPILED = ["compiled: True fell back: None"]


def test_compiled_for_training_is_the_function_itself_where_no_gradient_is_recorded(monkeypatch):
    monkeypatch.setattr(warmup, "compile", lambda function: lambda x: ("compiled", function(x)))
    double = warmup.compile_training(lambda x: 2 * x)
    assert double(3) == ("compiled", 6)
    with torch.no_grad():
        assert double(3) == 6


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


def test_what_does_not_compile_runs_uncompiled(warmed_up, tmp_path):
    no_compiler = "import torch._inductor.config\ntorch._inductor.config.cpp.cxx = ('/bin/false',)"
    lines, failed = warmed_up(no_compiler)
    (first,) = failed
    assert "InvalidCxxCompiler" in first
    said, outcome = lines
    assert said.startswith("not compiled, because compiling failed: InvalidCxxCompiler")
    assert outcome.startswith("compiled: False fell back: InvalidCxxCompiler")
    assert not (tmp_path / "cache-fresh-1").exists()  # it was not the cache's fault


def test_a_full_disk_is_no_damaged_cache(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    stances = []
    monkeypatch.setattr(torch.compiler, "set_stance", stances.append)
    wrapped = RuntimeError("backend failed")
    wrapped.inner_exception = OSError(28, "No space left on device")
    fitting = warmup._Fitting([], None)
    fitting.recompile_or_not(wrapped)
    assert stances == ["force_eager"] and os.listdir(tmp_path) == ["cache"]
    for said in (
        f"{tmp_path}/cache: the disk",
        "free some space",
        "or set TORCHINDUCTOR_CACHE_DIR",
    ):
        assert said in fitting.uncompiled
    assert fitting.uncompiled in capsys.readouterr().out
