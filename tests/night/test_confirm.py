"""Is the gain real? The interval against scipy's numbers, the table, the queue."""

import contextlib
from dataclasses import replace

import pytest
from lab import Code

from autoresearch.common import Fail
from autoresearch.night import confirm, failures, journal, rules
from autoresearch.night.confirm import Confirmation, is_it_real, queue_confirmation, welch
from autoresearch.night.store import Night

# scipy 1.17.1: stats.ttest_ind(others, scores, equal_var=False).confidence_interval(0.95)
WELCH = [
    ([1.0, 0.9, 1.1], [2.0, 2.3, 1.9], 0.6318370098584343, 1.5014963234748986),
    ([0.5, 0.52, 0.47, 0.51, 0.49], [0.505, 0.9, 0.2], -0.8326277009395244, 0.9066277009395245),
]


@pytest.mark.parametrize("scores, others, low, high", WELCH)
def test_the_interval_is_scipys_in_both_directions(monkeypatch, scores, others, low, high):
    gain = sum(others) / len(others) - sum(scores) / len(scores)
    assert welch(scores, others) == pytest.approx((gain, low, high), rel=1e-6)
    higher = replace(journal.TARGET, lower_is_better=False)
    monkeypatch.setattr(journal, "TARGET", higher)
    assert welch(scores, others) == pytest.approx((-gain, -high, -low), rel=1e-6)


@pytest.mark.parametrize(
    "interval, sentence",
    [
        ((0.02147, 0.01996, 0.02298), "0.0215 better, 0.0200 to 0.0230: real"),
        ((0.01, -0.002, 0.022), "0.0100 better, from -0.0020 to +0.0220: within chance"),
        ((-0.01, -0.012, -0.008), "0.0100 worse, 0.0080 to 0.0120: the baseline is better"),
    ],
)
def test_the_verdict_in_one_sentence(interval, sentence):
    assert is_it_real(*interval) == sentence


def kept(n: int, commit: str) -> dict:
    return {"n": n, "commit": commit, "status": "keep", "kind": "try", "message": f"idea {n}"}


def run(n: int, commit: str, seed: int, score: float | None) -> dict:
    return {"n": n, "commit": commit, "seed": seed, "score": score, "why": "no room"}


