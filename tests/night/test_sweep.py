"""The sweep: dimensions in comments, proposals, and a night of both agent and sweep."""

import random
import signal
import time

import pytest
from lab import needs_proc
from miniature import ROOT

from autoresearch.common import Fail
from autoresearch.night import sweep
from autoresearch.night.sweep import dimensions, masked, with_values

TEXT = b"""class Settings:
    LR = 0.04  # for all; sweep: 0.01..0.16 log
    DEPTH = 3  # sweep: 1..8
class CPU(Settings):
    BATCH = 64  # sweep: 32, 64, 128
#define TILE 16 // sweep: 8, 16
x = [1, 2]  # no dimension: a sweep of nothing
"""


def test_dimensions_are_read_from_comments_and_values_put_in_place_of_their_literals():
    dims = dimensions({"a.py": TEXT})
    assert [dim.name for dim in dims] == ["LR", "DEPTH", "CPU.BATCH", "TILE"]
    assert [dim.value() for dim in dims] == [0.04, 3, "64", "16"]
    assert (dims[0].log, dims[0].whole, dims[1].whole) == (True, False, True)
    values = {"LR": 0.0312345, "DEPTH": 5, "CPU.BATCH": "128", "TILE": "8"}
    text = with_values({"a.py": TEXT}, dims, values)["a.py"].decode()
    assert "LR = 0.03123  # for all" in text and "DEPTH = 5  #" in text
    assert "BATCH = 128  #" in text and "#define TILE 8 //" in text
    assert masked({"a.py": text.encode()}) == masked({"a.py": TEXT})
    assert masked({"a.py": TEXT.replace(b"[1, 2]", b"[1, 3]")}) != masked({"a.py": TEXT})
    assert [dim.name for dim in sweep.chosen(dims, ["CPU", "LR"])] == ["LR", "CPU.BATCH"]
    assert [dim.name for dim in sweep.chosen(dims, [])] == ["LR", "DEPTH", "TILE"]
    with pytest.raises(Fail, match="--dims NO: the dimensions of train.py are LR, DEPTH"):
        sweep.chosen(dims, ["NO"])


@pytest.mark.parametrize(
    "line, says",
    [
        ("LR = x  # sweep: 0..1", "a dimension is one number behind a name"),
        ("LR = 1  # sweep: 2..1", "the range must rise"),
        ("LR = 1  # sweep: 0..1 log", "begin above 0"),
        ("LR = 1  # sweep: 5", "say a range"),
    ],
)
def test_a_comment_that_says_no_dimension_is_named(line, says):
    with pytest.raises(Fail, match=f"a.py, line 1: .*{says}"):
        dimensions({"a.py": line.encode()})


def test_train_py_offers_its_dimensions_for_every_size():
    dims = dimensions({"train.py": (ROOT / "train.py").read_bytes()})
    shared = [dim.name for dim in sweep.chosen(dims, [])]
    assert "MUON_LR" in shared and len(shared) == 8
    assert {"CPU.WARMDOWN", "H100.HEAD_LR", "GPU.EMBEDDING_LR"} <= {dim.name for dim in dims}
    assert all(dim.value() is not None for dim in dims)  # the present value lies in its range


def test_proposals_find_an_optimum_that_random_values_do_not():
    pytest.importorskip("optuna", reason="needs Optuna: uv sync --group sweep")
    text = b"A = 0.5  # sweep: 0.0..1.0\nB = 0.1  # sweep: 0.001..1.0 log\nC = 4  # sweep: 0..20\n"
    dims = dimensions({"a.py": text})

    def bad(values: dict) -> float:
        return (values["A"] - 0.8) ** 2 + (values["C"] / 20 - 0.3) ** 2 + abs(values["B"] - 0.02)

    def best_of_40(draw) -> float:
        told: list[tuple[dict, float]] = []
        for i in range(40):
            values = draw(told, i)
            told.append((values, bad(values)))
        return min(score for _, score in told)

    numbers = random.Random(0)

    def randomly(told, i):
        a, b, c = (numbers.random() for _ in range(3))
        return {"A": a, "B": 0.001**b, "C": round(20 * c)}

    swept = sum(
        best_of_40(lambda told, i, s=s: sweep.propose(dims, told, 100 * s + i)) for s in range(3)
    )
    assert swept < 0.75 * sum(best_of_40(randomly) for _ in range(3))
    told = [({"A": 0.1, "B": 0.1, "C": 3}, 1.0)] * 10
    assert sweep.propose(dims, told, 7) == sweep.propose(dims, told, 7)  # after a kill, too


@needs_proc
def test_agent_and_sweep_share_a_night_that_is_killed(fresh, tmp_path):
    pytest.importorskip("optuna", reason="needs Optuna: uv sync --group sweep")
    lab = fresh.copy(tmp_path / "it")
    text = (lab.root / "train.py").read_text()
    (lab.root / "train.py").write_text(text.replace("WIDTH = 0", "WIDTH = 0.0  # sweep: -3.0..3.0"))
    lab.git("commit", "-qam", "a dimension")
    lab.say("begin")
    lab.until_ended(3)
    process = lab.start("sweep", "--experiments", 8)
    lab.until(lambda: any(r["kind"] == "sweep" for r in lab.journal()))
    n = lab.attempt("deeper", DEPTH=1)
    lab.until_ended(n)
    process.send_signal(signal.SIGKILL)
    lab.kill_supervisor()
    process.communicate()
    out = lab.say("sweep", "--experiments", 4)
    assert out.startswith("sweeping WIDTH; Ctrl-C ends it\n") and out.count(": sweep: WIDTH") == 4
    lab.say()
    time.sleep(0.1)
    lab.until(lambda: lab.queue() == [])
    lab.say()
    lab.check()
    swept = [record for record in lab.records() if record["kind"] == "sweep"]
    assert len(swept) >= 5 and all(r["message"].startswith("sweep: WIDTH ") for r in swept)
    assert lab.best()["score"] < 0.985
    assert "a sweep needs" not in out
