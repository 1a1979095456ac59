"""
Which runs are doubted: slow by other load, or made under other conditions than the baseline.

Pure functions of what the ledger says of a run.
"""

from __future__ import annotations

from itertools import pairwise

MIN_THROUGHPUT_RATIO = 2 / 3  # of the expected tokens a second; below it a run is slow
FEW_STEPS = 50  # a score after fewer measures the machine more than the idea
VERY_SLOW_RATIO = 1 / 3  # of the best's tokens a second; below it a change is measured twice

# What the ledger says of a run that changes its score without being its code; and why the machine
# took something slower than the best.
CONDITIONS = ("fingerprint", "device", "attention", "compiled", "dtype", "torch", "driver")
FELL_BACK = "fell_back"


# A gain beyond all gains before by so many times; while there are fewer than two, this share of the score.
TOO_GOOD_TIMES, TOO_GOOD_SHARE = 5, 0.3


def too_good(kept: list[float]) -> list[int]:
    """The places, in the scores that were kept one after another, of gains too good to be believed.

    Most are a leak, a judge that was fooled, or a mistake; some are real. All are kept, and marked.
    """
    found = []
    for i in range(1, len(kept)):
        earlier = [abs(after - before) for before, after in pairwise(kept[:i])]
        gained = abs(kept[i] - kept[i - 1])
        enough = TOO_GOOD_SHARE * abs(kept[i - 1])
        if len(earlier) > 1:
            enough = max(TOO_GOOD_TIMES * max(earlier), enough / 10)
        if gained > enough:
            found.append(i)
    return found


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
