"""
What the commands print: the state of the night, the result of an experiment, the progress of a run.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean

from autoresearch.common import cut, one_line, seconds_between, stamp
from autoresearch.night import failures, journal, rules
from autoresearch.night import lines as second_lines
from autoresearch.night.agent import agent_lines
from autoresearch.night.doubts import FEW_STEPS, rate, too_good
from autoresearch.night.experiment import Experiment
from autoresearch.night.memory import lesson_lines, stagnation_lines
from autoresearch.night.results import row_of
from autoresearch.night.settings import TARGET, cluster_address, cluster_problem
from autoresearch.night.slower import baseline_lines
from autoresearch.night.store import PAGE_LOG, Night
from autoresearch.night.supervisor import capacity
from autoresearch.night.worker import log_text, read_progress

SCREEN, WIDTH = 36, 110  # lines and columns of what a command prints before its last line


def print_lines(lines: list[str]):
    """At most a screen of them."""
    if len(lines) > SCREEN:
        lines = [*lines[: SCREEN - 1], f"... {len(lines) - SCREEN + 1} more lines"]
    for line in lines:
        print(cut(line, 200))


# ---------------------------------------------------------------------------------- one experiment


def title_of(experiment: dict) -> str:
    """experiment: a record, or what experiment.json holds."""
    if experiment["kind"] == "baseline":
        return f"baseline, seed {experiment['seed']}"
    return one_line(experiment["message"], 70)


def record_lines(record: dict) -> list[str]:
    """An experiment's result, in a few lines."""
    metric = TARGET.test_metric if record["kind"] == "confirm" else TARGET.metric
    again = [why for why in record["again"] if not why.startswith(rules.PROMISING)]
    score = "" if record["score"] is None else f"  {metric} {record['score']:.6f}"
    status = record["status"] if record["run"] else "not run"
    if record.get("on_line") == "keep" and status == "discard":
        status = f"kept on {record['line']}'s line"
    if record["kind"] == "baseline" and status == "discard":
        status = "measured"  # no idea was discarded
    lines = [f"{record['n']}: {status}{score}: {record['why']}  ({title_of(record)})"]
    if record["expect"] is not None and record["got"] is not None:
        lines.append(f"   expected {record['expect']:+.6f}, got {record['got']:+.6f}")
    if rules.NOT_MEASURED in record["why"]:
        lines.append(
            f"   it was never fairly tried: uv run night.py again {record['n']}, when calm"
        )
    elif record["slow"]:
        share = f"{record['slow']:.0%} of its expected rate"
        lines.append(f"   SLOW again and again ({share}): the fastest run counts")
    lines += [f"   ran again: {why}" for why in again]
    per_second = rate(record)
    if per_second:
        best = f" (its base: {record['base_rate']:,.0f})" if record["base_rate"] else ""
        done = f"{record['steps'] or '?'} steps, {record['wall_seconds']:.0f} s in all"
        lines.append(f"   {per_second:,.0f} tokens/s{best}, {done}")
    if record["score"] is not None and 0 < (record["steps"] or 0) < FEW_STEPS:
        advice = ": fewer TOKENS_PER_STEP make more steps" if TARGET.is_train_py else ""
        said = f"under {FEW_STEPS} steps a score measures the machine more than the idea"
        lines.append(f"   {said}{advice}")
    if record["why"].startswith(rules.CONFLICT):
        by_hand = "make it by hand if still worth it"
        lines.append(f"   its diff: uv run night.py show {record['n']} --diff; {by_hand}")
    return lines


def repeat_line(record: dict) -> str:
    """What came of a run that measured the best again."""
    came = (
        "without a score" if record["score"] is None else f"{TARGET.metric} {record['score']:.6f}"
    )
    if record["why"].startswith(rules.DROPPED):
        came = "ended early, for an experiment that waited"
    return f"{record['n']}: {came}  ({title_of(record)})"


def log_of(night: Night, record: dict, name: str = "run", ending: str = "log") -> Path:
    """The log of the run that counts; or another of its files."""
    folder = night.folder_of(record["n"]) or night.done
    return folder / f"{name}-{record['k']}.{ending}"


