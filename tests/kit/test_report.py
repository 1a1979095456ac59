"""What a run prints: the curve, the lines, the rate, a loss that diverged; and how it ends."""

import itertools
import math
import re

import pytest
import torch
from forks import Forks, assert_failed

from autoresearch.kit import report
from autoresearch.referee.clock import clock

# ----------------------------------------------------------------------------- while it trains


def test_a_line_holds_mean_and_rate_since_the_last(capsys, monkeypatch):
    seconds = itertools.count(1e6, 2.5)  # 2.5 s between two lines, of five steps
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(seconds))
    progress = report.Progress(tokens_per_step=1000, budget=100)
    for i in range(100):
        progress.add(i / 100, torch.tensor(float(i)))
    progress.close()
    _, *lines, _ = capsys.readouterr().out.splitlines()
    shown = [re.match(r" *([\d.]+)%  step +(\d+)  loss ([\d.]+) ", line) for line in lines]
    assert [match.groups() for match in shown[:3]] == [
        ("0.0", "1", "0.0000"),
        ("5.0", "6", "3.0000"),
        ("10.0", "11", "8.0000"),
    ]
    assert all("  2,000 tokens/s" in line for line in lines[1:3])
    assert 19 <= len(lines) <= 20


class LossOnAGpu:
    """A loss that is there only when the device has got so far."""

    device = torch.device("cuda")

    def __init__(self, value):
        self.value = value
        self.waited_for = False

    def item(self):
        self.waited_for = True
        return self.value


def test_a_loss_on_a_gpu_is_read_one_step_late_and_the_last_one_at_the_end():
    progress = report.Progress(tokens_per_step=1000, budget=100)
    losses = [LossOnAGpu(value) for value in (6.0, 4.0, 5.0)]
    for i, loss in enumerate(losses):
        progress.add(i / 3, loss)
        assert [loss.waited_for for loss in losses] == [number < i for number in range(3)]
    progress.close()
    assert progress.curve() == [6, 6, 6, 4, 4, 4, 5, 5, 5, 5]


@pytest.mark.parametrize("value", [math.nan, 101.0])
@pytest.mark.parametrize("on_a_gpu", [False, True])
def test_a_loss_that_diverged_ends_the_run(value, on_a_gpu):
    loss = LossOnAGpu if on_a_gpu else torch.tensor
    progress = report.Progress(tokens_per_step=1000, budget=100)
    progress.add(0.0, loss(100.0))
    with pytest.raises(SystemExit, match=f"FAIL: loss diverged at step 2: it is {value}"):
        progress.add(0.5, loss(value))
        progress.close()


# ------------------------------------------------------------------------------------- summary


def test_the_summary_counts_tokens_and_the_share_of_the_peak(monkeypatch, capsys):
    monkeypatch.setenv("AUTORESEARCH_SPLIT", "test")
    monkeypatch.setattr(type(clock), "elapsed", property(lambda self: 10.0))
    monkeypatch.setattr(report, "device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(report, "fingerprint", lambda: "0123456789ab")
    # Two files of training text, 2^20 tokens together: five steps read it five times.
    files = [{"tokens": {"train": n, "val": 7}} for n in (2**19 - 3, 2**19 + 3)]
    monkeypatch.setattr(report, "manifest", lambda: {"tokens": files})
    progress = report.Progress(tokens_per_step=2**20, budget=10)
    for i in range(5):
        progress.add(i / 5, torch.tensor(3.0))
    progress.close()
    report.summary(
        1.5,
        progress,
        torch.device("cpu"),
        counts=(50_300_000, 3e8),
        depth=8,
        batch=32,
        conditions=dict(attention="flex", compiled=True, dtype="bfloat16"),
    )
    log = capsys.readouterr().out
    assert "mfu_percent is 0" not in log
    assert "the training text was read 5.0 times" in log
    pairs = [line.split(": ") for line in log.split("---\n")[1].splitlines()]
    assert pairs[0] == ["test_bpb", "1.500000"]
    values = dict(pairs)
    # 5 x 2^20 tokens x 3e8 / 10 s / 312e12
    assert values["mfu_percent"] == f"{100 * 5 * 2**20 * 3e8 / 10 / 312e12:.2f}" == "50.41"
    assert (values["total_tokens_M"], values["num_params_M"]) == ("5.2", "50.3")
    assert (values["compiled"], values["device_batch_size"]) == ("yes", "32")


# ------------------------------------------------------------------------------- how a run ends


@pytest.fixture(scope="module")
def processes():
    forks = Forks("import torch\nfrom autoresearch.kit import report")
    yield forks
    forks.close()


ENDS = {
    "sys.exit(0)": "exit(0) was called before the end of main()",
    "pass": "main() returned without a score",
    "raise KeyboardInterrupt": "interrupted: no score",
    "raise KeyError('wdith')": "KeyError: 'wdith' (the traceback is above)",
    "raise Fail('no tokenizer:\\nuv run prepare.py')": "no tokenizer: uv run prepare.py",
    "raise torch.OutOfMemoryError('CUDA out of memory. Tried')": "out of memory: lower DEVICE_BATCH",
}


@pytest.mark.parametrize("line", ENDS)
def test_whatever_ends_main_is_one_line(processes, tmp_path, line):
    main = f"""
import sys, torch
from autoresearch.common import Fail
from autoresearch.kit import report

def main():
    print("still here")
    {line}

report.guard(main)
"""
    ran = processes.run(main, AUTORESEARCH_CACHE=str(tmp_path))
    assert_failed(ran, ENDS[line])
    assert ran.lines[0] == "still here"
    assert ("Traceback" in ran.log) == ("above" in ran.lines[-1])
