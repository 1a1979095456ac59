"""Real runs of an edited train.py: what the ledger says they replaced and opened beside training."""

import pytest
from drive import edited, run_small

from autoresearch.referee import tampering
from autoresearch.referee.ledger import joined, read_ledger

TRAIN = "    train(model, optimizer, hp, loader, warm.parts, budget, progress)\n"
SCORE = "    bpb = evaluate_bpb(model, tokenizer, warm.eval_batch)\n"
WHILE = "    while clock.elapsed + step_seconds < budget:\n"
THREE_STEPS = (WHILE, "    while step < 3:\n")
PACKER = "prepare.Packer(prepare.set_dir(), manifest()['tokens'], 'train', T + 1, repeat=True)"

# name: (what stands before the training, the name that must be in the ledger)
REPLACED = {
    "a function": ("prepare.cross_entropy = lambda *given: None", "prepare.cross_entropy"),
    "a method": (
        "prepare.LeakCheck._judge_leak = staticmethod(lambda *given: None)",
        "autoresearch.referee.leakcheck.LeakCheck._judge_leak",
    ),
    "a property": ("type(clock).expired = property(lambda self: False)", "clock.Clock.expired"),
    "a class": ("prepare.EvalModel = type('EvalModel', (), {})", "prepare.EvalModel"),
    "a number": (
        "from autoresearch.referee import leakcheck; leakcheck.LOST_NATS = 9.0",
        "autoresearch.referee.leakcheck.LOST_NATS",
    ),
    "a C function that was bound": (
        "from autoresearch.referee import clock as its; its._now = lambda: 0.0",
        "autoresearch.referee.clock._now",
    ),
    "a C function of a module": ("import math; math.log = lambda x: 9.0", "math.log"),
    "the functions of torch": (
        "torch._C._VariableFunctions = type('Mine', (), {'cat': print})()",
        "torch._C._VariableFunctions",
    ),
}
OPENED = {
    "by path": ("open('/etc/hostname')", "/etc/hostname"),
    "by torch": ("torch.save([], '{folder}/../w.pt'); torch.load('{folder}/../w.pt')", "/w.pt"),
    "by numpy": ("import numpy; numpy.fromfile('/etc/hosts', 'u1')", "/etc/hosts"),
    "by a process": ("import subprocess; subprocess.run(['true'])", "true"),
    "training tokens, by hand": (
        "import numpy; numpy.memmap(prepare.set_dir() / '00000.bin', 'u2')",
        "/00000.bin",
    ),
    "training tokens, by locked code": (f"next({PACKER}.batches)", "/00000.idx"),
}


@pytest.fixture
def ledger_of(processes, miniature, tmp_path, monkeypatch):
    """ledger_of(edits) runs train.py with them; what the ledger says of the run."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(miniature))
    (tmp_path / "own").mkdir()

    def run(*edits):
        ran = run_small(processes, tmp_path / "own", edited([THREE_STEPS, *edits]))
        assert ran.code in (0, 1), ran.log
        return joined(read_ledger()[0])[-1]

    return run


def test_an_honest_run_replaces_and_opens_nothing(ledger_of):
    run = ledger_of((TRAIN, "    open(__file__).read()\n    open('/dev/null')\n" + TRAIN))
    assert run["score"] > 0 and run["replaced"] == []
    assert all(what.endswith("/train.py") for what in run["opened"])  # by the fork server


def test_what_is_replaced_stands_in_the_ledger(ledger_of):
    code = "".join(f"    {code}\n" for code, _ in REPLACED.values())
    run = ledger_of((SCORE, code + SCORE))
    for name, (_, wanted) in REPLACED.items():
        assert any(found.endswith(wanted) for found in run["replaced"]), (name, run["replaced"])


def test_what_is_opened_stands_in_the_ledger(ledger_of, tmp_path):
    code = "".join(f"    {code}\n" for code, _ in OPENED.values())
    code = code.replace("{folder}", str(tmp_path / "own"))
    run = ledger_of((TRAIN, code + TRAIN))
    opened = [what for what in run["opened"] if not what.endswith("train.py")]  # by the fork server
    for name, (_, wanted) in OPENED.items():
        assert any(wanted in what for what in opened), (name, opened)
    assert all(any(wanted in what for _, wanted in OPENED.values()) for what in opened)
    assert run["replaced"] == [] and run["score"] > 0


def test_a_linked_environment_is_a_library(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setattr(tampering.sysconfig, "get_path", lambda name: str(tmp_path / "link"))
    place = tampering._place.__wrapped__
    assert place(str(tmp_path / "link/a.py")) == place(str(tmp_path / "real/a.py")) == "library"
    assert place(str(tmp_path / "other/a.py")) == "run"
