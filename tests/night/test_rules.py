"""The night's rules as tables: what is kept, what is doubted, and what happens next."""

import json
from functools import partial

import pytest

from autoresearch.night import rules
from autoresearch.night.rules import History, Record, next_step


@pytest.mark.parametrize(
    "score, best, floor, simpler, status",
    # fmt: off
    [
        (None, 1.000, 0.010, False, "crash"),  # no score, whatever else
        (0.989, 1.000, 0.010, False, "keep"),  # better by more than the noise
        (0.9901, 1.000, 0.010, False, "discard"),  # better, within the noise
        (0.9999, 1.000, 0.000, False, "keep"),  # so any gain counts
        (1.009, 1.000, 0.010, True, "keep"),  # simpler, equal within the noise
        (1.011, 1.000, 0.010, True, "discard"),  # simpler, but worse
        (0.9979, 1.000, None, False, "keep"),  # floor not measured: 0.2% of the best
        (0.9981, 1.000, None, False, "discard"),
    ],
    # fmt: on
)
def test_what_is_kept_in_both_directions(monkeypatch, score, best, floor, simpler, status):
    assert rules.decide(score, best, floor, simpler)[0] == status
    monkeypatch.setattr(rules, "LOWER_IS_BETTER", False)  # an accuracy, say: the mirror image
    mirrored = [None if value is None else 2 - value for value in (score, best)]
    assert rules.decide(*mirrored, floor, simpler)[0] == status


def test_the_noise_floor_is_the_widest_range_of_one_commit_and_only_widens():
    def ran(commit, score, **more):
        return {"commit": commit, "score": score, **more}

    assert rules.noise_floor([]) is None
    assert rules.noise_floor([ran("a", 1.0), ran("b", 2.0)]) is None  # says nothing of noise
    seeds = [ran("a", 1.0), ran("a", 1.003), ran("a", 1.001)]
    assert rules.noise_floor(seeds) == pytest.approx(0.003)
    assert rules.noise_floor([*seeds, ran("b", 0.9), ran("b", 0.905)]) == pytest.approx(0.005)
    assert rules.noise_floor([*seeds, ran("a", 1.5, slow=0.4)]) == pytest.approx(0.003)
    assert rules.noise_floor([*seeds, ran("a", 1.5, not_comparable="x")]) == pytest.approx(0.003)


FAST_HALF = [[i, 100 * i] for i in range(1, 11)]
STALLED = FAST_HALF + [[10 + 9 * i, 1000 + 100 * i] for i in range(1, 11)]


FLASH = {"device": "H100", "attention": "flash3", "compiled": True, "fell_back": []}
FLEX = {**FLASH, "attention": "flex", "fell_back": ["FlashAttention 3 is not usable"]}


# What happens next, in a night with a noise floor of 0.010: the baseline `base` (1.000 and 1.010), then
# `best` (0.950) on it. Runs train 1,000 tokens in 10 s where nothing else is said.


def kept(n, commit, base, score, kind="try"):
    record = dict(n=n, kind=kind, commit=commit, base=base, score=score, status="keep")
    return record | dict(tokens=1000, training_seconds=10)


BASELINE = [
    kept(1, "base", "base", 1.000, "baseline"),
    {**kept(2, "base", "base", 1.010, "baseline"), "status": "discard"},
]
BEST = [*BASELINE, kept(3, "best", "base", 0.950)]
NONE = [{**record, "score": None, "status": "crash"} for record in BASELINE]


def run(score=None, base="best", commit="mine", tokens=1000, **more):
    known = dict(id="r", commit=commit, base=base, code=0 if score else 1, score=score)
    known |= dict(tokens=tokens, training_seconds=10, failure=None if score else "it broke")
    return {**known, **more}


def case(status, why, *runs, records=BEST, conflict=None, rates=(), **asked):
    asked = {**dict(n=4, kind="try", simpler=False, dropped=False), **asked}
    history = History(records, dict(mine=list(rates)), FLASH)
    return asked, list(runs), history, conflict, status, why


keep, discard = partial(case, "keep"), partial(case, "discard")
crash, again = partial(case, "crash"), partial(case, "again")
SIMPLER, DROPPED = dict(simpler=True), dict(dropped=True)
SEED, CONFIRM = dict(kind="baseline"), dict(kind="confirm")
WON = dict(base="base", again="the best moved; on base it was better")  # on the best before
CONFLICT = dict(conflict="it conflicts with the best, best")
CUT = dict(again="cut off")
OTHER = dict(conditions=FLEX, again="not comparable: x")

