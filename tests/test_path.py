"""The whole path on a miniature prepared set, as a user types it."""

import re

from miniature import run, write_texts

KEYS = """val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M num_steps
num_params_M depth device attention device_batch_size seed fingerprint loss_curve compiled
dtype torch driver""".split()


def test_from_nothing_to_a_score(tmp_path):
    texts = write_texts(tmp_path / "texts")
    small = ("--seq-len", 64, "--vocab-size", 300, "--eval-tokens", 2048, "--time-budget", 5)
    cache = tmp_path / "cache"
    assert run("prepare.py", "--data", texts, *small, cache=cache).returncode == 0
    done = run("train.py", cache=cache, TORCH_COMPILE_DISABLE="1")
    assert done.returncode == 0, done.stderr
    log, summary = done.stdout.split("---\n")
    assert [line.split(": ")[0] for line in summary.splitlines()] == KEYS
    assert re.search(r"^val_bpb: \d\.\d{6}$", summary, re.M)
    assert len(log.splitlines()) < 40
