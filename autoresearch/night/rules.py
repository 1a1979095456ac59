"""
The rules of the night: pure functions of plain values, which read and write nothing.

- noise_floor and decide: what is kept
- slow_share and not_comparable: which runs are doubted, and run once more
- next_step: what happens to an experiment whose run has ended, was lost, or cannot start

A record is the journal's line of an experiment that has ended; a run is what its run-K.json,
end-K.json and again-K.json hold together (see store.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LOWER_IS_BETTER = True  # the metric's direction; read by `gain` alone

MIN_THROUGHPUT_RATIO = 2 / 3  # of the expected tokens a second; below it a run is slow
VERY_SLOW_RATIO = 1 / 3  # of the best's tokens a second; below it a change is measured twice
UNMEASURED_FLOOR = 0.002  # of the score, while no commit has two scores
MAX_CUT_OFFS = 3  # an experiment that was cut off so often is given up

# How reasons begin: why a run is done again, or why an experiment was not run.
BEST_MOVED = "the best moved"
NOT_COMPARABLE = "not comparable"
SLOW = "slow"
CUT_OFF = "cut off"
STOPPED = "stopped"
CONFLICT = "rejected (conflict)"
NOT_MEASURED = "not measured"

# What the ledger says of a run that changes its score without being its code; and why the machine
# took something slower than the best.
CONDITIONS = ("fingerprint", "device", "attention", "compiled", "dtype", "torch", "driver")
FELL_BACK = "fell_back"


# ----------------------------------------------------------------------------------------- scores


def gain(score: float, other: float) -> float:
    """By how much `score` is better than `other`; negative where it is worse."""
    return other - score if LOWER_IS_BETTER else score - other


def spread(scores: list[float]) -> float:
    return max(scores) - min(scores)


def noise_floor(records: list[dict]) -> float | None:
    """The smallest difference that means anything: the widest range of one commit's scores.

    The baseline's seeds are runs of one commit, and every later repeat of a commit may only widen
    the floor. Slow runs and runs that are not comparable do not count. None until a commit has two
    scores.
    """
    scores: dict[str, list[float]] = {}
    for record in records:
        doubtful = record.get("slow") or record.get("not_comparable")
        if record["score"] is not None and not doubtful:
            scores.setdefault(record["commit"], []).append(record["score"])
    return max((spread(known) for known in scores.values() if len(known) > 1), default=None)


def best_of(records: list[dict]) -> dict | None:
    """The record at the branch's tip: the one kept last."""
    return next((record for record in reversed(records) if record["status"] == "keep"), None)


def kept_as(commit: str, records: list[dict]) -> dict:
    """The record with which a commit was kept; empty where it was not."""
    found = [r for r in records if r["commit"] == commit and r["status"] == "keep"]
    return found[-1] if found else {}


def decide(
    score: float | None,
    best: float | None,
    floor: float | None,
    simpler: bool,
    record: float | None = None,
) -> tuple[str, str]:
    """(keep, discard or crash; why) for a score against the best one. The only place with this rule.

    record: the best score ever kept, where simpler code with a slightly worse score is the best now.
    Simpler code is compared with that, so that many small losses cannot add up.
    """
    if score is None:
        return "crash", "no score"
    if best is None:
        return "keep", "the baseline"
    if floor is None:
        floor = UNMEASURED_FLOOR * abs(best)
    better = gain(score, best)
    if better > floor:
        return "keep", f"better by {better:.6f}, the noise floor is {floor:.6f}"
    if simpler and gain(score, best if record is None else record) >= -floor:
        return "keep", f"simpler, and equal within the noise floor of {floor:.6f}"
    if better == 0:
        return "discard", "equal to the best"
    words = f"{'better' if better > 0 else 'worse'} by {abs(better):.6f}"
    within = "which is within" if abs(better) <= floor else "more than"
    return "discard", f"{words}, {within} the noise floor of {floor:.6f}"


def displaced_by(record: dict, records: list[dict]) -> list[dict]:
    """The kept changes that a record took off the branch when it became the best, newest first."""
    found = []
    commit = record.get("displaced")
    while commit and commit != record["base"]:
        kept = kept_as(commit, records)
        if not kept or kept in found or kept["kind"] == "baseline":
            break
        found.append(kept)
        commit = kept["base"]
    return found


