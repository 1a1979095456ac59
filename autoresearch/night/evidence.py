"""
What scores are evidence of: the noise of a run, the level of the best, the worth of a change.

A run of a commit scores the commit's level plus noise, normal with one standard deviation for the whole
night. A change adds a gain to the level that it stands on. How often which gain comes is learned from
the night (GAINS, by expectation maximization); the best's level is known from its own runs and, less
surely, from all changes of it, most of which change little. All values here are gains: higher is better,
in units of the metric. `bench/rules.py` simulates nights; docs/decisions.md has its table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations

# Gains of a change, in standard deviations of a run's noise, and how often each is expected before the
# night has shown anything. Last, any gain at all: what is far off is believed as it was measured.
GAINS = (-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)
SHARES = (0.05, 0.20, 0.10, 0.15, 0.30, 0.10, 0.05, 0.03, 0.015, 0.005)
PRIOR_CHANGES = 30  # how many changes SHARES weighs as much as
REMEMBERED = 300  # changes, the newest, from which the shares are learned
OWN_SHIFT = 0.5  # variance, in that of the noise, of what the night's changes have in common
RUN_COST = (
    0.6  # of what a run of a new change is worth; at 1, fewer second seeds (docs/decisions.md)
)
MAX_RUNS = 5  # of one change
SURE = 1.0  # standard errors

REPEATS = 16  # the newest differences of two runs of a commit that tell the noise
# Normal noise at the two-sided quantiles of a five-point Gauss-Hermite rule, and its weights.
NODES = ((-2.857, 0.0113), (-1.3556, 0.2221), (0.0, 0.5332), (1.3556, 0.2221), (2.857, 0.0113))


@dataclass(frozen=True)
class Level:
    """How good a commit is, as far as is known: normal, in units of the metric."""

    mean: float
    variance: float

    @classmethod
    def of(cls, scores: Sequence[float], noise: float) -> Level:
        return cls(sum(scores) / len(scores), noise**2 / len(scores))

    def measured(self, score: float, noise: float) -> Level:
        """With one more run."""
        share = self.variance / (self.variance + noise**2) if self.variance else 0.0
        return Level(self.mean + share * (score - self.mean), (1 - share) * self.variance)


@dataclass(frozen=True)
class Seen:
    """What a change showed when it was decided: its mean over the best's level, and its variance."""

    gain: float
    variance: float

    @property
    def errors(self) -> float:
        """The gain in standard errors."""
        return (
            self.gain / math.sqrt(self.variance) if self.variance else math.copysign(99, self.gain)
        )


def noise_of(groups: Iterable[Sequence[float]]) -> float | None:
    """One standard deviation of a run, from the scores of each commit that ran more than once.

    groups: oldest first. The median of the differences, so that one slow run says little; the newest
    ones, for noise may change. None until a commit has two scores.
    """
    weighted = []
    for scores in reversed([*groups]):
        scores = scores[-REPEATS:]
        if len(scores) > 1 and len(weighted) < REPEATS:
            pairs = [*combinations(scores, 2)]
            free = (len(scores) - 1) / len(pairs)  # a commit counts by its degrees of freedom
            weighted += [(abs(a - b), free) for a, b in pairs]
    if not weighted:
        return None
    weighted.sort()
    below = accumulate(weight for _, weight in weighted)
    half = sum(weight for _, weight in weighted) / 2
    median = next(size for (size, _), total in zip(weighted, below) if total >= half - 1e-9)
    return median / 0.954  # the median of |a - b| for normal a, b with a deviation of 1


