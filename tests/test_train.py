"""The loop: warming up leaves no trace, batches are fitted, the log's form, and every way to fail
as one line."""

import itertools
import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

import pytest
import torch
from miniature import ROOT

import prepare
import train

SMALL = dict(
    N_LAYER=2,
    N_EMBD=32,
    HEAD_DIM=16,
    N_KV_HEAD=1,
    WINDOW_PATTERN="SL",
    SHORT_WINDOW=1 / 4,
    TOKENS_PER_STEP=512,
    DEVICE_BATCH_SIZE=8,
    EVAL_BATCH_TOKENS=256,
)
V, T, ROWS = 50, 16, 8


# ---------------------------------------------------------------------------------- warming up


@dataclass
class Training:
    """A model and an optimizer with two steps behind them: nothing is at its start."""

    model: train.GPT
    optimizer: train.Optimizer

    @classmethod
    def begun(cls):
        hp = train.hyperparameters("cpu", **SMALL)
        model = train.GPT(hp, V, T).init_weights(torch.Generator().manual_seed(0))
        training = cls(model, train.Optimizer(train.parameter_groups(model), compiled=False))
        for step in range(2):
            training.step(ROWS, seed=step)
        return training

    def step(self, device_batch, seed=9):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(V, (ROWS, T + 1), generator=generator)
        for part in rows.split(device_batch):
            (self.model(part[:, :-1], part[:, 1:]) * (len(part) / ROWS)).backward()
        self.optimizer.step(1.0, 0.9, 1.0)

    def everything(self):
        tensors = [
            *self.model.parameters(),
            *self.model.buffers(),
            *self.optimizer.state_tensors(),
        ]
        return [tensor.detach().clone() for tensor in tensors]

    def warm_up(self, rows=ROWS, device_batch=ROWS, eval_batch=2):
        warm_up = train.WarmUp(self.model, self.optimizer)
        return warm_up.run(rows, device_batch, eval_batch)


def same(one, other):
    return all(map(torch.equal, one, other))


@pytest.fixture
def training():
    return Training.begun()


class Limited:
    """Makes the model one on a device with room for so many rows in training and in scoring."""

    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    def __init__(self, model, rows=10**9, scored=10**9):
        self.model = model
        self.forward = model.forward
        self.rows = rows
        self.scored = scored
        self.seen = []
        model.forward = self

    def __call__(self, inputs, targets=None):
        kind = "scoring" if targets is None else "training"
        self.seen.append((len(inputs), kind, self.model.training))
        result = self.forward(inputs, targets)
        room = self.scored if targets is None else self.rows
        if len(inputs) > room:  # as late as a real one may come
            raise self.error
        return result


