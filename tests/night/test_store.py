"""What the night remembers, as files: the journal, the rows, the agent's branch; and git's plumbing."""

import pytest

from autoresearch.common import Fail, write_json
from autoresearch.night import commands, rules
from autoresearch.night.repo import merged_file as merged
from autoresearch.night.store import Experiment, Night


def ended(night: Night, status="keep", score=1.0, text=b"x = 2\n", **more) -> Experiment:
    """An experiment on the branch's tip, recorded."""
    tip = night.tip()
    commit = night.repo.commit({"train.py": text}, tip, "an idea")
    n = night.enqueue("try", commit, tip, "an idea", 42)
    [experiment] = [e for e in night.open() if e.n == n]
    run = dict(id=f"run{n}", commit=commit, base=tip, began="2026-01-01T00:00:00Z", score=score)
    write_json(experiment.folder / "run-1.json", run)
    night.record(experiment, rules.Record(status, "why", {**run, **more}))
    return Experiment.at(night.done / str(n))


def test_a_torn_line_of_the_journal_is_ignored_and_ended_by_the_next(night):
    ended(night, score=1.0)
    with open(night.journal, "ab") as file:
        file.write(b'{"n": 2, "kind": "try", "sta')  # a power cut
    assert [record["n"] for record in Night(night.root).records()] == [1]
    ended(night, score=0.9)
    assert [r["score"] for r in night.records()] == [1.0, 0.9]
    assert [r["score"] for r in Night(night.root).records()] == [1.0, 0.9]


def test_the_branch_and_the_file_go_to_the_best_but_an_edit_in_progress_stays(night):
    baseline = night.tip()
    ended(night, score=1.0)
    (night.root / "train.py").write_text("x = 'mine'\n")
    night.sync_branch()
    assert night.tip() == baseline and (night.root / "train.py").read_text() == "x = 'mine'\n"
    assert night.edits() == {"train.py": b"x = 'mine'\n"}
    (night.root / "train.py").unlink()  # deleted is no edit
    night.sync_branch()
    assert (
        night.tip() == night.records()[0]["commit"]
        and (night.root / "train.py").read_text() == "x = 2\n"
    )
    assert night.edits() is None


def test_changes_of_neighbouring_lines_merge_and_of_one_line_do_not():
    base = b"a = 1\nb = 2\nc = 3\nd = 4\n"
    one, other = base.replace(b"b = 2", b"b = 20"), base.replace(b"c = 3\n", b"")
    assert merged(one, base, other) == b"a = 1\nb = 20\nd = 4\n"
    assert merged(one, base, base.replace(b"b = 2", b"c = 2")) is None
    assert merged(one, base, base.replace(b"b = 2\n", b"")) is None
    assert merged(base, base, base + b"e") == base + b"e"  # no newline at its end


@pytest.mark.parametrize(
    "base, ours, theirs, conflict",
    [
        ("LR = 0.04  # of Muon", "LR = 0.08  # of Muon", "LR = 2e-2  # lower", False),
        ("N = 2**13", "N = 2**12", "N = 512", False),
        ("WINDOW = 1 / 8", "WINDOW = 1 / 4", "WINDOW = 0.5", False),
        ("PATTERN = 'SSSL'", "PATTERN = 'SL'", "PATTERN = 'L'", False),
        ("HEADS = None", "HEADS = 2", "HEADS = 4", False),
        ("x = f(x, 1)", "x = f(x, 2)", "x = f(x, -3)", False),
        ("int n = 1;  // old", "int n = 2;  // wide", "int n = 4;  // wider", False),
        ("n = a // b", "n = a // c", "n = a // d", True),
        ("x = f(x)", "x = g(x)", "x = h(x)", True),
        ("x = x1 + 1", "x = x2 + 1", "x = x3 + 1", True),
        ("A = 1", "A = 2\nB = 1", "A = 3", True),
    ],
)
def test_two_values_of_one_setting_are_no_conflict_and_the_changes_own_is_taken(
    base, ours, theirs, conflict
):
    files = [f"first = 1\n{line}\nlast = 1\n".encode() for line in (ours, base, theirs)]
    assert merged(*files) == (None if conflict else files[2])


def test_the_same_change_on_another_file_has_the_same_id(night):
    repo, text = night.repo, b"def f():\n    a = 1\n\n\ndef g():\n    b = 1\n"
    base = repo.commit({"train.py": text}, night.tip(), "base")
    other = repo.commit({"train.py": b"# longer\n\n" + text}, base, "other")

    def id_of(parent: str, old: bytes, new: bytes) -> str:
        changed = {"train.py": repo.contents_at(parent)["train.py"].replace(old, new)}
        return repo.change_id(parent, repo.commit(changed, parent, "change"))

    assert id_of(base, b"a = 1", b"a = 2") == id_of(other, b"a = 1", b"a = 2")
    assert id_of(base, b"a = 1", b"a = 2") != id_of(base, b"a = 1", b"a = 3")
    assert id_of(base, b"a = 1", b"a = 2") != id_of(base, b"b = 1", b"b = 2")


def test_a_change_that_is_queued_is_not_queued_again(night):
    tip = night.tip()
    night.enqueue("try", tip, tip, "an idea", 42, change="abc")
    commands.check_new(night, "another", tip)
    with pytest.raises(Fail, match="change of experiment 1, which has not ended"):
        commands.check_new(night, "abc", tip)
