"""
How far one supervisor goes: nights with 1 to 256 slots whose runs sleep for 0.5 to 2 s.

`uv run bench/bench.py --slots [SECONDS]` calls it. The supervisor, git, the queue and the ledger
are the real ones; a run is a shell that adds up its table, sleeps and writes its score, so that
processes cost as little as they can. An agent that is a process of its own keeps as many
experiments waiting as there are slots; one idea in ten is better, and what won on a best that has
moved runs again. Prints for each number of slots, over SECONDS (60) after the baseline:

runs/h, of ideal    runs that ended; in percent of slots / 1.25 s
again               of the runs, those made again on a new best, in percent
busy, git, fsync    percent of the time in which the supervisor did something, and what
gits/run            processes of git that a run took
own, beside ms      of the processors, a run: in the supervisor; in git, the run and its watcher
start s             a run's wall time beyond its sleep
open, look ms       experiments that wait or run at the end, and one look at all of them
status s            the command `night.py` then
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
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

SLOTS = [1, 4, 16, 64, 256]
PLACES = 200  # where an experiment's change may stand, so that two of them merge
SLEEPS = (0.5, 2.0)  # seconds, evenly between

STAND_IN = """
{places}
gain=$(({sum}))
say() {{
    sum=$(printf %s "$1}}" | sha256sum)
    line="$1,\\"checksum\\":\\"$(printf %.16s "$sum")\\"}}"
    printf '%s\\n' "$line" >> "$AUTORESEARCH_CACHE/autoresearch.jsonl"
}}
say '{{"event":"start","run":"'$AUTORESEARCH_RUN'","split":"val"'
first=0x${{AUTORESEARCH_RUN%??????????}}
sleep $(printf '%d.%03d' $((({first} + {span} * first / 255) / 1000)) \
    $((({first} + {span} * first / 255) % 1000)))
score='"score":'$((2000000 - gain))
say '{{"event":"end","run":"'$AUTORESEARCH_RUN'",'$score',"split":"val","tokens":9,"training_seconds":1'
printf 'peak_vram_mb: 1.0\\nnum_steps: 100\\n'
"""


def stand_in(values: list[int]) -> bytes:
    """The sleep goes by the run's id, evenly between SLEEPS."""
    places = "\n\n\n\n".join(f"P{i}={value}" for i, value in enumerate(values))
    total = "+".join(f"P{i}" for i in range(len(values)))
    first, last = (int(1000 * seconds) for seconds in SLEEPS)
    return STAND_IN.format(places=places, sum=total, first=first, span=last - first).encode()


def laboratory(folder: Path, slots: int) -> Path:
    """A repository with night.py, whose runs are shells, and a cache with a manifest."""
    root, cache = folder / "lab", folder / "cache"
    root.mkdir()
    cache.mkdir()
    for name in ("prepare.py", "program.md", ".gitignore"):
        shutil.copy(ROOT / name, root)
    shutil.copy(prepare.cache_dir() / "manifest.json", cache)
    os.environ["AUTORESEARCH_CACHE"] = str(cache)
    source = (ROOT / "night.py").read_text()
    command = "COMMAND = [sys.executable, EDITED]"
    assert command in source
    (root / "night.py").write_text(source.replace(command, 'COMMAND = ["/bin/sh", EDITED]'))
    with open(root / "program.md", "a") as page:
        page.write(f"\n- slots: {slots}\n")
    (root / "train.py").write_bytes(stand_in([0] * PLACES))
    identity = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
    for words in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "lab"]):
        subprocess.run(["git", *words], cwd=root, check=True)
    return root


def agent(the_night: night.Night, slots: int):
    """Keeps as many experiments waiting as there are slots, each made on the best of that moment."""
    for i in range(10**9):
        while True:
            experiments = the_night.open()
            if sum(e.state() == "waiting" for e in experiments) < max(night.LEAST_WAITING, slots):
                break
            time.sleep(night.PAUSE)
        base = night.best_of(the_night.records())["commit"]
        text = night.file_at(base).decode()
        values = [int(line.split("=")[1]) for line in text.splitlines() if line.startswith("P")]
        values[i % PLACES] += 1 if i % 10 == 0 else -1
        commit = night.commit_file(stand_in(values), base, f"idea {i}")
        night.enqueue(the_night, "try", commit, base, f"idea {i}", 42, change=str(i))


