"""SIGKILL at any line, of anything: the next command resumes, nothing is lost, nothing runs twice."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lab import Lab, needs_proc

pytestmark = needs_proc

TRACED = {
    "begin": "begin enqueue sync_branch write_atomically write_target keep_ref",
    "try": "try_ enqueue sync_branch write_atomically write_target keep_ref commit",
    "supervise": "work recover poll_once process_finished apply fill_slot start rebase clear record"
    " archive write_row append_line write_atomically commit keep_ref again watch",
}

KILLER = '''
"""Runs a command in a copy of the lab, killed at its k-th traced line, and the commands after it."""
import contextlib, json, os, shutil, signal, sys, traceback
from pathlib import Path

template, work, command = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
names, killed_at = set(sys.argv[4].split()), json.loads(sys.argv[5])

def in_a_fork(lab, words, k=0):
    """The status of a command in a process of its own, on the lab's own code."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        with open(lab / "said", "a") as said, contextlib.redirect_stdout(said):
            os.environ["AUTORESEARCH_CACHE"] = str(lab / "cache")
            os.chdir(lab / "lab")
            sys.path.insert(0, str(lab / "lab"))
            import night
            from autoresearch.night import supervisor, worker
            # The supervisor is started below, in the foreground; unshare would take half of the time.
            supervisor.wake = lambda night: None
            worker.Isolation.here = lambda: worker.Isolation([], "")
            if k != 0:
                traced(lab, k, lambda: night.main(words))
            else:
                night.main(words)
            status = 0
    except SystemExit as failure:
        status = 2
        open(lab / "said", "a").write(f"{failure}\\n")
    except BaseException:
        traceback.print_exc(file=open(lab / "said", "a"))
    finally:
        os._exit(status)

def traced(lab, k, run):
    """Killed at the k-th line; with k = None every line goes into the file `lines`."""
    seen, here, first = [], str(lab), os.getpid()
    def line(frame, event, _):
        if event == "line":
            seen.append([frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno])
            if len(seen) == k:
                os.kill(os.getpid(), signal.SIGKILL)
        return line
    def call(frame, event, _):
        code = frame.f_code
        return line if code.co_name in names and code.co_filename.startswith(here) else None
    sys.settrace(call)
    try:
        run()
    finally:
        if k is None and os.getpid() == first:
            (lab / "lines").write_text(json.dumps(seen))

for k in killed_at:
    lab = work / ("dry" if k is None else str(k))
    shutil.copytree(template, lab, symlinks=True)
    status = in_a_fork(lab, command, k)
    said = lambda: (lab / "said").read_text()
    assert k is None or not (lab / "said").is_file() or "Traceback" not in said(), said()
    if command[0] in ("begin", "try"):
        in_a_fork(lab, command)  # `try` is refused where it was queued already
    for words in (["supervise"], []):
        assert in_a_fork(lab, words) == 0, (k, words, said())