def end_of_log(path: Path, most: int) -> list[str]:
    lines = [one_line(line, WIDTH) for line in log_text(path).splitlines() if line.strip()]
    return lines[-most:]


def losses(path: Path) -> list[tuple[float, float]]:
    """(percent of the budget, training loss) from a progress file."""
    lines = [line for line in read_progress(path) if line.get("loss") is not None]
    return [(line["percent"], line["loss"]) for line in lines]


def best_losses(night: Night, records: list[dict]) -> list[tuple[float, float]]:
    best = journal.best_of(records)
    return losses(log_of(night, best, "progress", "jsonl")) if best else []


def loss_at(curve: list[tuple[float, float]], percent: float) -> float | None:
    """The last loss up to `percent` of the budget."""
    return next((loss for share, loss in reversed(curve) if share <= percent), None)


def progress(experiment: Experiment, best_curve: list[tuple[float, float]]) -> str:
    """`compiling, 20 s so far`, or `training 40%, loss 2.41 (best at 40%: 2.2), 9,100 tokens/s`."""
    run = experiment.runs()[-1]
    seconds = seconds_between(run.get("stamp"), stamp())
    so_far = f"{seconds or 0:.0f} s so far"
    if "cluster" in run:
        return f"on the cluster, {so_far}"  # its losses come back with its score
    path = experiment.path("progress.jsonl")
    lines, curve = read_progress(path), losses(path)
    phase = lines[-1]["phase"] if lines else "starting"
    if phase != "training" or not curve:
        return f"{phase}, {so_far}"
    percent, loss = curve[-1]
    beside = loss_at(best_curve, percent)
    best = f" (best at {percent:.0f}%: {beside:.4g})" if beside is not None else ""
    last = [line for line in lines if line.get("loss") is not None][-1]
    speed = f", {last['tokens'] / last['seconds']:,.0f} tokens/s" if last.get("seconds") else ""
    steps = f", {last['steps']} steps" if last.get("steps") else ""
    return f"training {percent:.0f}%, loss {loss:.4g}{best}{speed}{steps}"


# -------------------------------------------------------------------------------------- the night


def baseline_is_pending(experiments: list[Experiment]) -> bool:
    """Whether the baseline's runs go on; until they have ended nothing is decided."""
    return any(e.is_baseline and e.state() != "ended" for e in experiments)


def standing_lines(night: Night) -> list[str]:
    """What is the matter with the engine, if anything."""
    problem = failures.given_up(night) or cluster_problem(cluster_address())
    lines = [problem] if problem else night.engine_state()["lines"]
    lines = [*lines, *end_of_log(night.folder / PAGE_LOG, 1)]
    return [*lines, *baseline_lines(night.baseline_conditions())]


def open_lines(night: Night) -> list[str]:
    """What runs, what waits."""
    ended = {record["n"] for record in night.ended()}
    experiments = [e for e in night.open() if e.n not in ended]
    curve = best_losses(night, night.records())
    stopped = night.stopped()
    return [open_line(e, experiments, curve, stopped) for e in experiments]


