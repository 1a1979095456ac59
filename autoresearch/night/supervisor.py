"""
The detached process that works through the queue: queue -> engine -> rules.next_step -> store.

One a repository, by the lock `.night/supervisor`. All its state is in the night's files: if it is
killed, the next one continues. The engine that starts the runs is handed in.
"""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from collections.abc import Callable

from autoresearch.common import ROOT, Fail, inherited_environment, stamp, utc
from autoresearch.night import failures, journal, rules
from autoresearch.night import lines as second_lines
from autoresearch.night.calm import Calm
from autoresearch.night.experiment import Experiment
from autoresearch.night.notify import notify
from autoresearch.night.repo import merged
from autoresearch.night.settings import (
    calm_limit,
    cluster_address,
    cluster_problem,
    local_slots,
    number_setting,
    setting,
    time_limit,
    wanted_repeats,
)
from autoresearch.night.store import POLL_SECONDS, Night


class Supervisor:
    """Starts what waits where a slot is free, and records what has ended."""

    def __init__(self, night: Night, engine, refresh: Callable[[bool], None]):
        """refresh: called after each look at the queue, with whether anything changed."""
        self.night = night
        self.engine = engine
        self.refresh = refresh
        self.limit = time_limit()
        self.repeats = wanted_repeats()
        self.calm = Calm(None if cluster_address() else calm_limit())

    def work(self):
        """Works until nothing runs and nothing can start; looks less often while nothing changes."""
        self.night.recover()
        pause = 0.0
        while True:
            changed = self.poll_once()
            self.refresh(changed)
            if changed:
                pause = 0.0
            elif not self.may_continue():
                return
            pause = min(pause + POLL_SECONDS / 10, 5 * POLL_SECONDS)
            time.sleep(pause)

    def may_continue(self) -> bool:
        """Whether something runs, or waits for a slot that the engine may still get."""
        if any(experiment.state() == "running" for experiment in self.night.open()):
            return True
        if self.calm.waits() and self.night.can_work():
            return True
        return not self.engine.slots() and self.night.can_work()

    def poll_once(self) -> bool:
        """Looks once at the queue. Returns whether anything changed."""
        said = [*self.engine.status_lines(), *self.calm.lines()]
        self.night.write_engine_state(len(self.engine.slots()), said)
        moved = False
        for experiment in self.night.open():
            state = experiment.state()
            if state == "waiting" and experiment.dropped():
                self.apply(experiment, self.next_step(experiment))
                moved = True
            elif state in ("running", "cut off"):
                found, why = self.engine.poll(experiment)
                if found == "lost":
                    self.apply(experiment, self.next_step(experiment, lost=why))
                moved = moved or found != "running"
        moved = self.process_finished() or moved
        return self.fill_slot() or moved

    # deciding

    def next_step(
        self, experiment: Experiment, conflict: str | None = None, lost: str | None = None
    ) -> rules.Record | rules.Again:
        asked = {**experiment.asked, "dropped": experiment.dropped()}
        runs = experiment.runs()
        if lost:
            runs[-1]["lost"] = lost
        return second_lines.next_step(asked, runs, self.night.history(), conflict)

    def apply(self, experiment: Experiment, step: rules.Record | rules.Again):
        if isinstance(step, rules.Again):
            experiment.again(step.why)
        else:
            self.night.record(experiment, step)
            if step.status == "keep" and not experiment.is_baseline:
                best = journal.best_of(self.night.records())
                words = f"new best {best['score']:.6f}: {best['n']}, {best['message']}"
                notify(self.night, f"night {self.night.tag}: {words}")

    def process_finished(self) -> bool:
        """Decides what has ended: the baseline first and as a whole, because all else is compared with it."""
        experiments = self.night.open()
        ended = [e for e in experiments if e.state() == "ended"]
        baseline = [e for e in experiments if e.is_baseline]
        if any(experiment not in ended for experiment in baseline):
            return False
        if baseline:
            ended = baseline
            # One that is doubted runs again before anything is compared with it.
            steps = [(experiment, self.next_step(experiment)) for experiment in baseline]
            again = [pair for pair in steps if isinstance(pair[1], rules.Again)]
            if again:
                for experiment, step in again:
                    self.apply(experiment, step)
                return True
        else:
            ended.sort(key=self.gained, reverse=True)
        for experiment in ended:
            self.apply(experiment, self.next_step(experiment))
        return bool(ended)

    def gained(self, experiment: Experiment) -> float:
        records = second_lines.records_of(experiment.asked, self.night.records())
        return rules.gained(experiment.runs(), records)

    # starting

    def fill_slot(self) -> bool:
        """Starts at most one run. Another may end before the next one starts, and move the best."""
        if self.night.stopped():
            return False
        experiments = self.night.open()
        free = self.engine.slots()
        states = {e.n: e.state() for e in experiments}
        # What has ended keeps its slot until it is decided, for it may move the best. Before the
        # baseline has ended, nothing is decided.
        baseline_is_open = any(e.is_baseline for e in experiments)
        occupying = ("running",) if baseline_is_open else ("running", "ended")
        for experiment in experiments:
            if states[experiment.n] in occupying and free:
                slot = experiment.runs()[-1]["slot"]
                free.remove(slot if slot in free else free[0])  # the setting may have changed
        waiting = [e for e in experiments if states[e.n] == "waiting"]
        if not baseline_is_open and not journal.best_of(self.night.records()):
            waiting = []  # the baseline has no score: nothing can be compared
        # Then what runs again, the larger gain first: it moves the best, the others follow. What others
        # slowed goes behind, for later may be calmer.
        waiting.sort(key=self.order)
        if waiting and not free:
            return self.make_room(experiments, states)
        if not free:
            return False
        if not waiting:
            return not baseline_is_open and self.queue_repeat(experiments)
        if not self.calm.allows(free[0], "running" not in states.values()):
            return False
        self.start(waiting[0], free[0])
        return True

    # measuring the best again

    def queue_repeat(self, experiments: list[Experiment]) -> bool:
        """Queues one more run of the best where it has too few to be known well."""
        best = journal.best_of(self.night.records())
        seed = best and rules.repeat_seed(best, self.night.history(), self.repeats)
        if not seed or any(experiment.is_repeat for experiment in experiments):
            return False
        commit = best["commit"]
        self.night.enqueue("repeat", commit, commit, f"measures {best['n']} again", seed)
        return True

    def make_room(self, experiments: list[Experiment], states: dict[int, str]) -> bool:
        """Ends a run that only measures the best again, for an experiment that waits."""
        for experiment in experiments:
            running = states[experiment.n] == "running" and experiment.is_repeat
            if running and not experiment.dropped():
                (experiment.folder / "drop").touch()
                return True
        return False

    def order(self, experiment: Experiment) -> tuple:
        runs = experiment.runs()
        slowed = bool(runs) and runs[-1].get("again", "").startswith(rules.SLOW)
        first = experiment.is_baseline, bool(runs) and not slowed
        proposed = experiment.asked["kind"] == "sweep"  # the agent's own ideas go first
        order = (*(not one for one in first), slowed, proposed, -self.gained(experiment))
        return (*order, experiment.n)

    def start(self, experiment: Experiment, slot: dict):
        """Puts the change on top of the best where that has moved, and starts the run."""
        records, line = self.night.records(), experiment.asked.get("line")
        best = second_lines.tip_of(records, line) if line else journal.best_of(records)
        base = experiment.asked["base"]
        if best and experiment.asked["kind"] in rules.TRIED:
            base = best["commit"]
        commit, conflict = self.rebase(experiment, base)
        if commit is None:
            self.apply(experiment, self.next_step(experiment, conflict))
            return
        run = {"id": uuid.uuid4().hex[:12], "commit": commit, "base": base, "slot": slot}
        if self.calm.busy():
            run["busy"] = self.calm.busy()
        run["seed"] = rules.next_seed(experiment.asked, experiment.runs(), commit)
        k = len(experiment.runs()) + 1
        self.engine.start(experiment, k, {**run, "began": utc(), "stamp": stamp()}, self.limit)

    def rebase(self, experiment: Experiment, base: str) -> tuple[str | None, str]:
        """The experiment's commit, or the same change as a commit on `base`; or None and why not."""
        asked, repo = experiment.asked, self.night.repo
        if asked["base"] == base:
            return asked["commit"], ""
        name = f"{experiment.n}-on-{base[:7]}"
        ref = f"refs/autoresearch/{self.night.tag}/{name}"
        known = repo.git("rev-parse", "-q", "--verify", ref, check=False)
        if known:
            return known, ""
        three = [repo.contents_at(commit) for commit in (base, asked["base"], asked["commit"])]
        contents = merged(*three)
        line = asked.get("line")
        what = f"the tip of {line}'s line" if line else "the best"
        again = [run.get("again", "") for run in experiment.runs()]
        measured = contents == three[2] and any(w.startswith(rules.BEST_MOVED) for w in again)
        if contents is None or measured:  # nothing is left of the best's change: its runs are known
            return None, f"it conflicts with {what}, {base[:7]}"
        if contents == three[0]:  # a run would measure the best again, and luck could keep it
            return None, f"its change is in {what}, {base[:7]}, already"
        commit = repo.commit(contents, base, asked["message"])
        self.night.keep_ref(name, commit)
        return commit, ""


