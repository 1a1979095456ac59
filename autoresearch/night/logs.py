"""
Logs of experiments as they are found in the wild: tables with tabs or commas, or a JSON object a line.

Whatever wrote them, they have a score, a status and mostly a description. The metric is the one that the
log names, or else the first column of numbers that is no memory, time or count; its direction is what the
log says, or what the kept scores do. Failures that are written as numbers are no scores.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from autoresearch.common import one_line

# The first of these that is there.
FILES = ("results.tsv", "results.jsonl", "autoresearch.jsonl", "results.csv")
COLUMNS = ("commit", "val_bpb", "memory_gb", "status", "description")

# Column names, in lower case, by what they hold.
COMMIT = tuple("commit hash sha commit_hash id experiment exp run tag # iteration".split())
STATUS = tuple("status decision result outcome verdict state kept".split())
DESCRIPTION = tuple("description desc change hypothesis idea message notes note what".split())
MEMORY = tuple("memory_gb peak_memory_gb mem_gb vram_gb peak_vram_gb".split())
NO_METRIC = re.compile(
    r"(n|no|id|#|run|exp|experiment|iter|iteration|index|seed|commit|hash|date|timestamp|delta|gain|change)$"
    r"|.*(^|_)(mem|memory|vram|peak|time|seconds|secs|minutes|mins|duration|wall|elapsed|steps?|epochs?"
    r"|params?|parameters|tokens)(_|$)|.*_(s|mb|gb|mib|gib|m|b)$|num_.*"
)

KEPT = "keep kept keeper accept accepted improved improvement best new_best baseline merged win".split()
LEFT = (
    "discard discarded reject rejected revert reverted rollback rolled_back worse neutral".split()
)
LEFT += "no_change no_improvement regression skip skipped drop dropped inconclusive".split()
BROKEN = "crash crashed fail failed failure error timeout oom invalid nan diverged".split()
BROKEN += "checks_failed check_failed build_failed aborted killed".split()
STATUSES = {"keep": KEPT, "discard": LEFT, "crash": BROKEN}
SENTINELS = (0.0, -1.0, 100.0, 999.0, 999.999, 9999.0, 99999.0, 1e6, 1e9)  # of what gave no score

HIGHER = re.compile(
    r"acc|f1|auc|r2|score|rate|flop|tok.*s|throughput|fps|sharpe|reward|return|speedup|ratio|recall|precision"
    r"|bleu|rouge|iou|map$|gb_?s|points|wins?$"
)
LOWER = re.compile(
    r"bpb|bpc|loss|nll|ppl|perplex|err|mse|mae|wer|cer|latency|_ms|_ns|_us|bytes|size|cost|regret"
)


def log_path(root: Path) -> Path:
    """The log of a repository: its results.tsv, or another that is there instead."""
    return next((root / name for name in FILES if (root / name).is_file()), root / FILES[0])


@dataclass
class Log:
    """What a file of experiments says."""

    metric: str
    lower_is_better: bool
    why: str  # how that is known, in a few words
    rows: list[dict] = field(default_factory=list)  # commit, score, memory_gb, status, what
    bad: list[str] = field(default_factory=list)  # what is no row, shortened
    problem: str = ""  # why nothing could be read


def read_log(path: Path, metric: str, lower_is_better: bool) -> Log:
    """metric: the wanted one; where the log has another, the log's is taken, with its direction."""
    text = path.read_text("utf-8-sig", "replace") if path.is_file() else ""
    said, names, found = _objects(text) if text.lstrip().startswith("{") else _table(text, metric)
    if not found:
        return Log(metric, lower_is_better, "")
    status = next((name for name in STATUS if name in names), None)
    own = said.get("metric", "").lower()
    own = own if own in names else None
    chosen = own or (metric.lower() if metric.lower() in names else _first_metric(names, found))
    missing = "status" if status is None else "a metric" if chosen is None else None
    if missing:
        columns = one_line(", ".join(names), 200)
        problem = (
            f"all {len(found)} rows were skipped: no column is called {missing}, only {columns}"
        )
        return Log(metric, lower_is_better, "", problem=f"{problem}; rename the right one")
    log = Log(metric, lower_is_better, "program.md's")
    if chosen != metric.lower():
        log.metric = said.get("name") or chosen
    for place, cells in found:
        kind = _status(cells.get(status, ""))
        score = number(cells.get(chosen, ""))
        if chosen == "val_bpb" and score is not None and score <= 0:
            score = None  # text has more than no bits
        if kind is None or (score is None and kind != "crash"):
            shown = " ".join(str(value) for value in cells.values() if value not in ("", None))
            log.bad.append(f"line {place}: {one_line(shown, 40)}")
            continue
        log.rows.append(
            {
                "commit": _first(cells, COMMIT),
                "score": None if kind == "crash" else score,
                "memory_gb": _positive(_first(cells, MEMORY)),
                "status": kind,
                "what": _first(cells, DESCRIPTION),
            }
        )
    _drop_sentinels(log)
    if chosen != metric.lower() or "direction" in said:
        log.lower_is_better, log.why = _direction(log, said.get("direction", ""))
    return log


# ------------------------------------------------------------------------------------- two forms