'''


def killed_everywhere(template: Lab, work: Path, command: list[str], most: int) -> list[Lab]:
    """The command killed at each line that it reaches (`most`, evenly), in a copy each time."""
    work.mkdir()
    (work / "killer.py").write_text(KILLER)
    common = [sys.executable, work / "killer.py", template.folder, work, json.dumps(command)]
    common.append(TRACED[command[0]])
    pipes = dict(env=template.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def start(numbers):
        return subprocess.Popen([*common, json.dumps(numbers)], **pipes)

    _, said = start([None]).communicate(timeout=60)
    assert (work / "dry/lines").is_file(), said.decode()
    lines = json.loads((work / "dry/lines").read_text())
    first = {tuple(line): k for k, line in reversed([*enumerate(lines, 1)])}
    numbers = sorted(first.values())
    numbers = numbers[:: math.ceil(len(numbers) / most)]
    assert len(numbers) > most / 2
    workers = [start(numbers[i::2]) for i in range(2)]
    for worker in workers:
        _, said = worker.communicate(timeout=300)
        assert worker.returncode == 0, said.decode()
    return [Lab(work / str(k)) for k in numbers]


def queued_only(lab: Lab, message: str, *options: str, **constants):
    """`try`, but no supervisor starts: as if it had been killed at once."""
    lab.edit(**constants)
    code = (
        "import night; from autoresearch.night import supervisor;"
        "supervisor.wake = lambda _: None;"
        f"night.main({['try', message, *options]})"
    )
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=lab.root, env=lab.env, check=True, capture_output=True)


def ended_on_paper(lab: Lab, n: int, score: float):
    """As if its run had ended while no supervisor lived."""
    folder = lab.state_dir / f"nov21/queue/{n}"
    asked = json.loads((folder / "experiment.json").read_text())
    run = {"id": f"paper-{n}", "slot": {}, "began": asked["asked"]}
    run |= {"commit": asked["commit"], "base": asked["base"]}
    end = {"code": 0, "score": score, "failure": None, "memory_gb": 1.0, "steps": 100, "pace": None}
    end |= {"tokens": 100_000, "training_seconds": 5.0, "wall_seconds": 6.0, "conditions": {}}
    (folder / "run-1.json").write_text(json.dumps(run))
    (folder / "run-1.log").write_text("on paper")
    (folder / "end-1.json").write_text(json.dumps({**end, "ended": asked["asked"]}))
    with open(lab.cache / "autoresearch.jsonl", "a") as ledger:
        ledger.write(json.dumps({"run": run["id"], "score": score, "event": "end"}) + "\n")


def test_the_supervisor_killed_at_any_line_loses_nothing_and_runs_nothing_twice(lab, tmp_path):
    queued_only(lab, "wider", WIDTH=1)
    queued_only(lab, "deeper, and the larger gain", DEPTH=2)
    for n, score in ((4, 0.99), (5, 0.98)):
        ended_on_paper(lab, n, score)
    queued_only(lab, "deeper still, in conflict with that", DEPTH=4, WIDTH=0)
    ended_on_paper(lab, 6, 0.985)
    queued_only(lab, "to be put on top of both", COMMENT=1, DEPTH=0)
    for it in killed_everywhere(lab, tmp_path / "killed", ["supervise"], 24):
        it.check()
        ended = {r["n"]: (r["status"], r["score"]) for r in it.records()[3:]}
        scores = [pytest.approx(score) for score in (0.97, 0.98, 0.985, 0.97)]
        statuses = ("keep", "keep", "discard", "discard")
        assert ended == dict(zip((4, 5, 6, 7), zip(statuses, scores)))
        assert it.best()["n"] == 4  # on top of 5, whose gain is larger
        for n, runs in {4: 2, 5: 1, 6: 1, 7: 1}.items():
            assert len(list(it.state_dir.glob(f"nov21/done/{n}/end-*.json"))) == runs
            reasons = [why for why in it.record(n)["again"] if why != "cut off"]
            assert len(reasons) == runs - 1


def test_a_command_killed_at_any_line_is_finished_by_the_next(fresh, lab, tmp_path):
    for it in killed_everywhere(fresh, tmp_path / "begin", ["begin"], 7):
        it.check()
        assert [(r["n"], r["seed"]) for r in it.records()] == [(1, 42), (2, 43), (3, 44)]
    lab.edit(WIDTH=1)
    for it in killed_everywhere(lab, tmp_path / "try", ["try", "wider"], 9):
        it.check()
        [record] = it.records()[3:]
        assert (record["n"], record["status"], record["message"]) == (4, "keep", "wider")


def test_a_second_line_killed_at_any_line_is_opened_once_and_joins_once(lab, tmp_path):
    root = str(lab.until_ended(lab.attempt("narrower", WIDTH=-1))["n"])
    lab.say()
    lab.until_idle()
    lab.edit(DEPTH=0.5)  # an edit of the best, which becomes one of N
    for it in killed_everywhere(lab, tmp_path / "best", ["try", "deeper", "--on", root], 7):
        it.check()
        record = it.record(5)
        assert (record["status"], record["on_line"], len(it.records())) == ("discard", "keep", 5)
    lab.say("bring", f"on-{root}")
    lab.edit(WIDTH=2)
    for it in killed_everywhere(lab, tmp_path / "try", ["try", "wider", "--on", root], 9):
        it.check()
        record = it.record(5)
        assert (record["status"], record["on_line"], len(it.records())) == ("keep", "keep", 5)
    queued_only(lab, "wider than N and the best", "--on", root)
    queued_only(lab, "deeper than N", "--on", root, DEPTH=0.5)
    for n, score in ((5, 0.98), (6, 1.005)):
        ended_on_paper(lab, n, score)
    queued_only(lab, "waits on the line", "--on", root, COMMENT=1)
    for it in killed_everywhere(lab, tmp_path / "supervise", ["supervise"], 14):
        it.check()
        ended = {r["n"]: (r["status"], r["on_line"], r["score"]) for r in it.records()[4:]}
        deeper = pytest.approx(0.975)  # on top of what joined before it
        assert ended == {
            5: ("keep", "keep", 0.98),
            6: ("keep", "keep", deeper),
            7: ("discard", "discard", deeper),
        }
        assert it.record(6)["base"] == it.record(5)["commit"]


def test_a_killed_run_is_a_crash_a_killed_watcher_a_repeat_and_a_killed_command_nothing(lab):
    n = lab.attempt("its run is killed", HOLD="a")
    lab.until_held(n)
    agent = lab.start("wait", 30)
    agent.kill()
    agent.communicate()
    [run] = lab.running()
    os.kill(run, signal.SIGKILL)
    assert lab.until_ended(n)["why"] == "killed by signal 9"

    lab.say()
    n = lab.attempt("its watcher is killed", HOLD="b", WIDTH=1, EVENT="orphans")
    lab.until_held(n)
    lab.kill_watcher()
    lab.until_held(n, k=2)
    assert len(lab.running()) == 3  # the second run and its two; none of the first
    record = lab.until_ended(n, go="b")
    assert (record["status"], record["again"], record["k"]) == ("keep", ["cut off"], 2)

    lab.say()
    lab.check()


def test_stop_ends_what_runs_and_begin_runs_it_again(lab):
    held, waits = lab.attempt("wider", WIDTH=1, HOLD="a"), lab.attempt("deeper", DEPTH=1)
    lab.until_held(held)
    stopped = lab.say("stop")
    assert "stopped: what runs is being ended, and nothing starts" in stopped
    assert "next: uv run night.py begin continues" in stopped
    lab.until_idle()
    lab.until(lambda: not lab.running())
    for said in (lab.say("wait", 40), lab.say()):
        assert "next: the night was stopped" in said and said.count("waiting") >= 2
    lab.until_idle()
    assert len(lab.records()) == 3 and not lab.running()
    lab.say("begin")
    record = lab.until_ended(held, go="a")
    assert (record["status"], record["again"]) == ("keep", ["stopped"])
    assert lab.until_ended(waits)["status"] == "keep"
    lab.say()
    lab.until_idle()
    lab.check()


def test_the_supervisor_outlives_the_agent_its_process_group_and_its_session(lab):
    lab.edit(WIDTH=1, HOLD="a")
    command = ["sh", "-c", f"{sys.executable} night.py try wider; sleep 60"]
    places = dict(cwd=lab.root, env=lab.env, stdout=subprocess.DEVNULL)
    agent = subprocess.Popen(command, start_new_session=True, **places)
    lab.until_held(4)
    os.killpg(agent.pid, signal.SIGHUP)
    os.killpg(agent.pid, signal.SIGKILL)
    agent.wait()
    assert lab.until_ended(4, go="a")["status"] == "keep"


def test_one_supervisor_works_and_the_next_takes_over_while_a_run_lasts(lab):
    n = lab.attempt("held", HOLD="a", WIDTH=1)
    lab.until_held(n)
    waits = lab.attempt("waits", NOTE=1)
    others = [lab.start("supervise") for _ in range(2)]
    assert [other.communicate(timeout=20) for other in others] == [("", "")] * 2  # there is one
    lab.kill_supervisor()
    lab.say("drop", waits)  # starts the next; the watcher of the held run must not keep it out
    assert lab.until_ended(waits)["why"] == "dropped while it waited"
    record = lab.until_ended(n, go="a")
    assert (record["status"], record["again"]) == ("keep", [])
    lab.say()
    lab.check()


def test_a_worktree_cut_off_while_it_was_made_is_made_again(lab):
    queued_only(lab, "wider", WIDTH=1)
    tree = lab.state_dir / "nov21/queue/4/tree"
    lab.git("worktree", "add", "-q", "--detach", str(tree), "main")
    [administration] = (lab.root / ".git/worktrees").iterdir()
    (administration / "locked").write_text("initializing")  # as git has it until it is done
    shutil.rmtree(tree)
    lab.say()
    assert lab.until_ended(4)["status"] == "keep"
    lab.say()
    lab.until_idle()
    lab.check()
