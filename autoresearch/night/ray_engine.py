"""
The engine that runs experiments on a Ray cluster: one Ray task a run, one GPU a task.

- the task takes its code along by value: the commit's .py files at the top and its autoresearch/
- it runs in the node's environment and prepared cache. A node whose fingerprint, device or disk does
  not fit sends the run back, with the command to type there, and is not asked again for a while
- log, progress, how it ended and the ledger's lines come home with the task's answer
- a lost node is answered by Ray's own retries, a dropped run by Ray's cancellation; where the
  supervisor dies, its tasks die with it, and the next one queues their runs again, as cut off
"""

from __future__ import annotations

import fcntl
import logging
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from autoresearch.common import (
    Fail,
    append_line,
    git_bytes,
    one_line,
    read_json,
    signed,
    write_atomically,
    write_json,
)
from autoresearch.night import ray_node
from autoresearch.night.experiment import Experiment
from autoresearch.night.rules import CUT_OFF, STOPPED
from autoresearch.night.settings import number_setting
from autoresearch.night.store import Night
from autoresearch.night.worker import outcome
from autoresearch.referee.ledger import ledger_path
from autoresearch.referee.manifest import fingerprint, manifest

CONNECT_TIMEOUT = 12  # seconds in which Ray must let us in
POLL_SECONDS = 2  # seconds between two looks at the cluster's nodes
EXCLUDE_SECONDS = 600  # seconds for which a node that sent a run back is not asked again
MAX_RETRIES = 2  # by Ray, of a run whose node or worker was lost


