"""
The agent's process: its output line by line, a log of it, and its end, with all that it has started.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path

from autoresearch.night.clients import Reading

GRACE = 5  # seconds that the agent has for its own end
POLL_SECONDS = 0.5
LOG_BYTES = 20 << 20
LONGEST_LINE = 8 << 20  # bytes of output without a line's end that are held
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# --------------------------------------------------------------------------------------- the output


def follow(process: subprocess.Popen, reading: Reading, reason: Callable[[], str | None]):
    """Yields the readable lines of the output until the process has ended, or there is a reason to.

    What the client has started may hold the pipe open for longer, so its end is not waited for.
    """
    pipe = process.stdout.fileno()
    rest = b""
    ended = False
    last_look = time.monotonic()
    while not ended:
        chunk = None
        if select.select([pipe], [], [], POLL_SECONDS)[0]:
            chunk = os.read(pipe, 1 << 20)
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > LONGEST_LINE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                yield from reading.feed(line.decode(errors="replace"))
        if chunk == b"":  # it has closed its output
            time.sleep(POLL_SECONDS)
        if not chunk or time.monotonic() > last_look + POLL_SECONDS:
            last_look = time.monotonic()
            # With what it had said before it ended, all is read.
            ended = not chunk and process.poll() is not None or bool(reason())
    yield from reading.feed(rest.decode(errors="replace"))


def rest_of(process: subprocess.Popen, reading: Reading):
    """Yields the readable lines of what stands in the pipe of a process that has ended."""
    rest = b""
    while len(rest) < LONGEST_LINE and select.select([process.stdout], [], [], 0)[0]:
        chunk = os.read(process.stdout.fileno(), 1 << 20)
        if not chunk:
            break
        rest += chunk
    process.stdout.close()
    for line in rest.split(b"\n"):
        yield from reading.feed(line.decode(errors="replace"))


class Log:
    """A file that keeps its newest LOG_BYTES."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, lines: Iterable[str]):
        for line in lines:
            with open(self.path, "ab") as file:
                stamp = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
                file.write(f"{stamp} {line}\n".encode(errors="replace"))
                size = file.tell()
            if size > 1.1 * LOG_BYTES:
                with open(self.path, "rb") as file:
                    file.seek(size - LOG_BYTES)
                    file.readline()
                    newest = file.read()
                shorter = self.path.with_suffix(".new")
                shorter.write_bytes(newest)
                os.replace(shorter, self.path)


# ------------------------------------------------------------------------------------ its processes


def end_process(process: subprocess.Popen):
    """Ends the client, as Ctrl-C would, and all that it has started but the night's supervisor."""
    family = descendants(process.pid)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in INTERRUPTS}
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    kill_family(process.pid, family)
    process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)


def kill_family(pid: int, family: list[int]):
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    for child in family:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(child, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """All processes below this one; neither the supervisor nor what it runs."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True)
    children: dict[int, list[int]] = {}
    for line in listed.stdout.splitlines():
        child, parent, *words = line.split(None, 2)
        if "night.py supervise" not in " ".join(words):
            children.setdefault(int(parent), []).append(int(child))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def started(pid: int) -> str:
    """When a process began, in ps's words: with it, a pid names one process for good."""
    listed = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
    return listed.stdout.strip()
