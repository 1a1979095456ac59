"""The ledger: whole lines whatever happens to the writers, and all that is known of a run."""

import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from miniature import ROOT, draw_a_batch

import prepare

CPU = torch.device("cpu")
WRITER = """
import sys; sys.path.insert(0, sys.argv[1])
import prepare
for i in range(int(sys.argv[3])):
    record = {"event": "end", "writer": sys.argv[2], "i": i, "filler": "x" * (i % 400)}
    prepare._append_to_ledger(record)
"""


def writer(cache, name: str, count: int) -> subprocess.Popen:
    env = {**os.environ, "AUTORESEARCH_CACHE": str(cache)}
    return subprocess.Popen([sys.executable, "-c", WRITER, str(ROOT), name, str(count)], env=env)


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    return tmp_path / "autoresearch.jsonl"


# ---- lines


def test_parallel_writers_leave_whole_lines(ledger):
    for process in [writer(ledger.parent, str(n), 125) for n in range(8)]:
        assert process.wait() == 0
    records, damaged = prepare.read_ledger()
    assert damaged == 0 and len(ledger.read_bytes().splitlines()) == 1000
    written = sorted((int(record["writer"]), record["i"]) for record in records)
    assert written == [(n, i) for n in range(8) for i in range(125)]


def test_killed_at_random_moments(ledger):
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
    whole = prepare.signed({"n": 1})
    for cut in range(1, len(whole) - 1):
        ledger.write_bytes(whole + whole[:cut])
        prepare._append_to_ledger({"n": 2})
        assert prepare.read_ledger() == ([{"n": 1}, {"n": 2}], 1)


def test_a_ledger_that_cannot_be_written_warns_and_the_run_goes_on(ledger, monkeypatch, capfd):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(ledger.parent / "missing"))
    prepare._append_to_ledger({"n": 1})
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(ledger.parent))
    ledger.symlink_to("/dev/full")
    prepare._append_to_ledger({"n": 1})
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 2
    for line in warnings:
        assert line.startswith("warning: the ledger") and "the run goes on" in line


def test_a_read_only_cache(ledger, capfd):
    ledger.write_bytes(b"")
    ledger.chmod(0o400)
    ledger.parent.chmod(0o500)
    try:
        prepare._append_to_ledger({"n": 1})
    finally:
        ledger.parent.chmod(0o700)
    if os.geteuid():  # root writes anyway
        assert "warning: the ledger" in capfd.readouterr().err


# ---- reading


def test_no_ledger_has_no_records(ledger):
    assert prepare.read_ledger() == prepare.read_ledger(5) == ([], 0)


def test_reading_goes_on_where_it_ended(ledger):
    records = [{"n": n} for n in range(5)]
    ends = [0]
    for record in records:
        prepare._append_to_ledger(record)
        ends.append(ledger.stat().st_size)
    for n, end in enumerate(ends):
        assert prepare.read_ledger(end) == (records[n:], 0)
    assert prepare.read_ledger(ends[-1] + 100) == ([], 0)


HOSTILE = [
    b"[]",
    b"null",
    b"1",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"checksum": []}',
    b'{"checksum": "0123456789abcdef"}',
    b"9" * 5000,
]


def test_hostile_lines_are_skipped_and_counted(ledger):
    good = {"event": "end", "run": "a" * 12}
    ledger.write_bytes(b"\n".join([*HOSTILE, b"", prepare.signed(good)]))
    assert prepare.read_ledger() == ([good], len(HOSTILE))


def test_twenty_thousand_lines_are_read_in_a_moment(ledger):
    record = {
        "event": "end",
        "run": "a" * 12,
        "pace": [[15.001 * i, 131072 * i] for i in range(19)],
    }
    record.update({f"field {i}": "some words of its value" for i in range(20)})
    ledger.write_bytes(prepare.signed(record) * 20_000)
    began = time.process_time()
    records, damaged = prepare.read_ledger()
    assert time.process_time() - began < 3  # about 1 on a quiet machine
    assert (len(records), damaged) == (20_000, 0)


# ---- what is said of a run