# -------------------------------------------------------------------------------------- the process


def capacity(night: Night) -> int:
    """How many experiments may wait: as many as there are slots. More would be stale at their start.

    Raises Fail where the settings `slots` or `cluster` cannot be used.
    """
    if cluster_address():
        number_setting("slots", "1")
        slots = night.engine_state()["slots"]
    else:
        slots = len(local_slots())
    return max(2, slots)


def supervise(
    make_engine: Callable[[Night], object], make_refresh: Callable[[Night], Callable[[bool], None]]
):
    """Holds the lock and works; checks once more after releasing it, for what was queued meanwhile."""
    night = Night()
    refresh = make_refresh(night)
    while True:
        # A command holds this lock briefly while it checks for a supervisor.
        with night.lock("supervisor", 1) as ours:
            if not ours:
                return
            # A cluster that does not answer is asked again and again.
            try:
                with failures.noted(night, counted=not cluster_address()):
                    engine = make_engine(night)
            except Fail as problem:
                night.write_engine_state(1, [str(problem).removeprefix("FAIL: ")])
                raise
            try:
                with failures.noted(night):
                    Supervisor(night, engine, refresh).work()
            finally:
                engine.close()
                refresh(True)  # how it ended
        if not night.can_work():
            return


def wake(night: Night) -> str | None:
    """Starts a supervisor where there is work and none; it outlives command, terminal and agent.

    Returns the problem where its cluster does not answer, or where supervisors end by an error.
    Raises Fail on a setting that cannot be used: whoever typed the command reads it.
    """
    time_limit()
    wanted_repeats()
    calm_limit()
    capacity(night)
    address = cluster_address()
    if not address and not setting("cluster", "") and (night.folder / "cluster.json").exists():
        raise Fail(
            "this night runs on a Ray cluster, and RAY_ADDRESS is not set: set it again, or put "
            "`- cluster: ADDRESS` (none: continue without) into program.md"
        )
    if not night.can_work():
        return None
    with night.lock("supervisor", 0) as free:
        if not free:
            return None
    problem = failures.given_up(night) or cluster_problem(address)
    if problem:
        return problem
    with open(night.state_dir / "supervisor.log", "ab") as log:
        subprocess.Popen(
            [sys.executable, str(ROOT / "night.py"), "supervise"],
            cwd=night.root,
            env=inherited_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return None
