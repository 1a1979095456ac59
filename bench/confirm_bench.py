"""
How much of a night's gain is chance: simulated nights, decided by night.py's own functions.

`uv run bench/bench.py --confirm [NIGHTS]` calls it; a few minutes on one core, nothing is trained. A
night is 100 experiments on one baseline. A score is what the code is worth plus noise with a
standard deviation of 1, for two runs of one commit differ by seed and clock; lower is better. The
ratchet keeps what night.decide keeps, so each kept score is also a lucky one.
"""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import night  # noqa: E402

FLOOR = 3 / math.sqrt(math.pi)  # the mean range of three draws: 1.69 standard deviations


@dataclasses.dataclass
class Outcome:
    """A night, in standard deviations of the noise."""

    kept: list[float]  # what each kept experiment truly gained
    claimed: float  # by how much the best's score is lower than the baseline's
    real: bool | None = None  # what the confirmation says; None where the best is the baseline

    @property
    def gain(self) -> float:
        """What the best is truly better by."""
        return sum(self.kept)


def simulated(draw: random.Random, ideas: list[float], seeds: int) -> Outcome:
    """A night over ideas with these true gains, and its confirmation.

    seeds: of the baseline, for the noise floor; with one there is none, and every lower score is kept.
    """
    records = [{"commit": "baseline", "score": draw.gauss(0, 1)} for _ in range(seeds)]
    floor = night.noise_floor(records) or 0.0
    outcome = Outcome([], 0.0)
    baseline = best = records[0]["score"]
    for gain in ideas:
        score = draw.gauss(-outcome.gain - gain, 1)
        if night.decide(score, best, floor, simpler=False)[0] == "keep":
            outcome.kept.append(gain)
            best = score
    outcome.claimed = baseline - best
    if outcome.kept:
        outcome.real = confirmed(draw, outcome.gain)
    return outcome


def confirmed(draw: random.Random, gain: float, seeds: int = night.CONFIRM_SEEDS) -> bool:
    """Whether night.py confirm calls a best with this true gain better than the baseline."""
    best = [draw.gauss(-gain, 1) for _ in range(seeds)]
    baseline = [draw.gauss(0, 1) for _ in range(seeds)]
    return night.is_it_real(*night.welch(best, baseline)).endswith(": real")


def without_gain(_: random.Random) -> list[float]:
    return [0.0] * 100


def mixed(draw: random.Random) -> list[float]:
    """One idea in ten helps by two standard deviations, three hurt by as much, six do nothing."""
    return draw.choices([2.0, -2.0, 0.0], weights=[1, 3, 6], k=100)


def one_large_gain(draw: random.Random) -> list[float]:
    """One idea of three noise floors, anywhere in the night; the others do nothing."""
    ideas = [0.0] * 100
    ideas[draw.randrange(100)] = 3 * FLOOR
    return ideas


def share(some: list[bool]) -> str:
    return f"{sum(some) / len(some):.1%}" if some else "-"


def measure(nights: int):
    """The tables of bench/RESULTS.md."""
    for name, ideas_of in (
        ("no idea helps", without_gain),
        ("1 idea in 10 gains two standard deviations, 3 lose two", mixed),
    ):
        print(f"\n{name}, {nights:,} nights of 100 experiments\n")
        print(
            "| noise floor from | kept a night | of these no gain | the best's claimed gain "
            "| its true gain | nights with a best that is no gain | and confirmed as real |"
        )
        print("| --- " * 7 + "|")
        for words, seeds in (("nothing: any lower score", 1), ("2 seeds", 2), ("3 seeds", 3)):
            draw = random.Random(seeds)
            outcomes = [simulated(draw, ideas_of(draw), seeds) for _ in range(nights)]
            kept = [gain for outcome in outcomes for gain in outcome.kept]
            false = [bool(outcome.kept) and outcome.gain <= 0 for outcome in outcomes]
            believed = [wrong and outcome.real for wrong, outcome in zip(false, outcomes)]
            print(
                f"| {words} | {len(kept) / nights:.1f} | {share([gain <= 0 for gain in kept])} "
                f"| {mean(o.claimed for o in outcomes):.2f} | {mean(o.gain for o in outcomes):.2f} "
                f"| {share(false)} | {share(believed)} |",
                flush=True,
            )
    print(f"\nconfirmed as real, by true gain in noise floors of {FLOOR:.2f}, {nights:,} each\n")
    print("| seeds | " + " | ".join(f"{floors:g}" for floors in (0, 0.5, 1, 2, 3)) + " |")
    print("| --- " * 6 + "|")
    for seeds in (3, 5, 8):
        draw = random.Random(seeds)
        cells = []
        for floors in (0, 0.5, 1, 2, 3):
            cells.append(share([confirmed(draw, floors * FLOOR, seeds) for _ in range(nights)]))
        print(f"| {seeds} | {' | '.join(cells)} |", flush=True)
