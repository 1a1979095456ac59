"""train.py as a whole: the loop, the log, the ways to fail, and six edits as an agent makes them."""

import difflib
import itertools
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from drive import SOURCE, edited, run_small, score
from forks import assert_failed
from miniature import ROOT

import train
from autoresearch.kit import report

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

    def batches():
        for step in itertools.count():
            for rows in torch.arange(8.0).split(8 // parts):
                clock.elapsed += seconds(step) / parts
                yield rows + step / 10, None, 1

    class Optimizer:
        def step(self, lr_multiplier, momentum, decay_multiplier):
            assert lr_multiplier == train.lr_multiplier(train.CPU, clock.progress)
            assert momentum == train.muon_momentum(train.CPU, len(gradients))
            assert decay_multiplier == 1 - clock.progress
            gradients.append(weight.grad.item())
            weight.grad = None

    class Model(torch.nn.Module):
        training = False  # as the warm-up leaves it

        def forward(self, inputs, targets):
            return weight * inputs.mean()

    model, progress = Model(), report.Progress(tokens_per_step=1000, budget=100)
    train.train(model, Optimizer(), train.CPU, batches(), parts, clock.budget, progress)
    assert progress.steps == len(gradients) and model.training
    return gradients, progress.curve(), clock


@pytest.mark.parametrize("parts", [1, 8])
def test_a_step_in_parts_is_the_step_in_one(monkeypatch, parts):
    """Gradient and reported loss are the mean over all rows of the step, 3.5 in the first."""
    gradients, curve, _ = loop(monkeypatch, lambda step: 0.21, parts)
    assert gradients == pytest.approx([3.5 + step / 10 for step in range(9)])
    assert curve == pytest.approx([3.5, 3.6, 3.7, 3.8, 3.9, 4.0, 4.1, 4.2, 4.3, 4.3])


@pytest.mark.parametrize("slow", [0.1, 0.5, 1.1])
def test_the_last_step_is_the_last_that_fits(monkeypatch, slow):
    """Also after a slow step that came before."""
    seconds = lambda step: slow if step in (0, 9, 12) else 0.1
    gradients, _, clock = loop(monkeypatch, seconds, parts=2)
    made = [seconds(step) for step in range(len(gradients))]
    assert clock.elapsed == pytest.approx(sum(made))
    assert clock.elapsed <= clock.budget < clock.elapsed + max(made)


# ---------------------------------------------------------------------------------- whole runs


@pytest.fixture
def trained(processes):
    """A run of train.py with the settings drive.SMALL, changes, and patches of drive.py."""

    def trained(*patches, terminal=False, interrupt_at=None, environment=None, **changes):
        arguments = ", ".join(f"{name}={value!r}" for name, value in changes.items())
        python = f"from math import nan\nimport drive\ndrive.run({patches!r}, {arguments})"
        return processes.run(python, terminal, interrupt_at, **(environment or {}))

    return trained


def test_the_same_seed_gives_the_same_run_however_it_warmed_up(trained):
    def outcome(*patches, **arguments):
        """What a run of six steps was made of and came to; its batch; its log."""
        ran = trained("by_steps", "noisy", *patches, **arguments)
        assert ran.code == 0 and ran.find("num_steps") == "6", ran.log
        same = [ran.find(key) for key in ("data", "state", "val_bpb", "loss_curve")]
        return same, ran.find("device_batch_size"), ran

    wanted, batch, _ = outcome(DEVICE_BATCH_SIZE=2)
    assert batch == "2"

    halved, batch, ran = outcome("three_rows_fit", DEVICE_BATCH_SIZE=8)
    assert halved == wanted and batch == "2"
    lines = [line for line in ran.lines if line.startswith("out of memory")]
    assert [re.findall(r"\d+", line) for line in lines] == [["8", "4"], ["4", "2"]]

    seven = {"AUTORESEARCH_SEED": "7"}
    (data, state, bpb, _), _, ran = outcome(environment=seven, DEVICE_BATCH_SIZE=2)
    assert ran.find("seed") == "7"
    assert data == wanted[0] and state != wanted[1] and bpb != wanted[2]


KEYS = """val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M num_steps
num_params_M depth device attention device_batch_size seed fingerprint loss_curve compiled dtype torch
driver"""


def test_the_log_the_summary_and_what_the_night_reads(trained, tmp_path, miniature):
    told = tmp_path / "progress"
    ran = trained("fallen_back", environment={"AUTORESEARCH_PROGRESS": str(told)})
    assert ran.code == 0 and "\r" not in ran.log, ran.log
    head, summary = ran.log.split("---\n")
    form = r" *\d+\.\d%  step +\d+  loss \d+\.\d{4}  +[\d,]+ tokens/s +\d s left"
    progress = [line for line in head.splitlines() if re.fullmatch(form, line)]
    others = [line for line in head.splitlines() if line not in progress]
    steps = int(ran.find("num_steps"))
    assert min(12, steps) <= len(progress) <= 21, ran.log  # a busy machine makes few steps
    starts = ["attention: blocked, because FlashAttention 3 is not usable", ""]
    starts += ["compiling: ", "compiling and warm-up took ", "training for 2 s, after "]
    starts += ["scoring after ", "scored in ", "mfu_percent is 0"]
    assert all(map(str.startswith, others, starts)) and len(others) == len(starts), ran.log

    values = dict(line.split(": ", 1) for line in summary.splitlines())
    assert list(values) == KEYS.split()
    assert re.fullmatch(r"\d\.\d{6}", values["val_bpb"])
    assert 1.5 < float(values["training_seconds"]) < 2.6
    assert float(values["total_tokens_M"]) == round(steps * 512 / 1e6, 1)
    assert (values["depth"], values["seed"], values["compiled"]) == ("2", "42", "no")
    curve = [float(loss) for loss in values["loss_curve"].split()]
    assert len(curve) == 10 and curve[-1] < curve[0] < math.log(300) + 0.3

    ended = last_in_ledger(miniature)
    assert ended["score"] == pytest.approx(float(values["val_bpb"]), abs=1e-6)
    assert ended["steps"] == steps and ended["device_batch"] == 8
    assert (ended["attention"], ended["compiled"]) == ("blocked", False)
    no_build = "FlashAttention 3 is not usable: RuntimeError: no build for this torch"
    assert ended["fell_back"] == [no_build, "no compiler"]
    assert ended["dtype"] == values["dtype"]
    said = [json.loads(line) for line in told.read_text().splitlines()]
    assert {line["phase"] for line in said} == {"compiling", "training", "scoring"}
    assert any(line.get("loss") for line in said)


def last_in_ledger(cache) -> dict:
    return json.loads((cache / "autoresearch.jsonl").read_text().splitlines()[-1])


FAILURES = {
    "not a number": ({"MUON_LR": math.nan}, ["loss diverged at step 2", "nan"]),
    "a batch": ({"DEVICE_BATCH_SIZE": 3}, ["DEVICE_BATCH_SIZE 3 must divide the 8 rows"]),
    "no whole rows": ({"TOKENS_PER_STEP": 500}, ["TOKENS_PER_STEP is no multiple of 64"]),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_line(trained, name):
    changes, words = FAILURES[name]
    assert_failed(trained(**changes), *words)


def test_a_terminal_gets_one_line_rewritten(trained):
    ran = trained(terminal=True)
    lines = ran.log.replace("\r\n", "\n").split("\n")
    (progress,) = [line for line in lines if "s left" in line]
    assert progress.startswith("\r")
    steps = [int(step) for step in re.findall(r"step +(\d+)", progress)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 3
    assert "\r\033[Kscoring after " in progress
    assert ran.code == 0 and lines[-2].startswith("driver: ")


def test_ctrl_c_while_training(trained, miniature):
    ran = trained(terminal=True, interrupt_at="tokens/s")
    assert_failed(ran, "interrupted: no score")  # in a line of its own, below the progress
    assert "Traceback" not in ran.log
    assert last_in_ledger(miniature)["failure"] == "interrupted: no score"


def test_what_is_prepared_is_checked_before_a_model_is_built(prepared, monkeypatch):
    def check_prepared(split):
        raise prepared.Fail("tokens.bin is damaged")

    monkeypatch.setattr(train, "check_prepared", check_prepared)
    monkeypatch.setattr(train, "build_model", lambda *_: pytest.fail("a model was built"))
    with pytest.raises(prepared.Fail, match="tokens.bin is damaged"):
        train.main()


# --------------------------------------------------------------------- as a person starts it


def started(cache, *arguments, script=ROOT / "train.py") -> str:
    """The log of a run that must fail."""
    ran = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "AUTORESEARCH_CACHE": str(cache), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 1, ran.stdout
    return ran.stdout


def test_options_are_refused(tmp_path):
    log = started(tmp_path, "--x")
    assert log.startswith("FAIL: train.py takes no options: ") and len(log.splitlines()) == 1


def test_nothing_prepared(tmp_path):
    log = started(tmp_path / "empty")
    assert log.startswith("FAIL: ") and "uv run prepare.py" in log and len(log.splitlines()) == 1


def test_a_mistake_that_shows_while_train_py_is_imported_is_one_line(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(edited([("class MLP(nn.Module):", "class MLP(nn.Modul):")]))
    log = started(tmp_path, script=script)
    assert log.splitlines()[-1].startswith("FAIL: AttributeError: module 'torch.nn' has no"), log
    assert log.count("FAIL: ") == 1 and "nn.Modul" in log  # the traceback is above


# ------------------------------------------------------------------------------------ six edits
# A library, no framework: each is an edit of train.py alone, in under 15 lines.

CHOOSE = "    attend = attention.choose(device, dtype, seq_len, set(layer_windows(hp, seq_len)))\n"
BUILD = "def build_model(\n"

ALIBI = """\
def alibi(q, k, v, window):
    position = torch.arange(q.shape[1], device=q.device)
    distance = position[:, None] - position
    slope = 2.0 ** -torch.arange(1, q.shape[2] + 1, device=q.device)[:, None, None]
    bias = (-slope * distance).masked_fill((distance < 0) | (distance > window), -torch.inf)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), enable_gqa=True)
    return y.transpose(1, 2)


"""

OFF_BY_ONE = """\
def softmax_off_by_one(q, k, v, window):
    position = torch.arange(q.shape[1], device=q.device)
    distance = position[:, None] - position
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k).float() * q.shape[3] ** -0.5
    weights = scores.exp() * ((distance >= 0) & (distance <= window))
    weights = (weights / (1 + weights.sum(-1, keepdim=True))).to(v.dtype)
    return torch.einsum("bhts,bshd->bthd", weights, v)


"""

LION = """\
class Lion(AdamW):
    def step(self, lr, momentum, decay_multiplier):
        p, exp_avg = self.params[0], self.state["exp_avg"]
        update = exp_avg.lerp(p.grad, 0.1).sign()
        p.mul_(1 - lr * self.weight_decay).sub_(lr * update)
        exp_avg.lerp_(p.grad, 0.01)


class Muon:
"""

# name: [(a text that stands once in train.py, what stands there then)]
EDITS = {
    "ALiBi in place of rotary embedding": [
        ("        q = norm(rotate(q, cos, sin))\n", "        q = norm(q)\n"),
        ("        k = norm(rotate(k, cos, sin))\n", "        k = norm(k)\n"),
        (BUILD, ALIBI + BUILD),
        (CHOOSE, "    attend = alibi\n"),
    ],
    "a factored head": [
        (
            "        self.head = Linear(hp.N_EMBD, vocab_size)\n",
            "        self.bottleneck = Linear(hp.N_EMBD, 16)\n"
            "        self.head = Linear(16, vocab_size)\n",
        ),
        (
            "        nn.init.zeros_(self.smear_gate.weight)\n",
            "        uniform(self.bottleneck.weight)\n"
            "        nn.init.zeros_(self.smear_gate.weight)\n",
        ),
        ("        return norm(x)\n", "        return norm(self.bottleneck(norm(x)))\n"),
        ("        *muon(matrices, ", "        *muon([*matrices, model.bottleneck.weight], "),
    ],
    "cross_entropy with a z-loss": [
        (
            "        return softcap_cross_entropy(\n"
            "            x.flatten(0, 1), self.head.weight, targets.flatten(), "
            "self.hp.SOFTCAP, self.loss_piece\n"
            "        )\n",
            "        logits = self.logits(x).flatten(0, 1)\n"
            "        z_loss = 1e-4 * logits.logsumexp(-1).square().mean()\n"
            "        return F.cross_entropy(logits, targets.flatten()) + z_loss\n",
        )
    ],
    "an attention function of its own": [
        (BUILD, OFF_BY_ONE + BUILD),
        (CHOOSE, "    attend = softmax_off_by_one\n"),
    ],
    "another optimizer for the head": [
        ("class Muon:\n", LION),
        (
            "        *adamw([model.head.weight], hp.HEAD_LR * width_lr, hp.HEAD_WEIGHT_DECAY),\n",
            "        Lion(model.head.weight, 0.1 * hp.HEAD_LR * width_lr, 0.1, (0.9, 0.99)),\n",
        ),
    ],
    "a second forward pass a step": [
        (
            "    loss = model(inputs, targets) / parts\n",
            "    half = inputs.shape[1] // 2\n"
            "    short = model(inputs[:, half:], targets[:, half:])  # without the first half\n"
            "    loss = (model(inputs, targets) + 0.1 * short) / parts\n",
        )
    ],
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_under_15_lines_trains_and_scores(processes, tmp_path, name):
    text = edited(EDITS[name])
    diff = difflib.unified_diff(SOURCE.splitlines(), text.splitlines(), n=0)
    assert sum(line.startswith("+") for line in diff) - 1 < 15  # without the header
    ran = run_small(processes, tmp_path, text)
    assert ran.code == 0 and score(ran) > 0, ran.log
    losses = [float(loss) for loss in ran.find("loss_curve").split()]
    assert losses[-1] < losses[0] - 0.1, ran.log
    if name.startswith("ALiBi"):
        assert ran.find("attention") == "alibi"


def test_a_change_of_one_number_is_a_diff_of_one_line():
    settings = SOURCE[SOURCE.index("class Settings:") : SOURCE.index("SIZES = {")]
    for line in settings.splitlines():
        # a class, a comment, or one name with one value
        assert re.fullmatch(r"|class .*|    #.*|    [A-Z0-9_]+ = [^,]+?(  #.*)?", line), line
