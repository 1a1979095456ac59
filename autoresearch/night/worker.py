"""
One run: a worktree, a process of its own that watches it, a time limit, and isolation.

LocalEngine starts runs on this machine; a node of a cluster calls run_to_its_end, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from autoresearch import compiler
from autoresearch.common import (
    cache_dir,
    inherited_environment,
    lock,
    seconds_between,
    seconds_of,
    stamp,
    utc,
    write_json,
)
from autoresearch.night import rules
from autoresearch.night.doubts import CONDITIONS, FELL_BACK
from autoresearch.night.experiment import Experiment, split_of
from autoresearch.night.heldout import HeldOut
from autoresearch.night.settings import TARGET, local_slots, setting
from autoresearch.night.slower import allow_isolation, machine_lines
from autoresearch.night.store import Night
from autoresearch.night.target import Witness
from autoresearch.referee.ledger import ledger_path, read_ledger
from autoresearch.referee.manifest import HELD_OUT

POLL_SECONDS = 0.25  # seconds between two looks at a run
COMPILER_WRITES = 10  # seconds; a compiler writes one file within them, on a busy machine

# ------------------------------------------------------------------------------ ending processes


def become_subreaper():
    """Linux: orphans among our descendants become our children, so that none outlives its run."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def die_with_parent():
    """Linux: SIGKILL for this process as soon as its parent has ended."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def kill_group(group: int):
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def kill_children():
    """Kills what is left below this process, also what left its session (Linux, as a subreaper)."""
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


def kill_leftovers(run_id: str):
    """Kills what a run has left whose watcher died: all that carries its id (Linux)."""
    mark = f"AUTORESEARCH_RUN={run_id}".encode()
    found, end = True, time.monotonic() + 10
    while found and time.monotonic() < end:  # again, for what was forked meanwhile
        found = False
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    found = True


# ------------------------------------------------------------------------- isolation, environment

READ_ONLY = """
mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" || exit 125
mount --bind "$2" "$2" && mount -o remount,rw,bind "$2" || exit 125
"""
WITHOUT_HIDING = f"""{READ_ONLY}
shift 2
exec "$@"
"""
# Nothing is seen of the held-out text, packed or as it was downloaded. The second namespace of users has
# no rights over these mounts, so nobody in it undoes them, nor looks into a process outside.
HIDING = f"""{READ_ONLY}
for folder in "$1"/*/{HELD_OUT} "$1/shards"; do
  [ ! -d "$folder" ] || mount -t tmpfs -o ro none "$folder" || exit 125
done
ledger=$2
shift 2
exec unshare -r sh -c '[ -w "$0" ] && exec "$@"' "$ledger" "$@"
"""
CAN_READ = (
    "runs here can read the text that scores them: no second namespace of users is allowed "
    "(`sysctl user.max_user_namespaces`), or the ledger belongs to another user"
)


@dataclass(frozen=True)
class Isolation:
    """What this machine can keep a run away from."""

    prefix: list[str]  # of the run's command
    warning: str  # what is missing, in one sentence for the status; empty where nothing is
    hides: bool = False  # is the held-out text out of a run's reach?

    @classmethod
    def here(cls) -> Isolation:
        """No network, a read-only cache and no held-out text, by Linux's namespaces where they may be made.

        The cache of another target than train.py is the folder of its night, where runs work: only the
        network is cut off, and with the setting `network: on` nothing is.
        """
        if TARGET.is_train_py:
            ledger_path().touch()
            places = [str(cache_dir()), str(ledger_path())]
            if prefix := cls._unshared(["sh", "-c", HIDING, "sh", *places]):
                return cls(prefix, "", hides=True)
            if prefix := cls._unshared(["sh", "-c", WITHOUT_HIDING, "sh", *places]):
                return cls(prefix, CAN_READ)
        elif setting("network", "off").startswith("on"):
            return cls([], "")
        elif prefix := cls._unshared([]):
            return cls(prefix, "")
        and_the_cache = " and the cache" if TARGET.is_train_py else ""
        return cls(
            [],
            f"runs here are not cut off from the network{and_the_cache}: {allow_isolation()}",
        )

    @staticmethod
    def _unshared(inside: list[str]) -> list[str] | None:
        """The prefix that runs `inside`, then a command, without a network; None where it fails."""
        for options in (["--net", "--mount"], ["-r", "--net", "--mount"]):
            prefix = ["unshare", *options, *inside]
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                tried = subprocess.run([*prefix, "true"], capture_output=True, timeout=10)
                if tried.returncode == 0:
                    return prefix
        return None


def run_environment(folder: Path, compiled: Path, asked: dict, run: dict, progress: Path) -> dict:
    """The user's variables, with HOME and TMPDIR of the run's own in `folder`."""
    home, temporary = folder / "home", compiler.place(folder / "tmp")
    for path in (home, compiled):
        path.mkdir(parents=True, exist_ok=True)
    environment = {
        **inherited_environment(),
        **run["slot"],
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "AUTORESEARCH_CACHE": str(cache_dir()),
        "AUTORESEARCH_RUN": run["id"],
        "AUTORESEARCH_SEED": str(run.get("seed", asked["seed"])),
        "AUTORESEARCH_SPLIT": split_of(asked),
        "AUTORESEARCH_PROGRESS": str(progress),
    }
    # torch's compiler is 1,400 modules: without their bytecode on disk each run starts 10 s later.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled / "inductor"))
    environment.setdefault("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
    with contextlib.suppress(OSError, KeyError):  # there already; or a user without a name
        # torch looks for its precompiled headers among the temporary files: compiled once for all
        os.symlink(compiled, temporary / f"torchinductor_{getpass.getuser()}")
    return environment


def delete_half_compiled(compiled: Path, since: float):
    """Deletes what a compiler may have been writing when it was killed, at some time after `since`.

    A C++ compiler writes in place. A kernel that was cut short is later taken for a whole one and
    ends every run that needs it by SIGBUS. What is deleted is compiled again.
    """
    for path in compiled.rglob("*.*"):
        if path.suffix in (".so", ".o", ".gch"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime >= since:
                    path.unlink()


# ------------------------------------------------------------------------------- a run, to its end


def log_text(path: Path, most: int = 1 << 16) -> str:
    """The last `most` bytes of a log; empty while there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - most))
            return file.read().decode(errors="replace").replace("\r", "\n")
    except FileNotFoundError:
        return ""


def read_progress(path: Path) -> list[dict]:
    """The lines of a progress file (see referee/clock.py), oldest first; none while there is none."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):  # one being written
                lines.append(json.loads(line))
    return lines


def run_to_its_end(
    repository: Path,
    folder: Path,
    compiled: Path,
    asked: dict,
    run: dict,
    log_path: Path,
    progress_path: Path,
    isolation: Isolation,
    limit: int,
    should_stop: Callable[[], bool],
) -> tuple[dict, list[dict]]:
    """Runs the target's command in `folder`/tree; kills it, with its children, at the limit.

    repository: its root. compiled: the compilers' caches, which all runs share. asked, run: what
    experiment.json and run-K.json hold. limit: in seconds. Returns how it ended (exit code, why it was
    stopped or None, seconds, and those after which it asked for its score where the rows were hidden),
    and the ledger's records of it. The calling process must have no other
    children.
    """
    began = time.monotonic()
    ledger_start = ledger_path().stat().st_size if ledger_path().is_file() else 0
    split, tree = split_of(asked), folder / "tree"
    witness = None
    if not TARGET.is_train_py:
        witness = Witness(TARGET, repository, tree, asked, run, split)
    environment = run_environment(folder, compiled, asked, run, progress_path)
    held_out = HeldOut(split) if isolation.hides else None
    if held_out:
        environment["AUTORESEARCH_ROWS"] = str(held_out.theirs.fileno())
    stopped = None
    with open(log_path, "wb") as log:
        process = subprocess.Popen(
            [*isolation.prefix, *TARGET.command_for(split)],
            cwd=tree,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=die_with_parent,
            pass_fds=[held_out.theirs.fileno()] if held_out else [],
        )
    if held_out:
        held_out.serve()
    while True:
        try:
            code = process.wait(timeout=POLL_SECONDS)
            break
        except subprocess.TimeoutExpired:
            if should_stop():
                stopped = "dropped"
            elif time.monotonic() - began > limit:
                stopped = f"still running after {limit} s, the limit in program.md"
            if stopped:
                kill_group(process.pid)
    kill_group(process.pid)
    kill_children()
    if not Path(environment["TMPDIR"]).is_relative_to(folder):
        shutil.rmtree(environment["TMPDIR"], ignore_errors=True)
    phases = [line["phase"] for line in read_progress(progress_path)]
    if code < 0 and "training" not in phases:  # killed while it compiled
        delete_half_compiled(compiled, time.time() - COMPILER_WRITES)
    seconds = round(time.monotonic() - began, 2)
    if witness:
        witness.ended(code, log_path, seconds)
    records = [r for r in read_ledger(ledger_start)[0] if r.get("run") == run["id"]]
    ended = {"code": code, "stopped": stopped, "wall_seconds": seconds}
    if held_out:
        ended["asked_seconds"] = round(held_out.asked - began, 2) if held_out.asked else None
    return ended, records


def outcome(ended: dict, records: list[dict], log: str, split: str) -> dict:
    """What end-K.json holds: how a run ended, and what the ledger's records of it say.

    A score counts where the run exited with 0 and was scored on the split that was asked for.
    """
    measured = {key: value for record in records for key, value in record.items()}
    conditions = (*CONDITIONS, FELL_BACK)
    code = ended["code"]
    score = measured.get("score") if code == 0 and measured.get("split") == split else None
    if not isinstance(score, (int, float)) or not math.isfinite(score):
        score = None
    forged = why_forged(ended, records)
    if forged:
        score = None
    failure = forged or why_it_failed(code, ended["stopped"], measured, log)
    return {
        "code": code,
        "ended": utc(),
        "ended_stamp": stamp(),
        "wall_seconds": ended["wall_seconds"],
        "asked_seconds": ended.get("asked_seconds"),
        "score": score,
        "failure": failure if score is None else None,
        "memory_gb": (measured.get("peak_memory_mb") or 0) / 1024,
        "conditions": {name: measured[name] for name in conditions if name in measured},
        **{name: measured.get(name) for name in ("steps", "tokens", "training_seconds", "pace")},
    }


def why_forged(ended: dict, records: list[dict]) -> str | None:
    """Why the ledger's score of a run cannot be the evaluator's; None where it can."""
    scores = sum("score" in record for record in records)
    if scores > 1:
        return f"it has {scores} scores in the ledger, and the evaluator writes one"
    if scores and ended.get("asked_seconds", True) is None:
        return "it has a score in the ledger, and never asked for the rows to score"
    return None


def why_it_failed(code: int, stopped: str | None, ledger: dict, log: str) -> str:
    """One line for a run without a score."""
    if stopped:
        return stopped
    if ledger.get("failure"):
        return str(ledger["failure"])
    if code == 0:
        return "it ended without a score in the ledger"
    lines = log.strip().splitlines()
    failures = [line for line in lines if "FAIL: " in line]
    if failures:
        return failures[-1].split("FAIL: ")[-1]
    if any(line.startswith("Timeout (") for line in lines):
        return "timeout: it hung (the log shows where)"
    if code < 0:
        return f"killed by signal {-code}"
    last = lines[-1] if lines else "its log is empty"
    return f"exit {code}: {last[-250:]}"


# ------------------------------------------------------------------------------------- the engine


class LocalEngine:
    """Runs on this machine, each watched by a process that outlives the supervisor.

    ray_engine.RayEngine has the same methods.
    """

    def __init__(self, night: Night):
        self.night = night
        self.compiled = compiler.place(night.state_dir / "compiled")
        self._slots = local_slots()
        self._isolation = Isolation.here()

    def slots(self) -> list[dict]:
        """The environment of each slot."""
        return list(self._slots)

    def status_lines(self) -> list[str]:
        lines = machine_lines() if TARGET.is_train_py else []
        return [*filter(None, [self._isolation.warning]), *lines]

    def start(self, experiment: Experiment, k: int, run: dict, limit: int):
        """Adds a worktree, writes run-K.json, and leaves the run to a process that holds the lock."""
        tree = experiment.folder / "tree"
        if k > 1 or tree.exists():
            self.night.clear(experiment)
        self.night.repo.check_out(run["commit"], tree)
        held = lock(experiment.folder / "lock")
        write_json(experiment.folder / f"run-{k}.json", run)
        if os.fork() == 0:
            try:
                os.setsid()
                os.closerange(3, held.fileno())
                os.closerange(held.fileno() + 1, 1 << 12)  # the supervisor's own lock among them
                become_subreaper()
                self.watch(experiment, k, run, limit)
            except BaseException:
                traceback.print_exc()  # into supervisor.log
                sys.stderr.flush()
            finally:
                os._exit(0)
        held.close()  # the child holds it until it ends, whatever becomes of us

    def watch(self, experiment: Experiment, k: int, run: dict, limit: int):
        """Runs the K-th run to its end and writes end-K.json. In a process of its own."""
        log_path = experiment.path("run.log", k)
        ended, records = run_to_its_end(
            self.night.root,
            experiment.folder,
            self.compiled,
            experiment.asked,
            run,
            log_path,
            experiment.path("progress.jsonl", k),
            self._isolation,
            limit,
            lambda: experiment.dropped() or self.night.stopped(),
        )
        if ended["stopped"] == "dropped" and not experiment.dropped():
            experiment.again(rules.STOPPED)
            return
        end = outcome(ended, records, log_text(log_path), experiment.split)
        write_json(experiment.path("end.json", k), end)

    def poll(self, experiment: Experiment) -> tuple[str, str]:
        """(running, ended or lost; why it is lost) of the last run."""
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        state = experiment.state()
        if state != "cut off":
            return state, ""
        run = experiment.runs()[-1]  # its watcher died, by a kill or a power cut
        kill_leftovers(run["id"])
        lasted = seconds_between(run.get("stamp"), stamp())
        began = seconds_of(run["began"])  # or, where the time of day was set meanwhile, earlier
        delete_half_compiled(self.compiled, min(began, time.time() - (lasted or 0)))
        return "lost", rules.CUT_OFF

    def close(self):
        """Nothing to release: each run has its own watcher process."""
