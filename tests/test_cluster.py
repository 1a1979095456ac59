"""cluster.py on a real Ray cluster: its nodes are processes here, whose GPUs are only numbers.

train.py is the stand-in of test_night.py, prepare.py the real one with a device that a file in the
cache names; each node has a cache of its own.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from miniature import ROOT
from test_night import LINUX, Lab, log_of, with_knob

import night

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray", reason="needs Ray: uv sync --group cluster", exc_type=ImportError)
pytestmark = [
    pytest.mark.skipif(not shutil.which("git"), reason="needs git"),
    pytest.mark.skipif(not LINUX, reason="looks for processes in /proc"),
]

DEVICE = """

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
    """The cluster: a head with another kind of GPU, and nodes that come and go."""

    def __init__(self, folder: Path, prepared: Path):
        from ray.cluster_utils import Cluster

        self.folder, self.prepared = folder, prepared
        self.named = {}
        self.common = dict(include_log_monitor=False, object_store_memory=80 << 20)
        head = dict(num_cpus=0, include_dashboard=False, no_monitor=True)
        head |= dict(num_gpus=1, resources={"accelerator_type:OLD1": 1})
        self.cluster = Cluster(
            True, head_node_args={**head, **self.common, "_system_config": QUICK}
        )
        self.address = self.cluster.address

    def cache(self, name: str) -> Path:
        return self.folder / name

    def add(self, name: str, gpus: int, **environment):
        if not self.cache(name).exists():
            shutil.copytree(self.prepared, self.cache(name))
        environment = {"AUTORESEARCH_CACHE": str(self.cache(name)), **environment}
        self.named[name] = self.cluster.add_node(
            wait=False,
            num_cpus=0,
            num_gpus=gpus,
            resources={"accelerator_type:NEW2": 1},
            env_vars=environment,
            **self.common,
        )

    def kill(self, name: str):
        """SIGKILL to the node's raylet: Ray's processes there follow it."""
        raylet = self.named.pop(name).all_processes["raylet"][0].process
        raylet.kill()
        raylet.wait()

    def id(self, name: str) -> str:
        return self.named[name].node_id

    def go(self, *names: str):
        """Lets runs that hold on."""
        for cache in self.folder.iterdir():
            for name in names:
                (cache / f"go-{name}").touch()
                (cache / f"score-{name}").touch()


@pytest.fixture(scope="module")
def nodes(miniature, tmp_path_factory):
    nodes = Nodes(tmp_path_factory.mktemp("nodes"), miniature)
    nodes.add("a", 2)
    yield nodes
    nodes.cluster.shutdown()


class ClusterLab(Lab):
    @classmethod
    def on(cls, nodes: Nodes, folder: Path):
        lab = cls.made(folder, prepare=(ROOT / "prepare.py").read_text() + DEVICE)
        shutil.rmtree(lab.cache)
        shutil.copytree(nodes.prepared, lab.cache)
        (lab.cache / "autoresearch.jsonl").write_bytes(b"")
        shutil.copy(ROOT / "cluster.py", lab.root)
        lab.git("add", "-A")
        lab.git("commit", "-q", "-m", "cluster")
        lab.env["RAY_ADDRESS"] = nodes.address
        return lab

    def copy(self, folder: Path):
        lab = ClusterLab(super().copy(folder).folder)
        lab.env["RAY_ADDRESS"] = self.env["RAY_ADDRESS"]
        return lab

    def until(self, condition, seconds: float = 90):
        super().until(condition, seconds)

    def until_it_stands_at_40(self, *numbers: int, k: int = 1):
        self.until(lambda: all("40.0%" in log_of(self, n, k) for n in numbers))

    def kill_supervisor(self):
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().split(b"\0")
                here = os.path.realpath(path.parent / "cwd") == str(self.root)
                if here and b"supervise" in words:
                    os.kill(int(path.parent.name), signal.SIGKILL)
        self.until_idle()

    def state(self) -> dict:
        """What the supervisor last saw of the cluster."""
        return json.loads((self.root / ".night/cluster.json").read_text())

    def refuse(self, *refused: str):
        """As if these nodes, by id, had sent runs back; all others are asked again."""
        self.kill_supervisor()
        state = self.state()
        state["refused"] = {id: [time.time() + 600, "x", "not now"] for id in refused}
        (self.root / ".night/cluster.json").write_text(json.dumps(state))

    def with_constant(self, name: str, value: int):
        """As if cluster.py had another constant."""
        path = self.root / "cluster.py"
        text, count = re.subn(rf"^{name} = \d+", f"{name} = {value}", path.read_text(), flags=re.M)
        assert count == 1
        path.write_text(text)
        self.git("update-index", "--assume-unchanged", "cluster.py")

    def run_id(self, n: int, k: int = 1) -> str:
        [path] = self.root.glob(f".night/nov21/*/{n}/run-{k}.json")
        return json.loads(path.read_text())["id"]

    def again(self, n: int) -> list[str]:
        folder = self.root / f".night/nov21/queue/{n}"
        paths = sorted(folder.glob("again-*.json"))
        return [json.loads(path.read_text())["again"] for path in paths]

    def check(self):
        """Besides what holds after any night: home's ledger has two lines of each run that ended."""
        super().check()
        events = [(record["run"], record["event"]) for record in self.ledger()]
        assert len(events) == len(set(events))
        for record in self.records():
            if record["score"] is not None:
                assert {(record["run"], "start"), (record["run"], "end")} <= set(events)
        for record in self.ledger():
            assert record["commit"] and record["changed"] is False and record["node"]


