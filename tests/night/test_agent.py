"""`night.py agent`, with stand-ins of a few lines for the coding agents."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone

import pytest
from lab import needs_proc

from autoresearch.common import Fail
from autoresearch.night import processes
from autoresearch.night.agent import until_of
from autoresearch.night.clients import Reading, reset_time
from autoresearch.night.processes import Log

FAST = (
    "from autoresearch.night import agent, processes; import night; "
    "agent.FIRST_PAUSE = 0.2; processes.GRACE = 1; "
)


def start(lab, *words, constants="", **environment):
    """`night.py agent ...` with short pauses."""
    code = f"import sys; sys.path.insert(0, '.'); {FAST}{constants}"
    code += "\ntry: night.main(sys.argv[1:])\nexcept SystemExit as e: sys.exit(e)"
    return subprocess.Popen(
        [sys.executable, "-c", code, "agent", *map(str, words)],
        cwd=lab.root,
        env={**lab.env, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process) -> str:
    return process.communicate(timeout=60)[0]


def client(lab, script: str) -> list[str]:
    """The words of a stand-in: Python that can `try_(NAME)`; session: how many came before."""
    lines = f"""
import json, os, re, subprocess, sys, time
from pathlib import Path
count = Path({str(lab.folder / "sessions")!r})
session = len(count.read_text()) if count.exists() else 0
count.open("a").write("x")
def try_(name="WIDTH"):
    path = Path("train.py")
    path.write_text(re.sub(f"^{{name}} = .*", f"{{name}} = 1", path.read_text(), flags=re.M))
    subprocess.run([sys.executable, "night.py", "try", f"more {{name}}"], check=True)
{script}
"""
    (lab.folder / "client.py").write_text(lines)
    return [sys.executable, str(lab.folder / "client.py")]


def sessions(lab) -> list[dict]:
    return [line for line in lab.journal() if line["kind"] == "session"]


def test_sessions_follow_each_other_until_enough_experiments_and_say_what_they_cost(lab):
    words = client(
        lab,
        """
if session == 1: sys.exit("nothing comes to my mind")
print(json.dumps({"type": "system", "subtype": "init"}))
if session == 0: try_()
usage = {"input_tokens": 1000, "cache_read_input_tokens": 500, "output_tokens": 10}
print(json.dumps({"type": "result", "subtype": "success", "result": "bye",
                  "total_cost_usd": 0.25, "usage": usage}), flush=True)
