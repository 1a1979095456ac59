"""
What a night of 100 runs gains under the keep rule: `uv run bench/rules.py [--nights 300] [--slots 1]`.

Simulated nights: the noise of a run has a standard deviation of 1, ideas are drawn from a mixture of true
gains, and what counts is the true gain of the branch's tip at the end. `rule` is rules.next_step itself;
beside it stand two simpler rules: any lower score, and lower by more than the range of three baseline
seeds. The runs of the baseline come on top of the hundred.
"""

from __future__ import annotations

import argparse
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from autoresearch.night import journal, rules, settings  # noqa: E402  (the path comes first)

RUNS = 100
MIXTURES = {  # share of the ideas: true gain
    "10%: 2, 30%: -2, rest 0": [(0.10, 2), (0.30, -2), (0.60, 0)],
    "15%: 0.7, 5%: 2, 30%: -2, rest 0": [(0.15, 0.7), (0.05, 2), (0.30, -2), (0.50, 0)],
    "20%: 1, 5%: 3, 30%: -2, rest -0.3": [(0.20, 1), (0.05, 3), (0.30, -2), (0.45, -0.3)],
    "8%: 1, 60%: -2, rest -0.5": [(0.08, 1), (0.60, -2), (0.32, -0.5)],
    "1%: 11, 1%: 4, 1%: 3, 15%: 0.3, 35%: -2, rest -0.5": [
        *((0.01, 11), (0.01, 4), (0.01, 3), (0.15, 0.3), (0.35, -2), (0.47, -0.5))
    ],
    "all 0": [(1.0, 0)],
}


class Night:
    """One simulated night. Scores go down: a true gain of 2 lowers them by 2."""

    def __init__(self, rule: str, ideas: list, seed: int, slots: int, seeds: int, noise: str):
        self.rule, self.ideas, self.slots, self.noise = rule, ideas, slots, noise
        self.draw = random.Random(seed)
        self.runs = 0
        self.true = {"0": 0.0}  # of each commit, as a gain
        self.records: list[dict] = []
        for number in range(seeds):
            lost = 4 if noise == "busy baseline" and number == 1 else 0
            self.decided("baseline", "0", "0", [self.run("0", "0", number, lost)])
        self.floor = journal.spread([record["score"] for record in self.records])

    def run(self, commit: str, base: str, number: int, lost: float = 0.0) -> dict:
        """A run of a commit with its number-th seed, and its score."""
        self.runs += 1
        deviation = 2 if self.noise == "doubles midway" and self.runs > RUNS / 2 else 1
        score = 1000 + lost - self.true[commit] + self.draw.gauss(0, deviation)
        known = dict(id=str(self.runs), commit=commit, base=base, code=0, score=score)
        return {**known, "seed": settings.RUN_SEEDS[number]}

    def history(self) -> rules.History:
        return rules.History(self.records, [], {}, {})

    def best(self) -> dict:
        return journal.best_of(self.records)

    def decided(self, kind: str, commit: str, base: str, runs: list[dict]) -> bool:
        """Whether an experiment has ended; then it has its record, as store.record writes it."""
        step = self.next_step(kind, commit, base, runs)
        if isinstance(step, rules.Again):
            runs[-1]["again"] = step.why
            return False
        scores = [run["score"] for run in step.runs or [step.run]]
        record = dict(kind=kind, commit=commit, base=base, status=step.status, scores=scores)
        record |= dict(score=fmean(scores), seen=None, level=None)
        if step.verdict and step.verdict.seen:
            record["seen"] = [step.verdict.seen.gain, step.verdict.seen.variance]
        if step.verdict and step.verdict.level:
            level = step.verdict.level
            record["level"] = [journal.gain(level.mean, 0), level.variance**0.5]
        self.records.append(record)
        return True

    def next_step(self, kind: str, commit: str, base: str, runs: list[dict]):
        asked = dict(kind=kind, simpler=False)
        if self.rule == "rule" or kind == "baseline":
            return rules.next_step(asked, runs, self.history())
        on = journal.kept_as(base, self.records)["score"]
        better = journal.gain(runs[-1]["score"], on)
        kept = better > (self.floor if self.rule == "floor of 3" else 0)
        if kept and base != self.best()["commit"]:
            return rules.Again(rules.BEST_MOVED)
        return rules.Record("keep" if kept else "discard", "", runs[-1])

    def work(self) -> float:
        """The true gain of the tip after RUNS more runs."""
        last = self.runs + RUNS
        active: list[dict] = []
        while self.runs < last:
            while len(active) < self.slots:
                shares, gains = zip(*self.ideas)
                active.append(dict(gain=self.draw.choices(gains, shares)[0], runs=[]))
            for idea in active:
                best = self.best()["commit"]
                if not idea["runs"] or idea["base"] != best:
                    commit = str(len(self.true))
                    idea |= dict(base=best, commit=commit)
                    self.true[commit] = self.true[best] + idea["gain"]
                here = [run for run in idea["runs"] if run["commit"] == idea["commit"]]
                idea["runs"].append(self.run(idea["commit"], idea["base"], len(here)))
            active.sort(key=lambda idea: idea["runs"][-1]["score"])
            active = [
                idea
                for idea in active
                if not self.decided("try", idea["commit"], idea["base"], idea["runs"])
            ]
        return self.true[self.best()["commit"]]


def tip(seed: int, **how) -> float:
    return Night(seed=seed, **how).work()


def main():
    parser = argparse.ArgumentParser(description="True gain of simulated nights, by rule.")
    parser.add_argument("--nights", type=int, default=300)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3, help="of the baseline")
    parser.add_argument("--noise", default="steady", help="or: doubles midway, busy baseline")
    args = parser.parse_args()
    print("| mixture of ideas | any lower | floor of 3 | rule |\n| --- | --- | --- | --- |")
    with ProcessPoolExecutor() as pool:
        for name, ideas in MIXTURES.items():
            cells = []
            for rule in ("any lower", "floor of 3", "rule"):
                how = dict(rule=rule, ideas=ideas, slots=args.slots, seeds=args.seeds)
                gains = list(pool.map(partial(tip, **how, noise=args.noise), range(args.nights)))
                none = sum(gain <= 0 for gain in gains) / len(gains)
                cells.append(f"{fmean(gains):.1f} ({none:.1%})")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