def best_lines(records: list[dict], repeats: list[dict]) -> list[str]:
    """The best, the baseline, how many experiments ended, the noise, the predictions."""
    best = journal.best_of(records)
    if not best:
        return []
    noise = journal.noise([*records, *repeats])
    scores = journal.scores_of_commit(best["commit"], records, repeats)
    kept = [record for record in records if record["status"] == "keep"]
    tried = [record for record in records if record["kind"] != "baseline"]
    scored = sum(record["score"] is not None for record in tried)
    changes = sum(record["status"] == "keep" for record in tried)
    deviation = "not measured yet" if noise is None else f"{noise:.6f}"
    mean = fmean(scores) if scores else best["score"]
    count = "1 run" if len(scores) < 2 else f"mean of {len(scores)} runs"
    error = f" ± {noise / math.sqrt(len(scores)):.6f}" if noise and scores else ""
    lines = [
        f"best {mean:.6f}{error} ({count}): {best['n']}, {best['commit'][:7]}, {title_of(best)}",
        f"     baseline {kept[0]['score']:.6f}; {len(tried)} experiments ended, {scored} scored, "
        f"{changes} kept; noise of a run {deviation}",
    ]
    for i in too_good([record["score"] for record in kept]):
        n, size = kept[i]["n"], abs(kept[i]["score"] - kept[i - 1]["score"])
        look = f"look at the diff before you believe it: uv run night.py show {n} --diff"
        lines.append(f"     {n} is too good ({size:.6f} at once): {look}")
    for lost in journal.displaced_by(best, records):
        again = f"uv run night.py show {lost['n']}, make that change again on top, and try"
        lines.append(
            f"     it displaced {lost['n']}, {lost['commit'][:7]} ({title_of(lost)}): {again}"
        )
    predictions, direction, size = journal.calibration(records, noise)
    if predictions:
        right = f"{direction} of {predictions} right in direction, {size} in size"
        lines.append(f"     predictions: {right} (within a factor of two, or the noise)")
    return lines


def open_line(
    experiment: Experiment,
    experiments: list[Experiment],
    best_curve: list[tuple[float, float]],
    stopped: bool,
) -> str:
    """One that waits, runs, or is not decided yet."""
    words = experiment.state()
    runs = experiment.runs()
    if words == "running" and stopped:
        words = "being ended; it runs again after uv run night.py begin"
    elif words == "running":
        words = progress(experiment, best_curve)
    elif words == "ended":
        score = runs[-1].get("score")
        words = "ended without a score" if score is None else f"ended, {score:.6f}"
        if baseline_is_pending(experiments):
            words += "; decided when the baseline's runs have all ended"
    before = [run["again"] for run in runs if "again" in run]
    if before and before[-1].startswith(rules.PROMISING):
        words += f"; {before[-1]}"
    elif before:
        words += f"; once more, because of the run before: {before[-1]}"
    return f"{experiment.n}: {words}  ({title_of(experiment.asked)})"


def what_next(night: Night) -> str:
    """What the agent should type next."""
    records, experiments = night.records(), night.open()
    if night.stopped():
        return "the night was stopped: whoever stopped it continues with uv run night.py begin"
    if failures.given_up(night):
        return "mend what ended the supervisor (see above), then uv run night.py begin"
    if journal.best_of(records) is None and not any(e.is_baseline for e in experiments):
        return "the baseline gave no score (see above): tell the human, or fix it and run begin"
    waiting = [e for e in experiments if e.asked["kind"] == "try" and e.state() == "waiting"]
    edited = night.edits() is not None
    if len(waiting) >= capacity(night):
        kept = f"; {TARGET.file} keeps its edits until then" if edited else ""
        return f"the queue is full: uv run night.py wait{kept}"
    if edited:
        line = night.made_from().get("line")
        words = f"--on {line} '...'" if line else "'...'"
        finish = f"finish them, then uv run night.py try {words}; or uv run night.py bring best"
        return f"{TARGET.file} has edits: {finish}"
    or_wait = ", or uv run night.py wait" if experiments else ""
    return f"edit {TARGET.file} and uv run night.py try 'what changes; what is expected'{or_wait}"


def print_status(night: Night):
    """`night.py` alone."""
    if not night.begun():
        print(f"no night has begun; the next is {night.tag} (program.md's tag), on {night.branch}")
        print("next: uv run night.py begin")
        return
    print(f"night {night.tag} on {night.branch}")
    night.sync_branch()
    lines = standing_lines(night) + best_lines(night.records(), night.repeats())
    lines += second_lines.status_lines(night.records(), [e.asked for e in night.open()])
    lines += open_lines(night) + agent_lines(night)
    lines += stagnation_lines(night) + lesson_lines(night)
    recent = [f"  {cut(row_of(record), WIDTH)}" for record in night.records()[-5:]]
    if recent:
        lines += ["last rows of results.tsv:", *recent]
    print_lines(lines)
    print("next:", what_next(night))