if session == 2: try_("DEPTH"); time.sleep(300)
""",
    )
    said = ended(start(lab, "--experiments", 2, "--", "X=1", *words))
    assert f"X=1 {words[0]} {words[1]} < /dev/null" in said
    assert [s["experiments"] for s in sessions(lab)] == [1, 0, 1]
    assert [s["dollars"] for s in sessions(lab)] == [0.25, None, 0.25]
    assert sessions(lab)[0]["tokens"] == 1510
    assert "exit 1: nothing comes to my mind" in said
    assert "the agent ended: 2 experiments are queued or have ended" in said
    assert said.endswith("next: uv run night.py\n")
    lab.until_idle()
    lab.until_ended(5)
    status = lab.say()
    cost = (
        "3 sessions of the agent, 0.7 experiments each; 0.00 M tokens; $0.50, $0.25 a kept change"
    )
    assert cost in status
    assert "2 experiments are queued or have ended; its last words: " in status
    log = (lab.state_dir / "nov21/agent.log").read_text()
    assert f"{datetime.now():%Y-%m-%d} " in log and "ended: bye" in log
    # the sum is of the whole night
    assert "$0.50 are spent" in ended(start(lab, "--usd", 0.5, "--", *words))
    lab.check()


@pytest.mark.parametrize(
    "script, says",
    [
        ("sys.exit('Not logged in')", "failed at once: Not logged in"),
        ("print('error: unknown option'); sys.exit(2)", "failed at once: error: unknown option"),
        ("os.kill(os.getpid(), 9)", "failed at once: it said nothing"),
    ],
)
def test_a_client_that_does_not_work_fails_at_once_with_its_own_last_line(lab, script, says):
    process = start(lab, "--", *client(lab, script))
    said = ended(process)
    assert process.returncode == 1 and says in said.splitlines()[-1], said
    assert len(sessions(lab)) == 1
    assert says in lab.say()


def test_what_cannot_be_started_is_refused(lab):
    assert "which agent?" in lab.refused("agent")
    assert "nosuchclient is not installed" in lab.refused("agent", "--", "nosuchclient", "-p")
    bin = lab.folder / "bin"
    bin.mkdir()
    (bin / "git").symlink_to(shutil.which("git"))
    refused = lab.refused("agent", "claude", PATH=str(bin))
    assert "claude is not installed, or not on PATH: npm install -g @anthropic" in refused
    assert "codex reports no dollars" in lab.refused("agent", "codex", "--usd", "3")
    lab.say("stop")
    assert "was stopped: uv run night.py begin" in lab.refused("agent", "--", "true")


def test_five_sessions_without_an_experiment_are_told_and_the_pause_doubles(lab):
    told = lab.folder / "told"
    lab.set(f'- notify: tell() {{ echo "$1" >> {told}; }}; tell')
    words = client(lab, "print('I am done')")
    process = start(lab, "--", *words, constants="agent.FIRST_PAUSE = 0.05;")
    lab.until(told.exists)
    process.send_signal(signal.SIGINT)
    said = ended(process)
    assert "the agent ended: interrupted" in said
    lab.until(lambda: "interrupted" in told.read_text())
    first, last = told.read_text().splitlines()
    assert "5 sessions without an experiment; the last: I am done; best 1.000000" in first
    assert (lab.state_dir / "nov21/agent.log").read_text().count(" begins\n") >= 5


def test_a_limit_is_waited_for_and_the_status_says_why(lab):
    words = client(lab, "sys.exit('You have hit your limit; try again in 2 h 10 m')")
    process = start(lab, "--", *words)
    state = lab.state_dir / "nov21/agent.json"
    lab.until(lambda: state.exists() and "rests" in state.read_text())
    status = lab.say()
    assert "the next session begins at" in status and "You have hit your limit" in status
    assert "an agent is at work in this folder already" in lab.refused("agent", "--", "true")
    lab.say("stop")
    assert "the agent ended: the night was stopped" in ended(process)
    assert len(sessions(lab)) == 1


@needs_proc
def test_the_agent_ends_with_its_children_and_the_queue_goes_on(lab):
    script = """
