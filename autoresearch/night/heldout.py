"""
The night's side of referee/heldout.py: the rows of the score for the run that asks, and when it asked.

Standard library only. The files themselves are hidden by the mounts of worker.Isolation.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from pathlib import Path

from autoresearch.common import Fail, cache_dir
from autoresearch.referee.manifest import HELD_OUT, load_manifest


class HeldOut:
    """Hands the open file of a split's rows to a run: once, when it asks.

    Answers "+" with the descriptor; "-" where it was handed out before; "!" where it cannot be read.
    """

    def __init__(self, split: str):
        self.split = split
        self.asked = None  # time.monotonic()
        self._ours, self.theirs = socket.socketpair()

    def serve(self):
        """Once the run has its end of the socket: a thread waits for it to ask."""
        self.theirs.close()
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self):
        with contextlib.suppress(OSError), self._ours:  # the run may end meanwhile
            while self._ours.recv(1):  # empty when it has ended
                if self.asked is not None:
                    self._ours.sendall(b"-")
                    continue
                self.asked = time.monotonic()
                try:
                    rows = os.open(self._path(), os.O_RDONLY)
                except (OSError, Fail):
                    self._ours.sendall(b"!")
                    continue
                socket.send_fds(self._ours, [b"+"], [rows])
                os.close(rows)

    def _path(self) -> Path:
        key = load_manifest(cache_dir() / "manifest.json")["key"]
        return cache_dir() / key / HELD_OUT / f"{self.split}.rows"
