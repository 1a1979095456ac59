"""
An experiment: one folder of files, each written once.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from autoresearch.common import lock, read_json, utc, write_json


def split_of(asked: dict) -> str:
    """The split that an experiment is scored on; asked: what its experiment.json holds."""
    return "test" if asked["kind"] == "confirm" else "val"


@dataclass
class Experiment:
    """One folder of the queue. Its files, each written once, are:

    experiment.json   what was asked for: n, kind (baseline, try, sweep, confirm, repeat), commit, base, ...
    run-K.json        the K-th run: its id, the commit that runs, the best it is based on, slot and seed
    run-K.log         all that it printed
    progress-K.jsonl  its phases and losses, by the locked clock
    end-K.json        how it ended, and what the ledger says of it
    again-K.json      why it runs once more
    lock              held by the process that watches the run, for as long as it lives
    drop              the agent gave it up
    """

    folder: Path
    asked: dict
    known: dict[str, dict] = field(default_factory=dict)  # files that were read

    @classmethod
    def at(cls, folder: Path) -> Experiment | None:
        asked = read_json(folder / "experiment.json")
        return None if asked is None else cls(folder, asked)

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
    def is_repeat(self) -> bool:
        """Whether it measures the best again."""
        return self.asked["kind"] == "repeat"

    @property
    def has_no_row(self) -> bool:
        return self.is_confirm or self.is_repeat

    @property
    def split(self) -> str:
        return split_of(self.asked)

    def path(self, name: str, k: int | None = None) -> Path:
        """Of a file: path("run.log", 2) is run-2.log; without k that of the last run."""
        stem, _, ending = name.partition(".")
        return self.folder / f"{stem}-{k or len(self.runs())}.{ending}"

    def _read(self, name: str) -> dict:
        """A file; empty while it is not there. What was read stays known if the folder moves."""
        if name not in self.known:
            content = read_json(self.folder / name)
            if content is None:
                return {}
            self.known[name] = content
        return self.known[name]

    def runs(self) -> list[dict]:
        """What is known of each run so far, oldest first; `code` is there once it has ended."""
        found = []
        while not found or "again" in found[-1]:
            k = len(found) + 1
            run = self._read(f"run-{k}.json")
            if not run:
                break
            found.append({**run, **self._read(f"end-{k}.json"), **self._read(f"again-{k}.json")})
        return found

    def timed_runs(self) -> list[dict]:
        """The same with `n` and `kind`; of a run that was cut off, `ended` is when its log did."""
        found = self.runs()
        for k, run in enumerate(found, 1):
            run |= {"n": self.n, "kind": self.asked["kind"]}
            log = self.path("run.log", k)
            if "ended" not in run and log.is_file():
                run["ended"] = utc(log.stat().st_mtime)
        return found

    def again(self, why: str):
        """Queues the experiment for one more run."""
        write_json(self.path("again.json"), {"again": why})

    def alive(self) -> bool:
        """Whether the process that watches the run lives: it holds the lock."""
        with contextlib.suppress(FileNotFoundError):
            os.stat(self.folder / "lock")  # only locked, not made
            free = lock(self.folder / "lock", shared=True, wait=False)  # two who look do not meet
            if free is None:
                return True
            free.close()
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
        if self.alive():
            return "running"
        # It may have written its end between our two looks.
        return "ended" if self.path("end.json", len(runs)).exists() else "cut off"
