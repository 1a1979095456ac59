"""What the notebook shows, as functions: where the hours went, second by second, and the tables."""

import json
import os
import random
from collections import Counter

import pytest

import night

START = 1_000_000.0


def moments(*seconds: float) -> list[str]:
    return [night.time_of(START + after) for after in seconds]


def relative(spans) -> list[tuple[str, float, float]]:
    return [(what, start - START, end - START) for what, start, end in spans]


def test_a_run_compiles_trains_and_scores():
    began, first, ended = moments(0, 40, 370)
    by_night = {"began": began, "ended": ended}
    measured = {"began": first, "training_seconds": 300.0, "time": ended}
    whole = [("compiling", 0, 40), ("training", 40, 340), ("scoring", 340, 370)]
    assert relative(night.run_spans(by_night, measured, False)) == whole
    assert relative(night.run_spans({}, {**measured, "startup_seconds": 40.0}, False)) == whole
    assert relative(night.run_spans(by_night, measured, True)) == [("disturbed", 0, 370)]


@pytest.mark.parametrize(
    "by_night, measured, spans",
    # fmt: off
    [
        ((0, 12), {}, [("compiling", 0, 12)]),  # a crash before the first batch
        ((0, 200), {"began": 40}, [("compiling", 0, 40), ("training", 40, 200)]),  # dropped
        (
            (0, 200),
            {"began": 40, "training_seconds": 999.0},
            [("compiling", 0, 40), ("training", 40, 200)],
        ),
        ((0, None), {}, []),  # has just begun
        (None, {}, []),  # in the ledger without a start
        (
            None,
            {"began": 40, "startup_seconds": 30.0, "time": 40},
            [("compiling", 10, 40)],
        ),  # no end
    ],
    # fmt: on
)
def test_a_run_of_which_less_is_known(by_night, measured, spans):
    known, said = {}, dict(measured)
    if by_night:
        known["began"] = moments(by_night[0])[0]
        if by_night[1] is not None:
            known["ended"] = moments(by_night[1])[0]
    for key in ("began", "time"):
        if key in said:
            said[key] = moments(said[key])[0]
    if not known and not said:
        said["time"] = moments(5)[0]
    assert relative(night.run_spans(known, said, False)) == spans


