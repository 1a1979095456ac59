"""The night's rules as tables: what is kept, what is doubted, and what happens next."""

import json
import random
import statistics
from functools import partial

import pytest

from autoresearch.night import journal, rules
from autoresearch.night.evidence import Ideas, Level
from autoresearch.night.rules import History, Record, next_step

NOISE = 0.001
BEST_LEVEL = Level.of([-0.950], NOISE)  # of one run; gains are higher where they are better


@pytest.mark.parametrize(
    "scores, simpler, status",
    # fmt: off
    [
        ([0.940], False, "keep"),  # ten standard deviations better
        ([0.960], False, "discard"),
        ([0.9490], False, "again"),  # better, and it may be luck: a second seed
        ([0.9485, 0.9507], False, "discard"),  # it was
        ([0.9485, 0.9483], False, "keep"),  # it was not
        ([0.9508], True, "keep"),  # simpler, and worse by less than the noise
        ([0.9515], True, "discard"),  # simpler, and worse by more
    ],
    # fmt: on
)
def test_what_is_kept(scores, simpler, status):
    ideas = Ideas(NOISE)
    verdict = rules.decide([-score for score in scores], BEST_LEVEL, ideas, simpler)
    assert verdict.status == status, verdict
    assert (verdict.level is not None) == (status == "keep")


def test_where_repeats_never_differ_any_gain_counts():
    level, ideas = Level.of([-7.0, -7.0, -7.0], 0.0), Ideas(0.0)
    found = [rules.decide([-score], level, ideas).status for score in (6.999999, 7.0, 7.000001)]
    assert found == ["keep", "discard", "discard"]


def test_noise_is_that_of_all_commits_that_ran_more_than_once():
    def ran(commit, *scores, **more):
        return {"commit": commit, "score": scores[0], "scores": [*scores], **more}

    assert journal.noise([]) is None
    assert journal.noise([ran("a", 1.0), ran("b", 2.0)]) is None  # says nothing of noise
    draw = random.Random(0)
    pairs = [ran(str(i), draw.gauss(0, 0.01), draw.gauss(0, 0.01)) for i in range(2000)]
    many = [journal.noise(pairs[i : i + 24]) for i in range(0, 2000, 24)]
    assert statistics.fmean(many) == pytest.approx(0.01, rel=0.1)
    pairs = pairs[:24]
    slow = [ran("a", 1.5, slow=0.4), ran("a", 1.0), ran("b", 9.0, 9.1, not_comparable="x")]
    assert journal.noise([*pairs, *slow]) == journal.noise(pairs)
    outlier = [ran("b", 1.0), ran("b", 1.001), ran("b", 3.0)]  # one busy baseline
    assert journal.noise([*outlier, *pairs[:9]]) == pytest.approx(journal.noise(pairs[:9]), rel=0.3)
    louder = [ran(f"l{i}", draw.gauss(0, 0.1), draw.gauss(0, 0.1)) for i in range(24)]
    assert journal.noise([*pairs, *louder]) == journal.noise(louder)  # noise as it is now
    slow_code = [ran("s", 100.0, 110.0), ran("best", 1.0, 1.01, status="keep")]
    assert journal.noise(slow_code) == pytest.approx(0.01 / 0.954)


FAST_HALF = [[i, 100 * i] for i in range(1, 11)]
STALLED = FAST_HALF + [[10 + 9 * i, 1000 + 100 * i] for i in range(1, 11)]


FLASH = {"device": "H100", "attention": "flash3", "compiled": True, "fell_back": []}
FLEX = {**FLASH, "attention": "flex", "fell_back": ["FlashAttention 3 is not usable"]}


# What happens next, in a night whose noise is 0.001: the baseline `base` (1.000 and 1.001), then `best`
# (0.950) on it. Runs train 1,000 tokens in 10 s where nothing else is said.


def kept(n, commit, base, score, kind="try"):
    record = dict(n=n, kind=kind, commit=commit, base=base, score=score, status="keep")
    return record | dict(tokens=1000, training_seconds=10)


BASELINE = [
    kept(1, "base", "base", 1.000, "baseline"),
    {**kept(2, "base", "base", 1.001, "baseline"), "status": "discard"},
]
BEST = [*BASELINE, kept(3, "best", "base", 0.950)]
NONE = [{**record, "score": None, "status": "crash"} for record in BASELINE]


def run(score=None, base="best", commit="mine", tokens=1000, **more):
    known = dict(id="r", commit=commit, base=base, code=0 if score else 1, score=score)
    known |= dict(tokens=tokens, training_seconds=10, failure=None if score else "it broke")
    return {**known, **more}