sleep = [sys.executable, "-c", "import time; time.sleep(300)"]
children = [subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)]
try_()
Path("pids").write_text(" ".join(str(p) for p in [os.getpid(), *(c.pid for c in children)]))
import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)
time.sleep(300)
"""
    lab.edit(HOLD="a")
    process = start(lab, "--", *client(lab, script))
    pids = lab.root / "pids"
    lab.until(lambda: pids.exists() and pids.read_text().count(" ") == 2)
    lab.until_held(4)
    alive = [int(pid) for pid in pids.read_text().split()]
    process.send_signal(signal.SIGTERM)
    assert "1 experiments wait or run and are worked off" in ended(process)
    lab.until(lambda: not any(map(running, alive)))
    pids.unlink()
    assert lab.until_ended(4, go="a")["status"] == "keep"
    # killed itself, its client goes too, and saying it again goes on
    process = start(lab, "--", *client(lab, script))
    lab.until(lambda: pids.exists() and pids.read_text().count(" ") == 2)
    alive = [int(pid) for pid in pids.read_text().split()]
    process.kill()
    process.wait()
    lab.until(lambda: not running(alive[0]))
    assert "is gone (killed?); uv run night.py agent" in lab.say()
    said = ended(start(lab, "--experiments", 1, "--", "true"))
    assert "the agent ended: 2 experiments" in said or "1 experiments" in said
    assert not running(alive[1])  # of the group that was left
    os.kill(alive[2], signal.SIGKILL)
    pids.unlink()
    lab.until_idle()


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")")[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_an_agent_that_never_stops_talking_is_ended_in_time_and_its_log_stays_small(lab):
    script = "while True: sys.stdout.write('spam ' * 20_000)"
    process = start(lab, "--hours", 2 / 3600, "--", *client(lab, script))
    began = time.monotonic()
    assert "the agent ended: its time is over" in ended(process)
    assert time.monotonic() - began < 30


def test_the_log_keeps_its_newest_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "LOG_BYTES", 10_000)
    log = Log(tmp_path / "log")
    log.write(f"line {number}" for number in range(1000))
    text = log.path.read_text()
    assert 9_000 < len(text) < 11_100 and text.endswith("line 999\n")
    numbers = [int(line.split()[-1]) for line in text.splitlines()]
    assert numbers == list(range(numbers[0], 1000))


NOW = datetime(2026, 11, 26, 1, 0, tzinfo=timezone.utc).timestamp()
HOUR = 3600


@pytest.mark.parametrize(
    "text, hours",
    [
        ("You've hit your limit · resets 3am (UTC)", 2),
        ("5-hour limit reached ∙ resets at 3:30 AM (UTC)", 2.5),
        ("You've hit your limit · resets 12am (UTC)", 23),
        ("limit reached · resets 00:55 (UTC)", -5 / 60),  # it has just passed
        ("You've hit your weekly limit · resets Nov 27, 5pm (UTC)", 40),
        ("usage limit. try again at Nov 27th, 2026 1:00 AM (UTC)", 24),
        ("You've hit your limit · resets 8pm (America/New_York)", 0),
        ("Rate limit: please try again in 2h 10m", 2 + 1 / 6),
        ("usage limit ... or try again in 1 day 2 hours and 30 minutes.", 26.5),
        ("429 Too Many Requests, retry after 30 seconds", 1 / 120),
        ("quota exceeded; try again in 500ms", 0.5 / 3600),
        (f"Claude AI usage limit reached|{NOW + 600:.0f}", 1 / 6),
        (f'{{"error": "usage_limit", "resets_at": {NOW + 60:.0f}}}', 1 / 60),
        ("limit reached; resets 3am (Mars/Olympus)", None),
        ("The limit of 1200 s; see section 3", None),
        ("I stop here; try again in 2 hours", None),
        ("Credit balance is too low", None),
    ],
)
def test_the_time_at_which_a_limit_is_over_is_read_from_its_words(text, hours):
    found = reset_time(text, NOW)
    assert found == (None if hours is None else pytest.approx(NOW + hours * HOUR, abs=1))


def test_the_output_of_the_clients_is_read():
    reading = Reading()
    answer = {"id": "m", "usage": {"input_tokens": 5, "output_tokens": 1}}
    text = {**answer, "content": [{"type": "text", "text": "I read it."}]}
    call = {"type": "tool_use", "name": "Bash", "input": {"command": "uv run night.py"}}
    read = lambda **event: reading.feed(json.dumps(event))
    assert read(type="assistant", message=text) == ["I read it."]
    assert read(type="assistant", message={**answer, "content": [call]})[0].startswith("> Bash")
    assert reading.tokens == 6  # two parts of one answer
    info = {"status": "allowed_warning", "resetsAt": 5}
    read(type="rate_limit_event", rate_limit_info=info)
    assert reading.reset_time(0) is None
    read(type="rate_limit_event", rate_limit_info={**info, "status": "rejected"})
    assert reading.reset_time(0) == 5
    codex = Reading()
    done = {
        "type": "command_execution",
        "command": "ls",
        "aggregated_output": "a\nb",
        "exit_code": 0,
    }
    assert codex.feed(json.dumps({"type": "item.completed", "item": done})) == ["> ls", "< 0: a b"]
    for _ in range(2):
        usage = {"input_tokens": 100, "cached_input_tokens": 90, "output_tokens": 10}
        codex.feed(json.dumps({"type": "turn.completed", "usage": usage}))
    assert (codex.tokens, codex.dollars) == (220, None)
    codex.feed('{"type": "turn.failed", "error": {"message": "no credit"}}')
    assert codex.last() == "no credit"
    for odd in (
        '{"type": 3}',
        '{"type": "assistant"}',
        '{"type": "user", "message": []}',
        "{",
        "[1]",
    ):
        codex.feed(odd)
    assert codex.feed("plain\x1b[2J words") == ["plain [2J words"]


def test_until_is_the_next_such_time_of_day():
    seconds = until_of("07:30", None) - time.time()
    assert 0 < seconds <= 24 * HOUR
    assert f"{datetime.fromtimestamp(until_of('07:30', None)):%H:%M:%S}" == "07:30:00"
    assert until_of("07:30", 1e-3) < time.time() + 4
    assert until_of(None, None) is None
    with pytest.raises(Fail, match="a time of day as 07:30"):
        until_of("half past", None)
