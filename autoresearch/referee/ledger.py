"""
The ledger: `autoresearch.jsonl` in the cache, to which locked code appends what was measured.

Two lines a run, joined by its id: `start` with the first batch, `end` with the score or the
failure. Each line carries a checksum. No numpy here: the night imports it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from autoresearch.common import append_line, cache_dir, parse_signed, signed


def ledger_path() -> Path:
    return cache_dir() / "autoresearch.jsonl"


def append_record(record: dict):
    """One line in one write. A ledger that cannot be written warns and does not lose the run."""
    try:
        append_line(ledger_path(), signed(record))
    except OSError as error:
        print(
            f"warning: the ledger {ledger_path()} cannot be written ({error.strerror}); "
            "the run continues",
            file=sys.stderr,
            flush=True,
        )


def read_ledger(start: int = 0) -> tuple[list[dict], int]:
    """(the ledger's records, oldest first; how many lines were damaged and skipped).

    start: the byte from which on it is read, where a line begins.
    """
    if not ledger_path().is_file():
        return [], 0
    with open(ledger_path(), "rb") as file:
        file.seek(start)
        lines = file.read().split(b"\n")
    records = []
    damaged = 0
    for line in filter(None, lines):
        try:
            records.append(parse_signed(line))
        except ValueError:
            damaged += 1
    return records, damaged


def joined(records: list[dict]) -> list[dict]:
    """One dictionary a run, its start and its end together, oldest first.

    `began` is the time of its first batch; a run that was cut off has no `score` and no `failure`.
    """
    runs: dict[str, dict] = {}
    for record in records:
        if "run" in record:
            run = runs.setdefault(record["run"], {})
            run.update(record)
            if record.get("event") == "start":
                run["began"] = record.get("time")
    return list(runs.values())
