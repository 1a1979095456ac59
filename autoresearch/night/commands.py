"""
The commands that queue an experiment, wait for it or give it up. Each says what to type next.

Only a command moves the agent's branch and file (store.sync_branch); the supervisor never does.
"""

from __future__ import annotations

import math
import shlex
import time
import warnings

from autoresearch.common import Fail, one_line, read_json, some, write_json
from autoresearch.night import failures, journal, memory, rules, supervisor
from autoresearch.night import lines as second_lines
from autoresearch.night.evidence import MAX_RUNS
from autoresearch.night.repo import Contents, merged
from autoresearch.night.settings import BASELINE_SEEDS, CLUSTER_TIMEOUT, TARGET
from autoresearch.night.status import (
    best_lines,
    end_of_log,
    log_of,
    open_lines,
    print_lines,
    record_lines,
    repeat_line,
    standing_lines,
    what_next,
)
from autoresearch.night.store import POLL_SECONDS, Night

LONGEST_WAIT = 90  # seconds; the strictest of the agents' tools ends a command after 120
START_SECONDS = 5  # that `wait` gives a run to be decided, and the next one to start


def try_(night: Night, message: str, simpler: bool, expect: float | None, on: int | None = None):
    """The edits of the target's file as one experiment, on the best or on a line (lines.py)."""
    if not message.strip():
        raise Fail("say what changes and what is expected: uv run night.py try '...'")
    refuse_other_changes(night)
    contents = night.edits()
    if contents is None:
        night.sync_branch()
        raise Fail(
            f"{TARGET.file} has no edits: change it first, "
            "or bring an experiment's change back: uv run night.py bring N"
        )
    check_room(night)
    mistake = syntax_error(contents)
    if mistake:
        raise Fail(f"{mistake}: fix it, then try again")
    base, line = night.tip(), {}
    if on is not None:
        contents, base, line = on_line(night, on, contents)
    if simpler and size_of(contents) >= size_of(night.repo.contents_at(base)):
        raise Fail(
            f"--simpler is for less code, and {TARGET.file} has not become shorter: "
            "run it without --simpler"
        )
    message = one_line(message, 2000)
    commit = night.repo.commit(contents, base, message)
    change = night.repo.change_id(base, commit)
    check_new(night, change, base)
    lines = memory.changed_lines(night.repo.diff(base, commit))
    earlier = memory.earlier_lines(night, lines)
    parts = memory.changed_parts(night.repo.contents_at(base), contents)
    more = dict(simpler=simpler, expect=expect, change=change, lines=lines, parts=parts, **line)
    # The files as they are queued: a kill behind `enqueue` leaves no edits.
    if line and contents != night.edits():
        night.write_target(contents, {"commit": base, "line": on})
    n = night.enqueue("try", commit, base, message, BASELINE_SEEDS[0], **more)
    night.sync_branch()
    supervisor.wake(night)
    best = journal.best_of(night.records())
    place = f"the best, {best['commit'][:7]}" if best else f"the baseline, {night.tip()[:7]}"
    there = f" on {on}'s line, {base[:7]}" if line else ""
    print(f"{n}: queued as {commit[:7]}{there}; {TARGET.file} is {place} again")
    for said in [*earlier, *expectation_lines(night, expect)]:
        print(f"   {said}")
    print("next:", what_next(night))


def expectation_lines(night: Night, expect: float | None) -> list[str]:
    """Says where the runs that an experiment gets cannot show what is expected of it."""
    noise = journal.noise([*night.records(), *night.repeats()]) or 0.0
    if not expect or abs(expect) * math.sqrt(MAX_RUNS) >= noise:
        return []
    return [
        f"{expect:+g} is too small to be seen: the noise of a run is {noise:.6f}, and an experiment "
        f"gets {MAX_RUNS} runs at most; try a larger change, or several small ones as one"
    ]


def on_line(night: Night, n: int, edits: Contents) -> tuple[Contents, str, dict]:
    """(the edits on the tip of line N, the tip, what the experiment's record says of the line)."""
    records = night.records()
    root = second_lines.root_of(records, n)
    second_lines.check_open(records, [e.asked for e in night.open()], n)
    tip = second_lines.tip_of(records, n)["commit"]
    at = night.repo.contents_at
    contents = merged(at(tip), at(night.made_from().get("commit") or night.tip()), edits)
    if contents is None:
        raise Fail(
            f"the edits conflict with the tip of {n}'s line, {tip[:7]}: uv run night.py bring on-{n} puts "
            "its code here and saves them; make the change on top of it"
        )
    if contents == at(tip):
        raise Fail(f"{TARGET.file} is the tip of {n}'s line as it stands: change it first")
    return contents, tip, {"line": n, "root": root["commit"]}


def again(night: Night, n: int):
    """Queues an experiment that has no score as a new one: the same change, on the best."""
    record, _ = night.find(n)
    if record["kind"] not in rules.TRIED:
        raise Fail(
            f"{n} ({record['kind']}) is no experiment of yours: uv run night.py says what is"
        )
    if "status" not in record:
        raise Fail(f"{n} has not ended: uv run night.py wait")
    if record["score"] is not None:
        came = f"{record['status']}, {record['score']:.6f}"
        raise Fail(f"{n} has its score ({came}): bring {n}, change it, then try")
    check_room(night)
    commit = record["commit"]
    base = night.repo.git("rev-parse", f"{commit}^")
    check_new(night, record["change"], base)
    same = {key: record[key] for key in ("simpler", "expect", "change")}
    same |= {key: record[key] for key in ("line", "root") if key in record}
    new = night.enqueue("try", commit, base, record["message"], BASELINE_SEEDS[0], **same)
    supervisor.wake(night)
    print(f"{new}: queued, the change of {n} once more")
    print("next:", what_next(night))


