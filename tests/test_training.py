"""The loop: warming up leaves no trace, batches are fitted, the log's form, and every way to fail as one line."""
import math
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import train

SMALL = dict(DEPTH=2, WIDTH=32, HEAD_DIM=16, KV_HEADS=1, WINDOW_PATTERN="SL", SHORT_WINDOW=1 / 4, TOKENS_PER_STEP=512, DEVICE_BATCH_SIZE=8,
             EVAL_TOKENS_AT_A_TIME=256)
V, T, ROWS = 50, 16, 8


# ----------------------------------------------------------------------------------------------------------- warming up

def setup():
    """A model and an optimizer with some steps behind them: no weight and no state is at its start."""
    model = train.GPT(train.hyperparameters("cpu", **SMALL), V, T).initialize(torch.Generator().manual_seed(0))
    optimizer = train.Optimizer(train.parameter_groups(model), compiled=False)
    for step in range(2):
        real_step(model, optimizer, ROWS, step)
    return model, optimizer


def real_step(model, optimizer, device_batch, seed=9):
    rows = torch.randint(V, (ROWS, T + 1), generator=torch.Generator().manual_seed(seed))
    for some in rows.split(device_batch):
        (model(some[:, :-1], some[:, 1:]) * (len(some) / ROWS)).backward()
    optimizer.step(1.0, 0.9, 1.0)


def everything(model, optimizer):
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers(), *optimizer.state_tensors())]


class Limited(torch.nn.Module):
    """The model on a device with room for so many rows in training and in scoring."""

    def __init__(self, model, rows=10**9, scored=10**9, error=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")):
        super().__init__()
        self.model, self.rows, self.scored, self.error, self.seen = model, rows, scored, error, []

    def forward(self, inputs, targets=None):
        self.seen.append((len(inputs), targets is not None, self.training))
        result = self.model(inputs, targets)
        if len(inputs) > (self.scored if targets is None else self.rows):  # as late as a real one may come
            raise self.error
        return result


def test_warming_up_leaves_no_trace():
    (model, optimizer), (twin, twins) = setup(), setup()
    before, random_state = everything(model, optimizer), torch.get_rng_state()
    warmed = Limited(model)
    assert train.warm_up(model, warmed, optimizer, ROWS, 4, 2) == (4, 2)
    assert all(map(torch.equal, everything(model, optimizer), before))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert warmed.seen == [(4, True, True)] * 4 + [(2, False, False)]  # two steps of two parts, then a batch of the evaluation
    for m, o in ((model, optimizer), (twin, twins)):
        real_step(m, o, 4)
    assert all(map(torch.equal, everything(model, optimizer), everything(twin, twins)))
    assert not torch.equal(everything(model, optimizer)[0], before[0])


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
])
def test_out_of_memory_while_warming_up_halves_the_batch(capsys, error):
    (model, optimizer), (twin, twins) = setup(), setup()
    before = everything(model, optimizer)
    assert train.warm_up(model, Limited(model, rows=3, error=error), optimizer, ROWS, 8, 4) == (2, 4)
    lines = capsys.readouterr().out.splitlines()
    assert [re.findall(r"\d+", line) for line in lines] == [["8", "4"], ["4", "2"]]
    assert all("out of memory" in line and "the tokens a step stay the same" in line for line in lines)
    assert all(map(torch.equal, everything(model, optimizer), before))
    for m, o in ((model, optimizer), (twin, twins)):
        real_step(m, o, 2)
    assert all(map(torch.equal, everything(model, optimizer), everything(twin, twins)))


def test_the_smaller_batch_still_divides_the_rows():
    model, optimizer = setup()
    assert train.warm_up(model, Limited(model, rows=5), optimizer, 9, 9, 1)[0] == 3


def test_an_evaluation_batch_that_does_not_fit_is_halved_alone(capsys):
    model, optimizer = setup()
    assert train.warm_up(model, Limited(model, scored=1), optimizer, ROWS, 8, 4) == (8, 1)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_no_room_for_one_row():
    model, optimizer = setup()
    with pytest.raises(SystemExit, match="FAIL: out of memory with a single row .* lower DEPTH or WIDTH"):
        train.warm_up(model, Limited(model, rows=0), optimizer, ROWS, 2, 2)