def carrying(run_id: str) -> list[str]:
    """The command lines of the processes that belong to a run, wherever they were forked."""
    mark = f"AUTORESEARCH_RUN={run_id}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes().split(b"\0"):
                found.append((path.parent / "cmdline").read_text())
    return found


@pytest.fixture(scope="module")
def begun(nodes, tmp_path_factory) -> ClusterLab:
    """A lab whose baseline has ended, on the cluster. To be copied."""
    lab = ClusterLab.on(nodes, tmp_path_factory.mktemp("begun") / "it")
    lab.say("begin")
    lab.until(lambda: len(lab.records()) == 3)
    lab.until_idle()
    assert "keep  val_bpb 1.000000" in lab.say("wait", 0)
    assert lab.rows()[1][3:] == ["keep", "baseline"]
    return lab


@pytest.fixture
def lab(begun, tmp_path) -> ClusterLab:
    return begun.copy(tmp_path / "it")


def test_ten_experiments_a_node_and_the_supervisor_killed_and_each_is_recorded_once(lab, nodes):
    nodes.add("b", 2)
    held = [lab.attempt(f"holds {name}", HOLD=name) for name in "xy"]
    lab.until(lambda: lab.state()["slots"] == 4)  # as many may wait
    held += [lab.attempt(f"holds {name}", HOLD=name) for name in "zw"]
    lab.until_it_stands_at_40(*held)  # two on a, two on b
    shown = lab.say()
    assert "runs on 4 of 5 GPUs (NEW2)" in shown
    assert shown.count("training 40%, loss 2.6 (best at 40%: 2.6)") == 4
    lab.kill_supervisor()
    waiting = [lab.attempt("a typo", EVENT=None), lab.attempt("deeper", DEPTH=1, NOTE=1)]
    nodes.kill("b")  # in the middle of two runs
    nodes.add("c", 2)
    lab.until(lambda: sum(map(len, map(lab.again, held))) == 2)
    lost = [n for n in held if lab.again(n)]
    assert all(lab.again(n) == [f"cut off: its node {socket.gethostname()} was lost"] for n in lost)
    assert "once more, because of the run before: cut off: its node" in lab.say("wait", 0)
    nodes.go("x", "y", "z", "w")
    for n in [*held, *waiting]:
        lab.until_ended(n)
    failed = lab.attempt("NaN", EVENT="nan")
    assert lab.until_ended(failed)["why"] == "loss diverged at step 4"
    lab.say()
    lab.until_idle()
    assert len(lab.records()) == 10
    lab.check()
    assert [len(lab.record(n)["again"]) for n in held] == [int(n in lost) for n in held]
    for n in held:  # what had not died with its node was found again, and not run twice
        runs = list((lab.root / f".night/nov21/done/{n}").glob("run-*.json"))
        assert len(runs) == (2 if n in lost else 1)
    assert lab.best()["score"] == pytest.approx(0.99)
    assert "ran again: cut off: its node" in lab.say("show", lost[0])
    said = [row[-1] for row in lab.rows() if "[ran again, cut off: its node" in row[-1]]
    assert len(said) == len(lost) == 2
    assert "NameError" in lab.record(waiting[0])["why"]
    assert "8 of 8 scores match the ledger" in lab.say("audit")
    lab.until(lambda: not list(Path("/tmp").glob("autoresearch-*/order.json")))


@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of 1 MB, where we may make one: root may."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    subprocess.run(mount, capture_output=True)
    yield disk
    subprocess.run(["umount", "-l", str(disk)], capture_output=True)


