"""
Is the gain real? Baseline and best, the same fresh seeds each, on the test split: `night.py confirm`.

Of a hundred experiments on one seed and one split the best is also the luckiest. So nothing here
was ever selected on: the split is `test`, the seeds are new, and Welch's interval says whether the
difference is more than chance.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean, variance

from autoresearch.common import Fail, some
from autoresearch.night import failures
from autoresearch.night.journal import gain, spread
from autoresearch.night.notify import notify
from autoresearch.night.settings import TARGET
from autoresearch.night.status import record_lines, title_of
from autoresearch.night.store import Night
from autoresearch.night.supervisor import wake
from autoresearch.referee.ledger import read_ledger

SEEDS = 3  # of baseline and best each, where no other number is given
FIRST_SEED = 45  # the night itself runs on 42 to 44

# ------------------------------------------------------------------------------ Welch's interval


def t_quantile(df: float, confidence: float = 0.95) -> float:
    """The t for which Student's distribution with df >= 1 holds `confidence` within -t and t.

    With t = sqrt(df) tan(angle) the density is scale * cos(angle) ** (df - 1). Simpson's rule
    integrates it up to an angle; Newton's method, from below, finds the angle of the confidence.
    """
    scale = 2 * math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    parts = 200
    angle = 0.0
    step = 1.0
    while step > 1e-12:
        heights = [math.cos(angle * i / parts) ** (df - 1) for i in range(parts + 1)]
        inner = 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
        share = scale * angle / parts / 3 * (heights[0] + inner + heights[-1])
        step = (confidence - share) / (scale * heights[-1])
        angle += step
    return math.sqrt(df) * math.tan(angle)


def welch(scores: list[float], others: list[float]) -> tuple[float, float, float]:
    """(gain in the mean of `scores` over `others`, low and high end of its 95% interval).

    At least two of each; their variances may differ. Degrees of freedom by Welch-Satterthwaite
    (Welch, Biometrika 34, 1947).
    """
    better = gain(mean(scores), mean(others))
    part = variance(scores) / len(scores)
    other_part = variance(others) / len(others)
    if part + other_part == 0:
        return better, better, better
    df = (part + other_part) ** 2 / (
        part**2 / (len(scores) - 1) + other_part**2 / (len(others) - 1)
    )
    half = t_quantile(df) * math.sqrt(part + other_part)
    return better, better - half, better + half


def is_it_real(better: float, low: float, high: float) -> str:
    """The result in one sentence."""
    digits = 4 if high - low > 1e-3 else 6
    words = f"{abs(better):.{digits}f} {'better' if better >= 0 else 'worse'}"
    if low > 0:
        return f"{words}, {low:.{digits}f} to {high:.{digits}f}: real"
    if high < 0:
        return f"{words}, {-high:.{digits}f} to {-low:.{digits}f}: the baseline is better"
    return f"{words}, from {low:+.{digits}f} to {high:+.{digits}f}: within chance"


# ---------------------------------------------------------------------------------- what is there


@dataclass(frozen=True)
class Confirmation:
    """The scores of baseline and best on the test split so far; both have the same seeds."""

    baseline: dict  # the records with which they were kept
    best: dict
    seeds: list[int]
    runs: dict[tuple[str, int], dict]  # commit and seed: the record of the last run

    @classmethod
    def of(cls, records: list[dict], confirmed: list[dict], least: int = 0) -> Confirmation | None:
        """None where nothing was kept but the baseline.

        records: the night's; confirmed: those of earlier confirmation runs; least: the number of
        seeds wanted. It never falls below what was asked for before.
        """
        kept = [record for record in records if record["status"] == "keep"]
        if not kept or kept[0]["commit"] == kept[-1]["commit"]:
            return None
        runs = {(record["commit"], record["seed"]): record for record in confirmed}
        measured = [seed for commit, seed in runs if commit == kept[-1]["commit"]]
        last = max([FIRST_SEED + least - 1, *measured])
        return cls(kept[0], kept[-1], list(range(FIRST_SEED, last + 1)), runs)

    def scores(self, record: dict) -> list[float]:
        """Those of the baseline's or the best's runs that have one."""
        runs = [self.runs.get((record["commit"], seed), {}) for seed in self.seeds]
        return [run["score"] for run in runs if run.get("score") is not None]

    def in_turn(self) -> Iterator[tuple[str, dict, int]]:
        """(name, record, seed) in the order of running, ABBA: a slow hour hits both alike."""
        pair = [("baseline", self.baseline), ("best", self.best)]
        for seed in self.seeds:
            for name, record in pair:
                yield name, record, seed
            pair = pair[::-1]

    def interval(self) -> tuple[float, float, float] | None:
        """(gain, low, high) of `welch`; None while one of the two has fewer than two scores."""
        scores, others = self.scores(self.best), self.scores(self.baseline)
        return welch(scores, others) if min(len(scores), len(others)) > 1 else None

    def other_looks(self, ledger: list[dict]) -> int:
        """How many other runs trained for the test split: each one weakens what the split can prove."""
        ours = {self.baseline["commit"], self.best["commit"]}
        starts = [r for r in ledger if r.get("event") == "start" and r.get("split") == "test"]
        return sum(r.get("commit") not in ours or r.get("seed") not in self.seeds for r in starts)

    def lines(self, ledger: list[dict]) -> list[str]:
        """The table, remarks on single runs, and whether the gain is real as the last line."""
        kept = {"baseline": self.baseline, "best": self.best}
        table = [f"{TARGET.test_metric:11} {'baseline':>9}  {'best':>9}"]
        commits = f"baseline: {self.baseline['commit'][:7]}, best: {self.best['commit'][:7]}"
        remarks = [f"{commits}, {title_of(self.best)}"]
        for seed in self.seeds:
            cells = []
            for name, record in kept.items():
                run = self.runs.get((record["commit"], seed), {})
                score = run.get("score")
                cells.append("-" if score is None else f"{score:.6f}")
                if run and score is None:
                    log = f"night.py show {run['n']} has its log, confirm runs it again"
                    remarks.append(f"{name}, seed {seed} gave no score: {run['why']}; {log}")
            table.append(f"{f'seed {seed}':11} {cells[0]:>9}  {cells[1]:>9}")
        columns = [self.scores(record) for record in kept.values()]
        for name, value in (("mean", mean), ("range", spread)):
            cells = [f"{value(scores):.6f}" if scores else "-" for scores in columns]
            table.append(f"{name:11} {cells[0]:>9}  {cells[1]:>9}")
        looks = self.other_looks(ledger)
        remarks.append(f"other runs on the test split: {looks or 'none'}")
        found = self.interval()
        return [*table, *remarks, is_it_real(*found) if found else "too few scores to decide"]


def confirmation_lines(records: list[dict], confirmed: list[dict], ledger: list[dict]) -> list[str]:
    """What is known so far, for a look back: the table, or why there is none."""
    if not records:
        return ["night.py confirm compares what a night of its own has kept; this log has none"]
    confirmation = Confirmation.of(records, confirmed)
    if confirmation is None:
        return ["nothing to confirm: nothing was kept but the baseline"]
    if not confirmation.seeds:
        return ["the best is not confirmed yet: uv run night.py confirm"]
    return confirmation.lines(ledger)


# ------------------------------------------------------------------------------------ the command


def confirm(night: Night, seeds: int | None):
    """Queues what is not measured yet, waits until it is, and prints what it means.

    Ctrl-C ends only the waiting; the same command continues, and nothing that has its score runs
    again. Three seeds detect a gain of five standard deviations of a run, eight one of two
    (docs/decisions.md). Raises Fail where there is nothing to confirm.
    """
    if seeds is not None and seeds < 2:
        raise Fail("confirm --seeds: an interval needs at least 2 seeds")
    with night.command():
        confirmation, numbers = queue_confirmation(night, seeds)
        failures.forget(night)
        wake(night)
    measured = 2 * len(confirmation.seeds) - len(numbers)
    print(f"{len(numbers)} runs on the test split to wait for, {measured} are measured already")
    print("Ctrl-C ends only the waiting; `uv run night.py confirm` continues", flush=True)
    follow(night, numbers)
    confirmation = Confirmation.of(night.records(), night.confirmed(), len(confirmation.seeds))
    lines = confirmation.lines(read_ledger()[0])
    print(*lines, sep="\n")
    notify(night, f"night {night.tag}, on the test split: {lines[-1]}")
    more = f"uv run night.py confirm --seeds {2 * len(confirmation.seeds)}"
    if lines[-1].endswith("within chance"):
        print(f"next: more seeds detect smaller gains: {more}")
    else:
        pair = f"{confirmation.baseline['commit'][:7]} {confirmation.best['commit'][:7]}"
        print(f"next: read what was kept: git diff {pair}; and uv run night.py audit")


def queue_confirmation(night: Night, seeds: int | None) -> tuple[Confirmation, set[int]]:
    """(what is compared, the numbers of its runs that wait or run); missing runs are queued."""
    ended = {record["n"] for record in night.ended()}
    experiments = [e for e in night.open() if e.n not in ended and not e.is_repeat]
    others = [e.n for e in experiments if not e.is_confirm]
    if others:
        raise Fail(
            f"the night is running: {some(others)} wait or run: `uv run night.py wait` until they "
            "have ended, or `uv run night.py drop N`, then confirm"
        )
    queued = {(e.asked["commit"], e.asked["seed"]): e.n for e in experiments}
    asked = [seed - FIRST_SEED + 1 for _, seed in queued]
    least = max([seeds or SEEDS, *asked])
    confirmation = Confirmation.of(night.records(), night.confirmed(), least)
    if confirmation is None:
        raise Fail("nothing to confirm: nothing was kept but the baseline")
    numbers = set()
    for name, record, seed in confirmation.in_turn():
        commit = record["commit"]
        measured = confirmation.runs.get((commit, seed), {}).get("score") is not None
        if (commit, seed) in queued:
            numbers.add(queued[commit, seed])
        elif not measured:
            message = f"confirms the {name}, seed {seed}"
            numbers.add(night.enqueue("confirm", commit, commit, message, seed))
    return confirmation, numbers


def follow(night: Night, numbers: set[int]):
    """Prints how each of these runs ended; returns when all have. Raises Fail with the supervisor."""
    failure = failures.last(night)
    left = set(numbers)
    last_poll = time.monotonic()
    while left:
        for record in night.confirmed():
            if record["n"] in left:
                left.remove(record["n"])
                print(*record_lines(record), sep="\n", flush=True)
        if failures.last(night) != failure:
            why = failures.last(night)["why"]
            raise Fail(f"the supervisor ended: {why}; `uv run night.py confirm` continues")
        if time.monotonic() > last_poll + 2:  # a supervisor that was killed is started again
            last_poll = time.monotonic()
            wake(night)
        time.sleep(0.2)