def test_a_parameter_that_no_gradient_reaches_is_named():
    model, _ = setup()
    model.blocks[0].idle = train.Linear(4, 4)
    optimizer = train.Optimizer(train.parameter_groups(model), compiled=False)
    with pytest.raises(SystemExit, match="FAIL: no gradient reaches blocks.0.idle.weight"):
        train.warm_up(model, model, optimizer, ROWS, 2, 2)


@pytest.mark.parametrize("tokens, seq_len, wish, parts", [
    (512, 64, 3, ["DEVICE_BATCH_SIZE 3 ", "TOKENS_PER_STEP 512", "2 and 4"]),
    (640, 64, 7, ["DEVICE_BATCH_SIZE 7 ", "TOKENS_PER_STEP 640", "5 and 10"]),
    (704, 64, 6, ["11 rows", "1 and 11"]),
    (512, 64, 0, ["DEVICE_BATCH_SIZE 0 ", "1 and 2"]),
    (500, 64, 4, ["TOKENS_PER_STEP 500", "64", "448 or 512"]),
    (30, 64, 4, ["TOKENS_PER_STEP 30", "such as 64"]),
    (0, 64, 4, ["TOKENS_PER_STEP 0", "such as 64"]),
])
def test_batches_that_do_not_divide(tokens, seq_len, wish, parts):
    with pytest.raises(SystemExit) as stop:
        train.rows_at_a_time(tokens, seq_len, wish)
    assert str(stop.value).startswith("FAIL: ") and all(part in str(stop.value) for part in parts), stop.value


def test_batches_that_divide():
    assert [train.rows_at_a_time(512, 64, wish) for wish in (1, 2, 4, 8, 100)] == [1, 2, 4, 8, 8]


# ------------------------------------------------------------------------------------------------------------ whole runs

def script(tmp_path, patch: str = "", **changes):
    """A train.py of its own: the real one with a small model, some values and some functions replaced."""
    path = tmp_path / "drive.py"
    path.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport prepare, torch, train\n"
                    "if os.environ.get('TORCH_COMPILE_DISABLE'):\n    torch.compile = lambda f, **_: f  # as the switch does, but without importing the compiler\n"
                    f"train.TABLE.update({ {**SMALL, **changes}!r})\n{patch}\ncode = train.run()\nsys.stdout.flush()\nos._exit(code)\n")
    return path


def start(path, cache, **options):
    environment = {"AUTORESEARCH_CACHE": str(cache), "TORCH_COMPILE_DISABLE": "1", **options.pop("environment", {})}
    environment = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    return subprocess.Popen([sys.executable, path], cwd=ROOT, env=environment, **options)


