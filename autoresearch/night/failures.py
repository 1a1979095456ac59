"""
A supervisor that ends by an error: which, how often, and what to type.

`.night/TAG/failure.json` holds the last one. The commands start the supervisor again, until it has
ended twice for the same reason with no experiment ended in between; then `begin` does.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

from autoresearch.common import one_line, read_json, write_json
from autoresearch.night.store import Night

MOST = 2  # times that a supervisor may end for the same reason


def _path(night: Night) -> Path:
    return night.folder / "failure.json"


@contextlib.contextmanager
def noted(night: Night, counted: bool = True) -> Iterator[None]:
    """Writes down the error that ends the block, which is the supervisor's work."""
    try:
        yield
    except BaseException as error:
        kind = "" if isinstance(error, SystemExit) else f"{type(error).__name__}: "
        note(night, kind + str(error).removeprefix("FAIL: "), counted)
        raise


def note(night: Night, why: str, counted: bool = True):
    """Writes down why a supervisor ends. counted: no more are started after the second time."""
    why = one_line(why, 400)
    ended = len(night.ended())
    before = last(night)
    same = ended == before.get("ended") and _shape(why) == _shape(before["why"])
    times = 1 + (before["times"] if same else 0) if counted else 1
    failure = {"why": why, "times": times, "ended": ended, "at": time.time()}
    with contextlib.suppress(OSError):  # the disk is full: the commands find that, too
        write_json(_path(night), failure)


def _shape(why: str) -> str:
    """A reason without what differs from time to time: process ids, experiments, seconds."""
    return re.sub(r"[0-9a-f]*\d[0-9a-f]*", "N", why)


def last(night: Night) -> dict:
    """The last failure: why, times, ended (how many experiments had), at; empty where there is none."""
    return read_json(_path(night)) or {}


def forget(night: Night):
    _path(night).unlink(missing_ok=True)


def given_up(night: Night) -> str | None:
    """In one line, why no supervisor is started any more; or None."""
    failure = last(night)
    if failure.get("times", 0) < MOST:
        return None
    return (
        f"nothing runs: the supervisor ended {failure['times']} times: {failure['why']}. "
        "Mend that, then uv run night.py begin"
    )
