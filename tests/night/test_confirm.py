"""Is it real? The interval against scipy's numbers, the verdict against simulated nights."""

import random
import sys

import pytest
from miniature import ROOT

import night

sys.path.insert(0, str(ROOT / "bench"))
import confirm_bench  # noqa: E402


# scipy 1.17.1: stats.t.ppf(0.975, df)
@pytest.mark.parametrize(
    "df, t",
    # fmt: off
    [
        (1, 12.706204736174694),
        (1.2, 8.648826510748867),
        (1.5, 6.016663104427929),
        (2, 4.302652729749462),
        (2.5, 3.5746548420036817),
        (3, 3.1824463052837078),
        (4, 2.7764451051977934),
        (5, 2.5705818356363146),
        (7.3, 2.345066736547703),
        (10, 2.228138851986274),
        (30, 2.0422724563012378),
        (100, 1.9839715185235518),
        (1e4, 1.960201239890626),
        (1e6, 1.959966356814107),
    ],
    # fmt: on
)
def test_the_t_quantile_is_scipys(df, t):
    assert night.t_quantile(df) == pytest.approx(t, rel=1e-7)


# scipy 1.17.1: stats.ttest_ind(others, scores, equal_var=False).confidence_interval(0.95)
WELCH = [
    ([1.0, 0.9, 1.1], [2.0, 2.3, 1.9], 0.6318370098584343, 1.5014963234748986),
    ([0.9712, 0.9725, 0.9719], [0.9931, 0.9928, 0.9941], 0.019956039419443287, 0.02297729291388998),
    ([1.0, 2.0], [1.5, 1.6], -6.046442080750739, 6.146442080750739),
    ([0.5, 0.52, 0.47, 0.51, 0.49], [0.505, 0.9, 0.2], -0.8326277009395244, 0.9066277009395245),
]


@pytest.mark.parametrize("scores, others, low, high", WELCH)
def test_the_interval_is_scipys_in_both_directions(monkeypatch, scores, others, low, high):
    gain = sum(others) / len(others) - sum(scores) / len(scores)
    assert night.welch(scores, others) == pytest.approx((gain, low, high), rel=1e-6)
    monkeypatch.setattr(night, "LOWER_IS_BETTER", False)
    assert night.welch(scores, others) == pytest.approx((-gain, -high, -low), rel=1e-6)


def test_scores_that_do_not_scatter_at_all_have_an_interval_of_one_point():
    assert night.welch([1.0, 1.0], [1.5, 1.5]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "interval, sentence",
    [
        ((0.02147, 0.01996, 0.02298), "0.0215 better, 0.0200 to 0.0230: real"),
        ((0.0002, 0.0001, 0.0003), "0.000200 better, 0.000100 to 0.000300: real"),
        ((0.01, -0.002, 0.022), "0.0100 better, from -0.0020 to +0.0220: within chance"),
        ((-0.01, -0.022, 0.002), "0.0100 worse, from -0.0220 to +0.0020: within chance"),
        ((-0.01, -0.012, -0.008), "0.0100 worse, 0.0080 to 0.0120: the baseline is better"),
    ],
)
def test_the_verdict_in_one_sentence(interval, sentence):
    assert night.is_it_real(*interval) == sentence


# ---- what it is for: 2,000 nights each


def nights(ideas_of, seed: int) -> list[confirm_bench.Outcome]:
    draw = random.Random(seed)
    return [confirm_bench.simulated(draw, ideas_of(draw), seeds=3) for _ in range(2000)]


def test_where_no_idea_helps_it_says_real_in_at_most_one_night_in_twenty():
    outcomes = nights(confirm_bench.without_gain, seed=1)
    assert all(outcome.gain == 0 for outcome in outcomes)
    chosen = [outcome for outcome in outcomes if outcome.kept]  # else there is nothing to confirm
    assert len(chosen) > 1000 and all(outcome.claimed > 0 for outcome in chosen)
    real = sum(outcome.real for outcome in chosen)
    assert real <= 0.05 * len(chosen)  # so of all nights, too


