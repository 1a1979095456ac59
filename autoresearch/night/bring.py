"""
`night.py bring`: an experiment's change, the best or saved edits into the target's file.

Edits are never lost: what another version takes the place of is saved first, and can be brought back.
"""

from __future__ import annotations

import re
from pathlib import Path

from autoresearch.common import Fail, one_line, read_json, write_atomically, write_json
from autoresearch.night import lines as second_lines
from autoresearch.night import rules
from autoresearch.night.repo import merged
from autoresearch.night.settings import TARGET
from autoresearch.night.show import diff_lines
from autoresearch.night.status import what_next
from autoresearch.night.store import Night


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
    record, _ = night.find(int(n))
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
