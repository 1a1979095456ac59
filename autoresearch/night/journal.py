"""
What the journal's records say: scores and their noise, the best, and what it stands on.

Pure functions; a record is the journal's line of an experiment that has ended (store.py).
"""

from __future__ import annotations

from statistics import fmean

from autoresearch.night import evidence
from autoresearch.night.settings import TARGET


def gain(score: float, other: float) -> float:
    """By how much `score` is better than `other`; negative where it is worse."""
    return other - score if TARGET.lower_is_better else score - other


def spread(scores: list[float]) -> float:
    return max(scores) - min(scores)


def scores_of(record: dict) -> list[float]:
    """The comparable scores of its commit that a record holds: none of a run that was doubted."""
    if record["score"] is None or record.get("slow") or record.get("not_comparable"):
        return []
    return record.get("scores") or [record["score"]]


def scores_of_commit(commit: str, *of: list[dict]) -> list[float]:
    """All comparable scores of a commit in these records."""
    return [
        score for records in of for r in records if r["commit"] == commit for score in scores_of(r)
    ]


def noise(records: list[dict]) -> float | None:
    """One standard deviation of a run's score, from every commit that ran more than once.

    Commits far from the best (a kernel's time may have fallen to a tenth) count while there is no other.
    records: repeats of the best may be among them. None until a commit has two scores.
    """
    groups: dict[str, list[float]] = {}
    for record in records:
        groups.setdefault(record["commit"], []).extend(scores_of(record))
    best = best_of(records)
    near = [s for s in groups.values() if s and best and _is_near(fmean(s), best["score"])]
    return evidence.noise_of(near) or evidence.noise_of(groups.values())


def _is_near(score: float, other: float) -> bool:
    return abs(score - other) <= 0.5 * abs(other)


def best_of(records: list[dict]) -> dict | None:
    """The record at the branch's tip: the one kept last."""
    return next((record for record in reversed(records) if record.get("status") == "keep"), None)


def kept_as(commit: str, records: list[dict]) -> dict:
    """The record with which a commit was kept; empty where it was not."""
    found = [r for r in records if r["commit"] == commit and r["status"] == "keep"]
    return found[-1] if found else {}


def displaced_by(record: dict, records: list[dict]) -> list[dict]:
    """The kept changes that a record took off the branch when it became the best, newest first."""
    if not record.get("displaced"):
        return []
    stands_on = lineage(record["commit"], records)
    lost = [c for c in lineage(record["displaced"], records) if c not in stands_on]
    found = [kept_as(commit, records) for commit in lost]
    return [kept for kept in found if kept and kept["kind"] != "baseline"]


def lineage(commit: str, records: list[dict]) -> list[str]:
    """A commit and all that it stands on, newest first, down to the baseline."""
    bases = {record["commit"]: record["base"] for record in records}
    found = [commit]
    while bases.get(found[-1], commit) not in found:
        found.append(bases[found[-1]])
    return found


def calibration(records: list[dict], deviation: float | None) -> tuple[int, int, int]:
    """(predictions, right in direction, right in size) of the experiments with `--expect`.

    A size is right with the right sign, and within the noise or a factor of two; that nothing changes is
    right within the noise. deviation: the noise.
    """
    predictions = direction = size = 0
    for record in records:
        expect, got = record.get("expect"), record.get("got")
        if expect is None or got is None or record.get("slow"):
            continue
        predictions += 1
        near = abs(got - expect) <= (deviation or 0)
        same_sign = got * expect > 0 or (expect == 0 and near)
        direction += same_sign
        size += same_sign and (near or 0.5 <= got / expect <= 2)
    return predictions, direction, size