def test_a_gain_of_three_noise_floors_is_called_real_in_at_least_nineteen_of_twenty():
    outcomes = nights(confirm_bench.one_large_gain, seed=2)
    chosen = [outcome for outcome in outcomes if outcome.gain > 0]  # else the ratchet has missed it
    assert len(chosen) > 1500
    assert sum(outcome.real for outcome in chosen) >= 0.95 * len(chosen)


# ---- the table


def kept(n: int, commit: str) -> dict:
    return {"n": n, "commit": commit, "status": "keep", "kind": "try", "message": f"idea {n}"}


def run(n: int, commit: str, seed: int, score: float | None, **more) -> dict:
    said = {"n": n, "commit": commit, "seed": seed, "score": score, "why": "no room"}
    return {**said, "kind": "confirm", "disturbed": None, "again": [], **more}


def test_the_table_shows_each_score_and_what_is_missing():
    records = [kept(1, "base"), {**kept(2, "x"), "status": "discard"}, kept(3, "best")]
    confirmed = [
        run(4, "base", 45, 1.0),
        run(5, "best", 45, 0.9),
        run(6, "best", 46, 0.91, disturbed=0.4),
        run(7, "base", 46, 1.02, again=["cut off"]),
        run(8, "base", 47, None),
        run(9, "other", 45, 0.1),  # of another best, at another time
    ]
    ledger = [
        {"event": "start", "split": split, "commit": commit, "seed": seed}
        for split, commit, seed in [
            ("test", "base", 45), ("test", "best", 45), ("val", "best", 42),  # the night's own
            ("test", "best", 42), ("test", "other", 45),  # looks
        ]
    ]  # fmt: skip
    assert night.Confirmation.of(records, confirmed, least=3).lines(ledger) == [
        "test_bpb     baseline       best",
        "seed 45      1.000000   0.900000",
        "seed 46      1.020000   0.910000",
        "seed 47         crash          -",
        "mean         1.010000   0.905000",
        "range        0.020000   0.010000",
        "the baseline is base, the best best: idea 3",
        "baseline, seed 46 ran again: cut off",
        "best, seed 46 was DISTURBED twice (40% of its rate): the faster run counts",
        "baseline, seed 47 gave no score: no room; night.py show 8 has its log, confirm runs it again",
        "other runs that have looked at the test split: 2",
        "0.1050 better, 0.0358 to 0.1742: real",  # scipy, too
    ]


def test_there_is_no_confirmation_of_a_baseline_and_no_verdict_on_too_little():
    assert night.Confirmation.of([], []) is None
    assert night.Confirmation.of([kept(1, "base")], []) is None
    records = [kept(1, "base"), kept(2, "best")]
    nothing = night.Confirmation.of(records, [])
    assert nothing.seeds == [] and nothing.interval() is None
    one = night.Confirmation.of(records, [run(3, "base", 45, 1.0), run(4, "best", 45, 0.9)])
    assert one.seeds == [45] and one.lines([])[-1] == "too few scores for a verdict"
    # more seeds were asked for before: fewer are not enough now
    more = [run(n, "best", 40 + n, 0.9) for n in range(5, 10)]
    assert night.Confirmation.of(records, more, least=3).seeds == [45, 46, 47, 48, 49]


def test_the_order_of_running_is_alike_for_both_when_the_machine_gets_slower():
    records = [kept(1, "base"), kept(2, "best")]
    turns = list(night.Confirmation.of(records, [], least=4).in_turn())
    assert [name for name, _, _ in turns] == ["baseline", "best", "best", "baseline"] * 2
    assert [seed for _, _, seed in turns] == [45, 45, 46, 46, 47, 47, 48, 48]
    places = {name: [i for i, turn in enumerate(turns) if turn[0] == name] for name, *_ in turns}
    assert sum(places["best"]) == sum(places["baseline"])
