"""The arithmetic behind keep and discard, against integrals and draws."""

import math
import random
import statistics

import pytest

from autoresearch.night import evidence
from autoresearch.night.evidence import GAINS, SHARES, Ideas, Level, Seen

NOISE = 0.01


def bell(x: float, variance: float) -> float:
    return math.exp(-x * x / (2 * variance)) / math.sqrt(2 * math.pi * variance)


def drawn(draw: random.Random) -> float:
    """A change's true gain, as SHARES have it."""
    return NOISE * draw.choices(GAINS, SHARES[:-1])[0]


def test_the_expected_gain_is_the_mean_of_the_true_gains_that_look_so():
    draw = random.Random(1)
    level = Level(0.0, NOISE**2 / 3)
    found = {one: [] for one in (-3, -1, 0, 1, 2, 3)}  # observed, in units of the noise
    for _ in range(60_000):
        true = drawn(draw)
        seen = true + draw.gauss(0, math.sqrt(level.variance + NOISE**2))
        for one in found:
            if abs(seen - one * NOISE) < 0.2 * NOISE:
                found[one].append(true)
    for one, trues in found.items():
        expected = Ideas(NOISE).expected(one * NOISE, level.variance + NOISE**2)
        close = 0.05 * NOISE + 4 * statistics.stdev(trues) / math.sqrt(len(trues))
        assert expected == pytest.approx(statistics.fmean(trues), abs=close)


def test_the_value_of_a_second_run_is_what_it_adds_on_average():
    draw = random.Random(2)
    ideas, level = Ideas(NOISE), Level(0.0, NOISE**2 / 3)
    now = Seen(0.8 * NOISE, level.variance + NOISE**2)
    chances = [chance for chance, _ in ideas.parts(now.gain, now.variance)][:-1]
    after = level.variance + NOISE**2 / 2
    other = now.variance * after / (now.variance - after)  # of what the second run alone says
    gains = []
    for _ in range(20_000):
        true = NOISE * draw.choices(GAINS, chances)[0]
        second = draw.gauss(true, math.sqrt(other))
        mean = (now.gain / now.variance + second / other) / (1 / now.variance + 1 / other)
        gains.append(max(0.0, ideas.expected(mean, after)))
    worth = statistics.fmean(gains) - max(0.0, ideas.expected(now.gain, now.variance))
    assert ideas.value_of_a_run(now, level, 1) == pytest.approx(worth, rel=0.2)


def test_the_level_of_what_is_kept_is_the_posterior_of_its_scores():
    ideas, level, mean, runs = Ideas(NOISE), Level(0.0, 0.5 * NOISE**2), 0.015, 2
    own = NOISE**2 / runs
    places = [i * NOISE / 50 for i in range(-500, 500)]
    before = [
        sum(s * bell(x - g * NOISE, level.variance) for g, s in zip(GAINS, SHARES)) for x in places
    ]
    weights = [b * bell(mean - x, own) for b, x in zip(before, places)]
    wanted = sum(w * x for w, x in zip(weights, places)) / sum(weights)
    spread = sum(w * (x - wanted) ** 2 for w, x in zip(weights, places)) / sum(weights)
    found = evidence.kept_level(ideas, level, Seen(mean, level.variance + own), runs)
    assert found.mean == pytest.approx(wanted, abs=0.02 * NOISE)
    assert found.variance == pytest.approx(spread, rel=0.05)


def test_a_gain_far_beyond_all_others_is_believed_as_it_was_measured():
    ideas, level = Ideas(NOISE), Level(0.0, NOISE**2)
    seen = Seen(1000 * NOISE, 2 * NOISE**2)
    assert evidence.kept_level(ideas, level, seen, 1).mean == pytest.approx(seen.gain, rel=1e-3)
    assert not evidence.worth_another_run(ideas, level, seen, 1)
    assert not evidence.worth_another_run(ideas, level, Seen(-seen.gain, seen.variance), 1)


def test_a_best_that_was_only_lucky_is_found_out_by_its_changes():
    """Its true level is 0; two standard deviations of luck made it the best."""
    draw = random.Random(3)
    ideas, lucky = Ideas(NOISE), Level(2 * NOISE, NOISE**2)
    levels = []
    for _ in range(30):
        changes = [(drawn(draw) + draw.gauss(0, NOISE), 1) for _ in range(30)]
        level = evidence.level_beside(lucky, ideas, changes)
        levels.append(level.mean)
        assert level.mean < 1.6 * NOISE and level.variance < lucky.variance
    assert statistics.fmean(levels) < NOISE
    shift = evidence.OWN_SHIFT * NOISE**2
    assert level.variance > 1 / (1 / lucky.variance + 1 / shift)  # never surer than that


def test_what_ideas_bring_is_learned_from_the_night():
    seen = [Seen(2 * NOISE, 0.1 * NOISE**2)] * 50 + [Seen(0.0, 0.1 * NOISE**2)] * 50
    shares = dict(zip(GAINS, Ideas.learned(seen, NOISE).shares))
    assert shares[2.0] == pytest.approx((50 + 30 * 0.03) / 130, abs=0.05)
    assert sum(Ideas.learned(seen, NOISE).shares) == pytest.approx(1)