def _table(text: str, metric: str) -> tuple[dict, list[str], list[tuple[int, dict]]]:
    """(what remarks say, the columns' names, (line, cells by name) of each row)."""
    remarks, lines = {}, []
    for place, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if line.startswith("#") and line.count("\t") < 2 and line.count(",") < 3 and not lines:
            if found := re.match(r"#\s*([\w ]+?)\s*[:=]\s*(.+?)\s*$", line):
                remarks[found[1].lower().replace(" ", "_")] = found[2]
        elif line.strip():
            lines.append((place, line))
    if not lines:
        return {}, [], []
    first = lines[0][1]
    comma = "\t" not in first and first.count(",") >= 2
    rows = [(place, _cells(line, comma)) for place, line in lines]
    names = [*COLUMNS]
    if _is_header(rows[0][1], metric):
        names = [cell.lower().lstrip("# ").strip("`* ") for cell in rows.pop(0)[1]]
    wide = names and names[-1] in DESCRIPTION
    found = []
    for place, cells in rows:
        if wide and len(cells) > len(names):  # tabs within the description
            cells = [*cells[: len(names) - 1], " ".join(cells[len(names) - 1 :])]
        named: dict = {}
        for name, cell in zip(names, cells):
            named.setdefault(name, cell)  # the first of two columns with one name
        found.append((place, named))
    said = {"metric": remarks.get("metric", remarks.get("metric_name", ""))}
    for key in ("metric_direction", "direction", "better", "best_direction"):
        if key in remarks:
            said["direction"] = remarks[key]
    return said, names, found


def _cells(line: str, comma: bool) -> list[str]:
    cells = next(csv.reader(io.StringIO(line)), []) if comma else line.split("\t")
    return [cell.strip() for cell in cells]


def _objects(text: str) -> tuple[dict, list[str], list[tuple[int, dict]]]:
    """The same of a JSON object a line. One with a direction, or without a status, is the settings'."""
    said: dict = {}
    names: dict = {}
    found = []
    for place, line in enumerate(text.split("\n"), 1):
        try:
            one = json.loads(line) if line.strip() else None
        except ValueError:
            one = {"?": line}
        if not isinstance(one, dict):
            continue
        cells = {str(key).lower(): value for key, value in one.items()}
        if not any(name in cells for name in STATUS) and "?" not in cells:
            flat = {key.replace("_", ""): value for key, value in cells.items()}
            for key in ("metricname", "metric", "primarymetric"):
                if isinstance(flat.get(key), str):
                    said["name"] = flat[key]
                    break
            for key in ("bestdirection", "metricdirection", "direction", "better"):
                if isinstance(flat.get(key), str):
                    said["direction"] = flat[key]
            continue
        names |= dict.fromkeys(cells)
        found.append((place, cells))
    if "metric" in names:
        said["metric"] = "metric"
    elif said.get("name"):
        said["metric"] = said["name"]
    return said, [*names], found


def _is_header(cells: list[str], metric: str) -> bool:
    """A first line without numbers; one cell alone where it is a header with other separators."""
    named = len(cells) > 1 or metric in cells[0].lower()
    return named and all(number(cell) is None for cell in cells)


# ---------------------------------------------------------------------------------------- values


def number(value) -> float | None:
    """A finite number, also `45.2%`, `1,234.5` or `~3`; or None."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, str):
        value = re.sub(r"^[~≈]\s*|\s*%$|(?<=\d),(?=\d{3}\b)", "", value.strip())
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def _positive(value) -> float | None:
    found = number(value)
    return found if found is not None and found > 0 else None


def _first(cells: dict, names: tuple[str, ...]) -> str:
    found = next((cells[name] for name in names if cells.get(name) not in (None, "")), "")
    return found if isinstance(found, str) else str(found)


def _status(value) -> str | None:
    if isinstance(value, bool):
        return "keep" if value else "discard"
    word = re.sub(r"[\s-]+", "_", str(value).strip().strip("*`✓✗✅❌ ").lower())
    return next((kind for kind, words in STATUSES.items() if word in words), None)


def _first_metric(names: list[str], found: list[tuple[int, dict]]) -> str | None:
    """The first column that mostly holds numbers and is no memory, time, step or parameter count.

    Where there is no other, a time or a count may be what is improved; a number of the row is not.
    """
    numeric = []
    for name in names:
        values = [cells.get(name) for _, cells in found]
        numbers = sum(number(value) is not None for value in values)
        if numbers * 2 >= len(values) and name not in (
            *COMMIT,
            *STATUS,
            "n",
            "no",
            "seed",
            "index",
        ):
            numeric.append(name)
    return next((name for name in numeric if not NO_METRIC.fullmatch(name)), (numeric or [None])[0])


def _drop_sentinels(log: Log):
    """A discard written as 0, 100 or 999, far from all that was kept, failed: it has no score."""
    kept = [
        row["score"] for row in log.rows if row["status"] == "keep" and row["score"] is not None
    ]
    kept = [score for score in kept if score not in SENTINELS] or kept
    if not kept:
        return
    size = max(map(abs, kept))
    for row in log.rows:
        far = (
            row["score"] is not None
            and min(abs(row["score"] - score) for score in kept) > 0.3 * size
        )
        if row["status"] == "discard" and row["score"] in SENTINELS and far:
            row["status"], row["score"] = "crash", None


def _direction(log: Log, said: str) -> tuple[bool, str]:
    """(whether lower is better, how that is known)."""
    if word := re.search(r"low|min|small|desc|high|max|large|asc", said.lower()):
        return word[0] in ("low", "min", "small", "desc"), "as the log says"
    kept = [
        row["score"] for row in log.rows if row["status"] == "keep" and row["score"] is not None
    ]
    steps = [after - before for before, after in zip(kept, kept[1:]) if after != before]
    falls = sum(step < 0 for step in steps)
    if steps and not 0.25 < falls / len(steps) < 0.75:
        lower = falls * 2 > len(steps)
        return lower, f"as the kept scores {'fall' if lower else 'rise'}"
    name = log.metric.lower()
    if LOWER.search(name) or HIGHER.search(name):
        return bool(LOWER.search(name)), "by its name"
    return True, "for nothing says otherwise"
