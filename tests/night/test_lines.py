"""Second lines: decided against N, kept there, joined when the tip beats the best; kills and refusals."""

import json

import pytest
from lab import Code
from test_rules import BASELINE, kept, run

from autoresearch.common import Fail
from autoresearch.night import journal, lines, rules
from autoresearch.night.picture import Picture
from autoresearch.night.results import read_results
from autoresearch.night.rules import History


def asked(n: int, **more) -> dict:
    return {**dict(n=n, kind="try", simpler=False, dropped=False), **more}


def left(n: int, commit: str, base: str, score: float, **more) -> dict:
    """The record of what was tried and not kept."""
    record = {**kept(n, commit, base, score), "status": "discard", "level": None}
    return {**record, "seen": [0.95 - score, 1e-6], **more}


NIGHT = [*BASELINE, kept(4, "best", "base", 0.95), left(5, "five", "best", 0.97)]


@pytest.mark.parametrize("score", [0.90, 0.949, 0.9685, 0.969, 0.9699, 0.97, 0.9705, 0.98])
def test_a_line_decides_as_a_night_would_whose_best_is_n(score):
    """The same scores, and the same night but for which of them was kept."""
    of_line = lines.view(NIGHT, 5)
    plain = [{**r, "status": "discard"} for r in NIGHT[:-1]]
    plain.append({**NIGHT[-1], "status": "keep"})
    step = rules.next_step(asked(6), [run(score, "five")], History(of_line, [], {}, {}))
    same = rules.next_step(asked(6), [run(score, "five")], History(plain, [], {}, {}))
    assert type(step) is type(same) and step.why.startswith(same.why[:20])
    assert getattr(step, "status", "") == getattr(same, "status", "")


def test_what_is_kept_on_a_line_is_no_keep_of_the_night_until_it_beats_the_best():
    history = History(NIGHT, [], {}, {})
    on = asked(6, line=5)
    better = lines.next_step(on, [run(0.96, "five")], history)
    assert (better.status, better.on_line, better.displaced) == ("discard", "keep", None)
    assert better.why.startswith("on 5's line kept: 0.0100")
    worse = lines.next_step(on, [run(0.98, "five")], history)
    assert (worse.status, worse.on_line) == ("discard", "discard")
    best = lines.next_step(on, [run(0.90, "five")], history)
    assert (best.status, best.on_line, best.displaced) == ("keep", "keep", None)  # it stands on it
    assert "5's line joins" in best.why
    crash = lines.next_step(on, [run(base="five")], history)
    assert (crash.status, crash.on_line) == ("crash", "crash")
    # a little better than the best on one run is asked again, as on the best
    assert isinstance(lines.next_step(on, [run(0.949, "five")], history), rules.Again)
    plain = asked(6)
    assert lines.next_step(plain, [run(0.9)], history) == rules.next_step(
        plain, [run(0.9)], history
    )


def on_5(n: int, commit: str, base: str, score: float, on_line: str, **more) -> dict:
    return left(n, commit, base, score, line=5, on_line=on_line, **more)


MOVED = dict(again="the best moved; on five it was better")
TIP = [*NIGHT, on_5(6, "six", "five", 0.96, "keep")]


def test_what_won_on_an_older_tip_and_conflicts_with_the_new_one_is_not_lost():
    """As on the branch: no worse file is kept than the best one measured."""
    history = History(TIP, [], {}, {})
    on = asked(7, line=5)
    assert isinstance(lines.next_step(on, [run(0.92, "five")], history), rules.Again)  # put on top
    for score, status, on_line in (
        (0.92, "keep", "keep"),  # better than the best
        (0.955, "discard", "keep"),  # better than the tip
        (0.965, "discard", "discard"),
    ):
        step = lines.next_step(on, [run(score, "five", **MOVED)], history, "it conflicts")
        assert (step.status, step.on_line) == (status, on_line), step
        assert (step.displaced is None) and (status == "keep" or "the best" not in step.why)


def test_what_beats_the_best_is_the_best_even_beside_a_lucky_root():
    lucky = left(5, "five", "best", 0.9401, why="which is more likely luck")
    history = History([*NIGHT[:-1], lucky], [], {}, {})
    step = lines.next_step(asked(6, line=5), [run(0.9402, "five")], history)
    assert (step.status, step.on_line) == ("keep", "keep") and "better than the best" in step.why


def test_a_seed_that_gives_no_score_is_not_asked_for_ever():
    runs = [run(0.949, "five", seed=42, again="promising, x"), run(None, "five", seed=43)]
    step = lines.next_step(asked(6, line=5), runs, History(NIGHT, [], {}, {}))
    assert (step.status, step.on_line) == ("discard", "keep")


JOINED = [
    *NIGHT,
    kept(6, "after", "best", 0.94),
    on_5(7, "seven", "five", 0.96, "keep"),
    {**on_5(8, "eight", "seven", 0.92, "keep"), "status": "keep", "displaced": "after"},
]


def test_a_line_that_joined_displaces_what_it_does_not_stand_on():
    assert [r["n"] for r in journal.displaced_by(JOINED[-1], JOINED)] == [6]  # 4 is below 5
    assert journal.lineage("eight", JOINED) == ["eight", "seven", "five", "best", "base"]
    # and is displaced with all that was kept below and above its root
    back = {**kept(9, "nine", "base", 0.90), "displaced": "eight"}
    assert [r["n"] for r in journal.displaced_by(back, [*JOINED, back])] == [8, 4]
    history = History(JOINED[:-1], [], {}, {})
    step = lines.next_step(asked(8, line=5), [run(0.92, "seven")], history)
    assert (step.status, step.displaced) == ("keep", "after")


def test_what_still_runs_on_a_line_that_joined_is_an_experiment_on_the_best():
    records = [*JOINED, kept(9, "nine", "eight", 0.91)]
    history = History(records, [], {}, {})
    assert lines.tip_of(JOINED, 5)["n"] == 8 and lines.tip_of(records, 5)["n"] == 9
    on = asked(10, line=5)
    assert lines.next_step(on, [run(0.93, "five")], history).why.startswith("the best moved")
    better = lines.next_step(on, [run(0.89, "nine")], history)
    assert (better.status, better.on_line) == ("keep", "keep")
    worse = lines.next_step(on, [run(0.915, "nine")], history)
    assert (worse.status, worse.on_line) == ("discard", "discard")
    assert lines.words_of(records, 5) == "5's line has joined: 8 became the best"


@pytest.mark.parametrize(
    "n, why",
    [
        (4, "4 is the best: try without --on"),
        (6, r"6 was not \(crash: rejected \(conflict\): it meets the best\)"),
        (7, r"7 was not \(discard: twice not comparable"),
        (8, "8 is on 5's line: try --on 5"),
        (9, "no experiment 9 has ended: uv run night.py runs"),
    ],
)
def test_what_no_line_begins_at_is_said_in_words(n, why):
    crash = dict(status="crash", score=None, why="rejected (conflict): it meets the best")
    doubted = dict(not_comparable="x", why="twice not comparable: x")
    records = [*NIGHT, left(6, "six", "base", 1) | crash, left(7, "seven", "best", 1, **doubted)]
    records.append(on_5(8, "eight", "five", 0.96, "keep"))
    with pytest.raises(Fail, match=why):
        lines.root_of(records, n)
    assert lines.root_of(records, 5)["n"] == 5


def test_a_line_ends_when_it_joins_or_after_ten_that_brought_nothing():
    def tried(n, on_line, status="discard"):
        return dict(n=n, line=5, on_line=on_line, status=status)

    assert lines.open_ones([tried(6, "discard")] * 9, []) == [5]
    assert lines.open_ones([tried(6, "discard")] * 10, []) == []
    assert lines.open_ones([tried(6, "discard")] * 10, [dict(line=5)]) == [5]  # taken up again
    assert lines.open_ones([tried(6, "discard")] * 9 + [tried(7, "keep")], []) == [5]
    assert lines.open_ones([tried(6, "keep", "keep")], []) == []
    assert lines.open_ones([], [dict(line=5), dict(line=7), dict(line=5)]) == [5, 7]


def test_a_night_with_a_second_line(lab):
    root = lab.attempt("narrower", WIDTH=-1)
    lab.until_ended(root)
    lab.say("wait", 0)
    # an edit of the best becomes the same edit of N; kept there, and worse than the best
    n = lab.attempt("deeper", "--on", root, DEPTH=0.5)
    record = lab.until_ended(n)
    assert (record["status"], record["on_line"], record["line"]) == ("discard", "keep", root)
    assert record["score"] == pytest.approx(1.005) and record["got"] < -0.004
    told = lab.say("wait", 0)
    assert f"{n}: kept on {root}'s line  val_bpb 1.005000: on {root}'s line kept: 0.0" in told
    code = lab.git("show", f"{record['commit']}:train.py")
    assert "WIDTH = -1" in code and "DEPTH = 0.5" in code
    assert f"{root}'s line: tip 1.005000 ({n}), 0.005000 behind the best; 1 tried" in lab.say()
    commit = lab.record(root)["commit"][:7]
    assert lab.rows()[-1][3:] == ["discard", f"deeper [on {root} ({commit}), kept there]"]
    assert "WIDTH = 0" in (lab.root / "train.py").read_text()  # the best is the best
    words = f"{root}'s line: tip 1.005000 ({n}), 0.005000 behind the best; 1 tried on it, 1 kept"
    assert words in lab.say() and f"  {words}\n" in lab.say("audit")
    assert json.loads(lab.say("page", "--json"))["lines"] == [words]
    lab.check()
    # worse than the tip, better than N: left
    lab.edit(DEPTH=Code("float(0.2)"))
    assert "conflict with the tip of" in lab.refused("try", "less deep", "--on", root)
    assert "your edits were saved" in lab.say("bring", f"on-{root}")
    n = lab.attempt("less deep", "--on", root, DEPTH=0.2)
    record = lab.until_ended(n)
    assert record["on_line"] == "discard" and "0.0030" in record["why"]
    # the whole code of the tip; a killed supervisor loses nothing of it
    lab.say("wait", 0)
    assert f"uv run night.py try --on {root} '...'" in lab.say("bring", f"on-{root}")
    lab.edit(DEPTH=3, HOLD="mid")
    n = int(lab.say("try", "much deeper", "--on", root).split(":")[0])
    lab.until_held(n)
    lab.kill_supervisor()
    lab.go("mid")
    lab.say()
    record = lab.until_ended(n)
    assert (record["status"], record["on_line"]) == ("keep", "keep")
    assert "displaced" not in record  # it stands on the best before
    told = lab.say("wait", 0)
    assert f"{root}'s line joins, its tip is the best" in told
    text = (lab.root / "train.py").read_text()
    assert "WIDTH = -1" in text and "DEPTH = 3" in text
    assert lab.git("rev-parse", "HEAD") == record["commit"] == lab.best()["commit"]
    audit = lab.say("audit")
    assert f"  {root}'s line has joined: {n} became the best" in audit
    assert "Nothing found that speaks against" in audit
    lab.check()
    # its own staircase: from N's row down, kept, left, kept
    rows, _ = read_results(lab.root / "results.tsv")
    [steps] = Picture.of(rows, None).lines
    assert steps == [(4, 1.01), (5, 1.005), (6, 1.005), (7, 0.98)]
    lab.say("page")
    assert (lab.root / "night.html").read_text().count('<path class="line"') == 2  # two widths
    # what comes next stands on it
    lab.until_ended(lab.attempt("wider again", WIDTH=1))
    assert lab.best()["score"] == pytest.approx(0.96)
    lab.say()
    assert lab.git("rev-parse", "HEAD") == lab.best()["commit"]
    assert "has joined" in lab.refused("bring", f"on-{root}")
    lab.until_idle()


def test_a_line_begins_only_where_something_was_measured(lab):
    crash = lab.attempt("a crash", EVENT=None)
    lab.until_ended(crash)
    best = lab.attempt("wider", WIDTH=1)
    lab.until_ended(best)
    lab.say()
    roots = [lab.attempt(f"narrower {i}", WIDTH=-i) for i in (1, 2)]
    for root in roots:
        lab.until_ended(root)
    roots += [lab.attempt(f"shallower {i}", DEPTH=-i) for i in (1, 2)]
    for root in roots:
        lab.until_ended(root)
    lab.say("wait", 0)
    lab.edit(NOTE=1)
    for n, why in (
        (99, "no experiment 99 has ended"),
        (1, "1 is the baseline"),
        (crash, "was not (crash: "),
        (best, "is the best: try without --on"),
    ):
        assert why in lab.refused("try", "on nothing", "--on", n)
    for root in roots[:3]:
        lab.until_ended(lab.attempt("a note", "--on", root, COMMENT=root))
        lab.say("wait", 0)
    lab.edit(COMMENT=7)
    said = lab.refused("try", "a fourth", "--on", roots[3])
    open_ones = ", ".join(map(str, roots[:3]))
    assert f"3 lines are open ({open_ones}): go on with one, as try --on {roots[0]}" in said
    one = lab.attempt("more", "--on", roots[0], NOTE=5)
    lab.until_ended(one)
    assert f"is on {roots[0]}'s line" in lab.refused("bring", f"on-{one}")
    lab.until_idle()