def test_warming_up_leaves_no_trace(training):
    before, random_state = training.everything(), torch.get_rng_state()
    warmed = Limited(training.model)
    assert training.warm_up(device_batch=4, eval_batch=2) == (4, 2)
    assert same(training.everything(), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert training.model.training and all(p.grad is None for p in training.model.parameters())
    # two steps of two parts, then a batch of the evaluation
    assert warmed.seen == [(4, "training", True)] * 4 + [(2, "scoring", False)]

    twin = Training.begun()
    training.step(4)
    twin.step(4)
    assert same(training.everything(), twin.everything())
    assert not torch.equal(training.everything()[0], before[0])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_while_warming_up_halves_the_batch(training, capsys, error):
    before = training.everything()
    limited = Limited(training.model, rows=3)
    limited.error = error
    assert training.warm_up(device_batch=8, eval_batch=4) == (2, 4)
    lines = capsys.readouterr().out.splitlines()
    assert [re.findall(r"\d+", line) for line in lines] == [["8", "4"], ["4", "2"]]
    for line in lines:
        assert "out of memory training" in line and "the tokens a step stay the same" in line
    assert same(training.everything(), before)

    twin = Training.begun()
    training.step(2)
    twin.step(2)
    assert same(training.everything(), twin.everything())


def test_the_smaller_batch_still_divides_the_rows(training):
    Limited(training.model, rows=5)
    assert training.warm_up(rows=9, device_batch=9)[0] == 3


def test_an_evaluation_batch_that_does_not_fit_is_halved_alone(training, capsys):
    Limited(training.model, scored=1)
    assert training.warm_up(eval_batch=4) == (8, 1)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_no_room_for_one_row(training):
    words = "FAIL: out of memory with a single row .* lower N_LAYER or N_EMBD"
    with pytest.raises(SystemExit, match=words):
        Limited(training.model, rows=0)
        training.warm_up()


def test_a_parameter_that_no_gradient_reaches_is_named(training):
    model = training.model
    model.blocks[0].idle = train.Linear(4, 4)
    training.optimizer = train.Optimizer(train.parameter_groups(model), compiled=False)
    with pytest.raises(SystemExit, match="FAIL: no gradient reaches blocks.0.idle.weight"):
        training.warm_up()


@pytest.mark.parametrize(
    "tokens, wanted, words",
    [
        (512, 3, ["DEVICE_BATCH_SIZE 3 ", "TOKENS_PER_STEP 512", "2 and 4"]),
        (640, 7, ["DEVICE_BATCH_SIZE 7 ", "TOKENS_PER_STEP 640", "5 and 10"]),
        (704, 6, ["11 rows", "1 and 11"]),
        (512, 0, ["DEVICE_BATCH_SIZE 0 ", "1 and 2"]),
        (500, 4, ["TOKENS_PER_STEP 500", "64", "448 or 512"]),
        (30, 4, ["TOKENS_PER_STEP 30", "such as 64"]),
        (0, 4, ["TOKENS_PER_STEP 0", "such as 64"]),
    ],
)
def test_batches_that_do_not_divide(tokens, wanted, words):
    with pytest.raises(SystemExit) as stop:
        train.rows_at_a_time(tokens, 64, wanted)
    message = str(stop.value)
    assert message.startswith("FAIL: ") and all(word in message for word in words), message


def test_batches_that_divide():
    wanted = (1, 2, 4, 8, 100)
    assert [train.rows_at_a_time(512, 64, n) for n in wanted] == [1, 2, 4, 8, 8]


# ---------------------------------------------------------------------------- what is reported


def report(losses, total, capsys):
    """The curve and the printed lines of a run whose step i of `total` had losses[i]."""
    progress = train.Progress(tokens_per_step=1000, budget=100)
    for i, loss in enumerate(losses):
        progress.add(i + 1, i / total, torch.tensor(float(loss)))
    progress.close()
    return progress.curve(), capsys.readouterr().out.splitlines()


def test_the_curve_is_the_mean_of_each_tenth(capsys):
    curve, _ = report(range(40), 40, capsys)
    assert curve == [1.5, 5.5, 9.5, 13.5, 17.5, 21.5, 25.5, 29.5, 33.5, 37.5]


def test_a_tenth_without_a_step_shows_the_one_before(capsys):
    assert report([6, 4, 5], 3, capsys)[0] == [6, 6, 6, 4, 4, 4, 5, 5, 5, 5]
    assert report([6], 1, capsys)[0] == [6] * 10


def test_the_pace_shows_what_a_disturbed_run_could_have_made():
    progress = train.Progress(tokens_per_step=1000, budget=100)
    for tenth, steps in enumerate([12, 2, 2, 4]):
        for step in range(steps):
            progress.add(step, (tenth + 0.5) / 10, torch.tensor(3.0))
    progress.close()
    assert progress.pace() == "200 tokens/s, 1,200 in the fastest tenth"


def test_a_line_holds_the_mean_since_the_last(capsys):
    _, lines = report(range(100), 100, capsys)
    shown = [re.match(r" *([\d.]+)%  step +(\d+)  loss ([\d.]+) ", line) for line in lines]
    assert [match[2] for match in shown[:3]] == ["1", "6", "11"]
    assert [match[3] for match in shown[:3]] == ["0.0000", "3.0000", "8.0000"]
    assert [match[1] for match in shown[:3]] == ["0.0", "5.0", "10.0"]
    assert 19 <= len(lines) <= 20


class LossOnAGpu:
    """A loss that is there only when the device has got so far."""

    device = torch.device("cuda")

    def __init__(self, value):
        self.value = value
        self.waited_for = False

    def item(self):
        self.waited_for = True
        return self.value


def test_a_loss_on_a_gpu_is_read_one_step_late_and_the_last_one_at_the_end(capsys):
    progress = train.Progress(tokens_per_step=1000, budget=100)
    losses = [LossOnAGpu(value) for value in (6.0, 4.0, 5.0)]
    for i, loss in enumerate(losses):
        progress.add(i + 1, i / 3, loss)
        assert [loss.waited_for for loss in losses] == [number < i for number in range(3)]
    progress.close()
    assert progress.curve() == [6, 6, 6, 4, 4, 4, 5, 5, 5, 5]


@pytest.mark.parametrize("value", [math.nan, 101.0, math.inf])
def test_a_loss_that_diverged_ends_the_run(capsys, value):
    progress = train.Progress(tokens_per_step=1000, budget=100)
    progress.add(1, 0.0, torch.tensor(100.0))
    with pytest.raises(SystemExit, match=f"FAIL: loss diverged at step 2: it is {value}"):
        progress.add(2, 0.5, torch.tensor(value))


def test_the_rate_is_that_of_the_steps_since_the_last_line(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(train.time, "perf_counter", lambda: now)
    progress = train.Progress(tokens_per_step=1000, budget=100)
    for step in range(1, 11):
        now += 0.5
        progress.add(step, (step - 1) / 100, torch.tensor(3.0))
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert [re.search(r"([\d,]+) tokens/s", line)[1] for line in lines] == ["2,000", "2,000"]


# ------------------------------------------------------------------------------- the loop alone


class StandingClock:
    """A clock that only a batch moves."""

    elapsed = 0.0
    budget = 2.0

    @property
    def progress(self):
        return min(self.elapsed / self.budget, 1.0)


def loop(monkeypatch, seconds, parts=1):
    """train.train() on a model of one weight, its loss weight x the mean of the inputs.

    seconds: of a step, by its number; parts: batches that a step's eight rows come in. Returns
    (the weight's gradient in each step, the loss curve, the clock).
    """
    clock, weight, gradients = StandingClock(), torch.ones((), requires_grad=True), []
    monkeypatch.setattr(train, "clock", clock)
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock.elapsed)

    def batches():
        for step in itertools.count():
            for rows in torch.arange(8.0).split(8 // parts):
                clock.elapsed += seconds(step) / parts
                yield rows + step / 10, None, 1

    class Optimizer:
        def step(self, lr_multiplier, momentum, decay_multiplier):
            gradients.append(weight.grad.item())
            weight.grad = None

    def model(inputs, targets):
        return weight * inputs.mean()

    hp, report = train.hyperparameters("cpu"), train.Progress(tokens_per_step=1000, budget=100)
    steps = train.train(model, Optimizer(), hp, batches(), parts, clock.budget, report)
    assert steps == len(gradients)
    return gradients, report.curve(), clock


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_a_step_in_parts_is_the_step_in_one(monkeypatch, parts):
    """Gradient and reported loss are the mean over all rows of the step, 3.5 in the first."""
    gradients, curve, _ = loop(monkeypatch, lambda step: 0.21, parts)
    assert gradients == pytest.approx([3.5 + step / 10 for step in range(9)])
    assert curve == pytest.approx([3.5, 3.6, 3.7, 3.8, 3.9, 4.0, 4.1, 4.2, 4.3, 4.3])


@pytest.mark.parametrize("parts", [1, 8])
@pytest.mark.parametrize(
    "seconds",
    [
        lambda step: 0.03,
        lambda step: 0.3,
        lambda step: 1.1,
        lambda step: 0.5 if step in (9, 12) else 0.1,
    ],
    ids=["short", "long", "one", "a slow one that comes again"],
)
def test_the_last_step_is_the_last_that_fits(monkeypatch, seconds, parts):
    gradients, _, clock = loop(monkeypatch, seconds, parts)
    made = [seconds(step) for step in range(len(gradients))]
    assert clock.elapsed == pytest.approx(sum(made))
    assert clock.elapsed <= clock.budget < clock.elapsed + max(made)


# ---------------------------------------------------------------------------------- whole runs


@dataclass
class Run:
    """A run of train.py with a small model: rows of the table, and patches of tests/drive.py."""

    changes: dict = field(default_factory=dict)
    patches: tuple[str, ...] = ()

    def command(self):
        asked = dict(changes={**SMALL, **self.changes}, patches=self.patches)
        return [sys.executable, "tests/drive.py", json.dumps(asked)]


REAL = [sys.executable, "train.py"]


def start(command, cache, stdout=subprocess.PIPE, environment=None):
    """The process, its output in one stream, as `> run.log 2>&1` writes it."""
    env = {"AUTORESEARCH_CACHE": str(cache), "TORCH_COMPILE_DISABLE": "1", **(environment or {})}
    env = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=stdout, stderr=subprocess.STDOUT, text=True
    )


def log_of(command, cache, environment=None):
    """(exit code, log)."""
    process = start(command, cache, environment=environment)
    log = process.communicate(timeout=300)[0]
    return process.returncode, log


def assert_failed(code, log, *words):
    lines = log.splitlines()
    assert code == 1, log
    assert lines[-1].startswith("FAIL: "), log
    assert sum(line.startswith("FAIL: ") for line in lines) == 1, log
    assert "_bpb" not in log
    assert all(word in lines[-1] for word in words), log


@dataclass
class Outcome:
    """What a run of six steps was made of and came to."""

    data: str
    state: str
    val_bpb: str
    loss_curve: str


def outcome(cache, *patches, environment=None, **changes) -> tuple[Outcome, str]:
    run = Run(changes, ("by_steps", *patches))
    code, log = log_of(run.command(), cache, environment)
    assert code == 0, log
    assert "num_steps: 6\n" in log
    found = dict(re.findall(r"^(data|state|val_bpb|loss_curve):? (.*)$", log, re.M))
    return Outcome(**found), log


def test_the_same_seed_gives_the_same_run_however_it_warmed_up(miniature):
    wanted, log = outcome(miniature, DEVICE_BATCH_SIZE=2)
    assert "device_batch_size: 2\n" in log

    assert outcome(miniature, "no_warm_up", DEVICE_BATCH_SIZE=2)[0] == wanted

    halved, log = outcome(miniature, "three_rows_fit", DEVICE_BATCH_SIZE=8)
    assert halved == wanted and "device_batch_size: 2\n" in log
    lines = [line for line in log.splitlines() if line.startswith("out of memory")]
    assert [re.findall(r"\d+", line) for line in lines] == [["8", "4"], ["4", "2"]]

    seven = {"AUTORESEARCH_SEED": "7"}
    other, log = outcome(miniature, environment=seven, DEVICE_BATCH_SIZE=2)
    assert "seed: 7\n" in log
    assert other.data == wanted.data
    assert other.state != wanted.state and other.val_bpb != wanted.val_bpb


SUMMARY = dict(
    val_bpb=r"\d\.\d{6}",
    training_seconds=r"\d\.\d",
    total_seconds=r"\d+\.\d",
    peak_vram_mb=r"\d+\.\d",
    mfu_percent=r"\d+\.\d\d",
    total_tokens_M=r"\d\.\d",
    num_steps=r"\d+",
    num_params_M=r"0\.0",
    depth="2",
    device=".+",
    attention="blocked",
    device_batch_size="8",
    seed="42",
    fingerprint="[0-9a-f]{12}",
    loss_curve=r"\d\.\d{3}( \d\.\d{3}){9}",
    compiled="no",
    dtype="float32|bfloat16",
    torch=r"\d+\.\d+\.\d+.*",
    driver=r"none|\d+\.[\d.]+",
)


def test_the_log_and_the_summary(miniature):
    code, log = log_of(Run().command(), miniature)
    assert code == 0, log
    assert "\r" not in log
    head, summary = log.split("---\n")
    lines = head.splitlines()
    form = r" *\d+\.\d%  step +\d+  loss \d+\.\d{4}  +[\d,]+ tokens/s +\d s left"
    progress = [line for line in lines if re.fullmatch(form, line)]
    others = [line for line in lines if line not in progress]
    steps = int(re.search(r"^num_steps: (\d+)$", summary, re.M)[1])
    assert min(12, steps) <= len(progress) <= 21, log  # a busy machine makes few steps
    starts = ["attention: blocked, because", "", "mfu_percent will be 0", "compiling", "start-up: "]
    starts += ["training for 2 s", "scoring after ", "scored in "]
    assert all(map(str.startswith, others, starts)) and len(others) == len(starts), log

    pairs = [line.split(": ", 1) for line in summary.splitlines()]
    assert [key for key, _ in pairs] == list(SUMMARY)
    values = dict(pairs)
    for key, pattern in SUMMARY.items():
        assert re.fullmatch(pattern, values[key]), (key, values[key])
    seconds = float(values["training_seconds"])
    assert 1.5 < seconds < 2.6 and seconds <= float(values["total_seconds"])
    assert float(values["total_tokens_M"]) == round(int(values["num_steps"]) * 512 / 1e6, 1)
    curve = [float(loss) for loss in values["loss_curve"].split()]
    assert curve[-1] < curve[0] < math.log(300) + 0.3


def test_the_evaluation_batch_is_no_larger_than_the_rows_to_score(miniature, monkeypatch, prepared):
    asked = []

    def run(self, rows, device_batch, eval_batch):
        asked.append(eval_batch)
        raise train.Stop("far enough")

    for name, value in {**SMALL, "EVAL_BATCH_TOKENS": 2**20}.items():
        monkeypatch.setitem(train.TABLE, name, value)
    monkeypatch.setattr(train.WarmUp, "run", run)
    monkeypatch.setattr(train, "use_one_heap", lambda: None)
    with pytest.raises(SystemExit, match="far enough"):
        train.main()
    assert asked == [prepared.manifest()["eval_rows"]["val"]]


@dataclass
class Failure:
    name: str
    words: list[str]
    changes: dict = field(default_factory=dict)
    patches: tuple[str, ...] = ()

    def __str__(self):
        return self.name


FAILURES = [
    Failure(
        "not a number",
        ["loss diverged at step 2", "nan"],
        changes={"MUON_LR": math.nan},
    ),
    Failure(
        "exploding",
        ["loss diverged at step 1"],
        patches=("exploding",),
    ),
    Failure(
        "out of memory later",
        ["out of memory while training", "DEVICE_BATCH_SIZE"],
        patches=("out_of_memory_later",),
    ),
    Failure(
        "the device is gone",
        ["the device failed", "unspecified launch failure", "nvidia-smi"],
        patches=("device_gone",),
    ),
    Failure(
        "a mistake",
        ["KeyError: 'wdith'", "traceback is above"],
        patches=("mistake",),
    ),
    Failure(
        "sizes that do not fit",
        ["N_EMBD 40 must be a multiple of HEAD_DIM 16"],
        changes={"N_EMBD": 40},
    ),
    Failure(
        "batches that do not divide",
        ["DEVICE_BATCH_SIZE 3 does not divide", "2 and 4"],
        changes={"DEVICE_BATCH_SIZE": 3},
    ),
]


@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_a_failure_is_one_line(miniature, failure):
    command = Run(failure.changes, failure.patches).command()
    assert_failed(*log_of(command, miniature), *failure.words)


def test_nothing_prepared(tmp_path):
    code, log = log_of(REAL, tmp_path / "empty")
    assert_failed(code, log, "uv run prepare.py")
    assert len(log.splitlines()) == 1


def test_what_does_not_compile_runs_uncompiled(tmp_path, miniature):
    environment = {
        "TORCH_COMPILE_DISABLE": None,
        "CXX": "/bin/false",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    code, log = log_of(Run().command(), miniature, environment)
    assert code == 0, log
    said = [line for line in log.splitlines() if "compiling failed" in line]
    assert len(said) == 2 and all("InvalidCxxCompiler" in line for line in said), log
    assert said[0].endswith(f"cache-fresh-1, in case {tmp_path / 'cache'} is damaged")
    assert said[1].startswith("not compiled, because")
    assert re.search(r"^compiled: no$", log, re.M)
    assert not (tmp_path / "cache-fresh-1").exists()  # it was not the cache's fault
    assert "Traceback" not in log and re.search(r"^val_bpb: \d\.\d{6}$", log, re.M)


@pytest.mark.parametrize("moment", ["importing", "training"])
def test_ctrl_c(miniature, moment):
    process = start(REAL if moment == "importing" else Run().command(), miniature)
    log = ""
    if moment == "importing":
        time.sleep(0.5)
    else:
        while "tokens/s" not in log:
            log += process.stdout.readline()
    process.send_signal(signal.SIGINT)
    log += process.communicate(timeout=60)[0]
    assert_failed(process.returncode, log, "interrupted")
    assert "Traceback" not in log


def on_a_terminal(command, cache) -> tuple[int, list[str]]:
    """(exit code, the lines that a terminal gets)."""
    ours, theirs = pty.openpty()
    process = start(command, cache, stdout=theirs)
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        seen += part
    os.close(ours)
    return process.wait(60), seen.decode().replace("\r\n", "\n").split("\n")


@pytest.mark.parametrize("patches", [(), ("mistake",)], ids=["scored", "failed"])
def test_a_terminal_gets_one_line_rewritten(miniature, patches):
    code, lines = on_a_terminal(Run(patches=patches).command(), miniature)
    (progress,) = [line for line in lines if "tokens/s" in line]
    assert progress.startswith("\r")
    steps = [int(step) for step in re.findall(r"step +(\d+)", progress)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 3
    if patches:
        assert code == 1 and lines[-2].startswith("FAIL: ") and lines[-1] == ""
    else:
        assert re.search(
            r"\r\033\[Kscoring after \d+ steps: [\d,]+ tokens/s, [\d,]+ in the fastest tenth$",
            progress,
        )
        assert code == 0 and lines[-2].startswith("driver: ")


# ------------------------------------------------------------------------- the compiler's cache

WARM = """
import os, random, signal, sys, time
import torch, train

class Tiny(torch.nn.Module):
    seq_len, attend = 4, None

    def __init__(self, factor):
        super().__init__()
        self.head = train.Linear(4, 8)
        self.register_buffer("cos", torch.zeros(1))
        self.forward = torch.compile(lambda ids: torch.tanh(ids.float() * factor), dynamic=False)

def warm_up(factor):
    train.own_compiler_cache(train.compiler_caches()[-1])
    warm = train.WarmUp(Tiny(factor), optimizer=None)
    warm.fit("scoring", warm.score, 2, 2)
    print("uncompiled:", warm.uncompiled, flush=True)

def in_a_process(factor, kill_after=None):
    pid = os.fork()
    if pid == 0:
        os.setsid()
        warm_up(factor)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


def warmed_up(cache, what) -> str:
    environment = {
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        # What is compiled to try the processor and for later kernels takes longest.
        "TORCHINDUCTOR_VEC_ISA_OK": "0",
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
        "TORCH_COMPILE_DISABLE": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", WARM + what],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_damaged_cache_is_left_for_a_fresh_one(tmp_path):
    """Half a library in it, as a kill while compiling leaves it, would fail in every later run."""
    cache = tmp_path / "cache"
    damage = f"for path in pathlib.Path({str(cache)!r}).rglob('*.so'): os.truncate(path, 0)"
    what = f"in_a_process(3)\nimport pathlib\n{damage}\nin_a_process(3); in_a_process(3)"
    first, failed, once_more, later = warmed_up(cache, what).splitlines()
    assert failed.startswith("compiling failed (") and "file too short" in failed
    fresh = f"once more with a fresh cache, {cache}-fresh-1, in case {cache} is damaged"
    assert failed.endswith(fresh)
    assert {first, once_more, later} == {"uncompiled: None"}


def test_a_kill_while_compiling_does_not_leave_later_runs_uncompiled(tmp_path):
    """Compiling takes two to four seconds. Ten kills, at any moment: bench/RESULTS.md."""
    lines = warmed_up(tmp_path / "cache", "in_a_process(3, kill_after=2.5); in_a_process(3)")
    said = [line for line in lines.splitlines() if line.startswith("uncompiled: ")]
    assert said and set(said) == {"uncompiled: None"}, lines


# --------------------------------------------------------------------- devices that are not usable


class FakeFlex(train.FlexAttention):
    """Needs no GPU; its kernels are too large until they are made in small blocks."""

    def __init__(self):
        self.kernel_options = None

    def __call__(self, q, k, v, window):
        if self.kernel_options is None:
            try:
                raise ValueError(
                    "No valid triton configs. OutOfMemoryError: out of resource: shared memory, "
                    "Required: 131072, Hardware limit: 101376."
                )
            except ValueError as error:
                raise RuntimeError("backend='inductor' raised:") from error
        return train.sdpa_attention(q, k, v, window)


def test_attention_too_large_for_the_card_is_made_in_smaller_blocks(training, capsys):
    training.model.attend = FakeFlex()
    assert training.warm_up() == (8, 2)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("attention: smaller blocks, because ValueError: No valid triton configs")
    assert training.model.attend.kernel_options == train.FlexAttention.SMALL_BLOCKS


@pytest.mark.skipif(not torch.version.cuda, reason="needs a torch that is built for CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the card here is usable")
def test_a_card_that_torch_cannot_use_is_not_answered_by_hours_on_the_cpu(
    miniature, tmp_path, monkeypatch
):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-1)'\n")
    smi.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    code, log = log_of(REAL, miniature, {"PATH": path})
    words = ["RTX 4090", "cannot use it", f"CUDA {torch.version.cuda}", "AUTORESEARCH_DEVICE=cpu"]
    assert_failed(code, log, *words)
    # hidden on purpose, or asked for: the CPU it is
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(miniature))
    monkeypatch.setenv("PATH", path)
    for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("AUTORESEARCH_DEVICE", "cpu")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert prepare.training_device() == torch.device("cpu")
    monkeypatch.setenv("AUTORESEARCH_DEVICE", "gpu0")
    with pytest.raises(SystemExit, match="AUTORESEARCH_DEVICE is 'gpu0'"):
        prepare.training_device()