def calibration(records: list[dict], floor: float | None) -> tuple[int, int, int]:
    """(predictions, right in direction, right in size) of the experiments with `--expect`.

    A size is right within the noise floor, or within a factor of two.
    """
    predictions = direction = size = 0
    for record in records:
        expect, got = record.get("expect"), record.get("got")
        if expect is None or got is None or record.get("slow"):
            continue
        predictions += 1
        direction += got * expect > 0
        near = abs(got - expect) <= (floor or 0)
        size += near or (expect != 0 and 0.5 <= got / expect <= 2)
    return predictions, direction, size


# ------------------------------------------------------------------------------- doubts about a run


def rate(run: dict) -> float | None:
    """Tokens a second of training, from the ledger's exact counts; None where there are none."""
    if run.get("tokens") and run.get("training_seconds"):
        return run["tokens"] / run["training_seconds"]
    return None


def slow_share(run: dict, same_code: list[float]) -> float | None:
    """The share of its expected rate that a slow run reached; None of a run that was not slow.

    Expected is the best rate of the same code in any run (same_code: tokens a second), or of any
    quarter of the run itself (pace: [seconds, tokens] about every 5% of the budget).
    """
    own = rate(run)
    if own is None:
        return None
    expected = list(same_code)
    pace = run.get("pace") or []
    quarter = len(pace) // 4
    if quarter >= 2:
        for (began, before), (ended, after) in zip(pace, pace[quarter:]):
            if ended > began:
                expected.append((after - before) / (ended - began))
    share = own / max(expected, default=own)
    return share if share < MIN_THROUGHPUT_RATIO else None


def not_comparable(conditions: dict, baseline: dict) -> str | None:
    """In words, what the machine did otherwise than for the baseline; or None.

    conditions, baseline: CONDITIONS and FELL_BACK of the two runs. What one of them does not name
    is not compared. Where both fell back alike, or not at all, another attention or an uncompiled
    run is the change's own doing.
    """
    known = [key for key in CONDITIONS if key in conditions and key in baseline]
    differ = [key for key in known if conditions[key] != baseline[key]]
    reasons = sorted({*conditions.get(FELL_BACK, [])} ^ {*baseline.get(FELL_BACK, [])})
    chosen = [] if reasons else ["attention", "compiled", "dtype"]
    differ = [key for key in differ if key not in chosen]
    if not differ:
        return None
    words = [f"{key} {conditions[key]}, not {baseline[key]} as the baseline" for key in differ]
    return "; ".join([*words, *reasons])


# -------------------------------------------------------------------------------- what happens next


@dataclass(frozen=True)
class History:
    """What a decision depends on besides the experiment's own runs."""

    records: list[dict]  # of the experiments that have ended, oldest first; no confirmations
    rates: dict[str, list[float]]  # commit: tokens a second of each of its runs so far
    baseline: dict  # the conditions under which the baseline ran


@dataclass(frozen=True)
class Record:
    """The experiment has ended."""

    status: str  # keep, discard, crash; scored for a run of a confirmation
    why: str
    run: dict | None = None  # the run that counts
    slow: float | None = None  # the share of its expected rate, where it was slow
    not_comparable: str | None = None
    displaced: str | None = None  # commit of the best that it replaces, not builds on


@dataclass(frozen=True)
class Again:
    """The experiment runs once more."""

    why: str


def next_step(
    asked: dict, runs: list[dict], history: History, conflict: str | None = None
) -> Record | Again:
    """What happens to an experiment. The only place with this rule.

    asked: what experiment.json holds, and `dropped`: whether the agent gave it up.
    runs: all of its runs, oldest first. One that ended has `code`, `score` or `failure`; one that
    is done again has `again`; the last one has `lost`, a reason, where nobody knows how it ended.
    conflict: why the change could not be put on top of the present best, where that failed.
    """
    last = runs[-1] if runs else {}
    if asked.get("dropped"):
        if "code" in last and "again" not in last:
            return Record("crash", "dropped", last)
        return Record("crash", "dropped while it waited")
    if conflict:
        return _after_conflict(runs, history, conflict)
    if "lost" in last:
        return _after_loss(runs)
    return _after_end(asked, runs, history)


def _after_loss(runs: list[dict]) -> Record | Again:
    """A run that was cut off runs again, MAX_CUT_OFFS - 1 times."""
    why = runs[-1]["lost"]
    before = [run for run in runs if run.get("again", "").startswith(CUT_OFF)]
    if len(before) + 1 < MAX_CUT_OFFS:
        return Again(why)
    return Record("crash", f"{CUT_OFF} {MAX_CUT_OFFS} times{why.removeprefix(CUT_OFF)}")


