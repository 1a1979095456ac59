"""
The commands of `night.py`, as an agent or a person types them. Each says what to type next.

Only a command moves the agent's branch and file (store.sync_branch); the supervisor never does.
"""

from __future__ import annotations

import re
import shlex
import textwrap
import time
import warnings
from pathlib import Path

from autoresearch.common import (
    Fail,
    cut,
    file_problem,
    git,
    one_line,
    printable,
    read_json,
    some,
    write_atomically,
    write_json,
)
from autoresearch.night import failures, memory, rules
from autoresearch.night import lines as second_lines
from autoresearch.night.doubts import rate
from autoresearch.night.experiment import Experiment
from autoresearch.night.repo import Contents, merged
from autoresearch.night.results import COLUMNS
from autoresearch.night.settings import (
    BASELINE_SEEDS,
    CLUSTER_TIMEOUT,
    TARGET,
    cluster_address,
    time_limit,
)
from autoresearch.night.status import (
    WIDTH,
    best_lines,
    end_of_log,
    log_of,
    loss_at,
    losses,
    open_lines,
    print_lines,
    print_status,
    record_lines,
    repeat_line,
    standing_lines,
    title_of,
    what_next,
)
from autoresearch.night.store import POLL_SECONDS, Night
from autoresearch.night.supervisor import capacity, wake
from autoresearch.night.target import problem_of
from autoresearch.night.worker import LocalEngine
from autoresearch.referee.ledger import ledger_path, read_ledger
from autoresearch.referee.manifest import fingerprint, manifest

LONGEST_WAIT = 90  # seconds; the strictest of the agents' tools ends a command after 120
START_SECONDS = 5  # that `wait` gives a run to be decided, and the next one to start
DIFF_LINES = 16  # of a diff that `show` prints

# --------------------------------------------------------------------------------- begin and stop


def begin(night: Night):
    """Branch, table and baseline. Idempotent: after a kill it completes what is missing."""
    # raises Fail, with the command to type, where nothing is prepared
    prepared = manifest() if TARGET.is_train_py else {}
    keep_out_of_git(night)
    check_ledger()
    time_limit()
    capacity(night)
    git = night.repo.git
    if git("rev-parse", "-q", "--verify", "HEAD", check=False) is None:
        raise Fail("this repository has no commit yet: git add -A && git commit, then begin")
    if problem := problem_of(TARGET, night.root):
        raise Fail(f"program.md, setting {problem}")
    changed = git("diff", "--name-only", "HEAD").splitlines()
    others = [name for name in changed if name not in TARGET.files]
    if others:
        advice = "commit it, or git checkout it, then begin"
        raise Fail(f"changed and not committed: {some(others)}: {advice}")
    check_results(night)
    uncommitted = (
        f"{TARGET.file} has edits: put them aside with `uv run night.py bring best`, then begin "
        "(or, as the human, git commit them as the baseline)"
    )
    if git("symbolic-ref", "-q", "--short", "HEAD", check=False) != night.branch:
        if changed:
            raise Fail(uncommitted)
        exists = git("rev-parse", "-q", "--verify", f"refs/heads/{night.branch}", check=False)
        git("switch", "-q", *([] if exists else ["-c"]), night.branch)
    for folder in (night.queue, night.done):
        folder.mkdir(parents=True, exist_ok=True)
    if not night.results.is_file():
        write_atomically(night.results, ("\t".join(COLUMNS) + "\n").encode())
    scored = [r for r in night.records() if r["kind"] == "baseline" and r["score"] is not None]
    existing = [*scored, *(e.asked for e in night.open() if e.is_baseline)]
    if changed and not existing:
        raise Fail(uncommitted)
    baseline = existing[0]["commit"] if existing else git("rev-parse", "HEAD")
    for seed in BASELINE_SEEDS:
        if seed not in [asked["seed"] for asked in existing]:
            night.enqueue("baseline", baseline, baseline, "baseline", seed)
    night.sync_branch()
    (night.folder / "stop").unlink(missing_ok=True)
    failures.forget(night)
    if not cluster_address():  # what this machine lacks is said now, not after the first run
        engine = LocalEngine(night)
        night.write_engine_state(len(engine.slots()), engine.status_lines())
    wake(night)
    named = ("corpus", "seq_len", "vocab_size", "time_budget")
    fixed = ", ".join(f"{key} {prepared[key]}" for key in named if key in prepared)
    if TARGET.is_train_py:
        print(f"prepared: {fixed}; fingerprint {fingerprint()}")
    else:
        better = "lower" if TARGET.lower_is_better else "higher"
        print(f"target: {TARGET.file}; METRIC {TARGET.metric}, {better} is better")
    print_status(night)


