"""What is read of a night, and where its hours went."""

import json
import re

import pytest
from repository import make_repository

from autoresearch.common import utc
from autoresearch.night import settings
from autoresearch.night.report import NightReport, hours_line
from autoresearch.night.results import Row

START = 1_000_000.0


def test_a_night_is_read_as_far_as_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "PROGRAM", tmp_path / "program.md")
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    assert "is no git repository" in NightReport.here(tmp_path).problem
    make_repository(tmp_path)
    (tmp_path / "program.md").write_text("- tag: test\n")
    folder = tmp_path / ".night/test"
    experiments = {"queue/4": "try", "done/1": "baseline", "done/2": "confirm", "done/3": "try"}
    for place, kind in experiments.items():
        (folder / place).mkdir(parents=True)
        asked = {"n": int(place[-1]), "kind": kind, "commit": "a" * 40, "base": "a" * 40}
        (folder / place / "experiment.json").write_text(json.dumps(asked))
        (folder / place / "run-1.json").write_text(json.dumps({"id": f"run {place}"}))
    records = [{"n": 1, "kind": "baseline"}, {"n": 2, "kind": "confirm"}]
    (folder / "journal.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    report = NightReport.here(tmp_path)
    assert (report.records, report.confirmed) == (records[:1], records[1:])
    # The third is neither open nor in the journal: somebody took its line out.
    assert set(report.started) == {"run queue/4", "run done/1", "run done/2"}


def said(report: NightReport) -> tuple:
    found = re.fullmatch(
        r"([\d.]+) hours, (\d+) slots?, a run in them (\d+)% of the time. Lost: ([\d,]+) s to starting"
        r" and compiling, ([\d,]+) s to slow and repeated runs, ([\d,]+) s to waiting for the agent",
        hours_line(report),
    )
    return tuple(float(number.replace(",", "")) for number in found.groups())


def night(tmp_path, *runs: dict) -> NightReport:
    """runs: began, ended; and of the ledger batch, `scored`; all in seconds after START."""
    started, ledger = {}, []
    for i, run in enumerate(runs):
        name = str(i)
        times = {key: utc(START + run[key]) for key in ("began", "ended") if key in run}
        if "began" in run:
            started[name] = {"id": name, **{"kind": "try", **run}, **times}
        if "batch" in run:
            line = {"run": name, "split": "val", "commit": "a" * 40, "startup_seconds": 30.0}
            ledger.append({**line, "event": "start", "time": utc(START + run["batch"])})
            if "scored" in run:
                ledger.append({**line, "event": "end", "time": utc(START + run["scored"])})
    rows = [Row(1, "aaaaaaa", 1.0, None, "keep", "baseline")]
    return NightReport(tmp_path, rows, started=started, ledger=ledger)


WHOLE = {"began": 0, "batch": 40, "ended": 360, "scored": 350}


def set_back(seconds: int, began: int, lasted: int, batch: int) -> dict:
    """A run during which the time of day is set, by so many seconds."""
    stamps = {"stamp": ["boot", 5000.0 + began], "ended_stamp": ["boot", 5000.0 + began + lasted]}
    ends = {"ended": began + lasted + seconds, "scored": began + lasted + seconds - 10}
    return {"began": began, "batch": began + batch, **ends, **stamps}


AFTER = {"began": 180_400, "batch": 180_440, "ended": 180_760}
AFTER |= {"stamp": ["boot", 5400.0], "ended_stamp": ["boot", 5760.0]}


@pytest.mark.parametrize(
    "runs, line",
    [
        ([WHOLE], (0.1, 1, 100, 40, 0, 0)),
        ([{"batch": 30, "scored": 360}], (0.1, 1, 100, 30, 0, 0)),  # without night.py
        ([WHOLE, {"began": 400, "batch": 420, "ended": 720}], (0.2, 1, 94, 60, 0, 40)),
        ([WHOLE, {"began": 180, "batch": 190, "ended": 540}], (0.1, 2, 67, 50, 0, 360)),
        ([{**WHOLE, "again": "slow (40%)"}], (0.1, 1, 100, 0, 360, 0)),
        ([WHOLE, {**WHOLE, "kind": "confirm"}], (0.1, 1, 100, 40, 0, 0)),
        ([set_back(-7200, 0, 360, 40)], (0.1, 1, 100, 40, 0, 0)),
        ([set_back(-7200, 0, 360, -7160)], (0.1, 1, 100, 30, 0, 0)),  # the ledger's startup_seconds
        ([set_back(180_000, 0, 360, 40), AFTER], (0.2, 1, 95, 80, 0, 40)),
    ],
)
def test_the_hours_in_one_line(tmp_path, runs, line):
    assert said(night(tmp_path, *runs)) == line
