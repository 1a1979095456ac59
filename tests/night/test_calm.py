"""The probe of the machine: whether others use it before a run starts."""

import os
import subprocess
import sys

import pytest

from autoresearch.night import calm
from autoresearch.night.calm import Calm


@pytest.fixture
def load(monkeypatch):
    """What others use, as the test says; no time passes but what the test adds."""
    now = {"share": 0.0, "time": 100.0}
    monkeypatch.setattr(calm, "cores_share", lambda: now["share"])
    monkeypatch.setattr(calm, "card_share", lambda card: now["share"] if card == "1" else 0.0)
    monkeypatch.setattr(calm.time, "monotonic", lambda: now["time"])
    return now


def test_a_run_waits_for_calm_and_starts_at_once_when_it_comes(load):
    it = Calm(600)
    assert it.allows({}, alone=True) and it.busy() is None and it.lines() == []
    load["share"] = 0.5
    assert not it.allows({}, alone=True) and it.waits()
    assert "other programs use 50% of the machine: the next run waits" in it.lines()[0]
    load["share"] = 0.0
    assert not it.allows({}, alone=True)  # looked a moment ago
    load["time"] += calm.LOOK_AGAIN
    assert it.allows({}, alone=True) and not it.waits() and it.busy() is None


def test_after_the_limit_it_starts_and_the_run_knows_that_it_is_not_alone(load):
    load["share"] = 0.5
    it = Calm(600)
    assert not it.allows({}, alone=True)
    load["time"] += 601
    assert it.allows({}, alone=True) and it.busy() == 0.5
    load["time"] += 300  # the next run: that load stays, and is not waited for again
    assert it.allows({}, alone=True) and it.busy() == 0.5
    load["share"] = 0.0
    assert it.allows({}, alone=True) and it.busy() is None
    load["share"] = 0.5  # another load after some calm
    assert not it.allows({}, alone=True)


def test_runs_of_our_own_are_not_taken_for_others(load):
    load["share"] = 0.5
    assert Calm(600).allows({}, alone=False)
    assert Calm(None).allows({}, alone=True)
    assert not Calm(600).allows({"CUDA_VISIBLE_DEVICES": "1"}, alone=False)  # its card is used
    assert Calm(600).allows(
        {"CUDA_VISIBLE_DEVICES": "0"}, alone=True
    )  # not the cores, but its card


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/stat")
def test_a_program_that_takes_a_core_is_seen(monkeypatch):
    monkeypatch.setattr(calm, "PROBE_SECONDS", 0.6)
    program = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert calm.cores_share() > 0.5 / os.cpu_count()
    finally:
        program.kill()
        program.wait()
