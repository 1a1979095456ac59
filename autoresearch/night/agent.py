"""
`night.py agent`: starts the coding agent again and again, for agents end: by themselves, at a plan's
limit, or with a full context.

    .night/agent          locked while it works: one agent at a time edits the file
    .night/TAG/agent.json what it does now, for the status
    .night/TAG/agent.log  the agent's output with times, the newest 20 MB

Each session has its line in the journal, kind `session`. Killed at any moment, nothing is lost: the
queue is worked off, and the same command continues.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from autoresearch.common import Fail, append_line, lock, one_line, read_json, utc, write_json
from autoresearch.night import journal
from autoresearch.night.clients import CLIENTS, Reading
from autoresearch.night.notify import notify
from autoresearch.night.processes import (
    GRACE,
    INTERRUPTS,
    POLL_SECONDS,
    Log,
    descendants,
    end_process,
    follow,
    kill_family,
    rest_of,
    started,
)
from autoresearch.night.report import cost_line, cost_of
from autoresearch.night.store import Night
from autoresearch.night.supervisor import wake
from autoresearch.night.worker import die_with_parent

FIRST_PAUSE, LONGEST_PAUSE = 30, 1800  # seconds between sessions; doubled by one without experiment
LONGEST_LIMIT = 6 * 3600  # seconds that a limit's reset time is waited for
AT_ONCE = 300  # seconds; a first session that failed sooner, with nothing done, is not repeated
FAILURES = 5  # sessions in a row without an experiment, of which the human is told


@dataclass(frozen=True)
class Ends:
    """When no further session starts, and the present one is ended; None: never."""

    until: float | None = None  # seconds since 1970
    experiments: int | None = None  # of the whole night, without the baseline
    dollars: float | None = None  # of all sessions of the night

    def reason(self, night: Night, tries: int) -> str | None:
        if night.stopped():
            return "the night was stopped"
        if self.until is not None and time.time() >= self.until:
            return "its time is over"
        if self.experiments is not None and tries >= self.experiments:
            return f"{tries} experiments are queued or have ended"
        if self.dollars is not None and spent(night) >= self.dollars:
            return f"${spent(night):.2f} are spent"
        return None


# ------------------------------------------------------------------------------------- the command


def agent(night: Night, name: str | None, command: list[str], args) -> None:
    """Runs sessions of a client (name, or any command) until one of the ends is reached.

    args: until (HH:MM), hours, experiments, usd. Raises Fail where the first session shows that the
    client does not work: missing, not logged in, a flag that it refuses.
    """
    if night.begun() and night.stopped():
        raise Fail("the night was stopped: uv run night.py begin continues it, then the agent")
    ends = Ends(until_of(args.until, args.hours), args.experiments, args.usd)
    words, environment = command_of(name, command)
    if ends.dollars and name and not CLIENTS[name].budget:
        raise Fail(f"{name} reports no dollars: take --experiments, --hours or --until")
    name = name or Path(words[0]).name
    if shutil.which(words[0]) is None:
        client = CLIENTS.get(name)
        install = f": {client.install}" if client else ""
        raise Fail(f"{words[0]} is not installed, or not on PATH{install}")
    with night.lock("agent", 1) as ours:
        if not ours:
            raise Fail("an agent is at work in this folder already: uv run night.py shows it")
        night.folder.mkdir(parents=True, exist_ok=True)
        end_leftover(night)
        given = " ".join(f"{key}={shlex.quote(value)}" for key, value in environment.items())
        print(f"the agent's command:\n\n    {given} {shlex.join(words)} < /dev/null\n", flush=True)
        for number in INTERRUPTS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, signal.default_int_handler)
        Sessions(night, name, words, environment, ends).work()


def command_of(name: str | None, command: list[str]) -> tuple[list[str], dict[str, str]]:
    """(the words, the variables) of a preset, or of a command that may begin with NAME=value."""
    if bool(name) == bool(command):
        raise Fail("which agent? uv run night.py agent claude, agent codex, or agent -- COMMAND")
    if name:
        return list(CLIENTS[name].command), dict(CLIENTS[name].environment)
    words = list(command)
    environment = {}
    while words and re.match(r"[A-Za-z_]\w*=", words[0]):
        key, _, environment[key] = words.pop(0).partition("=")
    if not words:
        raise Fail("agent -- COMMAND: the command is missing")
    return words, environment


def until_of(clock: str | None, hours: float | None) -> float | None:
    """Seconds since 1970 of the next HH:MM, or of so many hours from now; the earlier of the two."""
    moments = []
    if clock:
        try:
            time_of_day = datetime.strptime(clock, "%H:%M").time()
        except ValueError:
            raise Fail(f"--until {one_line(clock, 20)}: it takes a time of day as 07:30") from None
        now = datetime.now()
        then = datetime.combine(now, time_of_day)
        moments.append((then + timedelta(days=then <= now)).timestamp())
    if hours:
        moments.append(time.time() + 3600 * hours)
    return min(moments, default=None)


# -------------------------------------------------------------------------------------- the sessions


class Sessions:
    """One agent's sessions, one after another."""

    def __init__(self, night: Night, name: str, words: list[str], environment: dict, ends: Ends):
        self.night, self.name, self.ends = night, name, ends
        self.words, self.environment = words, environment
        self.log = Log(night.folder / "agent.log")
        self.count = 0  # of sessions so far
        self.why = ""  # the last session's last words

    def work(self):
        print(f"its output: {self.log.path.relative_to(self.night.root)}", flush=True)
        pause, fruitless = FIRST_PAUSE, 0
        try:
            while not (reason := self.reason()):
                session, reading = self.session()
                reset = reading.reset_time(time.time())
                if reason := self.reason():
                    break
                if self.ends.dollars and reading.dollars is None:
                    reason = f"{self.name} reports no dollars, and --usd was asked for"
                    break
                if session["experiments"]:
                    pause, fruitless = FIRST_PAUSE, 0
                elif not reset:
                    fruitless += 1
                    self.check_first(session, fruitless)
                if fruitless == FAILURES:
                    self.tell(f"{FAILURES} sessions without an experiment; the last: {self.why}")
                if reset:
                    wait = min(max(reset - time.time(), FIRST_PAUSE), LONGEST_LIMIT)
                else:
                    wait = pause
                    pause = pause if session["experiments"] else min(2 * pause, LONGEST_PAUSE)
                self.rest(wait)
        except KeyboardInterrupt:
            reason = "interrupted"
        except Fail as failure:
            self.state("ended", reason=str(failure).removeprefix("FAIL: "))
            raise
        self.state("ended", reason=reason)
        queue = ""
        if self.night.begun() and not self.night.stopped():
            wake(self.night)  # the client may have been ended between queueing and this
            left = len(self.night.open())
            queue = f"; {left} experiments wait or run and are worked off" if left else ""
        self.tell(f"the agent ended: {reason}{queue}")
        print("next: uv run night.py")

    def reason(self) -> str | None:
        return self.ends.reason(self.night, len(tries(self.night)))

    def check_first(self, session: dict, fruitless: int):
        """Raises Fail where the client does not work at all; later failures may pass by themselves."""
        first = self.count == 1 and fruitless == 1
        if first and session["code"] and session["seconds"] < AT_ONCE:
            client = CLIENTS.get(self.name)
            mend = f" ({client.install})" if client else ""
            raise Fail(f"{self.name} failed at once: {one_line(self.why, 300)}{mend}")

    def session(self) -> tuple[dict, Reading]:
        """One run of the client. Returns its record in the journal, and what it said."""
        began, known = time.time(), tries(self.night)
        self.count += 1
        reading = Reading()
        environment = {**os.environ, **self.environment}
        process = subprocess.Popen(
            self.command(),
            cwd=self.night.root,
            env=environment,
            stdin=subprocess.DEVNULL,  # an open one is read by some clients, or waited for
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self.state("works", process=[process.pid, started(process.pid)])
        self.say(f"session {self.count} begins")
        interrupted = False
        try:
            self.log.write(follow(process, reading, self.reason))
        except KeyboardInterrupt:
            interrupted = True
        self.why = reading.last()
        with self.night.lock("command", GRACE):  # not in the middle of a `try`
            end_process(process)
        self.log.write(rest_of(process, reading))  # Claude says what it cost when it is interrupted
        record = {
            "kind": "session",
            "client": self.name,
            "began": utc(began),
            "ended": utc(),
            "seconds": round(time.time() - began, 1),
            "experiments": len(tries(self.night) - known),
            "tokens": reading.tokens,
            "dollars": reading.dollars,
            "code": process.returncode,
            "said": one_line(self.why, 300),
        }
        append_line(self.night.journal, json.dumps(record).encode())
        dollars = "" if reading.dollars is None else f", ${reading.dollars:.2f}"
        words = f"{record['experiments']} experiments, {record['seconds']:.0f} s{dollars}"
        self.say(f"session {self.count} ended: {words}, exit {record['code']}: {record['said']}")
        if interrupted:
            raise KeyboardInterrupt
        return record, reading

    def command(self) -> list[str]:
        """With what is left of the dollars, where the client has a flag for that."""
        client = CLIENTS.get(self.name)
        if not (client and client.budget and self.ends.dollars):
            return self.words
        left = self.ends.dollars - spent(self.night)
        return [self.words[0], *client.budget, f"{max(left, 0.01):.2f}", *self.words[1:]]

    def rest(self, seconds: float):
        end = time.time() + seconds
        until = f"{datetime.fromtimestamp(end):%H:%M}"
        self.state("rests", until=until)
        if seconds >= 60:
            self.say(f"the next session begins at {until}")
        while (left := end - time.time()) > 0 and not self.reason():
            time.sleep(min(POLL_SECONDS, left))

    def state(self, doing: str, **more):
        now = {"client": self.name, "doing": doing, "since": f"{datetime.now():%H:%M}"}
        now |= {"session": self.count, "why": one_line(self.why, 200), **more}
        write_json(self.night.folder / "agent.json", now)

    def say(self, words: str):
        print(f"{datetime.now():%H:%M:%S} {words}", flush=True)
        self.log.write([f"--- {words}"])

    def tell(self, words: str):
        self.say(words)
        records = self.night.records()
        best = journal.best_of(records)
        score = f"; best {best['score']:.6f} after {len(records)} experiments" if best else ""
        notify(self.night, f"night {self.night.tag}: {words}{score}")


def tries(night: Night) -> set[int]:
    """The numbers of the night's experiments, the baseline apart."""
    if not night.begun():
        return set()
    open_ones = {e.n for e in night.open() if e.asked["kind"] == "try"}
    return open_ones | {record["n"] for record in night.records() if record["kind"] == "try"}


def end_leftover(night: Night):
    """Ends the client of an `agent` that was killed; Linux has done so already."""
    state = read_json(night.folder / "agent.json") or {}
    pid, when = state.get("process") or (0, "")
    if pid and started(pid) in (when, ""):  # or only its group is left, which keeps the number ours
        kill_family(pid, descendants(pid))


# ------------------------------------------------------------------------------------ for the status


def spent(night: Night) -> float:
    """Dollars of all sessions that report them."""
    return sum(session.get("dollars") or 0 for session in night.sessions())


def agent_lines(night: Night) -> list[str]:
    """What the agent does, why, and what it has cost; nothing where none was started by `agent`."""
    state = read_json(night.folder / "agent.json")
    if not state:
        return []
    at_work = lock(night.state_dir / "agent", shared=True, wait=False)
    with at_work or contextlib.nullcontext():
        alive = at_work is None
    name, why = state["client"], f": {state['why']}" if state["why"] else ""
    if state["doing"] == "ended":
        line = f"agent {name} ended at {state['since']}, {state['reason']}; its last words{why}"
    elif not alive:
        line = f"agent {name} is gone (killed?); uv run night.py agent {name} continues"
    elif state["doing"] == "rests":
        line = f"agent {name}: the next session begins at {state['until']}; the last ended{why}"
    else:
        line = f"agent {name}: session {state['session']} works since {state['since']}"
    cost = cost_of(night.sessions(), night.records())
    return [line, f"     {cost_line(cost)}"] if cost else [line]
