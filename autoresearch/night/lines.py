"""
Second lines: experiments on something else than the best, by `night.py try --on N`.

A line begins at experiment N and has a best of its own, its tip. What is tried on it is decided against
the tip, by the same rule and with what is known around N. No row of it is a keep of the night, until its
tip beats the night's best by that rule, too: then it is the best, and the line has joined.

A record of a line has `line`: N, `root`: its commit, `fork`: the commit on which N stood, and `on_line`:
what came of it there (keep, discard, crash).
"""

from __future__ import annotations

from dataclasses import replace

from autoresearch.common import Fail, some
from autoresearch.night import rules
from autoresearch.night.repo import Contents, Repository, merged
from autoresearch.night.settings import number_setting

MOST_OPEN = 3
MOST_RUNS = 3  # of a tip that may beat the best
ASIDE = "aside"  # the status, seen from a line, of what was kept elsewhere


# ------------------------------------------------------------------------------- pure functions


def view(records: list[dict], n: int) -> list[dict]:
    """The night's records as line N sees them: kept are N and what was kept on the line."""
    found = []
    for record in records:
        if record["n"] == n:
            record = {**record, "status": "keep", "level": None}
        elif record.get("line") == n:
            record = {**record, "status": record["on_line"]}
        elif record["status"] == "keep":
            record = {**record, "status": ASIDE}
        found.append(record)
    return found


def seen_from(history: rules.History, asked: dict) -> rules.History:
    """What an experiment is decided by: the night's history, or its line's."""
    if not asked.get("line"):
        return history
    return replace(history, records=view(history.records, asked["line"]))


def tip_of(records: list[dict], n: int) -> dict:
    """The record of line N's best."""
    own = [r for r in records if r["n"] == n or r.get("line") == n and r["on_line"] == "keep"]
    return own[-1]


def joined(records: list[dict], n: int) -> bool:
    """Whether line N's tip has become the night's best."""
    return any(r.get("line") == n and r["status"] == "keep" for r in records)


def open_ones(records: list[dict], asked: list[dict]) -> list[int]:
    """The lines that are open. asked: what the experiments that have not ended ask for.

    A line ends when it joins, or when `patience` of its experiments in a row brought nothing.
    """
    patience = number_setting("patience", "10")
    numbers = dict.fromkeys(one["line"] for one in [*records, *asked] if one.get("line"))
    found = []
    for n in numbers:
        last = [r["on_line"] == "keep" for r in records if r.get("line") == n][-patience:]
        if not joined(records, n) and (len(last) < patience or any(last)):
            found.append(n)
    return found


def next_step(
    asked: dict, runs: list[dict], history: rules.History, conflict: str | None = None
) -> rules.Record | rules.Again:
    """rules.next_step, and on a line what it is there; a tip that beats the best becomes the best."""
    n = asked.get("line")
    step = rules.next_step(asked, runs, seen_from(history, asked), conflict)
    if not n or isinstance(step, rules.Again):
        return step
    here = f"on {n}'s line"
    if step.status == "crash":
        return replace(step, on_line="crash")
    if step.status == "discard" or step.displaced:  # what conflicts with the tip displaces nothing
        return replace(step, status="discard", why=f"{here}: {step.why}", on_line="discard")
    beside = rules.beside_best([run["score"] for run in step.runs], history)
    if beside.status == "again" and beside.seen.gain > 0 and len(step.runs) < MOST_RUNS:
        return rules.Again(beside.why)
    if beside.status == "keep" and beside.seen.gain > 0:
        best = rules.best_of(history.records)
        words = beside.beside.replace("its base", "the best")
        why = f"{n}'s line joins, its tip is the best: {words}"
        more = dict(displaced=best["commit"], on_line="keep")
        return replace(step, why=why, verdict=beside, **more)
    why = f"{here} kept: {step.why}"
    return replace(step, status="discard", why=why, on_line="keep")


# ------------------------------------------------------------------------- opening and looking


def root_of(records: list[dict], n: int) -> dict:
    """The record on which line N begins. Raises Fail where none can."""
    found = next((record for record in records if record["n"] == n), None)
    best = rules.best_of(records)
    if found is None:
        raise Fail(f"--on {n}: no experiment {n} has ended: uv run night.py runs lists them")
    if found.get("line"):
        raise Fail(f"--on {n}: {n} is on {found['line']}'s line: try --on {found['line']}")
    if joined(records, n):
        raise Fail(f"--on {n}: {n}'s line has joined, its tip is or was the best: try without --on")
    if found["kind"] == "baseline" or not rules.scores_of(found):
        raise Fail(f"--on {n}: a line begins at an experiment that was measured, and {n} was not")
    if best and found["commit"] == best["commit"]:
        raise Fail(f"--on {n}: {n} is the best: try without --on")
    return found


def check_open(records: list[dict], asked: list[dict], n: int):
    """Raises Fail where one more line would be too many."""
    known = open_ones(records, asked)
    if n not in known and len(known) >= MOST_OPEN:
        raise Fail(
            f"--on {n}: {len(known)} lines are open ({some(map(str, known))}): go on with one. A line "
            "ends when it joins, or after `patience` experiments in a row that brought nothing"
        )


def on_tip(edits: Contents, repo: Repository, best: str, tip: str) -> Contents | None:
    """The edits as a change of a line's tip; None where they conflict with it.

    They were made on the best or on the tip (`bring on-N`): on that from which they differ less.
    """
    of_best, of_tip = repo.contents_at(best), repo.contents_at(tip)
    if distance(edits, of_tip) <= distance(edits, of_best):
        return edits
    return merged(of_tip, of_best, edits)


def distance(one: Contents, other: Contents) -> int:
    """How many lines stand in one of the two alone."""
    count = 0
    for file in one.keys() | other.keys():
        a, b = (set(of.get(file, b"").splitlines()) for of in (one, other))
        count += len(a ^ b)
    return count


def status_lines(records: list[dict], asked: list[dict]) -> list[str]:
    """Of each open line: its tip beside the best."""
    best = rules.best_of(records)
    found = []
    for n in open_ones(records, asked):
        tip = tip_of(records, n)
        own = [record for record in records if record.get("line") == n]
        kept = sum(record["on_line"] == "keep" for record in own)
        behind = rules.gain(best["score"], tip["score"])
        found.append(
            f"     {n}'s line: tip {tip['score']:.6f} ({tip['n']}), {behind:.6f} behind the best; "
            f"{len(own)} tried on it, {kept} kept"
        )
    return found
