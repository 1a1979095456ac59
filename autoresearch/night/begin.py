"""
`night.py begin` and `stop`: the branch, the table, the baseline; and what must be in order before.
"""

from __future__ import annotations

from pathlib import Path

from autoresearch.common import Fail, file_problem, some, write_atomically
from autoresearch.night import failures, supervisor
from autoresearch.night.results import COLUMNS
from autoresearch.night.settings import BASELINE_SEEDS, TARGET, cluster_address, time_limit
from autoresearch.night.status import print_status
from autoresearch.night.store import Night
from autoresearch.night.target import problem_of
from autoresearch.night.worker import LocalEngine
from autoresearch.referee.ledger import ledger_path
from autoresearch.referee.manifest import fingerprint, manifest


def begin(night: Night):
    """Branch, table and baseline. Idempotent: after a kill it completes what is missing."""
    # raises Fail, with the command to type, where nothing is prepared
    prepared = manifest() if TARGET.is_train_py else {}
    keep_out_of_git(night)
    check_ledger()
    time_limit()
    supervisor.capacity(night)
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
    supervisor.wake(night)
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
    supervisor.wake(night)
    print("stopped: what runs is being ended, and nothing starts")
    print("next: uv run night.py begin continues, and runs again what was ended")
