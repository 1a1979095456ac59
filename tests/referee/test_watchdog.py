"""Small scripts that hang: the watchdog ends them, also in native code and at their end."""

import json

import pytest
from miniature import start_forked

AGENT = """
import sys, threading, time
import prepare
from autoresearch.referee import clock as clock_room
clock_room.START_LIMIT = 1
clock_room.training_limit = lambda budget: 1
loader = prepare.make_dataloader(prepare.Tokenizer.from_directory(), 2, 64, "train")
"""
HANGS = {
    "before the first batch": "time.sleep(60)",
    "in python": "next(loader)\nwhile True: pass",
    "in native code that holds the GIL": (
        "next(loader)\nimport ctypes; ctypes.PyDLL(None).sleep(60)"
    ),
    "at its end": (
        "next(loader)\nthreading.Thread(target=time.sleep, args=(60,)).start(); sys.exit(0)"
    ),
}


@pytest.mark.parametrize("name", HANGS)
def test_the_watchdog_ends_a_process_that_hangs(prepared_copy, tmp_path, name):
    script = tmp_path / "agent.py"
    script.write_text(AGENT + HANGS[name])
    process = start_forked(script, AUTORESEARCH_CACHE=str(tmp_path / "cache"))
    process.join()
    log = script.with_suffix(".log").read_text()
    assert process.exitcode == 1
    assert "Timeout (" in log and "most recent call first" in log
    ledger = tmp_path / "cache" / "autoresearch.jsonl"
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    events = [json.loads(line)["event"] for line in lines]
    assert events == ([] if name == "before the first batch" else ["start"])
