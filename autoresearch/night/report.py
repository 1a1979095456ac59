"""
All that is known of a night, read once: for the audit, the notebook, and whatever else looks back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from autoresearch.common import ROOT, Fail, git
from autoresearch.night.results import Row, read_results
from autoresearch.night.rules import noise_floor
from autoresearch.night.store import Night
from autoresearch.referee.ledger import read_ledger


@dataclass
class NightReport:
    """All that is known of a night, read once."""

    root: Path  # the repository
    rows: list[Row]
    skipped: list[str] = field(default_factory=list)  # why rows of results.tsv were skipped
    records: list[dict] = field(default_factory=list)  # the journal's; none of another's log
    confirmed: list[dict] = field(default_factory=list)  # the records of confirmation runs
    started: dict[str, dict] = field(default_factory=dict)  # run id: what the night knows of it
    ledger: list[dict] = field(default_factory=list)
    damaged: int = 0  # lines of the ledger
    branch: str = "HEAD"  # the night's
    problem: str = ""  # why the night's own files could not be read

    @classmethod
    def here(cls, root: Path = ROOT) -> NightReport:
        """Of program.md's tag. Where its night cannot be read, `problem` says why."""
        rows, skipped = read_results(root / "results.tsv")
        ledger, damaged = read_ledger()
        branch = git("rev-parse", "--abbrev-ref", "HEAD", at=root, check=False) or "HEAD"
        report = cls(root, rows, skipped, ledger=ledger, damaged=damaged, branch=branch)
        try:
            night = Night(root)
        except Fail as error:  # not in its repository, or no tag
            report.problem = str(error).removeprefix("FAIL: ")
            return report
        if git("rev-parse", "-q", "--verify", night.branch, at=root, check=False):
            report.branch = night.branch
        if night.begun():
            report.records, report.confirmed = night.records(), night.confirmed()
            # A run counts as the night's while its experiment is open or in the journal.
            known = {record["n"] for record in night.ended()} | {e.n for e in night.open()}
            runs = [run for run in night.timed_runs() if run["n"] in known]
            report.started = {run["id"]: run for run in runs}
        return report

    def history(self) -> list[dict]:
        """The night's records; of a log without them, what its rows say in their place."""
        if self.records:
            return self.records
        found = []
        for row in self.rows:
            # Only the baseline's rows are known to be repeats of one commit.
            commit = row.hash if row.what.startswith("baseline") else None
            record = {"n": row.n, "score": row.score, "status": row.status}
            record["commit"] = commit or f"row {row.n}"
            record["simpler"] = row.what.startswith("simpler")
            found.append(record)
        return found

    def noise_floor(self) -> float | None:
        return noise_floor(self.history())
