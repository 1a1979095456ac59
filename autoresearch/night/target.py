"""
What a night improves: the files that may change, the locked command that runs them, and its score.

Four lines of program.md say so: `edit`, `run`, `metric`, and `confirm` where there are other inputs to
confirm on; `check` is a command that must succeed first. Without them it is train.py, whose score the
locked code it imports writes into the ledger. Of any other target the score is the last line
`METRIC name=value` that the command prints, and the process that watches the run writes the ledger.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import resource
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from autoresearch.common import Fail, git, git_bytes, one_line, utc
from autoresearch.night.logs import read_log
from autoresearch.referee.ledger import append_record

TARGET_SETTINGS = ("edit", "run", "metric", "confirm", "check")
METRIC_LINE = re.compile(rb"^METRIC ([A-Za-z_][\w./%-]*)=(\S+)\s*$")
LONGEST_LINE = 1000  # bytes of a line that can be a METRIC


@dataclass(frozen=True)
class Target:
    """What is improved."""

    files: tuple[str, ...]  # that may change, by their paths in the repository
    command: tuple[str, ...]
    metric: str  # also the score's column in results.tsv
    test_metric: str  # the same on other inputs, for `confirm`
    lower_is_better: bool
    is_train_py: bool = False  # which writes the ledger itself
    confirm: tuple[str, ...] | None = None  # the command on other inputs

    @property
    def file(self) -> str:
        """All of its files, for people."""
        return ", ".join(self.files)

    def command_for(self, split: str) -> tuple[str, ...]:
        return self.confirm if split == "test" and self.confirm else self.command


TRAIN_PY = Target(
    files=("train.py",),
    command=(sys.executable, "train.py"),
    metric="val_bpb",
    test_metric="test_bpb",
    lower_is_better=True,
    is_train_py=True,
)


def read_target(settings: dict[str, str]) -> Target:
    """The target of these settings of program.md. Raises Fail where some lack or contradict others."""
    named = [name for name in TARGET_SETTINGS if settings.get(name)]
    if not named:
        return TRAIN_PY
    lacking = [name for name in ("edit", "run", "metric") if name not in named]
    if lacking:
        example = {
            "edit": "kernel.c",
            "run": "python3 judge.py",
            "metric": "ns_per_row, lower",
        }[lacking[0]]
        raise Fail(
            f"program.md says `{named[0]}` without `{lacking[0]}`: add a line such as "
            f"`- {lacking[0]}: {example}`"
        )
    found = re.fullmatch(
        r"([A-Za-z_][\w./%-]*)\s*,\s*(lower|higher)(?: is better)?", settings["metric"]
    )
    if not found:
        raise Fail(
            f"program.md, setting `metric: {one_line(settings['metric'], 40)}`: it must be a name and "
            "which is better, such as `- metric: ns_per_row, lower`"
        )
    files = tuple(name.strip().removeprefix("./") for name in settings["edit"].split(","))
    for file in files:
        outside = not file or file.startswith("/") or ".." in Path(file).parts
        if (
            outside
            or file in ("program.md", "results.tsv")
            or Path(file).parts[0] in (".git", ".night")
        ):
            raise Fail(
                f"program.md, setting `edit`: `{one_line(file, 60)}` cannot be changed by experiments: "
                "name files of this repository, by their paths from its top"
            )
    check = settings.get("check")
    return Target(
        files=files,
        command=shell(settings["run"], check),
        metric=found[1],
        test_metric=f"{found[1]}, other inputs" if settings.get("confirm") else found[1],
        lower_is_better=found[2] == "lower",
        confirm=shell(settings["confirm"], check) if settings.get("confirm") else None,
    )


def target_of_log(path: Path, target: Target) -> tuple[Target, str]:
    """(the target with the metric of a log that others wrote, how its direction is known)."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if target.metric.encode() not in file.read(1000):
            log = read_log(path, target.metric, target.lower_is_better)
            if log.rows and log.metric != target.metric:
                named = dict(metric=log.metric, test_metric=log.metric)
                return replace(target, **named, lower_is_better=log.lower_is_better), log.why
    return target, ""


