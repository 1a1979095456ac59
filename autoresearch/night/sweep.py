"""
`night.py sweep`: values for the numbers that a comment calls a dimension, whenever a slot would stand idle.

    MUON_LR = 0.04  # sweep: 0.01..0.1 log
    #define TILE 64  // sweep: 32, 64, 128

Optuna's TPE proposes them (Bergstra et al. 2011), told of every experiment that changed nothing else, the
agent's included. They go through the same queue and the same rules; an agent's `try` goes first.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from autoresearch.common import Fail, one_line
from autoresearch.night import failures, journal, memory, rules
from autoresearch.night.repo import Contents
from autoresearch.night.settings import RUN_SEEDS, TARGET
from autoresearch.night.store import Night
from autoresearch.night.supervisor import wake

LOOK_SECONDS = 1.0
FIRST_TRIALS = 8  # drawn at random before TPE has something to go by
TOLD = 200  # experiments, the newest, that the sampler is told of
SHARED = "Settings"  # the class whose dimensions count for every size of train.py
COMMENT = re.compile(r"(?:#|//|--|/\*)(?:(?!#|//|--)[^\n])*?\bsweep:\s*([^\n]+?)\s*(?:\*/)?\s*$")
LITERAL = re.compile(
    r"(?<![\w.])([-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:e[-+]?\d+)?|True|False|true|false)(?![\w.])", re.I
)


@dataclass(frozen=True)
class Dimension:
    """One number of the target's file, and the values it may take."""

    name: str
    file: str
    line: int  # from 0
    span: tuple[int, int]  # of the literal in its line
    now: str  # the literal
    choices: tuple[str, ...] = ()  # or a range:
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def words(self, value) -> str:
        """The value as a literal."""
        return str(value) if self.choices or self.whole else f"{value:.4g}"

    def value(self):
        """The present one, as the sampler counts it."""
        if self.choices:
            return self.now if self.now in self.choices else None
        found = float(self.now.replace("_", ""))
        return (int(found) if self.whole else found) if self.low <= found <= self.high else None


def dimensions(contents: Contents) -> list[Dimension]:
    """Those of the files. Raises Fail for a comment that says none."""
    found = []
    for file, content in contents.items():
        inside = ""
        for number, line in enumerate(content.decode(errors="replace").split("\n")):
            if named := re.match(r"class (\w+)", line):
                inside = named[1]
            elif line[:1].strip():
                inside = ""
            if comment := COMMENT.search(line):
                found.append(_dimension(file, number, line, comment, inside))
    return found


def _dimension(file: str, number: int, line: str, comment: re.Match, inside: str) -> Dimension:
    code = line[: comment.start()]
    literals = [*LITERAL.finditer(code)]
    words = re.findall(r"[A-Za-z_]\w*", code[: literals[-1].start()] if literals else "")
    where = f"{file}, line {number + 1}: `{one_line(line, 60)}`"
    if not literals or not words:
        raise Fail(
            f"{where}: a dimension is one number behind a name, such as `LR = 0.1  # sweep: 0..1`"
        )
    literal = literals[-1]
    prefix = f"{inside}." if inside and inside != SHARED else ""
    shared = dict(
        name=prefix + words[-1], file=file, line=number, span=literal.span(), now=literal[0]
    )
    if spread := re.fullmatch(r"([-+\w.]+?)\s*\.\.\s*([-+\w.]+?)(\s+log)?", comment[1]):
        try:
            low, high = float(spread[1]), float(spread[2])
        except ValueError:
            low = high = 0.0
        if not low < high or (spread[3] and low <= 0):
            raise Fail(f"{where}: the range must rise, and with `log` begin above 0")
        whole = not re.search(r"[.e]", f"{literal[0]}{spread[1]}{spread[2]}", re.I)
        return Dimension(**shared, low=low, high=high, log=bool(spread[3]), whole=whole)
    choices = tuple(choice.strip() for choice in comment[1].split(","))
    if len(choices) < 2 or not all(choices):
        raise Fail(f"{where}: say a range, `0.01..0.1 log`, or values, `64, 128, 256`")
    return Dimension(**shared, choices=choices)


def with_values(contents: Contents, dims: Sequence[Dimension], values: dict) -> Contents:
    """The files with these values in place of the dimensions' literals. values: {name: value}."""
    found = {
        file: content.decode(errors="replace").split("\n") for file, content in contents.items()
    }
    for dim in dims:
        if dim.name in values:
            line, (start, end) = found[dim.file][dim.line], dim.span
            found[dim.file][dim.line] = line[:start] + dim.words(values[dim.name]) + line[end:]
    return {file: "\n".join(lines).encode() for file, lines in found.items()}


def masked(contents: Contents) -> Contents:
    """The files without the values of their dimensions: equal where only those differ."""
    dims = dimensions(contents)
    return with_values(contents, [_plain(dim) for dim in dims], {dim.name: "?" for dim in dims})


def _plain(dim: Dimension) -> Dimension:
    return Dimension(dim.name, dim.file, dim.line, dim.span, dim.now, choices=("?",))


def chosen(dims: list[Dimension], names: list[str]) -> list[Dimension]:
    """Those of these names or classes; without names all that count for every size of train.py."""
    unknown = [n for n in names if not any(n in (d.name, d.name.split(".")[0]) for d in dims)]
    if unknown:
        known = ", ".join(dim.name for dim in dims) or "none"
        raise Fail(f"--dims {unknown[0]}: the dimensions of {TARGET.file} are {known}")
    if names:
        return [dim for dim in dims if dim.name in names or dim.name.split(".")[0] in names]
    return [dim for dim in dims if "." not in dim.name] or dims


