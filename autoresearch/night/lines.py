"""
Second lines: experiments on something else than the best, by `night.py try --on N`.

A line begins at experiment N and has a best of its own, its tip. What is tried on it is decided against
the tip, by the same rule and with what is known around N. No row of it is a keep of the night, until its
tip beats the night's best by that rule, too: then it is the best, and the line has joined: what still
waits or runs on it is an experiment on the best.

A record of a line has `line`: N, `root`: its commit, and `on_line`: what came of it there (keep, discard,
crash).
"""

from __future__ import annotations

from dataclasses import replace

from autoresearch.common import Fail, one_line, some
from autoresearch.night import journal, rules
from autoresearch.night.settings import number_setting

MOST_OPEN = 3
MOST_RUNS = 3  # of a tip that may beat the best
ASIDE = "aside"  # the status, seen from a line, of what was kept elsewhere


# ------------------------------------------------------------------------------- pure functions


def view(records: list[dict], n: int) -> list[dict]:
    """The night's records as line N sees them: kept are N and what was kept on the line.

    From the record with which the line joins, they are the night's.
    """
    found, has_joined = [], False
    for record in records:
        on_it = record.get("line") == n
        has_joined = has_joined or (on_it and record["status"] == "keep")
        if record["n"] == n:
            record = {**record, "status": "keep", "level": None}
        elif on_it and not has_joined:
            record = {**record, "status": record["on_line"]}
        elif record["status"] == "keep" and not has_joined:
            record = {**record, "status": ASIDE}
        found.append(record)
    return found


def records_of(asked: dict, records: list[dict]) -> list[dict]:
    """The records by which an experiment is decided: the night's, or as its line sees them."""
    return view(records, asked["line"]) if asked.get("line") else records


def tip_of(records: list[dict], n: int) -> dict:
    """The record of line N's best: the night's, where the line has joined."""
    return journal.best_of(view(records, n))


def joined(records: list[dict], n: int) -> bool:
    """Whether line N's tip has become the night's best."""
    return any(r.get("line") == n and r["status"] == "keep" for r in records)


def open_ones(records: list[dict], asked: list[dict]) -> list[int]:
    """The lines that are open. asked: what the experiments that have not ended ask for.

    A line ends when it joins, or when `patience` of its experiments in a row brought nothing.
    """
    patience = number_setting("patience", "10")
    numbers = dict.fromkeys(one["line"] for one in [*records, *asked] if one.get("line"))
    working = {one.get("line") for one in asked}  # one that has ended may be taken up again
    found = []
    for n in numbers:
        last = [r["on_line"] == "keep" for r in records if r.get("line") == n][-patience:]
        is_alive = n in working or len(last) < patience or any(last)
        if is_alive and not joined(records, n):
            found.append(n)
    return found


def next_step(
    asked: dict, runs: list[dict], history: rules.History, conflict: str | None = None
) -> rules.Record | rules.Again:
    """rules.next_step, and on a line what it is there; what beats the best becomes the best."""
    n = asked.get("line")
    of_line = replace(history, records=records_of(asked, history.records))
    step = rules.next_step(asked, runs, of_line, conflict)
    if not n or isinstance(step, rules.Again):
        return step
    if step.status == "crash" or joined(history.records, n):
        return replace(step, on_line=step.status)
    why = step.why.replace("the best", "its tip")
    here = replace(step, status="discard", on_line=step.status, displaced=None)
    if step.status == "keep":
        here = replace(here, why=f"on {n}'s line kept: {why}")
    else:
        here = replace(here, why=f"on {n}'s line: {why}")
    if not step.verdict:  # not comparable
        return here
    beside = rules.beside_best([run["score"] for run in step.runs], history)
    # A seed that gave no score is not asked again, nor what cannot be put on the tip.
    may_run = not conflict and rules.seed_of(runs[-1]) in map(rules.seed_of, step.runs)
    if beside.status == "again" and step.status == "keep" and beside.seen.gain > 0:
        return rules.Again(beside.why) if may_run and len(step.runs) < MOST_RUNS else here
    if beside.status != "keep":
        return here
    # Whatever it is beside a lucky tip: the night never keeps a worse file than the best one measured.
    best = journal.best_of(history.records)["commit"]
    stands_on = journal.lineage(step.run["base"], history.records)
    words = beside.beside.replace("its base", "the best")
    return replace(
        here,
        status="keep",
        why=f"{n}'s line joins, its tip is the best: {words}",
        verdict=beside,
        on_line="keep",
        displaced=None if best in stands_on else best,
    )


# ------------------------------------------------------------------------- opening and looking


def root_of(records: list[dict], n: int) -> dict:
    """The record on which line N begins. Raises Fail where none can."""
    found = next((record for record in records if record["n"] == n), None)
    best = journal.best_of(records)
    if found is None:
        raise Fail(f"--on {n}: no experiment {n} has ended: uv run night.py runs lists them")
    if found.get("line") and found["status"] != "keep":
        raise Fail(f"--on {n}: {n} is on {found['line']}'s line: try --on {found['line']}")
    if joined(records, n):
        raise Fail(f"--on {n}: {n}'s line has joined, its tip is or was the best: try without --on")
    if found["kind"] == "baseline":
        raise Fail(f"--on {n}: {n} is the baseline: a line begins at a change that was measured")
    if not journal.scores_of(found):
        came = one_line(f"{found['status']}: {found['why']}", 60)
        raise Fail(
            f"--on {n}: a line begins at a change that was measured, and {n} was not ({came})"
        )
    if best and found["commit"] == best["commit"]:
        raise Fail(f"--on {n}: {n} is the best: try without --on")
    return found


def check_open(records: list[dict], asked: list[dict], n: int):
    """Raises Fail where one more line would be too many."""
    known = open_ones(records, asked)
    if n not in known and len(known) >= MOST_OPEN:
        raise Fail(
            f"--on {n}: {len(known)} lines are open ({some(map(str, known))}): go on with one, as try "
            f"--on {known[0]}. A line ends when it joins, or after `patience` experiments in a row "
            "that brought nothing"
        )


def words_of(records: list[dict], n: int) -> str:
    """Line N in a sentence: its tip beside the best, or with what it joined."""
    for record in records:
        if record.get("line") == n and record["status"] == "keep":
            return f"{n}'s line has joined: {record['n']} became the best"
    tip, best = tip_of(records, n), journal.best_of(records)
    own = [record for record in records if record.get("line") == n]
    kept = sum(record["on_line"] == "keep" for record in own)
    behind = journal.gain(best["score"], tip["score"])
    side = "behind" if behind >= 0 else "better, within the noise, than"
    return (
        f"{n}'s line: tip {tip['score']:.6f} ({tip['n']}), {abs(behind):.6f} {side} the best; "
        f"{len(own)} tried on it, {kept} kept"
    )


def all_lines(records: list[dict]) -> list[str]:
    """Each line of the night in a sentence, those that have ended, too."""
    numbers = dict.fromkeys(record["line"] for record in records if record.get("line"))
    return [words_of(records, n) for n in numbers]


def status_lines(records: list[dict], asked: list[dict]) -> list[str]:
    """Of each open line: its tip beside the best."""
    return [f"     {words_of(records, n)}" for n in open_ones(records, asked)]
