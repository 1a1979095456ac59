"""The rows of the score, out of a run's reach while it trains: real runs of an edited train.py."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from drive import SMALL, edited
from miniature import ROOT

from autoresearch.night import worker
from autoresearch.night.run_audit import outside_clock
from autoresearch.referee.ledger import joined

TRAIN = "    train(model, optimizer, hp, loader, warm.parts, budget, progress)\n"
WATCH = """
import json, sys
from pathlib import Path
from autoresearch.night import worker
folder = Path(sys.argv[1])
worker.become_subreaper()
ended, records = worker.run_to_its_end(
    folder, folder, folder / "compiled", {"seed": 42, "kind": "try"},
    {"id": "0123456789ab", "slot": {}}, folder / "run.log", folder / "progress",
    worker.Isolation.here(), 120, lambda: False,
)
print(json.dumps([ended, records]))
"""
# Every way to the rows that a look around finds; what is found is the rows' bytes.
LOOKS = """
    import glob, os, subprocess
    from autoresearch.common import cache_dir
    places = glob.glob(f"{cache_dir()}/**", recursive=True) + glob.glob("/proc/[0-9]*/fd/*")
    places += glob.glob(f"/proc/[0-9]*/root{cache_dir()}/*/held-out/*")
    here = f"{cache_dir()}/{manifest()['key']}/held-out"
    for command in (["umount", here], ["unshare", "-rm", "umount", here]):
        subprocess.run(command)
        places += glob.glob(here + "/*")
    seen = [place for place in places if place.endswith(".rows") or "held-out/" in place]
    for place in places:
        try:
            seen += [place] * (os.path.isfile(place) and ROWS in open(place, "rb").read())
        except OSError:
            pass
    print("places:", len(places) > 50, "seen:", seen)
"""
ASKS_EARLY = """
    import time
    from autoresearch.referee import heldout
    rows = heldout.read_rows("val")
"""
BRINGS_THEM = "    prepare.read_rows = lambda split: rows\n"
TRAINS_ON = "    time.sleep(7)\n"


@pytest.fixture
def watched(miniature, tmp_path, monkeypatch):
    """watched(edits) runs train.py with them as the night does: ended, the run in the ledger, the log."""
    cache = tmp_path / "cache"
    shutil.copytree(miniature, cache)
    (cache / "shards").mkdir()
    for name, value in {"AUTORESEARCH_CACHE": str(cache), "TORCH_COMPILE_DISABLE": "1"}.items():
        monkeypatch.setenv(name, value)
    if not worker.Isolation.here().hides:
        pytest.skip(worker.Isolation.here().warning)

    def run(edits):
        tree = tmp_path / "tree"
        tree.mkdir()
        shutil.copytree(ROOT / "autoresearch", tree / "autoresearch")
        shutil.copy(ROOT / "prepare.py", tree)
        values = "".join(f"    {name} = {value!r}\n" for name, value in SMALL.items())
        text = edited(edits).replace("SIZES = {", f"class Small(CPU):\n{values}\n\nSIZES = {{")
        (tree / "train.py").write_text(text.replace('"cpu": CPU', '"cpu": Small'))
        done = subprocess.run(
            [sys.executable, "-c", WATCH, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        ended, records = json.loads(done.stdout)
        return SimpleNamespace(
            **ended, ledger=joined(records)[0], log=(tmp_path / "run.log").read_text(), cache=cache
        )

    return run


def named(run) -> list[str]:
    """What the audit says of its clock, beside nine honest runs."""
    usual = dict(run.ledger, startup_seconds=5, training_seconds=2, scoring_seconds=1)
    runs = [dict(usual, run=str(i)) for i in range(9)] + [run.ledger]
    started = {str(i): {"wall_seconds": 10, "asked_seconds": 8} for i in range(9)}
    started[run.ledger["run"]] = vars(run)
    return [finding.words for finding in outside_clock(runs, started) if not finding.fine]


def test_nothing_of_the_rows_is_in_reach_until_the_run_asks_for_its_score(watched, miniature):
    (path,) = miniature.glob("*/held-out/val.rows")
    rows = path.read_bytes()[:64]
    run = watched([(TRAIN, LOOKS.replace("ROWS", repr(rows)) + TRAIN)])
    assert "places: True seen: []" in run.log, run.log
    assert run.code == 0 and run.ledger["score"] > 0 and run.ledger["held_out"] == "hidden"
    trained = run.ledger["startup_seconds"] + run.ledger["training_seconds"]
    assert trained < run.asked_seconds < run.wall_seconds
    assert named(run) == []


def test_who_has_asked_before_gets_no_score(watched):
    run = watched([(TRAIN, ASKS_EARLY + TRAIN)])
    assert "rows of the score were handed out before" in run.ledger["failure"]
    assert run.code == 1 and "score" not in run.ledger


def test_who_trains_on_with_the_rows_at_hand_is_named(watched):
    run = watched([(TRAIN, ASKS_EARLY + BRINGS_THEM + TRAINS_ON + TRAIN)])
    assert run.ledger["score"] > 0
    (words,) = named(run)
    assert "with the rows of its score at hand" in words
