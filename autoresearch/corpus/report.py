"""What a person sees of a preparation: how far it is, what came out, what is missing."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from autoresearch.common import Fail
from autoresearch.referee.manifest import SPLITS


class Progress:
    """Files, MB, rate, time left: one line rewritten on a terminal, else one line a file.

    Threads share it.
    """

    def __init__(self, verb: str, files: int):
        self.verb = verb
        self.files = files
        self.done = 0
        self.bytes = 0
        self.began = self.drawn = time.monotonic()
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
                seconds = time.monotonic() - self.began
                self.say(f"{self.verb} {name} ({self.done}/{self.files}, {seconds:.1f} s)\n")

    def _draw(self):
        if not self.terminal or time.monotonic() - self.drawn < 0.2:
            return
        self.drawn = time.monotonic()
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


# ------------------------------------------------------------------------------------ what came out


def total(entries: list[dict], what: str, split: str) -> int:
    """entries: the manifest's `tokens`; what: "documents", "bytes" or "tokens"."""
    return sum(entry[what][split] for entry in entries)


def print_table(sources: list, entries: list[dict], eval_rows: dict, row_length: int):
    """What each split holds; the rows of val and test are those of a score."""
    print(f"{'split':5} {'files':>6} {'documents':>11} {'MB':>9} {'tokens':>15} {'rows':>10}")
    for split in SPLITS:
        files = set()
        for source, entry in zip(sources, entries):
            if entry["tokens"][split]:
                files |= source.files()
        tokens = total(entries, "tokens", split)
        rows = eval_rows.get(split, tokens // row_length)
        print(
            f"{split:5} {len(files):6,} {total(entries, 'documents', split):11,} "
            f"{total(entries, 'bytes', split) / 1e6:9,.1f} {tokens:15,} {rows:10,}"
        )


FEW_TOKENS = 100_000  # scored: below, a score's standard error is over about 0.01 nats a token


def require_rows(entries: list[dict], eval_rows: dict, row_length: int):
    """Raises Fail where a split is too small to train on or to score; for test only a line."""
    rows = {"train": total(entries, "tokens", "train"), **eval_rows}
    for split in SPLITS:
        if rows[split]:
            continue
        tokens = total(entries, "tokens", split)
        message = (
            f"the {split} split has {tokens:,} tokens and one row needs {row_length:,}: "
            f"{row_length - tokens:,} are missing"
        )
        if split == "test":
            print(f"{message}: AUTORESEARCH_SPLIT=test, for the end, will have no score")
        else:
            raise Fail(
                f"{message}. Add text (to a file named {split}, if you like), or lower --seq-len"
            )
    if eval_rows["val"] * row_length < FEW_TOKENS:
        print("few rows to score: only large differences between scores will mean something")
