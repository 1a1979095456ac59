"""
What runs on a node of the Ray cluster: a task, and beside it the process that watches the run.

The task (run_on_node, watched) is pickled by value and runs in Ray's worker, on a node that may not
have this repository: it uses the standard library alone. It unpacks the code, and starts `watch` from
there as a process of its own, which checks the node, runs, and ends the run with all its children
when Ray's worker has gone.
"""

from __future__ import annotations

import io
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from autoresearch.common import cache_dir
from autoresearch.night.worker import (
    Isolation,
    become_subreaper,
    run_environment,
    run_to_its_end,
)
from autoresearch.referee.ledger import ledger_path, read_ledger

DEVICE_TIMEOUT = 300  # seconds to name the device in; importing torch alone may take a minute
MIN_FREE_BYTES = 256 << 20  # bytes that the node's temporary folder must have
LOG_BYTES = 8 << 20  # of the end of a log that come home

PREFLIGHT = """
import json
from autoresearch.referee.manifest import fingerprint
from autoresearch.referee.provenance import device_name, training_device
print(json.dumps([fingerprint(), device_name(training_device())]))
"""  # in a process of its own: torch's context would stay on the GPU


def run_on_node(job: dict, code: bytes) -> dict:
    """The task, in Ray's worker: unpacks the code, has it run, and returns what came of it.

    {ended, ledger, log, progress, isolation, retries} or {refused: why}; with node and host.
    """
    import ray

    host = {"host": socket.gethostname(), "node": ray.get_runtime_context().get_node_id()}
    folder = Path(tempfile.mkdtemp(prefix="autoresearch-"))
    try:
        try:
            with tarfile.open(fileobj=io.BytesIO(code)) as archive:
                archive.extractall(folder / "tree")
            (folder / "job.json").write_text(json.dumps(job))
        except OSError as error:
            why = f"{error.strerror} in {tempfile.gettempdir()}: make room there"
            return {**host, "refused": why}
        # Ray says nowhere else how often it has started a task.
        worker = ray._private.worker.global_worker.core_worker
        retries = worker.get_current_task_attempt_number()
        [gpus] = [n["Resources"]["GPU"] for n in ray.nodes() if n["NodeID"] == host["node"]]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // int(gpus)))  # Ray sets 1
        said = run_watcher(folder, environment, job["run"]["id"])
        said |= {n: (folder / n).read_bytes()[-LOG_BYTES:] for n in said.pop("files", [])}
        return {**host, **said, "retries": retries}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_watcher(folder: Path, environment: dict, run_id: str) -> dict:
    """What the process beside us says at its end. Raises RuntimeError where it was killed."""
    process = subprocess.Popen(
        [sys.executable, "-B", "-c", "from autoresearch.night import ray_node; ray_node.watch()"],
        cwd=folder / "tree",
        env=environment,
        stdin=subprocess.PIPE,  # ends with this process: so that one knows
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    said = process.stdout.read()  # until it has ended, for its first process ends at once
    errors = process.stderr.read().decode(errors="replace").strip().splitlines()
    process.wait()
    if said:
        return json.loads(said)
    code = f"from autoresearch.night import worker; worker.kill_leftovers({run_id!r})"
    subprocess.run([sys.executable, "-c", code], cwd=folder / "tree")
    raise RuntimeError(f"the process that watched it ended: {errors[-1] if errors else 'killed'}")


def worker_is_gone() -> bool:
    """Whether Ray's worker has ended: it holds the other end of our standard input."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


def watch():
    """The process beside Ray's worker: checks the node, runs, says what came of it."""
    if os.fork():
        os._exit(0)  # no child of Ray's worker, which kills its children when it is ended itself
    become_subreaper()
    folder = Path.cwd().parent
    try:
        job = json.loads((folder / "job.json").read_text())
        try:
            said = check_and_run(job, folder)
        except OSError as error:
            said = {"refused": f"{error.filename or folder}: {error.strerror}"}
        if not worker_is_gone():
            print(json.dumps(said), flush=True)
    finally:
        if worker_is_gone():
            shutil.rmtree(folder, ignore_errors=True)


def check_and_run(job: dict, folder: Path) -> dict:
    """{ended, ledger, isolation, files}, or {refused: why} where this node cannot run it."""
    tree, compiled = folder / "tree", Path("~/.cache/autoresearch-compiled").expanduser()
    progress_path = folder / "progress"
    asked, run = job["asked"], job["run"]
    environment = run_environment(folder, compiled, asked, run, progress_path)
    why = check_node(job, folder, environment)
    if why:
        return {"refused": why}
    isolation = Isolation.here()
    ledger_path().touch()
    ledger_start = ledger_path().stat().st_size
    ended = run_to_its_end(
        tree, environment, compiled, folder / "log", isolation, job["limit"], worker_is_gone
    )
    if ended["code"] and shutil.disk_usage(folder).free < MIN_FREE_BYTES:
        return {"refused": f"{folder.parent} was full when the run failed: make room there"}
    progress_path.touch()
    words = isolation.warning and f"node {socket.gethostname()}: {isolation.warning}"
    mine = [r for r in read_ledger(ledger_start)[0] if r.get("run") == run["id"]]
    files = ["log", "progress"]
    return {"ended": ended, "ledger": mine, "isolation": words, "files": files}


def check_node(job: dict, folder: Path, environment: dict) -> str | None:
    """Why this node cannot run it, with what to type here; None where it can."""
    try:
        asked = subprocess.run(
            [sys.executable, "-c", PREFLIGHT],
            cwd=folder / "tree",
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEVICE_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return f"its device did not answer within {DEVICE_TIMEOUT} s"
    type_there = f"there, in this repository: {job['prepare']}"
    if asked.returncode:
        lines = asked.stderr.strip().splitlines() or ["no answer"]
        reason = lines[-1].removeprefix("FAIL: ")
        if "nothing is prepared" in reason:
            reason = f"nothing is prepared in {cache_dir()}; {type_there}"
        return f"{reason} (Python: {sys.executable})"
    found, device = json.loads(asked.stdout.splitlines()[-1])
    if found != job["fingerprint"]:
        return (
            f"{cache_dir()} holds another prepared set ({found}, not {job['fingerprint']}); "
            f"{type_there} --force"
        )
    if job["device"] and device != job["device"]:
        return (
            f"its device is {device}, the baseline ran on {job['device']}: "
            "scores of two devices cannot be compared"
        )
    if shutil.disk_usage(folder).free < MIN_FREE_BYTES:
        return f"under {MIN_FREE_BYTES >> 20} MiB are free in {folder.parent}: make room there"
    return None
