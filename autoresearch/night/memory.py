"""
What a night remembers for whoever comes next: earlier changes of the same lines, lessons, and what was
never tried. `try` notes of each experiment which lines and which parts of the files it changed.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from autoresearch.common import Fail, append_line, cut, one_line, utc
from autoresearch.night import journal, rules
from autoresearch.night.repo import Contents
from autoresearch.night.settings import number_setting
from autoresearch.night.store import Night, parsed

LESSONS = "lessons.md"
SHOWN_LESSONS = 3
MOST_LINES = 12  # of a change that are remembered
NEAR = 0.25  # two numbers are near within this share of the larger
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d_]*(?:\.\d+)?(?:e[-+]?\d+)?", re.I)

# ----------------------------------------------------------------------- what an experiment changed


def changed_lines(diff: str) -> list[str]:
    """The lines that a diff without context adds and takes out, with their sign, as they are compared."""
    found = []
    for line in diff.splitlines():
        if line[:1] in "+-" and not line.startswith(("+++", "---")) and line[1:].strip():
            found.append(cut(line[0] + " ".join(line[1:].split("#")[0].split()), 160))
    return found[:MOST_LINES]


def changed_parts(before: Contents, after: Contents) -> list[str]:
    """The top-level names of Python files whose text differs; `FILE` for any other file."""
    found = []
    for file, content in after.items():
        if content == before.get(file):
            continue
        old, new = (
            top_level(text.decode(errors="replace")) for text in (before.get(file, b""), content)
        )
        if not (file.endswith(".py") and new):
            found.append(file)
            continue
        found += [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return found


def top_level(text: str) -> dict[str, str]:
    """{name: its source} of the classes, functions and settings of a Python file."""
    try:
        nodes = ast.parse(text).body
    except (SyntaxError, ValueError):
        return {}
    lines = text.splitlines()
    found: dict[str, str] = {}
    for node in nodes:
        name = getattr(node, "name", None)
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            name = ", ".join(ast.unparse(target) for target in targets)
        if name:
            source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            found[name] = found.get(name, "") + source
    return found


def earlier_changes(lines: list[str], records: list[dict]) -> list[tuple[dict, str]]:
    """(record, `the same` or `nearly the same` or `other values in`) of what changed the same lines.

    The same lines, added and taken out, have the same text but for their numbers. Newest first.
    """
    wanted = _masked(lines)
    found = []
    for record in reversed(records):
        known = record.get("lines")
        if not known or not wanted or _masked(known) != wanted:
            continue
        values, others = _numbers(lines), _numbers(known)
        if values == others:
            found.append((record, "the same"))
        elif all(abs(a - b) <= NEAR * max(abs(a), abs(b)) for a, b in zip(values, others)):
            found.append((record, "nearly the same"))
        else:
            found.append((record, "other values in"))
    return found


def _added(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("+")]


def _masked(lines: list[str]) -> list[str]:
    return [NUMBER.sub("#", line) for line in lines]


def _numbers(lines: list[str]) -> list[float]:
    return [float(word.replace("_", "")) for line in _added(lines) for word in NUMBER.findall(line)]


def earlier_lines(night: Night, lines: list[str]) -> list[str]:
    """For `try`: which experiments of any night changed these lines before, and what came."""
    nights = {night.tag: night.records()}
    for path in sorted(night.state_dir.glob("*/journal.jsonl"), key=lambda p: -p.stat().st_mtime):
        if path.parent.name != night.tag:
            nights[path.parent.name] = parsed(path.read_bytes().split(b"\n"))
    said = []
    for tag, records in nights.items():
        for record, how in earlier_changes(lines, records)[:3]:
            there = "" if tag == night.tag else f" of night {tag}"
            what = "change" if how != "other values in" else "lines"
            said.append(f"experiment {record['n']}{there} made {how} {what}: {_outcome(record)}")
    return said[:4]


def _outcome(record: dict) -> str:
    score = "" if record["score"] is None else f" {record['score']:.6f}"
    status = record["status"] if record["run"] else "not run"
    return f"{status}{score}, {one_line(record['why'], 80)}"


# --------------------------------------------------------------------------------------- searching


def search(root: Path, words: list[str], most: int = 30) -> list[str]:
    """All experiments of all nights whose message, decision or changed lines hold these words."""
    wanted = [word.lower() for word in words]
    found = []
    for path in root.glob(".night/*/journal.jsonl"):
        for record in parsed(path.read_bytes().split(b"\n")):
            if record.get("kind") not in rules.TRIED:
                continue
            text = [record["message"], record["why"], *(record.get("lines") or [])]
            if all(word in " ".join(text).lower() for word in wanted):
                found.append((record["ended"], path.parent.name, record))
    found.sort(key=lambda one: (one[0], one[2]["n"]), reverse=True)
    lines = []
    for ended, tag, record in found[:most]:
        got = "" if record["got"] is None else f" ({record['got']:+.6f})"
        score = "not run" if record["score"] is None else f"{record['score']:.6f}{got}"
        what = one_line(f"{record['message']}: {record['why']}", 90)
        lines.append(f"{ended[:10]} {tag} {record['n']}: {record['status']} {score}  {what}")
    if len(found) > most:
        lines.append(f"and {len(found) - most} older ones: use more words")
    return lines


def say_search(night: Night, words: str):
    """The experiments of all nights that have these words."""
    lines = search(night.root, words.split())
    print(*(lines or [f"no experiment of any night has: {words}"]), sep="\n")
    print("next: uv run night.py says where the night stands")


# ----------------------------------------------------------------------------------------- lessons


def note(night: Night, text: str):
    """Appends a line to lessons.md: when, in which night, on which best."""
    if not text.strip():
        raise Fail("say what was learnt: uv run night.py note '...'")
    best = journal.best_of(night.records())
    where = f"best {best['score']:.6f}" if best else "no best yet"
    line = f"- {utc()[:16].replace('T', ' ')} {night.tag}, {where}: {one_line(text, 500)}"
    append_line(night.root / LESSONS, line.encode())
    print(f"noted in {LESSONS}")


def lesson_lines(night: Night) -> list[str]:
    """The last lessons, for the status."""
    path = night.root / LESSONS
    text = path.read_text(errors="replace") if path.is_file() else ""
    lessons = [line for line in text.splitlines() if line.startswith("- ")][-SHOWN_LESSONS:]
    shown = [f"  {one_line(lesson[2:], 160)}" for lesson in lessons]
    return [f"last lessons ({LESSONS} has all):", *shown] if shown else []


# -------------------------------------------------------------------------------------- stagnation


def stagnation_lines(night: Night) -> list[str]:
    """After `patience` experiments without a keep: what the records say may help."""
    records = [record for record in night.records() if record["kind"] != "baseline"]
    since = 0
    for record in reversed(records):
        if record["status"] == "keep":
            break
        since += 1
    if since < number_setting("patience", "10"):
        return []
    lines = [f"{since} experiments without a keep. From the records:"]
    best = journal.best_of(night.records())
    deviation = journal.noise([*night.records(), *night.repeats()]) or 0.0
    near = [
        r
        for r in records
        if r["status"] == "discard" and (r.get("seen") or [-9e9])[0] > -2 * deviation
    ]
    near = [r for r in near if best and r["base"] == best["commit"]]
    near.sort(key=lambda record: -record["seen"][0])
    if len(near) > 1:
        names = "; ".join(
            f"{r['n']} ({one_line(r['message'], 40)}, {r['got']:+.6f})" for r in near[:3]
        )
        lines.append(
            f"  near misses on this best, never combined: {names}: bring one, bring another, try"
        )
    if near:
        n = near[0]["n"]
        lines.append(f"  or a second line on one of them: bring on-{n}, edit, try --on {n}")
    touched = {part for record in records for part in record.get("parts") or []}
    parts = [part for part in _parts_of_best(night) if part not in touched]
    if parts:
        lines.append(f"  never changed: {one_line(', '.join(parts), 150)}")
    return lines


def _parts_of_best(night: Night) -> list[str]:
    contents = night.repo.contents_at(night.tip())
    python = [text for file, text in contents.items() if file.endswith(".py")]
    return [name for text in python for name in top_level(text.decode(errors="replace"))]
