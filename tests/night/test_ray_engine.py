"""Runs on a real Ray cluster: its nodes are processes here, whose GPUs are only numbers."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from lab import LINUX, MANIFEST, Lab

from autoresearch.common import Fail, signed
from autoresearch.night import settings

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray", reason="needs Ray: uv sync --group cluster", exc_type=ImportError)
pytestmark = pytest.mark.skipif(not LINUX, reason="looks for processes in /proc")

PROVENANCE = """
from autoresearch.common import cache_dir


def training_device():
    return None


def device_name(device):
    path = cache_dir() / "device"
    return path.read_text() if path.is_file() else "a GPU"
"""
QUICK = {  # seconds instead of a quarter of a minute until a dead node counts as dead
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 4,
}


class Nodes:
    """The cluster: a head with another type of GPU, and nodes that come and go."""

    def __init__(self, folder: Path, prepared: Path):
        from ray.cluster_utils import Cluster

        self.folder, self.prepared = folder / "caches", prepared
        self.temporary = folder / "tmp"  # where the runs' folders are
        self.folder.mkdir()
        self.temporary.mkdir()
        self.named = {}
        self.common = dict(include_log_monitor=False, object_store_memory=80 << 20)
        head = dict(num_cpus=0, include_dashboard=False, no_monitor=True)
        head |= dict(num_gpus=1, resources={"accelerator_type:OLD1": 1}, _system_config=QUICK)
        self.cluster = Cluster(True, head_node_args={**head, **self.common})
        self.address = self.cluster.address

    def cache(self, name: str) -> Path:
        return self.folder / name

    def add(self, name: str, gpus: int):
        if not self.cache(name).exists():
            shutil.copytree(self.prepared, self.cache(name))
        own = {"AUTORESEARCH_CACHE": str(self.cache(name)), "TMPDIR": str(self.temporary)}
        kind = dict(num_gpus=gpus, resources={"accelerator_type:NEW2": 1}, env_vars=own)
        node = self.cluster.add_node(wait=False, num_cpus=0, **kind, **self.common)
        self.named[name] = node

    def kill(self, name: str):
        """SIGKILL to the node's raylet: Ray's processes there follow it."""
        raylet = self.named.pop(name).all_processes["raylet"][0].process
        raylet.kill()
        raylet.wait()

    def jobs(self) -> list[Path]:
        """One a run that a node has in hand, in its folder."""
        return list(self.temporary.glob("autoresearch-*/job.json"))

    def starts(self, run_id: str) -> list[str]:
        """The nodes on which a run has begun to train, as often as it did."""
        found = []
        for cache in sorted(self.folder.iterdir()):
            for line in (cache / "autoresearch.jsonl").read_text().splitlines():
                found += [cache.name] * (run_id in line and '"start"' in line)
        return found


@pytest.fixture(scope="module")
def nodes(fresh, tmp_path_factory):
    nodes = Nodes(tmp_path_factory.mktemp("nodes"), fresh.cache)
    nodes.add("a", 2)
    yield nodes
    nodes.cluster.shutdown()


class ClusterLab(Lab):
    nodes = None

    def go(self, *names: str):
        """Lets runs that hold go on, wherever they are."""
        for cache in self.nodes.folder.iterdir():
            for name in names:
                (cache / f"go-{name}").touch()
                (cache / f"score-{name}").touch()

    def until(self, condition, seconds: float = 90):
        super().until(condition, seconds)

    def run_id(self, n: int, k: int = 1) -> str:
        [path] = self.state_dir.glob(f"nov21/*/{n}/run-{k}.json")
        return json.loads(path.read_text())["id"]

    def until_held(self, n: int, k: int = 1):
        """Until the K-th run trains; its progress is still on its node."""
        path = self.state_dir / f"nov21/queue/{n}/run-{k}.json"
        self.until(path.is_file)
        self.until(lambda: self.nodes.starts(self.run_id(n, k)))

    def again(self, n: int) -> list[str]:
        paths = sorted(self.state_dir.glob(f"nov21/queue/{n}/again-*.json"))
        return [json.loads(path.read_text())["again"] for path in paths]

    def words(self) -> str:
        """What the engine last had to say."""
        state = json.loads((self.state_dir / "engine.json").read_text())
        return " ".join(state["lines"])

    def with_constant(self, name: str, old: int, new: int):
        """As if ray_engine.py had another constant."""
        path = self.root / "autoresearch/night/ray_engine.py"
        assert f"\n{name} = {old} " in path.read_text()
        path.write_text(path.read_text().replace(f"\n{name} = {old} ", f"\n{name} = {new} "))
        self.git("update-index", "--assume-unchanged", "autoresearch/night/ray_engine.py")

    def check(self):
        """Besides what holds after any night: the ledger has two lines of each run that ended."""
        super().check()
        events = [(line["run"], line["event"]) for line in self.ledger()]
        assert len(events) == len(set(events))
        for record in self.records():
            if record["score"] is not None:
                assert {(record["run"], "start"), (record["run"], "end")} <= set(events)
                assert record["host"] == socket.gethostname()
        for line in self.ledger():
            assert line["commit"] and line["changed"] is False and line["node"]


@pytest.fixture(scope="module")
def begun(nodes, tmp_path_factory) -> ClusterLab:
    """A lab whose baseline has ended, on the cluster. To be copied."""
    ClusterLab.nodes = nodes
    lab = ClusterLab.made(tmp_path_factory.mktemp("begun") / "it")
    (lab.root / "autoresearch/referee/provenance.py").write_text(PROVENANCE)
    lab.git("commit", "-qam", "cluster")
    lab.env["RAY_ADDRESS"] = nodes.address
    lab.say("begin")
    lab.until(lambda: len(lab.records()) == 3)
    lab.until_idle()
    assert "keep  val_bpb 1.000000" in lab.say("wait", 0)
    assert nodes.starts(lab.record(1)["run"]) == ["a"]  # on the type that most GPUs are of
    return lab


@pytest.fixture
def lab(begun, tmp_path) -> ClusterLab:
    lab = begun.copy(tmp_path / "it")
    lab.env["RAY_ADDRESS"] = begun.env["RAY_ADDRESS"]
    return lab


def test_a_node_and_the_supervisor_killed_and_each_experiment_is_recorded_once(lab, nodes):
    nodes.add("b", 2)
    held = [lab.attempt(f"holds {name}", HOLD=name) for name in "xy"]
    lab.until(lambda: "runs on 4 of 5 GPUs (NEW2)" in lab.words())  # as many may wait
    held += [lab.attempt(f"holds {name}", HOLD=name) for name in "zw"]
    for n in held:
        lab.until_held(n)  # two on a, two on b
    places = {n: nodes.starts(lab.run_id(n))[0] for n in held}
    assert sorted(places.values()) == ["a", "a", "b", "b"]
    assert lab.say().count("on the cluster, ") == 4
    nodes.kill("b")  # in the middle of two runs, which run again on c
    nodes.add("c", 2)
    runs = {n: 1 + (places[n] == "b") for n in held}
    for n in held:
        lab.until_held(n, runs[n])
    lab.go("x", "y", "z", "w")
    for n in held:
        assert len(lab.until_ended(n)["again"]) == runs[n] - 1
    assert sum("[ran again, cut off: Ray ended it: " in row[-1] for row in lab.rows()) == 2
    # with the supervisor its tasks die; the next one queues them again
    lab.until_idle()
    n = lab.attempt("wider", WIDTH=1, HOLD="v", EVENT="orphans")
    lab.until_held(n)
    first = lab.run_id(n)
    lab.kill_supervisor()
    lab.until(lambda: not carrying(first))
    lab.say()
    lab.until_held(n, k=2)
    lab.go("v")
    record = lab.until_ended(n)
    assert (record["status"], record["again"]) == ("keep", ["cut off"])
    lab.say()
    lab.until_idle()
    lab.check()
    lab.until(lambda: not nodes.jobs())
    nodes.kill("c")


def carrying(run_id: str) -> list[str]:
    """The command lines of the processes that belong to a run, wherever they were forked."""
    mark = f"AUTORESEARCH_RUN={run_id}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes().split(b"\0"):
                found.append((path.parent / "cmdline").read_text())
    return found


def test_what_a_run_leaves_behind_ends_with_it_whoever_dies(lab, nodes):
    left = lab.attempt("leaves processes behind, is dropped", EVENT="orphans", HOLD="never")
    lab.until_held(left)
    lab.until(lambda: len(carrying(lab.run_id(left))) == 3)  # it, and two that left its session
    lab.say("drop", left)
    assert lab.until_ended(left)["why"] == "dropped"
    lab.until(lambda: not carrying(lab.run_id(left)))
    cut = lab.attempt("is cut off", EVENT="orphans", HOLD="cut")
    lab.until_held(cut)
    run_id = lab.run_id(cut)
    kill_watcher(nodes, run_id)  # our process there: the task fails
    lab.until_held(cut, k=2)
    assert not carrying(run_id)
    lab.say("stop")
    lab.until(lambda: not carrying(lab.run_id(cut, k=2)))
    lab.until_idle()
    lab.say("begin")
    lab.until_held(cut, k=3)
    lab.go("cut")
    record = lab.until_ended(cut)
    assert record["status"] == "discard"
    assert [why.split(":")[0] for why in record["again"]] == ["cut off", "stopped"]
    assert "the process that watched it ended: killed" in record["again"][0]
    lab.say()
    lab.until_idle()
    lab.check()
    lab.until(lambda: not nodes.jobs())


def kill_watcher(nodes: Nodes, run_id: str):
    """SIGKILL to the process that watches a run on its node."""
    jobs = {json.loads(path.read_text())["run"]["id"]: path for path in nodes.jobs()}
    folder = str(jobs[run_id].parent)
    named = []
    for cwd in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
            there = os.readlink(cwd).startswith(folder)
            if there and "ray_node" in (cwd.parent / "cmdline").read_text():
                named.append(cwd.parent.name)
    [watcher] = named
    os.kill(int(watcher), signal.SIGKILL)


def test_a_node_that_cannot_run_it_sends_it_back_with_the_command_to_type(lab, nodes):
    nodes.kill("a")
    nodes.add("d", 1)
    (nodes.cache("d") / "manifest.json").unlink()
    lab.with_constant("EXCLUDE_SECONDS", 600, 2)  # it is asked again soon
    n = lab.attempt("wider", WIDTH=1)

    def until_sent_back(why: str):
        back = f"sent back by node {socket.gethostname()}: "
        lab.until(lambda: any(why in said and said.startswith(back) for said in lab.again(n)))

    until_sent_back(f"nothing is prepared in {nodes.cache('d')}")
    assert "there, in this repository: uv run prepare.py --demo" in lab.again(n)[-1]
    lab.until(lambda: "gets no run before" in lab.words())
    lab.until(lambda: "no node can take a run" in lab.words())  # once "a" counts as dead
    (nodes.cache("d") / "manifest.json").write_bytes(signed({**MANIFEST, "of": "another"}))
    until_sent_back("holds another prepared set")
    assert "uv run prepare.py --demo --force" in lab.again(n)[-1]
    (nodes.cache("d") / "manifest.json").write_bytes(signed(MANIFEST))
    assert lab.until_ended(n)["status"] == "keep"
    lab.say()
    lab.until_idle()
    lab.check()


def test_a_node_with_another_device_sends_it_back(lab, nodes):
    # the baseline's conditions name its device, as the locked clock has it
    lines = (lab.state_dir / "nov21/journal.jsonl").read_text().splitlines()
    records = [{**json.loads(line), "conditions": {"device": "a GPU"}} for line in lines]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (lab.state_dir / "nov21/journal.jsonl").write_text(text)
    [name] = nodes.named
    (nodes.cache(name) / "device").write_text("another GPU")
    n = lab.attempt("wider", WIDTH=1)
    why = "its device is another GPU, the baseline ran on a GPU: scores of two devices"
    lab.until(lambda: lab.again(n) and why in lab.again(n)[0])
    lab.until(lambda: why in lab.words())
    assert len(lab.again(n)) == 1  # it is not asked again for ten minutes
    (nodes.cache(name) / "device").unlink()
    lab.say("drop", n)
    lab.until_idle()


def test_a_cluster_that_does_not_answer_is_said_and_nothing_queued_is_lost(lab, nodes):
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = f"127.0.0.1:{server.getsockname()[1]}"
        lab.env["RAY_ADDRESS"] = silent  # it accepts, and says nothing
        lab.with_constant("CONNECT_TIMEOUT", 12, 3)
        n = lab.attempt("wider", WIDTH=1)
        shown = lab.say("wait", 10)
        no_answer = "does not accept the connection: no answer within 3 s"
        assert f"the cluster {silent} {no_answer}" in shown
        assert f"{n}: waiting" in shown
    lab.until_idle()
    shown = lab.say("wait", 60)  # now it is refused
    assert f"the cluster {silent} does not answer. Nothing is lost" in shown
    del lab.env["RAY_ADDRESS"]
    assert "this night runs on a Ray cluster, and RAY_ADDRESS is not set" in lab.refused("wait")
    assert "it must be HOST:PORT" in lab.refused(RAY_ADDRESS="ray://10.0.0.1:10001")
    lab.set("- cluster: none")
    lab.say()
    assert lab.until_ended(n)["status"] == "keep"  # on this machine


def test_other_versions_are_ray_s_own_words_with_what_to_type(lab, nodes):
    code = "import ray; ray.__version__ = '2.1.0'; import night; night.main(['supervise'])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=lab.root, env=lab.env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "Ray: 2.1.0" in done.stderr and f"Ray: {ray.__version__}" in done.stderr
    assert "with the cluster's versions: uv run --python X.Y.Z --with ray==N" in done.stderr
    assert "does not accept the connection" in lab.say()


def test_without_ray_the_command_that_installs_it_is_said(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Fail, match="not installed: uv sync --group cluster"):
        settings.cluster_address()