def test_a_node_that_cannot_run_it_sends_it_back_with_the_command_to_type_there(
    lab, nodes, miniature, disk
):
    others = [nodes.id(name) for name in nodes.named]
    nodes.add("d", 1, TMPDIR=str(disk))
    (nodes.cache("d") / "manifest.json").unlink()
    lab.refuse(*others)
    lab.with_constant("REFUSED", 2)  # it is asked again soon
    n = lab.attempt("wider", WIDTH=1)

    def sent_back(why: str):
        back = f"sent back by node {socket.gethostname()}: "
        lab.until(lambda: any(why in said and said.startswith(back) for said in lab.again(n)))
        lab.until(lambda: lab.state()["slots"] == 0 and why in " ".join(lab.state()["words"]))

    sent_back(
        f"nothing is prepared in {nodes.cache('d')}; there, in this repository: uv run prepare"
    )
    shown = lab.say()
    assert f"{n}: waiting; once more" in shown
    assert (
        "runs on 0 of" in shown
        and "no node can take a run" in shown
        and "is not asked before" in shown
    )
    other_set(miniature, nodes.cache("d"))
    sent_back("holds another prepared set")
    shutil.copy(miniature / "manifest.json", nodes.cache("d"))
    (nodes.cache("d") / "device").write_text("another GPU")
    sent_back("its device is another GPU, the baseline ran on a GPU: scores of two devices")
    (nodes.cache("d") / "device").unlink()
    if disk.is_mount():
        sent_back(f"under 256 MiB are free in {disk}")
        subprocess.run(["umount", "-l", str(disk)])
    assert lab.until_ended(n)["status"] == "keep"
    command = "uv run prepare.py --data DIR (the same texts) --seq-len 64 --vocab-size 300"
    assert sum(command in said for said in lab.record(n)["again"]) >= 2
    lab.say()
    lab.until_idle()
    lab.check()
    nodes.kill("d")


def other_set(prepared: Path, cache: Path):
    """The same set under a manifest with one more word: another fingerprint."""
    import prepare

    manifest = prepare.parse_signed((prepared / "manifest.json").read_bytes())
    (cache / "manifest.json").write_bytes(prepare.signed({**manifest, "of": "another"}))


def test_what_a_run_leaves_behind_ends_with_it_whoever_dies(lab, nodes):
    with_knob(lab, "- limit: 2 seconds")
    hangs = lab.attempt("hangs", EVENT="hang")
    assert lab.until_ended(hangs)["why"] == "still running after 2 s, the limit in program.md"
    assert not carrying(lab.run_id(hangs))
    lab.until_idle()

    with_knob(lab, "- limit: 60 seconds")
    left = lab.attempt("leaves processes behind, and is dropped", EVENT="orphans", HOLD="never")
    lab.until_it_stands_at_40(left)
    first = lab.run_id(left)
    assert len(carrying(first)) == 3  # the run, one that left its session, a child of a dead child
    lab.say("drop", left)
    assert lab.until_ended(left)["why"] == "dropped"
    lab.until(lambda: not carrying(first))

    cut = lab.attempt("is cut off", EVENT="orphans", HOLD="cut")
    for k, name in enumerate(("cluster.py", "ray::OnNode"), 1):  # our process there, then Ray's
        lab.until_it_stands_at_40(cut, k=k)
        run_id = lab.run_id(cut, k)
        if name == "ray::OnNode":
            lab.kill_supervisor()
        assert kill_beside(run_id, name)
        lab.say()
        lab.until(lambda run_id=run_id: not carrying(run_id))
        lab.until(lambda k=k: len(lab.again(cut)) == k)
    nodes.go("cut")
    assert lab.until_ended(cut)["status"] == "discard"
    assert [said.split(":")[0] for said in lab.record(cut)["again"]] == ["cut off"] * 2
    lab.say()
    lab.until_idle()
    lab.check()
    lab.until(lambda: not list(Path("/tmp").glob("autoresearch-*/order.json")))


def kill_beside(run_id: str, name: str) -> bool:
    """SIGKILL to the watcher of a run, or to Ray's process that started it."""
    [folder] = [
        path.parent
        for path in Path("/tmp").glob("autoresearch-*/order.json")
        if json.loads(path.read_text())["run"]["id"] == run_id
    ]
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_text()
            pipe = os.path.realpath(path / "cwd").startswith(str(folder))
            if name == "cluster.py" and name in words and pipe:
                os.kill(int(path.name), signal.SIGKILL)
                return True
            if name in words and name != "cluster.py":
                os.kill(int(path.name), signal.SIGKILL)
                return True
    return False


