"""The clock and what it says in the ledger, by a time that only the test moves."""

import faulthandler
import json
import re
from dataclasses import dataclass

import pytest
import torch
from miniature import ROOT, draw_a_batch

from autoresearch.common import lock
from autoresearch.referee import clock as clock_room
from autoresearch.referee import manifest as manifest_room
from autoresearch.referee.ledger import read_ledger

CPU = torch.device("cpu")
TOKENS = 2 * 64  # of a batch in these tests
BUDGET = 2  # seconds, the miniature set's

# ---- by a time that only the test moves


class StandingTime:
    """Seconds that pass only when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float):
        self.now += seconds


@pytest.fixture
def standing(prepared_copy, monkeypatch):
    """(prepare on a copy of the miniature set, the time that it goes by)."""
    moment = StandingTime()
    monkeypatch.setattr(clock_room, "_now", moment)
    prepared_copy.clock.__init__()
    return prepared_copy, moment


def loader_of(prepare):
    return prepare.make_dataloader(prepare.Tokenizer.from_directory(), 2, 64, "train", CPU)


def test_a_run_holds_its_set_until_its_end(standing):
    prepare, _ = standing

    def is_free() -> bool:
        held = lock(prepare.set_dir(), wait=False)
        return held is not None and held.close() is None

    assert is_free()
    loader = loader_of(prepare)
    assert not is_free()
    next(loader)
    prepare.clock.end(score=1.0)
    assert is_free()


def test_the_clock_starts_with_the_first_batch(standing):
    prepare, moment = standing
    clock = prepare.clock
    moment.sleep(5)
    loader = loader_of(prepare)
    moment.sleep(7)
    assert clock.elapsed == clock.progress == 0
    next(loader)
    assert clock.elapsed == clock.progress == 0
    moment.sleep(0.5)
    next(loader)
    assert clock.elapsed == 0.5 and clock.progress == 0.25
    assert not clock.expired
    moment.sleep(1.5)
    assert clock.elapsed == BUDGET and clock.progress == 1 and clock.expired
    (start,), _ = read_ledger()
    assert start["event"] == "start" and start["startup_seconds"] == 12


@dataclass
class Loop:
    """A training loop: `step` seconds in `batches` parts, the last step `last` seconds."""

    step: float
    last: float
    batches: int = 1

    def train(self, loader, clock, moment):
        seconds = 0.0
        spent = 0.0
        while spent + seconds < BUDGET:
            assert clock.elapsed == pytest.approx(spent)
            seconds = self.step if spent + 2 * self.step < BUDGET else self.last
            for _ in range(self.batches):
                next(loader)
                moment.sleep(seconds / self.batches)
            spent += seconds


LOOPS = {
    "a last step of twice its time": (Loop(0.3, 0.6, batches=8), True),
    "a last step of three times its time": (Loop(0.3, 1.2), False),
    "small steps, a little too long": (Loop(0.01, 0.06), False),
    "a hundredth too long": (Loop(0.01, 0.029), True),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_run_may_be_one_step_or_a_hundredth_over_its_budget(standing, name):
    prepare, moment = standing
    loop, is_scored = LOOPS[name]
    loop.train(loader_of(prepare), prepare.clock, moment)
    if is_scored:
        prepare.clock.ask_score(CPU)
        return
    with pytest.raises(prepare.Fail, match=r"FAIL: trained \S+ s on a 2 s budget"):
        prepare.clock.ask_score(CPU)
    records, _ = read_ledger()
    assert records[-1]["failure"].startswith("trained") and "score" not in records[-1]


def test_the_end_record_has_exact_figures(standing):
    prepare, moment = standing
    loader = loader_of(prepare)
    for number in range(90):
        next(loader)
        moment.sleep(0.0111 if number == 50 else 0.0101)
        _ = prepare.clock.progress
    prepare.clock.ask_score(CPU)
    moment.sleep(50)  # scoring
    prepare.clock.end(score=0.5)
    (start, end), damaged = read_ledger()
    assert damaged == 0 and start["run"] == end["run"] and end["score"] == 0.5
    assert (end["training_seconds"], end["longest_step_seconds"]) == (0.91, 0.011)
    assert (end["steps"], end["batches"], end["tokens"]) == (90, 90, 90 * TOKENS)
    # every 5% of the budget, and at the end
    paces = {10: 0.101, 20: 0.202, 30: 0.303, 40: 0.404, 50: 0.505, 60: 0.607, 70: 0.708, 80: 0.809}
    expected = [[seconds, batches * TOKENS] for batches, seconds in paces.items()]
    assert end["pace"] == [*expected, [0.91, 90 * TOKENS]]
    assert end["peak_memory_mb"] > 10 and len(end["kit_sha256"]) == 64


def test_a_step_ends_when_the_loop_reads_the_clock(standing):
    prepare, moment = standing
    loader = loader_of(prepare)
    for _ in range(4):
        for _ in range(3):
            next(loader)
            moment.sleep(0.01)
        _ = prepare.clock.elapsed
        _ = prepare.clock.progress  # twice is no step more
    prepare.clock.ask_score(CPU)
    prepare.clock.end(score=1.0)
    _, end = read_ledger()[0]
    assert (end["steps"], end["batches"], end["longest_step_seconds"]) == (4, 12, 0.03)


def test_what_describes_a_run_stands_in_the_ledger(standing):
    prepare, _ = standing
    prepare.clock.describe(attention="sdpa", compiled=False)
    loader = loader_of(prepare)
    next(loader)
    prepare.clock.describe(attention="blocked")
    prepare.clock.end(score=1.0)
    start, end = read_ledger()[0]
    assert (start["attention"], start["compiled"], start["device_batch"]) == ("sdpa", False, 2)
    assert (end["attention"], end["compiled"], end["device_batch"]) == ("blocked", False, 2)


def test_the_progress_file_says_phase_percent_and_mean_loss(standing, monkeypatch, tmp_path):
    prepare, moment = standing
    monkeypatch.setenv("AUTORESEARCH_PROGRESS", str(tmp_path / "progress"))
    loader = loader_of(prepare)
    for loss in (8.0, 6.0, 5.0, 4.0):
        next(loader)
        moment.sleep(0.06 * BUDGET if loss == 6 else 0.01 * BUDGET)
        prepare.clock.note_loss(loss)
        _ = prepare.clock.elapsed
    prepare.clock.ask_score(CPU)
    lines = [json.loads(line) for line in (tmp_path / "progress").read_text().splitlines()]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line.pop("time")) for line in lines)
    training = dict(phase="training")
    assert lines[:2] == [{"phase": "compiling"}, {**training, "percent": 0}]
    assert lines[-1] == {"phase": "scoring"}
    figures = [(x["percent"], x["loss"], x["tokens"], round(x["seconds"], 9)) for x in lines[2:-1]]
    assert figures == [(7.0, 7.0, 2 * TOKENS, 0.14), (9.0, 4.5, 4 * TOKENS, 0.18)]


# ---- what is refused


@pytest.mark.parametrize("split", ["val", "test"])
def test_only_train_is_given_out(prepared_copy, split):
    tokenizer = prepared_copy.Tokenizer.from_directory()
    with pytest.raises(prepared_copy.Fail, match=f"only `train`, not `{split}`"):
        prepared_copy.make_dataloader(tokenizer, 2, 64, split)


MEASURES = ("prepare.py", "autoresearch/common.py", "autoresearch/referee/leakcheck.py")
OTHERS = ("train.py", "night.py", "autoresearch/corpus/text.py", "autoresearch/kit/loss.py")


@pytest.mark.parametrize("name", MEASURES)
def test_code_that_measures_changed_during_the_run(prepared_copy, monkeypatch, tmp_path, name):
    """Line ends are no change, and neither is code that measures nothing."""
    draw_a_batch(prepared_copy)
    before = prepared_copy.fingerprint()
    for source in [ROOT / "prepare.py", *(ROOT / "autoresearch").rglob("*.py")]:
        copy = tmp_path / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes().replace(b"\n", b"\r\n"))
    for other in OTHERS:
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text("# another\n")
    monkeypatch.setattr(manifest_room, "ROOT", tmp_path)
    assert prepared_copy.fingerprint() == before
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b"#")
    with pytest.raises(prepared_copy.Fail, match=f"was changed.*began with {before}"):
        prepared_copy.clock.ask_score(CPU)


# ---- the watchdog's one timer


@pytest.fixture
def armed(monkeypatch):
    """The limits that the watchdog was armed with, instead of a watchdog."""
    limits = []
    monkeypatch.setattr(
        faulthandler, "dump_traceback_later", lambda seconds, exit, file: limits.append(seconds)
    )
    return limits


def test_only_the_first_loader_and_the_first_batch_arm_it(prepared_copy, armed):
    """The limit of a run is twice its budget or five minutes more."""
    assert [clock_room.training_limit(budget) for budget in (2, 300, 1000)] == [302, 600, 2000]
    prepare = prepared_copy
    first, second = loader_of(prepare), loader_of(prepare)
    assert armed == [clock_room.START_LIMIT]
    next(second)
    assert armed == [clock_room.START_LIMIT, 302]
    next(first), next(second)
    prepare.clock.ask_score(CPU)
    prepare.clock.end(score=1.0)
    assert armed == [clock_room.START_LIMIT, 302]
