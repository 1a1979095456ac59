"""What a night remembers: the same lines changed before, lessons, words, and what was never tried."""

import re

import pytest

from autoresearch.night.memory import changed_lines, changed_parts, earlier_changes

DIFF = """diff --git a/train.py b/train.py
--- a/train.py
+++ b/train.py
@@ -3 +3 @@ class Settings:
-    MUON_LR = 0.04
+    MUON_LR = {}  # as others do
"""


def tried(n: int, lines: list[str], **more) -> dict:
    return {
        "n": n,
        "kind": "try",
        "lines": lines,
        "status": "discard",
        "score": 1.0,
        "why": "worse",
        **more,
    }


@pytest.mark.parametrize(
    "value, how",
    [
        ("0.031", "the same"),
        ("3.1e-2", "the same"),
        ("0.029", "nearly the same"),
        ("0.01", "other values in"),
        ("-0.031", "other values in"),
    ],
)
def test_a_change_of_the_same_lines_is_found_with_how_near_it_is(value, how):
    lines = changed_lines(DIFF.format(value))
    known = [tried(4, changed_lines(DIFF.format("0.031"))), tried(5, ["+ OTHER = 1"]), tried(6, [])]
    [(record, said)] = earlier_changes(lines, known)
    assert (record["n"], said) == (4, how)


def test_parts_of_a_file_are_its_classes_functions_and_settings():
    before = {"a.py": b"X = 1\n\ndef f():\n    return 1\n\nclass C:\n    y = 2\n", "b.c": b"1"}
    after = {
        "a.py": b"X = 1\n\ndef f():\n    return 2\n\nclass C:\n    y = 2\n\nZ = 3\n",
        "b.c": b"1",
    }
    assert changed_parts(before, after) == ["f", "Z"]
    assert changed_parts(before, {**before, "b.c": b"2"}) == ["b.c"]
    assert changed_parts(before, {**before, "a.py": b"def"}) == ["a.py"]  # no Python


def test_a_night_says_what_was_tried_before_and_keeps_lessons(lab):
    n = lab.attempt("a little narrower", WIDTH=-1)
    lab.until_ended(n)
    lab.say()
    said = lab.say("note", "narrower is worse,\nalways")
    assert "noted in lessons.md\nnext: edit train.py" in said
    assert "best 1.000000: narrower is worse, always" in lab.say()
    lab.edit(WIDTH=-2)
    said = lab.say("try", "narrower still")
    assert f"   experiment {n} made other values in lines: discard 1.010000, 0.0101" in said
    lab.until_ended(n + 1)
    lab.say("bring", "best")
    found = lab.say("runs", "--search", "narrower WIDTH").splitlines()
    assert [line.split()[2] for line in found[:2]] == [f"{n + 1}:", f"{n}:"]
    assert "no experiment of any night has: wider" in lab.say("runs", "--search", "wider")
    (lab.root / "results.tsv").rename(lab.root / "results-before.tsv")
    lab.set("- tag: dec1")  # the next night knows of the last one
    lab.say("begin")
    lab.edit(WIDTH=-1)
    assert f"experiment {n} of night nov21 made the same change" in lab.say("try", "again")
    assert "narrower is worse, always" in lab.say()
    lab.say("stop")


def test_after_many_experiments_without_a_keep_the_status_says_what_may_help(lab):
    lab.set("- patience: 2")
    for i, edit in enumerate((dict(WIDTH=-0.005), dict(DEPTH=-0.004))):
        lab.until_ended(lab.attempt(f"miss {i}", **edit))
        lab.say()
    said = lab.say()
    assert "2 experiments without a keep. From the records:" in said
    near = r"near misses on this best, never combined: 5 \(miss 1, \+0.0001\d\d\); 4 \(miss 0, \+0.0001"
    assert re.search(near, said)
    assert "never changed: EVENT, HOLD, COMMENT, NOTE" in said


def test_lines_taken_out_are_compared_too():
    two, one = ["- (4.0, -2.8, 0.5),", "- (3.8, -2.7, 0.5),"], ["- (3.2, -2.3, 0.4),"]
    record = {"lines": two}
    assert earlier_changes(one, [record]) == []
    assert earlier_changes(two, [record]) == [(record, "the same")]