def log_of(path, cache, environment={}):
    """(exit code, stdout and stderr in one, as `> run.log 2>&1` writes them)."""
    process = start(path, cache, environment=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = process.communicate(timeout=200)[0]
    return process.returncode, log


def assert_failed(code, log, *parts):
    lines = log.splitlines()
    assert code == 1, log
    assert lines[-1].startswith("FAIL: ") and sum(line.startswith("FAIL: ") for line in lines) == 1, log
    assert "_bpb" not in log and all(part in lines[-1] for part in parts), log


# A clock that goes by rows handed out, so that two runs make the same steps; at the end, what the run is made of.
BY_STEPS = """
import hashlib
train.compute_dtype = lambda device: torch.float32
torch.use_deterministic_algorithms(True)
data, real_loader, real_score, Real = hashlib.sha256(), train.make_dataloader, train.evaluate_bpb, train.Optimizer
class Clock:
    rows, of = 0, 6 * train.TABLE["TOKENS_PER_STEP"] // prepare.MAX_SEQ_LEN
    progress = property(lambda self: self.rows / self.of)
    elapsed = property(lambda self: 1e9 * (self.rows >= self.of))
train.clock = Clock()
def loader(*arguments):
    for inputs, targets, epoch in real_loader(*arguments):
        train.clock.rows += len(inputs)
        data.update(inputs.numpy().tobytes())
        yield inputs, targets, epoch
class Optimizer(Real):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        globals()["optimizer"] = self
def score(model, *arguments):
    tensors = [*model.parameters(), *optimizer.state_tensors()]
    weights = hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()
    print("made of", data.hexdigest(), weights)
    return real_score(model, *arguments)
train.make_dataloader, train.Optimizer, train.evaluate_bpb = loader, Optimizer, score
"""
LIMITED = """
real_forward = train.GPT.forward
def forward(self, inputs, targets=None):
    if len(inputs) > 3 and targets is not None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    return real_forward(self, inputs, targets)
train.GPT.forward = forward
"""
NO_WARM_UP = """
train.warm_up = lambda model, compiled, optimizer, rows, device_batch, eval_batch: (device_batch, eval_batch)
"""


def outcome(tmp_path, miniature, patch="", environment={}, **changes):
    code, log = log_of(script(tmp_path, BY_STEPS + patch, **changes), miniature, environment)
    assert code == 0, log
    assert "num_steps: 6\n" in log
    return re.findall(r"^(?:made of.*|val_bpb.*|loss_curve.*)$", log, re.M), log


def test_the_same_seed_gives_the_same_run_however_it_warmed_up(tmp_path, miniature):
    wanted, log = outcome(tmp_path, miniature, DEVICE_BATCH_SIZE=2)
    assert len(wanted) == 3 and "device_batch_size: 2\n" in log
    assert outcome(tmp_path, miniature, NO_WARM_UP, DEVICE_BATCH_SIZE=2)[0] == wanted
    halved, log = outcome(tmp_path, miniature, LIMITED, DEVICE_BATCH_SIZE=8)
    assert halved == wanted and "device_batch_size: 2\n" in log
    assert [re.findall(r"\d+", line) for line in log.splitlines() if line.startswith("out of memory")] == [["8", "4"], ["4", "2"]]
    other, log = outcome(tmp_path, miniature, environment={"AUTORESEARCH_SEED": "7"}, DEVICE_BATCH_SIZE=2)
    assert "seed: 7\n" in log and other[1:] != wanted[1:] and other[0].split()[2] == wanted[0].split()[2]  # the data stay


def test_the_log_and_the_summary(tmp_path, miniature):
    code, log = log_of(script(tmp_path), miniature)
    assert code == 0, log
    head, summary = log.split("---\n")
    progress = [line for line in head.splitlines() if re.fullmatch(r" *\d+\.\d%  step +\d+  loss \d+\.\d{4}  +[\d,]+ tokens/s", line)]
    assert 12 <= len(progress) <= 21 and "\r" not in log and len(head.splitlines()) <= len(progress) + 6, log
    assert sum(line.startswith("attention: blocked, because") for line in head.splitlines()) == 1
    patterns = dict(
        val_bpb=r"\d\.\d{6}", training_seconds=r"\d\.\d", total_seconds=r"\d+\.\d", peak_vram_mb=r"\d+\.\d", mfu_percent=r"\d+\.\d\d",
        total_tokens_M=r"\d\.\d", num_steps=r"\d+", num_params_M=r"0\.0", depth="2", device=".+", attention="blocked",
        device_batch_size="8", seed="42", fingerprint="[0-9a-f]{12}", loss_curve=r"\d\.\d{3}( \d\.\d{3}){9}")
    pairs = [line.split(": ", 1) for line in summary.splitlines()]
    assert [key for key, _ in pairs] == list(patterns)
    values = dict(pairs)
    for key, pattern in patterns.items():
        assert re.fullmatch(pattern, values[key]), (key, values[key])
    assert 1.5 < float(values["training_seconds"]) < 2.6 and float(values["training_seconds"]) <= float(values["total_seconds"])
    assert float(values["total_tokens_M"]) == round(int(values["num_steps"]) * 512 / 1e6, 1)
    curve = [float(loss) for loss in values["loss_curve"].split()]
    assert curve[-1] < curve[0] < math.log(300) + 0.3


# Each: what to break, what the line must say.
FAILURES = {
    "not a number": ("train.TABLE['MUON_RATE'] = float('nan')", ["loss diverged at step 2", "nan"]),
    "exploding": ("real = train.GPT.forward\n"
                  "train.GPT.forward = lambda self, *inputs: real(self, *inputs) * 1000", ["loss diverged at step 1"]),
    "out of memory later": ("raised = torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')",
                            ["out of memory while training", "DEVICE_BATCH_SIZE"]),
    "the device is gone": ("raised = torch.AcceleratorError('CUDA error: unspecified launch failure\\nCompile with TORCH_USE')",
                           ["the device failed", "unspecified launch failure", "nvidia-smi"]),
    "a mistake": ("raised = KeyError('wdith')", ["KeyError: 'wdith'", "traceback is above"]),
    "sizes that do not fit": ("train.TABLE['WIDTH'] = 40", ["WIDTH 40 must be a multiple of HEAD_DIM 16"]),
    "batches that do not divide": ("train.TABLE['DEVICE_BATCH_SIZE'] = 3", ["DEVICE_BATCH_SIZE 3 does not divide", "2 and 4"]),
}
LATER = """
real_loader = train.make_dataloader
def loader(*arguments):
    for count, batch in enumerate(real_loader(*arguments)):
        if count == 5:
            raise raised
        yield batch
train.make_dataloader = loader
"""


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_line(tmp_path, miniature, name):
    patch, parts = FAILURES[name]
    assert_failed(*log_of(script(tmp_path, patch + LATER * patch.startswith("raised")), miniature), *parts)


def test_nothing_prepared(tmp_path):
    code, log = log_of(ROOT / "train.py", tmp_path / "empty")
    assert_failed(code, log, "uv run prepare.py")
    assert len(log.splitlines()) == 1


def test_what_does_not_compile_runs_uncompiled(tmp_path, miniature):
    environment = {"TORCH_COMPILE_DISABLE": None, "CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    code, log = log_of(script(tmp_path), miniature, environment)
    assert code == 0, log
    lines = log.splitlines()
    assert sum(line.startswith("not compiled, because compiling failed: ") for line in lines) == 1, log
    assert "Traceback" not in log and re.search(r"^val_bpb: \d\.\d{6}$", log, re.M)


@pytest.mark.parametrize("moment", ["importing", "training"])
def test_ctrl_c(tmp_path, miniature, moment):
    path = script(tmp_path) if moment == "training" else ROOT / "train.py"
    process = start(path, miniature, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = ""
    if moment == "importing":
        time.sleep(0.5)
    while moment == "training" and "tokens/s" not in log:
        log += process.stdout.readline()
    process.send_signal(signal.SIGINT)
    log += process.communicate(timeout=60)[0]
    assert_failed(process.returncode, log, "interrupted")
    assert "Traceback" not in log


@pytest.mark.parametrize("fails", [False, True])
def test_a_terminal_gets_one_line_rewritten(tmp_path, miniature, fails):
    ours, theirs = pty.openpty()
    process = start(script(tmp_path, "raised = KeyError('x')" + LATER if fails else ""), miniature, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        while some := os.read(ours, 1 << 16):
            seen += some
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    lines = seen.decode().replace("\r\n", "\n").split("\n")
    progress = [line for line in lines if "tokens/s" in line]
    assert len(progress) == 1 and progress[0].startswith("\r"), lines
    steps = [int(step) for step in re.findall(r"step +(\d+)", progress[0])]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 3
    if fails:
        assert process.wait(60) == 1 and lines[-2].startswith("FAIL: ") and lines[-1] == ""
    else:
        assert process.wait(60) == 0 and re.search(r"\r\033\[Kscoring after \d+ steps$", progress[0]) and lines[-2].startswith("loss_curve: ")


COMPILED_LOSS = """
import sys, types
text, old, new = open({path!r}).read(), {old!r}, {new!r}
assert not old or text.count(old) == 1
train = sys.modules["train"] = types.ModuleType("train")
exec(compile(text.replace(old, new) if old else text, {path!r}, "exec"), train.__dict__)
import torch
from torch._dynamo.utils import counters
x, weight, targets = torch.randn(8, 16), torch.randn(12, 16), torch.randint(12, (8,))
def gradients(function):
    a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = function(a, b, targets, 15.0)
    (loss * 2).backward()
    return torch.cat([loss.detach().view(1), a.grad.flatten(), b.grad.flatten()])
wanted = gradients(train.SoftcapCrossEntropy.apply)
found = gradients(torch.compile(lambda *a: train.SoftcapCrossEntropy.apply(*a), dynamic=False))
torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
print("hits", counters["aot_autograd"].get("autograd_cache_hit", 0))
"""


def test_the_compilers_cache_sees_every_edit_of_the_loss(tmp_path):
    """It is told to keep graphs with a custom backward pass: they come back for the same code, and only for that."""
    hits = []
    for old, new in (("", ""), ("", ""), ("dx.dtype) * dx", "dx.dtype) * dx * 0.5"), ("loss + (total.log()", "loss + (2 * total.log()")):
        done = subprocess.run([sys.executable, "-c", COMPILED_LOSS.format(path=str(ROOT / "train.py"), old=old, new=new)], cwd=ROOT,
                              capture_output=True, text=True, timeout=120, env={
                                  **os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        hits.append(done.stdout.split("hits ")[1].strip())
    assert hits == ["0", "1", "0", "0"]
