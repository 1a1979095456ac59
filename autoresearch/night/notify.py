"""
Tells the human: program.md's line `- notify: COMMAND` is called with one argument, a sentence.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

from autoresearch.common import one_line, utc
from autoresearch.night.settings import setting
from autoresearch.night.store import Night

TIMEOUT = 60  # seconds after which the command and its children are killed


def notify(night: Night, sentence: str):
    """Calls the command, where program.md has one. Returns at once and never raises.

    A process of its own waits for the command, so one that hangs or fails costs the night nothing.
    What it printed and how it ended stands in .night/TAG/notify.log.
    """
    with contextlib.suppress(OSError):
        command = setting("notify", "none")
        if command == "none":
            return
        with open(night.folder / "notify.log", "ab") as log:
            subprocess.Popen(
                [sys.executable, "-m", __name__, command, one_line(sentence, 300)],
                cwd=night.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def call(command: str, sentence: str):
    """Runs the command by the shell; the sentence is its argument and never part of the script."""
    process = subprocess.Popen(
        ["sh", "-c", f'{command} "$1"', "sh", sentence], start_new_session=True
    )
    try:
        ended = f"exit {process.wait(TIMEOUT)}"
    except subprocess.TimeoutExpired:
        ended = f"killed after {TIMEOUT} s"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    print(f"{utc()} {ended}: {sentence}", flush=True)


if __name__ == "__main__":
    call(*sys.argv[1:])
