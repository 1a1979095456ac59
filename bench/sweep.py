"""
`night.py sweep` against random values: `uv run --group sweep bench/sweep.py [--study N]`.

    uv run prepare.py --demo --time-budget 30 --eval-tokens 65536

Real runs of train.py with the small model of replay.py, TOKENS each, of one seed: both sides draw values
of the same dimensions, those that count for the CPU. What each side would have kept after 20, 40 and 60
runs is scored with three new seeds.
"""

# ruff: noqa: E402  (the repository goes on the path first)
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import optuna

from autoresearch.night.sweep import _space, chosen, dimensions, propose, with_values
from bench.replay import NEW_SEEDS, applied, run_of, small_start, value

TOKENS = 80 * 2**10
RUNS = (20, 40, 60)


def at_random(dims: list, told: list, seed: int) -> dict:
    """What sweep.propose proposes, by chance."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return study.ask({dim.name: _space(dim, optuna.distributions) for dim in dims}).params


def main():
    parser = argparse.ArgumentParser(description="A sweep against random values.")
    parser.add_argument("--study", type=int, default=0, help="another number, other draws")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    start = {"train.py": applied(value("TOKENS_PER_STEP", "2**10"), small_start()).encode()}
    known = dimensions(start)
    dims = chosen(known, ["CPU", *(dim.name for dim in known if "." not in dim.name)])
    print(f"{len(dims)} dimensions: {', '.join(dim.name for dim in dims)}")

    def score(contents: dict, seed: int) -> float:
        return run_of(contents["train.py"].decode(), seed, TOKENS)["score"]

    def again(contents: dict) -> float:
        return fmean(score(contents, seed) for seed in NEW_SEEDS[:3])

    print(f"the start: {again(start):.4f}", flush=True)
    for name, draw in (("sweep", propose), ("random", at_random)):
        own = {dim.name: dim.value() for dim in dims if dim.value() is not None}
        told = [(own, score(start, 42))]
        tried = [start]
        for number in range(1, RUNS[-1] + 1):
            values = draw(dims, told, seed=1000 * number + args.study)
            tried.append(with_values(start, dims, values))
            bad = score(tried[-1], 42)
            worst = sorted(one for _, one in told)[int(0.9 * (len(told) - 1))]
            told.append((values, worst if bad is None else bad))
            if number in RUNS:
                best = min(range(len(told)), key=lambda i: told[i][1])
                print(
                    f"{name}, best after {number}: {told[best][1]:.4f}, "
                    f"with new seeds {again(tried[best]):.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