def test_the_table_shows_each_score_and_what_is_missing():
    records = [kept(1, "base"), {**kept(2, "x"), "status": "discard"}, kept(3, "best")]
    confirmed = [
        run(4, "base", 45, 1.0),
        run(5, "best", 45, 0.9),
        run(6, "best", 46, 0.91),
        run(7, "base", 46, 1.02),
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
    assert Confirmation.of(records, confirmed, least=3).lines(ledger) == [
        "test_bpb     baseline       best",
        "seed 45      1.000000   0.900000",
        "seed 46      1.020000   0.910000",
        "seed 47             -          -",
        "mean         1.010000   0.905000",
        "range        0.020000   0.010000",
        "baseline: base, best: best, idea 3",
        "baseline, seed 47 gave no score: no room; night.py show 8 has its log, confirm runs it again",
        "other runs on the test split: 2",
        "0.1050 better, 0.0358 to 0.1742: real",  # scipy, too
    ]


@pytest.fixture
def measured(night, monkeypatch) -> Night:
    """With a baseline that has ended."""
    monkeypatch.setattr(confirm, "wake", lambda night: None)
    night.enqueue("baseline", night.tip(), night.tip(), "baseline", 42)
    end(night, 1, 1.0, "keep")
    return night


def end(night, n: int, score: float | None, status: str = "scored"):
    """Records an open experiment as ended."""
    [experiment] = [e for e in night.open() if e.n == n]
    known = {"id": f"{n:012x}", **{name: experiment.asked[name] for name in ("commit", "base")}}
    status = "crash" if score is None else status
    night.record(experiment, rules.Record(status, "no room", {**known, "score": score}))


def keep(night, score: float) -> str:
    tip = night.repo.git("rev-parse", "HEAD")
    commit = night.repo.commit({"train.py": f"# {score}\n".encode()}, tip, "wider")
    n = night.enqueue("try", commit, tip, "wider", 42)
    end(night, n, score, "keep")
    return commit


def waiting(night) -> list[tuple]:
    return [(e.n, e.asked["commit"], e.asked["seed"]) for e in night.open()]


def test_baseline_and_best_are_queued_in_turn_and_never_twice(measured):
    best, base = keep(measured, 0.9), measured.records()[0]["commit"]
    confirmation, numbers = queue_confirmation(measured, None)
    turns = [(base, 45), (best, 45), (best, 46), (base, 46), (base, 47), (best, 47)]
    assert [entry[1:] for entry in waiting(measured)] == turns
    assert all(e.is_confirm and e.split == "test" for e in measured.open())
    end(measured, 3, 1.0)
    end(measured, 4, None)  # a crash runs again, what waits or has its score does not
    assert queue_confirmation(measured, 2)[1] == {5, 6, 7, 8, 9}
    assert [entry[0] for entry in waiting(measured)] == [5, 6, 7, 8, 9]
    assert waiting(measured)[-1] == (9, best, 45)
    assert queue_confirmation(measured, 4)[1] == {5, 6, 7, 8, 9, 10, 11}


def test_what_cannot_be_confirmed_is_one_line(measured):
    with pytest.raises(Fail, match="an interval needs at least 2 seeds"):
        confirm.confirm(measured, 1)
    with pytest.raises(Fail, match="nothing to confirm: nothing was kept but the baseline"):
        queue_confirmation(measured, None)
    commit = measured.records()[0]["commit"]
    measured.enqueue("try", commit, commit, "wider", 42)
    with pytest.raises(Fail, match="the night is running: 2 wait or run"):
        queue_confirmation(measured, None)


def test_within_chance_it_names_the_command_for_more_seeds(measured, capsys):
    keep(measured, 0.9)
    queue_confirmation(measured, 2)
    for n, *_ in waiting(measured):
        end(measured, n, 1.0 + n / 100)
    confirm.confirm(measured, 2)
    said = capsys.readouterr().out.splitlines()
    assert said[-2].endswith("within chance")
    assert said[-1].endswith("uv run night.py confirm --seeds 4")


def test_a_supervisor_that_failed_ends_the_waiting_with_its_words(measured, monkeypatch):
    keep(measured, 0.9)

    def ends(_):
        with contextlib.suppress(Fail), failures.noted(measured):
            raise Fail("disk full")

    ends(0)  # of another day
    monkeypatch.setattr(confirm.time, "sleep", ends)
    words = "the supervisor ended: disk full; `uv run night.py confirm` continues"
    with pytest.raises(Fail, match=words):
        confirm.confirm(measured, None)


def test_a_real_night_that_displaced_a_best_is_confirmed_and_stands_the_audit(lab):
    lab.set("- slots: 2")
    small = lab.attempt("a little wider", WIDTH=1, HOLD=Code("str('small')"))
    large = lab.attempt("much wider", WIDTH=5, HOLD="large")
    lab.until(lambda: len(lab.running()) == 2)
    waits = lab.attempt("waits, and conflicts with both", HOLD="waits")
    lab.until_ended(small, go="small")
    assert lab.until_ended(waits)["why"].startswith("rejected (conflict)")
    assert lab.until_ended(large, go="large")["displaced"] == lab.record(small)["commit"]
    told = lab.say("wait", 0)
    assert f"{large}: keep  val_bpb 0.950000: 0.040000 better" in told
    assert f"it displaced {small}, {lab.record(small)['commit'][:7]} (a little wider)" in told
    assert f"uv run night.py show {small}, make that change again on top" in told
    assert "meets other changes in the best" in lab.refused("bring", small)
    lab.until_idle()
    lab.check()
    said = lab.say("confirm", "--seeds", 2).splitlines()
    assert said[-2] == "0.050000 better, 0.049696 to 0.050304: real"
    assert lab.say("confirm", "--seeds", 2).splitlines()[-2:] == said[-2:]
    assert lab.say("audit").splitlines() == [
        "  5 of 5 scores match the ledger",
        "  every measured score has its row",
        "  the test split was scored 4 times",
        "  4 of 4 scores of the confirmation match the ledger",
        "  every kept commit is on the branch and touches only train.py",
        "Nothing found that speaks against these numbers.",
        "next: uv run night.py",
    ]