def git(directory, *words) -> str:
    command = ["git", "-C", directory, "-c", "user.name=n", "-c", "user.email=e@x", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def describe_as(script, monkeypatch) -> dict:
    """What a process that starts now with this script says of itself."""
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    monkeypatch.setattr(prepare, "clock", prepare.Clock())
    return prepare._describe_run(CPU)


def test_without_git_its_part_is_null(prepared, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    run = prepared._describe_run(CPU)
    assert [run[name] for name in ("repo", "branch", "commit", "changed")] == [None] * 4
    assert run["fingerprint"] == prepared.fingerprint() and run["torch"] == torch.__version__


def test_with_git(prepared, monkeypatch, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("1")
    git(tmp_path, "init", "-b", "autoresearch/mar5")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    (tmp_path / "run.log").write_text("what else lies there is no change of the script")
    run = describe_as(script, monkeypatch)
    assert run["branch"] == "autoresearch/mar5" and run["commit"] == git(
        tmp_path, "rev-parse", "HEAD"
    )
    assert run["changed"] is False and run["repo"] == str(tmp_path.resolve())
    assert run["train_sha256"] == hashlib.sha256(b"1").hexdigest()
    script.write_text("2")
    edited_meanwhile = prepared._describe_run(CPU)
    assert edited_meanwhile["changed"] is True
    assert edited_meanwhile["train_sha256"] == run["train_sha256"]  # what really runs
    changed = describe_as(script, monkeypatch)
    assert changed["changed"] is True and changed["run"] != run["run"]
    assert changed["train_sha256"] == hashlib.sha256(b"2").hexdigest()


def test_a_run_takes_the_id_it_is_given(prepared_copy, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_RUN", "0123456789ab")
    draw_a_batch(prepared_copy)
    (start,), _ = prepared_copy.read_ledger()
    assert start["run"] == "0123456789ab"


@pytest.mark.parametrize("given", ["0123456789a", "0123456789abc", "0123456789AB", "../../../etc"])
def test_an_id_of_another_form_is_refused(prepared, monkeypatch, given):
    monkeypatch.setenv("AUTORESEARCH_RUN", given)
    with pytest.raises(prepared.Stop, match="AUTORESEARCH_RUN"):
        prepared._describe_run(CPU)


def test_a_run_ends_once(prepared_copy):
    draw_a_batch(prepared_copy)
    with pytest.raises(prepared_copy.Stop, match="first"):
        prepared_copy.fail("first")
    with pytest.raises(prepared_copy.Stop, match="second"):
        prepared_copy.fail("second")
    records, _ = prepared_copy.read_ledger()
    assert [record.get("failure") for record in records] == [None, "first"]


def test_imported_files_are_those_that_no_package_brought(prepared, tmp_path, monkeypatch):
    here = tmp_path / "night"
    (here / "inner").mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    compiled = tmp_path / "compiled"
    compiled.mkdir()
    (here / "train.py").write_text("")
    (here / "inner" / "helper_of_mine.py").write_text("a = 1\n")
    (elsewhere / "helper_of_theirs.py").write_text("b = 2\n")
    (compiled / "made_by_the_compiler.py").write_text("c = 3\n")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(here / "train.py"), raising=False)
    monkeypatch.setattr(prepared, "clock", prepared.Clock())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    before = set(prepared._imported())
    for folder in (here / "inner", elsewhere, compiled):
        monkeypatch.syspath_prepend(folder)
    names = ["helper_of_mine", "helper_of_theirs", "made_by_the_compiler"]
    for name in names:
        importlib.import_module(name)
    try:
        imported = prepared._imported()
    finally:
        for name in names:
            del sys.modules[name]
    assert {name: imported[name] for name in set(imported) - before} == {
        "inner/helper_of_mine.py": hashlib.sha256(b"a = 1\n").hexdigest()[:16],
        str(elsewhere / "helper_of_theirs.py"): hashlib.sha256(b"b = 2\n").hexdigest()[:16],
    }
    assert not [name for name in imported if "/torch/" in name or "pathlib" in name]
    assert json.dumps(imported)
    assert not {"train.py", str(ROOT / "prepare.py")} & set(imported)
