"""
night.py: the mechanics of the night, so that program.md is plain English. Nobody edits it.

    uv run night.py                    where the night stands, and what comes next
    uv run night.py begin              the branch, the table of results, the baseline with three seeds
    uv run night.py try "..."          takes the edits of train.py as one experiment and queues it
    uv run night.py wait [SECONDS]     until something ended, 45 s at most
    uv run night.py show N             diff, losses beside the best's, end of the log
    uv run night.py bring N|best       N's change back into train.py; or train.py as the best has it
    uv run night.py drop N             gives up what waits or runs
    uv run night.py stop               ends what runs, for `begin` to run again; nothing starts
    uv run night.py runs [COUNT]       the ledger as a table
    uv run night.py audit              what speaks against the results
    uv run night.py confirm            baseline and best on the test split: is the gain real?

Notable, in the order of the rooms:
- what is kept is decided by three short functions of plain values: noise_floor, decide, disturbed
- commits are made by git's plumbing: the agent's index and files are touched by its own commands alone
- an experiment is a folder of files that are written once; it is open while it lies in `queue/`
- a detached supervisor starts what waits, each run in a worktree of its own, watched by a small
  process that ends the run with all its children at the limit
- each step of the bookkeeping may be done twice: whatever was cut off is finished by the next command

Standard library only; prepare.py is imported where its ledger is read, and cluster.py, which needs
Ray, where the night runs on a cluster. Linux and macOS.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import getpass
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, median, variance

# --------------------------------------------------------------------- what the night is about

EDITED = "train.py"  # the one file that may change
COMMAND = [sys.executable, EDITED]  # what a run is; it scores through prepare.py's ledger
SCORE = "val_bpb"  # the score's column in results.tsv
LOWER_IS_BETTER = True
TEST_SCORE = "test_bpb"  # the same on the split that nothing is selected on
SEED = "AUTORESEARCH_SEED"  # the variable that carries the seed
SPLIT = "AUTORESEARCH_SPLIT"  # and the one that names the split: val, or test in a confirmation
BASELINE_SEEDS = (42, 43, 44)  # the first is the seed of every experiment
CONFIRM_FROM = 45  # the first seed of a confirmation: one that nothing was selected on
CONFIRM_SEEDS = 3  # so many of baseline and best each, where no other number is said
PROGRESS = re.compile(r"^\s*(\d+(?:\.\d+)?)%.*?\bloss\s+(\S+)")  # a line of a run's log
SCORING = re.compile(r"^scoring\b")
MEMORY = re.compile(r"^peak_vram_mb:\s*([\d.]+)\s*$", re.M)  # MiB
STEPS = re.compile(r"^num_steps:\s*(\d+)\s*$", re.M)

# What the ledger says of a run that changes its score without being its code, and why it took
# something slower than the best.
CONDITIONS = ("fingerprint", "device", "attention", "compiled", "dtype", "torch", "driver")
FELL_BACK = "fell_back"

FEW_STEPS = 50  # a score after fewer measures the machine more than the idea
DISTURBED = 2 / 3  # of the expected tokens a second; below it something else used the machine
FAR_SLOWER = 1 / 3  # of the best's tokens a second; below it the machine is asked once more
UNMEASURED_FLOOR = 0.002  # of the score, while fewer than two runs of one commit have one
CUT_OFF = 3  # so often may a run be cut off before it is given up
LEAST_WAITING = 2  # experiments that may wait; more would be stale when they start
WAIT = 45  # seconds; agents' tools allow a command a minute or two
BEST_MOVED, HANDED_BACK = "the best moved", "handed back"  # how such a reason begins
COMPILER_WRITES = 10  # seconds; so long at most it writes one file, on a busy machine
SILENCE = 3  # seconds in which a cluster must answer
PAUSE = 0.05  # seconds between two looks at files that others write
SCREEN, WIDTH = 36, 110  # lines and columns of what a command prints between first and last line

LEDGER = "autoresearch.jsonl"  # in the prepared cache
OWN_NAMES = ("command", "compiled", "isolation", "supervisor")  # in .night, beside the tags
COLUMNS = ["commit", SCORE, "memory_gb", "status", "description"]
ROOT = Path(__file__).resolve().parent


class Refused(SystemExit):
    """What a command cannot do, in one line that says what to type; exit code 1."""

    def __init__(self, message: str):
        super().__init__("FAIL: " + one_line(message, 500))


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def one_line(text: str, most: int = WIDTH) -> str:
    """Printable, without tabs and newlines, cut to `most` characters."""
    text = printable(" ".join(str(text).split()))
    return text if len(text) <= most else text[: most - 4] + " ..."


# ---------------------------------------------------------------------------- deciding, plainly


def gain(score: float, other: float) -> float:
    """By how much `score` is better than `other`; negative where it is worse."""
    return other - score if LOWER_IS_BETTER else score - other


def noise_floor(records: list[dict]) -> float | None:
    """The least that a difference can mean: the widest range of one commit's scores.

    records: the night's, in any order; the baseline's seeds are runs of one commit, and every
    later repeat of a commit may only widen the floor. A run that was disturbed or that is not
    comparable does not count. None until a commit has two scores.
    """
    scores: dict[str, list[float]] = {}
    for record in records:
        doubtful = record.get("disturbed") or record.get("not_comparable")
        if record["score"] is not None and not doubtful:
            scores.setdefault(record["commit"], []).append(record["score"])
    return max((spread(some) for some in scores.values() if len(some) > 1), default=None)


def spread(scores: list[float]) -> float:
    return max(scores) - min(scores)


def best_of(records: list[dict]) -> dict | None:
    """The record that stands at the top of the branch: the one kept last."""
    return next((record for record in reversed(records) if record["status"] == "keep"), None)


def decide(
    score: float | None,
    best: float | None,
    floor: float | None,
    simpler: bool,
    record: float | None = None,
) -> tuple[str, str]:
    """(keep, discard or crash; why) for a score against the best one. The only place with this rule.

    record: the best score ever kept, where simpler code with a slightly worse one stands now; what
    is simpler is measured by it, so that many small losses cannot add up.
    """
    if score is None:
        return "crash", "no score"
    if best is None:
        return "keep", "the baseline"
    if floor is None:
        floor = UNMEASURED_FLOOR * abs(best)
    better = gain(score, best)
    if better > floor:
        return "keep", f"better by {better:.6f}, the noise floor is {floor:.6f}"
    if simpler and gain(score, best if record is None else record) >= -floor:
        return "keep", f"simpler, and equal within the noise floor of {floor:.6f}"
    if better == 0:
        return "discard", "equal to the best"
    words = f"{'better' if better > 0 else 'worse'} by {abs(better):.6f}"
    within = "which is within" if abs(better) <= floor else "more than"
    return "discard", f"{words}, {within} the noise floor of {floor:.6f}"


def rate(run: dict) -> float | None:
    """Tokens a second of training, from the ledger's exact counts; None where there are none."""
    if run.get("tokens") and run.get("training_seconds"):
        return run["tokens"] / run["training_seconds"]
    return None


def disturbed(run: dict, same_code: list[float]) -> float | None:
    """The share of its expected rate that a run reached, where that is under DISTURBED; else None.

    Expected is the best rate of the same code in another run (same_code: tokens a second), or over
    any quarter of the run itself (pace: [seconds, tokens] about every 5% of the budget).
    """
    own = rate(run)
    if own is None:
        return None
    expected = list(same_code)
    pace = run.get("pace") or []
    quarter = len(pace) // 4
    if quarter >= 2:
        for (began, before), (ended, after) in zip(pace, pace[quarter:]):
            if ended > began:
                expected.append((after - before) / (ended - began))
    share = own / max(expected, default=own)
    return share if share < DISTURBED else None


def better_than_best(records: list[dict]) -> dict | None:
    """What scored better than the best by more than the noise floor, and yet is not the best.

    A win on an older best that is in conflict with the new one. The best such record, or None.
    """
    best, floor = best_of(records), noise_floor(records)
    if best is None or floor is None:
        return None
    found = [
        record
        for record in records
        if record["score"] is not None
        and gain(record["score"], best["score"]) > floor
        and not record.get("disturbed")
        and not record.get("not_comparable")
    ]
    return max(found, key=lambda record: gain(record["score"], best["score"]), default=None)


def not_comparable(conditions: dict, baseline: dict) -> str | None:
    """In words what the machine did otherwise than for the baseline, or None.

    conditions, baseline: CONDITIONS and FELL_BACK of the two runs; what one does not know is not
    compared. Where both fell back alike, or not at all, another attention or an uncompiled run is
    the change's own.
    """
    known = [key for key in CONDITIONS if key in conditions and key in baseline]
    differ = [key for key in known if conditions[key] != baseline[key]]
    reasons = sorted({*conditions.get(FELL_BACK, [])} ^ {*baseline.get(FELL_BACK, [])})
    chosen = [] if reasons else ["attention", "compiled", "dtype"]
    differ = [key for key in differ if key not in chosen]
    if not differ:
        return None
    said = [f"{key} {conditions[key]}, not {baseline[key]} as the baseline" for key in differ]
    return "; ".join([*said, *reasons])


def calibration(records: list[dict], floor: float | None) -> tuple[int, int, int]:
    """(predictions, right in direction, right in size) of the experiments that said what to expect.

    A size is right within the noise floor or within a factor of two.
    """
    said = [r for r in records if r.get("expect") is not None and r.get("got") is not None]
    said = [r for r in said if not r.get("disturbed")]
    direction = sum(r["got"] * r["expect"] > 0 for r in said)
    size = 0
    for r in said:
        near = abs(r["got"] - r["expect"]) <= (floor or 0)
        ratio = r["got"] / r["expect"] if r["expect"] else 0
        if near or 0.5 <= ratio <= 2:
            size += 1
    return len(said), direction, size


def row_of(record: dict) -> str:
    """The record's line of results.tsv."""
    what = record["message"]
    if record["kind"] == "baseline":
        what = (
            "baseline"
            if record["seed"] == BASELINE_SEEDS[0]
            else f"baseline, seed {record['seed']}"
        )
    if record["simpler"]:
        what = "simpler: " + what
    if record["score"] is None or record["why"].startswith(HANDED_BACK):
        what += f" [{record['why']}]"
    lost = [why for why in record.get("again", []) if why.startswith("cut off: ")]
    if lost:  # by a cluster, which says why
        what += f" [ran again, {lost[-1]}]"
    score = record["score"] or 0
    memory = record["memory_gb"] if record["score"] is not None else 0
    what = one_line(what, 400).replace('"', "'")
    return "\t".join(
        [record["commit"][:7], f"{score:.6f}", f"{memory:.1f}", record["status"], what]
    )


# ------------------------------------------------------------------------------------------ git


def git(*words: str, give: bytes | None = None, check: bool = True) -> str | None:
    """git's answer, stripped; with check=False None where it fails. Raises Refused otherwise."""
    answer = git_bytes(*words, give=give, check=check)
    return None if answer is None else answer.decode(errors="replace").strip()


def git_bytes(*words: str, give: bytes | None = None, check: bool = True) -> bytes | None:
    command = ["git", "-C", str(ROOT), *words]
    try:
        done = subprocess.run(command, input=give or b"", capture_output=True)
    except FileNotFoundError:
        raise Refused("git is not installed: install it, then say the same again") from None
    if done.returncode == 0:
        return done.stdout
    if check:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise Refused(f"git {' '.join(words[:2])}: {said[-1] if said else done.returncode}")
    return None


@functools.lru_cache(maxsize=16)  # the best's is asked for again and again
def file_at(commit: str) -> bytes:
    """EDITED as a commit (by its id: names may move) has it."""
    return git_bytes("cat-file", "blob", f"{commit}:{EDITED}")


def is_file_of(content: bytes, commits: Iterable[str]) -> bool:
    """Whether EDITED has this content in one of the commits; two processes, however many they are."""
    asked = "".join(f"{commit}:{EDITED}\n" for commit in commits).encode()
    known = git("cat-file", "--batch-check=%(objectname)", give=asked).split("\n")
    return git("hash-object", "--stdin", give=content) in known


def commit_file(content: bytes, parent: str, message: str) -> str:
    """A commit on `parent` in which only EDITED differs; no index, no file of the tree is touched."""
    blob = git("hash-object", "-w", "--stdin", give=content)
    lines = git_bytes("ls-tree", "-z", parent).split(b"\0")
    for i, line in enumerate(lines):
        mode_and_type, _, name = line.partition(b"\t")
        if name == EDITED.encode():
            lines[i] = b" ".join([*mode_and_type.split()[:2], blob.encode()]) + b"\t" + name
    tree = git("mktree", "-z", give=b"\0".join(lines))
    words = ["commit-tree", tree, "-p", parent, "-F", "-"]
    commit = git(*words, give=message.encode(), check=False)
    if commit is None:  # git does not know who commits
        identity = ["-c", "user.name=night", "-c", "user.email=night@localhost"]
        commit = git(*identity, *words, give=message.encode())
    return commit


def merged(ours: bytes, base: bytes, theirs: bytes) -> bytes | None:
    """The change from `base` to `theirs` made to `ours`; None where it conflicts.

    git takes changes of neighbouring lines for a conflict, and the rows of a table are neighbours:
    so a line that all three share is put between any two of them, and taken out again.
    """
    between = b"\n\x01\n"
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("ours", "base", "theirs")]
        for path, content in zip(paths, (ours, base, theirs)):
            path.write_bytes(content.replace(b"\n", between))
        done = subprocess.run(["git", "merge-file", "-p", *paths], capture_output=True)
    return done.stdout.replace(between, b"\n") if done.returncode == 0 else None


def change_id(before: str, after: str) -> str:
    """The same for the same change on whatever it was made: its lines and what they stand in."""
    diff = git_bytes("diff-tree", "-p", "-U0", before, after, "--", EDITED)
    _, *hunks = re.split(
        rb"^@@ .*? @@", diff, flags=re.M
    )  # each begins with its function's first line
    return hashlib.sha256(b"@@".join(hunks)).hexdigest()[:12]


# -------------------------------------------------------------------------------------- its files


def now() -> str:
    return time_of(time.time())


def time_of(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%dT%H:%M:%SZ}"


