"""
`night.py show N`: how one experiment ran, and why it was kept or not.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from autoresearch.common import cut, printable
from autoresearch.night import journal, rules
from autoresearch.night.experiment import Experiment
from autoresearch.night.settings import TARGET
from autoresearch.night.status import (
    WIDTH,
    end_of_log,
    log_of,
    loss_at,
    losses,
    print_lines,
    record_lines,
    title_of,
    what_next,
)
from autoresearch.night.store import Night

DIFF_LINES = 16  # of a diff that is printed


def show(night: Night, n: int, only_diff: bool = False):
    """Decision, diff, losses beside the best's, and the end of the log of the run that counts."""
    record, experiment = night.find(n)
    diff = diff_lines(night, record) if record["kind"] in rules.TRIED else []
    if only_diff:
        print(*diff, sep="\n")
        print("next:", what_next(night))
        return
    lines = [f"{n}: {title_of(record)}, not decided yet"]
    if "status" in record:
        lines = record_lines(record)
    k = record.get("k") or max(1, len(experiment.runs()))
    lines += commit_lines(record, experiment, k)
    lines += diff[:DIFF_LINES]
    if len(diff) > DIFF_LINES:
        lines.append(f"... {len(diff) - DIFF_LINES} more lines: uv run night.py show {n} --diff")
    lines += loss_lines(night, record, losses(experiment.path("progress.jsonl", k)))
    log = [f"   | {line}" for line in end_of_run(experiment.path("run.log", k))]
    print_lines([*lines, *(["end of the log:", *log] if log else [])])
    print("next:", what_next(night))


def diff_lines(night: Night, record: dict) -> list[str]:
    commit = record["commit"]
    words = ("diff-tree", "-p", "--no-ext-diff", f"{commit}^", commit, "--", *TARGET.files)
    diff = night.repo.git(*words, check=False) or ""
    return [cut(printable(line), WIDTH) for line in diff.splitlines()[4:]]


def commit_lines(record: dict, experiment: Experiment, k: int) -> list[str]:
    """Where the run's commit is another than the one that was queued: why."""
    run = experiment.runs()[k - 1] if k <= len(experiment.runs()) else {}
    queued, ran = experiment.asked["commit"], run.get("commit", record["commit"])
    if queued == ran:
        return []
    what = "tip" if record.get("line") else "best"
    what = f"the same change on the new {what}, {run.get('base', record['base'])[:7]}"
    return [f"   queued as {queued[:7]}, ran as {ran[:7]}: {what}"]


def end_of_run(path: Path) -> list[str]:
    """The end of a run's log; the summary's values stand in few lines."""
    lines = end_of_log(path, 40)
    if "---" not in lines:
        return lines[-10:]
    start = lines.index("---")
    values = [line for line in lines[start + 1 :] if not line.startswith("loss_curve")]
    summary = textwrap.wrap("; ".join(values), WIDTH, break_long_words=False)
    return [*lines[max(0, start - 4) : start], *summary]


def loss_lines(night: Night, record: dict, curve: list[tuple[float, float]]) -> list[str]:
    """The losses at each 10% of the budget; in brackets the best's, or what the best was based on."""
    if not curve:
        return []
    name, beside_it = "the best's", journal.best_of(night.records())
    if beside_it and beside_it["n"] == record["n"]:
        name, beside_it = "its base's", journal.kept_as(record["base"], night.records())
    other = losses(log_of(night, beside_it, "progress", "jsonl")) if beside_it else []
    other = [] if beside_it and beside_it["n"] == record["n"] else other  # the baseline itself
    cells = []
    for percent in range(10, 101, 10):
        loss, beside = loss_at(curve, percent), loss_at(other, percent)
        if loss is not None and percent <= curve[-1][0] + 10:
            cells.append(f"{percent}% {loss:.3f}" + (f" ({beside:.3f})" if beside else ""))
    head = f"loss ({name}): " if other else "loss: "
    lines = [head + " ".join(cells[:5])]
    if len(cells) > 5:
        lines.append("   " + " ".join(cells[5:]))
    return lines
