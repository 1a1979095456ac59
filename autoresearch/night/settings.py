"""
The night's settings: what it improves, and the human's lines in program.md.

A line `- name: value` is a setting: tag, limit, slots, notify, cluster. What this page does not say has
a default.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

from autoresearch.common import ROOT, Fail, cores, one_line
from autoresearch.night.logs import log_path
from autoresearch.night.target import TARGET_SETTINGS, read_target, target_of_log


def night_root(start: Path) -> Path:
    """The repository whose night it is: that of the folder `start`, else the one night.py lies in.

    Raises Fail in a bare one, which has no files to change.
    """
    for folder in (start, *start.parents):
        if (folder / ".git").exists():
            return folder
        if (folder / "HEAD").is_file() and (folder / "objects").is_dir() and folder.name != ".git":
            raise Fail(f"{folder} is a bare repository: git clone it, and begin in the clone")
    return ROOT


HERE = night_root(Path.cwd())
PROGRAM = HERE / "program.md"
CLUSTER_TIMEOUT = 3  # seconds in which something must listen at the cluster's address


RUN_SEEDS = (42, 43, 44, 142, 143)  # of a commit's runs, in turn; `confirm` takes 45 and on
BASELINE_SEEDS = RUN_SEEDS[:3]


def setting_in(text: str) -> dict[str, str]:
    """All settings of a program.md; of two lines with one name the first."""
    lines = re.findall(r"^- ([\w-]+):[ \t]*(.*?)[ \t]*$", text, re.M)
    return dict(reversed(lines))


def setting(name: str, default: str | None = None) -> str:
    """The text behind `- name:` in program.md. Raises Fail where there is none and no default."""
    text = PROGRAM.read_text(errors="replace") if PROGRAM.is_file() else ""
    found = setting_in(text).get(name)
    if found:
        return found
    if default is None:
        where = "program.md" if HERE == ROOT else str(PROGRAM)
        raise Fail(f"{where} has no line `- {name}: ...`: add it to the settings")
    return default


TARGET = read_target({name: setting(name, "") for name in TARGET_SETTINGS})
METRIC_WHY = ""  # where the metric is that of a log of others: how its direction is known
if TARGET.is_train_py:
    TARGET, METRIC_WHY = target_of_log(log_path(HERE), TARGET)
# How night.py is called here.
NIGHT = "uv run night.py"
if HERE != ROOT:
    NIGHT = f"python3 {shlex.quote(str(ROOT / 'night.py'))}"
if not TARGET.is_train_py:  # all that its night writes lies in its own repository
    os.environ["AUTORESEARCH_CACHE"] = str(HERE / ".night")


def number_setting(name: str, default: str) -> int:
    """A setting that begins with a whole number of at least 1. Raises Fail on anything else."""
    text = setting(name, default)
    found = re.match(r"(\d+)(?!\w|[.,]\d|\s*(min|h))", text)  # not 1,200, not 20 minutes
    if not found or int(found[1]) < 1:
        raise Fail(
            f"program.md, setting `{name}: {one_line(text, 40)}`: it must begin with a whole "
            "number (seconds, or runs), at least 1"
        )
    return int(found[1])


def time_limit() -> int:
    """Seconds for one run from start to end."""
    return number_setting("limit", "1200")


def wanted_repeats() -> int:
    """How many runs of the best there shall be: a slot with nothing to do makes those that lack."""
    return number_setting("repeats", "5")


def calm_limit() -> int | None:
    """Seconds that a run waits for a machine which others use; None: it does not look."""
    return None if setting("calm", "300").startswith("off") else number_setting("calm", "300")


# --------------------------------------------------------------------- where the runs go: slots


def local_slots() -> list[dict]:
    """The environment of each slot, a place for one run: one a visible GPU, or as `slots` says.

    Raises Fail where `slots` asks for more than there are GPUs.
    """
    gpus = visible_gpus()
    wanted = number_setting("slots", str(max(1, len(gpus))))
    if gpus and wanted > len(gpus):
        raise Fail(
            f"program.md, setting `slots: {wanted}`: only {len(gpus)} GPUs are visible, and runs "
            f"that share one get less of it, each another score. Set {len(gpus)} at most"
        )
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:wanted]]
    if wanted == 1:
        return [{}]
    return [{"OMP_NUM_THREADS": str(max(1, cores() // wanted))}] * wanted


@functools.cache  # nvidia-smi may take a second
def visible_gpus() -> list[str]:
    """Names, each of which as CUDA_VISIBLE_DEVICES shows a run that one GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
        return re.findall(r"^GPU (\d+):", listed, re.M)
    names = []
    for entry in (visible or "").split(","):
        name = entry.strip()
        if not re.fullmatch(r"\d+|GPU-\S+", name):
            break  # CUDA ignores what follows the first entry that names no GPU
        names.append(name)
    return list(dict.fromkeys(names))


def cluster_address() -> str | None:
    """Where the Ray cluster answers (HOST:PORT, or `auto`); None where runs stay on this machine."""
    address = setting("cluster", os.environ.get("RAY_ADDRESS") or "none").split()[0]
    if address == "none":
        return None
    if not TARGET.is_train_py:
        raise Fail("a cluster runs train.py alone: put `- cluster: none` into program.md")
    named = f"the cluster {one_line(address, 60)} (RAY_ADDRESS, or program.md's setting `cluster`)"
    if address != "auto" and not re.fullmatch(r"[^\s/]+:\d{1,5}", address):
        raise Fail(f"{named}: it must be HOST:PORT as `ray start --head` prints it, auto, or none")
    if importlib.util.find_spec("ray") is None:
        install = "uv sync --group cluster (or: uv run --group cluster night.py)"
        raise Fail(f"{named} needs Ray, which is not installed: {install}")
    return address


def cluster_problem(address: str | None) -> str | None:
    """One line where nothing listens there; whether it is Ray, the supervisor finds out."""
    if address in (None, "auto"):
        return None
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CLUSTER_TIMEOUT).close()
    except (OSError, OverflowError, UnicodeError):
        return (
            f"the cluster {address} does not answer. Nothing is lost: the night continues when it "
            "does (`ray start --head` there, or another `cluster:` in program.md)"
        )
    return None