def case(status, why, *runs, records=BEST, conflict=None, rates=(), **asked):
    asked = {**dict(n=4, kind="try", simpler=False, dropped=False), **asked}
    history = History(records, [], dict(mine=list(rates)), FLASH)
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
    # keep what is better, as far as is known; ask what may be for another seed; no score is a crash
    "better by more than the noise": keep("0.020000 better than its base at 0.950000 (1 run", run(0.930)),
    "a little better": again(
        "promising, 0.001000 better than its base at 0.950000 (1 run, about 0.7", run(0.949)),
    "a little better, twice": keep(
        "0.950000 (2 runs", run(0.9485, again="promising"), run(0.9483, seed=43)),
    "a little better, and worse": discard(
        "its base at 0.950000 (2 runs, about 0.1 standard errors), which is more likely luck",
        run(0.949, again="promising"), run(0.9508, seed=43)),
    "a little better, and no score": keep(
        "0.001500 better than its base at 0.950000 (1 run", run(0.9485, again="promising"), run(seed=43)),
    "a little better, then slow three times": keep(
        "0.001500 better than its base at 0.950000 (1 run", run(0.9485, again="promising"),
        *[run(0.8, seed=43, tokens=100, again="slow")] * 2, run(0.8, seed=43, tokens=100), rates=[100]),
    "simpler twice, by a little": discard(
        "0.000700 worse", run(0.9514, "simple"), records=[*BEST, kept(4, "simple", "best", 0.9507)],
        **SIMPLER),
    "simpler once, by a little": keep("simpler, and 0.000700 worse", run(0.9507), **SIMPLER),
    "no score": crash("it broke", run()),
    # the baseline: the first seed is kept, the others measure the noise
    "the first seed": keep("the baseline", run(1.0, "base", "base"), records=[], **SEED),
    "the second seed": discard("measures the noise", run(0.5, "base", "base"), records=BASELINE[:1], **SEED),
    "a seed without a score": crash("it broke", run(None, "base", "base"), records=[], **SEED),
    "a slow seed runs again before anything is compared with it": again(
        "slow (50% of its expected rate)", run(1.2, "base", tokens=500), rates=[50, 100], records=[], **SEED),
    "a score where the baseline has none": discard("the baseline has no", run(0.5, "base"), records=NONE),
    # a best that moved: what ran on the old one and won there runs again on the new one
    "won on the best before": again("the best moved; on base it was 0.07", run(0.930, "base")),
    "lost on the best before": discard("the best moved; on base it was 0.019500 worse", run(1.02, "base")),
    "won there and on the new best": keep("better", run(0.98, **WON), run(0.93, commit="mine2")),
    "won there, not on the new best": discard("worse", run(0.93, **WON), run(0.951, commit="mine2")),
    "simpler code is compared with the best that it stood on": again(
        "the best moved; on base it was 0.0", run(1.0008, "base"), **SIMPLER),
    # where it does not go on top of the new best
    "waited, and conflicts": crash("rejected (conflict): it conflicts", **CONFLICT),
    "won there, conflicts, and is better than the new best by more than the noise": keep(
        "at 0.950000 (1 run, over 10 standard errors); displaces", run(0.930, **WON), **CONFLICT),
    "won there, conflicts, and is within the noise of the new best": discard(
        "rejected (conflict): it conflicts with the best, best (on base it was better by 0.049500)",
        run(0.9505, **WON), **CONFLICT),
    # interruptions
    "cut off three times": crash(
        "cut off 3 times: its node", run(**CUT), run(**CUT), run(lost="cut off: its node")),
    "stopped by the human is not cut off": again(
        "cut off", run(**CUT), run(again="stopped"), run(again="stopped"), run(lost="cut off")),
    # slow, uncompiled, on another attention: once more
    "slow by the same code": again("slow (50% of its expected rate)", run(0.5), rates=[100, 200]),
    "slow by its own best stretch": again(
        "slow (20%", run(0.5, tokens=2000, training_seconds=100, pace=STALLED)),
    "slow twice": again(
        "slow (50%", run(0.93, tokens=500, again="slow (50%)"), run(0.99, tokens=400),
        rates=[40, 50, 100]),
    "slow three times": crash(
        "not measured: machine busy (50% of its expected rate, 3 tries)",
        *[run(0.93, tokens=500, again="slow (50%)")] * 2, run(0.99, tokens=400), rates=[40, 50, 100]),
    "slow beside other programs": again(
        "slow (50% of its expected rate)", run(0.93, tokens=500, busy=0.5)),
    "as fast as the best beside other programs": keep("better", run(0.93, tokens=900, busy=0.5)),
    "slower by the change, and nothing else runs": keep("better", run(0.93, tokens=500)),
    "under a third of the best's rate": again(
        "slow, by the machine or by the change (30% of the best's", run(0.96, tokens=300)),
    "on another attention": again("not comparable: attention flex", run(0.5, conditions=FLEX)),
    "on another attention twice": discard(
        "twice not comparable: attention flex", run(0.5, **OTHER), run(0.5, conditions=FLEX)),
    "on another attention, and the repeat is not": keep(
        "0.020000 better", run(0.5, **OTHER), run(0.93, conditions=FLASH)),
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
    assert step_of("slow three times").slow == 0.5
    assert step_of("slow three times").run["tokens"] == 500
    assert [run["score"] for run in step_of("a little better, twice").runs] == [0.9485, 0.9483]
    twice = step_of("on another attention twice")
    assert twice.not_comparable.startswith("not comparable: attention flex")
    name = "won there, conflicts, and is better than the new best by more than the noise"
    assert step_of(name).displaced == "best" and step_of(name).run["base"] == "base"
    assert step_of("better by more than the noise").displaced is None
    assert step_of("dropped while it waited").run is None
