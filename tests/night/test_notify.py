"""The human's command: called with one sentence, which is never code, and never in the night's way."""

import subprocess
import time

from autoresearch.night import notify as module
from autoresearch.night.notify import call, notify


def test_a_new_best_is_told_and_a_command_that_hangs_or_fails_stops_nothing(lab, tmp_path):
    told = tmp_path / "told"
    told.touch()
    lab.set(f"- notify: tell() {{ printf '%s\\n' \"$1\" >> {told}; sleep 5; }}; tell")
    lab.attempt("wider; `touch wrong` $(touch wrong) \"'; touch wrong", WIDTH=1)
    lab.attempt("worse", WIDTH=-1)
    lab.until_ended(5)
    lab.until(lambda: told.read_text())
    lab.until_idle()
    sentence = (
        "night nov21: new best 0.990000: 4, wider; `touch wrong` $(touch wrong) \"'; touch wrong"
    )
    assert told.read_text() == sentence + "\n"
    assert not (lab.root / "wrong").exists()
    lab.say()  # the best into the file
    lab.set("- notify: /no/such/command")
    assert lab.until_ended(lab.attempt("wider still", WIDTH=2))["status"] == "keep"
    log = lab.state_dir / "nov21/notify.log"
    lab.until(lambda: "exit 127: night nov21: new best 0.980000: 6" in log.read_text())


def test_a_command_that_hangs_is_killed_with_its_children(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(module, "TIMEOUT", 0.1)
    call(f"tell() {{ (sleep 0.4; touch {tmp_path}/late) & wait; }}; tell", "done")
    assert "killed after 0.1 s: done" in capsys.readouterr().out
    time.sleep(0.6)
    assert not (tmp_path / "late").exists()


def test_without_a_command_nothing_is_started(night, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    notify(night, "a sentence")
    assert not (night.folder / "notify.log").exists()