def test_hours_are_those_of_a_count_second_by_second():
    draw = random.Random(5)
    for slots, runs in ((1, 3), (1, 40), (3, 30), (8, 900)):
        spans, free = [], [START] * slots
        for _ in range(runs):
            slot = free.index(min(free))
            begins = free[slot] + draw.choice([0, 1, 90])
            for what in ("compiling", "training", "scoring"):
                spans.append((what, begins, begins + draw.randrange(3, 400)))
                begins = spans[-1][2]
            free[slot] = begins
        step, found_slots, bars = night.hours(spans)
        assert found_slots == slots and len(bars) <= night.MOST_BARS
        first = min(start for _, start, _ in spans)
        length = int(max(free) - first)
        counted = [Counter() for _ in bars]
        for what, start, end in spans:
            for second in range(int(start - first), int(end - first)):
                counted[int(second // step)][what] += 1
        for second in range(length):
            counted[int(second // step)]["all"] += slots
        for bar, count in zip(bars, counted):
            busy = {what: bar[what] for what in ("compiling", "training", "scoring", "disturbed")}
            assert busy == {what: pytest.approx(count[what]) for what in busy}
            assert bar["waiting"] == pytest.approx(count["all"] - sum(busy.values()))


def test_hours_of_nothing_of_a_moment_and_of_a_year():
    assert night.hours([]) == (60, 1, [])
    assert night.page_hours([], 1) == "nothing of the night's hours is known"
    step, slots, bars = night.hours([("compiling", START, START)])
    assert (slots, len(bars)) == (1, 1) and night.page_hours(bars, 1).startswith("nothing")
    year = [("training", START, START + 300), ("training", START + 3e7, START + 3e7 + 300)]
    step, slots, bars = night.hours(year)
    assert step == 86400 and sum(bar["training"] for bar in bars) == 600


def test_the_shares_in_one_line():
    bars = [{**dict.fromkeys(night.WENT, 0.0), "training": 5400.0, "waiting": 1800.0}]
    said = "2.0 hours of 2 slots: 75% training, 0% compiling, 0% scoring, 0% disturbed, 25% waiting"
    assert night.page_hours(bars, 2) == said


def morning(**more) -> night.Morning:
    empty = dict(rows=[], skipped=[], records=[], started={}, ledger=[], damaged=0, budgets={})
    return night.Morning(**{**empty, **more})


def test_the_hours_of_a_night_know_what_was_disturbed_and_leave_the_confirmation_out():
    began, ended = moments(0, 100)
    times = {"began": began, "ended": ended, "kind": "try"}
    started = {
        "plain": times,
        "disturbed, ran again": {**times, "again": "disturbed (40% of its rate)"},
        "disturbed, and counts": times,
        "cut off": {**times, "again": "cut off"},
        "ended by `night.py stop`": {**times, "again": "stopped"},
        "ran on an old best": {**times, "again": "the best moved; ..."},
        "confirms": {**times, "kind": "confirm"},
    }
    records = [{"run": "disturbed, and counts", "disturbed": 0.4}]
    found = night.night_spans(morning(started=started, records=records))
    assert Counter(what for what, *_ in found) == {"compiling": 2, "disturbed": 4}
    # without night.py the ledger tells, of the runs that have a row
    line = {"event": "start", "split": "val", "time": began, "startup_seconds": 9.0}
    ledger = [{**line, "run": "1", "commit": "a" * 40}, {**line, "run": "2", "commit": "b" * 40}]
    ledger += [{**run, "event": "end", "time": ended, "training_seconds": 80.0} for run in ledger]
    rows = [night.Row(1, "aaaaaaa", 1.0, None, "keep", "baseline")]
    found = night.night_spans(morning(rows=rows, ledger=ledger))
    assert relative(found) == [("compiling", -9, 0), ("training", 0, 80), ("scoring", 80, 100)]


def test_a_run_that_was_cut_off_has_ended_with_its_log(tmp_path):
    night.write_json(tmp_path / "run-1.json", {"id": "1", "began": night.time_of(START)})
    (tmp_path / "run-1.log").write_text("compiled\n")
    os.utime(tmp_path / "run-1.log", (START + 70, START + 70))
    [run] = night.Experiment(tmp_path, {"n": 1, "kind": "try"}).timed_runs()
    assert (run["ended"], run["kind"]) == (night.time_of(START + 70), "try")
    assert "ended" not in json.loads((tmp_path / "run-1.json").read_text())


def row(n: int, score: float | None, status: str, what: str = "") -> night.Row:
    return night.Row(n, f"{n:07}", score, 1.0, status, what)


def test_the_axis_shows_what_was_kept_and_room_on_the_better_side(monkeypatch):
    rows = [
        row(1, 1.0, "keep"),
        row(2, 0.9, "keep"),
        row(3, 50.0, "discard"),
        row(4, None, "crash"),
    ]
    assert night.score_axis(rows, None) == pytest.approx((0.855, 1.035))
    assert night.score_axis(rows[:1], 0.01) == pytest.approx((0.955, 1.035))
    assert night.score_axis(rows[2:], None) == pytest.approx((49.9775, 50.0175))
    low, high = night.score_axis([], None)
    assert low < 1 < high
    monkeypatch.setattr(night, "LOWER_IS_BETTER", False)
    assert night.score_axis(rows, None) == pytest.approx((0.865, 1.045))


def test_the_best_and_the_gains_in_words():
    rows = [
        row(1, 1.0, "keep", "baseline"),
        row(2, 0.99, "keep", "one"),
        row(3, 0.9, "keep", "two"),
    ]
    lines = night.page_best(rows, 0.01)
    assert lines[1] == "best      0.900000  0000003  1.0 GB  two"
    assert lines[2] == "change    -0.100000 (-10.00%, 10.0 times the noise floor)"
    assert night.page_best(rows[:1], None)[-1] == "change    +0.000000 (+0.00%)"
    table = night.page_gains(rows)
    assert [(line["experiment"], line["gain"]) for line in table] == [
        ("3", "+0.090000"),
        ("2", "+0.010000"),
    ]


def test_what_was_predicted_and_what_came():
    said = {"disturbed": None, "message": "wider"}
    records = [
        {"n": 1, "expect": None, "got": None, **said},
        {"n": 2, "expect": -0.01, "got": -0.012, **said},
        {"n": 3, "expect": -0.01, "got": None, **said},
    ]
    assert night.page_calibration(records, 0.001).startswith(
        "1 of 1 predictions right in direction"
    )
    assert night.page_calibration(records[:1], None).startswith("nothing was predicted")
    assert night.page_predictions(records) == [
        {"experiment": "2", "expected": "-0.010000", "got": "-0.012000", "what": "wider"}
    ]


def test_the_page_says_how_far_the_confirmation_is():
    kept = {"n": 1, "commit": "base", "status": "keep", "kind": "baseline", "seed": 42}
    best = {**kept, "n": 2, "commit": "best", "kind": "try", "message": "wider"}
    assert "this log has none" in night.page_confirmation(morning())[0]
    assert "nothing was kept but" in night.page_confirmation(morning(records=[kept]))[0]
    both = [kept, best]
    assert "not confirmed yet" in night.page_confirmation(morning(records=both))[0]
    run = {"kind": "confirm", "disturbed": None, "again": []}
    confirmed = [
        {**run, "n": 3, "commit": commit, "seed": seed, "score": score}
        for commit, seed, score in [
            ("base", 45, 1.0), ("best", 45, 0.9), ("base", 46, 1.02), ("best", 46, 0.91),
        ]
    ]  # fmt: skip
    lines = night.page_confirmation(morning(records=both, confirmed=confirmed))
    assert lines[-1] == "0.1050 better, 0.0358 to 0.1742: real"
