"""
The rules of the night: pure functions of plain values, which read and write nothing.

- decide: what is kept, what gets one more run (evidence.py has the arithmetic)
- next_step: what happens to an experiment whose run has ended, was lost, or cannot start

A record is the journal's line of an experiment that has ended; a run is what its run-K.json,
end-K.json and again-K.json hold together (see store.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import fmean

from autoresearch.night import evidence
from autoresearch.night.doubts import (
    MIN_THROUGHPUT_RATIO,
    VERY_SLOW_RATIO,
    not_comparable,
    rate,
    slow_share,
)
from autoresearch.night.evidence import Ideas, Level, Seen
from autoresearch.night.journal import best_of, gain, kept_as, noise, scores_of, scores_of_commit
from autoresearch.night.settings import RUN_SEEDS

UNMEASURED_NOISE = 0.001  # of the score, while no commit has two scores
MAX_SLOW = 3  # an experiment that others slowed so often is not measured
MAX_CUT_OFFS = 3  # an experiment that was cut off so often is given up

TRIED = ("try", "sweep")  # kinds of experiments that change something
# How reasons begin: why a run is done again, or why an experiment was not run.
BEST_MOVED = "the best moved"
PROMISING = "promising"
NOT_COMPARABLE = "not comparable"
SLOW = "slow"
CUT_OFF = "cut off"
DROPPED = "dropped"
STOPPED = "stopped"
CONFLICT = "rejected (conflict)"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Verdict:
    """keep, discard, crash or again, and why; of a score, what it showed beside the best."""

    status: str
    why: str
    seen: Seen | None = None
    level: Level | None = None  # of what is kept
    beside: str = ""  # what was seen, in words


def decide(
    scores: list[float],
    level: Level,
    ideas: Ideas,
    simpler: bool = False,
    record: float | None = None,
) -> Verdict:
    """What is done with a change. The only place with this rule.

    scores: those of its comparable runs, as gains over 0 (higher is better), like all values here.
    level: the best's. record: the highest level ever kept, where simpler code that is slightly worse is
    the best now; simpler code is compared with that, so that small losses cannot add up.
    """
    runs = len(scores)
    seen = Seen(fmean(scores) - level.mean, level.variance + ideas.noise**2 / runs)
    if not ideas.noise:  # all repeats gave one score: there is nothing to doubt
        expected = seen.gain
    else:
        expected = ideas.expected(seen.gain, seen.variance)
    words = compared(seen, runs, level)
    if ideas.noise and evidence.worth_another_run(ideas, level, seen, runs):
        why = f"{PROMISING}, {words}: run {runs + 1} is queued"
        return Verdict("again", why, seen, beside=words)
    if seen.gain > 0 and expected > 0:
        known = Level(fmean(scores), 0.0)
        if ideas.noise:
            known = evidence.kept_level(ideas, level, seen, runs)
        return Verdict("keep", words, seen, known, words)
    over_record = seen.gain + level.mean - (level.mean if record is None else record)
    if simpler and over_record >= -ideas.noise:
        own = Level.of(scores, ideas.noise)
        return Verdict("keep", f"simpler, and {words}", seen, own, words)
    luck = ", which is more likely luck" if seen.gain > 0 else ""
    return Verdict("discard", words + luck, seen, beside=words)


def compared(seen: Seen, runs: int, level: Level) -> str:
    """`0.004100 better than its base at 0.998100 (2 runs, about 2.4 standard errors)`

    level: the base's, by all that is known of it: its lucky score is not what counts.
    """
    base = f"its base at {gain(level.mean, 0):.6f}"
    if seen.gain == 0:
        return f"equal to {base}"
    size = f"{abs(seen.gain):.6f} {'better' if seen.gain > 0 else 'worse'} than {base}"
    count = f"{runs} run{'s' * (runs > 1)}"
    if not seen.variance:
        return f"{size} ({count})"
    errors = abs(seen.errors)
    far = f"about {errors:.1f}" if errors < 10 else "over 10"
    return f"{size} ({count}, {far} standard errors)"


# -------------------------------------------------------------------------------- what happens next


@dataclass(frozen=True)
class History:
    """What a decision depends on besides the experiment's own runs."""

    records: list[dict]  # of the experiments that have ended, oldest first; no confirmations
    repeats: list[dict]  # of the runs that measured a best again
    rates: dict[str, list[float]]  # commit: tokens a second of each of its runs so far
    baseline: dict  # the conditions under which the baseline ran