def shell(command: str, check: str | None) -> tuple[str, ...]:
    """The command for sh, after the check, whose failure is named."""
    if not check:
        return "sh", "-c", command
    failed = "echo 'FAIL: the check did not succeed' >&2; exit 1"
    return "sh", "-c", f"( {check}\n) || {{ {failed}; }}\n{command}"


def problem_of(target: Target, root: Path) -> str | None:
    """Why experiments cannot change the target's files, with what to type; or None."""
    for file in target.files:
        entry = git("ls-tree", "HEAD", "--", file, at=root)
        mode = entry.split(" ", 1)[0]
        if (root / file).is_symlink() or mode == "120000":
            return f"`edit: {file}`: it is a link: name the file that it leads to"
        if mode in ("040000", "160000") or (root / file).is_dir():
            return f"`edit: {file}`: it is a folder: name its files, by comma"
        if not entry:
            there = (root / file).is_file()
            add = f"git add {file} && git commit" if there else "make it, git add it, and commit"
            return f"`edit: {file}`: it is not in git: {add}, then begin"
    return None


# --------------------------------------------------------------- the ledger's lines of such a run


def metrics_in(log: Path) -> dict[str, str]:
    """The last `METRIC name=value` of each name in a run's output, however long that is."""
    found: dict[str, str] = {}
    with open(log, "rb") as file:
        while line := file.readline(LONGEST_LINE):
            if match := METRIC_LINE.match(line):
                found[match[1].decode()] = match[2].decode(errors="replace")
    return found


def judged(
    target: Target, log: Path, code: int
) -> tuple[float | None, str | None, dict[str, float]]:
    """(score, why there is none, all metrics that are numbers) of a run that ended with `code`."""
    said = metrics_in(log)
    numbers = {name: value for name, text in said.items() if (value := _finite(text)) is not None}
    if code != 0:
        return None, None, numbers  # its log says why
    if target.metric not in said:
        others = f"; it printed METRIC {', '.join(sorted(said))}" if said else ""
        return None, f"it printed no line `METRIC {target.metric}=...`{others}", numbers
    if target.metric not in numbers:
        shown = one_line(said[target.metric], 30)
        return None, f"METRIC {target.metric}={shown} is no finite number", numbers
    return numbers[target.metric], None, numbers


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


class Witness:
    """Writes the two lines of the ledger of a run whose target does not."""

    def __init__(self, target: Target, root: Path, tree: Path, asked: dict, run: dict, split: str):
        self.target = target
        files = {
            file: hashlib.sha256((tree / file).read_bytes()).hexdigest() for file in target.files
        }
        self.shared = {
            "run": run["id"],
            "repo": str(tree),
            "commit": run["commit"],
            "changed": False,
            "files": files,
            "seed": run.get("seed", asked["seed"]),
            "split": split,
            "fingerprint": judge_fingerprint(target, root, run["commit"]),
            "device": os.uname().nodename,
        }
        append_record({**self.shared, "event": "start", "time": utc()})

    def ended(self, code: int, log: Path, seconds: float):
        score, failure, metrics = judged(self.target, log, code)
        measured = {"metrics": metrics, "wall_seconds": seconds, "exit": code}
        # Kilobytes of the largest process, bytes on macOS; see getrusage(2).
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        measured["peak_memory_mb"] = largest / (1 << 20 if sys.platform == "darwin" else 1 << 10)
        measured |= {"failure": failure} if score is None else {"score": score}
        append_record({**self.shared, **measured, "event": "end", "time": utc()})


def judge_fingerprint(target: Target, root: Path, commit: str) -> str:
    """12 hex digits of all that measures: every file of the commit but the target's, and the commands."""
    entries = git_bytes("ls-tree", "-r", "-z", commit, at=root).split(b"\0")
    own = {file.encode() for file in target.files}
    locked = [entry for entry in entries if entry and entry.split(b"\t", 1)[1] not in own]
    commands = "\n".join([*target.command, *(target.confirm or ())]).encode()
    return hashlib.sha256(b"\0".join([*sorted(locked), commands])).hexdigest()[:12]
