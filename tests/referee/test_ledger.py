"""The ledger: whole lines whatever happens to its writers, and records or nothing to its readers."""

import os
import subprocess
import sys

import pytest
from miniature import ROOT

from autoresearch.common import signed
from autoresearch.referee.ledger import append_record, joined, read_ledger

WRITER = """
import sys; sys.path.insert(0, sys.argv[1])
from autoresearch.referee.ledger import append_record
for i in range(int(sys.argv[3])):
    record = {"event": "end", "writer": sys.argv[2], "i": i, "filler": "x" * (i % 400)}
    append_record(record)
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
    records, damaged = read_ledger()
    assert damaged == 0 and len(ledger.read_bytes().splitlines()) == 1000
    written = sorted((int(record["writer"]), record["i"]) for record in records)
    assert written == [(n, i) for n in range(8) for i in range(125)]


def test_a_torn_line_is_skipped_and_counted_and_nothing_sticks_to_it(ledger):
    whole = signed({"n": 1})
    for cut in range(1, len(whole) - 1):
        ledger.write_bytes(whole + whole[:cut])
        append_record({"n": 2})
        assert read_ledger() == ([{"n": 1}, {"n": 2}], 1)


def test_a_ledger_that_cannot_be_written_warns_and_the_run_goes_on(ledger, monkeypatch, capfd):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(ledger.parent / "missing"))
    append_record({"n": 1})
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(ledger.parent))
    ledger.symlink_to("/dev/full")
    append_record({"n": 1})
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 2
    for line in warnings:
        assert line.startswith("warning: the ledger") and "the run continues" in line


# ---- reading


def test_reading_goes_on_where_it_ended(ledger):
    records = [{"n": n} for n in range(5)]
    ends = [0]
    for record in records:
        append_record(record)
        ends.append(ledger.stat().st_size)
    for n, end in enumerate(ends):
        assert read_ledger(end) == (records[n:], 0)


HOSTILE = [b"null", b"\xff\xfe", b"[" * 100_000, b'{"checksum": []}', b"9" * 5000]


def test_hostile_lines_are_skipped_and_counted(ledger):
    good = {"event": "end", "run": "a" * 12}
    ledger.write_bytes(b"\n".join([*HOSTILE, b"", signed(good)]))
    assert read_ledger() == ([good], len(HOSTILE))


def test_a_run_is_its_start_and_its_end_together(ledger):
    begun = {"event": "start", "run": "a" * 12, "time": "2026-11-20T10:00:00Z", "seed": 42}
    other = {**begun, "run": "b" * 12}
    ended = {"event": "end", "run": "a" * 12, "time": "2026-11-20T10:05:00Z", "score": 1.5}
    for record in (begun, other, {"event": "note"}, ended):
        append_record(record)
    runs = joined(read_ledger()[0])
    assert runs == [
        {**begun, **ended, "began": "2026-11-20T10:00:00Z"},
        {**other, "began": "2026-11-20T10:00:00Z"},
    ]
