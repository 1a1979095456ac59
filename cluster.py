"""
cluster.py: the night's runs beyond one machine, on a Ray cluster. Nobody edits it.

night.py's supervisor imports it where RAY_ADDRESS is set, or program.md's knob `cluster`. Notable:
- a run is one detached actor named by the run's id: it outlives the supervisor, and the next one
  finds it by that name; it holds one GPU of the baseline's accelerator type
- it takes its code along by value, and the node's environment and prepared cache; the node's
  fingerprint, device and disk are checked first, and a run that does not fit is sent back
- beside Ray's process on the node stands one of ours: it runs, ends the run with all its children
  at the limit or when Ray's process has gone, and removes what is left. So nothing goes on for ever
  whatever dies
- a run whose node dies is `cut off`, as one whose watcher dies on one machine: it runs again, at
  most twice, and its row says so

Room I, at home, is the only code that imports ray besides the actor; room II runs on the node.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import night

CONNECTED = 12  # seconds in which Ray must let us in
LOOK = 2  # seconds between two looks at the cluster's nodes
ASK = 0.5  # seconds between two questions to a run
NEWS = 2  # seconds that the node waits for something to answer
CHUNK = 1 << 18  # bytes of a log in one answer; what came faster is left out
REFUSED = 600  # seconds for which a node that sent a run back is not asked again
CHECKED = 300  # seconds in which the node must know its device; torch alone may take a minute
KEPT = 3600  # seconds for which a node keeps the result of a run that nobody fetches
FREE = 256 << 20  # bytes that the node's temporary folder must have
PIECE = 1 << 16  # bytes of code in one argument: Ray keeps those under 100 KB inside the task,
# so that a run waiting for its GPU starts even where the supervisor has died meanwhile

# =============================================================================== I. at home


class Followed:
    """What the supervisor remembers of a run: nothing that the next one could not ask for again."""

    def __init__(self, actor):
        self.actor = actor
        self.answer = None  # Ray's reference to the answer that is awaited
        self.asked = 0.0
        self.size = 0  # bytes of the log that are at home
        self.node = None  # {id, host}: where it runs


class Cluster:
    """The cluster as an engine of the night: slots, start, look. Raises night.Refused without it."""

    def __init__(self, the_night: night.Night, address: str):
        self.night = the_night
        self.address = address
        self.followed: dict[str, Followed] = {}
        self.state = {"slots": 1, "words": [], "refused": {}, **night.cluster_state()}
        self.seen, self.nodes = -LOOK, []  # when Ray was asked last, and what it said
        self.isolation = None
        self.baseline = self.device_of_baseline()
        self.connect()

    def connect(self):
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
        import ray

        self.ray = ray
        self.quiet = Quiet(self.night.home / "cluster.log")
        timer = threading.Timer(CONNECTED, self.hung)  # Ray itself would try for a minute
        timer.daemon = True
        timer.start()
        whose = f"{socket.gethostname()}:{self.night.folder}".encode()
        try:
            ray.init(
                address=self.address,
                namespace="autoresearch-" + hashlib.sha256(whose).hexdigest()[:12],
                log_to_driver=False,
                configure_logging=False,
            )
            self.end_strays()
        except Exception as error:  # of any type: it is said in one line, and the supervisor ends
            self.quiet.end()
            said = f"lets nobody in: {night.one_line(error, 300)}"
            advice = self.join()
            if "mismatch" in str(error):
                install = "uv run --python X.Y.Z --with ray==N --group cluster night.py"
                advice = f"with the cluster's versions: {install}"
            raise night.Refused(self.says(said, advice)) from None
        finally:
            timer.cancel()
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # nodes have no cluster.py

    def hung(self):
        self.quiet.end()
        said = self.says(f"answers, but lets nobody in within {CONNECTED} s", self.join())
        print(f"FAIL: {said}", file=sys.stderr, flush=True)
        os._exit(1)

    def join(self) -> str:
        start = f"uv run --group cluster ray start --address={self.address} --num-gpus=0"
        return f"is this machine one of its nodes? {start}"

    def says(self, problem: str, advice: str) -> str:
        """Puts a problem where every command shows it."""
        words = f"the cluster {self.address} {problem}; nothing is lost; {advice}"
        self.keep(words=[words])
        return words

    def keep(self, **state):
        state = {**self.state, **state}
        if state != self.state or state != night.cluster_state():
            self.state = state
            night.write_json(self.night.home / "cluster.json", state)

    def disconnect(self):
        self.ray.shutdown()
        self.quiet.end()

    def end_strays(self):
        """Ends what a supervisor before us had finished with and was killed before it let it go."""
        wanted = [e.runs()[-1]["id"] for e in self.night.open() if e.state() == "running"]
        for name in self.ray.util.list_named_actors():
            if name not in wanted:
                with contextlib.suppress(ValueError):  # gone meanwhile
                    self.ray.kill(self.ray.get_actor(name))

    # where runs may go

    def device_of_baseline(self) -> dict:
        """The baseline's `device` and `accelerator` type; None until a node has begun with it."""
        known = night.read_json(self.night.folder / "device.json")
        if known:
            return known
        import prepare

        first = [r["run"] for r in self.night.records() if r["kind"] == "baseline"][:1]
        for record in prepare.read_ledger()[0] if first else []:  # it ran on one machine
            if record.get("run") == first[0] and record.get("device"):
                return self.keep_device(record["device"], None)
        return {"device": None, "accelerator": None}

    def keep_device(self, device: str, accelerator: str | None) -> dict:
        self.baseline = {"device": device, "accelerator": accelerator}
        night.write_json(self.night.folder / "device.json", self.baseline)
        return self.baseline

    def usable(self) -> list[dict]:
        """The nodes that may take a run, as Ray describes them."""
        if time.monotonic() - self.seen > LOOK:
            self.nodes = [n for n in self.ray.nodes() if n["Alive"] and gpus_of(n)]
            self.seen = time.monotonic()
        accelerator = self.baseline["accelerator"]
        refused = self.refused()
        fits = [n for n in self.nodes if n["NodeID"] not in refused]
        return [n for n in fits if not accelerator or accelerator == accelerator_of(n)]

    def refused(self) -> dict[str, list]:
        """{node's id: (until when, its name, why)} of the nodes that sent a run back."""
        return {node: said for node, said in self.state["refused"].items() if said[0] > time.time()}

    def slots(self) -> list[dict]:
        """One a GPU; a single one until the first run of the baseline has said what device it is."""
        gpus = sum(map(gpus_of, self.usable()))
        total = sum(map(gpus_of, self.nodes))
        wanted = night.number_knob("slots", str(max(1, gpus)))
        count = min(gpus, wanted)
        kind = self.baseline["accelerator"] or "any type"
        words = [f"cluster {self.address}: runs on {count} of {total} GPUs ({kind})"]
        if wanted > gpus:
            words[0] += f"; the knob asks for {wanted}"
        if not gpus:
            join = f"uv run --group cluster ray start --address={self.address}"
            words.append(f"no node can take a run: on a machine with such a GPU type {join}")
        for until, host, why in self.refused().values():
            again = time.strftime("%H:%M", time.localtime(until))
            words.append(f"node {host} is not asked before {again}: {why}")
        self.keep(slots=count, words=words, refused=self.refused())
        return [{}] * (min(count, 1) if not self.baseline["device"] else count)

    # a run

    def start(self, experiment: night.Experiment, k: int, run: dict, limit: int):
        """Writes run-K.json and hands the run to Ray, in this order: what Ray has is always known."""
        import prepare

        ledger = night.cache_folder() / night.LEDGER
        known = {"cluster": self.address, "ledger": ledger.stat().st_size}
        night.write_json(experiment.folder / f"run-{k}.json", {**run, **known})
        order = {
            "asked": experiment.asked,
            "run": run,
            "limit": limit,
            "fingerprint": prepare.fingerprint(),
            "prepare": prepare_command(prepare.manifest()),
            "device": self.baseline["device"],
        }
        accelerator = self.baseline["accelerator"]
        if self.baseline["device"] is None:  # the night will be on what most GPUs here are
            kinds = [accelerator_of(node) for node in self.usable() for _ in range(gpus_of(node))]
            accelerator = Counter(kinds).most_common(1)[0][0] if kinds else None
        options = {"accelerator_type": accelerator} if accelerator else {}
        if self.refused():
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(self.refused())})"}
        code = code_of(run["commit"])
        pieces = [code[i : i + PIECE] for i in range(0, len(code), PIECE)]
        actor_class = self.ray.remote(OnNode).options(
            name=run["id"], lifetime="detached", num_gpus=1, num_cpus=0, max_restarts=0, **options
        )
        self.followed[run["id"]] = Followed(actor_class.remote(order, *pieces))

    def look(self, experiment: night.Experiment) -> str | None:
        """Brings home what a run has to say. Returns why it is cut off, where Ray has lost it."""
        runs = experiment.runs()
        k, run = len(runs), runs[-1]
        followed = self.followed.get(run["id"]) or self.find(experiment, k, run)
        if experiment.dropped():
            self.finish(experiment, k, run, {"code": -9, "stopped": "dropped", "wall_seconds": 0.0})
            return None
        if followed is None:
            return self.lost(experiment, k, run, "the cluster knows it no longer")
        if followed.answer is None:
            if time.monotonic() - followed.asked < ASK:
                return None
            followed.asked = time.monotonic()
            news = NEWS if followed.node else 0  # first where it is: a node may die early
            followed.answer = followed.actor.follow.remote(followed.size, news)
        if not self.ray.wait([followed.answer], timeout=0)[0]:
            return None
        answer, followed.answer = followed.answer, None
        try:
            said = self.ray.get(answer)
        except self.ray.exceptions.ActorUnavailableError:
            return None  # for a moment, says Ray: it is asked again
        except self.ray.exceptions.RayError as error:
            reason = night.one_line(str(error).strip().splitlines()[-1], 120)
            return self.lost(experiment, k, run, f"Ray ended it: {reason}")
        return self.take(experiment, k, run, said)

    def find(self, experiment: night.Experiment, k: int, run: dict) -> Followed | None:
        """The actor of a run that a supervisor before us has started."""
        with contextlib.suppress(ValueError):
            followed = self.followed[run["id"]] = Followed(self.ray.get_actor(run["id"]))
            followed.node = night.read_json(experiment.folder / f"node-{k}.json")
        return self.followed.get(run["id"])

    def lost(self, experiment: night.Experiment, k: int, run: dict, why: str) -> str:
        self.let_go(run)
        node = night.read_json(experiment.folder / f"node-{k}.json")
        alive = [n["NodeID"] for n in self.ray.nodes() if n["Alive"]]
        if node and node["id"] not in alive:
            return f"cut off: its node {node['host']} was lost"
        return f"cut off: {why}" + (f" (on {node['host']})" if node else "")

    def let_go(self, run: dict):
        """The actor ends, and with it all that it has on its node."""
        followed = self.followed.pop(run["id"], None)
        if followed:
            self.ray.kill(followed.actor)

    def take(self, experiment: night.Experiment, k: int, run: dict, said: dict) -> str | None:
        followed = self.followed[run["id"]]
        if followed.node is None:
            followed.node = {"id": said["node"], "host": said["host"]}
            night.write_json(experiment.folder / f"node-{k}.json", followed.node)
        with open(experiment.folder / f"run-{k}.log", "ab" if followed.size else "wb") as log:
            log.write(said["log"])
        followed.size = said["size"]
        device = said.get("device")
        if device and experiment.is_baseline and not self.baseline["device"]:
            here = [n for n in self.ray.nodes() if n["NodeID"] == said["node"]]
            self.keep_device(device, accelerator_of(here[0]) if here else None)
        if said.get("isolation", self.isolation) != self.isolation:
            self.isolation = said["isolation"]
            night.write_once(self.night.home / "isolation", self.isolation.encode())
        if "lost" in said:
            self.let_go(run)
            return f"cut off: on {said['host']} {said['lost']}"
        if "refused" in said:
            until = time.time() + REFUSED
            refusal = [until, said["host"], said["refused"]]
            self.keep(refused={**self.refused(), said["node"]: refusal})
            experiment.again(f"sent back by node {said['host']}: {said['refused']}")
            self.let_go(run)
        elif "ended" in said:
            self.finish(experiment, k, run, said["ended"], said["ledger"], said["host"])
        return None

    def finish(self, experiment, k: int, run: dict, ended: dict, records=(), host=None):
        """Ledger, end-K.json, and last the node: killed in between, the same is done again."""
        import prepare

        there, _ = prepare.read_ledger(run["ledger"])
        for record in records:
            known = {"commit": run["commit"], "changed": False, "node": host}  # no git on the node
            if {**record, **known} not in there:
                line = prepare.signed({**record, **known}).decode().strip()
                night.append_line(night.cache_folder() / night.LEDGER, line)
        text = night.log_text(experiment.folder / f"run-{k}.log")
        end = night.outcome(ended, list(records), text, experiment.split)
        night.write_json(experiment.folder / f"end-{k}.json", {**end, "host": host})
        self.let_go(run)


