"""
A night of ten edits, alone or beside a program: `uv run bench/busy.py [--load]`.

    uv run prepare.py --demo --time-budget 20 --eval-tokens 65536

Real runs in a clone of this repository, with the small model of replay.py, not compiled. With --load a
program takes one core for half of each two seconds, so that two cores are a quarter busy. What is better
or worse on a quiet machine may become `not measured` beside it, and never the other thing.
"""

# ruff: noqa: E402  (the repository goes on the path first)
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.replay import applied, small_start, value

# A start with three rates far too low. Each edit's effect is large and known, and one has none.
POOR = {"HEAD_LR": "0.0003", "EMBEDDING_LR": "0.01", "MUON_LR": "0.002"}
TEN = [
    value("HEAD_LR", "0.004"),  # better
    value("WARMUP", "0.9"),  # worse
    value("EMBEDDING_LR", "0.3"),  # better
    value("HEAD_LR", "0.0002"),  # worse
    value("ROPE_BASE", "10_001"),  # neither
    value("MUON_LR", "0.04"),  # better
    value("EMBEDDING_LR", "0.002"),  # worse
    value("SOFTCAP", "1"),  # worse
    value("MUON_LR", "0.0005"),  # worse
    value("TOKENS_PER_STEP", "2**13"),  # worse: a quarter of the steps
]
SETTINGS = {"- tag: ": "- tag: busy", "- limit: ": "- limit: 300\n- calm: 60"}
TAKES_HALF_A_CORE = """
import time
while True:
    end = time.monotonic() + 1
    while time.monotonic() < end:
        pass
    time.sleep(1)
"""


def night(folder: Path) -> list[dict]:
    """The journal's records of the ten edits, each tried on the best so far."""
    clone = folder / "autoresearch"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    settings = (clone / "program.md").read_text().splitlines()
    for start, line in SETTINGS.items():
        settings = [line if old.startswith(start) else old for old in settings]
    (clone / "program.md").write_text("\n".join(settings) + "\n")
    code = small_start()
    for name, low in POOR.items():
        code = applied(value(name, low), code)
    (clone / "train.py").write_text(code)
    names = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
    subprocess.run(["git", *names, "commit", "-qam", "a poor start"], cwd=clone, check=True)
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    del environment["OMP_NUM_THREADS"]  # replay.py's; here a run has all cores

    def say(*words: str) -> str:
        command = [sys.executable, "night.py", *words]
        done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"night.py {words[0]}: {done.stderr}")
        return done.stdout

    def records() -> list[dict]:
        journal = clone / ".night/busy/journal.jsonl"
        lines = journal.read_text().splitlines() if journal.is_file() else []
        return [one for one in map(json.loads, lines) if one["kind"] in ("baseline", "try")]

    def until(count: int):
        while len(records()) < count:
            say("wait", "30")

    say("begin")
    until(3)
    for i, edit in enumerate(TEN):
        say()
        code = applied(edit, (clone / "train.py").read_text())
        (clone / "train.py").write_text(code)
        say("try", edit[0])
        until(4 + i)
        record = records()[-1]
        print(f"| {edit[0]} | {record['status']} | {record['why']} |", flush=True)
    print(say("audit"))
    say("stop")
    return records()


def main():
    parser = argparse.ArgumentParser(description="Ten edits, alone or beside a program.")
    parser.add_argument("--load", action="store_true")
    args = parser.parse_args()
    load = None
    if args.load:
        load = subprocess.Popen([sys.executable, "-c", TAKES_HALF_A_CORE])
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            found = night(Path(folder))
    finally:
        if load:
            load.kill()
    runs = sum(1 + len(record["again"]) for record in found)
    print(f"{runs} runs in {(time.monotonic() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
