"""
What `--json` prints: one object a command, described in docs/agents.md. night.html is drawn from
the page's.
"""

from __future__ import annotations

import json

from autoresearch.common import one_line, utc
from autoresearch.night import failures, journal, results
from autoresearch.night import lines as second_lines
from autoresearch.night.audit import audit, summary_of
from autoresearch.night.confirm import confirmation_lines
from autoresearch.night.experiment import Experiment
from autoresearch.night.picture import better_than_best
from autoresearch.night.report import NightReport, cost_of
from autoresearch.night.runs import last_runs
from autoresearch.night.settings import TARGET
from autoresearch.night.status import (
    best_losses,
    loss_at,
    losses,
    open_line,
    title_of,
    what_next,
)
from autoresearch.night.store import Night
from autoresearch.referee.ledger import ledger_path, read_ledger

LAST_ROWS = 5  # of the status


def page_object(night: Night, report: NightReport) -> dict:
    """All that night.html says. report: NightReport.of(night)."""
    records, noise = report.records, report.noise()
    rows = row_objects(report)
    by_place = {row["row"]: row for row in rows}
    best = journal.best_of(records) or {}
    predictions = journal.calibration(records, noise)
    ledger = read_ledger()[0] if report.confirmed else []
    given_up = failures.given_up(night)
    return {
        **named(night),
        "written": utc(),
        "metric": TARGET.metric,
        "lower_is_better": TARGET.lower_is_better,
        "warnings": [*([given_up] if given_up else night.engine_state()["lines"]), *report.skipped],
        "counts": report.counts(),
        "noise": noise,
        "band": report.band(),
        "baseline": next((row for row in rows if row["status"] == "keep"), None),
        "best": next((row for row in rows if row["n"] == best.get("n")), None),
        "lines": second_lines.all_lines(records),
        "open": open_objects(night),
        "rows": rows,
        "kept": [
            {"n": by_place[row.n]["n"], "row": row.n, "gain": gain, "best": best}
            for row, gain, best in results.gains(report.rows)
        ],
        "too_good": [by_place[row.n]["n"] for row in results.too_good_rows(report.rows)],
        "better_not_kept": [by_place[row.n]["n"] for row in better_than_best(report.rows)],
        "predictions": dict(zip(("count", "direction", "size"), predictions)),
        "confirmation": confirmation_lines(records, report.confirmed, ledger),
        "cost": cost_of(night.sessions(), records),
    }


def say(value: dict):
    print(json.dumps(value, indent=2))


def say_status(night: Night):
    """The page's object with the last rows alone, and what comes next."""
    if not night.begun():
        return say({**named(night), "next": "uv run night.py begin"})
    night.sync_branch()
    status = page_object(night, NightReport.of(night))
    say({**status, "rows": status["rows"][-LAST_ROWS:], "next": what_next(night)})


def say_runs(count: int):
    say({"ledger": str(ledger_path()), "runs": last_runs(count)})


def say_audit():
    report = NightReport.here()
    findings = list(audit(report))
    told = [{"fine": finding.fine, "words": finding.words} for finding in findings]
    say({"findings": told, "summary": summary_of(report, findings)})


# ------------------------------------------------------------------------------------------ parts


def named(night: Night) -> dict:
    return {"night": night.tag, "branch": night.branch, "state": state_of(night)}


def state_of(night: Night) -> str:
    """`not begun`, `stopped`, `running`, `waiting` (to start, or to be decided) or `idle`."""
    if not night.begun():
        return "not begun"
    if night.stopped():
        return "stopped"
    states = [experiment.state() for experiment in night.open()]
    return "running" if "running" in states else "waiting" if states else "idle"


def row_objects(report: NightReport) -> list[dict]:
    """The rows of results.tsv, each with what the journal says of it."""
    known: dict[tuple[str, str], list[dict]] = {}
    for record in report.records:
        known.setdefault((record["commit"][:7], record["status"]), []).append(record)
    found = []
    for row in report.rows:
        same = known.get((row.commit[:7], row.status))
        record = same.pop(0) if same else {}
        of_journal = ("n", "kind", "why", "expect", "got", "slow", "ended", "line", "on_line")
        found.append(
            {
                **{key: record.get(key) for key in of_journal},
                "row": row.n,
                "commit": row.commit,
                "score": row.score,
                "memory_gb": row.memory_gb,
                "status": row.status,
                "not_measured": row.not_measured,
                "description": row.what,
            }
        )
    return found


def too_good_lines(report: NightReport) -> list[str]:
    """Of each kept score that is beyond all gains before by far: what to do."""
    rows = {row["row"]: row for row in row_objects(report)}
    found = [rows[row.n] for row in results.too_good_rows(report.rows)]
    return [
        f"{row['n'] or row['row']} is too good ({row['score']:.6f}): look at the diff before you "
        f"believe it: {one_line(row['description'], 60)}"
        for row in found
    ]


def better_lines(report: NightReport, most: int = 5) -> list[str]:
    """Of the scores better than the best's that were not kept, the best first: why they were not."""
    rows = {row["row"]: row for row in row_objects(report)}
    found = [rows[row.n] for row in better_than_best(report.rows)]
    lines = [
        f"{row['n'] or row['row']} is better than the best and not kept: {row['score']:.6f}, "
        f"{row['why'] or 'for no reason that is known'}"
        for row in found[:most]
    ]
    return lines + [f"and {len(found) - most} more are better than the best"] * (len(found) > most)


def open_objects(night: Night) -> list[dict]:
    """What runs, waits, or is not decided yet."""
    records = night.records()
    ended = {record["n"] for record in night.ended()}
    experiments = [e for e in night.open() if e.n not in ended]
    best_curve, stopped = best_losses(night, records), night.stopped()
    return [open_object(e, experiments, best_curve, stopped) for e in experiments]


def open_object(
    experiment: Experiment,
    experiments: list[Experiment],
    best_curve: list[tuple[float, float]],
    stopped: bool,
) -> dict:
    state = experiment.state()
    curve = losses(experiment.path("progress.jsonl")) if state == "running" else []
    percent, loss = curve[-1] if curve else (None, None)
    return {
        "n": experiment.n,
        "kind": experiment.asked["kind"],
        "state": state,
        "title": title_of(experiment.asked),
        "percent": percent,
        "loss": loss,
        "best_loss": loss_at(best_curve, percent) if curve else None,
        "words": open_line(experiment, experiments, best_curve, stopped),
    }