def keep_out_of_git(night: Night):
    """What the night writes is no file of the user's: git ignores it, and no tracked file changes."""
    ours = [".night/", "results.tsv", "night.html", "lessons.md", "progress.png"]
    ignored = night.repo.git("check-ignore", "--no-index", *ours, check=False) or ""
    missing = [name for name in ours if name not in ignored.splitlines()]
    if missing:
        exclude = Path(
            night.repo.git("rev-parse", "--path-format=absolute", "--git-path", "info/exclude")
        )
        exclude.parent.mkdir(parents=True, exist_ok=True)
        before = exclude.read_text() if exclude.is_file() else ""
        lines = "".join(f"/{name}\n" for name in missing)
        write_atomically(exclude, f"{before.rstrip()}\n# night.py's\n{lines}".lstrip().encode())


def check_ledger():
    """Raises Fail where no run could write its score."""
    try:
        open(ledger_path(), "ab").close()
    except OSError as error:
        problem = file_problem(error, ledger_path())
        raise Fail(f"no run could write its score into the ledger: {problem}") from None


def check_results(night: Night):
    """Raises Fail for a results.tsv that is not this night's: nothing is mixed or overwritten."""
    if not night.results.is_file():
        return
    lines = night.results.read_bytes().decode("utf-8-sig", "replace").splitlines()
    known = {record["commit"][:7] for record in night.records()}
    wrong = None
    if lines and lines[0].split("\t") != COLUMNS:
        wrong = "has other columns than this night's"
    elif any(line.split("\t")[0] not in known for line in lines[1:]):
        wrong = "is of another night"
    if wrong:
        raise Fail(f"results.tsv {wrong}: mv results.tsv results-before.tsv, then begin")


def stop(night: Night):
    """Ends what runs, to run again after `begin`."""
    (night.folder / "stop").touch()
    wake(night)
    print("stopped: what runs is being ended, and nothing starts")
    print("next: uv run night.py begin continues, and runs again what was ended")


# --------------------------------------------------------------------------------- try, wait, drop


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
    wake(night)
    best = rules.best_of(night.records())
    place = f"the best, {best['commit'][:7]}" if best else f"the baseline, {night.tip()[:7]}"
    there = f" on {on}'s line, {base[:7]}" if line else ""
    print(f"{n}: queued as {commit[:7]}{there}; {TARGET.file} is {place} again")
    if earlier:
        print(*(f"   {line}" for line in earlier), sep="\n")
    print("next:", what_next(night))


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
    record, _ = find(night, n)
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
    wake(night)
    print(f"{new}: queued, the change of {n} once more")
    print("next:", what_next(night))


def check_room(night: Night):
    """Raises Fail where as many experiments wait as may."""
    waiting = [e for e in night.open() if e.asked["kind"] == "try" and e.state() == "waiting"]
    if len(waiting) >= capacity(night):
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
        if wake(night):
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
        wake(night)
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
    record, experiment = find(night, n)
    if "status" in record:
        raise Fail(f"{n} has ended ({record['status']}): there is nothing to drop")
    if record["kind"] == "baseline":
        raise Fail(f"{n} is the baseline, which all else needs; to end all, uv run night.py stop")
    (experiment.folder / "drop").touch()
    wake(night)
    print(f"{n} is dropped")
    print("next:", what_next(night))


