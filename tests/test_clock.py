"""Small agent scripts that try to cheat the clock or hang, run as a user runs train.py."""
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import ROOT

AGENT = """
import os, sys, threading, time
sys.path.insert(0, {root!r})
{before}
import prepare, torch
torch.set_num_threads(1)
prepare._watchdog_limit = lambda budget: {limit}
from prepare import Tokenizer, make_dataloader, evaluate_bpb, clock
tokenizer = Tokenizer.from_directory()
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(300, 300))
    def forward(self, inputs):
        return self.table[inputs]
model = Model()
def train(seconds):
    end = os.times().elapsed + seconds
    while os.times().elapsed < end:
        with torch.no_grad():
            model.table.data += 1e-3
        threading.Event().wait(0.002)
loader = make_dataloader(tokenizer, 2, 64, "train")
{body}
print("val_bpb:", evaluate_bpb(model, tokenizer, 8))
"""


HANGS = {
    "python": "while True: pass",
    "deadlock": "lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "native code with the GIL": "import ctypes; ctypes.PyDLL(None).sleep(60)",
    "shutdown": "threading.Thread(target=time.sleep, args=(60,)).start(); sys.exit(0)",
}
CHILD = "import subprocess; child = subprocess.Popen(['sleep', '77']); print('child', child.pid)\nnext(loader)\n"
SOON = "prepare._now() - clock.made + 1"  # the watchdog's limit: a second from the loader's birth
TOO_LONG = {
    "hoarded": "batches = [next(loader) for _ in range(20)]\ntrain(7.5)",
    "asleep": "next(loader)\ntime.sleep(7.5)",
    "time replaced": "next(loader)\nfor name in ('time', 'monotonic', 'perf_counter'): setattr(time, name, lambda: 0.0)\ntrain(7.5)",
}
DEFAULTS = (None, "", 100)
SCRIPTS = {  # name: body, before the import, watchdog's limit
    "honest": ("assert clock.elapsed == clock.progress == 0 and not clock.expired\n"
               "train(1); assert clock.elapsed == 0; next(loader); a = clock.elapsed; train(1); assert 0.9 <= clock.elapsed - a and 0.45 <= clock.progress < 1\n"
               "next(loader); train(1.2); assert clock.expired and clock.progress == 1 < 2 <= clock.elapsed",),
    "replaced before": ("next(loader)\ntrain(3)", "time.monotonic = lambda: 0.0"),
    "thread": ("next(loader)\nthreading.Thread(target=train, args=(5,)).start()\nthreading.Event().wait(0.1)",),
    "second": ("next(loader)\nevaluate_bpb(model, tokenizer, 8)\nmodel.table.data += 1",),
    "called off": ("other = make_dataloader(tokenizer, 2, 64, 'train')\nnext(loader); del loader, other\ntime.sleep(4.5)", "", SOON),
    **{name: (body,) for name, body in TOO_LONG.items()},
    **{name: ((CHILD if "native" not in name else "") + body, "", SOON) for name, body in HANGS.items()},
}


@pytest.fixture(scope="module")
def runs(miniature, tmp_path_factory):
    """name -> (exit code, log, the ledger's records) of every script; most of their time they sleep, so four at a time."""
    def agent(item):
        name, (body, before, limit) = item
        directory = tmp_path_factory.mktemp("agent")
        (cache := directory / "cache").mkdir()
        for path in miniature.iterdir():
            if not path.name.endswith(".jsonl"):
                (cache / path.name).symlink_to(path)
        (script := directory / "agent.py").write_text(AGENT.format(root=str(ROOT), body=body, before=before, limit=limit))
        with open(log := directory / "run.log", "w") as file:
            code = subprocess.run([sys.executable, script], env={**os.environ, "AUTORESEARCH_CACHE": str(cache), "PYTHONUNBUFFERED": "1"},
                                  stdout=file, stderr=subprocess.STDOUT, timeout=50).returncode
        ledger = cache / "autoresearch.jsonl"
        return name, (code, log.read_text(), [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else [])
    with ThreadPoolExecutor(4) as pool:
        return dict(pool.map(agent, ((name, (*script, *DEFAULTS[len(script) :])) for name, script in SCRIPTS.items())))


def test_an_honest_run(runs):
    code, log, records = runs["honest"]
    assert code == 0 and "val_bpb:" in log, log
    start, end = records
    assert (start["event"], end["event"]) == ("start", "end") and start["run"] == end["run"]
    assert end["tokens"] == 2 * 2 * 64 and 2 <= end["training_seconds"] < 6 and f"{end['score']}" in log
    assert start["startup_seconds"] >= 1  # training before the first batch shows


@pytest.mark.parametrize("name", TOO_LONG)
def test_training_too_long_gets_no_score(runs, name):
    code, log, (_, end) = runs[name]
    assert code == 1 and log.splitlines()[-1].startswith("FAIL: trained ") and "val_bpb" not in log
    assert "score" not in end and end["failure"].startswith("trained") and end["training_seconds"] > 7


def test_time_replaced_before_the_import_shows_in_the_ledger(runs):
    """Who owns the process can fool the clock; the times of day in the ledger do not come from it."""
    _, _, (start, end) = runs["replaced before"]
    seconds = [time.mktime(time.strptime(r["time"], "%Y-%m-%dT%H:%M:%SZ")) for r in (start, end)]
    assert end["training_seconds"] == 0 and seconds[1] - seconds[0] >= 2


def test_a_thread_that_goes_on_training_gets_no_score(runs):
    code, log, (_, end) = runs["thread"]
    assert code == 1 and ("weights changed" in log or "other logits for the same input" in log) and "val_bpb" not in log and "score" not in end


def test_a_second_score_is_refused(runs):
    code, log, records = runs["second"]
    assert code == 1 and "scored already" in log.splitlines()[-1]
    assert [r["event"] for r in records] == ["start", "end"]


@pytest.mark.parametrize("name", HANGS)
def test_the_watchdog(runs, name):
    code, log, records = runs[name]
    assert code == 124 and log.splitlines()[-1].startswith("FAIL: timeout") and "val_bpb" not in log, log
    if "native" not in name:  # there nothing of Python can run any more
        assert records[-1]["failure"] == "timeout"
        child = Path("/proc", log.split("child ")[1].split()[0])
        assert not child.exists() or ") Z" in (child / "stat").read_text()


def test_the_watchdog_goes_with_the_last_loader(runs):
    assert runs["called off"][0] == 0, runs["called off"][1]
