"""The whole path on a miniature prepared set, as a user types it."""

import re

from miniature import MINIATURE, run, write_texts


def test_from_nothing_to_a_score(tmp_path):
    texts = write_texts(tmp_path / "texts")
    small = (*MINIATURE, "--time-budget", 5)
    assert run("prepare.py", "--data", texts, *small, cache=tmp_path / "cache").returncode == 0
    done = run("train.py", cache=tmp_path / "cache", TORCH_COMPILE_DISABLE="1")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^---\nval_bpb: \d\.\d{6}$", done.stdout, re.M)
    assert len(done.stdout.splitlines()) < 60