def test_a_cluster_that_does_not_answer_is_said_and_nothing_queued_is_lost(lab, nodes):
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = f"127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        lab.env["RAY_ADDRESS"] = silent  # it accepts, and says nothing
        lab.with_constant("CONNECTED", 3)
        n = lab.attempt("wider", WIDTH=1)
        shown = lab.say("wait", 30)
        assert time.monotonic() - began < 15
        assert f"FAIL: the cluster {silent} answers, but lets nobody in within 3 s" in shown
        assert f"{n}: waiting" in shown
    lab.until_idle()
    began = time.monotonic()
    shown = lab.say("wait", 60)  # now it is refused
    assert time.monotonic() - began < 15
    assert f"the cluster {silent} does not answer; nothing is lost" in shown
    assert f"{n}: waiting" in shown
    del lab.env["RAY_ADDRESS"]
    assert "this night runs on a Ray cluster, and RAY_ADDRESS is not set" in lab.refused("wait")
    lab.env["RAY_ADDRESS"] = nodes.address
    lab.with_constant("CONNECTED", 60)
    lab.until(lambda: f"{n}: keep" in lab.say("wait", 5))
    lab.until_idle()
    lab.check()


def test_other_versions_are_ray_s_own_words_with_what_to_type(lab, nodes):
    code = "import ray; ray.__version__ = '2.1.0'; import night; night.main(['supervise'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=lab.root, env=lab.env, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "Ray: 2.1.0" in done.stderr and f"Ray: {ray.__version__}" in done.stderr
    assert "with the cluster's versions: uv run --python X.Y.Z --with ray==N" in done.stderr
    assert "lets nobody in" in lab.say()


def test_the_knob_goes_before_the_variable_and_more_slots_than_gpus_are_said(lab, nodes):
    assert "it must be HOST:PORT" in lab.refused(RAY_ADDRESS="ray://10.0.0.1:10001")
    with_knob(lab, f"- cluster: {nodes.address}")
    with_knob(lab, "- slots: 64")
    del lab.env["RAY_ADDRESS"]
    n = lab.attempt("wider", WIDTH=1)
    assert lab.until_ended(n)["host"] == socket.gethostname()
    assert "the knob asks for 64" in lab.say()


def test_without_ray_the_command_that_installs_it_is_said(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert night.cluster_address() == "10.0.0.1:6379"
    monkeypatch.setattr(night.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(night.Refused, match="not installed: uv sync --group cluster"):
        night.cluster_address()
    monkeypatch.delenv("RAY_ADDRESS")
    assert night.cluster_address() is None


def test_a_supervisor_killed_while_it_brings_a_run_home_writes_nothing_twice(
    prepared_copy, tmp_path
):
    import cluster

    here = object.__new__(cluster.Cluster)
    here.followed = {}
    folder = tmp_path / "4"
    folder.mkdir()
    (folder / "run-1.log").write_text("num_steps: 100\n")
    (prepared_copy.cache_dir() / night.LEDGER).write_bytes(b"a line of before\n")
    experiment = night.Experiment(folder, {"n": 4, "kind": "try", "seed": 42})
    run = {"id": "0123456789ab", "commit": "c" * 40, "ledger": len("a line of before\n")}
    ended = {"code": 0, "stopped": None, "wall_seconds": 5.0}
    said = {"run": run["id"], "split": "val", "commit": None, "changed": None}
    records = [{**said, "event": "start"}, {**said, "event": "end", "score": 0.5}]
    for _ in range(2):  # killed before the second file, so that it is done again
        here.finish(experiment, 1, run, ended, records, "node7")
        end = json.loads((folder / "end-1.json").read_text())
        assert (end["score"], end["steps"], end["host"]) == (0.5, 100, "node7")
        (folder / "end-1.json").unlink()
    found, damaged = prepared_copy.read_ledger()
    assert damaged == 1 and [record["event"] for record in found] == ["start", "end"]
    assert all(record["commit"] == "c" * 40 and record["node"] == "node7" for record in found)


@pytest.mark.parametrize(
    "request_, command",
    [
        ({"corpus": "demo", "seq_len": 256}, "uv run prepare.py --demo --seq-len 256"),
        ({"corpus": "climbmix", "num_shards": -1}, "uv run prepare.py --num-shards -1"),
    ],
)
def test_the_command_for_another_node_makes_the_same_request(request_, command):
    import cluster

    assert cluster.prepare_command({"request": request_}) == command


def test_night_alone_does_not_import_ray():
    code = (
        "import sys, night; night.Night; sys.exit('ray' in sys.modules or 'cluster' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
