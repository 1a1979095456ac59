"""
A night that is slower than it could be, or less shut off: one line each, with the command that mends it.

Before the first run what this machine lacks (LocalEngine.status_lines), after it what the baseline
fell back to. A fallback that all runs share makes no run "not comparable", so only these lines tell.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from autoresearch.common import one_line
from autoresearch.night.doubts import FELL_BACK
from autoresearch.night.settings import visible_gpus

SLOWER = "slower than it could be"
MAC = sys.platform == "darwin"
CPU_INFO = Path("/proc/cpuinfo")
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # as in kit/device.py, which needs torch

# -------------------------------------------------------------------------------- before any run


def machine_lines() -> list[str]:
    """What will keep runs on this machine from being compiled.

    torch.compile calls a C compiler for a GPU (by Triton), a C++ compiler for a CPU (by Inductor).
    """
    lines = []
    for name in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        if os.environ.get(name) == "1":
            lines.append(f"{SLOWER}: {name}=1, so no run is compiled: unset {name}")
    gpu = bool(visible_gpus())
    variable, names = ("CC", ["gcc", "clang"]) if gpu else ("CXX", ["clang++" if MAC else "g++"])
    chosen = os.environ.get(variable)
    if not any(map(shutil.which, [chosen] if chosen else names)):
        install = "xcode-select --install" if MAC else f"apt-get install {names[0]}"
        missing, mend = names[0], install
        if chosen:
            missing, mend = f"{variable}={chosen}", f"unset {variable}"
        lines.append(f"{SLOWER}: {missing} is not there, so no run is compiled: {mend}")
    return lines


SWITCHES = {  # of Linux, and the value with which a user may make namespaces
    "kernel/apparmor_restrict_unprivileged_userns": "0",
    "kernel/unprivileged_userns_clone": "1",
    "user/max_user_namespaces": "15000",
}


def allow_isolation() -> str:
    """What to type so that runs can be cut off from the network and the cache."""
    if not sys.platform.startswith("linux"):
        return "a Linux machine or container can"
    if not shutil.which("unshare"):
        return "apt-get install util-linux"
    for switch, wanted in SWITCHES.items():
        path = Path("/proc/sys", switch)
        try:
            value = int(path.read_text())
        except (OSError, ValueError):
            continue
        if (value == 0) != (wanted == "0"):
            return f"sudo sysctl -w {switch.replace('/', '.')}={wanted}"
    return "in a container: docker run --cap-add SYS_ADMIN --security-opt seccomp=unconfined ..."


# ---------------------------------------------------------------------------- after the baseline


def baseline_lines(conditions: dict) -> list[str]:
    """What the baseline's runs did without. conditions: Night.baseline_conditions."""
    reasons = conditions.get(FELL_BACK) or []
    flash = [reason for reason in reasons if "FlashAttention" in reason]
    compiling = [reason for reason in reasons if reason not in flash]
    found = []
    if conditions.get("compiled") is False:
        why = compiling[0] if compiling else "torch.compile is off"
        look = "uv run night.py show 1 has the error"
        found.append((f"not compiled ({one_line(why, 70)})", look))
    for reason in flash:
        fetch = "`uv run train.py` once, by hand, fetches it"
        found.append((f"{conditions.get('attention')} attention: {one_line(reason, 70)}", fetch))
    if conditions.get("dtype") == "float32" and bf16_is_fast(conditions.get("device") or ""):
        use = "dtype = compute_dtype(device) in train.py"
        found.append(("float32, though this device is faster with bf16", use))
    then = "; then another tag in program.md, and uv run night.py begin"
    return [f"{SLOWER}: {what}: {mend}{then}" for what, mend in found]


@functools.cache
def bf16_is_fast(device: str) -> bool:
    """Whether the device of this machine with that name multiplies bf16 fast, as far as it says so."""
    try:
        text = CPU_INFO.read_text()
    except OSError:
        text = ""
    if device and device in text:  # its `model name`
        flags = re.search(r"^(?:flags|Features)\s*: (.*)", text, re.M)
        return bool(flags and BF16_FLAGS & set(flags[1].split()))
    if not shutil.which("nvidia-smi"):
        return False
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True).stdout
    found = re.search(rf"^{re.escape(device)}, (\d+)\.", said, re.M)
    return bool(found) and int(found[1]) >= 8
