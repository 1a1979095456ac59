"""
The audit: what the table claims, against the ledger, the night's journal and git.

It reports what would change a verdict, one sentence a finding. A line that begins with `!` is
something to look at before believing the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from statistics import fmean

from autoresearch.common import Fail, git, one_line, some
from autoresearch.night import lines as second_lines
from autoresearch.night.doubts import FEW_STEPS
from autoresearch.night.evidence import Seen
from autoresearch.night.findings import Finding, commit_of, doubt, matching, name_of
from autoresearch.night.journal import best_of, displaced_by, lineage, scores_of_commit
from autoresearch.night.report import NightReport
from autoresearch.night.results import Row
from autoresearch.night.rules import seed_of
from autoresearch.night.run_audit import audit_runs, object_ids
from autoresearch.night.settings import BASELINE_SEEDS, TARGET
from autoresearch.referee.ledger import joined

SURE_OF_ONE_RUN = 2  # standard errors; a best with less on one run is named


def say_audit():
    """Prints the audit of the night in this folder."""
    report = NightReport.here()
    print(*audit_lines(report), sep="\n")
    best = best_of(report.records)
    to_confirm = best and best["kind"] != "baseline" and not report.confirmed
    then = "the human confirms the best: uv run night.py confirm"
    print("next:", then if to_confirm else "uv run night.py")


def audit_lines(report: NightReport) -> list[str]:
    """The findings, and a summary as the last line."""
    findings = list(audit(report))
    return [*map(str, findings), summary_of(report, findings)]


def summary_of(report: NightReport, findings: list[Finding]) -> str:
    doubts = sum(not finding.fine for finding in findings)
    if not report.rows:
        return "No row was read, so nothing was checked."
    if doubts:
        return f"{doubts} thing{'s' if doubts > 1 else ''} to look at"
    return "Nothing found that speaks against these numbers."


def audit(report: NightReport) -> Iterator[Finding]:
    """Each comparison and its result."""
    for words in report.skipped:
        yield Finding(False, words)
    in_git = True
    try:
        git("rev-parse", "--git-dir", at=report.root)
    except Fail as problem:
        in_git = False
        words = str(problem).removeprefix("FAIL: ")
        yield Finding(False, f"what ran and what was kept is not checked: {words}")
    if in_git and report.problem:
        yield Finding(False, f"the night's own records were not read: {report.problem}")
    elif in_git and report.rows and not report.records:
        yield Finding(True, "no journal of this night: rows are compared with ledger and git alone")
    claimed = {row.hash[:7] for row in report.rows if row.hash}
    runs = joined(report.ledger)
    own = [run for run in runs if _is_own(run, report, claimed)]
    own_ids = {run["run"] for run in own}
    val = [run for run in runs if run.get("split") == "val"]
    val = [run for run in val if run["run"] in own_ids or commit_of(run) in claimed]
    test = [run for run in own if run.get("split") == "test"]
    confirming = [run for run in test if run["run"] in report.started]
    if val:
        matched = _match(report.rows, val)
        known = {run["run"] for several in matched.values() for run in several}
        known |= report.started.keys()
        yield from _scores(report.rows, val, matched)
        yield from _runs_left_out([r for r in val if r["run"] in own_ids - known])
    elif report.rows:
        yield Finding(False, "the ledger holds no run of this night: no score can be checked")
    yield from audit_runs([*val, *confirming], report.started, report.root if in_git else None)
    for words in report.slower:
        yield Finding(True, words)
    if report.damaged:
        yield Finding(False, f"{report.damaged} lines of the ledger are damaged")
    if report.damaged_records:
        yield Finding(False, f"{report.damaged_records} lines of the night's journal are damaged")
    yield from _test_split(test, confirming)
    yield from _confirmation(report.confirmed, test, confirming)
    yield from _journal(report)
    for words in second_lines.all_lines(report.records):
        yield Finding(True, words)
    if in_git:
        yield from _branch(report)


# ------------------------------------------------------------------------------- rows and ledger


def _is_own(run: dict, report: NightReport, claimed: set[str]) -> bool:
    """Whether a run of the ledger belongs to this night, even if the night did not start it."""
    if run["run"] in report.started:
        return True
    place = run.get("repo") or "/"
    tag = report.branch.removeprefix("autoresearch/")
    if place.startswith(f"{report.root}/.night/{tag}/"):
        return True
    here = Path(place).resolve() == report.root
    return here and (run.get("branch") == report.branch or commit_of(run) in claimed)


def _match(rows: list[Row], runs: list[dict]) -> dict[int, list[dict]]:
    """{row's n: the runs that measured it}, no run twice. A crash may have a run without a score."""
    by_commit: dict[str, list[dict]] = {}
    for run in runs:
        by_commit.setdefault(commit_of(run), []).append(run)
    matched = {}
    for row in rows:
        candidates = by_commit.get(row.hash[:7], []) if row.hash else []
        for several in combinations(candidates, row.runs):
            if _is_mean(row.score, [run.get("score") for run in several]):
                matched[row.n] = [*several]
                for run in several:
                    candidates.remove(run)
                break
    return matched


def _is_mean(score: float | None, measured: list[float | None]) -> bool:
    """Whether a row's score is the mean of these, as far as its six decimals go."""
    if score is None or None in measured:
        return measured == [score]
    return abs(fmean(measured) - score) < 1.5e-6


def _scores(rows: list[Row], runs: list[dict], matched: dict[int, list[dict]]) -> Iterator[Finding]:
    """Each claimed score against what the ledger has of its commit."""
    mismatched = []
    edited = []
    other_seed = []
    scored = [row for row in rows if row.score is not None]
    for row in scored:
        measuring = matched.get(row.n)
        if measuring is None:
            same = [other for other in runs if row.hash and commit_of(other) == row.hash[:7]]
            measured = [f"{other['score']:.6f}" for other in same if other.get("score") is not None]
            claim = f"{row.score:.6f} claimed, {some(measured) or 'nothing'} measured"
            mismatched.append(f"experiment {row.n} ({one_line(row.commit, 20)}: {claim})")
        elif any(run.get("changed") for run in measuring):
            edited.append(row.n)
        elif row.status == "keep" and BASELINE_SEEDS[0] not in map(seed_of, measuring):
            other_seed.append(row.n)
    yield from matching("scores", len(scored), mismatched)
    yield from doubt(f"{TARGET.file} had uncommitted changes in experiments", edited)
    yield from doubt(f"kept with another seed than {BASELINE_SEEDS[0]}", other_seed)


def _runs_left_out(runs: list[dict]) -> Iterator[Finding]:
    """Runs of this night that have no row and that the night did not start."""
    scored = [
        f"{run['score']:.6f} ({name_of(run)})" for run in runs if run.get("score") is not None
    ]
    yield from doubt(f"{len(scored)} measured scores have no row", scored)
    if not scored:
        yield Finding(True, "every measured score has its row")


# ------------------------------------------------------------------------------- the test split


def _test_split(test: list[dict], confirming: list[dict]) -> Iterator[Finding]:
    """It is for the end: baseline and winner, once by hand or by the night's confirmation."""
    scored = [run for run in test if run.get("score") is not None]
    by_hand = [run for run in scored if run not in confirming]
    if scored:
        few = len(by_hand) <= 2 and len({run.get("commit") for run in scored}) <= 2
        words = f"the test split was scored {len(scored)} times"
        yield Finding(few, words if few else words + "; more than once for baseline and winner")


def _confirmation(
    confirmed: list[dict], test: list[dict], confirming: list[dict]
) -> Iterator[Finding]:
    """The confirmation's records against the ledger: nothing edited, nothing left out."""
    keys = ("commit", "seed", "score")
    measured = {run["run"]: [run.get(key) for key in keys] for run in test}
    scored = [record for record in confirmed if record["score"] is not None]
    mismatched = [r["n"] for r in scored if measured.get(r["run"]) != [r[key] for key in keys]]
    yield from matching("scores of the confirmation", len(scored), mismatched)
    recorded = {(record["commit"], record["seed"]) for record in scored}
    runs = [run for run in confirming if run.get("score") is not None]
    missing = [r for r in runs if (r.get("commit"), r.get("seed")) not in recorded]
    yield from doubt("scored on the test split, not in the confirmation", map(name_of, missing))


# ---------------------------------------------------------------------------------- the journal


def _journal(report: NightReport) -> Iterator[Finding]:
    """The rows against the night's own records."""
    if not report.records:
        return
    rows = [(row.commit[:7], f"{row.score or 0:.6f}", row.status) for row in report.rows]
    records = [(r["commit"][:7], f"{r['score'] or 0:.6f}", r["status"]) for r in report.records]
    yield from _weak_verdicts(report.records, report.repeats)
    recorded, told = set(records), set(rows)
    unknown = [row.n for row, key in zip(report.rows, rows) if key not in recorded]
    lost = [record["n"] for record, key in zip(report.records, records) if key not in told]
    yield from doubt("rows that the night did not write so", unknown)
    yield from doubt("experiments without the row that the night wrote", lost)


def _weak_verdicts(records: list[dict], repeats: list[dict]) -> Iterator[Finding]:
    """What was decided on runs that measured the machine as much as the idea."""
    decided = [record for record in records if record["score"] is not None]
    few = [r["n"] for r in decided if 0 < (r.get("steps") or 0) < FEW_STEPS]
    slow = [r["n"] for r in decided if r.get("slow")]
    busy = [r["n"] for r in decided if r.get("busy")]
    yield from doubt(f"decided on fewer than {FEW_STEPS} steps of training: experiments", few)
    yield from doubt("decided on a run that was slowed: experiments", slow)
    yield from doubt("decided on a machine that others used, too: experiments", busy)
    best = best_of(records)
    if best and best.get("seen") and len(scores_of_commit(best["commit"], records, repeats)) == 1:
        errors = Seen(*best["seen"]).errors
        words = f"the best rests on one run, {errors:.1f} standard errors over its base"
        yield from doubt(words, [best["n"]] if errors < SURE_OF_ONE_RUN else [])


# ------------------------------------------------------------------------------------------- git


def _branch(report: NightReport) -> Iterator[Finding]:
    """Every kept commit is on the branch, nothing else is, and none touches another file."""
    root = report.root
    kept = [row for row in report.rows if row.status == "keep"]
    ids = object_ids({f"{row.hash}^{{commit}}" for row in kept if row.hash}, root)
    commits = {row.n: ids.get(f"{row.hash}^{{commit}}") for row in kept}
    unknown = [one_line(row.commit, 20) or "-" for row in kept if not commits[row.n]]
    yield from doubt("kept, but git knows no such commit", unknown)
    known = [commit for commit in commits.values() if commit]
    if not known:
        return
    tip = git("rev-parse", "-q", "--verify", report.branch, at=root, check=False)
    best = best_of(report.records)
    if best and tip in [r["commit"] for r in report.records if r["status"] == "keep"]:
        tip = best["commit"]  # only the agent's own commands move the branch, so it may lag behind
    history = (git("rev-list", tip, at=root, check=False) or "").split() if tip else []
    # A best leaves the branch where a better change that conflicts with it displaces it.
    displaced = [lost["commit"] for r in report.records for lost in displaced_by(r, report.records)]
    missing = [commit[:7] for commit in known if commit not in [*history, *displaced]]
    yield from doubt(f"kept, but not on the branch {report.branch}", missing)
    start = known[0]
    since = history[: history.index(start)] if start in history else []
    # A line that joined brought along what was kept on it, and its root.
    of_lines = lineage(best["commit"], report.records) if best else []
    extra = [commit[:7] for commit in since if commit not in (*known, *of_lines)]
    yield from doubt("on the branch, but in no row as kept", extra)
    other_files = []
    for commit in dict.fromkeys([*known, *since]):
        changed = git("diff", "--name-only", f"{commit}~1", commit, at=root, check=False) or ""
        files = set(changed.splitlines()) - {*TARGET.files}
        if files and commit != start:
            other_files.append(f"{commit[:7]} ({some(sorted(files), 3)})")
    yield from doubt(f"commits that touch more than {TARGET.file}", other_files)
    if not (unknown or missing or extra or other_files):
        yield Finding(True, f"every kept commit is on the branch and touches only {TARGET.file}")