class Timed:
    """A function, and the seconds spent in it."""

    def __init__(self, function):
        self.function, self.seconds, self.calls = function, 0.0, 0

    def __call__(self, *arguments, **named):
        began = time.perf_counter()
        try:
            return self.function(*arguments, **named)
        finally:
            self.seconds += time.perf_counter() - began
            self.calls += 1


def one(slots: int, seconds: float) -> dict:
    """A night with so many slots, for so many seconds after its baseline."""
    with tempfile.TemporaryDirectory(prefix="slots-") as folder:
        root = laboratory(Path(folder), slots)
        night.ROOT = root
        night.COMMAND = ["/bin/sh", night.EDITED]
        night.wake = lambda _: None  # the supervisor works here
        with contextlib.redirect_stdout(None):
            night.begin(night.Night())
        the_night = night.Night()
        supervisor = night.Supervisor(the_night)
        supervisor.work()
        with the_night.hold("supervisor", 1):
            return played(the_night, supervisor, slots, seconds)


def played(
    the_night: night.Night, supervisor: night.Supervisor, slots: int, seconds: float
) -> dict:
    """The supervisor's work for so many seconds, beside an agent that is a process of its own."""
    feeder = os.fork()
    if feeder == 0:
        agent(night.Night(), slots)
    turn, git, sync = Timed(supervisor.turn), Timed(night.git_bytes), Timed(os.fsync)
    night.git_bytes, os.fsync = git, sync
    began, before = time.perf_counter(), os.times()
    try:
        pause = 0.0
        while time.perf_counter() < began + seconds:
            pause = 0.0 if turn() else min(pause + night.PAUSE / 10, 5 * night.PAUSE)
            time.sleep(pause)
        wall, after = time.perf_counter() - began, os.times()
    finally:
        os.kill(feeder, signal.SIGKILL)
        night.git_bytes, os.fsync = git.function, sync.function
    look = time.perf_counter()
    states = [e.state() for e in the_night.open()]
    look = time.perf_counter() - look
    command = time.perf_counter()
    subprocess.run([sys.executable, "night.py"], cwd=night.ROOT, check=True, capture_output=True)
    command = time.perf_counter() - command
    records = the_night.records()[len(night.BASELINE_SEEDS) :]
    done = [night.Experiment.at(the_night.done / str(record["n"])) for record in records]
    ended = [run for e in [*done, *the_night.open()] for run in e.runs() if "code" in run]
    finish(the_night)
    runs = len(ended)
    asleep = sum(sleep_of(run["id"]) for run in ended)
    return {
        "runs/h": 3600 * runs / wall,
        "of ideal": 100 * runs * statistics.mean(SLEEPS) / slots / wall,
        "again": 100 * sum(len(record["again"]) for record in records) / runs,
        "busy": 100 * turn.seconds / wall,
        "git": 100 * git.seconds / wall,
        "fsync": 100 * sync.seconds / wall,
        "gits/run": git.calls / runs,
        "own ms": 1000 * (after.user + after.system - before.user - before.system) / runs,
        "beside ms": 1000 * (children(after) - children(before)) / runs,
        "start s": (sum(run["wall_seconds"] for run in ended) - asleep) / runs,
        "open": len(states),
        "look ms": 1000 * look,
        "status s": command,
        "crashed": sum(record["status"] == "crash" for record in records),
    }


def children(times: os.times_result) -> float:
    """Seconds of the processors in git, in the processes beside the runs, and in the runs."""
    return times.children_user + times.children_system


def sleep_of(run_id: str) -> float:
    """Seconds for which the run with this id sleeps."""
    first, last = SLEEPS
    return first + (last - first) * int(run_id[:2], 16) / 255


def finish(the_night: night.Night):
    """Gives up what waits and runs, so that the folder can go."""
    for experiment in the_night.open():
        (experiment.folder / "drop").touch()
    while any(e.state() == "running" for e in the_night.open()):
        time.sleep(night.PAUSE)


def measure(seconds: float):
    """Prints the table."""
    cache = os.environ.get("AUTORESEARCH_CACHE", "")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for slots in SLOTS:
        if cache:
            os.environ["AUTORESEARCH_CACHE"] = cache  # whose manifest the laboratory takes
        row = one(slots, seconds)
        if slots == SLOTS[0]:
            print("slots", *(f"{name:>9}" for name in row), "     load")
        load = os.getloadavg()[0]
        print(
            f"{slots:5}", *(f"{value:9.2f}" for value in row.values()), f"{load:9.1f}", flush=True
        )
