"""
The engine that runs experiments on a Ray cluster: one Ray task a run, one GPU a task.

- the task takes its code along by value: the commit's .py files at the top and its autoresearch/
- it runs in the node's environment and prepared cache. A node whose fingerprint, device or disk does
  not fit sends the run back, with the command to type there, and is excluded for a while
- log, progress, how it ended and the ledger's lines come back with the task's answer
- a run whose node was lost is queued again, as any run that was cut off; a dropped one is cancelled by
  Ray. Where the supervisor dies, its tasks die with it, and the next one queues their runs again
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import Counter

from autoresearch.common import (
    AS_COMMITTED,
    Fail,
    append_line,
    git_bytes,
    lock,
    one_line,
    read_json,
    signed,
    write_atomically,
    write_json,
)
from autoresearch.night import failures, ray_node
from autoresearch.night.experiment import Experiment
from autoresearch.night.rules import CUT_OFF, STOPPED
from autoresearch.night.settings import number_setting
from autoresearch.night.store import Night
from autoresearch.night.worker import outcome
from autoresearch.referee.ledger import ledger_path
from autoresearch.referee.manifest import fingerprint, manifest

CONNECT_TIMEOUT = 12  # seconds; Ray itself would try for minutes
POLL_SECONDS = 2  # between two looks at the cluster's nodes
EXCLUDE_SECONDS = 600  # for which a node that sent a run back gets no other


class RayEngine:
    """The same as worker.LocalEngine, on a cluster. Raises Fail where it cannot connect."""

    def __init__(self, night: Night, address: str):
        self.night = night
        self.address = address
        self.tasks = {}  # run id: (Ray's reference to the answer, the experiment's lock)
        self.nodes = []  # as Ray described them at the last poll
        self.last_poll = -POLL_SECONDS
        self.excluded_nodes = {}  # node id: (until when, its name, why)
        self.isolation_warning = ""
        # Which GPUs the night is on. The file also says that it is on a cluster at all.
        self.settings = night.folder / "cluster.json"
        self.accelerator = (read_json(self.settings) or {}).get("accelerator")
        self.connect()

    def connect(self):
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
        import ray

        self.ray = ray
        # What Ray prints goes into a file of its own; our own errors still reach supervisor.log.
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        with open(self.night.state_dir / "ray.log", "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        timer = threading.Timer(CONNECT_TIMEOUT, self.exit_on_timeout)
        timer.daemon = True
        timer.start()
        try:
            ray.init(address=self.address, log_to_driver=False, configure_logging=False)
        except Exception as error:  # of any type: one line says it, and the supervisor ends
            raise Fail(self.no_connection(one_line(error, 300))) from None
        finally:
            timer.cancel()
        ray.cloudpickle.register_pickle_by_value(ray_node)  # nodes may not have it

    def exit_on_timeout(self):
        """Ends this process, because Ray's connecting cannot be interrupted."""
        problem = self.no_connection(f"no answer within {CONNECT_TIMEOUT} s")
        self.night.write_engine_state(1, [problem])
        failures.note(self.night, problem, counted=False)
        print(f"FAIL: {problem}", file=sys.stderr, flush=True)
        os._exit(1)

    def no_connection(self, why: str) -> str:
        advice = (
            "is this machine one of its nodes? "
            f"uv run --group cluster ray start --address={self.address} --num-gpus=0"
        )
        if "mismatch" in why:
            install = "uv run --python X.Y.Z --with ray==N --group cluster night.py"
            advice = f"with the cluster's versions: {install}"
        return (
            f"the cluster {self.address} does not accept the connection: {why}; "
            f"nothing is lost; {advice}"
        )

    def close(self):
        self.ray.shutdown()

    # where runs may go

    def usable_nodes(self) -> list[dict]:
        """The nodes that may take a run, as Ray describes them."""
        if time.monotonic() - self.last_poll > POLL_SECONDS:
            self.nodes = [node for node in self.ray.nodes() if node["Alive"] and gpus_of(node)]
            self.last_poll = time.monotonic()
        for node_id, (until, _, _) in list(self.excluded_nodes.items()):
            if time.monotonic() > until:
                del self.excluded_nodes[node_id]
        usable = [node for node in self.nodes if node["NodeID"] not in self.excluded_nodes]
        return [node for node in usable if self.accelerator in (None, accelerator_of(node))]

    def slots(self) -> list[dict]:
        gpus = sum(map(gpus_of, self.usable_nodes()))
        return [{}] * min(gpus, number_setting("slots", str(max(1, gpus))))

    def status_lines(self) -> list[str]:
        slots, total = len(self.slots()), sum(map(gpus_of, self.nodes))
        kind = self.accelerator or "any type"
        lines = [f"cluster {self.address}: runs on {slots} of {total} GPUs ({kind})"]
        if not slots:
            join = f"uv run --group cluster ray start --address={self.address}"
            lines.append(f"no node can take a run: on a machine with such GPUs type {join}")
        for until, host, why in self.excluded_nodes.values():
            left = until - time.monotonic()
            again = time.strftime("%H:%M", time.localtime(time.time() + left))
            lines.append(f"node {host} gets no run before {again}: {why}")
        if self.isolation_warning:
            lines.append(self.isolation_warning)
        return lines

    # a run

    def start(self, experiment: Experiment, k: int, run: dict, limit: int):
        """Writes run-K.json and hands the run to Ray. The experiment stays locked until it ended."""
        held = lock(experiment.folder / "lock")
        write_json(experiment.folder / f"run-{k}.json", {**run, "cluster": self.address})
        if self.accelerator is None:  # the night will be on what most GPUs here are
            kinds = Counter()
            for node in self.usable_nodes():
                kinds[accelerator_of(node)] += gpus_of(node)
            self.accelerator = max(kinds, key=kinds.get, default=None)
            write_json(self.settings, {"accelerator": self.accelerator})
        job = {
            "asked": experiment.asked,
            "run": run,
            "limit": limit,
            "fingerprint": fingerprint(),
            "prepare": prepare_command(manifest()),
            "device": self.night.baseline_conditions().get("device"),
        }
        # Ray says nowhere how often it retried a task, so what is lost is queued again by the night.
        options = dict(num_gpus=1, num_cpus=0, max_retries=0)
        if self.accelerator:
            options["accelerator_type"] = self.accelerator
        if self.excluded_nodes:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(self.excluded_nodes)})"}
        needed = (":(glob)*.py", "autoresearch")  # of the commit, by any run
        words = (*AS_COMMITTED, "archive", "--format=tar", run["commit"], *needed)
        code = git_bytes(*words, at=self.night.root)
        answer = self.ray.remote(ray_node.run_on_node).options(**options).remote(job, code)
        self.tasks[run["id"]] = answer, held

    def poll(self, experiment: Experiment) -> tuple[str, str]:
        """(running, ended or lost; why it is lost) of the last run."""
        run = experiment.runs()[-1]
        if run["id"] not in self.tasks:
            return "lost", CUT_OFF  # with the supervisor before us
        answer, held = self.tasks[run["id"]]
        state, why = "ended", ""
        if experiment.dropped():
            self.ray.cancel(answer, force=True)
            ended = {"code": -9, "stopped": "dropped", "wall_seconds": 0.0}
            self.collect(experiment, run, {"ended": ended})
        elif self.night.stopped():
            self.ray.cancel(answer, force=True)
            experiment.again(STOPPED)
        elif not self.ray.wait([answer], timeout=0)[0]:
            return "running", ""
        else:
            try:
                self.take(experiment, run, self.ray.get(answer))
            except self.ray.exceptions.RayError as error:
                last_line = str(error).strip().splitlines()[-1]
                state, why = "lost", f"{CUT_OFF}: Ray ended it: {one_line(last_line, 120)}"
        del self.tasks[run["id"]]
        held.close()
        return state, why

    def take(self, experiment: Experiment, run: dict, answer: dict):
        """What the task answered: a run, or why its node could not run it."""
        if "excluded" in answer:
            why, host = answer["excluded"], answer["host"]
            self.excluded_nodes[answer["node"]] = time.monotonic() + EXCLUDE_SECONDS, host, why
            experiment.again(f"sent back by node {host}: {why}")
        else:
            self.collect(experiment, run, answer)

    def collect(self, experiment: Experiment, run: dict, answer: dict):
        """Log, progress and ledger, and at last end-K.json: with it the run has ended."""
        log = answer.get("log", b"dropped: what it printed stayed on its node\n")
        write_atomically(experiment.path("run.log"), log)
        write_atomically(experiment.path("progress.jsonl"), answer.get("progress", b""))
        records = answer.get("ledger", [])
        for record in records:  # no git on the node: the commit is known here
            more = {"commit": run["commit"], "changed": False, "node": answer["host"]}
            append_line(ledger_path(), signed({**record, **more}))
        end = outcome(answer["ended"], records, log.decode(errors="replace"), experiment.split)
        write_json(experiment.path("end.json"), {**end, "host": answer.get("host")})
        self.isolation_warning = answer.get("isolation_warning", self.isolation_warning)


def gpus_of(node: dict) -> int:
    return int(node["Resources"].get("GPU", 0))


def accelerator_of(node: dict) -> str | None:
    """Ray's name of the node's type of GPU, where it knows one."""
    for resource in node["Resources"]:
        if resource.startswith("accelerator_type:"):
            return resource.removeprefix("accelerator_type:")
    return None


def prepare_command(prepared) -> str:
    """What makes the same prepared set on another machine. prepared: the manifest."""
    request = dict(prepared["request"])
    corpus = request.pop("corpus")
    shards = request.pop("num_shards", None)
    source = {"demo": "--demo", "text": "--data DIR (the same texts)"}.get(corpus)
    words = [source or f"--num-shards {shards}"]
    words += [f"--{name.replace('_', '-')} {value}" for name, value in request.items()]
    return "uv run prepare.py " + " ".join(words)
