"""
Is the machine our own? A run beside other programs measures them, so it waits for calm first.

Linux alone is looked at (/proc/stat), and NVIDIA's cards (nvidia-smi); what cannot be seen counts as calm.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

BUSY_SHARE = 0.2  # of all cores, or of a card's time: above it, others disturb a run
PROBE_SECONDS = 0.3
LOOK_AGAIN = 5  # seconds between two looks at a busy machine


class Calm:
    """Lets runs start while others leave the machine alone; for `limit` seconds it waits for that.

    A load that stays longer is part of the machine: later runs do not wait for its end, but know of it.
    limit: None means never to look.
    """

    def __init__(self, limit: int | None):
        self.limit = limit
        self.since: float | None = None  # when the wait for calm began
        self.looked = 0.0
        self.gave_up = False  # and no calm has come since
        self.share = 0.0  # of the machine that others used at the last look

    def waits(self) -> bool:
        return self.since is not None

    def allows(self, slot: dict, alone: bool) -> bool:
        """Whether a run may start now. alone: nothing of ours runs, so that all load is others'."""
        now = time.monotonic()
        if self.limit is None or (self.waits() and now < self.looked + LOOK_AGAIN):
            return self.limit is None
        card = slot.get("CUDA_VISIBLE_DEVICES")
        if card:
            self.share = card_share(card)  # a card's run hardly needs the cores
        else:
            self.share = cores_share() if alone else 0.0
        self.looked = time.monotonic()
        if self.share > BUSY_SHARE and not self.gave_up:
            self.since = self.since or now
            if now < self.since + self.limit:
                return False
        self.gave_up = self.share > BUSY_SHARE
        self.since = None
        return True

    def busy(self) -> float | None:
        """For the run's record: the share that others had when it started all the same."""
        return self.share if self.share > BUSY_SHARE else None

    def lines(self) -> list[str]:
        """For the status, while a run waits."""
        if not self.waits():
            return []
        return [
            f"other programs use {self.share:.0%} of the machine: the next run waits until they end, "
            f"at most {self.limit} s (setting `calm`)"
        ]


def cores_share() -> float:
    """The share of all cores' time that is used, over PROBE_SECONDS; 0 where it cannot be seen."""
    before = _ticks()
    time.sleep(PROBE_SECONDS if before else 0)
    after = _ticks()
    if not before or not after or after[1] <= before[1]:
        return 0.0
    return (after[0] - before[0]) / (after[1] - before[1])


def _ticks() -> tuple[int, int] | None:
    """(used, all) ticks of all cores since the start; see proc_stat(5)."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return None
    numbers = [int(word) for word in first.split()[1:9]]  # the guests' are in them
    return sum(numbers) - numbers[3] - numbers[4], sum(numbers)


def card_share(card: str) -> float:
    """The share of the last moment in which a card worked; 0 where nvidia-smi does not say."""
    query = [
        "nvidia-smi",
        "--query-gpu=utilization.gpu",
        "--format=csv,noheader,nounits",
        "-i",
        card,
    ]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout
        return float(said) / 100
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0.0
