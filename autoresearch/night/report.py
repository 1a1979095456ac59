"""
All that is known of a night, read once: for the audit, the notebook, and whatever else looks back.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from autoresearch.common import Fail, git, seconds_between, seconds_of
from autoresearch.night.journal import best_of, calibration, gain, noise, scores_of_commit
from autoresearch.night.logs import log_path
from autoresearch.night.results import STATUSES, Row, read_results
from autoresearch.night.rules import BEST_MOVED, PROMISING
from autoresearch.night.settings import HERE, METRIC_WHY, TARGET
from autoresearch.night.slower import baseline_lines
from autoresearch.night.store import Night
from autoresearch.referee.ledger import joined, read_ledger


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
    repeats: list[dict] = field(default_factory=list)  # of runs that measured a best again
    damaged: int = 0  # lines of the ledger
    damaged_records: int = 0  # lines of the journal
    slower: list[str] = field(default_factory=list)  # what all its runs did without
    branch: str = "HEAD"  # the night's
    problem: str = ""  # why the night's own files could not be read

    @classmethod
    def here(cls, root: Path = HERE) -> NightReport:
        """Of program.md's tag. Where its night cannot be read, `problem` says why."""
        rows, skipped = read_results(log_path(root))
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
            report.repeats = night.repeats()
            lines = night.journal.read_bytes().split(b"\n") if night.journal.is_file() else []
            report.damaged_records = len(lines) - lines.count(b"") - len(night.ended())
            report.slower = baseline_lines(night.baseline_conditions())
            # A run counts as the night's while its experiment is open or in the journal.
            known = {record["n"] for record in night.ended()} | {e.n for e in night.open()}
            runs = [run for run in night.timed_runs() if run["n"] in known]
            report.started = {run["id"]: run for run in runs}
        return report

    @classmethod
    def of(cls, night: Night) -> NightReport:
        """What changes during a night, for whoever looks often: without ledger, runs and git."""
        rows, skipped = read_results(night.results)
        records, confirmed = night.records(), night.confirmed()
        found = cls(night.root, rows, skipped, records, confirmed, branch=night.branch)
        found.repeats = night.repeats()
        return found

    def counts(self) -> dict[str, int]:
        """How many experiments there are, and how many of each status; without the baseline."""
        tried = [row for row in self.rows if not row.is_baseline]
        count = Counter("not_measured" if row.not_measured else row.status for row in tried)
        kinds = (*STATUSES, "not_measured")
        return {"experiments": len(tried), **{kind: count[kind] for kind in kinds}}

    def noise(self) -> float | None:
        """One standard deviation of a run, by the night's records; of other logs by the baseline's rows."""
        rows = [row for row in self.rows if row.hash and row.what.startswith("baseline")]
        repeats = [{"commit": row.hash, "score": row.score} for row in rows]
        return noise([*self.records, *self.repeats] or repeats)

    def band(self) -> float | None:
        """One standard error of the best: by its runs."""
        deviation, best = self.noise(), best_of(self.records)
        if deviation is None:
            return None
        runs = len(scores_of_commit(best["commit"], self.records, self.repeats)) if best else 1
        return deviation / math.sqrt(max(1, runs))


# ------------------------------------------------------------- in words, for notebook and page


def count_line(report: NightReport) -> str:
    """How many experiments came to what."""
    count = report.counts()
    unmeasured = f", {count['not_measured']} not measured" if count["not_measured"] else ""
    plural = "" if count["experiments"] == 1 else "s"
    return (
        f"{count['experiments']} experiment{plural}: {count['keep']} kept, {count['discard']} discarded, "
        f"{count['crash']} crashed{unmeasured}"
    )


def metric_line() -> str:
    """`metric: val_bpb, lower is better`; of a log of others with the reason for the direction."""
    better = "lower" if TARGET.lower_is_better else "higher"
    why = f" ({METRIC_WHY})" if METRIC_WHY else ""
    return f"metric: {TARGET.metric}, {better} is better{why}"


def noise_line(deviation: float | None) -> str:
    """`noise: 0.000400 (one standard deviation of a run)`"""
    if deviation is None:
        return "noise: not measured"
    return f"noise: {deviation:.6f} (one standard deviation of a run)"


def change_words(before: float, after: float, deviation: float | None) -> str:
    """`-0.012000 (-1.20%, 30.0 times the noise)`"""
    times = f", {gain(after, before) / deviation:.1f} times the noise" if deviation else ""
    return f"{after - before:+.6f} ({after / before - 1:+.2%}{times})"


def prediction_line(records: list[dict], deviation: float | None) -> str:
    count, direction, size = calibration(records, deviation)
    said = f"{direction} right in direction, {size} in size"
    return f"{count} predictions (night.py try --expect): {said}"