@dataclass(frozen=True)
class Record:
    """The experiment has ended."""

    status: str  # keep, discard, crash; scored for a run of a confirmation
    why: str
    run: dict | None = None  # the run that counts, the first of them
    runs: tuple[dict, ...] = ()  # all that count; the score is their mean
    verdict: Verdict | None = None
    slow: float | None = None  # the share of its expected rate, where it was slow
    not_comparable: str | None = None
    displaced: str | None = None  # commit of the best that it replaces, not builds on
    on_line: str | None = None  # what came of it on its line (lines.py)


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
            return Record("crash", DROPPED, last)
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
    counted = _counted(runs, won[-1]["commit"], history)
    run, scores = counted[0], [gain(r["score"], 0) for r in counted]
    best, base = best_of(history.records), kept_as(run["base"], history.records)
    verdict = beside_best([r["score"] for r in counted], history)
    shared = dict(run=run, runs=tuple(counted), verdict=verdict)
    if verdict.seen.gain > 0 and verdict.status in ("keep", "again"):
        words = f"{verdict.beside}; displaces the best {best['commit'][:7]}, "
        level = verdict.level or Level.of(scores, night_noise(history))
        shared["verdict"] = replace(verdict, level=level)
        return Record("keep", f"{words}with which it conflicts", **shared, displaced=best["commit"])
    on_base = fmean(scores) - gain(base["score"], 0)
    better = "better" if on_base >= 0 else "simpler, and worse"
    words = f"{why} (on {run['base'][:7]} it was {better} by {abs(on_base):.6f})"
    return Record("discard", words, **shared)


def _after_end(asked: dict, runs: list[dict], history: History) -> Record | Again:
    last = runs[-1]
    here = [run for run in runs if run["commit"] == last["commit"]]
    same_seed = [run for run in here if seed_of(run) == seed_of(last)]
    run = _fastest(same_seed, history)
    others = [r for r in _counted(here, last["commit"], history) if seed_of(r) != seed_of(last)]
    if run is None and not others:
        return Record("crash", last["failure"], last)
    # A run is doubted once for each reason, and once more on each best that it is based on.
    before = [r["again"] for r in same_seed if "again" in r]
    other = run and not_comparable(run.get("conditions", {}), history.baseline)
    if other:
        why = f"{NOT_COMPARABLE}: {other}"
        if not any(earlier.startswith(NOT_COMPARABLE) for earlier in before):
            return Again(why)
        if not others:
            status = "crash" if asked["kind"] == "confirm" else "discard"
            return Record(status, f"twice {why}", run, not_comparable=why)
        run = None
    slow = run and _slowed(run, history)
    doubt = run and _doubted_rate(run, history, slow)
    tries = 1 + sum(earlier.startswith(SLOW) for earlier in before)
    if doubt and tries < (MAX_SLOW if slow else 2):
        return Again(doubt)
    if slow and asked["kind"] in TRIED:
        if not others:
            why = f"{NOT_MEASURED}: machine busy ({slow:.0%} of its expected rate, {tries} tries)"
            return Record("crash", why, run, slow=slow)
        run = None
    if asked["kind"] == "confirm":
        return Record("scored", "on the test split", run, (run,), slow=slow)
    if asked["kind"] == "repeat":
        return Record("scored", "measures the best again", run, (run,), slow=slow)
    counted = [*others, run] if run else others
    return _against_best(asked, counted, history, slow, enough=run is None)


def next_seed(asked: dict, runs: list[dict], commit: str) -> int:
    """The seed of an experiment's next run: another where it was promising, the first on a new best."""
    here = [run for run in runs if run["commit"] == commit]
    if asked["kind"] not in TRIED:
        return asked["seed"]
    if not here:
        return RUN_SEEDS[0]
    if not here[-1].get("again", "").startswith(PROMISING):
        return seed_of(here[-1])
    return next(seed for seed in RUN_SEEDS if seed not in map(seed_of, here))


def repeat_seed(best: dict, history: History, wanted: int) -> int | None:
    """The seed of one more run of the best.

    None where it has `wanted` runs, where its runs fail, or where all runs of a commit score the same.
    """
    own = scores_of_commit(best["commit"], history.records)
    repeats = [r for r in history.repeats if r["commit"] == best["commit"] and r["why"] != DROPPED]
    used = {*RUN_SEEDS[: len(own)], *(record["seed"] for record in repeats)}
    left = [seed for seed in RUN_SEEDS[:wanted] if seed not in used]
    return left[0] if left and noise([*history.records, *history.repeats]) else None


def seed_of(run: dict) -> int:
    return run.get("seed", RUN_SEEDS[0])


def _counted(runs: list[dict], commit: str, history: History) -> list[dict]:
    """Of each seed of a commit the run that counts, in the order of running."""
    here = [run for run in runs if run["commit"] == commit]
    seeds = dict.fromkeys(seed_of(run) for run in here)
    found = [_fastest([r for r in here if seed_of(r) == seed], history) for seed in seeds]
    return [run for run in found if run]


def _fastest(runs: list[dict], history: History) -> dict | None:
    """Of some runs with a score, the fastest comparable one; None where none has a score."""
    scored = [run for run in runs if run.get("score") is not None]
    comparable = [
        run for run in scored if not not_comparable(run.get("conditions", {}), history.baseline)
    ]
    return max(comparable or scored, key=lambda run: rate(run) or 0, default=None)


