"""
What a long night costs: N experiments with a stand-in for train.py that takes some 10 ms.

`uv run bench/bench.py --night [N]` calls it. Prints, as the night grows, the seconds of the
supervisor itself for an experiment (from the queue into the table, less the run), and at its end
the seconds of each command. One experiment in ten is kept, and every second one waited on a best
that moved or did not.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import night  # noqa: E402
import prepare  # noqa: E402

PLACES = 200  # where an experiment's change may stand, so that two of them merge

STAND_IN = """
import hashlib, json, os
{places}
gain = sum(value for name, value in list(globals().items()) if name.startswith("PLACE"))
run = {"run": os.environ["AUTORESEARCH_RUN"], "split": "val"}

def write(**record):
    record = {**run, **record}
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    record["checksum"] = hashlib.sha256(canonical).hexdigest()[:16]
    with open(os.environ["AUTORESEARCH_CACHE"] + "/autoresearch.jsonl", "ab", buffering=0) as file:
        file.write(json.dumps(record).encode() + b"\\n")

write(event="start", time="2026-01-01T00:00:00Z")
for percent in range(5, 101, 5):
    print(f"{percent:6.1f}%  step {percent}  loss {3 - percent / 100:.4f}")
score = 2 - 1e-6 * gain
write(event="end", time="2026-01-01T00:00:00Z", score=score, tokens=100_000, training_seconds=5.0)
print(f"---\\nval_bpb: {score:.6f}\\npeak_vram_mb: 2048.0\\nnum_steps: 100")
"""


def stand_in(values: list[int]) -> bytes:
    places = "\n\n\n\n".join(f"PLACE{i} = {value}" for i, value in enumerate(values))
    return STAND_IN.replace("{places}", places).encode()


def laboratory(folder: Path) -> Path:
    """A repository with night.py as it is here, and a cache with the manifest of the prepared set."""
    root, cache = folder / "lab", folder / "cache"
    root.mkdir()
    cache.mkdir()
    for name in ("night.py", "prepare.py", "program.md", ".gitignore"):
        shutil.copy(ROOT / name, root)
    shutil.copy(prepare.cache_dir() / "manifest.json", cache)
    (root / "train.py").write_bytes(stand_in([0] * PLACES))
    os.environ["AUTORESEARCH_CACHE"] = str(cache)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    identity = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
    for words in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "lab"]):
        subprocess.run(["git", *words], cwd=root, check=True)
    return root


def measure(count: int):
    """A night of `count` experiments, in a folder of its own; needs a prepared set."""
    with tempfile.TemporaryDirectory(prefix="night-") as folder:
        root = laboratory(Path(folder))
        night.ROOT = root
        night.wake = lambda _: None  # the supervisor works here, in turn with the agent
        with contextlib.redirect_stdout(None):
            night.begin(night.Night())
        the_night = night.Night()
        supervisor = night.Supervisor(the_night)
        supervisor.work()
        spent: list[float] = []
        every = max(2, count // 10)
        while len(spent) < count:
            base = the_night.records() and night.best_of(the_night.records())["commit"]
            content = night.file_at(base)
            for i in (len(spent), len(spent) + 1):
                old = next(
                    line
                    for line in content.split(b"\n")
                    if line.startswith(b"PLACE%d " % (i % PLACES))
                )
                better = i % 10 == 0
                new = b"PLACE%d = %d" % (i % PLACES, int(old.split()[-1]) + (1 if better else -1))
                commit = night.commit_file(content.replace(old, new), base, f"idea {i}")
                change = night.change_id(base, commit)
                night.enqueue(the_night, "try", commit, base, f"idea {i}", 42, change=change)
            before = len(the_night.records())
            began = time.perf_counter()
            supervisor.work()
            seconds = time.perf_counter() - began
            runs = sum(record["wall_seconds"] or 0 for record in the_night.records()[before:])
            spent += [(seconds - runs) / 2] * 2
            if len(spent) % every < 2:
                own = statistics.mean(spent[-every:])
                print(
                    f"{len(spent):7,} experiments: {own:.3f} s of the supervisor's own for each",
                    flush=True,
                )
        records = the_night.records()
        kept = sum(record["status"] == "keep" for record in records)
        crashed = sum(record["status"] == "crash" for record in records)
        seconds = statistics.median(record["wall_seconds"] for record in records)
        print(
            f"{len(records):,} records, {kept} kept, {crashed} crashed; a run takes {seconds:.3f} s"
        )
        for words in (
            ["wait", "0"],
            [],
            ["try", "one more"],
            ["show", "5"],
            ["bring", "8"],
            ["runs"],
        ):
            print(
                f"{'night.py ' + ' '.join(words):26} {command_seconds(root, words):.2f} s",
                flush=True,
            )


def command_seconds(root: Path, words: list[str]) -> float:
    """The fastest of three: the machine may be busy."""
    seconds = []
    for attempt in range(3):
        if words[:1] == ["try"]:
            with open(root / "train.py", "a") as file:
                file.write(f"PLACES = {attempt}\n")
        if words[:1] == ["bring"]:
            subprocess.run(
                [sys.executable, "night.py", "bring", "best"], cwd=root, capture_output=True
            )
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "night.py", *words], cwd=root, capture_output=True, text=True
        )
        seconds.append(time.perf_counter() - began)
        assert done.returncode == 0, done.stderr
        if words[:1] == ["try"]:
            subprocess.run([sys.executable, "night.py", "supervise"], cwd=root, check=True)
            subprocess.run([sys.executable, "night.py"], cwd=root, capture_output=True)
    return min(seconds)