# ------------------------------------------------------------------------------- show, bring, runs


def find(night: Night, n: int) -> tuple[dict, Experiment]:
    """(an experiment's record, or what was asked for where it has not ended; the experiment)."""
    folder = night.folder_of(n)
    experiment = Experiment.at(folder) if folder else None
    if experiment is None:
        raise Fail(f"there is no experiment {n}: they go from 1 to {night.next_number() - 1}")
    records = [record for record in night.ended() if record["n"] == n]
    return records[0] if records else experiment.asked, experiment


def show(night: Night, n: int, only_diff: bool = False):
    """Decision, diff, losses beside the best's, and the end of the log of the run that counts."""
    record, experiment = find(night, n)
    diff = diff_lines(night, record) if record["kind"] in rules.TRIED else []
    if only_diff:
        print(*diff, sep="\n")
        print("next:", what_next(night))
        return
    lines = [f"{n}: {title_of(record)}, not decided yet"]
    if "status" in record:
        lines = record_lines(record)
    k = record.get("k") or max(1, len(experiment.runs()))
    lines += commit_lines(record, experiment, k)
    lines += diff[:DIFF_LINES]
    if len(diff) > DIFF_LINES:
        lines.append(f"... {len(diff) - DIFF_LINES} more lines: uv run night.py show {n} --diff")
    lines += loss_lines(night, record, losses(experiment.path("progress.jsonl", k)))
    log = [f"   | {line}" for line in end_of_run(experiment.path("run.log", k))]
    print_lines([*lines, *(["end of the log:", *log] if log else [])])
    print("next:", what_next(night))


def diff_lines(night: Night, record: dict) -> list[str]:
    commit = record["commit"]
    words = ("diff-tree", "-p", "--no-ext-diff", f"{commit}^", commit, "--", *TARGET.files)
    diff = night.repo.git(*words, check=False) or ""
    return [cut(printable(line), WIDTH) for line in diff.splitlines()[4:]]


def commit_lines(record: dict, experiment: Experiment, k: int) -> list[str]:
    """Where the run's commit is another than the one that was queued: why."""
    run = experiment.runs()[k - 1] if k <= len(experiment.runs()) else {}
    queued, ran = experiment.asked["commit"], run.get("commit", record["commit"])
    if queued == ran:
        return []
    what = "tip" if record.get("line") else "best"
    what = f"the same change on the new {what}, {run.get('base', record['base'])[:7]}"
    return [f"   queued as {queued[:7]}, ran as {ran[:7]}: {what}"]


def end_of_run(path: Path) -> list[str]:
    """The end of a run's log; the summary's values stand in few lines."""
    lines = end_of_log(path, 40)
    if "---" not in lines:
        return lines[-10:]
    start = lines.index("---")
    values = [line for line in lines[start + 1 :] if not line.startswith("loss_curve")]
    summary = textwrap.wrap("; ".join(values), WIDTH, break_long_words=False)
    return [*lines[max(0, start - 4) : start], *summary]


def loss_lines(night: Night, record: dict, curve: list[tuple[float, float]]) -> list[str]:
    """The losses at each 10% of the budget; in brackets the best's, or what the best was based on."""
    if not curve:
        return []
    name, beside_it = "the best's", rules.best_of(night.records())
    if beside_it and beside_it["n"] == record["n"]:
        name, beside_it = "its base's", rules.kept_as(record["base"], night.records())
    other = losses(log_of(night, beside_it, "progress", "jsonl")) if beside_it else []
    other = [] if beside_it and beside_it["n"] == record["n"] else other  # the baseline itself
    cells = []
    for percent in range(10, 101, 10):
        loss, beside = loss_at(curve, percent), loss_at(other, percent)
        if loss is not None and percent <= curve[-1][0] + 10:
            cells.append(f"{percent}% {loss:.3f}" + (f" ({beside:.3f})" if beside else ""))
    head = f"loss ({name}): " if other else "loss: "
    return [head + " ".join(cells[:5]), *["   " + " ".join(cells[5:])][: len(cells) > 5]]


