"""The ledger: whole lines whatever happens to the writers, and a table that survives any line."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT

WRITER = """
import sys; sys.path.insert(0, sys.argv[1])
import prepare
for i in range(int(sys.argv[3])):
    prepare._append_to_ledger({"event": "end", "writer": sys.argv[2], "i": i, "filler": "x" * (i % 400)})
"""


def writer(cache, name, count):
    return subprocess.Popen([sys.executable, "-c", WRITER, str(ROOT), name, str(count)], env={**os.environ, "AUTORESEARCH_CACHE": str(cache)})


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    import prepare

    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    return tmp_path / "autoresearch.jsonl"


def record(run, event="end", **more):
    return {"event": event, "run": run, "time": "2026-01-01T00:00:00Z", "pid": 2**22 + 1, "commit": "a" * 40, "changed": False, "split": "val",
            "seed": 42, **({"score": 0.5, "training_seconds": 300.0} if event == "end" else {}), **more}


def test_parallel_writers_leave_whole_lines(ledger):
    import prepare

    for process in [writer(ledger.parent, str(n), 125) for n in range(8)]:
        assert process.wait() == 0
    records, damaged = prepare.read_ledger()
    assert damaged == 0 and len(ledger.read_bytes().splitlines()) == 1000
    assert sorted((int(r["writer"]), r["i"]) for r in records) == [(n, i) for n in range(8) for i in range(125)]


def test_killed_at_random_moments(ledger):
    import prepare

    for pause in (0.0, 0.01, 0.03):
        process = writer(ledger.parent, "killed", 10**6)
        while not ledger.exists() or not ledger.stat().st_size:
            time.sleep(0.01)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        prepare._append_to_ledger({"after": pause})
        records, damaged = prepare.read_ledger()
        assert records[-1] == {"after": pause} and damaged <= 1


def test_a_torn_line_is_skipped_and_counted_and_nothing_sticks_to_it(ledger):
    import prepare

    whole = prepare.signed({"n": 1})
    for cut in range(1, len(whole) - 1):
        ledger.write_bytes(whole + whole[:cut])
        prepare._append_to_ledger({"n": 2})
        assert prepare.read_ledger() == ([{"n": 1}, {"n": 2}], 1)


def test_a_ledger_that_cannot_be_written_warns_and_the_run_goes_on(prepared, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(prepared, "manifest", lambda record=prepared.manifest(): record)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "missing"))
    prepared._append_to_ledger({"n": 1})
    (tmp_path / "full").mkdir()
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "full"))
    (tmp_path / "full" / "autoresearch.jsonl").symlink_to("/dev/full")
    prepared._append_to_ledger({"n": 1})
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 2 and all(line.startswith("warning: the ledger") and "the run goes on" in line for line in warnings)


def test_a_read_only_cache(ledger, capfd):
    import prepare

    ledger.write_bytes(b"")
    ledger.chmod(0o400)
    ledger.parent.chmod(0o500)
    try:
        prepare._append_to_ledger({"n": 1})
    finally:
        ledger.parent.chmod(0o700)
    if os.geteuid():  # root writes anyway
        assert "warning: the ledger" in capfd.readouterr().err


def test_without_git_its_part_is_null(prepared, monkeypatch):
    import torch

    monkeypatch.setenv("PATH", "/nonexistent")
    run = prepared._describe_run(torch.device("cpu"))
    assert [run[name] for name in ("repo", "branch", "commit", "changed")] == [None] * 4 and run["fingerprint"]


def test_with_git(prepared, monkeypatch, tmp_path):
    import torch

    script = tmp_path / "train.py"
    script.write_text("1")
    git = lambda *words: subprocess.run(["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e@x", *words], check=True, capture_output=True, text=True).stdout.strip()
    git("init", "-b", "autoresearch/mar5"), git("add", "."), git("commit", "-m", "one")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    def describe():  # as a process that starts now does
        monkeypatch.setattr(prepared, "clock", prepared.Clock())
        return prepared._describe_run(torch.device("cpu"))
    run = describe()
    assert (run["branch"], run["commit"], run["changed"], run["repo"]) == ("autoresearch/mar5", git("rev-parse", "HEAD"), False, str(tmp_path.resolve()))
    script.write_text("2")
    edited_meanwhile = prepared._describe_run(torch.device("cpu"))
    assert edited_meanwhile["changed"] is True and edited_meanwhile["train_sha256"] == run["train_sha256"]  # what really runs
    changed = describe()
    assert changed["changed"] is True and changed["train_sha256"] != run["train_sha256"] and changed["run"] != run["run"]


def table(ledger):
    return subprocess.run([sys.executable, ROOT / "prepare.py", "--runs"], env={**os.environ, "AUTORESEARCH_CACHE": str(ledger.parent)}, capture_output=True, text=True)


def test_the_table(ledger):
    import prepare

    lines = [record("a", "start"), record("a"), record("b", "start"), record("c", "start", pid=os.getpid()), record("d", "start"),
             {**record("d", failure="trained 412 s on a 300 s budget"), "score": None}, record("e", commit=None, changed=None, score=0.25)]
    lines[5].pop("score")
    ledger.write_bytes(b"".join(map(prepare.signed, lines)) + b'{"torn')
    done = table(ledger)
    head, *rows, foot = done.stdout.splitlines()
    assert done.returncode == 0 and not done.stderr
    assert [row.split("  ")[-1] for row in rows] == ["scored", "crashed", "running", "trained 412 s on a 300 s budget", "scored"]
    assert "0.500000" in rows[0] and "aaaaaaa" in rows[0] and " 300.0" in rows[0] and "0.250000" in rows[4]
    assert foot.startswith("5 runs, 1 damaged lines skipped")


def test_no_ledger_is_an_empty_table(ledger):
    assert table(ledger).stdout.splitlines()[-1].startswith("0 runs")


def test_hostile_lines(ledger, capsys):
    import prepare

    good = record("good")
    hostile = [{**good, "run": "h", key: value} for key in good for value in ([], {}, None, -1, 10**30, "\x1b]0;x\x07", "\u202e", True)]
    hostile += [{}, {"run": "x"}, {**good, "run": ["x"]}]
    ledger.write_bytes(b"".join(map(prepare.signed, [*hostile, good])) + b"[]\nnull\n1\n\xff\xfe\n" + b"[" * 100_000 + b"\n" + b'{"checksum": []}\n' + b"9" * 5000 + b"\n")
    prepare.show_runs()
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "\u202e" not in out
    assert "damaged lines skipped" in out and out.count("scored") >= 1
