"""
What runs on a node of the Ray cluster: a task, and beside it the process that watches the run.

The task (run_on_node) is pickled by value and runs in Ray's worker, on a node that may not have this
repository: it uses the standard library alone. It unpacks the code and starts `watch` from there as a
process of its own, which checks the node, runs, and kills the run with all its children when Ray's
worker has gone.
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

from autoresearch import compiler
from autoresearch.common import cache_dir
from autoresearch.night import worker

DEVICE_TIMEOUT = 300  # seconds to name the device in; importing torch alone may take a minute
MIN_FREE_BYTES = 256 << 20  # that the node's temporary folder must have
LOG_BYTES = 8 << 20  # of the end of a log that come back

PREFLIGHT = """
import json
from autoresearch.referee.manifest import fingerprint
from autoresearch.referee.provenance import device_name, training_device
print(json.dumps([fingerprint(), device_name(training_device())]))
"""  # in a process of its own: torch's context would stay on the GPU


def run_on_node(job: dict, code: bytes) -> dict:
    """The task, in Ray's worker: unpacks the code, has it run, and returns what came of it.

    {ended, ledger, log, progress, isolation_warning} or {excluded: why}; with node and host.
    Raises RuntimeError where the watcher was killed.
    """
    import ray

    place = {"host": socket.gethostname(), "node": ray.get_runtime_context().get_node_id()}
    if shutil.disk_usage(tempfile.gettempdir()).free < MIN_FREE_BYTES:
        why = f"under {MIN_FREE_BYTES >> 20} MiB are free in {tempfile.gettempdir()}: make room"
        return {**place, "excluded": why}
    folder = Path(tempfile.mkdtemp(prefix="autoresearch-"))
    try:
        with tarfile.open(fileobj=io.BytesIO(code)) as archive:
            archive.extractall(folder / "tree")
        (folder / "job.json").write_text(json.dumps(job))
        answer = run_watcher(folder, job["run"]["id"])
        for name in ("log", "progress"):
            if (folder / name).is_file():
                answer[name] = (folder / name).read_bytes()[-LOG_BYTES:]
        return {**place, **answer}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_watcher(folder: Path, run_id: str) -> dict:
    """What the watcher says at its end. Raises RuntimeError where it was killed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment.pop("OMP_NUM_THREADS", None)  # Ray sets 1
    environment.pop("PYTHONSAFEPATH", None)  # `python -c` imports from its folder

    def python(code: str) -> tuple[bytes, bytes]:
        # Its standard input ends with this process, so that it knows when we have gone.
        with subprocess.Popen(
            [
                sys.executable,
                "-B",
                "-c",
                f"from autoresearch.night import ray_node, worker; {code}",
            ],
            cwd=folder / "tree",
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            # not communicate, which would close its input
            return process.stdout.read(), process.stderr.read()

    output, errors = python("ray_node.watch()")
    if output:
        return json.loads(output)
    python(f"worker.kill_leftovers({run_id!r})")
    lines = errors.decode(errors="replace").strip().splitlines()
    raise RuntimeError(f"the process that watched it ended: {lines[-1] if lines else 'killed'}")


def task_is_gone() -> bool:
    """Whether Ray's worker has ended: it holds the other end of our standard input."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


def watch():
    """The process beside Ray's worker: checks the node, runs, says what came of it."""
    if os.fork():
        os._exit(0)  # no child of Ray's worker, which kills its children when it is ended itself
    worker.become_subreaper()
    folder = Path.cwd().parent
    job = json.loads((folder / "job.json").read_text())
    try:
        why = check_node(job)
        answer = {"excluded": why} if why else run_job(job, folder)
        if not task_is_gone():
            print(json.dumps(answer), flush=True)
    finally:
        if task_is_gone():
            shutil.rmtree(folder, ignore_errors=True)


def run_job(job: dict, folder: Path) -> dict:
    """{ended, ledger, isolation_warning}; log and progress lie in the folder."""
    isolation = worker.Isolation.here()
    ended, records = worker.run_to_its_end(
        Path.cwd(),
        folder,
        compiler.place(Path("~/.cache/autoresearch-compiled").expanduser()),
        job["asked"],
        job["run"],
        folder / "log",
        folder / "progress",
        isolation,
        job["limit"],
        task_is_gone,
    )
    warning = isolation.warning and f"node {socket.gethostname()}: {isolation.warning}"
    return {"ended": ended, "ledger": records, "isolation_warning": warning}


def check_node(job: dict) -> str | None:
    """Why this node cannot run it, with the command to type here; None where it can."""
    try:
        checked = subprocess.run(
            [sys.executable, "-c", PREFLIGHT],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEVICE_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return f"its device did not answer within {DEVICE_TIMEOUT} s"
    prepare = f"there, in this repository: {job['prepare']}"
    if checked.returncode:
        lines = checked.stderr.strip().splitlines() or ["no answer"]
        return f"{lines[-1].removeprefix('FAIL: ')} ({prepare}; Python: {sys.executable})"
    found, device = json.loads(checked.stdout.splitlines()[-1])
    if found != job["fingerprint"]:
        return (
            f"{cache_dir()} holds another prepared set ({found}, not {job['fingerprint']}); "
            f"{prepare} --force"
        )
    if job["device"] and device != job["device"]:
        return (
            f"its device is {device}, the baseline ran on {job['device']}: "
            "scores of two devices cannot be compared"
        )
    return None