def bring(night: Night, what: str):
    """Puts N's change, saved edits, or the best, into the file. Edits are never lost."""
    if what == "best":
        bring_best(night)
    elif re.fullmatch(r"on-\d+", what):
        bring_line(night, int(what.removeprefix("on-")))
    elif re.fullmatch(r"edits-\d+", what):
        bring_edits(night, what)
    elif what.isdigit():
        bring_change(night, what)
    else:
        wrong = one_line(what, 20)
        raise Fail(f"bring {wrong}: it takes an experiment's number, best, on-N, or saved edits")
    if night.begun():
        print("next:", what_next(night))
    else:
        print("next: uv run night.py begin")


def bring_change(night: Night, n: str):
    record, _ = find(night, int(n))
    if record["kind"] not in rules.TRIED:
        raise Fail(f"{n} ({record['kind']}) has no change: uv run night.py bring best")
    night.sync_branch()
    commit, tip, edits = record["commit"], night.tip(), night.edits()
    current = night.repo.contents_at(tip) if edits is None else edits
    place = f"the best, {tip[:7]}" if edits is None else "your edits"
    parent = night.repo.git("rev-parse", f"{commit}^")
    contents = merged(current, *map(night.repo.contents_at, (parent, commit)))
    if contents is None:
        print(*diff_lines(night, record), sep="\n")
        raise Fail(f"{n}'s change (above) meets other changes in {place}: make it by hand")
    if contents == current:
        raise Fail(f"{n}'s change is in {place} already: try another idea")
    whole = edits is None and contents == night.repo.contents_at(commit)
    night.write_target(contents, {"commit": commit} if whole else night.made_from())
    print(f"{n}'s change is in {TARGET.file}, on top of {place}")


def bring_line(night: Night, n: int):
    """The whole code of line N's tip, or of N where no line begins there yet."""
    night.sync_branch()
    second_lines.root_of(night.records(), n)
    tip = second_lines.tip_of(night.records(), n)
    if night.edits() is not None:
        bring_best(night)
    made_from = {"commit": tip["commit"], "line": n}
    night.write_target(night.repo.contents_at(tip["commit"]), made_from)
    print(f"{TARGET.file} is the code of {tip['n']}, {tip['commit'][:7]}, the tip of {n}'s line")


def bring_best(night: Night):
    """The file as the best has it, or, before the night has begun, as the last commit has it."""
    if not night.begun():
        commit = night.repo.git("rev-parse", "HEAD")
        before = {**night.repo.contents_at(commit), **night.repo.in_tree()}
        contents = None if night.repo.are_of(before, [commit]) else before
        night.folder.mkdir(parents=True, exist_ok=True)
    else:
        commit, contents = night.tip(), night.edits()
    if contents is not None:
        name = f"edits-{count_of_edits(night) + 1}"
        for file, content in contents.items():
            write_atomically(saved_edit(night, name, file), content)
        write_json(night.folder / f"of-{name}.json", night.made_from())
        night.write_target(night.repo.contents_at(commit))
        print(f"your edits were saved: uv run night.py bring {name} puts them back")
    if night.begun():
        night.sync_branch()
        commit = night.tip()
    print(f"{TARGET.file} is the best, {commit[:7]}")


def saved_edit(night: Night, name: str, file: str) -> Path:
    return night.folder / f"{name}-{file.replace('/', '-')}"


def count_of_edits(night: Night) -> int:
    """How many edits `bring best` has saved."""
    return len({path.name.split("-")[1] for path in night.folder.glob("edits-*")})