def _after_conflict(runs: list[dict], history: History, conflict: str) -> Record:
    """A change that cannot be put on top of the best.

    One that has not run is rejected. One that won on an older best is compared with the present best
    by its score, and becomes the best itself where it is better by more than the noise: the night
    never keeps a worse file than the best one it has measured.
    """
    why = f"{CONFLICT}: {conflict}"
    won = [run for run in runs if run.get("again", "").startswith(BEST_MOVED)]
    if not won:
        return Record("crash", why)
    run = _counted(runs, won[-1]["commit"], history)
    slow = slow_share(run, history.rates.get(run["commit"], []))
    best, base = best_of(history.records), kept_as(run["base"], history.records)
    status, beside = decide(run["score"], best["score"], noise_floor(history.records), False)
    if status == "keep":
        words = f"{beside}; displaces the best {best['commit'][:7]}, with which it conflicts"
        return Record("keep", words, run, slow, displaced=best["commit"])
    on_base = gain(run["score"], base["score"])
    better = "better" if on_base >= 0 else "simpler, and worse"
    words = f"{why} (on {run['base'][:7]} it was {better} by {abs(on_base):.6f})"
    return Record("discard", words, run, slow)


def _after_end(asked: dict, runs: list[dict], history: History) -> Record | Again:
    last = runs[-1]
    run = _counted(runs, last["commit"], history)
    if run is None:
        return Record("crash", last["failure"], last)
    # A run is doubted once for each reason, and once more on each best that it is based on.
    before = [r["again"] for r in runs if "again" in r and r["commit"] == last["commit"]]
    other = not_comparable(run.get("conditions", {}), history.baseline)
    if other:
        why = f"{NOT_COMPARABLE}: {other}"
        if not any(earlier.startswith(NOT_COMPARABLE) for earlier in before):
            return Again(why)
        status = "crash" if asked["kind"] == "confirm" else "discard"
        return Record(status, f"twice {why}", run, not_comparable=why)
    slow = slow_share(run, history.rates.get(run["commit"], []))
    doubt = _doubted_rate(run, history, slow)
    if doubt and not any(earlier.startswith(SLOW) for earlier in before):
        return Again(doubt)
    if asked["kind"] == "confirm":
        return Record("scored", "on the test split", run, slow)
    return _against_best(asked, run, history, slow)


def _counted(runs: list[dict], commit: str, history: History) -> dict | None:
    """Of a commit's runs with a score, the fastest comparable one; None where none has a score."""
    scored = [run for run in runs if run["commit"] == commit and run.get("score") is not None]
    comparable = [
        run for run in scored if not not_comparable(run.get("conditions", {}), history.baseline)
    ]
    return max(comparable or scored, key=lambda run: rate(run) or 0, default=None)


def _doubted_rate(run: dict, history: History, slow: float | None) -> str | None:
    """Why a run is measured once more for its tokens a second; None where it is not."""
    if slow:
        return f"{SLOW} ({slow:.0%} of its expected rate)"
    base = kept_as(run["base"], history.records)
    beside = (rate(run) or 0) / (rate(base) or math.inf)
    if 0 < beside < VERY_SLOW_RATIO:
        return f"{SLOW}, by the machine or by the change ({beside:.0%} of the best's rate)"
    return None


def _against_best(asked: dict, run: dict, history: History, slow: float | None) -> Record | Again:
    records = history.records
    best, base = best_of(records), kept_as(run["base"], records)
    # Only the bests up to its own base: later ones are met by its run on top of them.
    known = records[: records.index(base) + 1] if base else []
    scores = [record["score"] for record in known if record["status"] == "keep"]
    best_ever = max(scores, key=lambda score: gain(score, 0), default=None)
    floor = noise_floor(records)
    status, why = decide(run["score"], base.get("score"), floor, asked["simpler"], best_ever)
    if asked["kind"] == "baseline":
        if best:
            status, why = "discard", "measures the noise floor"
    elif not best:
        status, why = "discard", "the baseline has no score to compare with"
    elif best["commit"] != run["base"]:
        why = f"{BEST_MOVED}; on {run['base'][:7]} it was {why}"
        if status == "keep":
            return Again(why)
    return Record(status, why, run, slow)


def gained(runs: list[dict], records: list[dict]) -> float:
    """By how much an experiment's last score beat the best that it stood on; -inf without a score."""
    scored = [run for run in runs if run.get("score") is not None]
    base = kept_as(scored[-1]["base"], records) if scored else None
    return gain(scored[-1]["score"], base["score"]) if base else -math.inf
