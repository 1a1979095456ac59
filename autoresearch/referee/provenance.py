"""
What the ledger says of a run beside its score: device, driver, commit, imported files, memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import resource
import site
import sys
import sysconfig
import uuid
from pathlib import Path
from types import ModuleType

from autoresearch.common import ROOT, Fail, environment, git, seed, sha256_of, split_name, utc
from autoresearch.referee.manifest import fingerprint, manifest, measuring_sources

NVIDIA_CARD = Path("/dev/nvidia0")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
AMD_DRIVER = Path("/sys/module/amdgpu/version")


def training_device():
    """CUDA (torch calls ROCm so too), Apple's MPS, or the CPU.

    Raises Fail where there is a card that torch cannot use: a CPU would train for hours unnoticed.
    The demo is made for a CPU, and $AUTORESEARCH_DEVICE=cpu asks for one.
    """
    import torch

    if environment("AUTORESEARCH_DEVICE", "any", "cpu|any") == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    is_meant = torch.version.cuda and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
    if NVIDIA_CARD.exists() and is_meant and manifest()["corpus"] != "demo":
        raise Fail(
            f"there is an NVIDIA card, but torch {torch.__version__} cannot use it. Install a "
            f"driver for CUDA {torch.version.cuda} or newer from https://www.nvidia.com/drivers, "
            "or train on the processor with AUTORESEARCH_DEVICE=cpu"
        )
    return torch.device("cpu")


def device_name(device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if model:
            return model[1].strip()
    return platform.processor() or platform.machine()


def driver_version() -> str | None:
    """The version of the NVIDIA or AMD kernel driver, or None."""
    with contextlib.suppress(OSError):
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", NVIDIA_DRIVER.read_text())
        if found:
            return found[1]
    with contextlib.suppress(OSError):
        return AMD_DRIVER.read_text().strip()
    return None


def peak_memory_mb(device) -> float:
    """MiB: of a CUDA device since the clock started, else of the whole process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, else KiB
    return resident / 2**20 if sys.platform == "darwin" else resident / 2**10


def kit_sources() -> list[Path]:
    return sorted((ROOT / "autoresearch" / "kit").glob("*.py"))


def kit_sha256() -> str:
    """Of all files of autoresearch/kit: part of what is tested, as train.py is."""
    digest = hashlib.sha256()
    for path in kit_sources():
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def describe_run(script: Path, script_sha256: str | None, device) -> dict:
    """What the ledger says of a run from its start on; git's part is None where there is no git."""
    import torch

    def of_git(*words: str) -> str | None:
        return git(*words, at=script.parent, check=False)

    changed = of_git("status", "--porcelain", "--", script.name)
    return {
        "run": environment("AUTORESEARCH_RUN", uuid.uuid4().hex[:12], "[0-9a-f]{12}"),
        "time": utc(),
        "repo": of_git("rev-parse", "--show-toplevel"),
        "pid": os.getpid(),
        "branch": of_git("rev-parse", "--abbrev-ref", "HEAD"),
        "commit": of_git("rev-parse", "HEAD"),
        "script": script.name,
        "changed": None if changed is None else changed != "",  # does it differ from that commit?
        "train_sha256": script_sha256,
        "kit_sha256": kit_sha256(),
        "fingerprint": fingerprint(),
        "seed": seed(),
        "device": device_name(device),
        "torch": torch.__version__,
        "driver": driver_version(),
        "split": split_name(),
    }


def imported_files(script: Path) -> dict[str, str]:
    """{path: start of its sha256} of the imported files that neither Python nor a package brought.

    Paths below the script's folder are relative to it. Without the script itself, what the
    fingerprint and the kit's sha256 cover, and what torch.compile wrote into its own cache.
    """
    known = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    known += [*site.getsitepackages(), site.getusersitepackages()]
    compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR")  # torch sets it itself
    if compiled:
        known += [compiled, re.sub(r"-fresh-\d+$", "", compiled)]  # and the one it was made beside
    folders = tuple({os.path.realpath(folder) + os.sep for folder in known})
    files = set()
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            file = vars(module).get("__file__")  # getattr would wake a lazy module
            if isinstance(file, str):
                files.add(Path(os.path.realpath(file)))
    files -= {script, *measuring_sources(), *kit_sources()}
    imported = {}
    for file in sorted(files):
        if str(file).startswith(folders):
            continue
        if file.name.startswith("<") and not file.exists():
            continue  # made in memory: torch has one, `<_remote_module_non_scriptable>.py`
        name = file
        if file.is_relative_to(script.parent):
            name = file.relative_to(script.parent)
        try:
            imported[str(name)] = sha256_of(file)[:16]
        except OSError:
            imported[str(name)] = "unreadable"
    return imported