def _slowed(run: dict, history: History) -> float | None:
    """The share of its expected rate that a run reached which others slowed; None of any other.

    Beside other programs (`busy`) it is expected to be nearly as fast as what it stands on.
    """
    share = slow_share(run, history.rates.get(run["commit"], []))
    if share is None and run.get("busy"):
        beside = (rate(run) or 0) / (rate(kept_as(run["base"], history.records)) or math.inf)
        share = beside if 0 < beside < MIN_THROUGHPUT_RATIO else None
    return share


def _doubted_rate(run: dict, history: History, slow: float | None) -> str | None:
    """Why a run is measured once more for its tokens a second; None where it is not."""
    if slow:
        return f"{SLOW} ({slow:.0%} of its expected rate)"
    base = kept_as(run["base"], history.records)
    beside = (rate(run) or 0) / (rate(base) or math.inf)
    if 0 < beside < VERY_SLOW_RATIO:
        return f"{SLOW}, by the machine or by the change ({beside:.0%} of the best's rate)"
    return None


def _against_best(
    asked: dict, counted: list[dict], history: History, slow: float | None, enough: bool
) -> Record | Again:
    """counted: the runs that count. enough: whether no more are to be made."""
    records = history.records
    best, run = best_of(records), counted[0]
    scores = [gain(r["score"], 0) for r in counted]
    shared = dict(run=run, runs=tuple(counted), slow=slow)
    if asked["kind"] == "baseline":
        words = "measures the noise" if best else "the baseline"
        return Record("discard" if best else "keep", words, **shared)
    base = kept_as(run["base"], records)
    if not best or not base:
        return Record("discard", "the baseline has no score to compare with", **shared)
    verdict = decide(scores, *_known_of(base, history), asked["simpler"], _best_ever(base, records))
    if verdict.status == "again" and enough:
        status = "keep" if verdict.seen.gain > 0 else "discard"
        verdict = replace(verdict, status=status, why=verdict.beside)
    if best["commit"] != run["base"]:
        why = f"{BEST_MOVED}; on {run['base'][:7]} it was {verdict.beside}"
        if verdict.status in ("keep", "again"):
            return Again(why)
        return Record("discard", why, **shared, verdict=verdict)
    if verdict.status == "again":
        return Again(verdict.why)
    return Record(verdict.status, verdict.why, **shared, verdict=verdict)


# ----------------------------------------------------------------------------- what is known so far


def night_noise(history: History) -> float:
    """The noise, or a guess while no commit has two scores."""
    known = noise([*history.records, *history.repeats])
    if known is None:
        scores = [abs(record["score"]) for record in history.records if record["score"] is not None]
        return UNMEASURED_NOISE * (scores[0] if scores else 1.0)
    return known


def level_of(kept: dict, history: History) -> Level:
    """The level of a commit that was kept, as a gain over 0."""
    return _known_of(kept, history)[0]


def _known_of(kept: dict, history: History) -> tuple[Level, Ideas]:
    """(level of a commit that was kept, by all that is known; what gains the night's changes bring)."""
    deviation = night_noise(history)
    tried = [record for record in history.records if record.get("seen")]
    ideas = Ideas(deviation)
    if deviation:
        ideas = Ideas.learned([Seen(*record["seen"]) for record in tried], deviation)
    own = scores_of_commit(kept["commit"], history.records)
    repeats = scores_of_commit(kept["commit"], history.repeats)
    if kept.get("level"):
        mean, error = kept["level"]
        level = Level(gain(mean, 0), error**2)
    else:
        level = Level.of([gain(score, 0) for score in own or [kept["score"]]], deviation)
    for score in repeats:
        level = level.measured(gain(score, 0), deviation)
    left = [r for r in tried if r["base"] == kept["commit"] and r["status"] == "discard"]
    if deviation:
        changes = [(gain(record["score"], 0), len(scores_of(record))) for record in left]
        level = evidence.level_beside(level, ideas, [c for c in changes if c[1]])
    return level, ideas


def beside_best(scores: list[float], history: History) -> Verdict:
    """What these scores of a change show against the present best."""
    gains = [gain(score, 0) for score in scores]
    return decide(gains, *_known_of(best_of(history.records), history))


def _best_ever(base: dict, records: list[dict]) -> float:
    """The highest level kept up to a base; later bests are met by the run on top of them."""
    known = records[: records.index(base) + 1]
    levels = [(r.get("level") or [r["score"]])[0] for r in known if r["status"] == "keep"]
    return max(gain(level, 0) for level in levels)


def gained(runs: list[dict], records: list[dict]) -> float:
    """By how much an experiment's last score beat the best that it stood on; -inf without a score."""
    scored = [run for run in runs if run.get("score") is not None]
    base = kept_as(scored[-1]["base"], records) if scored else None
    return gain(scored[-1]["score"], base["score"]) if base else -math.inf