@dataclass(frozen=True)
class Ideas:
    """What gains the night's changes bring, in units of the noise."""

    noise: float
    shares: tuple[float, ...] = SHARES

    @classmethod
    def learned(cls, seen: Sequence[Seen], noise: float) -> Ideas:
        """By expectation maximization from what was seen, with SHARES as if seen before."""
        ideas = cls(noise)
        recent = seen[-REMEMBERED:]
        for _ in range(3):
            counts = [PRIOR_CHANGES * share for share in SHARES]
            for one in recent:
                for i, chance in enumerate(ideas.chances(one.gain, one.variance)):
                    counts[i] += chance
            total = sum(counts)
            ideas = cls(noise, tuple(count / total for count in counts))
        return ideas

    def chances(self, gain: float, variance: float) -> list[float]:
        """How probable each of GAINS, and any other, is for a change that was seen so."""
        d, v = gain / self.noise, variance / self.noise**2
        spread = max(30.0, abs(d)) ** 2 + v  # of any other
        heights = [(d - g) ** 2 / v for g in GAINS] + [d * d / spread + math.log(spread / v)]
        least = min(heights)
        found = [share * math.exp((least - h) / 2) for share, h in zip(self.shares, heights)]
        total = sum(found)
        return [chance / total for chance in found]

    def parts(self, gain: float, variance: float) -> Iterable[tuple[float, float]]:
        """(chance, expected gain) by each of GAINS, and by any other: then what was measured."""
        chances = self.chances(gain, variance)
        yield from zip(chances, [g * self.noise for g in GAINS])
        yield chances[-1], gain

    def expected(self, gain: float, variance: float) -> float:
        """The true gain to be expected of a change that was seen so."""
        return sum(chance * value for chance, value in self.parts(gain, variance))

    def value_of_a_run(self, now: Seen | None, level: Level, runs: int) -> float:
        """What the next run of a change, its runs + 1st, adds to the gain of keeping or leaving it.

        now: what its runs so far have shown; None, with runs = 0, for a change that has not run.
        """
        after = level.variance + self.noise**2 / (runs + 1)
        parts = self.parts(now.gain, now.variance) if now else zip(self.shares, GAINS_AND_OTHER)
        best_now = max(0.0, self.expected(now.gain, now.variance)) if now else 0.0
        value = 0.0
        for chance, true in parts:
            if chance < 1e-4:
                continue
            true = true if now else true * self.noise
            for z, weight in NODES:
                if now:
                    kept = after / now.variance
                    spread = math.sqrt(now.variance * after / (now.variance - after))
                    gain = kept * now.gain + (1 - kept) * (true + z * spread)
                else:
                    gain = true + z * math.sqrt(after)
                value += chance * weight * max(0.0, self.expected(gain, after))
        return value - best_now


GAINS_AND_OTHER = (*GAINS, 0.0)


def worth_another_run(ideas: Ideas, level: Level, seen: Seen, runs: int) -> bool:
    """Whether one more run of a change is worth more than the first run of another idea.

    What one run alone would keep by less than SURE standard errors gets its second run in any case: it
    costs a twentieth of the night's gain and halves the nights that end with none (docs/decisions.md).
    """
    if runs >= MAX_RUNS:
        return False
    if runs == 1 and 0 < seen.errors < SURE and ideas.expected(seen.gain, seen.variance) > 0:
        return True
    new = ideas.value_of_a_run(None, level, 0)
    return ideas.value_of_a_run(seen, level, runs) > RUN_COST * new


def kept_level(ideas: Ideas, level: Level, seen: Seen, runs: int) -> Level:
    """The level of a change that is kept: by its own scores, its base's level and what changes bring."""
    own = ideas.noise**2 / runs
    mean = level.mean + seen.gain
    share = level.variance / (level.variance + own)
    *known, (other, _) = ideas.parts(seen.gain, seen.variance)
    parts = [(other, mean, own)]
    for chance, gain in known:
        before = level.mean + gain
        parts.append((chance, before + share * (mean - before), (1 - share) * level.variance))
    return _mixed(parts)


def level_beside(level: Level, ideas: Ideas, changes: Iterable[tuple[float, int]]) -> Level:
    """The level of the best, by what its changes scored, too: most change little.

    changes: (mean score, runs) of each that was left on it. What they have in common (OWN_SHIFT) is not
    told from the level, so that together they weigh no more than two runs of its own.
    """
    now, precision, pull = level, 0.0, 0.0
    shift = OWN_SHIFT * ideas.noise**2
    for mean, runs in changes:
        own = ideas.noise**2 / runs
        share = now.variance / (now.variance + own)
        *known, (other, _) = ideas.parts(mean - now.mean, now.variance + own)
        parts = [(other, now.mean, now.variance)]
        for chance, gain in known:
            moved = now.mean + share * (mean - gain - now.mean)
            parts.append((chance, moved, (1 - share) * now.variance))
        seen = _mixed(parts)
        if seen.variance < now.variance:
            precision += 1 / seen.variance - 1 / now.variance
            pull += seen.mean / seen.variance - now.mean / now.variance
        if precision > 0:
            weight = 1 / (1 / precision + shift)
            total = 1 / level.variance + weight
            mean_of_all = (level.mean / level.variance + weight * pull / precision) / total
            now = Level(mean_of_all, 1 / total)
    return now


def _mixed(parts: Sequence[tuple[float, float, float]]) -> Level:
    """Mean and variance of a mixture of normal parts: (chance, mean, variance)."""
    mean = sum(chance * m for chance, m, _ in parts)
    variance = sum(chance * (v + (m - mean) ** 2) for chance, m, v in parts)
    return Level(mean, variance)
