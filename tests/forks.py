"""A fork server: it imports once what takes seconds, and forks for each thing it is asked to run."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from miniature import ROOT


@dataclass
class Ran:
    code: int  # as a shell says it: 128 + n for signal n
    log: str  # stdout and stderr in one, as `> run.log 2>&1` writes them

    @property
    def lines(self) -> list[str]:
        return self.log.splitlines()

    def find(self, key: str) -> str:
        """The value of a line `key: value`."""
        return re.search(rf"^{key}: (.*)$", self.log, re.M)[1]


def assert_failed(ran: Ran, *words: str):
    """Exit code 1, no score, and one line `FAIL: ` with these words, the last of the log."""
    assert ran.code == 1, ran.log
    assert ran.lines[-1].startswith("FAIL: "), ran.log
    assert sum(line.startswith("FAIL: ") for line in ran.lines) == 1, ran.log
    assert "_bpb: " not in ran.log
    assert all(word in ran.lines[-1] for word in words), ran.log


class Forks:
    """`imports` are run once; each `run` is a fork of that, so it costs no second."""

    def __init__(self, imports: str, cwd: Path = ROOT, **environment):
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self.process = subprocess.Popen(
            [sys.executable, __file__, imports],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": path, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, python: str, terminal=False, interrupt_at=None, **environment) -> Ran:
        """The exit code and the output of a child that runs `python`.

        environment: variables of the child, None to unset one; terminal: its output is one;
        interrupt_at: Ctrl-C as soon as its output holds this text.
        """
        asked = [python, terminal, interrupt_at, environment]
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the server ended: an error in its imports?"
        return Ran(**json.loads(answer))

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


def child(python: str, output: int, environment: dict):
    """Runs it and ends the process."""
    signal.alarm(240)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    code = 1
    try:
        exec(python, {"__name__": "__child__"})
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def answer(python, terminal, interrupt_at, environment) -> dict:
    ours, theirs = pty.openpty() if terminal else os.pipe()
    pid = os.fork()
    if pid == 0:
        child(python, theirs, environment)
    os.close(theirs)
    log = b""
    while part := read(ours):
        log += part
        if interrupt_at and interrupt_at.encode() in log:
            os.kill(pid, signal.SIGINT)
            interrupt_at = None
    os.close(ours)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {"code": code if code >= 0 else 128 - code, "log": log.decode()}


def read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # a terminal whose other side is closed
        return b""


if __name__ == "__main__":
    exec(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line))), flush=True)
