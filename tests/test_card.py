"""A card's page, in miniature: `bench/card.py` measured on this machine's CPU."""

import json
import sys

import pytest
from miniature import ROOT

sys.path.insert(0, str(ROOT / "bench"))


@pytest.fixture
def card(prepared_copy, tmp_path, monkeypatch):
    import card

    monkeypatch.setattr(card, "PAGES", tmp_path / "cards")
    monkeypatch.setattr(card, "SEEDS", (42,))
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    return card


def test_each_published_setting_still_holds_for_an_h100(card):
    for changes in card.RUNS.values():
        scope = {"__name__": "edited", "__file__": str(ROOT / "train.py")}
        exec(compile(card.edited(changes), "train.py", "exec"), scope)
        for _, new in changes:
            name, _, value = new.partition(" = ")
            if name.isupper():
                assert getattr(scope["H100"], name, scope.get(name)) == eval(value), new
    assert "x + 0 * self.smear(x)" in card.edited(card.BEST_PUBLISHED)
    with pytest.raises(SystemExit, match="no `gone = 1` any more"):
        card.edited([("gone = 1", "gone = 2")])


def test_parts_are_measured_once_and_failed_ones_again(card, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(card, "edited", lambda changes: "print('FAIL: no memory')")
    card.measure(["runs"], minutes=5)
    [page] = (tmp_path / "cards").iterdir()
    assert "Not measured: defaults, seed 42: FAIL: no memory; its log is" in page.read_text()
    monkeypatch.undo()

    monkeypatch.setattr(card, "PAGES", page.parent)
    monkeypatch.setattr(card, "SEEDS", (42,))
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    monkeypatch.setattr(card, "HONEST_MODELS", 2)
    # On a slow machine a step of the defaults takes all of the budget.
    monkeypatch.setitem(
        card.RUNS, "defaults", [("TOKENS_PER_STEP = 2**13", "TOKENS_PER_STEP = 2**10")]
    )
    card.measure(["runs", "honest"], minutes=10)
    ledger = (tmp_path / "cache/autoresearch.jsonl").read_text().splitlines()
    scores = [json.loads(line)["score"] for line in ledger if '"score"' in line]
    text = page.read_text()
    assert f"| defaults, seed 42 | {scores[-1]:.6f} |" in text and "Not measured" not in text
    assert "2 honest models, 0 refused" in text

    capsys.readouterr()
    card.measure(["runs", "honest"], minutes=10)
    assert "measuring" not in capsys.readouterr().out  # nothing is measured twice
    card.measure(["step"], minutes=0)
    assert "not measured: step, about 120 s" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--card fast: the parts are tests, honest"):
        card.measure(["fast"], minutes=0)
