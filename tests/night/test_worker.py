"""Real runs: how they end, what they are kept away from, and what is counted of them."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lab import MANIFEST, Lab, needs_proc

from autoresearch.common import signed
from autoresearch.night import settings, status, worker


@needs_proc
def test_a_night_with_all_that_a_run_can_do(lab):
    # message, options, edits, status, what its reason says
    # fmt: off
    events = [
        ("wider", ["--expect", "-0.018"], dict(WIDTH=1), "keep", "0.009900 better"),
        ("worse", ["--expect", "-0.003"], dict(WIDTH=-3), "discard", "worse than its base"),
        ("a tie", [], dict(COMMENT=1), "discard", "equal to its base"),
        ("without a comment", ["--simpler"], dict(COMMENT=2), "keep", "simpler"),
        ("a mistake", [], dict(EVENT=None), "crash", "NameError"),
        ("diverges", [], dict(EVENT="nan"), "crash", "loss diverged at step 4"),
        ("claims", [], dict(EVENT="claim"), "crash", "without a score in the ledger"),
        ("a megabyte", [], dict(EVENT="noise"), "crash", "one long line of bytes"),
        ("children", [], dict(EVENT="orphans", DEPTH=1), "keep", "better than its base"),
        ("hangs", [], dict(EVENT="hang"), "crash", "still running after 1 s"),
    ]
    # fmt: on
    for n, (message, options, edits, outcome, says) in zip(itertools.count(4), events):
        if message == "hangs":
            lab.until_idle()  # a supervisor reads the settings when it starts
            lab.set("- limit: 1")
        assert lab.attempt(message, *options, **edits) == n
        record = lab.until_ended(n)
        assert (record["status"], says in record["why"]) == (outcome, True), record
        told = lab.say("wait", 0)
        assert f"{n}: {outcome}" in told and says in told
        assert max(map(len, told.splitlines())) <= 200 and told.count("\n") <= 40  # a screen
        assert all(c.isprintable() for c in told.replace("\n", ""))
        if "--expect" in options:
            assert f"expected {float(options[1]):+.6f}, got {record['got']:+.6f}" in told
        if message == "children":
            assert lab.running() == []
    assert "predictions: 1 of 2 right in direction, 1 in size (within" in lab.say()
    lab.check()
    assert lab.best()["score"] == pytest.approx(0.98)
    assert (lab.best()["memory_gb"], lab.best()["steps"]) == (2.0, 100)  # the ledger's
    noise, hangs = lab.say("show", 11), lab.say("show", 13)
    assert "one long line of bytes" in noise and noise.replace("\n", "").isprintable()
    assert "+EVENT = 'hang'" in hangs and "40% 2.600 (2.600)" in hangs
    assert lab.say("runs").count(" scored") == 8  # three seeds, five experiments with a score


def test_steps_memory_phases_and_losses_are_those_of_the_locked_clock(tmp_path):
    train = """
import os, torch
from autoresearch.referee.clock import clock

device = torch.device("cpu")
clock.expect(device)
clock.describe(attention="sdpa", fell_back=[])
for step in range(21):
    clock.hand_out(100)
    clock.note_loss(3 - step / 10)
    while clock.elapsed < (step + 1) / 50:
        pass
clock.ask_score(device)
if "AUTORESEARCH_ROWS" in os.environ:  # as the evaluator asks
    os.write(int(os.environ["AUTORESEARCH_ROWS"]), b"?")