def cost_of(sessions: list[dict], records: list[dict]) -> dict | None:
    """What the agent's sessions brought and cost, of Night.sessions(); None where there are none.

    Tokens and dollars are those of the sessions that report them, or None.
    """
    if not sessions:
        return None
    tokens = [s["tokens"] for s in sessions if s.get("tokens") is not None]
    dollars = [s["dollars"] for s in sessions if s.get("dollars") is not None]
    kept = sum(record["status"] == "keep" and record["kind"] == "try" for record in records)
    brought = sum(session.get("experiments") or 0 for session in sessions)
    return {
        "sessions": len(sessions),
        "experiments_a_session": brought / len(sessions),
        "tokens": sum(tokens) if tokens else None,
        "dollars": sum(dollars) if dollars else None,
        "dollars_a_kept_change": sum(dollars) / kept if dollars and kept else None,
    }


def cost_line(cost: dict) -> str:
    """What `cost_of` found, in words."""
    sessions, each = cost["sessions"], cost["experiments_a_session"]
    line = f"{sessions} session{'s' * (sessions > 1)} of the agent, {each:.1f} experiments each"
    if cost["tokens"] is not None:
        line += f"; {cost['tokens'] / 1e6:.2f} M tokens"
    if cost["dollars"] is None:
        return line
    a_change = cost["dollars_a_kept_change"]
    per = "no change kept" if a_change is None else f"${a_change:.2f} a kept change"
    return f"{line}; ${cost['dollars']:.2f}, {per}"


# -------------------------------------------------------------------------- where the hours went


def hours_line(report: NightReport) -> str:
    """In one line: the share of the time with a run in a slot, and the seconds lost, by reason.

    The time lasts from the first start to the last end; confirmation runs are left out. There are
    as many slots as runs ever stood side by side.
    """
    runs = list(_timed(report))
    first = min((began for began, *_ in runs), default=0.0)
    last = max((ended for _, _, ended, _ in runs), default=0.0)
    if last == first:
        return "nothing is known of the night's hours"
    # Two seconds of overlap are the rounding of the times, not a second slot.
    long = [(began, ended) for began, _, ended, _ in runs if ended - began > 2]
    changes = [(began, 1) for began, _ in long] + [(ended - 2, -1) for _, ended in long]
    slots = max(accumulate(change for _, change in sorted(changes)), default=1)
    total = slots * (last - first)
    running = sum(ended - began for began, _, ended, _ in runs)
    starting = sum(batch - began for began, batch, _, wasted in runs if not wasted)
    repeated = sum(ended - began for began, _, ended, wasted in runs if wasted)
    return (
        f"{(last - first) / 3600:.1f} hours, {slots} slot{'s' if slots > 1 else ''}, a run in them "
        f"{running / total:.0%} of the time. Lost: {starting:,.0f} s to starting and compiling, "
        f"{repeated:,.0f} s to slow and repeated runs, {max(0, total - running):,.0f} s to waiting "
        "for the agent"
    )


def _timed(report: NightReport) -> Iterator[tuple[float, float, float, bool]]:
    """(began, first batch, ended, wasted) of each run, in seconds since 1970.

    The night knows when the process began and ended, the ledger when the first batch was drawn. Of
    a night without night.py the ledger tells all, for the runs that have a row. Durations are those
    of the stamps where there are any: the time of day may have been set meanwhile.
    """
    zeros = _zeros(report.started.values())
    measured = {run["run"]: run for run in joined(report.ledger) if run.get("split") == "val"}
    claimed = {row.hash[:7] for row in report.rows if row.hash}
    by_hand = [i for i, run in measured.items() if (run.get("commit") or "")[:7] in claimed]
    slow = {record["run"] for record in report.records if record.get("slow")}
    for i in dict.fromkeys([*report.started, *by_hand]):
        run, line = report.started.get(i, {}), measured.get(i, {})
        batch = seconds_of(line["began"]) if line.get("began") else None
        if run.get("began"):
            began = seconds_of(run["began"])
        elif batch is not None:
            began = batch - (line.get("startup_seconds") or 0)
        else:
            continue
        ended = run.get("ended") or line.get("time")
        ended = seconds_of(ended) if ended else began
        boot, seconds = run.get("stamp") or ("", 0.0)
        if boot in zeros:
            lasted = seconds_between(run["stamp"], run.get("ended_stamp"))
            lasted = max(0, ended - began) if lasted is None else lasted
            started = 0 if batch is None else batch - began
            if not 0 <= started <= lasted:
                started = min(line.get("startup_seconds") or 0, lasted)
            began = zeros[boot] + seconds
            batch, ended = None if batch is None else began + started, began + lasted
        again = run.get("again", BEST_MOVED)  # a second run on a new best or seed was no waste
        wasted = i in slow or not again.startswith((BEST_MOVED, PROMISING))
        if run.get("kind") not in ("confirm", "repeat"):
            yield began, ended if batch is None else min(batch, ended), ended, wasted


def _zeros(runs: Iterable[dict]) -> dict[str, float]:
    """{boot: when its stamps were 0, in seconds since 1970}, by the first run that began on it."""
    stamped = [run for run in runs if run.get("stamp") and run["stamp"][0]]
    stamped.sort(key=lambda run: run["stamp"][1], reverse=True)
    return {run["stamp"][0]: seconds_of(run["began"]) - run["stamp"][1] for run in stamped}