# fmt: off
STEPS = {
    # keep when better than the best by more than the noise floor; else discard; no score is a crash
    "better by more than the noise": keep("better by 0.020000", run(0.930)),
    "equal": discard("equal to the best", run(0.950)),
    "simpler twice, by a little": discard(
        "worse by 0.008000", run(0.965, "simple"), records=[*BEST, kept(4, "simple", "best", 0.957)],
        **SIMPLER),
    "no score": crash("it broke", run()),
    # the baseline: the first seed is kept, the others measure the noise
    "the first seed": keep("the baseline", run(1.0, "base", "base"), records=[], **SEED),
    "the second seed": discard("measures the noise", run(0.5, "base", "base"), records=BASELINE[:1], **SEED),
    "a seed without a score": crash("it broke", run(None, "base", "base"), records=[], **SEED),
    "a slow seed runs again before it fixes the noise floor": again(
        "slow (50% of its expected rate)", run(1.2, "base", tokens=500), rates=[50, 100], records=[], **SEED),
    "a score where the baseline has none": discard("the baseline has no", run(0.5, "base"), records=NONE),
    # a best that moved: what ran on the old one and won there runs again on the new one
    "won on the best before": again("the best moved; on base it was better", run(0.930, "base")),
    "lost on the best before": discard("the best moved; on base it was worse", run(1.02, "base")),
    "won there and on the new best": keep("better", run(0.98, **WON), run(0.93, commit="mine2")),
    "won there, not on the new best": discard("worse", run(0.93, **WON), run(0.951, commit="mine2")),
    "simpler code is compared with the best that it stood on": again(
        "the best moved; on base it was simpler", run(1.005, "base"), **SIMPLER),
    # where it does not go on top of the new best
    "waited, and conflicts": crash("rejected (conflict): it conflicts", **CONFLICT),
    "won there, conflicts, and is better than the new best by more than the noise": keep(
        "better by 0.020000", run(0.930, **WON), **CONFLICT),
    "won there, conflicts, and is within the noise of the new best": discard(
        "rejected (conflict): it conflicts with the best, best (on base it was better by 0.055000)",
        run(0.945, **WON), **CONFLICT),
    # interruptions
    "cut off three times": crash(
        "cut off 3 times: its node", run(**CUT), run(**CUT), run(lost="cut off: its node")),
    "stopped by the human is not cut off": again(
        "cut off", run(**CUT), run(again="stopped"), run(again="stopped"), run(lost="cut off")),
    # slow, uncompiled, on another attention: once more
    "slow by the same code": again("slow (50% of its expected rate)", run(0.5), rates=[100, 200]),
    "slow by its own best stretch": again(
        "slow (20%", run(0.5, tokens=2000, training_seconds=100, pace=STALLED)),
    "slow twice": keep(
        "better", run(0.93, tokens=500, again="slow (50%)"), run(0.99, tokens=400), rates=[40, 50, 100]),
    "under a third of the best's rate": again(
        "slow, by the machine or by the change (30% of the best's", run(0.96, tokens=300)),
    "on another attention": again("not comparable: attention flex", run(0.5, conditions=FLEX)),
    "on another attention twice": discard(
        "twice not comparable: attention flex", run(0.5, **OTHER), run(0.5, conditions=FLEX)),
    "on another attention, and the repeat is not": keep(
        "better by 0.020000", run(0.5, **OTHER), run(0.93, conditions=FLASH)),
    "the change chose another attention": keep(
        "better", run(0.93, conditions={**FLASH, "attention": "mine"})),
    # the agent gives it up
    "dropped while it waited": crash("dropped while it waited", **DROPPED),
    "dropped while it ran": crash("dropped", run(0.5, code=-9), **DROPPED),
    "dropped, and conflicts": crash("dropped while it waited", run(0.9, **WON), **CONFLICT, **DROPPED),
    # a confirmation: no decision, but the same doubts
    "confirmed": case("scored", "on the test split", run(1.4), **CONFIRM),
    "confirmed, twice on another attention": crash(
        "twice not comparable", run(1.4, **OTHER), run(1.4, conditions=FLEX), **CONFIRM),
}
# fmt: on


@pytest.mark.parametrize("name", STEPS)
def test_what_happens_next(name):
    asked, runs, history, conflict, status, why = STEPS[name]
    before = json.dumps([asked, runs, history.records])
    step = next_step(asked, runs, history, conflict)
    assert (step.status if isinstance(step, Record) else "again") == status, step
    assert step.why.startswith(why) if status in ("again", "crash") else why in step.why, step
    assert json.dumps([asked, runs, history.records]) == before  # a pure function


def step_of(name: str):
    return next_step(*STEPS[name][:4])


def test_the_record_names_the_run_that_counts_and_what_is_to_be_known_of_it():
    assert step_of("slow twice").slow == 0.5 and step_of("slow twice").run["tokens"] == 500
    twice = step_of("on another attention twice")
    assert twice.not_comparable.startswith("not comparable: attention flex")
    name = "won there, conflicts, and is better than the new best by more than the noise"
    assert step_of(name).displaced == "best" and step_of(name).run["base"] == "base"
    assert step_of("better by more than the noise").displaced is None
    assert step_of("dropped while it waited").run is None