class RayEngine:
    """Slots, start, poll, status_lines, close: see worker.LocalEngine. Raises Fail without its cluster."""

    def __init__(self, night: Night, address: str):
        self.night = night
        self.address = address
        self.tasks = {}  # run id: (Ray's reference to the answer, the experiment's locked file)
        self.nodes = []  # as Ray described them last
        self.last_poll = -POLL_SECONDS
        self.excluded_nodes = {}  # node id: (until when, its name, why)
        self.isolation = ""  # what a node could not keep the runs away from
        # Which GPUs the night is on. The file also says that it is on a cluster at all.
        self.settings = night.folder / "cluster.json"
        self.accelerator = (read_json(self.settings) or {}).get("accelerator")
        self.connect()

    def connect(self):
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
        import ray

        self.ray = ray
        self.output = redirect_output(self.night.state_dir / "ray.log")
        timer = threading.Timer(
            CONNECT_TIMEOUT, self.exit_on_timeout
        )  # Ray itself would try for a minute
        timer.daemon = True
        timer.start()
        try:
            ray.init(address=self.address, log_to_driver=False, configure_logging=False)
        except Exception as error:  # of any type: it is said in one line, and the supervisor ends
            restore_output(self.output)
            advice = self.how_to_join()
            if "mismatch" in str(error):
                install = "uv run --python X.Y.Z --with ray==N --group cluster night.py"
                advice = f"with the cluster's versions: {install}"
            raise Fail(self.problem(f"lets nobody in: {one_line(error, 300)}", advice)) from None
        finally:
            timer.cancel()
        ray.cloudpickle.register_pickle_by_value(ray_node)  # nodes may not have it

    def exit_on_timeout(self):
        """Ray's connecting cannot be interrupted, so this process ends."""
        restore_output(self.output)
        said = f"answers, but lets nobody in within {CONNECT_TIMEOUT} s"
        words = self.problem(said, self.how_to_join())
        self.night.write_engine_state(1, [words])
        print(f"FAIL: {words}", file=sys.stderr, flush=True)
        os._exit(1)

    def problem(self, what: str, advice: str) -> str:
        return f"the cluster {self.address} {what}; nothing is lost; {advice}"

    def how_to_join(self) -> str:
        start = f"uv run --group cluster ray start --address={self.address} --num-gpus=0"
        return f"is this machine one of its nodes? {start}"

    def close(self):
        self.ray.shutdown()
        restore_output(self.output)

    # where runs may go

    def usable_nodes(self) -> list[dict]:
        """The nodes that may take a run, as Ray describes them."""
        if time.monotonic() - self.last_poll > POLL_SECONDS:
            self.nodes = [node for node in self.ray.nodes() if node["Alive"] and gpus_of(node)]
            self.last_poll = time.monotonic()
        now = time.time()
        self.excluded_nodes = {
            node: said for node, said in self.excluded_nodes.items() if said[0] > now
        }
        usable = [node for node in self.nodes if node["NodeID"] not in self.excluded_nodes]
        kind = self.accelerator
        return [node for node in usable if kind is None or kind == accelerator_of(node)]

    def slots(self) -> list[dict]:
        gpus = sum(map(gpus_of, self.usable_nodes()))
        return [{}] * min(gpus, number_setting("slots", str(max(1, gpus))))

    def status_lines(self) -> list[str]:
        slots, usable = len(self.slots()), sum(map(gpus_of, self.usable_nodes()))
        total, kind = sum(map(gpus_of, self.nodes)), self.accelerator or "any type"
        words = [f"cluster {self.address}: runs on {slots} of {total} GPUs ({kind})"]
        wanted = number_setting("slots", str(max(1, usable)))
        if wanted > usable:
            words[0] += f"; the setting asks for {wanted}"
        if not usable:
            join = f"uv run --group cluster ray start --address={self.address}"
            words.append(f"no node can take a run: on a machine with such GPUs type {join}")
        for until, host, why in self.excluded_nodes.values():
            again = time.strftime("%H:%M", time.localtime(until))
            words.append(f"node {host} is not asked before {again}: {why}")
        return [*words, self.isolation] if self.isolation else words

    # a run

    def start(self, experiment: Experiment, k: int, run: dict, limit: int):
        """Writes run-K.json and hands the run to Ray; the experiment stays locked until it is home."""
        lock = open(experiment.folder / "lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_json(experiment.folder / f"run-{k}.json", {**run, "cluster": self.address})
        if self.accelerator is None:  # the night will be on what most GPUs here are
            kinds = [accelerator_of(n) for n in self.usable_nodes() for _ in range(gpus_of(n))]
            self.accelerator = Counter(kinds).most_common(1)[0][0] if kinds else None
            write_json(self.settings, {"accelerator": self.accelerator})
        job = {
            "asked": experiment.asked,
            "run": run,
            "limit": limit,
            "fingerprint": fingerprint(),
            "prepare": prepare_command(manifest()),
            "device": self.night.baseline_conditions().get("device"),
        }
        options = dict(num_gpus=1, num_cpus=0, max_retries=MAX_RETRIES)
        if self.accelerator:
            options["accelerator_type"] = self.accelerator
        if self.excluded_nodes:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(self.excluded_nodes)})"}
        code = code_of(self.night.root, run["commit"])
        answer = self.ray.remote(ray_node.run_on_node).options(**options).remote(job, code)
        self.tasks[run["id"]] = answer, lock

    def poll(self, experiment: Experiment) -> tuple[str, str]:
        """(running, ended or lost; why it is lost) of the last run."""
        k, run = len(experiment.runs()), experiment.runs()[-1]
        if run["id"] not in self.tasks:
            return "lost", CUT_OFF  # with the supervisor before us
        answer, _ = self.tasks[run["id"]]
        if experiment.dropped() or self.night.stopped():
            self.ray.cancel(answer, force=True)
            if experiment.dropped():
                ended = {"code": -9, "stopped": "dropped", "wall_seconds": 0.0}
                self.collect(experiment, k, run, {"ended": ended})
            else:
                experiment.again(STOPPED)
            return self.finished(run, "ended")
        if not self.ray.wait([answer], timeout=0)[0]:
            return "running", ""
        try:
            said = self.ray.get(answer)
        except self.ray.exceptions.RayError as error:
            reason = one_line(str(error).strip().splitlines()[-1], 120)
            return self.finished(run, "lost", f"{CUT_OFF}: Ray ended it: {reason}")
        if "refused" in said:
            self.excluded_nodes[said["node"]] = (
                time.time() + EXCLUDE_SECONDS,
                said["host"],
                said["refused"],
            )
            experiment.again(f"sent back by node {said['host']}: {said['refused']}")
        else:
            self.collect(experiment, k, run, said)
        return self.finished(run, "ended")

    def finished(self, run: dict, state: str, why: str = "") -> tuple[str, str]:
        _, lock = self.tasks.pop(run["id"])
        lock.close()
        return state, why

    def collect(self, experiment: Experiment, k: int, run: dict, said: dict):
        """Log, progress and ledger, and at last end-K.json: with it the run has ended."""
        folder, records = experiment.folder, said.get("ledger", [])
        log = said.get("log", b"dropped: what it printed stayed on its node\n")
        write_atomically(folder / f"run-{k}.log", log)
        write_atomically(folder / f"progress-{k}.jsonl", said.get("progress", b""))
        for record in records:  # no git on the node: the commit is known here
            more = {"commit": run["commit"], "changed": False, "node": said["host"]}
            append_line(ledger_path(), signed({**record, **more}))
        end = outcome(said["ended"], records, log.decode(errors="replace"), experiment.split)
        if said.get("retries"):
            lost = f"{CUT_OFF}: Ray lost its node or its process, and started it again"
            end["retried"] = [lost] * said["retries"]
        write_json(folder / f"end-{k}.json", {**end, "host": said.get("host")})
        self.isolation = said.get("isolation", self.isolation)


def redirect_output(path: Path) -> list[int]:
    """Sends what Ray prints to a file of its own. Returns our two outputs, for restore_output."""
    kept = [os.dup(1), os.dup(2)]
    with open(path, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    return kept


def restore_output(kept: list[int]):
    sys.stdout.flush()
    sys.stderr.flush()
    for number, descriptor in enumerate(kept, 1):
        os.dup2(descriptor, number)


def gpus_of(node: dict) -> int:
    return int(node["Resources"].get("GPU", 0))


def accelerator_of(node: dict) -> str | None:
    """Ray's name of the node's type of GPU, where it knows one."""
    names = [name.partition("accelerator_type:")[2] for name in node["Resources"]]
    return next(filter(None, names), None)


def code_of(root: Path, commit: str) -> bytes:
    """A tar file of what a run may need of a commit: .py files at the top, and autoresearch/."""
    return git_bytes("archive", "--format=tar", commit, ":(glob)*.py", "autoresearch", at=root)


def prepare_command(prepared) -> str:
    """What makes the same prepared set on another machine. prepared: the manifest."""
    request = dict(prepared["request"])
    corpus = request.pop("corpus")
    shards = request.pop("num_shards", None)
    source = {"demo": "--demo", "text": "--data DIR (the same texts)"}.get(corpus)
    words = [source or f"--num-shards {shards}"]
    words += [f"--{name.replace('_', '-')} {value}" for name, value in request.items()]
    return "uv run prepare.py " + " ".join(words)
