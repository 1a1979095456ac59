"""
Which rule serves when the best has moved under a run: simulated nights, no process, no git.

`uv run bench/bench.py --rules [NIGHTS]` calls it. An agent has one idea a minute; a run takes six;
a score is the truth and noise whose range over three seeds is one floor on average; what is kept is
decided by night.py's own noise_floor and decide. A run that beat the best it stood on, while that
was the best no more, is a stale win. What happens to it is the rule:

- drop          it is discarded
- on top        it runs again on the new best, the larger gain before the smaller (night.py's)
- one by one    the same, but no two such runs at once
- merge, bisect all stale wins together run as one change on the new best, once; where that is no
                win, each half of them is tried

All rules meet the same nights: the same ideas in the same order. The constants below are a model,
not measurements; the two settings of `ADDING` say how far gains of different ideas add up.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import random
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import night  # noqa: E402

RULES = ["drop", "on top", "one by one", "merge, bisect"]
HOURS = [1, 2, 4, 8]
RUN = 6.0  # minutes: five of training, start and scoring; 5% more or less
FLOOR = 0.001  # of the score: the unit of the tables
NOISE = FLOOR / 1.693  # standard deviation; the range of three normal draws is 1.693 of them
GOOD, NEUTRAL = 0.2, 0.3  # of the ideas; the rest makes it worse, by 3 floors on average
LEAST, TAIL, MOST = 0.5, 1.5, 20  # floors: a good idea's gain is Pareto's, cut at MOST
PLACES = 30  # of the file; two changes of one place conflict
ADDING = {  # directions of ideas; what the k-th best of one direction still gives is its gain x share^k
    "mostly add up": (20, 0.7),
    "hardly add up": (6, 0.3),
}
CASES = [(1, 1.0), (4, 1.0), (16, 1.0), (16, 1 / 3)]  # slots, minutes between two ideas


@dataclasses.dataclass
class Idea:
    gain: float  # alone, on the baseline; negative where it harms
    direction: int
    place: int
    base: int = 0  # so many ideas had been kept when it was made
    won: float = 0.0  # by how much its last run beat the best below it


def made_up(draw: random.Random, directions: int) -> Idea:
    kind = draw.random()
    if kind < GOOD:
        gain = min(LEAST * draw.paretovariate(TAIL), MOST)
    elif kind < GOOD + NEUTRAL:
        gain = 0.0
    else:
        gain = -draw.expovariate(1 / 3)
    return Idea(gain * FLOOR, draw.randrange(directions), draw.randrange(PLACES))


@dataclasses.dataclass
class Run:
    ideas: list[Idea]  # none of a baseline
    base: int
    again: bool = False


class SimulatedNight:
    """One night under one rule; `ideas` is the same list under every rule."""

    def __init__(self, rule: str, slots: int, ideas: list[Idea], share: float, seed: int):
        self.rule, self.slots, self.share = rule, slots, share
        self.ideas = iter(ideas)
        self.draw = random.Random(seed)
        self.kept: list[Idea] = []
        self.scores = {0: math.nan}  # how many were kept: the best's score then, as measured
        self.baseline: list[float] = []
        self.undecided: list[Run] = []  # ended before the baseline
        self.fresh: list[Idea] = []
        self.stale: list[Idea] = []  # wins that are to run again
        self.halves: list[list[Idea]] = []  # of a merge that was no win
        self.pile: list[Idea] = []  # handed back: the agent makes them again
        self.free = slots
        self.repeating = 0
        self.count = dict(runs=0, repeats=0, wins=0, confirmed=0, errors=0, conflicts=0)
        self.curve = [(0.0, 0.0)]

    def truth(self, ideas: list[Idea]) -> float:
        """The gain of these ideas together."""
        total = sum(idea.gain for idea in ideas if idea.gain < 0)
        directions: dict[int, list[float]] = {}
        for idea in ideas:
            if idea.gain > 0:
                directions.setdefault(idea.direction, []).append(idea.gain)
        for gains in directions.values():
            for k, gain in enumerate(sorted(gains, reverse=True)):
                total += gain * self.share**k
        return total

    def conflicts(self, idea: Idea) -> bool:
        return any(other.place == idea.place for other in self.kept[idea.base :])

    def play(self, pause: float) -> SimulatedNight:
        """Eight hours; an idea every `pause` minutes where the queue has room."""
        events: list[tuple[float, int, Run | None]] = [(pause, 0, None)]
        order = 0
        waiting: list[Run] = [Run([], 0) for _ in night.BASELINE_SEEDS]
        while events:
            time, _, run = heapq.heappop(events)
            if time > HOURS[-1] * 60:
                break
            if run is None:
                self.have_an_idea()
                order += 1
                heapq.heappush(events, (time + pause, order, None))
            else:
                self.free += 1
                self.ended(run)
                self.curve.append((time, self.truth(self.kept)))
            while self.free:
                run = waiting.pop() if waiting else self.next_run()
                if run is None:
                    break
                self.free -= 1
                self.count["runs"] += 1
                order += 1
                minutes = RUN * self.draw.uniform(0.95, 1.05)
                heapq.heappush(events, (time + minutes, order, run))
        return self

    def have_an_idea(self):
        if len(self.fresh) + len(self.stale) >= max(night.LEAST_WAITING, self.slots):
            return
        idea = self.pile.pop(0) if self.pile else next(self.ideas)
        idea.base = len(self.kept)
        self.fresh.append(idea)

    def next_run(self) -> Run | None:
        """What runs again goes first, as in night.py."""
        for waiting in (self.stale, self.fresh):
            for idea in [*waiting]:
                if self.conflicts(idea):
                    waiting.remove(idea)
                    self.pile.append(idea)
                    self.count["conflicts"] += 1
        run = None
        alone = self.rule in ("one by one", "merge, bisect")
        if not (alone and self.repeating):
            ideas = self.next_repeat()
            if ideas:
                run = Run(ideas, len(self.kept), again=True)
                self.repeating += 1
                self.count["repeats"] += 1
        if run is None and self.fresh:
            run = Run([self.fresh.pop(0)], len(self.kept))
        return run

    def next_repeat(self) -> list[Idea]:
        if self.halves:
            ideas = [idea for idea in self.halves.pop(0) if not self.conflicts(idea)]
            return ideas or self.next_repeat()
        ideas: list[Idea] = []
        for idea in sorted(self.stale, key=lambda idea: -idea.won):
            if all(idea.place != other.place for other in ideas):
                ideas.append(idea)
        if self.rule != "merge, bisect":
            ideas = ideas[:1]
        self.stale = [idea for idea in self.stale if idea not in ideas]
        return ideas

    def ended(self, run: Run):
        if not run.ideas:
            self.baseline.append(1 + self.draw.gauss(0, NOISE))
            if len(self.baseline) == len(night.BASELINE_SEEDS):
                records = [dict(commit="0", score=score) for score in self.baseline]
                self.floor = night.noise_floor(records)
                self.scores[0] = self.baseline[0]
                for earlier in self.undecided:
                    self.decide(earlier)
        elif len(self.baseline) < len(night.BASELINE_SEEDS):
            self.undecided.append(run)
        else:
            self.decide(run)

    def decide(self, run: Run):
        before = self.kept[: run.base]
        score = 1 - self.truth(before + run.ideas) + self.draw.gauss(0, NOISE)
        status, _ = night.decide(score, self.scores[run.base], self.floor, False)
        self.repeating -= run.again
        if status != "keep":
            if len(run.ideas) > 1:
                half = (len(run.ideas) + 1) // 2
                self.halves += [run.ideas[:half], run.ideas[half:]]
            return
        if run.base == len(self.kept):
            was = self.truth(self.kept)
            self.kept += run.ideas
            self.scores[len(self.kept)] = score
            self.count["wins"] += len(run.ideas)
            self.count["confirmed"] += len(run.ideas) * run.again
            self.count["errors"] += self.truth(self.kept) <= was
        elif self.rule != "drop":
            for idea in run.ideas:
                idea.won = night.gain(score, self.scores[run.base])
            self.stale += run.ideas

    def by_hour(self) -> list[float]:
        """The true gain of the best after each of HOURS, in floors."""
        return [
            [gain for time, gain in self.curve if time <= hour * 60][-1] / FLOOR for hour in HOURS
        ]


def nights(rule: str, slots: int, pause: float, adding: str, count: int) -> list[SimulatedNight]:
    directions, share = ADDING[adding]
    found = []
    for seed in range(count):
        draw = random.Random(seed)
        ideas = [made_up(draw, directions) for _ in range(int(HOURS[-1] * 60 / pause) + 1)]
        found.append(SimulatedNight(rule, slots, ideas, share, seed).play(pause))
    return found


def measure(count: int):
    """Prints the tables."""
    print(f"{count} nights a line; gains in noise floors: the mean, and the spread of one night")
    head = [f"{hour} h" for hour in HOURS]
    for adding in ADDING:
        print(f"\ngains {adding}")
        titles = ["spread", "against on top", "runs", "again", "wins", "confirmed", "no gain"]
        print(f"{'slots, ideas/min':17}{'rule':14}", *(f"{t:>7}" for t in head), *titles, sep="  ")
        for slots, pause in CASES:
            played = {rule: nights(rule, slots, pause, adding, count) for rule in RULES}
            ours = [one.by_hour()[-1] for one in played["on top"]]
            for rule, them in played.items():
                hours = list(zip(*(one.by_hour() for one in them)))
                means = [statistics.mean(gains) for gains in hours]
                beside = [mine - other for mine, other in zip(hours[-1], ours)]
                error = 1.96 * statistics.stdev(beside) / math.sqrt(count)
                mean = {
                    key: statistics.mean(one.count[key] for one in them) for key in them[0].count
                }
                print(
                    f"{slots:3}, {1 / pause:3.0f}{'':9}{rule:14}",
                    *(f"{gain:7.1f}" for gain in means),
                    f"{statistics.stdev(hours[-1]):6.1f}",
                    f"{statistics.mean(beside):+6.2f} ± {error:4.2f} ",
                    f"{mean['runs']:4.0f}",
                    f"{mean['repeats']:5.1f}",
                    f"{mean['wins']:4.1f}",
                    f"{mean['confirmed']:9.1f}",
                    f"{mean['errors']:7.1f}",
                    sep="  ",
                    flush=True,
                )
