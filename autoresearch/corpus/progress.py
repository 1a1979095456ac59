"""How far a preparation is, and its work shared out to threads."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

_now = time.monotonic


class Progress:
    """Files, MB, rate, time left: one line rewritten on a terminal, else one line a file.

    Threads share it.
    """

    def __init__(self, verb: str, files: int):
        self.verb = verb
        self.files = files
        self.done = 0
        self.bytes = 0
        self.began = self.drawn = _now()
        self.lock = threading.Lock()
        self.terminal = sys.stderr.isatty()

    def say(self, line: str):
        """Prints `line` where the line that is rewritten stands."""
        if self.terminal:
            line = "\r\033[K" + line
        print(line, end="", file=sys.stderr, flush=True)

    def add(self, count: int):
        """So many more bytes."""
        with self.lock:
            self.bytes += count
            self._draw()

    def finish(self, name: str):
        """One more file."""
        with self.lock:
            self.done += 1
            if self.terminal and self.done < self.files:
                self._draw()
            else:
                seconds = _now() - self.began
                self.say(f"{self.verb} {name} ({self.done}/{self.files}, {seconds:.1f} s)\n")

    def _draw(self):
        if not self.terminal or _now() - self.drawn < 0.2:
            return
        self.drawn = _now()
        seconds = self.drawn - self.began
        megabytes = self.bytes / 1e6
        line = f"{self.verb} {self.done}/{self.files}"
        line += f", {megabytes:,.0f} MB at {megabytes / seconds:.1f} MB/s"
        if self.done:
            left = seconds / self.done * (self.files - self.done)
            line += f", about {left:.0f} s left"
        self.say(line)


def in_parallel(function, items: list, workers: int, verb: str) -> list:
    """[function(item, progress), ...] by threads; every item has a `name`.

    A failure is raised at once: what is finished stays finished.
    """
    progress = Progress(verb, len(items))
    pool = ThreadPoolExecutor(workers)

    def one(item):
        result = function(item, progress)
        progress.finish(item.name)
        return result

    futures = [pool.submit(one, item) for item in items]
    done = wait(futures, return_when=FIRST_EXCEPTION).done
    pool.shutdown(wait=False, cancel_futures=True)
    for future in done:
        future.result()  # raises what it raised
    return [future.result() for future in futures]
