"""
What the ledger says of runs, beside each other and beside git: the audit without the table.

A run that was measured by other code, that trained longer than its clock says, that ran what no commit
holds: each is a finding, even where its score is the one in the table.
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from autoresearch.common import git_bytes, some
from autoresearch.night.findings import Finding, doubt, name_of
from autoresearch.night.settings import TARGET

UNSEEN_SECONDS = 20  # that no clock of a run sees, more than usual
UNSEEN_SCORING_SECONDS = 5  # from the question for its rows to its end


def audit_runs(runs: list[dict], started: dict[str, dict], root: Path | None) -> Iterator[Finding]:
    """What speaks for or against runs of the ledger (ledger.joined).

    started: what the night counted of each run, by its id. root: the repository that has their
    commits; without one the code is not checked.
    """
    yield from _sameness(runs)
    yield from outside_clock(runs, started)
    yield from _tampering(runs)
    if root:
        yield from _code(runs, root)


def _sameness(runs: list[dict]) -> Iterator[Finding]:
    """Scores are comparable on one fingerprint, device, torch and driver."""
    for key, several in (
        ("fingerprint", "fingerprints"),
        ("device", "devices"),
        ("torch", "versions of torch"),
        ("driver", "versions of the driver"),
    ):
        count = Counter(run[key] for run in runs if run.get(key)).most_common()
        if len(count) == 1:
            yield Finding(True, f"one {key} throughout: {count[0][0]}")
        elif count:
            groups = some(f"{value} ({times} runs)" for value, times in count)
            words = f"{len(count)} {several}, whose scores cannot be compared: {groups}"
            yield Finding(False, words)


def outside_clock(runs: list[dict], started: dict[str, dict]) -> Iterator[Finding]:
    """What a run's own clock says against the seconds that the night counted for its process.

    Where the rows of the score were hidden, the night knows when the run asked for them: before that it
    trained, afterwards it may only score. Importing and ending take seconds that no clock of a run sees,
    and all runs about the same.
    """
    whole, training, scoring = [], [], []  # (seconds that are not explained, and may be, run)
    for run in runs:
        ended = started.get(run["run"], {})
        wall, asked = ended.get("wall_seconds"), ended.get("asked_seconds")
        parts = [run.get(f"{part}_seconds") for part in ("startup", "training", "scoring")]
        if not wall or None in parts:
            continue
        spare = max(UNSEEN_SECONDS, 0.2 * parts[1])
        if asked:
            training.append((asked - parts[0] - parts[1], spare, run))
            spare = max(UNSEEN_SCORING_SECONDS, 0.2 * parts[2])
            scoring.append((wall - asked - parts[2], spare, run))
        else:
            whole.append((wall - sum(parts), spare, run))
    longer = "its process lasted longer than its own clock says"
    yield from doubt(longer, _longer_than_usual(whole))
    yield from doubt(f"{longer}, before it asked for its score", _longer_than_usual(training))
    yield from doubt(f"{longer}, with the rows of its score at hand", _longer_than_usual(scoring))


def _longer_than_usual(unseen: list[tuple[float, float, dict]]) -> list[str]:
    usual = median(seconds for seconds, *_ in unseen) if unseen else 0.0
    return [
        f"{name_of(run)} by {seconds:.0f} s"
        for seconds, spare, run in unseen
        if seconds > usual + spare
    ]


def _tampering(runs: list[dict]) -> Iterator[Finding]:
    """What runs did beside training: referee/tampering.py. And whose rows were within their reach."""
    scored = [run for run in runs if run.get("score") is not None]
    replaced = [f"{name} (in {name_of(run)})" for run in scored for name in run.get("replaced", [])]
    yield from doubt("locked code was replaced while it ran", replaced)
    opened = [f"{what} (in {name_of(run)})" for run in scored for what in run.get("opened", [])]
    yield from doubt(f"{TARGET.file} opened or started what is not the run's own", opened)
    readable = sum(run.get("held_out") == "readable" for run in scored)
    if readable:
        words = f"{readable} of {len(scored)} scored runs could read the text that scores them"
        yield Finding(True, words)


def object_ids(names: set[str], root: Path) -> dict[str, str]:
    """{name: object id} of those that git has, by one process. name: `COMMIT^{commit}` or `COMMIT:PATH`."""
    asked = sorted(name for name in names if name.isprintable())
    given = "".join(f"{name}\n" for name in asked).encode()
    answer = git_bytes("cat-file", "--batch-check=%(objectname)", at=root, give=given).decode()
    return {name: found for name, found in zip(asked, answer.splitlines()) if " " not in found}


def _sha256_in_git(names: set[str], root: Path) -> dict[str, str]:
    """{`COMMIT:PATH`: sha256 of the file} of those that git has."""
    blobs = object_ids(names, root)
    digests = {}
    for blob in set(blobs.values()):
        content = git_bytes("cat-file", "blob", blob, at=root)
        digests[blob] = hashlib.sha256(content).hexdigest()
    return {name: digests[blob] for name, blob in blobs.items()}


def _is_file(name: str, start: str, digests: dict[str, str], root: Path) -> bool:
    """Whether a sha256 beginning with `start` is that of `COMMIT:PATH`, or of a checkout of it."""
    if name not in digests or digests[name].startswith(start):
        return name in digests
    checked_out = git_bytes("cat-file", "--filters", name, at=root, check=False)  # CRLF, perhaps
    return checked_out is not None and hashlib.sha256(checked_out).hexdigest().startswith(start)


def _code(runs: list[dict], root: Path) -> Iterator[Finding]:
    """What ran and what it imported, against what git holds under the run's commit."""
    scored = [run for run in runs if run.get("score") is not None]
    first_imported = next((run["imported"] for run in scored if "imported" in run), {})
    # Uncommitted changes are a finding of their own; git may have collected what was discarded.
    scored = [run for run in scored if run.get("commit") and not run.get("changed")]
    known = object_ids({f"{run['commit']}^{{commit}}" for run in scored}, root)
    scored = [run for run in scored if f"{run['commit']}^{{commit}}" in known]
    names = {
        f"{run['commit']}:{path}"
        for run in scored
        for path in [*TARGET.files, *run.get("imported", {})]
    }
    digests = _sha256_in_git(names, root)
    other_script = []
    not_committed = []
    from_machine = set()
    for run in scored:
        ran = run.get("files") or {TARGET.files[0]: run.get("train_sha256")}
        for file, digest in ran.items():
            if digest and not _is_file(f"{run['commit']}:{file}", digest, digests, root):
                other_script.append(name_of(run))
        for path, start in run.get("imported", {}).items():
            if _is_file(f"{run['commit']}:{path}", start, digests, root):
                continue
            if first_imported.get(path) == start and Path(path).is_absolute():
                from_machine.add(path)  # a kernel from the hub, for example
            else:
                not_committed.append(f"{path} (in {name_of(run)})")
    yield from doubt(f"what ran is not the {TARGET.file} of its commit", other_script)
    yield from doubt("imported, and not in the commit", not_committed)
    if TARGET.is_train_py and scored:
        before = {c: _before_the_referee(c, root) for c in {run["commit"] for run in scored}}
        others = [name_of(r) for r in scored if before[r["commit"]] != before[scored[0]["commit"]]]
        words = f"other code than the first run's before {TARGET.file} imports the referee"
        yield from doubt(words, others)
    if from_machine:
        words = "imported from the first run on, and in no commit: "
        yield Finding(True, words + some(sorted(from_machine)))


def _before_the_referee(commit: str, root: Path) -> str:
    """What a commit's train.py does before code is imported that notes which files it opens."""
    try:
        tree = ast.parse(git_bytes("cat-file", "blob", f"{commit}:{TARGET.file}", at=root))
    except SyntaxError:
        return ""
    statements = []
    for node in tree.body:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [each.name for each in node.names] if isinstance(node, ast.Import) else []
        if any(name.split(".")[0] in ("autoresearch", "prepare") for name in names):
            return "\n".join(statements)
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            statements.append(ast.dump(node))
    return ""