def check_room(night: Night):
    """Raises Fail where as many experiments wait as may."""
    waiting = [e for e in night.open() if e.asked["kind"] == "try" and e.state() == "waiting"]
    if len(waiting) >= supervisor.capacity(night):
        raise Fail(
            f"{len(waiting)} experiments wait already, and more would be stale when they start: "
            "uv run night.py wait, then try again"
        )


def check_new(night: Night, change: str, base: str):
    """Raises Fail for a change that is queued, or that has its score on this very best."""
    for experiment in night.open():
        if experiment.asked["change"] == change:
            raise Fail(
                f"this is the change of experiment {experiment.n}, which has not ended: "
                "try another idea"
            )
    for record in night.records():
        same = record["change"] == change and record["base"] == base
        if same and record["score"] is not None and not record["slow"]:
            came = f"{record['status']}, {record['score']:.6f}"
            raise Fail(
                f"this is the change of experiment {record['n']} ({came}): try another idea; "
                "on another best it may be tried again"
            )


def size_of(contents: Contents) -> int:
    return sum(map(len, contents.values()))


def refuse_other_changes(night: Night):
    """Raises Fail where other files than the target's were changed: no run would see that."""
    changed = night.repo.git("diff", "--name-only", "HEAD").splitlines()
    others = [name for name in changed if name not in (*TARGET.files, "program.md")]
    if others:
        raise Fail(
            f"changed, and not in `edit`: {some(others)}: no run would see it. Only {TARGET.file} may "
            f"change: git checkout {' '.join(map(shlex.quote, others[:6]))}"
        )


def syntax_error(contents: Contents) -> str | None:
    """Why a file that should be is not Python, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file, content in contents.items():
            try:
                if file.endswith(".py"):
                    compile(content, file, "exec", dont_inherit=True)
            except (SyntaxError, ValueError) as error:  # ValueError: a zero byte
                return f"{file} is not Python ({error})"
    return None


def wait(night: Night, seconds: float):
    """Until something was decided that was not reported yet, or the time is over.

    Then, for a moment, until what waits has started: what it prints holds for longer than the print.
    """
    began = time.monotonic()
    failure = failures.last(night)
    reported = read_json(night.folder / "reported.json") or {}
    known = reported.get("records", 0)
    with night.command():
        night.sync_branch()
        if supervisor.wake(night):
            seconds = min(seconds, CLUSTER_TIMEOUT)  # soon, but not in a tight loop
    end = began + min(seconds, LONGEST_WAIT)
    failed = settling = False
    while time.monotonic() < end and night.can_work():
        failed = failures.last(night) != failure
        news = len(night.records()) > known
        if news and not settling:
            settling = True
            end = time.monotonic() + START_SECONDS
        if failed or settling and not about_to_change(night):
            break
        time.sleep(4 * POLL_SECONDS)
    with night.command():
        night.sync_branch()
        supervisor.wake(night)
        given_up = failures.given_up(night)
        lines = [given_up] if given_up else []
        if failed and not given_up:
            why = failures.last(night)["why"]
            lines.append(f"the supervisor ended and starts again: {why}")
        records = night.records()
        repeats = night.repeats()
        lines += news_lines(night, records[known:])
        lines += [repeat_line(r) for r in repeats[reported.get("repeats", 0) :][-4:]]
        standing, best = standing_lines(night), best_lines(night.records(), night.repeats())
        said = (*lines, *reported.get("said", []))
        lines += [line for line in standing if line not in said]
        lines += best if any(line not in said for line in best) else []
        print_lines([*lines, *(open_lines(night) or ["nothing waits and nothing runs"])])
        print("next:", what_next(night))
        now_reported = {"records": len(records), "repeats": len(repeats), "said": standing + best}
        write_json(night.folder / "reported.json", now_reported)


def about_to_change(night: Night) -> bool:
    """Whether a run has ended and is not decided, or a slot is free for what waits."""
    states = [experiment.state() for experiment in night.open()]
    free = night.engine_state()["slots"] > states.count("running")
    return "ended" in states or ("waiting" in states and free and not night.stopped())


def news_lines(night: Night, new_records: list[dict]) -> list[str]:
    """What `wait` says of the experiments that have ended since the last one."""
    lines = []
    if len(new_records) > 4:
        lines.append(f"{len(new_records) - 4} more have ended since: night.py shows the last rows")
    for record in new_records[-4:]:
        lines += record_lines(record)
        if record["status"] == "crash" and record["run"]:
            lines += [f"   | {line}" for line in end_of_log(log_of(night, record), 6)]
    kept = [record for record in new_records if record["status"] == "keep"]
    if any(record["kind"] != "baseline" for record in kept):
        if night.edits() is None:
            lines.append(f"{TARGET.file} is the new best")
        else:
            lines.append(f"{TARGET.file} has your edits of the best before: try rebases them")
    return lines


def drop(night: Night, n: int):
    """Gives up an experiment that waits or runs."""
    record, experiment = night.find(n)
    if "status" in record:
        raise Fail(f"{n} has ended ({record['status']}): there is nothing to drop")
    if record["kind"] == "baseline":
        raise Fail(f"{n} is the baseline, which all else needs; to end all, uv run night.py stop")
    (experiment.folder / "drop").touch()
    supervisor.wake(night)
    print(f"{n} is dropped")
    print("next:", what_next(night))