clock.end(score=0.5)
"""
    lab = Lab.made(tmp_path / "it", train=train)
    (lab.cache / "manifest.json").write_bytes(signed({**MANIFEST, "time_budget": 0.45}))
    lab.say("begin")
    lab.until(lambda: (lab.state_dir / "nov21/queue/1/end-1.json").is_file(), 60)
    lab.say("stop")
    end = json.loads((lab.state_dir / "nov21/queue/1/end-1.json").read_text())
    assert (end["score"], end["failure"], end["steps"], end["tokens"]) == (0.5, None, 21, 2100)
    assert 0.05 < end["memory_gb"] < 5 and end["conditions"]["attention"] == "sdpa"
    lines = worker.read_progress(lab.state_dir / "nov21/queue/1/progress-1.jsonl")
    phases = [phase for phase, _ in itertools.groupby(lines, lambda line: line["phase"])]
    assert phases == ["compiling", "training", "scoring"]
    curve = status.losses(lab.state_dir / "nov21/queue/1/progress-1.jsonl")
    assert status.loss_at(curve, 50) == pytest.approx(2, abs=0.3)
    lab.until_idle()


def test_a_run_that_the_watchdog_ended_says_where_to_look():
    log = "Timeout (0:05:00)!\nThread 0x\n"
    assert worker.why_it_failed(1, None, {}, log) == "timeout: it hung (the log shows where)"


@pytest.mark.parametrize(
    "code, said, score",
    [
        (0, dict(score=0.9, split="val"), 0.9),
        (0, dict(score=0.9, split="test"), None),  # a confirmation's split, not asked for
        (1, dict(score=0.9, split="val"), None),  # it failed after its score
        (0, dict(score=float("nan"), split="val"), None),
    ],
)
def test_a_score_counts_where_the_run_ended_well_on_the_split_that_was_asked_for(code, said, score):
    ended = dict(code=code, stopped=None, wall_seconds=1.0)
    end = worker.outcome(ended, [dict(event="start"), said], "log", "val")
    assert end["score"] == score and (end["failure"] is None) == (score is not None)


@pytest.mark.parametrize(
    "asked, scores, words",
    [(None, 1, "never asked for the rows"), (3.0, 2, "has 2 scores"), (3.0, 1, None)],
)
def test_a_score_that_another_hand_wrote_does_not_count(asked, scores, words):
    ended = dict(code=0, stopped=None, wall_seconds=9.0, asked_seconds=asked)
    records = [dict(event="start")] + scores * [dict(event="end", split="val", score=0.5)]
    end = worker.outcome(ended, records, "log", "val")
    assert end["score"] == (None if words else 0.5)
    assert end["failure"] is None if words is None else words in end["failure"]


def test_a_run_has_a_home_of_its_own_and_no_file_that_is_not_committed(lab):
    (lab.root / "helper.py").write_text("weights = 1\n")
    n = lab.attempt("leaves files behind", HOLD="a", EVENT="leaves")
    lab.until_held(n)
    folder = lab.state_dir / f"nov21/queue/{n}"
    tracked = {"left.bin", ".git", "train.py", "train.py.txt", "night.py", "prepare.py"}
    tracked |= {"program.md", ".gitignore", "autoresearch"}
    assert {path.name for path in (folder / "tree").iterdir()} == tracked
    assert [path.name for path in (folder / "home").iterdir()] == ["left"]
    links = [path for path in (folder / "tmp").iterdir() if path.name != "left"]
    assert [link.resolve() for link in links] == [lab.state_dir / "compiled"]  # torch's headers
    assert lab.until_ended(n, go="a")["status"] == "discard"
    (lab.root / "helper.py").unlink()
    lab.say()
    lab.check()


def test_a_run_has_no_network_and_cannot_write_the_cache_but_the_ledger(fresh, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(fresh.cache))
    isolation = worker.Isolation.here()
    if not isolation.prefix:
        pytest.skip(isolation.warning)
    code = (
        "import os, socket, sys\ncache = sys.argv[1]\n"
        "try:\n    socket.create_connection(('192.0.2.1', 9), timeout=5)\n"
        "except OSError as error:\n    print('network:', error.errno)\n"
        "try:\n    open(cache + '/x', 'w')\nexcept OSError as error:\n    print('cache:', error.errno)\n"
        "print('ledger:', open(cache + '/autoresearch.jsonl', 'a').write(''))\n"
    )
    command = [*isolation.prefix, sys.executable, "-c", code, str(fresh.cache)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split("\n")[:3] == ["network: 101", "cache: 30", "ledger: 0"], done.stderr


def test_a_machine_without_namespaces_says_so_in_the_status(fresh, tmp_path):
    lab = fresh.copy(tmp_path / "it")
    (tmp_path / "unshare").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "unshare").chmod(0o755)
    lab.env["PATH"] = f"{tmp_path}:{lab.env['PATH']}"
    lab.say("begin")
    lab.until_ended(3)
    assert "runs here are not cut off from the network" in lab.say()


def test_a_machine_that_cannot_hide_the_rows_says_so_in_the_status(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(fresh.cache))
    if not worker.Isolation.here().hides:
        pytest.skip(worker.Isolation.here().warning)
    lab = fresh.copy(tmp_path / "it")
    real = shutil.which("unshare")
    one_namespace = f'#!/bin/sh\n[ "$1 $2" = "-r sh" ] && exit 1\nexec {real} "$@"\n'
    (tmp_path / "unshare").write_text(one_namespace)
    (tmp_path / "unshare").chmod(0o755)
    lab.env["PATH"] = f"{tmp_path}:{lab.env['PATH']}"
    lab.say("begin")
    assert lab.until_ended(3)["score"] is not None
    said = lab.say()
    assert "can read the text that scores them" in said and "not cut off" not in said


def test_what_a_killed_compiler_had_in_hand_is_no_kernel_for_the_next_run(lab):
    compiled = lab.state_dir / "compiled/inductor"
    n = lab.attempt("compiles", EVENT="compiles")
    lab.until(lambda: (compiled / "half.main.so").exists())
    (compiled / "whole.main.so").touch()
    os.utime(compiled / "whole.main.so", (0, 0))
    lab.say("drop", n)
    assert lab.until_ended(n)["why"] == "dropped"
    assert [path.name for path in compiled.iterdir()] == ["whole.main.so"]


def test_a_slow_run_is_repeated_once_and_the_faster_one_counts(fresh, tmp_path):
    lab = fresh.copy(tmp_path / "it")
    # the second seed is slow by the others, and repeated before anything is compared with it
    lab.plan(r1=dict(rate=10_000, score=0.2))
    lab.say("begin")
    lab.until_ended(3)
    again = [record["again"] for record in lab.records()]
    assert again == [[], ["slow (50% of its expected rate)"], []]
    assert [record["score"] for record in lab.records()] == pytest.approx([1.0, 0.9999, 0.9998])
    assert "noise of a run 0.000105" in lab.say()
    slow = [[i / 4, 5000 * min(i, 10) + 100 * i] for i in range(1, 21)]  # 20,400 tokens/s at first
    # slow three times: nobody knows its score, whatever it was, and there is no fourth run
    slowed = dict(rate=6_000, pace=slow, score=-0.5)
    lab.plan(r4=slowed, r5=slowed, r6=slowed)
    record = lab.until_ended(lab.attempt("deeper", DEPTH=1))
    assert record["slow"] == pytest.approx(6_000 / 20_400)
    assert (record["status"], record["score"], len(record["again"])) == ("crash", None, 2)
    told = lab.say("wait", 0)
    assert "not measured: machine busy (29% of its expected rate, 3 tries)" in told
    assert "ran again: slow (29%" in told and f"again {record['n']}, when calm" in told
    assert f"{record['n'] + 1}: queued, the change of" in lab.say("again", record["n"])
    record = lab.until_ended(record["n"] + 1)
    assert (record["status"], record["score"]) == ("keep", pytest.approx(0.99))
    assert "has its score (keep, 0.990000)" in lab.refused("again", record["n"])
    lab.until_idle()
    lab.say()
    lab.check()


TWO_GPUS = "GPU 0: NVIDIA H200 (UUID: GPU-5c89)\nGPU 1: NVIDIA H200 (UUID: GPU-77aa)\n"
HALF_THE_CORES = [str(max(1, settings.cores() // 2))] * 2


@needs_proc
@pytest.mark.parametrize(
    "visible, name, seen",
    [
        (None, "CUDA_VISIBLE_DEVICES", ["0", "1"]),
        ("0,3", "CUDA_VISIBLE_DEVICES", ["0", "3"]),
        ("", "OMP_NUM_THREADS", HALF_THE_CORES),
    ],
)
def test_two_runs_at_once_see_a_gpu_each_or_share_the_cores(lab, tmp_path, visible, name, seen):
    del lab.env["CUDA_VISIBLE_DEVICES"]
    if visible is not None:
        lab.env["CUDA_VISIBLE_DEVICES"] = visible
        lab.set("- slots: 2")
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{TWO_GPUS}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    lab.env["PATH"] = f"{tmp_path}:{lab.env['PATH']}"
    numbers = [lab.attempt(f"idea {i}", HOLD="x", COMMENT=i) for i in range(2)]
    for n in numbers:
        lab.until_held(n)  # both at once
    found = []
    for pid in lab.running():
        with contextlib.suppress(OSError):
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
            found += [line for line in variables if line.startswith(f"{name}=")]
    assert sorted(found) == sorted(f"{name}={value}" for value in seen)
    lab.until_ended(numbers[0], go="x")
    for n in numbers[1:]:
        lab.until_ended(n)


def test_all_cells_of_a_grid_run_each_with_its_own_value_on_the_best(lab):
    small, large = lab.attempt("wider", WIDTH=1), lab.attempt("much wider", WIDTH=5, DEPTH=0.1)
    record = lab.until_ended(large)
    assert lab.record(small)["status"] == record["status"] == "keep"
    assert record["base"] == lab.record(small)["commit"]
    code = lab.git("show", f"{record['commit']}:train.py")
    assert "WIDTH = 5" in code and "DEPTH = 0.1" in code


def test_a_run_writes_bytecode_whatever_the_user_set(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    asked, run = {"seed": 42, "kind": "try"}, {"id": "one", "slot": {}}
    environment = worker.run_environment(tmp_path, tmp_path / "c", asked, run, tmp_path / "p")
    (tmp_path / "imported.py").write_text("")
    python = [sys.executable, "-c", "import imported"]
    subprocess.run(python, env=environment, cwd=tmp_path, check=True)
    assert list((tmp_path / "__pycache__").glob("imported.*.pyc"))
