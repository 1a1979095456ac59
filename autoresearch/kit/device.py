"""
What a device is good for: its dtype, which size of defaults fits it, its peak, its heap.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path

import torch

# Dense bf16 with float32 sums, in TFLOP/s, from the vendors' data sheets.
# fmt: off
PEAK_TFLOPS = {
    "GB300": 2500, "GB200": 2500, "B300": 2250, "B200": 2250,
    "GH200": 989.5, "H200 NVL": 835.5, "H200": 989.5, "H100 NVL": 835.5, "H100 PCIe": 756, "H100": 989.5,
    "H800": 989.5, "H20": 148, "A100": 312, "A800": 312, "A30": 165, "A40": 149.7, "A10": 125, "A10G": 70,
    "L40S": 362, "L40": 181, "L20": 119.5, "L4": 121,
    "RTX PRO 6000": 503.8, "RTX 6000 Ada": 364.2, "RTX 5000 Ada": 261.1,
    "RTX A6000": 154.8, "RTX A5000": 111.1,
    "RTX 5090": 209.5, "RTX 5080": 112.6, "RTX 5070 Ti": 87.9, "RTX 5070": 61.7,
    "RTX 4090": 165, "RTX 4080 SUPER": 104.4, "RTX 4080": 97.5, "RTX 4070 Ti SUPER": 88.2,
    "RTX 4070 Ti": 80.2, "RTX 4070 SUPER": 71, "RTX 4070": 58.3, "RTX 4060 Ti": 44.1, "RTX 4060": 30.2,
    "RTX 3090 Ti": 80, "RTX 3090": 71, "RTX 3080 Ti": 68.2, "RTX 3080": 59.5, "RTX 3070": 40.6,
    "RTX 3060": 25.5,
    "MI355X": 2516.6, "MI350X": 2306.9, "MI325X": 1307, "MI300X": 1307, "MI250X": 383, "MI210": 181,
}
# fmt: on


def peak_tflops(name: str) -> float:
    """Dense bf16 TFLOP/s by a device's name, the longest entry found in it; 0 where none is.

    Also 0 for the laptop part of a name: another chip, at the power its maker allows it.
    """
    if re.search(r"\b(Laptop|Mobile|Max-Q)\b", name):
        return 0.0
    found = [part for part in PEAK_TFLOPS if re.search(rf"\b{part}\b", name)]
    return PEAK_TFLOPS[max(found, key=len)] if found else 0.0


def pick_size(device: torch.device, corpus: str) -> str:
    """ "cpu" without a GPU and for the demo, "h100" on a data center's card of 40 GB or more, else "gpu"."""
    if device.type != "cuda" or corpus == "demo":
        return "cpu"
    card = torch.cuda.get_device_properties(device)
    capability = (card.major, card.minor)
    # 8.6 is the desktop's Ampere, also where it has 48 GB. ROCm counts otherwise: memory decides.
    fast = torch.version.hip or capability == (8, 0) or capability >= (8, 9)
    return "h100" if fast and card.total_memory >= 38 * 2**30 else "gpu"


def cpu_flags() -> set[str]:
    """What the processor says it can do; empty where it does not say (anything but Linux)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    line = re.search(r"^(?:flags|Features)\s*: (.*)", text, re.M)
    return set(line[1].split()) if line else set()


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies it fast, else float32."""
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        fast = bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})  # x86, x86, Arm
    return torch.bfloat16 if fast else torch.float32


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def use_one_heap():
    """Lets glibc keep freed memory: mapping it afresh halves the speed of a CPU run."""
    with contextlib.suppress(AttributeError):  # another libc has no mallopt
        mallopt = ctypes.CDLL(None).mallopt  # see mallopt(3)
        mallopt(-8, 1)  # M_ARENA_MAX
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD
