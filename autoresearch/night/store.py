"""
What the night remembers: experiments, which are folders of files, and the journal of those that
have ended. Every file is written once, by rename, and every step is idempotent: after a kill, the
next command completes what is missing.

    .night/TAG/queue/N/       an experiment that waits, runs, or is not decided yet
    .night/TAG/done/N/        one that has its line in the journal
    .night/TAG/journal.jsonl  one record an experiment; from that line on it has ended
    results.tsv               the same as a table

Beside the files, `refs/autoresearch/TAG/N` keeps the commit of every experiment.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from autoresearch.common import (
    Fail,
    append_line,
    lock,
    one_line,
    read_json,
    utc,
    write_atomically,
    write_json,
)
from autoresearch.night import journal, results, rules
from autoresearch.night import lines as second_lines
from autoresearch.night.doubts import FELL_BACK, rate
from autoresearch.night.experiment import Experiment
from autoresearch.night.repo import Contents, Repository
from autoresearch.night.settings import HERE, TARGET, setting

POLL_SECONDS = 0.05  # seconds between two looks at files that others write
COMMAND_TIMEOUT = 10  # seconds a command waits for another one
MADE_FROM = "made-from.json"  # what the agent's files were made from, where not from the best
PAGE_LOG = "page.log"  # why night.html could not be written; gone once it is
# Our own names in .night.
RESERVED_TAGS = "agent command compiled engine.json ray.log supervisor supervisor.log".split()


def parsed(lines: list[bytes]) -> list[dict]:
    """Of each line that is JSON, what it says."""
    with contextlib.suppress(ValueError):  # all at once takes half of the time
        return json.loads(b"[%s]" % b",".join(filter(None, lines)))
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


class Night:
    """Where one tag's night keeps its files, and what they say. Raises Fail outside a repository."""

    def __init__(self, root: Path = HERE):
        self.root = root
        self.repo = Repository(root, TARGET.files)
        if not (root / ".git").exists():
            make = "git init, git add -A, git commit, then begin"
            raise Fail(f"{root} is no git repository: {make}")
        top = self.repo.git("rev-parse", "--show-toplevel")
        if not os.path.samefile(top, root):
            unset = "git config --unset core.worktree"
            raise Fail(f"git's working tree here is {top}, not {root}: {unset}, then run it again")
        self.tag = setting("tag")
        self.branch = f"autoresearch/{self.tag}"
        name_is_valid = self.repo.git("check-ref-format", f"refs/heads/{self.branch}", check=False)
        if name_is_valid is None or self.tag in RESERVED_TAGS:
            raise Fail(
                f"program.md, setting `tag: {one_line(self.tag, 40)}`: it cannot name a branch and "
                "a folder of the night; take a word like nov25"
            )
        self.state_dir = root / ".night"
        self.folder = self.state_dir / self.tag
        self.queue, self.done = self.folder / "queue", self.folder / "done"
        self.journal = self.folder / "journal.jsonl"
        self.results = root / "results.tsv"
        # Of the journal, what was read so far, and up to which byte: it may hold 10,000 lines.
        self._records: list[dict] = []
        self._confirmed: list[dict] = []
        self._sessions: list[dict] = []
        self._repeats: list[dict] = []
        self._read_bytes = 0

    # what has ended

    def records(self) -> list[dict]:
        """The experiments that have ended, in order, without a confirmation's runs and sessions.

        A line that a power cut tore is ignored.
        """
        with contextlib.suppress(FileNotFoundError), open(self.journal, "rb") as file:
            file.seek(self._read_bytes)
            # A last line without its end is being written, or torn: then the next line ends it.
            whole, newline, _ = file.read().rpartition(b"\n")
            self._read_bytes += len(whole + newline)
            others = {
                "confirm": self._confirmed,
                "session": self._sessions,
                "repeat": self._repeats,
            }
            for record in parsed(whole.split(b"\n")):
                others.get(record["kind"], self._records).append(record)
        return [*self._records]

    def confirmed(self) -> list[dict]:
        """A confirmation's runs that have ended: no rows, never kept, no part of the noise floor."""
        self.records()
        return [*self._confirmed]

    def repeats(self) -> list[dict]:
        """The runs that measured a best again: no rows, evidence of its level and of the noise."""
        self.records()
        return [*self._repeats]

    def sessions(self) -> list[dict]:
        """The sessions of the agent (`night.py agent`) that have ended: no experiments, no rows.

        kind `session`; began, ended (utc); experiments, how many it brought; tokens and dollars,
        None where the agent's client does not report them.
        """
        self.records()
        return [*self._sessions]

    def ended(self) -> list[dict]:
        """All experiments of the journal, those of a confirmation and the repeats last."""
        return [*self.records(), *self.confirmed(), *self.repeats()]

    def rates(self) -> dict[str, list[float]]:
        """Tokens a second of every run so far, by commit."""
        open_runs = [run for experiment in self.open() for run in experiment.runs()]
        found: dict[str, list[float]] = {}
        for run in [*self.ended(), *open_runs]:
            speed = rate(run)
            if speed:
                found.setdefault(run["commit"], []).append(speed)
        return found

    def baseline_conditions(self) -> dict:
        """Those of the baseline's run that fell back the least; empty before one has a score."""
        runs = [record for record in self.records() if record["kind"] == "baseline"]
        for experiment in self.open():
            if experiment.is_baseline:
                runs += experiment.runs()[-1:]
        conditions = [run["conditions"] for run in runs if run.get("score") is not None]
        return min(conditions, key=lambda known: len(known.get(FELL_BACK, [])), default={})

    def history(self) -> rules.History:
        return rules.History(
            self.records(), self.repeats(), self.rates(), self.baseline_conditions()
        )

    # what has not

    def begun(self) -> bool:
        return self.queue.is_dir()

    def stopped(self) -> bool:
        """By `stop`, until `begin`."""
        return (self.folder / "stop").exists()

    def open(self) -> list[Experiment]:
        """What waits, runs, or is not decided yet, by number."""
        numbers = sorted(int(name) for name in os.listdir(self.queue) if name.isdigit())
        found = [Experiment.at(self.queue / str(n)) for n in numbers]
        return [experiment for experiment in found if experiment]  # one may end meanwhile

    def folder_of(self, n: int) -> Path | None:
        for place in (self.queue, self.done):
            if (place / str(n)).is_dir():
                return place / str(n)
        return None

    def find(self, n: int) -> tuple[dict, Experiment]:
        """(an experiment's record, or what was asked for where it has not ended; the experiment)."""
        folder = self.folder_of(n)
        experiment = Experiment.at(folder) if folder else None
        if experiment is None:
            raise Fail(f"there is no experiment {n}: they go from 1 to {self.next_number() - 1}")
        records = [record for record in self.ended() if record["n"] == n]
        return records[0] if records else experiment.asked, experiment

    def timed_runs(self) -> list[dict]:
        """All runs of all experiments: Experiment.timed_runs."""
        folders = [*self.queue.glob("[0-9]*"), *self.done.glob("[0-9]*")]
        experiments = filter(None, map(Experiment.at, folders))
        return [run for experiment in experiments for run in experiment.timed_runs()]

    def can_work(self) -> bool:
        """Whether a supervisor would find something to do."""
        experiments = self.open()
        if self.stopped():
            return any(e.state() in ("running", "cut off") or e.dropped() for e in experiments)
        if any(e.state() != "waiting" or e.is_baseline or e.dropped() for e in experiments):
            return True
        return bool(experiments) and journal.best_of(self.records()) is not None

    # writing

    def next_number(self) -> int:
        numbers = [record["n"] for record in self.ended()] + [e.n for e in self.open()]
        return 1 + max(numbers, default=0)

    def enqueue(self, kind: str, commit: str, base: str, message: str, seed: int, **more) -> int:
        """Queues an experiment. Returns its number. more: simpler, expect, change."""
        n = self.next_number()
        self.keep_ref(str(n), commit)
        asked = {"n": n, "kind": kind, "commit": commit, "base": base, "message": message}
        asked |= {"seed": seed, "simpler": False, "expect": None, "change": None, **more}
        unfinished = self.queue / f"{n}.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        write_json(unfinished / "experiment.json", {**asked, "asked": utc()})
        os.replace(unfinished, self.queue / str(n))
        return n

    def keep_ref(self, name: str, commit: str):
        """Nothing that was tried is lost: git never collects what a ref names."""
        self.repo.git("update-ref", f"refs/autoresearch/{self.tag}/{name}", commit)

    def record(self, experiment: Experiment, step: rules.Record):
        """Writes the experiment's line of the journal. With it the experiment has ended."""
        asked, run, runs = experiment.asked, step.run or {}, experiment.runs()
        scores = [counted["score"] for counted in step.runs or [run] if "score" in counted]
        scored = step.status != "crash" and scores and None not in scores
        score = statistics.fmean(scores) if scored else None
        records = second_lines.records_of(asked, self.records())
        base = {} if experiment.has_no_row else journal.kept_as(run.get("base", ""), records)
        verdict = step.verdict or rules.Verdict("", "")
        named = ("n", "kind", "seed", "message", "simpler", "expect", "change")
        changed = {key: asked[key] for key in ("lines", "parts", "line", "root") if asked.get(key)}
        measured = ("tokens", "training_seconds", "wall_seconds", "steps", "began", "host")
        record = {
            **{key: asked[key] for key in named},
            **changed,
            "commit": run.get("commit", asked["commit"]),
            "base": run.get("base", asked["base"]),
            "status": step.status,
            "why": one_line(step.why, 300),
            "score": score,
            "scores": scores if scored else [],
            "runs": [counted["id"] for counted in step.runs] if scored else [],
            "got": self._change(score, verdict, base),
            "seen": verdict.seen and [verdict.seen.gain, verdict.seen.variance],
            "level": verdict.level
            and [journal.gain(verdict.level.mean, 0), math.sqrt(verdict.level.variance)],
            "base_rate": rate(base),
            "slow": step.slow,
            "not_comparable": step.not_comparable,
            "conditions": run.get("conditions", {}),
            "again": [earlier["again"] for earlier in runs[:-1] if "again" in earlier],
            "run": run.get("id"),
            "k": next((k for k, r in enumerate(runs, 1) if r["id"] == run.get("id")), len(runs)),
            **{key: run.get(key) for key in measured},
            "memory_gb": run.get("memory_gb") or 0.0,
            "busy": run.get(
                "busy"
            ),  # the share of the machine that other programs had at its start
            "ended": utc(),
        }
        if step.displaced:
            record["displaced"] = step.displaced
        if asked.get("line"):
            record["on_line"] = step.on_line or "crash"
        append_line(self.journal, json.dumps(record).encode())
        self.archive(experiment)

    def _change(self, score: float | None, verdict: rules.Verdict, base: dict) -> float | None:
        """By how much the score changed: beside what its base is taken for, as the decision says."""
        if score is None:
            return None
        if verdict.seen:
            return journal.gain(verdict.seen.gain, 0)
        return score - base["score"] if base else None

    def archive(self, experiment: Experiment):
        """Writes the row and moves the folder out of the queue. Idempotent."""
        if not experiment.has_no_row:
            records = self.records()
            own = next(r for r in reversed(records) if r["n"] == experiment.n)
            results.write_row(self.results, own, records)
        self.clear(experiment)
        os.replace(experiment.folder, self.done / str(experiment.n))

    def recover(self):
        """Archives what a supervisor before us had recorded when it was killed."""
        recorded = {record["n"] for record in self.ended()}
        for experiment in self.open():
            if experiment.n in recorded:
                self.archive(experiment)

    def clear(self, experiment: Experiment):
        """Removes what a run leaves beside its log."""
        for name in ("tree", "home", "tmp"):
            shutil.rmtree(experiment.folder / name, ignore_errors=True)
        tree = str(experiment.folder / "tree")
        self.repo.git("worktree", "remove", "--force", "--force", tree, check=False)  # git's part

    # the supervisor's engine, for the commands, which have none

    def write_engine_state(self, slots: int, lines: list[str]):
        """slots: how many runs at once. lines: for the status."""
        state = {"slots": slots, "lines": lines}
        if self.engine_state() != state:
            write_json(self.state_dir / "engine.json", state)

    def engine_state(self) -> dict:
        return read_json(self.state_dir / "engine.json") or {"slots": 1, "lines": []}

    @contextlib.contextmanager
    def lock(self, name: str, seconds: float) -> Iterator[bool]:
        """A lock of the night; False where another process has held it all the time."""
        self.state_dir.mkdir(exist_ok=True)
        end = time.monotonic() + seconds
        while (held := lock(self.state_dir / name, wait=False)) is None:
            if time.monotonic() >= end:
                break
            time.sleep(POLL_SECONDS)
        with held or contextlib.nullcontext():
            yield held is not None

    @contextlib.contextmanager
    def command(self):
        """One command at a time touches the agent's tree."""
        if not os.access(self.root / ".git", os.W_OK):
            raise Fail(
                f"{self.root}/.git cannot be written, as in an agent's sandbox. There, type the night's "
                "command alone, on one line: no redirection, no <<, no comment"
            )
        with self.lock("command", COMMAND_TIMEOUT) as ours:
            if not ours:
                raise Fail("another night.py command has been at work for 10 s: run it again")
            yield

    # the agent's tree: moved by the agent's own commands alone

    def tip(self) -> str:
        """The branch's commit. Raises Fail where another branch is checked out."""
        head = self.repo.git("symbolic-ref", "-q", "--short", "HEAD", check=False)
        if head != self.branch:
            raise Fail(
                f"the night is on {self.branch}, this is {head or 'a detached head'}: "
                "uv run night.py begin"
            )
        return self.repo.git("rev-parse", "HEAD")

    def edits(self) -> Contents | None:
        """The agent's files, where they are neither the branch's, the best's nor queued ones; else None.

        As git would commit it.
        """
        tip = self.tip()
        contents = self.repo.in_tree()
        if not contents:
            return None  # deleted: the best is put in its place
        contents = {**self.repo.contents_at(tip), **contents}
        best = journal.best_of(self.records())
        known = {tip, best["commit"] if best else tip, *(e.asked["commit"] for e in self.open())}
        return None if self.repo.are_of(contents, known) else self.repo.as_committed(contents)

    def holds(self, contents: Contents, commit: str) -> bool:
        """Whether the agent's files are the commit's, or what git's filters made of them."""
        found = self.repo.in_tree()
        if found.keys() != contents.keys():
            return False
        return found == contents or self.repo.are_of(found, [commit])

    def made_from(self) -> dict:
        """`commit`, from which the agent's files were made, and its `line`; empty: from the best."""
        return read_json(self.folder / MADE_FROM) or {}

    def write_target(self, contents: Contents, made_from: dict | None = None):
        """Writes the agent's files. made_from: as made_from() tells it from now on."""
        (self.folder / MADE_FROM).unlink(missing_ok=True)
        for file, content in contents.items():
            path = self.root / file
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content, path.stat().st_mode if path.is_file() else 0o644)
        if made_from:
            write_json(self.folder / MADE_FROM, made_from)

    def sync_branch(self):
        """Moves branch and files to the best, unless an edit is in progress."""
        best = journal.best_of(self.records())
        tip = self.tip()
        if self.edits() is None:
            commit = best["commit"] if best else tip
            contents = self.repo.contents_at(commit)
            if not self.holds(contents, commit) or self.made_from():
                self.write_target(contents)
            if commit != tip:
                if all(tip not in (record["commit"], record["base"]) for record in self.records()):
                    self.keep_ref(f"not-of-the-night-{tip[:7]}", tip)  # somebody's own commit
                ref = f"refs/heads/{self.branch}"
                self.repo.git("update-ref", "-m", "night: kept", ref, commit, tip)
        staged = ("diff-index", "--cached", "--quiet", "HEAD", "--", *TARGET.files)
        if self.repo.git(*staged, check=False) is None:
            self.repo.git("reset", "-q", "--", *TARGET.files, check=False)
