"""The supervisor's order: what becomes of wins on a best that has moved, and what it must not miss."""

from types import SimpleNamespace

import pytest

from autoresearch.night import settings, supervisor
from autoresearch.night.store import Night


def test_wins_on_one_base_are_put_on_top_of_each_other(lab):
    lab.set("- slots: 3")
    edits = [dict(WIDTH=1), dict(DEPTH=2), dict(WIDTH=1, DEPTH=2)]
    tried = [lab.attempt(f"idea {i}", HOLD="x", **edit) for i, edit in enumerate(edits)]
    for n in tried:
        lab.until_held(n)
    for n in tried:
        lab.until_ended(n, go="x")
    # whichever ended first, what came last was in the best already
    assert lab.best()["score"] == pytest.approx(0.97)
    assert any("its change is in the best, " in lab.record(n)["why"] for n in tried)
    lab.say()
    lab.until_idle()
    lab.check()


def test_what_may_be_luck_gets_a_second_seed_and_its_row_has_the_mean(lab):
    n = lab.attempt("a little wider", WIDTH=0.018)  # by less than the noise of a run
    record = lab.until_ended(n)
    assert (record["status"], record["k"]) == ("keep", 1)
    assert record["scores"] == pytest.approx([0.99982, 0.99972])
    [why] = record["again"]
    assert why.startswith("promising, 0.000080 better than its base at 0.999900 (1 run, about 0.7 ")
    told = lab.say("wait", 0)
    assert "0.000130 better than its base at 0.999900 (2 runs, about 1.4 standard errors)" in told
    assert lab.rows()[-1][1:2] == ["0.999770"]
    assert lab.rows()[-1][4] == "a little wider [mean of 2 runs]"
    seeds = [line["seed"] for line in lab.ledger() if line["run"] in record["runs"]]
    assert seeds == [42, 42, 43, 43]
    assert "Nothing found that speaks against" in lab.say("audit")


def test_a_slot_with_nothing_to_do_measures_the_best_again_and_makes_room(lab):
    lab.set("- repeats: 5")
    n = lab.attempt("wider", WIDTH=1, HOLD="seed")
    lab.until_held(n)
    lab.until_ended(n, go="seed42")
    lab.until_held(n + 1)  # with the next seed
    assert "measures 4 again" in lab.say()
    m = lab.attempt("wider still", WIDTH=2, HOLD="")
    assert lab.until_ended(m)["status"] == "keep"
    assert (lab.record(n + 1)["kind"], lab.record(n + 1)["why"]) == ("repeat", "dropped")
    assert f"{n + 1}: ended early, for an experiment that waited" in lab.say("wait", 0)
    lab.until_idle()
    repeats = [r for r in lab.journal() if r["kind"] == "repeat" and r["status"] == "scored"]
    assert [record["seed"] for record in repeats] == [43, 44, 142, 143]
    said = lab.say("wait", 0)
    assert f"{repeats[-1]['n']}: val_bpb 0.979800  (" in said
    assert "val_bpb 0.979" not in lab.say("wait", 0)  # told once
    assert "best 0.979880 ± 0.000047 (mean of 5 runs)" in lab.say()
    assert len(lab.rows()) == 1 + 5  # none of a repeat
    assert "Nothing found that speaks against" in lab.say("audit")


def test_what_is_queued_while_the_supervisor_releases_its_lock_is_worked_off(lab, monkeypatch):
    monkeypatch.setattr(settings, "PROGRAM", lab.root / "program.md")
    night = Night(lab.root)
    monkeypatch.setattr(supervisor, "Night", lambda: Night(lab.root))
    engines = []

    def close():
        if len(engines) == 1:  # a command that finds the lock taken starts no supervisor
            n = night.enqueue("try", night.tip(), night.tip(), "late", 42)
            (night.queue / str(n) / "drop").touch()

    def make_engine(_):
        engines.append(SimpleNamespace(slots=list, status_lines=list, close=close))
        return engines[-1]

    supervisor.supervise(make_engine, lambda night: lambda changed: None)
    assert len(engines) == 2 and night.records()[-1]["why"] == "dropped while it waited"


def test_a_supervisor_that_ends_twice_for_the_same_reason_is_news_and_starts_no_more(lab):
    (lab.root / ".git/worktrees").touch()  # no run can get its worktree
    n = lab.attempt("wider", WIDTH=1)
    lab.until((lab.state_dir / "nov21/failure.json").is_file)
    for said in (lab.say("wait", 20), lab.say(), lab.say("wait", 20)):
        assert "nothing runs: the supervisor ended 2 times: git worktree add: fatal: " in said
        assert said.endswith("(see above), then uv run night.py begin\n")
    (lab.root / ".git/worktrees").unlink()
    lab.say("begin")
    assert lab.until_ended(n)["status"] == "keep"