def write_once(path: Path, content: bytes, mode: int = 0o644):
    """All of the bytes under `path` or nothing, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: dict):
    write_once(path, json.dumps(value).encode())


def read_json(path: Path | str) -> dict | None:
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return json.load(file)
    return None


def knob(name: str, default: str | None = None) -> str:
    """The text behind `- name:` in program.md."""
    page = ROOT / "program.md"
    text = page.read_text(errors="replace") if page.is_file() else ""
    found = re.search(rf"^- {name}:[ \t]*(.*?)[ \t]*$", text, re.M)
    if found and found[1]:
        return found[1]
    if default is None:
        raise Refused(f"program.md has no line `- {name}: ...`: add it to the knobs")
    return default


def number_knob(name: str, default: str) -> int:
    text = knob(name, default)
    found = re.match(r"(\d+)(?!\w|[.,]\d|\s*(min|h))", text)  # not 1,200, not 20 minutes
    if not found or int(found[1]) < 1:
        said = f"program.md, knob `{name}: {one_line(text, 40)}`"
        raise Refused(f"{said}: it must begin with a whole number (seconds, or runs), at least 1")
    return int(found[1])


def time_limit() -> int:
    """Seconds for one run from start to end."""
    return number_knob("limit", "1200")


@functools.cache  # nvidia-smi may take a second
def visible_gpus() -> list[str]:
    """Names, each of which as CUDA_VISIBLE_DEVICES shows a run that one GPU: 0, GPU-..., MIG-..."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return named_gpus(visible)
    if not shutil.which("nvidia-smi"):
        return []
    try:
        command = ["nvidia-smi", "-L"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except subprocess.TimeoutExpired:
        raise Refused(
            "nvidia-smi -L has not answered for 60 s: does the driver hang? "
            "CUDA_VISIBLE_DEVICES=0,1 (say) names the GPUs without asking it"
        ) from None
    return listed_gpus(listed)


def named_gpus(visible: str) -> list[str]:
    """The entries of CUDA_VISIBLE_DEVICES, which ends for CUDA at the first that names no GPU."""
    names = []
    for entry in visible.split(","):
        name = entry.strip()
        if not re.fullmatch(r"\d+|(GPU|MIG)-\S+", name):
            break
        if name in names:
            raise Refused(
                f"CUDA_VISIBLE_DEVICES={visible}: {name} twice, for which CUDA shows none"
            )
        names.append(name)
    return names


def listed_gpus(listed: str) -> list[str]:
    """The GPUs in what `nvidia-smi -L` prints; of one that is cut by MIG, its parts."""
    gpus: list[list[str]] = []
    for line in listed.splitlines():
        uuid = re.search(r"\(UUID: ([^)\s]+)\)", line)
        if re.match(r"GPU \d+:", line):
            gpus.append([uuid[1] if uuid else str(len(gpus))])
        elif gpus and uuid and uuid[1].startswith("MIG-"):
            gpus[-1].append(uuid[1])
    if all(len(gpu) == 1 for gpu in gpus):
        return [str(i) for i in range(len(gpus))]
    return [name for whole, *parts in gpus for name in parts or [whole]]


def cores() -> int:
    """Those that this process may use; macOS counts all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cluster_address() -> str | None:
    """Where the Ray cluster answers (HOST:PORT, or `auto`); None where the runs stay on this machine."""
    named = knob("cluster", os.environ.get("RAY_ADDRESS") or "none").split()[0]
    if named == "none":
        return None
    said = f"the cluster {one_line(named, 60)} (RAY_ADDRESS, or program.md's knob)"
    if named != "auto" and not re.fullmatch(r"[^\s/]+:\d{1,5}", named):
        raise Refused(f"{said}: it must be HOST:PORT as `ray start --head` says it, auto, or none")
    if importlib.util.find_spec("ray") is None:
        install = "uv sync --group cluster (or: uv run --group cluster night.py)"
        raise Refused(f"{said} needs Ray, which is not installed: {install}")
    return named


def silence(address: str | None) -> str | None:
    """What to say where nothing listens there. Whether it is Ray, the supervisor will find out."""
    if address in (None, "auto"):
        return None
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SILENCE).close()
    except (OSError, OverflowError, UnicodeError):
        return f"the cluster {address} does not answer; nothing is lost, all goes on when it does"
    return None


def cluster_state() -> dict:
    """What the supervisor last saw of the cluster. slots: runs at once; words: lines for the agent."""
    return read_json(ROOT / ".night" / "cluster.json") or {"slots": 1, "words": []}


def slots() -> list[dict]:
    """The environment of each place where a run may stand: one a visible GPU, or what the knob says."""
    if cluster_address():
        number_knob("slots", "1")  # a knob that cannot be read is said here
        return [{}] * cluster_state()["slots"]
    gpus = visible_gpus()
    wanted = number_knob("slots", str(max(1, len(gpus))))
    if gpus and wanted > len(gpus):
        raise Refused(
            f"program.md, knob `slots: {wanted}`: only {len(gpus)} GPUs are visible, and runs that "
            f"share one get less of it, each another score: {len(gpus)} at most (MIG's parts count)"
        )
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:wanted]]
    if wanted == 1:
        return [{}]
    return [{"OMP_NUM_THREADS": str(max(1, cores() // wanted))}] * wanted


def split_of(asked: dict) -> str:
    """Which split an experiment is scored on; asked: what its experiment.json holds."""
    return "test" if asked["kind"] == "confirm" else "val"


@dataclasses.dataclass
class Experiment:
    """One folder of the queue. Its files, each written once, are:

    experiment.json   what was asked for: n, kind (baseline, try, confirm), commit, base, seed, ...
    run-K.json        the K-th run: its id, the commit that runs, the best it stands on; `cluster`
                      where Ray has it; there, once known, node-K.json says on which node
    run-K.log         all that it printed
    end-K.json        how it ended, and what the ledger says of it
    again-K.json      why it is to be run once more
    lock              held by the process that watches the run, for as long as it lives
    drop              the agent gave it up
    """

    folder: Path
    asked: dict
    known: dict[str, dict] = dataclasses.field(default_factory=dict)  # files that were read

    @classmethod
    def at(cls, folder: Path) -> Experiment | None:
        asked = read_json(folder / "experiment.json")
        return None if asked is None else cls(folder, asked)

    def read(self, name: str) -> dict:
        """A file, empty while it is not there; it is looked for until it is, and read once."""
        if name not in self.known:
            content = read_json(f"{self.folder}/{name}")  # joining a Path costs more than a miss
            if content is None:
                return {}
            self.known[name] = content
        return self.known[name]

    @property
    def n(self) -> int:
        return self.asked["n"]

    @property
    def is_baseline(self) -> bool:
        return self.asked["kind"] == "baseline"

    @property
    def is_confirm(self) -> bool:
        return self.asked["kind"] == "confirm"

    @property
    def split(self) -> str:
        return split_of(self.asked)

    def runs(self) -> list[dict]:
        """What is known of each run so far, oldest first; `code` is there once it has ended."""
        found = []
        while not found or "again" in found[-1]:
            k = len(found) + 1
            run = self.read(f"run-{k}.json")
            if not run:
                break
            found.append({**run, **self.read(f"end-{k}.json"), **self.read(f"again-{k}.json")})
        return found

    def timed_runs(self) -> list[dict]:
        """The same with `kind`; a run that was cut off ended when its log did."""
        found = self.runs()
        for k, run in enumerate(found, 1):
            run["kind"] = self.asked["kind"]
            log = self.folder / f"run-{k}.log"
            if "ended" not in run and log.is_file():
                run["ended"] = time_of(log.stat().st_mtime)
        return found

    def again(self, why: str):
        write_json(self.folder / f"again-{len(self.runs())}.json", {"again": why})

    def alive(self) -> bool:
        """Whether the process that watches the run lives: it holds the lock."""
        with contextlib.suppress(FileNotFoundError), open(self.folder / "lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look do not meet
            except BlockingIOError:
                return True
        return False

    def dropped(self) -> bool:
        return (self.folder / "drop").exists()

    def state(self) -> str:
        """waiting, running, ended, or cut off."""
        runs = self.runs()
        if not runs or "again" in runs[-1]:
            return "waiting"
        if "code" in runs[-1]:
            return "ended"
        if "cluster" in runs[-1] or self.alive():
            return "running"  # in a cluster it may be lost: the supervisor finds out
        return "ended" if (self.folder / f"end-{len(runs)}.json").exists() else "cut off"


class Night:
    """Where one tag's night keeps its files, and what stands in them."""

    def __init__(self):
        top = git("rev-parse", "--show-toplevel", check=False)
        if not top:
            make = "git init, git add -A, git commit, then begin"
            raise Refused(f"{ROOT} is no git repository with files: {make}")
        if Path(top).resolve() != ROOT:
            raise Refused(f"night.py must stand at the top of its repository, which is {top}")
        self.tag = knob("tag")
        self.branch = f"autoresearch/{self.tag}"
        if git("check-ref-format", f"refs/heads/{self.branch}", check=False) is None:
            raise Refused(
                f"program.md, knob `tag: {one_line(self.tag, 40)}`: it cannot be a part of a branch's name"
            )
        if self.tag in OWN_NAMES:
            raise Refused(f"program.md, knob `tag: {self.tag}`: night.py has files of that name")
        self.home = ROOT / ".night"
        self.folder = self.home / self.tag
        self.queue, self.done = self.folder / "queue", self.folder / "done"
        self.book = self.folder / "night.jsonl"  # one line an experiment that has ended
        self.results = ROOT / "results.tsv"
        self.edited = ROOT / EDITED
        self.experiments: dict[str, Experiment] = {}  # of the queue, as the last look found them
        self.known: list[dict] = []  # of the book: what was read so far, and up to which byte
        self.known_confirmed: list[dict] = []
        self.known_bytes = 0

    def begun(self) -> bool:
        return self.queue.is_dir()

    def records(self) -> list[dict]:
        """The experiments that have ended, in order, without a confirmation's runs.

        A line that a power cut tore is as if it had never been written.
        """
        with contextlib.suppress(FileNotFoundError), open(self.book, "rb") as file:
            file.seek(self.known_bytes)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # being written, or torn: then the next line ends it
                self.known_bytes += len(line)
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    of_kind = self.known_confirmed if record["kind"] == "confirm" else self.known
                    of_kind.append(record)
        return [*self.known]

    def confirmed(self) -> list[dict]:
        """A confirmation's runs that have ended: no rows, never kept, no part of the noise floor."""
        self.records()
        return [*self.known_confirmed]

    def ended(self) -> list[dict]:
        """All of the book."""
        return [*self.records(), *self.confirmed()]

    def open(self) -> list[Experiment]:
        """What waits, runs or is not yet decided, by number."""
        names = [name for name in os.listdir(self.queue) if name.isdigit()]
        found = {}
        for name in sorted(names, key=int):
            experiment = self.experiments.get(name) or Experiment.at(self.queue / name)
            if experiment:
                found[name] = experiment
        self.experiments = found
        return [*found.values()]

    def folder_of(self, n: int) -> Path | None:
        for place in (self.queue, self.done):
            if (place / str(n)).is_dir():
                return place / str(n)
        return None

    def next_number(self) -> int:
        numbers = [record["n"] for record in self.ended()] + [e.n for e in self.open()]
        return 1 + max(numbers, default=0)

    def keep_ref(self, name: str, commit: str):
        """Nothing that was tried is lost: git never collects what a ref names."""
        git("update-ref", f"refs/autoresearch/{self.tag}/{name}", commit)

    @contextlib.contextmanager
    def hold(self, name: str, seconds: float):
        """A lock of the night, or None where another process has held it all the time."""
        self.home.mkdir(exist_ok=True)
        with open(self.home / name, "w") as file:
            end = time.monotonic() + seconds
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= end:
                        file = None
                        break
                    time.sleep(PAUSE)
            yield file

    def stopped(self) -> bool:
        """By `stop`, until `begin`."""
        return (self.folder / "stop").exists()

    @contextlib.contextmanager
    def command(self):
        """One command at a time touches the agent's tree."""
        with self.hold("command", 10) as lock:
            if not lock:
                raise Refused("another night.py command has been at work for 10 s: say it again")
            yield

    # the agent's tree: moved by the agent's own commands alone

    def tip(self) -> str:
        head = git("symbolic-ref", "-q", "--short", "HEAD", check=False)
        if head != self.branch:
            raise Refused(
                f"the night is on {self.branch}, this is {head or 'a detached head'}: uv run night.py begin"
            )
        return git("rev-parse", "HEAD")

    def edits(self) -> bytes | None:
        """EDITED as the agent has it, where it is neither the branch's, the best's nor queued; else None."""
        tip = self.tip()
        if not self.edited.is_file():
            return None  # deleted: the best is put in its place
        content = self.edited.read_bytes()
        best = best_of(self.records())
        known = {tip, best["commit"] if best else tip, *(e.asked["commit"] for e in self.open())}
        return None if is_file_of(content, known) else content

    def write_edited(self, content: bytes):
        mode = self.edited.stat().st_mode if self.edited.is_file() else 0o644
        write_once(self.edited, content, mode)

    def settle(self):
        """Puts branch and EDITED to the best, unless an edit is in progress. May be cut off anywhere."""
        best = best_of(self.records())
        tip = self.tip()
        if self.edits() is None:
            commit = best["commit"] if best else tip
            content = file_at(commit)
            if not self.edited.is_file() or self.edited.read_bytes() != content:
                self.write_edited(content)
            if commit != tip:
                if all(tip not in (record["commit"], record["base"]) for record in self.records()):
                    self.keep_ref(f"not-of-the-night-{tip[:7]}", tip)  # somebody's own commit
                git("update-ref", "-m", "night: kept", f"refs/heads/{self.branch}", commit, tip)
        if git("diff-index", "--cached", "--quiet", "HEAD", "--", EDITED, check=False) is None:
            git("reset", "-q", "--", EDITED, check=False)


# --------------------------------------------------------------- a run, and the process beside it


def become_subreaper():
    """Linux: orphans among our descendants become our children, so that none outlives its run."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def die_with_parent():
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def end_group(group: int):
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def end_children():
    """Kills what is left below this process, also what left its session (Linux, by the subreaper)."""
    while True:
        children = []
        for path in Path("/proc/self/task").glob("*/children"):
            children += path.read_text().split()
        for child in children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(child), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def end_leftovers(run_id: str):
    """Kills what a run whose watcher died has left: all that carries its id (Linux)."""
    mark = f"AUTORESEARCH_RUN={run_id}".encode()
    found, end = True, time.monotonic() + 10
    while found and time.monotonic() < end:  # again, for what was forked meanwhile
        found = False
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    found = True


def cache_folder() -> Path:
    import prepare

    return prepare.cache_dir()


LOCKED_IN = """
mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" || exit 125
mount --bind "$2" "$2" && mount -o remount,rw,bind "$2" || exit 125
shift 2
exec "$@"
"""


@dataclasses.dataclass
class Isolation:
    """What this machine can keep a run away from. words: for the status, in one sentence."""

    prefix: list[str]
    words: str

    @classmethod
    def here(cls, cache: Path) -> Isolation:
        """No network and a read-only cache by Linux's namespaces, where this user may make them."""
        inside = ["sh", "-c", LOCKED_IN, "sh", str(cache), str(cache / LEDGER)]
        missing = []
        for options in (["--net", "--mount"], ["-r", "--net", "--mount"]):
            prefix = ["unshare", *options, *inside]
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                tried = subprocess.run([*prefix, "true"], capture_output=True, timeout=10)
                if tried.returncode == 0:
                    return cls(prefix, "")
        missing = "no network, a read-only cache"
        return cls(
            [], f"this machine could not give the runs: {missing} (Linux's unshare is needed)"
        )


def run_environment(folder: Path, compiled: Path, asked: dict, run: dict) -> dict:
    """The user's, but a home and a place for temporary files of the run's own, and named compiler caches.

    asked, run: what experiment.json and run-K.json hold.
    """
    home, temporary = folder / "home", folder / "tmp"
    for path in (home, temporary, compiled):
        path.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        **run["slot"],
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "AUTORESEARCH_CACHE": str(cache_folder()),
        "AUTORESEARCH_RUN": run["id"],
        SEED: str(asked["seed"]),
        SPLIT: split_of(asked),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled / "inductor"))
    with contextlib.suppress(OSError, KeyError):  # there already; or a user without a name
        # headers, compiled once for all: torch looks for them among the temporary files
        os.symlink(compiled, temporary / f"torchinductor_{getpass.getuser()}")
    environment.setdefault("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
    return environment


def forget_half_made(compiled: Path, since: float):
    """Removes what a compiler may have had in hand when it was killed at some time after `since`.

    A C++ compiler writes in place. A kernel cut short, tried out, is taken for a whole one and ends
    every later run that needs it by SIGBUS. Whatever is removed is compiled again.
    """
    for path in compiled.rglob("*.*"):
        if path.suffix in (".so", ".o", ".gch"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime >= since:
                    path.unlink()


def log_text(path: Path, most: int = 1 << 16) -> str:
    """The end of a log, where it is short all of it."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - most))
            return file.read().decode(errors="replace").replace("\r", "\n")
    except FileNotFoundError:
        return ""


def why_it_failed(code: int, stopped: str | None, ledger: dict, log: str) -> str:
    """One line for a run without a score."""
    if stopped:
        return stopped
    if ledger.get("failure"):
        return str(ledger["failure"])
    if code == 0:
        return "it ended without a score in the ledger"
    lines = log.strip().splitlines()
    said = [line for line in lines if "FAIL: " in line]
    if said:
        return said[-1].split("FAIL: ")[-1]
    if any(line.startswith("Timeout (") for line in lines):
        return "timeout: it hung (the log shows where)"
    if code < 0:
        return f"killed by signal {-code}"
    last = lines[-1] if lines else "its log is empty"
    return f"exit {code}: {last[-250:]}"


def run_to_its_end(
    tree: Path,
    environment: dict,
    compiled: Path,
    log_path: Path,
    isolation: Isolation,
    limit: int,
    given_up: Callable[[], bool],
) -> dict:
    """Runs COMMAND in `tree` and ends it, with all its children, at the limit or when it is given up.

    compiled: the folder of the compilers' caches. Returns its exit code, why it was stopped, and
    its seconds. To be called by a process that has no other children.
    """
    began = time.monotonic()
    stopped = None
    with open(log_path, "wb") as log:
        process = subprocess.Popen(
            [*isolation.prefix, *COMMAND],
            cwd=tree,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        while True:
            try:
                code = process.wait(timeout=0.25)
                break
            except subprocess.TimeoutExpired:
                if given_up():
                    stopped = "dropped"
                elif time.monotonic() - began > limit:
                    stopped = f"still running after {limit} s, the limit in program.md"
                if stopped:
                    end_group(process.pid)
        end_group(process.pid)
        end_children()
    if code < 0 and not progress(log_path):  # while it compiled
        forget_half_made(compiled, time.time() - COMPILER_WRITES)
    seconds = round(time.monotonic() - began, 2)
    return {"code": code, "stopped": stopped, "wall_seconds": seconds}


def outcome(ended: dict, records: list[dict], text: str, split: str) -> dict:
    """What end-K.json holds: how a run ended, with what the ledger's records of it and its log say."""
    said = {key: value for record in records for key, value in record.items()}
    code = ended["code"]
    scored = said.get("score") if code == 0 and said.get("split") == split else None
    if not isinstance(scored, (int, float)) or not math.isfinite(scored):
        scored = None
    failure = None
    if scored is None:
        failure = why_it_failed(code, ended["stopped"], said, text)
    memory = MEMORY.search(text)
    steps = STEPS.search(text)
    return {
        "code": code,
        "ended": now(),
        "wall_seconds": ended["wall_seconds"],
        "score": scored,
        "failure": failure,
        "memory_gb": float(memory[1]) / 1024 if memory else 0.0,
        "steps": int(steps[1]) if steps else None,
        "tokens": said.get("tokens"),
        "training_seconds": said.get("training_seconds"),
        "pace": said.get("pace"),
        "conditions": {key: said[key] for key in (*CONDITIONS, FELL_BACK) if key in said},
    }


def watch(night: Night, experiment: Experiment, k: int, isolation: Isolation, limit: int):
    """Runs the k-th run of an experiment to its end and writes end-K.json. In a process of its own."""
    import prepare

    folder, compiled = experiment.folder, night.home / "compiled"
    run = read_json(folder / f"run-{k}.json")
    ledger_path = prepare.cache_dir() / LEDGER
    ledger_path.touch()
    start = ledger_path.stat().st_size
    environment = run_environment(folder, compiled, experiment.asked, run)
    log_path = folder / f"run-{k}.log"

    def given_up() -> bool:
        return experiment.dropped() or night.stopped()

    ended = run_to_its_end(
        folder / "tree", environment, compiled, log_path, isolation, limit, given_up
    )
    if ended["stopped"] == "dropped" and not experiment.dropped():
        experiment.again("stopped")
        return
    mine = [r for r in prepare.read_ledger(start)[0] if r.get("run") == run["id"]]
    end = outcome(ended, mine, log_text(log_path), experiment.split)
    write_json(folder / f"end-{k}.json", end)


# ------------------------------------------------------------------------------- the supervisor


class Supervisor:
    """Works through the queue: starts what waits where a slot is free, records what has ended.

    One a repository (`.night/supervisor` is locked). All it knows is in the night's files; killed
    anywhere, the next one goes on. Every method may be cut off at any line and said again.
    """

    def __init__(self, night: Night):
        self.night = night
        self.limit = time_limit()
        (cache_folder() / LEDGER).touch()
        self.cluster = None
        address = cluster_address()
        if address:
            import cluster  # the only file that needs Ray

            self.cluster = cluster.Cluster(night, address)
        else:
            self.slots = slots()
            self.isolation = Isolation.here(cache_folder())
            write_once(night.home / "isolation", self.isolation.words.encode())

    def disconnect(self):
        if self.cluster:
            self.cluster.disconnect()

    @property
    def records(self) -> list[dict]:
        return self.night.records()

    def work(self):
        """Until nothing runs and nothing can start; it looks rarely while nothing moves."""
        recorded = {record["n"] for record in self.night.ended()}
        for experiment in self.night.open():
            if experiment.n in recorded:  # the supervisor before was cut off there
                self.put_away(experiment)
        pause = 0
        while True:
            if self.turn():
                pause = 0
            elif not self.may_go_on():
                return
            pause = min(pause + PAUSE / 10, 5 * PAUSE)
            time.sleep(pause)

    def may_go_on(self) -> bool:
        """Whether something runs, or waits for a node that a cluster may still get."""
        if any(e.state() == "running" for e in self.night.open()):
            return True
        return self.cluster is not None and can_work(self.night)

    def turn(self) -> bool:
        """One look at the queue. Returns whether anything moved."""
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        moved = False
        for experiment in self.night.open():
            state = experiment.state()
            if state == "cut off":
                self.take_up(experiment)
                moved = True
            elif state == "waiting" and experiment.dropped():
                self.close(experiment, None, "crash", "dropped while it waited")
                moved = True
            elif state == "running" and "cluster" in experiment.runs()[-1]:
                moved = self.look_into_cluster(experiment) or moved
        moved = self.conclude() or moved
        return self.fill_slot() or moved

    def fill_slot(self) -> bool:
        if self.night.stopped():
            return False
        experiments = self.night.open()
        free = self.cluster.slots() if self.cluster else list(self.slots)
        states = {e.n: e.state() for e in experiments}
        # What has ended since the last decisions keeps its slot until it is judged: it may move the
        # best. While the baseline lasts, nothing is judged.
        lasts = any(e.is_baseline for e in experiments)
        occupying = ("running",) if lasts else ("running", "ended")
        for experiment in experiments:
            if states[experiment.n] in occupying and free:
                slot = experiment.runs()[-1]["slot"]
                free.remove(slot if slot in free else free[0])  # the knob may have changed
        waiting = [e for e in experiments if states[e.n] == "waiting"]
        if not best_of(self.records) and not any(e.is_baseline for e in experiments):
            waiting = []  # the baseline has no score: nothing can be compared
        # after it what runs again, the larger gain first: it moves the best, the others follow
        waiting.sort(key=lambda e: (not e.is_baseline, not e.runs(), -self.gained(e), e.n))
        if not (waiting and free):
            return False
        self.start(waiting[0], free[0])  # one a turn: what ends meanwhile may move the best
        return True

    def start(self, experiment: Experiment, slot: dict):
        """Puts the change on top of the best where that has moved, and starts the run."""
        best = best_of(self.records)
        base = experiment.asked["base"]
        if best and not experiment.is_baseline and not experiment.is_confirm:
            base = best["commit"]
        commit, conflict = self.on_top(experiment, base)
        if commit is None:
            self.hand_back(experiment, conflict)
            return
        run = {
            "id": uuid.uuid4().hex[:12],
            "commit": commit,
            "base": base,
            "slot": slot,
            "began": now(),
        }
        k = len(experiment.runs()) + 1
        if self.cluster:
            self.cluster.start(experiment, k, run, self.limit)
        else:
            self.start_here(experiment, k, run)

    def start_here(self, experiment: Experiment, k: int, run: dict):
        """Lays a worktree; a process of its own runs and watches, and outlives us."""
        folder, commit = experiment.folder, run["commit"]
        if k > 1 or (folder / "tree").exists():
            self.clear(folder)
        git("worktree", "add", "-q", "--force", "--force", "--detach", str(folder / "tree"), commit)
        lock = open(folder / "lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_json(folder / f"run-{k}.json", run)
        if os.fork() == 0:  # this process holds the lock until it ends, whatever becomes of ours
            try:
                os.setsid()
                os.closerange(3, lock.fileno())
                os.closerange(lock.fileno() + 1, 1 << 12)  # the supervisor's own lock among them
                become_subreaper()
                watch(self.night, experiment, k, self.isolation, self.limit)
            except BaseException:
                traceback.print_exc()  # into supervisor.log
                sys.stderr.flush()
            finally:
                os._exit(0)
        lock.close()

    def look_into_cluster(self, experiment: Experiment) -> bool:
        """Whether anything is new of a run that Ray has; one that it has lost is cut off."""
        if self.cluster is None:
            self.cut_off(experiment, "cut off: its cluster is no longer used")
            return True
        lost = self.cluster.look(experiment)
        if lost:
            self.cut_off(experiment, lost)
        return bool(lost)

    def on_top(self, experiment: Experiment, base: str) -> tuple[str | None, str]:
        """The experiment's commit, or the same change as a commit on `base`; or None and why not."""
        asked = experiment.asked
        if asked["base"] == base:
            return asked["commit"], ""
        name = f"{experiment.n}-on-{base[:7]}"
        known = git(
            "rev-parse", "-q", "--verify", f"refs/autoresearch/{self.night.tag}/{name}", check=False
        )
        if known:
            return known, ""
        files = [file_at(commit) for commit in (base, asked["base"], asked["commit"])]
        content = merged(*files)
        if content is None:
            return None, f"it conflicts with the best, {base[:7]}; bring {experiment.n} says where"
        if content == files[0]:  # a run would measure the best again, and luck could keep it
            return None, f"its change is in the best, {base[:7]}, already"
        commit = commit_file(content, base, asked["message"])
        self.night.keep_ref(name, commit)
        return commit, ""

    def hand_back(self, experiment: Experiment, conflict: str):
        """Not run on the best. One that had won on an older best keeps that score in its row."""
        why = f"{HANDED_BACK}: {conflict}"
        won = [run for run in experiment.runs() if run.get("again", "").startswith(BEST_MOVED)]
        if won:
            better = self.gained(experiment)
            why += f" (on {won[-1]['base'][:7]} it was better by {better:.6f})"
            self.close(experiment, won[-1], "discard", why)
        else:
            self.close(experiment, None, "crash", why)

    def clear(self, folder: Path):
        """Removes what a run leaves beside its log."""
        for name in ("tree", "home", "tmp"):
            shutil.rmtree(folder / name, ignore_errors=True)
        git(
            "worktree", "remove", "--force", "--force", str(folder / "tree"), check=False
        )  # git's part

    # what has ended

    def take_up(self, experiment: Experiment):
        """A run whose watcher died, by a kill or a power cut."""
        run = experiment.runs()[-1]
        end_leftovers(run["id"])
        forget_half_made(self.night.home / "compiled", seconds_of(run["began"]))
        self.cut_off(experiment, "cut off")

    def cut_off(self, experiment: Experiment, why: str):
        """Queues the run again, but not for ever. why: begins with `cut off`."""
        before = [run.get("again", "") for run in experiment.runs()]
        if len([said for said in before if said.startswith("cut off")]) + 1 >= CUT_OFF:
            last = why.removeprefix("cut off")  # ": its node was lost", say
            self.close(experiment, None, "crash", f"cut off {CUT_OFF} times{last}")
        else:
            experiment.again(why)

    def conclude(self) -> bool:
        """Decides what has ended: the baseline first and as a whole, for all else is measured by it."""
        experiments = self.night.open()
        ended = [e for e in experiments if e.state() == "ended"]
        baseline = [e for e in experiments if e.is_baseline]
        if any(e not in ended for e in baseline):
            return False
        if baseline:
            return self.conclude_baseline(baseline)
        for experiment in sorted(ended, key=self.gained, reverse=True):
            self.judge(experiment)
        return bool(ended)

    def gained(self, experiment: Experiment) -> float:
        """By how much its last score beat the best that it stood on; -inf where it has none."""
        scored = [run for run in experiment.runs() if run.get("score") is not None]
        before = self.kept(scored[-1]["base"]) if scored else None
        return gain(scored[-1]["score"], before["score"]) if before else -math.inf

    def conclude_baseline(self, baseline: list[Experiment]) -> bool:
        """A doubtful one would fix the noise floor for the whole night: it runs once more before."""
        doubts = [(experiment, self.doubt_baseline(experiment)) for experiment in baseline]
        for experiment, why in doubts:
            if why:
                experiment.again(why)
        if not any(why for _, why in doubts):
            for experiment in baseline:
                self.judge(experiment)
        return True

    def doubt_baseline(self, experiment: Experiment) -> str | None:
        """Why this one is to run once more."""
        run = experiment.runs()[-1]
        other = not_comparable(run.get("conditions", {}), self.baseline_conditions())
        if other and not ran_again(experiment, "not comparable"):
            return f"not comparable: {other}"
        share = disturbed(run, self.rates_of(experiment.asked["commit"]))
        if share and not ran_again(experiment, "disturbed"):
            return f"disturbed ({share:.0%} of its rate)"
        return None

    def judge(self, experiment: Experiment):
        """Keeps, discards or repeats an experiment whose last run has ended."""
        runs = [run for run in experiment.runs() if "code" in run]
        last = runs[-1]
        same = [run for run in runs if run["commit"] == last["commit"] and run["score"] is not None]
        if experiment.dropped():
            self.close(experiment, last, "crash", "dropped")
            return
        if not same:
            self.close(experiment, last, "crash", last["failure"])
            return
        baseline = self.baseline_conditions()
        comparable = [
            run for run in same if not not_comparable(run.get("conditions", {}), baseline)
        ]
        # Of a run that was disturbed or not comparable, and its repeat.
        counted = max(comparable or same, key=lambda run: rate(run) or 0)
        if not comparable:
            why = "not comparable: " + not_comparable(counted["conditions"], baseline)
            if ran_again(experiment, "not comparable"):
                status = "crash" if experiment.is_confirm else "discard"
                self.close(experiment, counted, status, f"twice {why}", other=why)
            else:
                experiment.again(why)
            return
        best, base = best_of(self.records), counted["base"]
        before = self.kept(base)
        share = disturbed(counted, self.rates_of(counted["commit"]))
        doubt = f"disturbed ({share:.0%} of its own rate)" if share else None
        beside = (rate(counted) or 0) / (rate(before) or math.inf)
        if not share and 0 < beside < FAR_SLOWER:
            doubt = f"disturbed, or a very slow change ({beside:.0%} of the best's rate)"
        if doubt and not experiment.is_baseline and not ran_again(experiment, "disturbed"):
            experiment.again(doubt)
            return
        if experiment.is_confirm:
            self.close(experiment, counted, "scored", "on the test split", share)
            return
        floor, simpler = noise_floor(self.records), experiment.asked["simpler"]
        # of the bests up to the one that it stood on: what came after, the run on top meets
        known = self.records[: self.records.index(before) + 1] if before else []
        scores = [r["score"] for r in known if r["status"] == "keep"]
        lowest = max(scores, key=lambda score: gain(score, 0), default=None)
        status, why = decide(counted["score"], before.get("score"), floor, simpler, lowest)
        if experiment.is_baseline and best:
            status, why = "discard", "measures the noise floor"
        elif not experiment.is_baseline and not best:
            status, why = "discard", "the baseline has no score to compare with"
        elif best and best["commit"] != base:
            why = f"{BEST_MOVED}; on {base[:7]} it was {why}"
            if status == "keep":
                experiment.again(why)
                return
        self.close(experiment, counted, status, why, share)

    def rates_of(self, commit: str) -> list[float]:
        """Tokens a second of every run of a commit so far."""
        runs = [run for experiment in self.night.open() for run in experiment.runs()]
        rates = [rate(run) for run in [*self.night.ended(), *runs] if run["commit"] == commit]
        return [found for found in rates if found]

    def baseline_conditions(self) -> dict:
        """Under which the baseline ran where it fell back the least; empty before it has ended."""
        waiting = [e.runs()[-1:] for e in self.night.open() if e.is_baseline]
        runs = [r for r in self.records if r["kind"] == "baseline"] + sum(waiting, [])
        scored = [run for run in runs if run.get("score") is not None]
        conditions = [run.get("conditions", {}) for run in scored]
        return min(conditions, key=lambda known: len(known.get(FELL_BACK, [])), default={})

    def kept(self, commit: str) -> dict:
        """The record with which a commit was kept; empty where it was not."""
        kept = [r for r in self.records if r["commit"] == commit and r["status"] == "keep"]
        return kept[-1] if kept else {}

    def close(
        self,
        experiment: Experiment,
        run: dict | None,
        status: str,
        why: str,
        share: float | None = None,
        other: str | None = None,
    ):
        """Writes the experiment's one record: from here on it has ended, whatever is cut off after."""
        asked, run = experiment.asked, run or {}
        score = run.get("score") if status != "crash" else None
        before = {} if experiment.is_confirm else self.kept(run.get("base", ""))
        runs = experiment.runs()
        record = {
            **{
                key: asked[key]
                for key in ("n", "kind", "seed", "message", "simpler", "expect", "change")
            },
            "commit": run.get("commit", asked["commit"]),
            "base": run.get("base", asked["base"]),
            "status": status,
            "why": one_line(why, 300),
            "score": score,
            "got": score - before["score"] if score is not None and before else None,
            "base_rate": rate(before),
            "disturbed": share,
            "not_comparable": other,
            "conditions": run.get("conditions", {}),
            "again": [earlier["again"] for earlier in runs[:-1] if "again" in earlier],
            "run": run.get("id"),
            "k": next((k for k, r in enumerate(runs, 1) if r["id"] == run.get("id")), len(runs)),
            **{
                key: run.get(key)
                for key in ("tokens", "training_seconds", "wall_seconds", "steps", "began", "host")
            },
            "memory_gb": run.get("memory_gb") or 0.0,
            "ended": now(),
        }
        append_line(self.night.book, json.dumps(record))
        self.put_away(experiment)

    def put_away(self, experiment: Experiment):
        """The row, and the folder out of the queue. Said again after a kill, it does only what is missing."""
        if not experiment.is_confirm:
            self.write_row(next(r for r in reversed(self.records) if r["n"] == experiment.n))
        self.clear(experiment.folder)
        os.replace(experiment.folder, self.night.done / str(experiment.n))

    def write_row(self, record: dict):
        """Adds the row to the table as it is; where that is gone, it is made from the night's book."""
        row = row_of(record)
        if self.night.results.is_file():
            lines = self.night.results.read_bytes().decode("utf-8-sig", "replace").splitlines()
            written = lines.count(row)  # two crashes of a baseline have the same row
            if not written or written < [*map(row_of, self.records)].count(row):
                lines.append(row)
        else:
            lines = ["\t".join(COLUMNS), *map(row_of, self.records)]
        write_once(self.night.results, ("\n".join(lines) + "\n").encode())


def ran_again(experiment: Experiment, why: str) -> bool:
    """Whether what ran last, on the same best, has run again for that reason."""
    runs = experiment.runs()
    same = [run for run in runs if run["commit"] == runs[-1]["commit"]]
    return any(run.get("again", "").startswith(why) for run in same)


def append_line(path: Path, line: str):
    """One write; a line that an earlier power cut tore stays alone."""
    with open(path, "ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
        content = (b"\n" if torn else b"") + line.encode() + b"\n"
        if file.write(content) != len(content):
            raise OSError(28, f"only a part of a line was written to {path}: is the disk full?")
        os.fsync(file.fileno())


def supervise():
    """The detached process: holds the lock, works, and looks once more after letting go of it."""
    night = Night()
    while True:
        with night.hold("supervisor", 1) as lock:  # a command that looks holds it for a moment
            if not lock:
                return
            supervisor = Supervisor(night)
            try:
                supervisor.work()
            finally:
                supervisor.disconnect()
        if not can_work(night):
            return


def can_work(night: Night) -> bool:
    """Whether a supervisor would find something to do."""
    experiments = night.open()
    if night.stopped():
        return any(e.state() in ("running", "cut off") or e.dropped() for e in experiments)
    if any(e.state() != "waiting" or e.is_baseline or e.dropped() for e in experiments):
        return True
    return bool(experiments) and best_of(night.records()) is not None


def wake(night: Night) -> str | None:
    """Starts a supervisor where there is work and none: it outlives command, terminal and agent.

    Returns what keeps it from that, where its cluster does not answer.
    """
    time_limit(), slots()  # a knob that cannot be read is said here, to somebody who reads it
    address = cluster_address()
    if not address and not knob("cluster", "") and (night.folder / "device.json").exists():
        again = "set it again, or put `- cluster: ADDRESS` (none: go on without) into program.md"
        raise Refused(f"this night runs on a Ray cluster, and RAY_ADDRESS is not set: {again}")
    if not can_work(night):
        return None
    with night.hold("supervisor", 0) as lock:
        if not lock:
            return None
    silent = silence(address)
    if silent:
        return silent
    with open(night.home / "supervisor.log", "ab") as log:
        subprocess.Popen(
            [sys.executable, __file__, "supervise"],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return None


# ----------------------------------------------------------------------------- what is said of it


def progress(path: Path) -> list[tuple[float, float]]:
    """(percent of the budget, loss) of a log's progress lines."""
    found = []
    for line in log_text(path).splitlines():
        match = PROGRESS.match(line)
        if match:
            with contextlib.suppress(ValueError):
                found.append((float(match[1]), float(match[2])))
    return found


def at_share(curve: list[tuple[float, float]], percent: float) -> float | None:
    """The loss at the last progress line up to `percent`."""
    return next((loss for share, loss in reversed(curve) if share <= percent), None)


def phase(night: Night, experiment: Experiment, best_curve: list[tuple[float, float]]) -> str:
    """`compiling, 20 s so far`, `training 40%, loss 2.41 (best at 40%: 2.20)` or `scoring`."""
    path = experiment.folder / f"run-{len(experiment.runs())}.log"
    text = log_text(path)
    curve = progress(path)
    if "cluster" in experiment.runs()[-1] and not path.exists():
        return "waiting for a GPU of the cluster"
    if any(SCORING.match(line) for line in text.splitlines()):
        return "scoring"
    if not curve:
        return f"compiling, {time.time() - seconds_of(experiment.runs()[-1]['began']):.0f} s so far"
    percent, loss = curve[-1]
    same = at_share(best_curve, percent)
    beside = f" (best at {percent:.0f}%: {same:.4g})" if same is not None else ""
    return f"training {percent:.0f}%, loss {loss:.4g}{beside}"


def log_of(night: Night, record: dict) -> Path:
    folder = night.folder_of(record["n"]) or night.done
    return folder / f"run-{record['k']}.log"


def name_of(experiment: dict) -> str:
    if experiment["kind"] == "baseline":
        return f"baseline, seed {experiment['seed']}"
    return one_line(experiment["message"], 70)


def baseline_lasts(experiments: list[Experiment]) -> bool:
    """Whether what has ended stays undecided for a while."""
    return any(e.is_baseline and e.state() != "ended" for e in experiments)


def floor_words(records: list[dict]) -> str:
    floor = noise_floor(records)
    if floor is None:
        return f"noise floor not measured yet ({UNMEASURED_FLOOR:.1%} of the best counts)"
    return f"noise floor {floor:.6f}"


def verdict(record: dict) -> list[str]:
    """What a record says to the agent, in a few lines."""
    name = TEST_SCORE if record["kind"] == "confirm" else SCORE
    score = "" if record["score"] is None else f"  {name} {record['score']:.6f}"
    status = record["status"] if record["run"] else "not run"
    lines = [f"{record['n']}: {status}{score}: {record['why']}  ({name_of(record)})"]
    if record["expect"] is not None and record["got"] is not None:
        lines.append(f"   expected {record['expect']:+.6f}, got {record['got']:+.6f}")
    if record["disturbed"]:
        lines.append(
            f"   DISTURBED twice ({record['disturbed']:.0%} of its rate): the faster run counts"
        )
    for why in record["again"]:
        lines.append(f"   ran again: {why}")
    per_second = rate(record)
    if per_second:
        steps = record["steps"] or "?"
        seconds = f"{record['wall_seconds']:.0f} s in all"
        beside = f" (the best before: {record['base_rate']:,.0f})" if record["base_rate"] else ""
        lines.append(f"   {per_second:,.0f} tokens/s{beside}, {steps} steps, {seconds}")
    if record["kind"] == "baseline" and record["status"] == "keep":
        if record["steps"] and record["steps"] < FEW_STEPS:
            lines.append(
                f"   under {FEW_STEPS} steps a score measures the machine more than the idea"
            )
    return lines


def end_of_log(path: Path, most: int) -> list[str]:
    lines = [one_line(line, WIDTH) for line in log_text(path).splitlines() if line.strip()]
    return lines[-most:]


def what_next(night: Night, records: list[dict], experiments: list[Experiment]) -> str:
    waiting = [e for e in experiments if e.asked["kind"] == "try" and e.state() == "waiting"]
    capacity = max(LEAST_WAITING, len(slots()))
    if night.stopped():
        return (
            "the night was stopped (night.py stop), and only who stopped it goes on: night.py begin"
        )
    if best_of(records) is None and not any(e.is_baseline for e in experiments):
        return "the baseline gave no score (see above): tell the human, or mend it and say begin"
    edits = night.edits() is not None
    if len(waiting) >= capacity:
        kept = f"; {EDITED} keeps its edits until then" if edits else ""
        return f"the queue is full: night.py wait{kept}"
    if edits:
        return f'{EDITED} has edits: finish them, then night.py try "..."; or night.py bring best'
    return f'edit {EDITED} and night.py try "what changes; what is expected"' + (
        ", or night.py wait" if experiments else ""
    )


def standing(night: Night) -> list[str]:
    """Where the night stands, what runs, what waits."""
    experiments = night.open()
    records = night.records()
    ended = {record["n"] for record in night.ended()}
    experiments = [e for e in experiments if e.n not in ended]
    best = best_of(records)
    lines = []
    address = cluster_address()
    if address:
        silent = silence(address)
        lines = [silent] if silent else list(cluster_state()["words"])
    if best:
        lines.append(
            f"best {best['score']:.6f}: {best['n']}, {best['commit'][:7]}, {name_of(best)}"
        )
        first = next(r for r in records if r["status"] == "keep")
        kept = len([r for r in records if r["status"] == "keep"])
        scored = len([r for r in records if r["score"] is not None])
        lines.append(
            f"     from {first['score']:.6f}; {len(records)} ended, {scored} with a score, {kept} kept; "
            f"{floor_words(records)}"
        )
        lost = better_than_best(records)
        if lost:
            lines.append(
                f"     better still, but not on the branch: {lost['n']}, {lost['score']:.6f} "
                f"({name_of(lost)}): bring {lost['n']} and try it by itself, before anything else"
            )
    said, direction, size = calibration(records, noise_floor(records))
    if said:
        lines.append(f"     predictions: {direction} of {said} right in direction, {size} in size")
    curve = progress(log_of(night, best)) if best else []
    for experiment in experiments:
        state = experiment.state()
        words = state
        runs = experiment.runs()
        last = runs[-1] if runs else {}
        if state == "running":
            words = phase(night, experiment, curve)
        elif state == "ended":
            score = last.get("score")
            words = f"ended, {score:.6f}" if score is not None else "ended without a score"
            if baseline_lasts(experiments):
                words += "; decided when the baseline's runs have all ended"
        before = [run["again"] for run in runs if "again" in run]
        if before:
            words += f"; once more, because of the run before: {before[-1]}"
        lines.append(f"{experiment.n}: {words}  ({name_of(experiment.asked)})")
    return lines


def show_lines(lines: list[str], most: int = SCREEN):
    if len(lines) > most:
        lines = [*lines[: most - 1], f"... {len(lines) - most + 1} more lines"]
    for line in lines:
        print(line[:200])


# --------------------------------------------------------------------- is it real? the confirmation


def t_quantile(df: float, confidence: float = 0.95) -> float:
    """The t within +-t of which Student's distribution with df >= 1 degrees of freedom has that share.

    With t = sqrt(df) tan(angle) the density is scale * cos(angle) ** (df - 1): Simpson's rule gives
    the share up to an angle, and Newton's method, from below, the angle of a share.
    """
    scale = 2 * math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    parts, angle, move = 200, 0.0, 1.0
    while move > 1e-12:
        heights = [math.cos(angle * i / parts) ** (df - 1) for i in range(parts + 1)]
        inner = 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
        share = scale * angle / parts / 3 * (heights[0] + inner + heights[-1])
        move = (confidence - share) / (scale * heights[-1])
        angle += move
    return math.sqrt(df) * math.tan(angle)


def welch(scores: list[float], others: list[float]) -> tuple[float, float, float]:
    """(gain of `scores` over `others` in the mean, low and high end of its 95% interval).

    At least two of each. Welch's interval: the two may scatter differently; degrees of freedom by
    Satterthwaite (Welch, Biometrika 34, 1947).
    """
    better = gain(mean(scores), mean(others))
    parts = [variance(some) / len(some) for some in (scores, others)]
    if sum(parts) == 0:
        return better, better, better
    pairs = zip(parts, (scores, others))
    df = sum(parts) ** 2 / sum(part**2 / (len(some) - 1) for part, some in pairs)
    half = t_quantile(df) * math.sqrt(sum(parts))
    return better, better - half, better + half


def is_it_real(better: float, low: float, high: float) -> str:
    """The sentence that the whole night comes down to."""
    digits = 4 if high - low > 1e-3 else 6
    words = f"{abs(better):.{digits}f} {'better' if better >= 0 else 'worse'}"
    if low > 0:
        return f"{words}, {low:.{digits}f} to {high:.{digits}f}: real"
    if high < 0:
        return f"{words}, {-high:.{digits}f} to {-low:.{digits}f}: the baseline is better"
    return f"{words}, from {low:+.{digits}f} to {high:+.{digits}f}: within chance"


@dataclasses.dataclass(frozen=True)
class Confirmation:
    """Baseline and best on the test split, as far as they are measured.

    Their seeds are the same, and none that the night used: of a hundred experiments with one seed
    the best is also the one which that seed suits.
    """

    baseline: dict  # the records with which they were kept
    best: dict
    seeds: list[int]
    runs: dict[tuple[str, int], dict]  # commit and seed: the record of the last run

    @classmethod
    def of(cls, records: list[dict], confirmed: list[dict], least: int = 0) -> Confirmation | None:
        """None where nothing was kept but the baseline. least: so many seeds, measured or not."""
        kept = [record for record in records if record["status"] == "keep"]
        if not kept or kept[0]["commit"] == kept[-1]["commit"]:
            return None
        runs = {(record["commit"], record["seed"]): record for record in confirmed}
        measured = [seed for commit, seed in runs if commit == kept[-1]["commit"]]
        last = max([CONFIRM_FROM + least - 1, *measured])  # never fewer than were asked for before
        seeds = list(range(CONFIRM_FROM, last + 1))
        return cls(kept[0], kept[-1], seeds, runs)

    def scores(self, record: dict) -> list[float]:
        found = [self.runs.get((record["commit"], seed), {}).get("score") for seed in self.seeds]
        return [score for score in found if score is not None]

    def in_turn(self) -> Iterator[tuple[str, dict, int]]:
        """(name, record, seed) in the order of running, in which a slow hour hits both alike."""
        pair = [("baseline", self.baseline), ("best", self.best)]
        for seed in self.seeds:
            for name, record in pair:
                yield name, record, seed
            pair = pair[::-1]

    def interval(self) -> tuple[float, float, float] | None:
        """(gain, low, high); None while one of the two has fewer than two scores."""
        scores, others = self.scores(self.best), self.scores(self.baseline)
        return welch(scores, others) if min(len(scores), len(others)) > 1 else None

    def other_looks(self, ledger: list[dict]) -> int:
        """How many other runs have trained for the test split: each look makes the next worth less."""
        ours = {self.baseline["commit"], self.best["commit"]}
        starts = [r for r in ledger if r.get("event") == "start" and r.get("split") == "test"]
        return sum(r.get("commit") not in ours or r.get("seed") not in self.seeds for r in starts)

    def lines(self, ledger: list[dict]) -> list[str]:
        """The table, what is to be known of it, and the verdict."""
        lines = [f"{TEST_SCORE}    {'baseline':>9}  {'best':>9}"]
        notes = []
        for seed in self.seeds:
            cells = []
            for name, kept in (("baseline", self.baseline), ("best", self.best)):
                run = self.runs.get((kept["commit"], seed))
                cells.append(cell_of(run))
                notes += notes_of(run, f"{name}, seed {seed}")
            lines.append(f"seed {seed:<6} {cells[0]:>9}  {cells[1]:>9}")
        columns = [self.scores(self.baseline), self.scores(self.best)]
        for name, value in (("mean", mean), ("range", spread)):
            cells = [f"{value(some):.6f}" if some else "-" for some in columns]
            lines.append(f"{name:11} {cells[0]:>9}  {cells[1]:>9}")
        place = f"{self.baseline['commit'][:7]}, the best {self.best['commit'][:7]}"
        lines += [f"the baseline is {place}: {name_of(self.best)}", *notes]
        if self.is_reused():
            lines.append("the baseline's runs are an earlier confirmation's, of another hour")
        looks = self.other_looks(ledger)
        lines.append(f"other runs that have looked at the test split: {looks or 'none'}")
        found = self.interval()
        lines.append(is_it_real(*found) if found else "too few scores for a verdict")
        return lines

    def is_reused(self) -> bool:
        """Whether the baseline was measured before the best's first run, not in turn with it."""
        before, after = self.numbers(self.baseline), self.numbers(self.best)
        return bool(before and after) and max(before) < min(after)

    def numbers(self, kept: dict) -> list[int]:
        found = [self.runs.get((kept["commit"], seed)) for seed in self.seeds]
        return [run["n"] for run in found if run]


def cell_of(run: dict | None) -> str:
    if run is None:
        return "-"
    return "crash" if run["score"] is None else f"{run['score']:.6f}"


def notes_of(run: dict | None, name: str) -> list[str]:
    """What is to be known of one run."""
    if run is None:
        return []
    if run["score"] is None:
        again = f"night.py show {run['n']} has its log, confirm runs it again"
        return [f"{name} gave no score: {run['why']}; {again}"]
    if run["disturbed"]:
        share = f"{run['disturbed']:.0%} of its rate"
        return [f"{name} was DISTURBED twice ({share}): the faster run counts"]
    return [f"{name} ran again: {why}" for why in run["again"]]


# ---------------------------------------------------------------------- results.tsv, and the audit

STATUSES = ("keep", "discard", "crash")
START_UP = 900  # seconds before the first batch that no cold compiler needs
UNEXPLAINED = 60  # seconds that start-up, training and scoring may leave unexplained
PASSES = 4  # times more or fewer than usual while scoring: more than another batch size makes


@dataclasses.dataclass(frozen=True)
class Row:
    n: int  # in order, from 1
    commit: str  # any text: other logs call their experiments `baseline`, `001`, `none`
    score: float | None  # None of a crash
    memory_gb: float | None
    status: str
    what: str

    @property
    def hash(self) -> str | None:
        """The commit, where the row names one that git may know."""
        return self.commit.lower() if re.fullmatch("[0-9a-fA-F]{7,40}", self.commit) else None


@dataclasses.dataclass(frozen=True)
class Finding:
    fine: bool  # False where it speaks against the results
    words: str

    def __str__(self) -> str:
        return f"{' ' if self.fine else '!'} {self.words}"


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def read_results(path: Path) -> tuple[list[Row], list[str]]:
    """(rows, one sentence for each reason why others were skipped) of any results.tsv.

    Columns go by their names, in any order; without a header they are night.py's. A status counts
    in any case, a score where it is positive and finite.
    """
    text = path.read_text("utf-8-sig", "replace") if path.is_file() else ""  # any line ends
    lines = [[cell.strip() for cell in line.split("\t")] for line in text.split("\n")]
    numbered = [(place, cells) for place, cells in enumerate(lines, 1) if any(cells)]
    names = COLUMNS
    if numbered and is_header(numbered[0][1]):
        names = [cell.lower() for cell in numbered.pop(0)[1]]
    rows, no_status, no_score = [], [], []
    for place, cells in numbered:
        found = dict(reversed(list(zip(names, cells))))  # of two columns with one name the first
        status, score = found.get("status", ""), number(found.get(SCORE, ""))
        if status.lower() not in STATUSES:
            no_status.append((place, status))
        elif status.lower() == "crash":
            rows.append((found, None))
        elif score is None or not 0 < score < float("inf"):
            no_score.append((place, found.get(SCORE, "")))
        else:
            rows.append((found, score))
    missing = [name for name in ("status", SCORE) if name not in names]
    if missing and numbered:
        columns = one_line(", ".join(names), 200)
        words = f"all {len(numbered)} rows were skipped: no column is called {missing[0]}, only "
        return [], [words + f"{columns}; rename the right one, or change SCORE in night.py"]
    skipped = []
    if no_status:
        skipped.append(said_of(no_status, f"their status is none of {', '.join(STATUSES)}"))
    if no_score:
        skipped.append(said_of(no_score, f"their {SCORE} is no positive number"))
    return [row(n, *found) for n, found in enumerate(rows, 1)], skipped


def is_header(cells: list[str]) -> bool:
    """A first line without numbers; one cell alone where it is a header with other separators."""
    named = len(cells) > 1 or SCORE in cells[0].lower()
    return named and not any(number(cell) is not None for cell in cells)


def row(n: int, found: dict[str, str], score: float | None) -> Row:
    memory = number(found.get("memory_gb", ""))
    return Row(
        n=n,
        commit=found.get("commit", ""),
        score=score,
        memory_gb=memory if memory is not None and 0 <= memory < float("inf") else None,
        status=found["status"].lower(),
        what=found.get("description", ""),
    )


def said_of(cells: list[tuple[int, str]], why: str) -> str:
    """Rows that were skipped for one reason: (line, the cell that is to blame)."""
    counted = Counter(one_line(text, 20) for _, text in cells).most_common()
    examples = some(f"{text!r} ({count})" for text, count in counted)
    return f"{len(cells)} rows were skipped, {why}: {examples}; the first is line {cells[0][0]}"


def some(items: Iterable, most: int = 6) -> str:
    items = [str(item) for item in items]
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def gains(rows: list[Row]) -> list[tuple[Row, float, float]]:
    """(row, its gain over the best before, the best from there on) of each kept row; the first gains 0."""
    found, best = [], None
    for row in rows:
        if row.status == "keep":
            better = gain(row.score, best) if found else 0.0
            if not found or better > 0:
                best = row.score
            found.append((row, better, best))
    return found


def best_row(rows: list[Row]) -> Row:
    """The kept row with the best score."""
    return max((row for row in rows if row.status == "keep"), key=lambda row: gain(row.score, 0.0))


@dataclasses.dataclass
class Morning:
    """All that is known of the night in this folder, read once."""

    rows: list[Row]
    skipped: list[str]
    records: list[dict]  # the night's own; none of a log without its night
    started: dict[str, dict]  # run id: what the supervisor knows of the run
    ledger: list[dict]
    damaged: int  # lines of the ledger
    budgets: dict[str, float]  # fingerprint of what is prepared: seconds of training
    confirmed: list[dict] = dataclasses.field(default_factory=list)  # a confirmation's records

    @classmethod
    def here(cls) -> Morning:
        import prepare

        rows, skipped = read_results(ROOT / "results.tsv")
        records, confirmed, started, budgets = [], [], {}, {}
        with contextlib.suppress(Refused):  # not in its repository: the audit says so
            night = Night()
            records, confirmed = night.records(), night.confirmed()
            folders = [*night.queue.glob("[0-9]*"), *night.done.glob("[0-9]*")]
            for experiment in filter(None, map(Experiment.at, folders)):
                for run in experiment.timed_runs():
                    started[run["id"]] = run
        with contextlib.suppress(prepare.Stop):  # nothing prepared: no budget to compare with
            budgets = {prepare.fingerprint(): prepare.manifest()["time_budget"]}
        return cls(rows, skipped, records, started, *prepare.read_ledger(), budgets, confirmed)

    def history(self) -> list[dict]:
        """The night's records; of a log without them what its rows say in their place."""
        if self.records:
            return self.records
        found = []
        for row in self.rows:
            known = row.hash if row.what.startswith("baseline") else None  # whose repeats count
            said = {"commit": known or f"row {row.n}", "simpler": row.what.startswith("simpler")}
            found.append({"n": row.n, "score": row.score, "status": row.status, **said})
        return found

    def noise_floor(self) -> float | None:
        return noise_floor(self.history())


def audit(morning: Morning) -> Iterator[Finding]:
    """All that was looked at, in sentences."""
    rows, records, started = morning.rows, morning.records, morning.started
    in_git = git("rev-parse", "--is-inside-work-tree", check=False) == "true"
    claimed = {row.hash[:7] for row in rows if row.hash}
    runs = joined(morning.ledger)
    branch = branch_of(runs, claimed, records)
    own = [run for run in runs if run["run"] in started or is_own(run, branch, claimed)]
    ids = {run["run"] for run in own}
    val = [run for run in runs if run.get("split") == "val"]
    val = [run for run in val if run["run"] in ids or (run.get("commit") or "")[:7] in claimed]
    test = [run for run in own if run.get("split") == "test"]
    by_night = [run for run in test if run["run"] in started]
    if rows and not val:
        yield Finding(False, "the ledger holds no run of this night: no score can be checked")
    elif val:
        matched = match(rows, val)
        accounted = {run["run"] for run in matched.values()} | started.keys()
        yield from audit_scores(rows, val, matched)
        yield from audit_left([run for run in val if run["run"] in ids - accounted])
        yield from audit_sameness([*val, *by_night])
        yield from audit_clock([*val, *by_night], started, morning.budgets)
    if morning.damaged:
        yield Finding(False, f"{morning.damaged} lines of the ledger are damaged")
    yield from audit_test(test, started)
    yield from audit_confirmation(morning.confirmed, test, by_night)
    if in_git:
        yield from audit_code([*val, *by_night])
        yield from audit_branch(rows, records, branch)
        yield from audit_book(rows, records)
    else:
        words = "this is no git repository: what the commits touch cannot be checked"
        yield Finding(False, words)
    yield from audit_keeping(morning.history())


def joined(ledger: list[dict]) -> list[dict]:
    """One dictionary a run, its start and its end together, oldest first; `began` is when it began."""
    runs: dict[str, dict] = {}
    for record in ledger:
        if "run" in record:
            run = runs.setdefault(record["run"], {})
            run.update(record)
            if record.get("event") == "start":
                run["began"] = record.get("time")
    return list(runs.values())


def branch_of(runs: list[dict], claimed: set[str], records: list[dict]) -> str:
    """The night's branch; HEAD where there is none. Runs in worktrees name no branch."""
    branch = f"autoresearch/{knob('tag', '')}"
    if not records:  # a night without night.py: where most of its runs were
        mine = [run for run in runs if (run.get("commit") or "")[:7] in claimed]
        named = Counter(run.get("branch") for run in mine if is_here(run)).most_common(1)
        branch = named[0][0] if named else branch
    known = git("rev-parse", "-q", "--verify", f"refs/heads/{branch}", check=False)
    return branch if known else "HEAD"


def is_here(run: dict) -> bool:
    return Path(run.get("repo") or "/").resolve() == ROOT


def is_own(run: dict, branch: str, claimed: set[str]) -> bool:
    """Whether a run that the supervisor did not start belongs to this night all the same."""
    trees = f"{ROOT}/.night/{branch.removeprefix('autoresearch/')}/"
    if (run.get("repo") or "").startswith(trees):
        return True
    same_branch = branch == "HEAD" or run.get("branch") == branch
    return is_here(run) and (same_branch or (run.get("commit") or "")[:7] in claimed)


def match(rows: list[Row], runs: list[dict]) -> dict[int, dict]:
    """{row's n: the run that measured it}, no run twice; a crash may have a run without a score."""
    by_commit: dict[str, list[dict]] = {}
    for run in runs:
        by_commit.setdefault((run.get("commit") or "")[:7], []).append(run)
    matched = {}
    for row in rows:
        mine = by_commit.get(row.hash[:7], []) if row.hash else []
        for run in mine:
            score = run.get("score")
            if row.score is None or score is None:
                same = row.score is score
            else:
                same = abs(score - row.score) < 1.5e-6  # a row has six decimals
            if same:
                matched[row.n] = run
                mine.remove(run)
                break
    return matched


def run_name(run: dict) -> str:
    return f"{(run.get('commit') or '-')[:7]} at {run.get('time')}"


def audit_scores(rows: list[Row], runs: list[dict], matched: dict[int, dict]) -> Iterator[Finding]:
    """Claims against measurements."""
    wrong, edited, lucky = [], [], []
    scored = [row for row in rows if row.score is not None]
    for row in scored:
        run = matched.get(row.n)
        if run is None:
            mine = [r for r in runs if row.hash and (r.get("commit") or "")[:7] == row.hash[:7]]
            known = " and ".join(f"{r['score']:.6f}" for r in mine if r.get("score") is not None)
            claim = f"{row.score:.6f} claimed, {known or 'nothing'} measured"
            wrong.append(f"{row.n} ({one_line(row.commit, 20)}: {claim})")
        elif run.get("changed"):
            edited.append(row.n)
        elif row.status == "keep" and run.get("seed", BASELINE_SEEDS[0]) != BASELINE_SEEDS[0]:
            lucky.append(row.n)
    if scored:
        words = f"{len(scored) - len(wrong)} of {len(scored)} scores match the ledger"
        words += f"; not experiments {some(wrong)}" if wrong else ""
        yield Finding(not wrong, words)
    if edited:
        words = f"{EDITED} had uncommitted changes when these were measured: experiments "
        yield Finding(False, words + some(edited))
    if lucky:
        words = f"kept with another seed than {BASELINE_SEEDS[0]}: experiments {some(lucky)}"
        yield Finding(False, words)


def audit_left(left: list[dict]) -> Iterator[Finding]:
    """Runs of this night that no row tells of and the supervisor did not start."""
    vanished = [run for run in left if run.get("score") is not None]
    silent = [run for run in left if run.get("score") is None]
    if vanished:
        names = some(f"{run['score']:.6f} ({run_name(run)})" for run in vanished)
        yield Finding(False, f"{len(vanished)} measured scores have no row: {names}")
    if silent:
        names = some(
            f"{run_name(run)}: {one_line(run.get('failure') or 'no end', 60)}" for run in silent
        )
        words = f"{len(silent)} runs started, gave no score and left no row: {names}"
        yield Finding(True, words)
    if not left:
        yield Finding(True, "every run that started has its row")


def audit_sameness(runs: list[dict]) -> Iterator[Finding]:
    """What makes two scores comparable."""
    kinds = {
        "fingerprint": "fingerprints",
        "device": "devices",
        "torch": "versions of torch",
        "driver": "versions of the driver",
    }
    for key, several in kinds.items():
        having: dict[str, list[dict]] = {}
        for run in runs:
            if run.get(key):
                having.setdefault(run[key], []).append(run)
        if len(having) == 1:
            yield Finding(True, f"one {key} throughout: {next(iter(having))}")
        elif having:
            usual, *others = sorted(having, key=lambda value: -len(having[value]))
            words = [f"{value} ({some(map(run_name, having[value]), 3)})" for value in others]
            words = f"{usual} ({len(having[usual])} runs), {some(words)}"
            yield Finding(
                False, f"{len(having)} {several}, whose scores cannot be compared: {words}"
            )


def audit_clock(
    runs: list[dict], started: dict[str, dict], budgets: dict[str, float]
) -> Iterator[Finding]:
    """Seconds: a run's own against its budget, the other runs', the times of day, the supervisor's."""
    scored = [run for run in runs if run.get("score") is not None]
    found: dict[str, list[dict]] = {}
    for doubts in (
        out_of_line(scored),
        *(training_doubts(run, budgets.get(run.get("fingerprint"))) for run in scored),
        *(unexplained(run, started.get(run["run"], {}).get("wall_seconds")) for run in scored),
    ):
        for run, words in doubts:
            found.setdefault(words, []).append(run)
    for words, them in found.items():
        yield Finding(False, f"{words}: {some(map(run_name, them))}")


def out_of_line(scored: list[dict]) -> Iterator[tuple[dict, str]]:
    """Start-ups and scorings that are unlike the others': the clock does not run in them."""
    start_up = usual(run.get("startup_seconds") for run in scored)
    passes = usual(run.get("scoring_passes") for run in scored)
    share = usual(map(scoring_share, scored))
    longest = min(UNEXPLAINED + 3 * start_up, START_UP)
    for run in scored:
        if (run.get("startup_seconds") or 0) > longest:
            words = f"start-ups over {longest:.0f} s, in which nothing is measured"
            yield run, f"{words} (the usual is {start_up:.0f} s)"
        made = run.get("scoring_passes", passes)
        if not passes / PASSES <= made <= passes * PASSES:
            yield run, f"forward passes while scoring far from the usual {passes:.0f}"
        if scoring_share(run):
            expected = share * run["training_seconds"] / run["tokens"]
            if run["scoring_seconds"] > UNEXPLAINED + 3 * expected:
                yield run, "scoring far longer than its training lets expect"


def usual(values: Iterable[float | None]) -> float:
    known = [value for value in values if value]
    return median(known) if known else 0.0


def scoring_share(run: dict) -> float | None:
    """Scoring in tokens of training: the same for a large model and a small one."""
    per_second = rate(run)
    return per_second and run.get("scoring_seconds") and per_second * run["scoring_seconds"]


def training_doubts(run: dict, budget: float | None) -> Iterator[tuple[dict, str]]:
    """A run without tokens, and training that is too long or too short for its budget."""
    seconds = run.get("training_seconds")
    if run.get("tokens") == 0:
        yield run, "no tokens were drawn for training"
    if budget is None or seconds is None:
        return
    step = max(run.get("longest_step_seconds", 5), 0.01 * budget)  # older ledgers: 5 s were allowed
    if seconds > budget + step + 0.1:
        yield run, f"trained for more than one step beyond the budget of {budget:g} s"
    if seconds < budget / 2:
        yield run, f"trained for less than half of the budget of {budget:g} s"


def unexplained(run: dict, wall: float | None) -> Iterator[tuple[dict, str]]:
    """Seconds by other clocks that the run's own start-up, training and scoring do not account for."""
    training, scoring = run.get("training_seconds"), run.get("scoring_seconds")
    if training is None:
        return
    if run.get("began") and run.get("time"):
        left = seconds_of(run["time"]) - seconds_of(run["began"]) - training - (scoring or 0)
        most = UNEXPLAINED if scoring else UNEXPLAINED + training  # older ledgers: scoring unknown
        if not -2 <= left <= most:
            yield run, "training seconds that the times of day contradict"
    if wall and scoring:
        left = wall - (run.get("startup_seconds") or 0) - training - scoring
        if not -2 <= left <= UNEXPLAINED:
            yield run, "wall time that start-up, training and scoring do not explain"


def seconds_of(time_of_day: str) -> float:
    return datetime.strptime(time_of_day, "%Y-%m-%dT%H:%M:%S%z").timestamp()


def audit_test(tests: list[dict], started: dict[str, dict]) -> Iterator[Finding]:
    """The test split is for the end: baseline and winner, once by hand or by the night's own runs."""
    scored = [run for run in tests if run.get("score") is not None]
    by_hand = [run for run in scored if run["run"] not in started]
    if scored:
        few = len(by_hand) <= 2 and len({run.get("commit") for run in scored}) <= 2
        words = f"the test split was scored {len(scored)} times"
        yield Finding(few, words if few else words + "; more than once for baseline and winner")


def audit_confirmation(
    confirmed: list[dict], test: list[dict], by_night: list[dict]
) -> Iterator[Finding]:
    """The confirmation's records against the ledger: nothing edited, nothing left out."""
    keys = ("commit", "seed", "score")
    measured = {run["run"]: [run.get(key) for key in keys] for run in test}
    scored = [record for record in confirmed if record["score"] is not None]
    wrong = [r["n"] for r in scored if measured.get(r["run"]) != [r[key] for key in keys]]
    told = {(record["commit"], record["seed"]) for record in scored}
    left = [run for run in by_night if (run.get("commit"), run.get("seed")) not in told]
    left = [run_name(run) for run in left if run.get("score") is not None]
    if scored:
        words = f"{len(scored) - len(wrong)} of {len(scored)} scores of the confirmation match"
        words += " the ledger" + (f"; not runs {some(wrong)}" if wrong else "")
        yield Finding(not wrong, words)
    if left:
        words = f"{len(left)} scores on the test split are missing in the confirmation: "
        yield Finding(False, words + some(left))


def held(commit: str, path: str) -> str | None:
    """sha256 of a file as a commit has it; None where git has not both."""
    content = git_bytes("cat-file", "blob", f"{commit}:{path}", check=False)
    return None if content is None else hashlib.sha256(content).hexdigest()


def is_known(commit: str) -> bool:
    return git("cat-file", "-e", f"{commit}^{{commit}}", check=False) is not None


def audit_code(runs: list[dict]) -> Iterator[Finding]:
    """What ran, against what git holds under its commit; and code that lies beside it."""
    scored = [run for run in runs if run.get("score") is not None]
    brought = next(
        (run["imported"] for run in scored if "imported" in run), {}
    )  # first, by the machine
    other, strangers, everywhere = [], [], []
    for run in scored:
        commit, ran = run.get("commit"), run.get("train_sha256")
        if not commit or run.get("changed"):
            continue
        sha256 = held(commit, EDITED)
        if sha256 is None and not is_known(commit):
            continue  # git has collected it; audit_branch says so of a kept one
        if ran and ran != sha256:
            other.append(run_name(run))
        for name, start in run.get("imported", {}).items():
            if (held(commit, name) or "").startswith(start):
                continue
            if brought.get(name) == start and Path(name).is_absolute():
                everywhere.append(name)
            else:
                strangers.append(f"{name} (in {run_name(run)})")
    if other:
        yield Finding(False, f"what ran is not the {EDITED} of its commit: {some(other)}")
    if strangers:
        yield Finding(False, f"imported, and not in the commit: {some(strangers)}")
    if everywhere:
        words = "imported from the first run on, and in no commit"
        yield Finding(True, f"{words}: {some(sorted(set(everywhere)))}")
    beside = git("ls-files", "-z", "--others", "--", "*.py", "*.so", "*.pyd", "*.dylib") or ""
    beside = [name for name in beside.split("\0") if name and not is_environment(name)]
    if beside:
        yield Finding(False, f"code beside the files that git holds: {some(beside)}")


def is_environment(name: str) -> bool:
    """Hidden folders (.venv, .night) and virtual environments by any name."""
    folders = Path(name).parents[:-1] if "/" in name else []
    hidden = any(folder.name.startswith(".") for folder in folders)
    return hidden or any((ROOT / folder / "pyvenv.cfg").is_file() for folder in folders)


def audit_branch(rows: list[Row], records: list[dict], branch: str) -> Iterator[Finding]:
    """The kept commits and nothing else on the branch; nothing but EDITED touched."""
    changed = set((git("diff", "--name-only", "HEAD", check=False) or "").split("\n"))
    changed -= {EDITED, "program.md", "analysis.ipynb", "README.md", ""}
    if changed:
        yield Finding(False, f"changed and not committed: {some(sorted(changed))}")
    kept = [row for row in rows if row.status == "keep"]
    if not kept:
        return
    unknown = [row for row in kept if not row.hash or not is_known(row.hash)]
    tip, best = branch, best_of(records)
    if best and git("merge-base", "--is-ancestor", branch, best["commit"], check=False) is not None:
        tip = best["commit"]  # kept by the supervisor, and no command has moved the branch since
    history = (git("rev-list", tip, check=False) or "").split()
    full = {
        row.n: next((h for h in history if h.startswith(row.hash)), None)
        for row in kept
        if row.hash
    }
    missing = [row for row in kept if row not in unknown and not full[row.n]]
    if unknown:
        ids = some(one_line(row.commit, 20) or "-" for row in unknown)
        yield Finding(False, f"kept, but git knows no such commit: {ids}")
    if missing:
        ids = some(row.commit for row in missing)
        yield Finding(False, f"kept, but not on the branch {branch}: {ids}")
    start = full.get(kept[0].n)
    if not start:
        return
    extra, beyond = [], []
    for commit in (git("rev-list", "--reverse", f"{start}..{tip}") or "").split():
        if commit not in full.values():
            extra.append(commit[:7])
        files = set((git("diff", "--name-only", f"{commit}~1", commit) or "").split("\n"))
        files -= {EDITED, ""}
        if files:
            beyond.append(f"{commit[:7]} ({some(sorted(files), 3)})")
    if extra:
        yield Finding(False, f"on the branch, but in no row as kept: {some(extra)}")
    if beyond:
        yield Finding(False, f"commits that touch more than {EDITED}: {some(beyond)}")
    if not (unknown or missing or extra or beyond):
        words = f"every kept commit is on the branch and touches only {EDITED}"
        yield Finding(True, words if len(kept) > 1 else "the branch stands at the baseline")


def audit_book(rows: list[Row], records: list[dict]) -> Iterator[Finding]:
    """The rows, the night's own records and the experiments' refs, against each other."""
    if not records:
        return
    said = Counter(row_key(row.commit, row.score, row.status) for row in rows)
    noted = Counter(row_key(r["commit"], r["score"], r["status"]) for r in records)
    by_hand = [row.n for row in rows if row_key(row.commit, row.score, row.status) not in noted]
    lost = [r["n"] for r in records if row_key(r["commit"], r["score"], r["status"]) not in said]
    if by_hand:
        yield Finding(False, f"rows that the night did not write so: experiments {some(by_hand)}")
    if lost:
        yield Finding(False, f"measured by the night, without such a row: experiments {some(lost)}")
    namespace = f"refs/autoresearch/{knob('tag', '')}/"
    refs = set((git("for-each-ref", "--format=%(objectname)", namespace) or "").split())
    gone = [r["n"] for r in records if r["commit"] not in refs]
    if gone:
        words = "experiments without their ref, so git may lose their code"
        yield Finding(False, f"{words}: {some(gone)}")


def row_key(commit: str, score: float | None, status: str) -> tuple[str, str, str]:
    return commit[:7], f"{score or 0:.6f}", status


def audit_keeping(history: list[dict]) -> Iterator[Finding]:
    """Whether what was kept had earned it by the rule, and by what was known of the noise then."""
    best, unearned = None, []
    for i, record in enumerate(history):
        if record["status"] == "keep" and record["score"] is not None:
            floor = noise_floor(history[:i])
            if floor is None and not record["simpler"]:
                floor = 0.0  # never measured: any gain
            if decide(record["score"], best, floor, record["simpler"])[0] != "keep":
                unearned.append(record["n"])
            best = record["score"]
    if unearned:
        words = "kept without being better than the best by more than noise: experiments "
        yield Finding(False, words + some(unearned))


def audit_lines(morning: Morning) -> list[str]:
    findings = list(audit(morning))
    doubts = sum(not finding.fine for finding in findings)
    end = "Nothing found that speaks against these numbers."
    if doubts:
        end = f"{doubts} things to look at"
    return [*map(str, findings), end]


def say_audit():
    """Prints the audit of the night in this folder."""
    morning = Morning.here()
    print(*(f"! {words}" for words in morning.skipped), *audit_lines(morning), sep="\n")


# ------------------------------------------------------------- what the notebook shows, undrawn

WENT = ("training", "compiling", "scoring", "disturbed", "waiting")  # where a slot's hours may go
BARS = (60, 600, 3600, 6 * 3600, 86400)  # seconds that a bar of hours may stand for
MOST_BARS = 36


def page_counts(morning: Morning) -> list[str]:
    """How many experiments, the noise floor, and which rows were skipped."""
    count = Counter(row.status for row in morning.rows)
    kept = f"{count['keep']} kept, {count['discard']} discarded, {count['crash']} crashed"
    noise = morning.noise_floor()
    said = "not measured" if noise is None else f"{noise:.6f}"
    skipped = [f"! {words}" for words in morning.skipped]
    return [f"{len(morning.rows)} experiments: {kept}", f"noise floor: {said}", *skipped]


def page_best(rows: list[Row], noise: float | None) -> list[str]:
    """The best against the baseline, which is what was kept first."""
    kept = [row for row in rows if row.status == "keep"]
    if not kept:
        return ["nothing kept yet"]
    baseline, best = kept[0], best_row(rows)
    lines = []
    for name, row in (("baseline", baseline), ("best", best)):
        memory = "-" if row.memory_gb is None else f"{row.memory_gb:.1f}"
        what = f"{one_line(row.commit, 20)}  {memory} GB  {one_line(row.what, 70)}"
        lines.append(f"{name:8}  {row.score:.6f}  {what}")
    change, gained = best.score - baseline.score, gain(best.score, baseline.score)
    times = f", {gained / noise:.1f} times the noise floor" if noise else ""
    return [*lines, f"change    {change:+.6f} ({change / baseline.score:+.2%}{times})"]


def largest_gains(rows: list[Row]) -> list[tuple[Row, float]]:
    """(row, its gain) of all that was kept after the baseline, the largest first."""
    changes = [(row, better) for row, better, _ in gains(rows)[1:]]
    return sorted(changes, key=lambda change: -change[1])


def page_gains(rows: list[Row]) -> list[dict[str, str]]:
    """A table, one kept change a line."""
    return [
        {
            "experiment": str(row.n),
            "commit": one_line(row.commit, 20),
            "gain": f"{better:+.6f}",
            "score": f"{row.score:.6f}",
            "what": one_line(row.what, 70),
        }
        for row, better in largest_gains(rows)
    ]


def page_predictions(records: list[dict]) -> list[dict[str, str]]:
    """A table of what was expected and what came, in the order of ending."""
    told = [r for r in records if r.get("expect") is not None and r.get("got") is not None]
    return [
        {
            "experiment": str(r["n"]),
            "expected": f"{r['expect']:+.6f}",
            "got": f"{r['got']:+.6f}",
            "what": one_line(r["message"], 70),
        }
        for r in told
    ]


def page_calibration(records: list[dict], noise: float | None) -> str:
    said, direction, size = calibration(records, noise)
    if not said:
        return "nothing was predicted (night.py try --expect)"
    return f"{direction} of {said} predictions right in direction, {size} in size"


def page_confirmation(morning: Morning) -> list[str]:
    """The table of `night.py confirm`, as far as the best of the night has one."""
    confirmation = Confirmation.of(morning.records, morning.confirmed)
    if not morning.records:
        return ["night.py confirm compares what a night of its own has kept; this log has none"]
    if confirmation is None:
        return ["nothing to confirm: nothing was kept but the baseline"]
    if not confirmation.seeds:
        return ["the best is not confirmed yet: uv run night.py confirm"]
    return confirmation.lines(morning.ledger)


def score_axis(rows: list[Row], noise: float | None) -> tuple[float, float]:
    """Low and high end of the picture's axis: what was kept, with room for labels on the better side.

    What lies beyond (a failed idea) would press all else into a line.
    """
    scored = [row for row in rows if row.score is not None]
    scores = [row.score for row in scored if row.status == "keep"] or [row.score for row in scored]
    low, high = min(scores, default=1.0), max(scores, default=1.0)
    room = max(high - low, 10 * (noise or 0), 1e-3 * abs(high))
    below, above = (0.45, 0.35) if LOWER_IS_BETTER else (0.35, 0.45)
    return low - below * room, high + above * room


def run_spans(by_night: dict, measured: dict, lost: bool) -> list[tuple[str, float, float]]:
    """(what, from, to) of one run, in seconds since 1970: compiling, training, scoring; or disturbed.

    by_night: what the supervisor knows of it (began, ended); measured: what the ledger does (began
    with its first batch, training_seconds). Either may be empty. lost: disturbed or cut off.
    """
    first = seconds_of(measured["began"]) if measured.get("began") else None
    ended = by_night.get("ended") or measured.get("time") or by_night["began"]
    ended = seconds_of(ended)
    if by_night:
        began = seconds_of(by_night["began"])
    elif first is None:
        return []
    else:
        began = first - (measured.get("startup_seconds") or 0)
    if lost:
        return [("disturbed", began, ended)]
    first = ended if first is None else first
    training = measured.get("training_seconds")
    trained = ended if training is None else first + training
    marks = [began, *(min(max(mark, began), ended) for mark in (first, trained)), ended]
    found = zip(("compiling", "training", "scoring"), marks, marks[1:])
    return [(what, start, end) for what, start, end in found if end > start]


def night_spans(morning: Morning) -> list[tuple[str, float, float]]:
    """Those of all runs of the night, without its confirmation.

    Of a night without night.py the ledger alone tells: Python's start and end count as waiting.
    """
    claimed = {row.hash[:7] for row in morning.rows if row.hash}
    measured = {run["run"]: run for run in joined(morning.ledger) if run.get("split") == "val"}
    lost = {record["run"] for record in morning.records if record.get("disturbed")}
    found = []
    for run_id, run in morning.started.items():
        again = run.get("again", "")
        if run.get("kind") != "confirm" and run.get("began"):
            is_lost = run_id in lost or again.startswith(("disturbed", "cut off", "stopped"))
            found += run_spans(run, measured.get(run_id, {}), is_lost)
    for run_id, run in measured.items():
        if run_id not in morning.started and (run.get("commit") or "")[:7] in claimed:
            found += run_spans({}, run, False)
    return found


def side_by_side(spans: list[tuple[str, float, float]]) -> int:
    """How many runs stood side by side at most; two seconds more or less are no overlap."""
    changes = [(start, 1) for _, start, end in spans if end - start > 2]
    changes += [(end - 2, -1) for _, start, end in spans if end - start > 2]
    standing = most = 0
    for _, change in sorted(changes):
        standing += change
        most = max(most, standing)
    return max(most, 1)


def hours(spans: list[tuple[str, float, float]]) -> tuple[float, int, list[dict[str, float]]]:
    """(seconds a bar stands for, slots, the slots' seconds in each bar by what they went to).

    The bars go from the first start to the last end. A slot waits for the agent where no run
    stands in it; there are as many slots as runs ever stood side by side.
    """
    if not spans:
        return BARS[0], 1, []
    first = min(start for _, start, _ in spans)
    length = max(end for *_, end in spans) - first
    fitting = [seconds for seconds in BARS if length / seconds <= MOST_BARS]
    step = fitting[0] if fitting else BARS[-1]
    bars = [dict.fromkeys(WENT, 0.0) for _ in range(max(1, math.ceil(length / step)))]
    for what, start, end in spans:
        for i in range(int((start - first) // step), len(bars)):
            begins = first + i * step
            bars[i][what] += max(0.0, min(end, begins + step) - max(start, begins))
            if end <= begins + step:
                break
    slots = side_by_side(spans)
    for i, bar in enumerate(bars):
        there = slots * min(step, length - i * step)
        bar["waiting"] = max(0.0, there - sum(bar.values()))
    return step, slots, bars


def page_hours(bars: list[dict[str, float]], slots: int) -> str:
    """The shares, in one line."""
    total = sum(sum(bar.values()) for bar in bars)
    if not total:
        return "nothing of the night's hours is known"
    shares = [f"{sum(bar[what] for bar in bars) / total:.0%} {what}" for what in WENT]
    places = "1 slot" if slots == 1 else f"{slots} slots"
    return f"{total / 3600:.1f} hours of {places}: {', '.join(shares)}"


# ---------------------------------------------------------------------------------- the commands


def status(night: Night):
    if not night.begun():
        print(f"no night has begun; the next is {night.tag} (program.md's tag), on {night.branch}")
        print("next: uv run night.py begin")
        return
    print(f"night {night.tag} on {night.branch}")
    night.settle()
    lines = standing(night)
    recent = [f"  {row_of(record)[:WIDTH]}" for record in night.records()[-5:]]
    if recent:
        lines += ["last rows of results.tsv:", *recent]
    with contextlib.suppress(FileNotFoundError):
        words = (night.home / "isolation").read_text()
        if words:
            lines.append(words)
    show_lines(lines)
    print("next:", what_next(night, night.records(), night.open()))


def begin(night: Night):
    """Branch, table and baseline; what is there already stays."""
    import prepare

    prepared = prepare.manifest()  # ends with the command to type where nothing is prepared
    time_limit(), slots()
    if git("rev-parse", "-q", "--verify", "HEAD", check=False) is None:
        raise Refused("this repository has no commit yet: git add -A && git commit, then begin")
    changed = git("status", "--porcelain", "--untracked-files=no").splitlines()
    others = [line[2:].strip() for line in changed if line[2:].strip() != EDITED]
    if others:
        named = ", ".join(others[:5])
        raise Refused(
            f"changed and not committed: {named}: commit it, or git checkout it, then begin"
        )
    check_results(night)
    head = git("symbolic-ref", "-q", "--short", "HEAD", check=False)
    edits = (
        f"{EDITED} has edits: git commit them as the baseline, or git checkout {EDITED}, then begin"
    )
    if head != night.branch:
        if changed:
            raise Refused(edits)
        exists = git("rev-parse", "-q", "--verify", f"refs/heads/{night.branch}", check=False)
        git("switch", "-q", *([] if exists else ["-c"]), night.branch)
    for folder in (night.queue, night.done):
        folder.mkdir(parents=True, exist_ok=True)
    if not night.results.is_file():
        write_once(night.results, ("\t".join(COLUMNS) + "\n").encode())
    scored = [r for r in night.records() if r["kind"] == "baseline" and r["score"] is not None]
    queued = [e.asked for e in night.open() if e.is_baseline]
    there = [*scored, *queued]
    missing = [seed for seed in BASELINE_SEEDS if seed not in [asked["seed"] for asked in there]]
    if changed and not there:
        raise Refused(edits)
    baseline = there[0]["commit"] if there else git("rev-parse", "HEAD")
    for seed in missing:
        enqueue(night, "baseline", baseline, baseline, "baseline", seed)
    night.settle()
    (night.folder / "stop").unlink(missing_ok=True)
    wake(night)
    fixed = {key: prepared[key] for key in ("corpus", "seq_len", "vocab_size", "time_budget")}
    settings = ", ".join(f"{key} {value}" for key, value in fixed.items())
    print(f"prepared: {settings}; fingerprint {prepare.fingerprint()}")
    status(night)


def check_results(night: Night):
    """Refuses a results.tsv that is not this night's: nothing is mixed, nothing overwritten."""
    if not night.results.is_file():
        return
    lines = night.results.read_bytes().decode("utf-8-sig", "replace").splitlines()
    known = {record["commit"][:7] for record in night.records()}
    wrong = None
    if lines and lines[0].split("\t") != COLUMNS:
        wrong = "has other columns than this night's"
    elif any(line.split("\t")[0] not in known for line in lines[1:]):
        wrong = "is of another night"
    if wrong:
        raise Refused(f"results.tsv {wrong}: mv results.tsv results-before.tsv, then begin")


def enqueue(
    night: Night, kind: str, commit: str, base: str, message: str, seed: int, **more
) -> int:
    n = night.next_number()
    night.keep_ref(str(n), commit)
    asked = {"n": n, "kind": kind, "commit": commit, "base": base, "message": message, "seed": seed}
    asked |= {"simpler": False, "expect": None, "change": None, "asked": now(), **more}
    making = night.queue / f"{n}.new"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    write_json(making / "experiment.json", asked)
    os.replace(making, night.queue / str(n))
    return n


def try_(night: Night, message: str, simpler: bool, expect: float | None):
    """The edits of EDITED as one experiment."""
    if not message.strip():
        raise Refused('say what changes and what is expected: night.py try "..."')
    message = one_line(message, 2000)
    content = night.edits()
    if content is None:
        night.settle()
        raise Refused(
            f"{EDITED} has no edits: change it first, or bring an experiment's change back: night.py bring N"
        )
    capacity = max(LEAST_WAITING, len(slots()))
    waiting = [e for e in night.open() if e.asked["kind"] == "try" and e.state() == "waiting"]
    if len(waiting) >= capacity:
        raise Refused(
            f"{len(waiting)} experiments wait already, more would be stale: night.py wait, then try again"
        )
    mistake = syntax_error(content)
    if mistake:
        raise Refused(f"{EDITED} is not Python ({mistake}): mend it, then try again")
    base = night.tip()
    if simpler and len(content) >= len(file_at(base)):
        raise Refused(
            f"--simpler is for less code, and {EDITED} has not become shorter: say it without --simpler"
        )
    commit = commit_file(content, base, message)
    change = change_id(base, commit)
    for experiment in night.open():
        if experiment.asked["change"] == change:
            raise Refused(
                f"this is the change of experiment {experiment.n}, which has not ended: another idea"
            )
    for record in night.records():
        same = record["change"] == change and record["base"] == base
        if same and record["score"] is not None and not record["disturbed"]:
            came = f"{record['status']}, {record['score']:.6f}"
            again = "another idea; on another best it may be tried again"
            raise Refused(f"this is the change of experiment {record['n']} ({came}): {again}")
    n = enqueue(
        night,
        "try",
        commit,
        base,
        message,
        BASELINE_SEEDS[0],
        simpler=simpler,
        expect=expect,
        change=change,
    )
    night.settle()
    wake(night)
    best = best_of(night.records())
    where = f"the best, {best['commit'][:7]}" if best else f"the baseline, {night.tip()[:7]}"
    print(f"{n}: queued as {commit[:7]}; {EDITED} stands at {where} again, free for the next idea")


def syntax_error(content: bytes) -> str | None:
    """What a run would stumble over in its first second, or None."""
    if not EDITED.endswith(".py"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(content, EDITED, "exec", dont_inherit=True)
        except SyntaxError as error:
            return f"line {error.lineno}: {error.msg}"
        except ValueError as error:  # a zero byte
            return str(error)
    return None


def wait(night: Night, seconds: float):
    """Until something has ended that was not told yet, or the time is over."""
    log = night.home / "supervisor.log"
    logged = log.stat().st_size if log.is_file() else 0
    told = read_json(night.folder / "told") or {"records": 0, "ended": []}
    with night.command():
        night.settle()
        if wake(night):
            seconds = min(seconds, SILENCE)  # said at once, but not in a tight loop
    end = time.monotonic() + seconds
    while True:
        experiments = night.open()
        ended = [f"{e.n}-{len(e.runs())}" for e in experiments if e.state() == "ended"]
        news = len(night.records()) > told["records"]
        if baseline_lasts(experiments):  # otherwise what ended is decided within a moment
            news = news or set(ended) - set(told["ended"])
        failed = log.is_file() and log.stat().st_size > logged
        if news or failed or time.monotonic() >= end or not can_work(night):
            break
        time.sleep(4 * PAUSE)
    with night.command():
        night.settle()
        wake(night)
        records = night.records()
        lines = []
        if failed:
            lines.append(f"the supervisor ended and starts again: {end_of_log(log, 1)[-1]}")
        fresh = records[told["records"] :]
        if len(fresh) > 4:
            lines.append(f"{len(fresh) - 4} more have ended since: night.py shows the last rows")
        for record in fresh[-4:]:
            lines += verdict(record)
            if record["status"] == "crash" and record["run"]:
                lines += [f"   | {line}" for line in end_of_log(log_of(night, record), 6)]
        if any(record["status"] == "keep" for record in fresh):
            place = f"{EDITED} stands at the new best"
            if night.edits() is not None:
                place = f"{EDITED} has your edits, made on the best before: try puts them on the new one"
            lines.append(place)
        lines += standing(night)
        show_lines(lines)
        print("next:", what_next(night, records, night.open()))
        write_json(night.folder / "told", {"records": len(records), "ended": ended})


def confirm(night: Night, count: int | None):
    """Baseline and best on the test split. Waits until all is measured, then says what it means.

    A person types it, in the morning: it may wait for an hour, and to end it ends only the waiting.
    Said again it goes on with what is there. What has its score never runs again. Three seeds see
    a gain of three noise floors, eight one of a single noise floor (bench/RESULTS.md).
    """
    if count is not None and count < 2:
        raise Refused("confirm --seeds: an interval needs at least 2 seeds")
    import prepare

    with night.command():
        confirmation, numbers = queue_confirmation(night, count)
        wake(night)
    looks = confirmation.other_looks(prepare.read_ledger()[0])
    print(f"other runs that have looked at the test split: {looks or 'none'}")
    there = 2 * len(confirmation.seeds) - len(numbers)
    print(f"{len(numbers)} runs on the test split, {there} are measured already; Ctrl-C ends only")
    print("the waiting, and night.py confirm goes on with it", flush=True)
    follow(night, numbers)
    confirmation = Confirmation.of(night.records(), night.confirmed(), len(confirmation.seeds))
    lines = confirmation.lines(prepare.read_ledger()[0])
    print(*lines, sep="\n")
    if lines[-1].endswith("within chance"):
        count = 2 * len(confirmation.seeds)
        print(f"next: more seeds see smaller gains: uv run night.py confirm --seeds {count}")


def queue_confirmation(night: Night, count: int | None) -> tuple[Confirmation, set[int]]:
    """What is compared, and the numbers of its runs that wait or run; those missing are queued."""
    ended = {record["n"] for record in night.ended()}
    experiments = [e for e in night.open() if e.n not in ended]
    running = [str(e.n) for e in experiments if not e.is_confirm]
    if running:
        do = "night.py wait until they have ended, or drop them, then confirm"
        raise Refused(f"the night is running: {some(running)} wait or run: {do}")
    queued = {(e.asked["commit"], e.asked["seed"]): e.n for e in experiments}
    best = best_of(night.records())
    if best is None:
        raise Refused("nothing to confirm: no experiment was kept; night.py says where it stands")
    asked = [seed - CONFIRM_FROM + 1 for commit, seed in queued if commit == best["commit"]]
    least = max([count or CONFIRM_SEEDS, *asked])
    confirmation = Confirmation.of(night.records(), night.confirmed(), least)
    if confirmation is None:
        raise Refused("nothing to confirm: the best is the baseline")
    numbers = set()
    for name, record, seed in confirmation.in_turn():
        key = record["commit"], seed
        measured = confirmation.runs.get(key, {}).get("score") is not None
        if key in queued:
            numbers.add(queued[key])
        elif not measured:
            message = f"confirms the {name}, seed {seed}"
            commit = record["commit"]
            numbers.add(enqueue(night, "confirm", commit, commit, message, seed))
    return confirmation, numbers


def follow(night: Night, numbers: set[int]):
    """Says of each of these runs how it ended; returns when all have."""
    log = night.home / "supervisor.log"
    logged = log.stat().st_size if log.is_file() else 0
    left = set(numbers)
    looked = time.monotonic()
    while left:
        for record in night.confirmed():
            if record["n"] in left:
                left.remove(record["n"])
                print(*verdict(record), sep="\n", flush=True)
        if log.is_file() and log.stat().st_size > logged:
            raise Refused(
                f"the supervisor ended: {end_of_log(log, 1)[-1]}; night.py confirm goes on"
            )
        if time.monotonic() > looked + 2:  # a supervisor that was killed is started again
            looked = time.monotonic()
            wake(night)
        time.sleep(4 * PAUSE)


def find(night: Night, n: int) -> tuple[dict, Path]:
    """An experiment's record, or what was asked for where it has not ended, and its folder."""
    for place in (night.queue, night.done):
        asked = read_json(place / str(n) / "experiment.json")
        if asked:
            record = next((r for r in night.ended() if r["n"] == n), None)
            return record or asked, place / str(n)
    raise Refused(f"there is no experiment {n}: they go from 1 to {night.next_number() - 1}")


def show(night: Night, n: int):
    record, folder = find(night, n)
    lines = verdict(record) if "status" in record else [f"{n}: {name_of(record)}, not decided yet"]
    diff = (
        git("diff-tree", "-p", f"{record['commit']}^", record["commit"], "--", EDITED, check=False)
        or ""
    )
    changed = [printable(line)[:WIDTH] for line in diff.splitlines()[4:]]
    if record["kind"] == "try":
        lines += changed[:18]
        if len(changed) > 18:
            lines.append(f"... {len(changed) - 18} more lines: git show {record['commit'][:7]}")
    logs = sorted(folder.glob("run-*.log"), key=lambda path: int(path.stem[4:]))
    if logs:
        best = best_of(night.records())
        mine, other = progress(logs[-1]), progress(log_of(night, best)) if best else []
        if mine:
            cells = []
            for percent in range(10, 101, 10):
                loss, beside = at_share(mine, percent), at_share(other, percent)
                if loss is not None and percent <= mine[-1][0] + 10:
                    cells.append(
                        f"{percent}% {loss:.3f} ({beside:.3f})"
                        if beside is not None
                        else f"{percent}% {loss:.3f}"
                    )
            lines += ["loss (the best's): " + " ".join(cells[:5]), "   " + " ".join(cells[5:])]
        lines += ["end of the log:", *(f"   | {line}" for line in end_of_log(logs[-1], 10))]
    show_lines(lines)


def bring(night: Night, what: str):
    """Into EDITED: N's change on top of the best, or the best itself. Edits are put aside, never lost."""
    if what == "best":
        content = night.edits()
        if content is not None:
            count = len(list(night.folder.glob("edits-*")))
            aside = night.folder / f"edits-{count + 1}-{EDITED}"
            write_once(aside, content)
            night.write_edited(file_at(night.tip()))
            print(
                f"the edits were put aside: cp {aside.relative_to(ROOT)} {EDITED} brings them back"
            )
        night.settle()
        print(f"{EDITED} stands at the best, {night.tip()[:7]}")
        return
    if not what.isdigit():
        raise Refused(f"bring {one_line(what, 20)}: it takes an experiment's number, or best")
    record, folder = find(night, int(what))
    if record["kind"] == "baseline":
        raise Refused(f"{what} is the baseline: it has no change; night.py bring best")
    if record["kind"] == "confirm":
        raise Refused(f"{what} is a confirmation's run: it has no change; night.py bring best")
    night.settle()
    commit, tip, edits = record["commit"], night.tip(), night.edits()
    there = file_at(tip) if edits is None else edits
    place = f"the best, {tip[:7]}" if edits is None else "your edits"
    content = merged(there, file_at(f"{commit}^"), file_at(commit))
    if content is None:
        by_hand = f"read it (night.py show {what}) and make it by hand"
        raise Refused(f"{what}'s change does not apply to {place}: {by_hand}")
    if content == there:
        raise Refused(f"{what}'s change is in {place} already: another idea")
    night.write_edited(content)
    print(f"{what}'s change is in {EDITED}, on top of {place}: edit further, then night.py try")


def drop(night: Night, n: int):
    record, folder = find(night, n)
    if "status" in record:
        raise Refused(f"{n} has ended ({record['status']}): there is nothing to drop")
    if record["kind"] == "baseline":
        raise Refused(f"{n} is the baseline: all else is measured by it; to end all, night.py stop")
    (folder / "drop").touch()
    wake(night)
    print(f"{n} is dropped; night.py wait")


def stop(night: Night):
    """Ends what runs, to run again after `begin`. What a cluster runs, it runs to its end."""
    (night.folder / "stop").touch()
    on_cluster = any("cluster" in e.runs()[-1] for e in night.open() if e.state() == "running")
    ending = ", and what runs on the cluster comes to its end" if on_cluster else ""
    print(
        f"stopped: nothing starts{ending}; what ran will run again: uv run night.py begin goes on"
    )


def runs(count: int):
    """The ledger's last runs as a table; a start without an end was cut off, or is running."""
    import prepare

    ledger = cache_folder() / LEDGER
    size = ledger.stat().st_size if ledger.is_file() else 0
    start = max(0, size - 4096 * count)  # all of it where the night is short
    records, damaged = prepare.read_ledger(start)
    if start:
        damaged = max(0, damaged - 1)  # the line in which we began
    rows = {}
    for record in records:
        rows[record.get("run")] = record  # the end replaces the start
    table = "{:20}  {:8}  {:5}  {:>8}  {:>8}  {:>8}  {:>4}  {}"
    print(table.format("time", "commit", "split", "score", "seconds", "M tokens", "seed", "status"))
    for record in list(rows.values())[-count:]:
        score, tokens = record.get("score"), record.get("tokens")
        commit = (record.get("commit") or "-")[:7] + ("*" if record.get("changed") else "")
        status = record.get("failure") or ("scored" if score is not None else "no end")
        share = disturbed(record, [])
        if share and score is not None:
            status += f", disturbed ({share:.0%} of its own rate)"
        cells = [
            record.get("time", "-"),
            commit,
            record.get("split", "-"),
            "-" if score is None else f"{score:.6f}",
            record.get("training_seconds", "-"),
            "-" if tokens is None else f"{tokens / 1e6:.1f}",
            record.get("seed", "-"),
            status,
        ]
        print(one_line_cells(table, cells))
    said = f"{len(rows)} runs" if not start else "the last runs; night.py runs 100000 has all"
    if damaged:
        said += f", {damaged} damaged lines skipped"
    print(said + "; * has uncommitted changes")


def one_line_cells(table: str, cells: list) -> str:
    return "".join(c if c.isprintable() else "?" for c in table.format(*map(str, cells)))[:160]


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise Refused(f"{message}; type: uv run night.py --help")


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def main(argv: list[str] | None = None):
    parser = Parser(prog="night.py", description="The mechanics of the night.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser(
        "begin", help="the branch, the table, the baseline with three seeds; or goes on"
    )
    trying = commands.add_parser(
        "try", help="the edits of train.py as one experiment", allow_abbrev=False
    )
    trying.add_argument("message", help="what changes; what is expected")
    trying.add_argument(
        "--simpler", action="store_true", help="the code gets simpler: an equal score is kept"
    )
    trying.add_argument(
        "--expect", type=finite, metavar="CHANGE", help="of the score, such as -0.003"
    )
    waiting = commands.add_parser("wait", help="until something ended")
    waiting.add_argument("seconds", type=finite, nargs="?", default=WAIT)
    for name, words in (
        ("show", "diff, losses, end of the log"),
        ("drop", "gives up what waits or runs"),
    ):
        commands.add_parser(name, help=words).add_argument("n", type=int)
    commands.add_parser("stop", help="ends what runs; nothing starts before you say begin")
    commands.add_parser("bring", help="N's change back into train.py, or `best`").add_argument(
        "what"
    )
    commands.add_parser("runs", help="the ledger as a table").add_argument(
        "count", type=int, nargs="?", default=30
    )
    commands.add_parser("audit", help="what speaks against the results")
    confirming = commands.add_parser(
        "confirm", help="baseline and best on the test split: is the gain real?", allow_abbrev=False
    )
    confirming.add_argument("--seeds", type=int, metavar="N", help="of each; 3 if not said")
    commands.add_parser("supervise")  # by the other commands
    args = parser.parse_args(argv)
    if args.command == "runs":
        return runs(args.count)
    if args.command == "audit":
        return say_audit()
    if args.command == "supervise":
        return supervise()
    night = Night()
    if args.command not in (None, "begin") and not night.begun():
        raise Refused("no night has begun: uv run night.py begin")
    if args.command == "wait":
        return wait(night, args.seconds)
    if args.command == "confirm":
        return confirm(night, args.seeds)
    with night.command():
        if night.begun():
            wake(night)  # whatever the command says then, the night goes on
        if args.command is None:
            status(night)
        elif args.command == "begin":
            begin(night)
        elif args.command == "try":
            try_(night, args.message, args.simpler, args.expect)
        elif args.command == "show":
            show(night, args.n)
        elif args.command == "bring":
            bring(night, args.what)
        elif args.command == "drop":
            drop(night, args.n)
        elif args.command == "stop":
            stop(night)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise Refused("interrupted; what runs goes on: uv run night.py") from None
    except OSError as error:
        where = error.filename or ROOT
        raise Refused(
            f"{where}: {error.strerror or error}; nothing is lost: mend that, then say the same again"
        ) from None