class Quiet:
    """What Ray prints goes to a file of its own: the supervisor's log is where its end is looked for."""

    def __init__(self, path: Path):
        self.kept = [os.dup(1), os.dup(2)]
        with open(path, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        logging.getLogger("ray").setLevel(logging.CRITICAL)

    def end(self):
        sys.stdout.flush()
        sys.stderr.flush()
        for number, kept in enumerate(self.kept, 1):
            os.dup2(kept, number)


def gpus_of(node: dict) -> int:
    return int(node["Resources"].get("GPU", 0))


def accelerator_of(node: dict) -> str | None:
    """Ray's name of the node's kind of GPU, where it knows one."""
    names = [name.partition("accelerator_type:")[2] for name in node["Resources"]]
    return next(filter(None, names), None)


def code_of(commit: str) -> bytes:
    """The Python files at the top of a commit, as our own night.py and cluster.py go with them."""
    names = night.git("ls-tree", "--name-only", commit).split("\n")
    files = {}
    for name in [name for name in names if name.endswith(".py")]:
        files[name] = night.git_bytes("cat-file", "blob", f"{commit}:{name}")
    for path in (Path(night.__file__), Path(__file__)):
        files[path.name] = path.read_bytes()
    texts = {name: content.decode("latin-1") for name, content in files.items()}  # byte by byte
    return zlib.compress(json.dumps(texts).encode())


def prepare_command(manifest) -> str:
    """What makes the same prepared set on another machine."""
    request = dict(manifest["request"])
    corpus = request.pop("corpus")
    shards = request.pop("num_shards", None)
    source = {"demo": "--demo", "text": "--data DIR (the same texts)"}.get(corpus)
    words = [source or f"--num-shards {shards}"]
    words += [f"--{name.replace('_', '-')} {value}" for name, value in request.items()]
    return "uv run prepare.py " + " ".join(words)


# ============================================================================ II. on the node

PREFLIGHT = """
import json, prepare
print(json.dumps([prepare.fingerprint(), prepare.device_name(prepare.training_device())]))
"""  # in a process of its own: torch's context would stay on the GPU


class OnNode:
    """The actor, in Ray's process: unpacks the code, starts the watcher, answers the supervisor."""

    def __init__(self, order: dict, *pieces: bytes):
        import ray

        self.node = ray.get_runtime_context().get_node_id()
        self.run_id = order["run"]["id"]
        self.said = {}  # by the watcher, and how it ended
        self.asked = time.monotonic()
        threading.Thread(target=self.wait_for_supervisor, daemon=True).start()
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="autoresearch-"))
            tree = self.folder / "tree"
            tree.mkdir()
            for name, text in json.loads(zlib.decompress(b"".join(pieces))).items():
                (tree / name).write_bytes(text.encode("latin-1"))
            (self.folder / "order.json").write_text(json.dumps(order))
        except OSError as error:
            self.said = {"refused": f"{error.strerror} in {tempfile.gettempdir()}: make room there"}
            return
        [gpus] = [n["Resources"]["GPU"] for n in ray.nodes() if n["NodeID"] == self.node]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // int(gpus)))  # Ray sets 1
        self.watcher = subprocess.Popen(
            [sys.executable, "-B", "cluster.py"],
            cwd=tree,
            env=environment,
            stdin=subprocess.PIPE,  # ends with this process: so the watcher knows
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        """The watcher's words, one JSON object a line, the last of which says how the run ended."""
        for line in self.watcher.stdout:
            self.said = {**self.said, **json.loads(line)}
        if not self.over():  # it was killed, or failed
            error = self.watcher.stderr.read().decode(errors="replace").strip().splitlines()
            code = f"import night; night.end_leftovers({self.run_id!r})"
            subprocess.run([sys.executable, "-c", code], cwd=self.folder / "tree")
            shutil.rmtree(self.folder, ignore_errors=True)
            lost = f"its watcher ended: {error[-1] if error else self.watcher.wait()}"
            self.said = {**self.said, "lost": lost}

    def over(self) -> bool:
        return any(word in self.said for word in ("ended", "refused", "lost"))

    def wait_for_supervisor(self):
        """A result that nobody fetches does not hold the GPU for ever."""
        while not self.over() or time.monotonic() - self.asked < KEPT:
            time.sleep(1)
            if not self.over():
                self.asked = time.monotonic()
        os._exit(0)

    def follow(self, size: int, news: float) -> dict:
        """What the log holds beyond `size` bytes and what else there is to say.

        Waits for `news` seconds for any of it to change.
        """
        self.asked = time.monotonic()
        log = self.folder / "log" if hasattr(self, "folder") else Path(os.devnull)
        before = len(self.said)
        while time.monotonic() - self.asked < news:
            if self.over() or len(self.said) > before:
                break
            if log.exists() and log.stat().st_size > size:
                break
            time.sleep(0.02)
        said = {**self.said}  # before the log is read: where it has ended, the log is complete
        text, end = b"", size
        with contextlib.suppress(FileNotFoundError), open(log, "rb") as file:
            end = os.fstat(file.fileno()).st_size
            start = max(size, end - CHUNK)
            file.seek(start)
            text = file.read(end - start)
            if start > size:
                text = f"\n... {start - size} bytes left out ...\n".encode() + text
        host = socket.gethostname()
        return {**said, "node": self.node, "host": host, "log": text, "size": max(size, end)}


def say(**words):
    print(json.dumps(words), flush=True)


def alone() -> bool:
    """Whether Ray's process has gone: it held the other end of our standard input."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


def watch():
    """The process beside Ray's: checks, runs, and stays until Ray's has gone, to clean up after it."""
    if os.fork():
        os._exit(0)  # no child of Ray's process, which kills its children when it is ended itself
    night.become_subreaper()
    folder = Path.cwd().parent
    try:
        order = json.loads((folder / "order.json").read_text())
        try:
            say(**carry_out(order, folder))
        except OSError as error:
            say(refused=f"{error.filename or folder}: {error.strerror}")
        while not alone():
            time.sleep(0.1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def carry_out(order: dict, folder: Path) -> dict:
    """Runs what was ordered: {ended, ledger}, or {refused: why} where this node cannot."""
    import prepare

    tree, compiled = folder / "tree", Path("~/.cache/autoresearch-compiled").expanduser()
    environment = night.run_environment(folder, compiled, order["asked"], order["run"])
    preflight = [sys.executable, "-c", PREFLIGHT]
    pipes = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True)
    try:
        asked = subprocess.run(preflight, cwd=tree, env=environment, timeout=CHECKED, **pipes)
    except subprocess.TimeoutExpired:
        return {"refused": f"its device did not answer within {CHECKED} s"}
    type_there = f"there, in this repository: {order['prepare']}"
    if asked.returncode:
        reason = (asked.stderr.strip().splitlines() or ["no answer"])[-1].removeprefix("FAIL: ")
        if "nothing is prepared" in reason:
            reason = f"nothing is prepared in {prepare.cache_dir()}; {type_there}"
        return {"refused": f"{reason} (Python: {sys.executable})"}
    fingerprint, device = json.loads(asked.stdout.splitlines()[-1])
    if fingerprint != order["fingerprint"]:
        another = f"{prepare.cache_dir()} holds another prepared set ({fingerprint}, not"
        return {"refused": f"{another} {order['fingerprint']}); {type_there} --force"}
    if order["device"] and device != order["device"]:
        two = f"its device is {device}, the baseline ran on {order['device']}"
        return {"refused": f"{two}: scores of two devices cannot be compared"}
    isolation = night.Isolation.here(prepare.cache_dir())
    ledger = prepare.cache_dir() / night.LEDGER
    ledger.touch()
    start = ledger.stat().st_size
    if shutil.disk_usage(folder).free < FREE:
        return {"refused": f"under {FREE >> 20} MiB are free in {folder.parent}: make room there"}
    words = isolation.words and f"node {socket.gethostname()}: {isolation.words}"
    say(device=device, isolation=words)
    ended = night.run_to_its_end(
        tree, environment, compiled, folder / "log", isolation, order["limit"], alone
    )
    if ended["code"] and shutil.disk_usage(folder).free < FREE:
        return {"refused": f"{folder.parent} was full when the run failed: make room there"}
    mine = [r for r in prepare.read_ledger(start)[0] if r.get("run") == order["run"]["id"]]
    return {"ended": ended, "ledger": mine}


if __name__ == "__main__":
    watch()