def bring_edits(night: Night, name: str):
    """What `bring best` has saved, as it was."""
    saved = {file: saved_edit(night, name, file) for file in TARGET.files}
    if not all(path.is_file() for path in saved.values()):
        count = count_of_edits(night)
        raise Fail(f"there are no {name}: " + (f"edits-1 to edits-{count}" if count else "none"))
    if night.edits() is not None:
        raise Fail(f"{TARGET.file} has edits: uv run night.py bring best saves them, then again")
    made_from = read_json(night.folder / f"of-{name}.json")
    night.write_target({file: path.read_bytes() for file, path in saved.items()}, made_from)
    print(f"{TARGET.file} has the {name} again")


RUNS_TABLE = "{:16} {:>4} {:8} {:5} {:>9} {:>6} {:>8} {:>9} {:>4} {:10} {}"


def last_runs(count: int) -> list[dict]:
    """The ledger's last runs; a start without an end was cut off, or is running."""
    ledger = ledger_path()
    size = ledger.stat().st_size if ledger.is_file() else 0
    records, _ = read_ledger(max(0, size - 4096 * count))  # the end: all of 10,000 runs takes 0.8 s
    last = {record.get("run"): record for record in records}  # the end replaces the start
    return list(last.values())[-count:]


def say_search(night: Night, words: str):
    """The experiments of all nights that have these words."""
    lines = memory.search(night.root, words.split())
    print(*(lines or [f"no experiment of any night has: {words}"]), sep="\n")
    print("next: uv run night.py says where the night stands")


def list_runs(count: int):
    """The ledger's last runs as a table."""
    runs = last_runs(count)
    heads = "time (UTC),n,commit,split,score,s,M tokens,tokens/s,seed,status,description".split(",")
    print(RUNS_TABLE.format(*heads))
    ideas = subjects([run.get("commit") or "" for run in runs])
    for run in runs:
        n, asked, is_open = experiment_of(run)
        idea = ideas.get(run.get("commit"), "-")
        if asked.get("kind") in ("baseline", "repeat"):
            idea = title_of(asked)
        cells = [n, *run_cells(run, "running, or cut off" if is_open else "cut off"), idea]
        print(cut(printable(RUNS_TABLE.format(cells[1], cells[0], *map(str, cells[2:]))), 160))
    earlier = f"; earlier ones: uv run night.py runs {10 * count}" if len(runs) == count else ""
    print(f"from {ledger_path()}; n is the experiment; * has uncommitted changes{earlier}")
    print("next: uv run night.py says where the night stands")


def subjects(commits: list[str]) -> dict[str, str]:
    """The first lines of the messages of those commits that are in this repository."""
    asked = "".join(f"{commit}\n" for commit in {*commits} if commit).encode()
    words = ("log", "--no-walk", "--ignore-missing", "--stdin", "--format=%H %s")
    found = git(*words, give=asked, check=False) if asked else None
    return dict(line.split(" ", 1) for line in (found or "").splitlines())


def experiment_of(run: dict) -> tuple[str, dict, bool]:
    """(number, what was asked, whether it is open) of the night's experiment that made a ledger's run."""
    found = re.fullmatch(r"(.*/\.night/[^/]+)/queue/(\d+)/tree", run.get("repo") or "")
    if not found:
        return "-", {}, False
    for place in ("queue", "done"):
        if asked := read_json(Path(found[1]) / place / found[2] / "experiment.json"):
            return found[2], asked, place == "queue"
    return found[2], {}, False


def run_cells(record: dict, without_end: str) -> list:
    """One line of the table of runs, without number and description."""
    score, tokens = record.get("score"), record.get("tokens")
    per_second = rate(record)
    status = record.get("failure") or ("scored" if score is not None else without_end)
    return [
        record.get("time", "-")[:16].replace("T", " "),
        (record.get("commit") or "-")[:7] + ("*" if record.get("changed") else ""),
        record.get("split", "-"),
        "-" if score is None else f"{score:.6f}",
        "-" if record.get("training_seconds") is None else f"{record['training_seconds']:.0f}",
        "-" if tokens is None else f"{tokens / 1e6:.3f}",
        "-" if per_second is None else f"{per_second:,.0f}",
        record.get("seed", "-"),
        one_line(status, 40),
    ]
