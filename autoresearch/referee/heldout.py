"""
The rows of the score: a file of the prepared set, which the night hides from a run while it trains.

A run of the night has a socket instead. Through it the night hands over the open file, once, to whoever
asks first, and notes when: see night/heldout.py.
"""

from __future__ import annotations

import hashlib
import os
import socket

from autoresearch.common import environment
from autoresearch.referee.clock import fail
from autoresearch.referee.manifest import again, damaged, manifest, open_prepared, rows_path


def hidden() -> bool:
    """Whether the night keeps the rows for this run until it asks to be scored."""
    return "AUTORESEARCH_ROWS" in os.environ


def read_rows(split: str) -> bytes:
    """The packed rows of a split, uint16. Raises Fail where they are damaged, missing or given out."""
    path = rows_path(split)
    with open(_handed_over(), "rb") if hidden() else open_prepared(path) as file:
        content = file.read()
    if hashlib.sha256(content).hexdigest() != manifest()["rows_sha256"][split]:
        raise damaged(path)
    return content


def _handed_over() -> int:
    """The descriptor that the night sends. Raises Fail where it sends none."""
    number = int(environment("AUTORESEARCH_ROWS", "", r"\d+"))
    try:
        with socket.socket(fileno=os.dup(number)) as night:
            night.sendall(b"?")
            answer, descriptors, *_ = socket.recv_fds(night, 1, 1)
    except OSError as error:
        fail(f"the night does not hand over the rows of the score: {error.strerror}")
    if answer == b"-":
        fail("the rows of the score were handed out before: a run asks once, when it has trained")
    if not descriptors:
        fail(f"the night cannot read the rows of the score: {again()}")
    return descriptors[0]