# ------------------------------------------------------------------------------------ the sampler


def propose(dims: list[Dimension], told: list[tuple[dict, float]], seed: int) -> dict:
    """{name: value} to try next. told: (values, how bad it was, lower is better) of each so far.

    The same told and seed give the same proposal, so a study goes on after a kill.
    """
    try:
        import optuna
    except ImportError:
        raise Fail("a sweep needs Optuna: uv run --group sweep night.py sweep") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    spaces = {dim.name: _space(dim, optuna.distributions) for dim in dims}
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=FIRST_TRIALS)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    for values, bad in told:
        inside = {name: value for name, value in values.items() if name in spaces}
        own = {name: spaces[name] for name in inside}
        study.add_trial(optuna.trial.create_trial(params=inside, distributions=own, value=bad))
    return study.ask(spaces).params


def _space(dim: Dimension, kinds):
    if dim.choices:
        return kinds.CategoricalDistribution(dim.choices)
    if dim.whole:
        return kinds.IntDistribution(int(dim.low), int(dim.high), log=dim.log)
    return kinds.FloatDistribution(dim.low, dim.high, log=dim.log)


def told_of(night: Night, dims: list[Dimension], best: dict) -> list[tuple[dict, float]]:
    """What the sampler is told: (values, how bad) of all that changed only dimensions.

    A failure counts as the 90th percentile. Of other code than the best's, the change of the score counts.
    """
    records = [r for r in night.records() if not r.get("not_comparable") and not r.get("slow")]
    found, failed = [], []
    now = masked(night.repo.contents_at(best["commit"]))
    for record in records[-TOLD:]:
        contents = night.repo.contents_at(record["commit"])
        mine = masked(contents)
        if record["kind"] != "baseline" and mine != masked(night.repo.contents_at(record["base"])):
            continue
        values = {dim.name: dim.value() for dim in dimensions(contents)}
        values = {dim.name: values[dim.name] for dim in dims if values.get(dim.name) is not None}
        if record["score"] is None:
            if rules.CONFLICT not in record["why"]:
                failed.append(values)
        elif mine == now:
            found.append((values, -journal.gain(record["score"], 0)))
        elif record["got"] is not None:
            found.append((values, -journal.gain(best["score"] + record["got"], 0)))
    scores = sorted(bad for _, bad in found)
    worst = scores[int(0.9 * (len(scores) - 1))] if scores else 0.0
    return found + [(values, worst) for values in failed]


# ----------------------------------------------------------------------------------- the command


def sweep(
    night: Night, names: list[str], experiments: int | None, hours: float | None, patience: int
):
    """Proposes until a limit is reached, or `patience` proposals in a row brought nothing.

    Ctrl-C ends it; what is queued is worked off.
    """
    with night.command():
        night.sync_branch()
        dims = chosen(dimensions(night.repo.contents_at(night.tip())), names)
        if not dims:
            raise Fail(
                f"{TARGET.file} has no dimension: put `# sweep: 0.01..0.1 log` or `# sweep: 1, 2, 3` "
                "behind a number, commit, and begin"
            )
    print(f"sweeping {', '.join(dim.name for dim in dims)}; Ctrl-C ends it", flush=True)
    end = time.monotonic() + 3600 * hours if hours else None
    queued = 0
    while not night.stopped() and (end is None or time.monotonic() < end):
        if problem := failures.given_up(night):
            raise Fail(problem)
        swept = [record for record in night.records() if record["kind"] == "sweep"]
        since = [record["status"] == "keep" for record in swept[-patience:]]
        if queued >= patience and len(since) >= patience and not any(since):
            print(f"the last {patience} proposals brought nothing")
            break
        if experiments is not None and queued >= experiments:
            break
        n = propose_one(night, names)
        queued += n is not None
        time.sleep(LOOK_SECONDS)
    print("next: uv run night.py")


def propose_one(night: Night, names: list[str]) -> int | None:
    """Queues one proposal where a slot would stand idle; its number, or None."""
    with night.command():
        wake(night)
        best = journal.best_of(night.records())
        states = [e.state() for e in night.open() if not e.is_repeat]
        slots = night.engine_state()["slots"]
        if best is None or "waiting" in states or "ended" in states or len(states) >= slots:
            return None
        contents = night.repo.contents_at(best["commit"])
        dims = chosen(dimensions(contents), names)
        told = told_of(night, dims, best)
        for attempt in range(20):
            values = propose(dims, told, seed=1000 * len(told) + attempt)
            changed = [dim for dim in dims if dim.words(values[dim.name]) != dim.now]
            proposal = with_values(contents, dims, values)
            words = ", ".join(f"{d.name} {d.now} -> {d.words(values[d.name])}" for d in changed)
            commit = (
                night.repo.commit(proposal, best["commit"], f"sweep: {words}") if changed else ""
            )
            change = night.repo.change_id(best["commit"], commit) if changed else ""
            known = [r["change"] for r in night.records() if r["base"] == best["commit"]]
            if changed and change not in known:
                break
        else:
            return None
        lines = memory.changed_lines(night.repo.diff(best["commit"], commit))
        more = dict(change=change, lines=lines)
        n = night.enqueue("sweep", commit, best["commit"], f"sweep: {words}", RUN_SEEDS[0], **more)
        wake(night)
    print(f"{n}: sweep: {words}", flush=True)
    return n
