"""Small scripts that hang or train too long: the watchdog ends them, or they get no score."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from miniature import start_forked

AGENT = """
import os, sys, threading, time
import prepare, torch
torch.set_num_threads(1)
from autoresearch.referee import clock as clock_room
clock_room.START_LIMIT = {start_limit}
clock_room.training_limit = lambda budget: {limit}
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


@dataclass
class Agent:
    body: str
    start_limit: float = 1200  # the watchdog's, in seconds
    limit: float = 300


HANGS = {
    "before the first batch": Agent("time.sleep(60)", start_limit=1),
    "in python": Agent("next(loader)\nwhile True: pass", limit=1),
    "in native code that holds the GIL": Agent(
        "next(loader)\nimport ctypes; ctypes.PyDLL(None).sleep(60)", limit=1
    ),
    "at its end": Agent(
        "next(loader)\nthreading.Thread(target=time.sleep, args=(60,)).start(); sys.exit(0)",
        limit=1,
    ),
}
AGENTS = {
    "trains on in a thread": Agent(
        "next(loader)\nthreading.Thread(target=train, args=(5,)).start()\n"
        "threading.Event().wait(0.1)"
    ),
    **HANGS,
}


@dataclass
class Outcome:
    code: int
    log: str
    records: list[dict]


@pytest.fixture(scope="module")
def outcomes(miniature, tmp_path_factory) -> dict[str, Outcome]:
    """What became of every agent; most of their time they sleep, so four at a time."""

    def run(agent: Agent) -> Outcome:
        directory = tmp_path_factory.mktemp("agent")
        cache = directory / "cache"
        cache.mkdir()
        for path in miniature.iterdir():
            if not path.name.endswith(".jsonl"):
                (cache / path.name).symlink_to(path)
        script = directory / "agent.py"
        script.write_text(AGENT.format(**vars(agent)))
        process = start_forked(script, AUTORESEARCH_CACHE=str(cache))
        process.join()
        ledger = cache / "autoresearch.jsonl"
        lines = ledger.read_text().splitlines() if ledger.exists() else []
        log = script.with_suffix(".log").read_text()
        return Outcome(process.exitcode, log, [json.loads(line) for line in lines])

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(AGENTS, pool.map(run, AGENTS.values())))


def test_a_thread_that_goes_on_training_gets_no_score(outcomes):
    outcome = outcomes["trains on in a thread"]
    assert outcome.code and "val_bpb" not in outcome.log
    assert outcome.log.splitlines()[-1].startswith("FAIL: ")
    assert "score" not in outcome.records[-1]


@pytest.mark.parametrize("name", HANGS)
def test_the_watchdog_ends_a_process_that_hangs(outcomes, name):
    outcome = outcomes[name]
    assert outcome.code == 1 and "val_bpb" not in outcome.log
    assert "Timeout (" in outcome.log and "most recent call first" in outcome.log
    events = [record["event"] for record in outcome.records]
    assert events == ([] if name == "before the first batch" else ["start"])