def test_edits_of_a_tip_are_put_on_the_tip_that_moved_and_nothing_of_them_is_lost(lab):
    lab.set("- slots: 2")
    root = lab.until_ended(lab.attempt("worse in three places", WIDTH=-1, COMMENT=1, NOTE=1))["n"]
    lab.say("wait", 0)
    held = lab.attempt("deeper", "--on", root, DEPTH=0.5, HOLD="x")
    lab.until_held(held)
    lab.say("bring", f"on-{root}")
    lab.edit(COMMENT=100, NOTE=100, EVENT="none")  # two of three taken back, and one more
    lab.say("bring", "best")
    lab.say("bring", "edits-1")  # a file that was saved is still one of the tip
    assert lab.until_ended(held, go="x")["on_line"] == "keep"
    assert f"try --on {root} '...'" in lab.say()  # the tip moved, the edits stand
    n = int(lab.say("try", "half of it", "--on", root).split(":")[0])
    code = lab.git("show", f"refs/autoresearch/nov21/{n}:train.py")
    for line in ("WIDTH = -1", "COMMENT = 100", "NOTE = 100", "EVENT = 'none'", "DEPTH = 0.5"):
        assert f"\n{line}\n" in code
    assert lab.until_ended(n)["base"] == lab.record(held)["commit"]
    lab.say()
    # N's whole code, by its change alone: what is edited on N's own line is an edit of N
    lab.say("bring", root)
    n = lab.attempt("less narrow", "--on", root, WIDTH=-0.5)
    assert "\nWIDTH = -0.5\n" in lab.git("show", f"refs/autoresearch/nov21/{n}:train.py")
    assert lab.until_ended(n)["on_line"] == "keep"
    lab.say()
    lab.until_idle()
    lab.check()


HELD = """NOTE = 101
import os, time
while not os.path.exists(os.environ["AUTORESEARCH_CACHE"] + "/go-runs"):
    time.sleep(0.01)
"""


def test_what_waits_and_runs_on_a_line_goes_on_with_it_when_it_joins(lab):
    lab.set("- slots: 2")
    root = lab.until_ended(lab.attempt("narrower", WIDTH=-1))["n"]
    lab.say("wait", 0)
    above = lab.until_ended(lab.attempt("deeper on the best", DEPTH=0.5))
    lab.say("wait", 0)
    lab.say("bring", f"on-{root}")
    wins = lab.attempt("much wider", "--on", root, WIDTH=5, HOLD="wins")
    lab.say("bring", f"on-{root}")
    lab.edit(DEPTH=2)
    text = (lab.root / "train.py").read_text()
    (lab.root / "train.py").write_text(text.replace("NOTE = 100\n", HELD))
    runs = lab.attempt("much deeper", "--on", root)
    lab.until(lambda: len(lab.running()) == 2)
    waits = lab.attempt("a comment", "--on", root, COMMENT=7)
    joined = lab.until_ended(wins, go="wins")
    assert (joined["status"], joined["displaced"]) == ("keep", above["commit"])
    record = lab.until_ended(runs, go="runs")  # it won on N, and ran again on the best
    assert (record["status"], record["base"]) == ("keep", joined["commit"])
    assert lab.until_ended(waits)["status"] == "discard"
    assert f"{root}'s line joins, its tip is the best" in lab.say("wait", 0)
    assert lab.best()["score"] == pytest.approx(0.93)
    assert "Nothing found that speaks against" in lab.say("audit")
    lab.until_idle()
    lab.check()
