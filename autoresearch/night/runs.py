"""
`night.py runs`: the ledger as a table, of this night and of all before.
"""

from __future__ import annotations

import re
from pathlib import Path

from autoresearch.common import cut, git, one_line, printable, read_json
from autoresearch.night.doubts import rate
from autoresearch.night.status import title_of
from autoresearch.referee.ledger import ledger_path, read_ledger

RUNS_TABLE = "{:16} {:>4} {:8} {:5} {:>9} {:>6} {:>8} {:>9} {:>4} {:10} {}"


def last_runs(count: int) -> list[dict]:
    """The ledger's last runs; a start without an end was cut off, or is running."""
    ledger = ledger_path()
    size = ledger.stat().st_size if ledger.is_file() else 0
    records, _ = read_ledger(max(0, size - 4096 * count))  # the end: all of 10,000 runs takes 0.8 s
    last = {record.get("run"): record for record in records}  # the end replaces the start
    return list(last.values())[-count:]


def list_runs(count: int):
    """The ledger's last runs as a table."""
    runs = last_runs(count)
    heads = "time (UTC),n,commit,split,score,s,M tokens,tokens/s,seed,status,description".split(",")
    print(RUNS_TABLE.format(*heads))
    ideas = subjects([run.get("commit") or "" for run in runs])
    for run in runs:
        n, asked, is_open = experiment_of(run)
        idea = ideas.get(run.get("commit"), "-")
        if asked.get("kind") in ("baseline", "repeat"):
            idea = title_of(asked)
        cells = [n, *run_cells(run, "running, or cut off" if is_open else "cut off"), idea]
        print(cut(printable(RUNS_TABLE.format(cells[1], cells[0], *map(str, cells[2:]))), 160))
    earlier = f"; earlier ones: uv run night.py runs {10 * count}" if len(runs) == count else ""
    print(f"from {ledger_path()}; n is the experiment; * has uncommitted changes{earlier}")
    print("next: uv run night.py says where the night stands")


def subjects(commits: list[str]) -> dict[str, str]:
    """The first lines of the messages of those commits that are in this repository."""
    asked = "".join(f"{commit}\n" for commit in {*commits} if commit).encode()
    words = ("log", "--no-walk", "--ignore-missing", "--stdin", "--format=%H %s")
    found = git(*words, give=asked, check=False) if asked else None
    return dict(line.split(" ", 1) for line in (found or "").splitlines())


def experiment_of(run: dict) -> tuple[str, dict, bool]:
    """(number, what was asked, whether it is open) of the night's experiment that made a ledger's run."""
    found = re.fullmatch(r"(.*/\.night/[^/]+)/queue/(\d+)/tree", run.get("repo") or "")
    if not found:
        return "-", {}, False
    for place in ("queue", "done"):
        if asked := read_json(Path(found[1]) / place / found[2] / "experiment.json"):
            return found[2], asked, place == "queue"
    return found[2], {}, False


def run_cells(record: dict, without_end: str) -> list:
    """One line of the table of runs, without number and description."""
    score, tokens = record.get("score"), record.get("tokens")
    per_second = rate(record)
    status = record.get("failure") or ("scored" if score is not None else without_end)
    return [
        record.get("time", "-")[:16].replace("T", " "),
        (record.get("commit") or "-")[:7] + ("*" if record.get("changed") else ""),
        record.get("split", "-"),
        "-" if score is None else f"{score:.6f}",
        "-" if record.get("training_seconds") is None else f"{record['training_seconds']:.0f}",
        "-" if tokens is None else f"{tokens / 1e6:.3f}",
        "-" if per_second is None else f"{per_second:,.0f}",
        record.get("seed", "-"),
        one_line(status, 40),
    ]
