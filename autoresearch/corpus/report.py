"""What a person sees of a preparation: its progress, what came out, what is missing."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from autoresearch.common import Fail, file_name, some
from autoresearch.corpus.documents import Source
from autoresearch.referee.manifest import SPLITS


class Progress:
    """A line a file; on a terminal also one rewritten line: files, MB, rate, time left.

    Threads share it.
    """

    def __init__(self, verb: str, files: int):
        self.verb = verb
        self.files = files
        self.done = 0
        self.bytes = 0
        self.began = self.drawn = time.monotonic()
        self.lock = threading.Lock()

    def say(self, line: str):
        """Prints over the line that is rewritten."""
        if sys.stderr.isatty():
            line = "\r\033[K" + line
        print(line, end="", file=sys.stderr, flush=True)

    def add(self, count: int):
        """So many more bytes."""
        with self.lock:
            self.bytes += count
            now = time.monotonic()
            if not sys.stderr.isatty() or now - self.drawn < 0.2:
                return
            self.drawn = now
            seconds, megabytes = now - self.began, self.bytes / 1e6
            line = f"{self.verb} {self.done}/{self.files}, {megabytes:,.0f} MB"
            line += f" at {megabytes / seconds:.1f} MB/s"
            if self.done:
                left = seconds / self.done * (self.files - self.done)
                line += f", about {left:.0f} s left"
            self.say(line)

    def finish(self, name: str):
        """One more file."""
        with self.lock:
            self.done += 1
            seconds = time.monotonic() - self.began
            self.say(f"{self.verb} {file_name(name)} ({self.done}/{self.files}, {seconds:.1f} s)\n")


def in_parallel(function, items: list, workers: int, verb: str) -> list:
    """[function(item, progress), ...] by threads; every item has a `name`.

    Raises the first failure at once, without waiting for the others: the process is to end then.
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
        future.result()  # raises
    return [future.result() for future in futures]


# ------------------------------------------------------------------------------------ what came out


def total(entries: list[dict], what: str, split: str) -> int:
    """entries: the manifest's `tokens`; what: "documents", "bytes" or "tokens"."""
    return sum(entry[what][split] for entry in entries)


def print_table(entries: list[dict], eval_rows: dict, row_length: int):
    """What each split holds; the rows of val and test are those of a score."""
    print(f"{'split':5} {'documents':>11} {'MB':>9} {'tokens':>15} {'rows':>10}")
    for split in SPLITS:
        tokens = total(entries, "tokens", split)
        print(
            f"{split:5} {total(entries, 'documents', split):11,} "
            f"{total(entries, 'bytes', split) / 1e6:9,.1f} {tokens:15,} "
            f"{eval_rows.get(split, tokens // row_length):10,}"
        )


def print_nulls(sources: list[Source]):
    """Says how many documents were skipped because their text is null."""
    without = [source for source in sources if source.nulls]
    if without:
        names = some([f"{file_name(source.name)} ({source.nulls:,})" for source in without], 4)
        print(f"skipped {sum(s.nulls for s in without):,} documents whose text is null: {names}")


FEW_TOKENS = 100_000  # scored: below, a score's standard error is over about 0.01 nats a token


def require_rows(entries: list[dict], eval_rows: dict, row_length: int):
    """Raises Fail where there is no row to train on or to score; without one to test, warns."""
    for split in SPLITS:
        tokens = total(entries, "tokens", split)
        if tokens >= row_length:
            continue
        message = f"the {split} split has {tokens:,} tokens and one row needs {row_length:,}"
        if split != "test":
            raise Fail(
                f"{message}. Add text (to a file named {split}, if you like), or lower --seq-len"
            )
        print(f"{message}: AUTORESEARCH_SPLIT=test, for the end, will have no score")
    if eval_rows["val"] * row_length < FEW_TOKENS:
        print("few rows to score: only large differences between scores will mean something")
