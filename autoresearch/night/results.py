"""
results.tsv: one tab-separated line an experiment. Rows are written and read here and nowhere else.

The night writes the columns below. Logs of other programs are read, too: columns in any order, no
header, any line ends, ids that are no commits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from autoresearch.common import one_line, some, write_atomically
from autoresearch.night.doubts import too_good
from autoresearch.night.journal import gain
from autoresearch.night.logs import read_log
from autoresearch.night.rules import CONFLICT, CUT_OFF, NOT_MEASURED
from autoresearch.night.settings import BASELINE_SEEDS, TARGET

COLUMNS = ["commit", TARGET.metric, "memory_gb", "status", "description"]
STATUSES = ("keep", "discard", "crash")


# ---------------------------------------------------------------------------------------- writing


def row_of(record: dict) -> str:
    """The record's line, without its end: 7-digit commit, 6 decimals, GB with one, text without tabs."""
    score = record["score"]
    memory = 0 if score is None else record["memory_gb"]
    cells = [record["commit"][:7], f"{score or 0:.6f}", f"{memory:.1f}", record["status"]]
    return "\t".join([*cells, _description(record)])


def _description(record: dict) -> str:
    text = record["message"]
    if record["kind"] == "baseline":
        first = record["seed"] == BASELINE_SEEDS[0]
        text = "baseline" if first else f"baseline, seed {record['seed']}"
    if record["simpler"]:
        text = "simpler: " + text
    if len(record.get("scores") or []) > 1:
        text += f" [mean of {len(record['scores'])} runs]"
    if record["score"] is None or record["why"].startswith(CONFLICT):
        text += f" [{record['why']}]"
    if record.get("line"):
        there = ", kept there" if record.get("on_line") == "keep" else ""
        text += f" [on {record['line']} ({record['root'][:7]}){there}]"
    if record.get("displaced"):
        text += f" [displaces {record['displaced'][:7]}]"
    lost = [why for why in record.get("again", []) if why.startswith(f"{CUT_OFF}: ")]
    if lost:  # by a cluster, which says why
        text += f" [ran again, {lost[-1]}]"
    return one_line(text, 400).replace('"', "'")


def write_row(path: Path, record: dict, records: list[dict]):
    """Appends the record's row to the table at `path`, unless it is there already.

    records: the night's, this one included; a table that is gone is made from them again.
    """
    row = row_of(record)
    if path.is_file():
        lines = path.read_bytes().decode("utf-8-sig", "replace").splitlines()
        # Two crashes of a baseline have the same row, and each must be there.
        if lines.count(row) < [row_of(other) for other in records].count(row):
            lines.append(row)
    else:
        lines = ["\t".join(COLUMNS), *map(row_of, records)]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


# ---------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Row:
    n: int  # in the order of the file, from 1
    commit: str  # any text: other logs call their experiments `baseline`, `001`, `none`
    score: float | None  # None of a crash
    memory_gb: float | None
    status: str
    what: str

    @property
    def hash(self) -> str | None:
        """The commit, where the row names one that git may know."""
        return self.commit.lower() if re.fullmatch("[0-9a-fA-F]{7,40}", self.commit) else None

    @property
    def is_baseline(self) -> bool:
        """Whether it measured what all else is compared with, and is no experiment."""
        return self.what.lower().startswith("baseline")

    @property
    def runs(self) -> int:
        """How many runs its score is the mean of."""
        found = re.search(r" \[mean of (\d+) runs\]", self.what)
        return int(found[1]) if found else 1

    @property
    def line(self) -> tuple[str, bool] | None:
        """(commit of the experiment on whose line it was tried, whether it was kept there)."""
        found = re.search(r" \[on \d+ \((\w+)\)(, kept there)?\]", self.what)
        return (found[1], bool(found[2])) if found else None

    @property
    def not_measured(self) -> bool:
        """Whether the machine, not the code, is why there is no score."""
        return self.status == "crash" and f"[{NOT_MEASURED}" in self.what


def read_results(path: Path) -> tuple[list[Row], list[str]]:
    """(rows, sentences on what was skipped, or how the metric is known) of any log (logs.py)."""
    log = read_log(path, TARGET.metric, TARGET.lower_is_better)
    if log.problem:
        return [], [log.problem]
    rows = []
    for found in log.rows:
        rows.append(Row(n=len(rows) + 1, **found))
    if not log.bad:
        return rows, []
    needed = f"a status such as {', '.join(STATUSES)} and a number as {TARGET.metric}"
    return rows, [f"{len(log.bad)} rows were skipped, a row needs {needed}: {some(log.bad, 3)}"]


# ----------------------------------------------------------------------------------- what was kept


def gains(rows: list[Row]) -> list[tuple[Row, float, float]]:
    """(row, its gain over the best before, the best from there on) of each kept row; the first gains 0."""
    found = []
    best = None
    for row in rows:
        if row.status == "keep":
            better = 0.0 if best is None else gain(row.score, best)
            if best is None or better > 0:
                best = row.score
            found.append((row, better, best))
    return found


def too_good_rows(rows: list[Row]) -> list[Row]:
    """The kept rows to be looked at before they are believed: doubts.too_good."""
    kept = [row for row in rows if row.status == "keep"]
    return [kept[i] for i in too_good([row.score for row in kept])]


def best_row(rows: list[Row]) -> Row:
    """The kept row with the best score. Raises ValueError where nothing was kept."""
    return max((row for row in rows if row.status == "keep"), key=lambda row: gain(row.score, 0.0))
