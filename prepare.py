"""
prepare.py: everything that stays fixed, so that two scores can be compared.
Nobody edits it during research.

    uv run prepare.py               climbmix, for a real GPU
    uv run prepare.py --data DIR    your own text
    uv run prepare.py --demo        offline, for any machine

Notable, in the order of the rooms:
- part I runs once. Downloads resume, retry and are checked; every finished piece is renamed into
  place, so killing it loses nothing, and a set that is there stays until another is whole;
  `prepare()` at its end is the map
- own text of any shape: no document on two sides, and where documents are few no neighbours
- one manifest says what was prepared; with this file's source it makes the fingerprint: same
  fingerprint, comparable scores
- byte-pair tokenizer (rustbpe trains, tiktoken encodes); every document is encoded once, into flat
  uint16 files
- part II is in every run. Best-fit packing over a memory map: no padding, every row starts with
  BOS, rows do not depend on the batch size
- the clock, the watchdog and the ledger belong to this file, not to the code under test
- bits per byte from the model's logits, after a check that no position sees a later token

`train.py` imports MAX_SEQ_LEN, TIME_BUDGET (both from the manifest), Tokenizer, make_dataloader,
evaluate_bpb and clock. Importing this file starts nothing.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    # Ctrl-C at any moment, also while importing: one line and out. No unfinished piece ever
    # carries its final name.
    def interrupted(*_):
        os.write(2, b"\nFAIL: interrupted; what was finished is kept: run the same command again\n")
        os._exit(130)

    signal.signal(signal.SIGINT, interrupted)

import argparse
import base64
import codecs
import contextlib
import errno
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import mmap
import random
import re
import shutil
import socket
import sys
import threading
import time
from bisect import bisect_left
from collections import Counter
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from autoresearch.common import (
    Fail,
    Parser,
    cache_dir,
    canonical,
    parse_signed,
    seed,  # noqa: F401  (for train.py, as are fingerprint and device_name)
    sha256_of,
    signed,
    some,
    split_name,
    write_atomically,
)
from autoresearch.referee.clock import clock, fail
from autoresearch.referee.leakcheck import EvalModel, LeakCheck, on_device
from autoresearch.referee.ledger import read_ledger  # noqa: F401  (for night.py)
from autoresearch.referee.manifest import (
    FORMAT,
    fingerprint,
    load_manifest,
    manifest,
    read_manifest,
    set_dir,
    shared_lock,
)
from autoresearch.referee.provenance import (
    device_name,  # noqa: F401
    driver_version,  # noqa: F401
    training_device,
)

# ========================================================================================== I. once

# ---------------------------------------------------------------------------------------- constants

SPLITS = ("train", "val", "test")  # in the token cache's index, by their place here
# What is fixed for each corpus; the command line overrides, the manifest remembers. Lengths in
# tokens, the budget in seconds.
# fmt: off
PRESETS = {
    "climbmix": dict(seq_len=2048, vocab_size=8192, eval_tokens=40 * 524_288, time_budget=300),
    "text":     dict(seq_len=2048, vocab_size=8192, eval_tokens=40 * 524_288, time_budget=300),
    "demo":     dict(seq_len=256,  vocab_size=2048, eval_tokens=262_144,      time_budget=300),
}
# fmt: on
LIMITS = {  # smallest and largest
    "seq_len": (16, 1 << 20),
    "vocab_size": (260, 1 << 16),
    "eval_tokens": (1, 1 << 40),
    "time_budget": (1, 1 << 20),
}
MEANING = {
    "seq_len": "tokens that the model sees at once",
    "vocab_size": "different tokens",
    "eval_tokens": "tokens that are scored",
    "time_budget": "seconds of training",
}
# Whose source the demo is made of: all come with what train.py and the notebook need.
DEMO_PACKAGES = ("matplotlib", "networkx", "numpy", "pandas", "sympy")
BUILT = re.compile(r"version\.py|_version.*\.py|__config__\.py")  # differ by platform and build
HELD_OUT_SHARE = 0.05  # of the text for val, as much for test, where no file is named so
MIN_DRAWN = 20  # documents in each, or the draw is left: few give by chance far too much or nothing
FEW_TOKENS = 100_000  # scored: below, a score's standard error is over about 0.01 nats a token
GAP_BYTES = 8  # of text for each token of the row that a gap holds; prose and code have 3 to 5

HUB_PATH = "/datasets/karpathy/climbmix-400b-shuffle/resolve/main/"
VAL_SHARD = 6542  # pinned; training shards count up from 0 and end before these two
TEST_SHARD = 6541
PARALLEL_DOWNLOADS = 4  # one connection rarely fills a line; many only annoy the server
CONNECT_TIMEOUT = 10  # seconds
READ_TIMEOUT = 30  # seconds: the longest silence, not the whole transfer
MAX_TRIES = 8  # in a row without one new byte: with the pauses about four minutes of dead network
BACKOFF = 1.0  # seconds: the first pause, doubled with every try
MAX_WAIT = 60.0  # seconds: the longest pause
MAX_RETRY_AFTER = 300.0  # seconds: the longest pause a server may ask for
# Seconds in all, as long as no byte of any file ever came.
UNREACHABLE_LIMIT = 15.0  # refused, or an unknown host
SILENT_LIMIT = 120.0  # connected, or at least not refused, and then nothing
MAX_WRONG = 2  # times that a whole file may be the wrong one
SHARD_TOKEN_BYTES = 125_000_000  # for the disk: 250 million characters, 4 a token as in our books

SPECIAL_TOKENS = tuple(f"<|reserved_{i}|>" for i in range(4))  # the last four ids; the first is BOS
# GPT-4's split pattern, but digits in groups of one or two: a small vocabulary has no room for all
# three-digit numbers.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
TOKENIZER_CHARS = 1_000_000_000  # of training text is what the tokenizer learns from
TOKENIZER_DOC_CHARS = 10_000  # of one document at most
ENCODE_CHARS = 1 << 18  # at a time: the splitter's regex overflows its stack on a million blanks
PASSAGE_SLACK = 0.05  # plain text is cut into passages of a row, or so much more up to a blank line
PIECE_BYTES = 1 << 20  # of plain text, read and encoded at a time
CUT_BYTES = 1 << 12  # so much further on, a blank line to cut a file at is still looked for
BUNDLE_BYTES = 1 << 26  # of plain text, encoded and mixed as one: bounds memory and lost work

BATCH_DOCS = 128  # packing, part of the metric: documents come in batches of so many
POOL_DOCS = 1000  # and are chosen from a pool of at least so many


# ------------------------------------------------------------------------------------------ helpers

_now = time.monotonic


def well_formed(text: str) -> str:
    """A lone surrogate, which JSON and Python can carry and UTF-8 cannot, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Progress:
    """Files, MB, rate, time left: one line rewritten on a terminal, else one line a file.

    Threads share it.
    """

    def __init__(self, verb: str, files: int):
        self.verb = verb
        self.files = files
        self.done = 0
        self.bytes = 0
        self.said = set()
        self.began = self.drawn = _now()
        self.lock = threading.Lock()
        self.terminal = sys.stderr.isatty()

    def say(self, line: str):
        """Prints `line` where the line that is rewritten stands."""
        if self.terminal:
            line = "\r\033[K" + line
        print(line, end="", file=sys.stderr, flush=True)

    def say_once(self, line: str):
        """As `say`, but not what was said before."""
        with self.lock:
            if line not in self.said:
                self.said.add(line)
                self.say(line)

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


def __getattr__(name: str):
    """`from prepare import MAX_SEQ_LEN` reads the manifest, and only then."""
    if name == "MAX_SEQ_LEN":
        return manifest()["seq_len"]
    if name == "TIME_BUDGET":
        return manifest()["time_budget"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ------------------------------------------------------------------------------- documents: readers


def _parquet_documents(path: Path):
    """Yields (row group, text)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if "text" not in names:
            raise Fail(f"{path} has no column `text`, only: {', '.join(names)[:200]}")
        for group in range(file.num_row_groups):
            for rows in file.iter_batches(row_groups=[group], columns=["text"], batch_size=1024):
                for text in rows.column(0).cast(pa.string()).to_pylist():
                    if text:
                        yield group, text
    except (pa.ArrowException, OSError, UnicodeError) as error:
        reason = str(error)[:200]
        raise Fail(
            f"{path} is not readable as parquet ({reason}): replace it or remove it"
        ) from None


def _jsonl_documents(path: Path):
    """Yields (0, text): the whole file is one group."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                record = json.loads(line)
                text = well_formed(record["text"])
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                if isinstance(error, KeyError):
                    raise Fail(f"{place} has no `text`, only: {', '.join(record)[:200]}") from None
                kind = type(error).__name__
                raise Fail(f"{place}: not a JSON object with a string `text` ({kind})") from None
            yield 0, text


READERS = {".parquet": _parquet_documents, ".jsonl": _jsonl_documents}
SUFFIXES = (*READERS, ".txt", ".md")  # what no reader knows is plain text

# --------------------------------------------------------------------- documents: own text and demo


@dataclass(frozen=True)
class Piece:
    """Bytes of a plain text file, from one blank line to another: read and encoded at a time."""

    path: Path
    digest: bytes  # sha256 of the whole file
    start: int
    end: int

    def text(self) -> str:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            raw = file.read(self.end - self.start)
        if self.start == 0:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise Fail(f"{self.path} is no longer UTF-8 ({error.reason})") from None


@dataclass(eq=False)
class Source:
    """A parquet or jsonl file, or a bundle of plain text: encoded and restarted as a unit."""

    name: str
    path: Path | None  # None for a bundle
    split: str | None  # None: its documents go by `splits`
    splits: Splits | None = None  # own text only
    pieces: tuple[Piece, ...] = ()  # of a bundle

    def describe(self) -> dict:
        """What the manifest says of it."""
        record = {"name": self.name, "split": self.split}
        if self.path:
            return {**record, "size": self.path.stat().st_size, "sha256": sha256_of(self.path)}
        digest = hashlib.sha256()
        for piece in self.pieces:
            digest.update(piece.digest + b"%d %d\n" % (piece.start, piece.end))
        size = sum(piece.end - piece.start for piece in self.pieces)
        return {**record, "size": size, "sha256": digest.hexdigest()}

    @property
    def is_cut(self) -> bool:
        """Are its texts cut into passages, rather than documents that stay whole?"""
        return self.path is None or (self.splits is not None and self.splits.stretches is not None)


class Splits:
    """Which split a document of own text belongs to. None belongs to two.

    What a file named for a split holds belongs there, and is left out everywhere else. The rest is
    drawn, each document by the sha256 of its text. Where so few are drawn that chance decides, all
    text is laid end to end instead, by name, and cut in stretches: val, train, test, and between
    them gaps of a row and more that belong nowhere, so that no passage has its neighbour on the
    other side.
    """

    def __init__(self, held_out: dict[bytes, str], wanted: list[str], row_length: int):
        self.held_out = held_out  # {sha256: split} of the documents in files named for one
        self.wanted = wanted  # of val and test, what no file is named for
        self.gap = GAP_BYTES * row_length + CUT_BYTES
        self.stretches = None  # {sha256: [(start, end, split)]} in bytes
        self.documents = {}  # {sha256: bytes} of the rest, as far as they had to be counted
        self.drawn = dict.fromkeys(SPLITS, 0)  # how many of them a draw gives, and their bytes
        self.drawn_bytes = dict.fromkeys(SPLITS, 0)

    def decide(self, plain: list[tuple[bytes, int]], others):
        """Draw, or stretches? Both give (sha256, bytes); `others` are read until it is clear."""
        if not self.wanted:
            return
        for document in plain:
            self._count(*document)
        for document in others:
            if self._is_fair():
                return
            self._count(*document)
        if not self._is_fair():
            self._lay_out()

    def _count(self, digest: bytes, length: int):
        if digest not in self.held_out and digest not in self.documents:
            self.documents[digest] = length
            self.drawn[_drawn_split(digest)] += 1
            self.drawn_bytes[_drawn_split(digest)] += length

    def _is_fair(self) -> bool:
        """Would a draw give enough documents, and about the share of the text?"""
        share = HELD_OUT_SHARE * sum(self.drawn_bytes.values())
        return all(
            self.drawn[split] >= MIN_DRAWN and share / 2 <= self.drawn_bytes[split] <= 2 * share
            for split in self.wanted
        )

    def _lay_out(self):
        total = sum(self.documents.values())
        share = int(HELD_OUT_SHARE * total)
        train_start, train_end = 0, total
        line = []  # (start, end, split) of all text
        if "val" in self.wanted:
            line.append((0, share, "val"))
            train_start = share + self.gap
        if "test" in self.wanted:
            line.append((total - share, total, "test"))
            train_end = total - share - self.gap
        line.append((train_start, train_end, "train"))
        self.stretches = {}
        position = 0
        for digest, size in self.documents.items():
            clipped = [
                (max(a - position, 0), min(b - position, size), split) for a, b, split in line
            ]
            self.stretches[digest] = [part for part in clipped if part[0] < part[1]]
            position += size

    def parts(self, digest: bytes, text, split: str | None) -> list[tuple[int, int, str]]:
        """(start, end, split) of a document's bytes `text` in a file that is named for `split`."""
        if digest in self.held_out or split:
            own = split is not None and self.held_out.get(digest, split) == split
            return [(0, len(text), split)] if own else []
        if self.stretches is not None:
            parts = self.stretches[digest]
            return [(cut_place(text, start), cut_place(text, end), s) for start, end, s in parts]
        split = _drawn_split(digest)
        return [(0, len(text), split if split in self.wanted else "train")]

    def __str__(self):
        share = f"{HELD_OUT_SHARE:.0%}"
        if not self.wanted:
            return "split by name"
        if self.stretches is None:
            return f"split by the sha256 of each document: {share} for {' and '.join(self.wanted)}"
        ends = {"val": "the first", "test": "the last"}
        stretches = [f"{split} {ends[split]} {share}" for split in self.wanted]
        files = "1 document" if len(self.documents) == 1 else f"{len(self.documents):,} documents"
        return (
            f"split in stretches, for {files} cannot be drawn from evenly: {', '.join(stretches)} "
            f"of the text in order of names, {self.gap / 1e3:.0f} kB left out at each border"
        )


BLANK_LINE = re.compile(rb"\n\s*\n")
LINE_END = re.compile(rb"\n")


def cut_place(text, place: int) -> int:
    """Where a blank line ends, the first from byte `place` on; else a line; else a character."""
    if not 0 < place < len(text):
        return place
    for end in (BLANK_LINE, LINE_END):
        found = end.search(text, place, place + CUT_BYTES)
        if found:
            return found.end()
    while place < len(text) and text[place] & 0xC0 == 0x80:
        place += 1
    return place


def _drawn_split(digest: bytes) -> str:
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < HELD_OUT_SHARE:
        return "val"
    if share < 2 * HELD_OUT_SHARE:
        return "test"
    return "train"


def text_files(data: Path) -> dict[str, Path]:
    """{name: path} of every file of SUFFIXES below `data`, or `data` itself, which may be one."""
    top = data.parent if data.is_file() else data
    files = {}
    for path in _files_below(data):
        if _kind(path) in SUFFIXES:
            files[path.relative_to(top).as_posix()] = path
    if not files:
        *names, last = [f"*{suffix}" for suffix in SUFFIXES]
        names = f"{', '.join(names)} or {last}"
        raise Fail(f"{data} is no {names}" if data.is_file() else f"no {names} below {data}")
    wrong = [path for path in files.values() if _kind(path) not in READERS and not _is_text(path)]
    if wrong:
        raise _not_utf8(wrong)
    return files


def _files_below(data: Path) -> list[Path]:
    """Without what is hidden, and what lies behind links to folders."""
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise Fail(f"--data {data}: there is no such directory")
    found = []
    for root, folders, names in os.walk(data):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _is_text(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        try:
            while block := file.read(PIECE_BYTES):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def _not_utf8(paths: list[Path]) -> Fail:
    with open(paths[0], "rb") as file:
        is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return Fail(
        f"not UTF-8: {some(paths)}. Save as UTF-8, by an editor or `iconv -f "
        f"{'UTF-16' if is_utf16 else 'LATIN1'} -t UTF-8 OLD > NEW`, or move away"
    )


def _left_out(data: Path) -> str:
    """A line that counts the files below `data` that are not read, by their kind; or nothing."""
    kinds = Counter()
    for path in _files_below(data):
        if _kind(path) not in SUFFIXES:
            kinds[_kind(path) or "without a suffix"] += 1
        elif not path.stat().st_size:
            kinds["empty"] += 1
    most_first = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
    counted = some(f"{count:,} {kind}" for kind, count in most_first)
    return f"not read: {counted}\n" if counted else ""


def _kind(path: Path) -> str:
    return path.suffix.lower()


def named_split(name: str) -> str | None:
    """The split that a file is named for: val.*, val_*, val-*, val/*; also valid, validation, test."""
    *folders, file = name.split("/")
    for word in (*folders, re.split("[._-]", file)[0]):
        if word in ("val", "valid", "validation"):
            return "val"
        if word == "test":
            return "test"
    return None


def demo_files() -> dict[str, Path]:
    """{name: path} of the .py files of DEMO_PACKAGES: the same text wherever their versions are.

    Without the files that a build writes, and those that are empty or not UTF-8.
    """
    files = {}
    for package in DEMO_PACKAGES:
        found = importlib.util.find_spec(package)
        if found is None or not found.origin:
            raise Fail(f"the demo's text is the source of {package}, which is missing: uv sync")
        directory = Path(found.origin).parent
        for path in sorted(directory.rglob("*.py")):
            if not BUILT.fullmatch(path.name) and path.stat().st_size and _is_text(path):
                files[path.relative_to(directory.parent).as_posix()] = path
    return files


def text_sources(
    files: dict[str, Path], named: dict[str, str], row_length: int
) -> tuple[list[Source], Splits]:
    """The sources of own text, and how it is split; files: by name; named: those for a split."""
    sources = []
    plain = {}  # name: sha256
    for name, path in files.items():
        if _kind(path) in READERS:
            sources.append(Source(name, path, named.get(name)))
        else:
            plain[name] = bytes.fromhex(sha256_of(path))
    held_out = {}
    for name, split in named.items():
        if name in plain and split != "train":
            held_out[plain[name]] = split
    for source in sources:
        if source.split in ("val", "test"):
            for _, digest, _ in read(source):
                held_out[digest] = source.split

    wanted = [split for split in ("val", "test") if split not in named.values()]
    splits = Splits(held_out, wanted, row_length)
    unnamed = [name for name in plain if name not in named]
    others = ((digest, len(raw)) for s in sources if not s.split for _, digest, raw in read(s))
    splits.decide([(plain[name], files[name].stat().st_size) for name in unnamed], others)
    for source in sources:
        source.splits = splits

    pieces = {split: [] for split in SPLITS}
    for name, digest in plain.items():
        for split, piece in _pieces(files[name], digest, named.get(name), splits):
            # By the hash of their names, so that every bundle is a fair sample.
            key = hashlib.sha256(os.fsencode(name) + b"/%d" % piece.start).digest()
            pieces[split].append((key, name, piece))
    for split in SPLITS:
        for bundle in _bundles(sorted(pieces[split], key=lambda entry: entry[0])):
            names = sorted({name for _, name, _ in bundle})
            label = names[0] if len(names) == 1 else f"{len(names)} text files"
            sources.append(Source(label, None, split, splits, tuple(p for _, _, p in bundle)))
    return sources, splits


def _pieces(path: Path, digest: bytes, named: str | None, splits: Splits):
    """Yields (split, piece) of a plain text file, in order."""
    if path.stat().st_size == 0:
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        for start, end, split in splits.parts(digest, text, named):
            while start < end:
                stop = min(cut_place(text, start + PIECE_BYTES), end)
                yield split, Piece(path, digest, start, stop)
                start = stop


def _bundles(pieces: list):
    """Yields lists of the (key, name, piece), in order, each ended by what fills BUNDLE_BYTES."""
    bundle = []
    size = 0
    for entry in pieces:
        bundle.append(entry)
        size += entry[2].end - entry[2].start
        if size >= BUNDLE_BYTES:
            yield bundle
            bundle = []
            size = 0
    if bundle:
        yield bundle


def read(source: Source):
    """Yields (row group, sha256, bytes) of a parquet or jsonl file's documents, in its order."""
    for group, text in READERS[_kind(source.path)](source.path):
        raw = text.encode()
        yield group, hashlib.sha256(raw).digest(), raw


def documents(source: Source):
    """Yields (split, row group, text) in order; pieces of text where the source is cut.

    Raises Fail, naming file and place, on anything that is not text.
    """
    if source.path is None:
        for piece in source.pieces:
            yield source.split, 0, piece.text()
    elif source.splits is None:
        for group, text in READERS[_kind(source.path)](source.path):
            yield source.split, group, text
    else:
        for group, digest, raw in read(source):
            for start, end, split in source.splits.parts(digest, raw, source.split):
                if start < end:
                    yield split, group, raw[start:end].decode()


# ------------------------------------------------------------------------------ documents: climbmix


class Retry(Exception):
    """This download may go better next time.

    wait: seconds the server asked for, or None; discard: the bytes at hand are wrong; wrong: they
    are a whole file; limit: seconds after which to give up while no byte ever came.
    """

    def __init__(self, reason: str, wait=None, discard=False, wrong=False, limit=None):
        super().__init__(reason)
        self.wait = wait
        self.discard = discard or wrong
        self.wrong = wrong
        self.limit = limit


def climbmix_sources(num_shards: int) -> list[Source]:
    """The shards in order, validation and test last, downloading what is missing.

    num_shards < 0: all.
    """
    count = min(num_shards, TEST_SHARD) if num_shards >= 0 else TEST_SHARD
    splits = dict.fromkeys(range(count), "train")
    splits[VAL_SHARD] = "val"
    splits[TEST_SHARD] = "test"
    directory = cache_dir() / "shards"
    directory.mkdir(exist_ok=True)
    sources = []
    for number, split in splits.items():
        name = f"shard_{number:05d}.parquet"
        sources.append(Source(name, directory / name, split))
    missing = [source.path for source in sources if not source.path.exists()]
    in_parallel(download, missing, PARALLEL_DOWNLOADS, "downloaded")
    return sources


def download(final: Path, progress: Progress):
    """One shard: resumed, retried, checked, and only then renamed into place.

    Raises Fail, naming the file, after the last try; what has arrived stays in NAME.part for the
    next run.
    """
    part = final.with_name(final.name + ".part")
    part.touch()
    tries = Tries(final.name, progress)
    while True:
        tries.begin()
        try:
            digest = _fetch(final.name, part, progress)
            _check_shard(part, digest)
            break
        except Retry as failure:
            if failure.discard:
                part.write_bytes(b"")
            pause = tries.pause_after(failure, part.stat().st_size)
            time.sleep(pause)
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, final)


class Tries:
    """How often one file is asked for, how long in all, and what is said of it."""

    OTHER_WAYS = (
        "look at the network and at HF_ENDPOINT, or take `uv run prepare.py --demo`, "
        "which needs neither"
    )

    def __init__(self, name: str, progress: Progress):
        self.name = name
        self.progress = progress
        self.began = _now()
        self.last_began = self.began
        self.in_vain = 0  # in a row without one new byte
        self.wrong = 0
        self.most = 0  # bytes that have been there at once

    def begin(self):
        self.last_began = _now()

    def pause_after(self, failure: Retry, arrived: int) -> float:
        """Seconds until the next try; arrived: bytes that are there. Raises Fail after the last."""
        self.wrong += failure.wrong
        if self.wrong >= MAX_WRONG:
            raise Fail(f"{self.name}: {failure}, {self.wrong} times: {self.OTHER_WAYS}")
        # A line that drops but moves on is not a failure.
        self.in_vain = 0 if arrived > self.most else self.in_vain + 1
        self.most = max(self.most, arrived)
        pause = failure.wait
        if pause is None:
            pause = min(BACKOFF * 2**self.in_vain, MAX_WAIT) * random.uniform(0.5, 1)
        if failure.limit and not self.progress.bytes:  # no byte of any file ever came
            now = _now()
            next_ends = now + pause + (now - self.last_began)  # if it takes as long again
            if next_ends - self.began > failure.limit:
                raise Fail(f"{self.name}: {failure}: {self.OTHER_WAYS}")
            self.progress.say_once(f"{failure}; trying again, {failure.limit:.0f} s in all\n")
            return pause
        if self.in_vain >= MAX_TRIES:
            raise Fail(
                f"{self.name}: {failure}; what has arrived is kept: run the same command again"
            )
        self.progress.say(f"{self.name}: {failure}; trying again in {pause:.0f} s\n")
        return pause


def _check_shard(part: Path, digest: str | None):
    with open(part, "rb") as file:
        begin = file.read(100).lstrip().lower()
    if begin.startswith((b"<!doctype", b"<html")):
        raise Retry("the server sent HTML (a login page?), no parquet file", wrong=True)
    if digest and sha256_of(part) != digest:
        raise Retry("its sha256 is wrong", wrong=True)
    try:
        next(_parquet_documents(part), None)
    except Fail as problem:
        raise Retry(str(problem.code).removeprefix("FAIL: "), wrong=True) from None


def _fetch(name: str, part: Path, progress: Progress) -> str | None:
    """Appends to `part` what it lacks; returns the sha256 that the server gave, if it did."""
    import requests

    url = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/") + HUB_PATH + name
    have = part.stat().st_size
    timeout = (CONNECT_TIMEOUT, READ_TIMEOUT)
    try:
        host = urlsplit(url).netloc.rpartition("@")[2]
        headers = _request_headers(have)
        with requests.get(url, headers=headers, stream=True, timeout=timeout) as reply:
            if not _is_complete(reply, have):
                _check_reply(reply, name, host, have)
                _check_space(reply, part, have, progress)
                _save(reply, part, have, progress)
            return _linked_sha256(reply)
    except ValueError as error:
        # An error's text may hold the token or a signed address: only its kind is shown.
        kind = type(error).__name__
        raise Fail(f"{name}: HF_ENDPOINT or HF_TOKEN cannot be used ({kind})") from None
    except requests.RequestException as error:
        raise _as_retry(error, host) from None


def _as_retry(error, host: str) -> Retry:
    """What a request that failed says to a person; its own text may hold the token."""
    import requests

    if error.request is not None:  # which a redirect may have led elsewhere
        host = urlsplit(error.request.url).hostname
    if isinstance(error, requests.exceptions.ProxyError):
        host = f"the proxy before {host}"
    cause = error
    while cause is not None:
        if isinstance(cause, socket.gaierror):
            return Retry(f"unknown host: {host}", limit=UNREACHABLE_LIMIT)
        if isinstance(cause, ConnectionRefusedError):
            return Retry(f"{host} refused the connection", limit=UNREACHABLE_LIMIT)
        if isinstance(cause, OSError) and cause.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
            return Retry(f"{host} cannot be reached", limit=UNREACHABLE_LIMIT)
        if isinstance(cause, (TimeoutError, requests.Timeout)):
            return Retry(f"{host} is silent", limit=SILENT_LIMIT)
        cause = cause.__cause__ or cause.__context__
    return Retry(f"{type(error).__name__} at {host}")


def _request_headers(have: int) -> dict[str, str]:
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    token = os.environ.get("HF_TOKEN", "").strip()
    if token:  # requests drops this header where a redirect leaves the host
        headers["Authorization"] = f"Bearer {token}"
    return headers


def _linked_sha256(reply) -> str | None:
    """The sha256 of the file from X-Linked-ETag, which stands in the redirect or the reply."""
    for answer in [*reply.history, reply]:
        etag = answer.headers.get("X-Linked-ETag", "").removeprefix("W/").strip('"')
        if re.fullmatch("[0-9a-f]{64}", etag):
            return etag
    return None


def _content_range(reply) -> tuple[str | None, str | None]:
    """(first byte, size of the file) of Content-Range, as they are written there."""
    header = reply.headers.get("Content-Range", "")
    place = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", header)
    return place.groups() if place else (None, None)


def _is_complete(reply, have: int) -> bool:
    """The server has no byte more than `have`: only the rename was missing."""
    _, size = _content_range(reply)
    return reply.status_code == 416 and size == str(have)


def _check_reply(reply, name: str, host: str, have: int):
    """Raises Retry or Fail unless the reply's body is the file, or its part from byte `have` on."""
    status = reply.status_code
    first, _ = _content_range(reply)
    if status == 416 or (status == 206 and first != str(have)):
        raise Retry(f"{host} does not go on at byte {have:,}", discard=True)
    if status in (408, 429) or status >= 500:
        asked = reply.headers.get("Retry-After", "")
        wait = min(int(asked), MAX_RETRY_AFTER) if asked.isdigit() else None
        raise Retry(f"{host} answered {status}", wait)
    if status in (401, 403):
        raise Fail(f"{name}: {host} answered {status} (check HF_TOKEN)")
    if status not in (200, 206):
        raise Fail(f"{name}: {host} answered {status}")


def _check_space(reply, part: Path, have: int, progress: Progress):
    """Before the first byte: is there room for all that is missing? Shards are alike in size."""
    length = reply.headers.get("Content-Length", "")
    if progress.bytes or not length.isdigit():
        return
    size = int(length)
    if reply.status_code == 206:
        size += have
    begun = 0
    for path in part.parent.glob("*.part"):
        with contextlib.suppress(FileNotFoundError):  # another thread has just finished it
            begun += path.stat().st_size
    needed = progress.files * (size + SHARD_TOKEN_BYTES) - begun
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise Fail(
            f"{progress.files} shards of {size / 1e6:,.0f} MB and their tokens need "
            f"{needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free in {part.parent}: free "
            "some space, lower --num-shards, or set AUTORESEARCH_CACHE to another disk"
        )


def _save(reply, part: Path, have: int, progress: Progress):
    """Writes the body behind the `have` bytes of `part`, or over them if it is the whole file."""
    goes_on = reply.status_code == 206
    with open(part, "ab" if goes_on else "wb") as file:
        # Small blocks: one that is not full is lost when the line drops.
        for block in reply.iter_content(1 << 14):
            file.write(block)
            progress.add(len(block))
    length = reply.headers.get("Content-Length", "")
    if length.isdigit():
        total = int(length)
        if goes_on:
            total += have
        size = part.stat().st_size
        if size != total:
            raise Retry(f"{size:,} of {total:,} bytes arrived", discard=size > total)


# ---------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """Byte-pair encoding, stored as data: nothing in its file can run.

    The file has a line `base64 rank` for each token (tiktoken's format).
    token_bytes: int64 (vocabulary size,), the bytes a token stands for; 0 for the special ones.
    """

    def __init__(self, ranks: list[bytes]):
        import tiktoken

        self.ranks = ranks
        specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding(
            "autoresearch",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
            special_tokens=specials,
        )
        lengths = [len(token) for token in ranks] + [0] * len(specials)
        self.token_bytes = np.array(lengths, dtype=np.int64)

    @classmethod
    def train(cls, texts, vocab_size: int) -> Tokenizer:
        """Trains on an iterable of strings.

        vocab_size counts the special tokens; very little text gives fewer.
        """
        import rustbpe

        trainer = rustbpe.Tokenizer()
        merges = vocab_size - len(SPECIAL_TOKENS)
        trainer.train_from_iterator(texts, merges, pattern=SPLIT_PATTERN)
        by_rank = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        return cls([bytes(token) for token, _ in by_rank])

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(self.ranks)]
        return b"".join(lines)

    @classmethod
    def from_directory(cls, directory: str | Path | None = None) -> Tokenizer:
        """The prepared tokenizer, checked against the manifest, or the one in `directory`.

        Raises Fail on damage.
        """
        path = Path(directory or set_dir()) / "tokenizer.tiktoken"
        try:
            raw = path.read_bytes()
            if directory is None:
                if hashlib.sha256(raw).hexdigest() != manifest()["tokenizer_sha256"]:
                    raise ValueError("not the one that was prepared")
            return cls(_parse_ranks(raw))
        except (OSError, ValueError) as error:
            raise Fail(
                f"{path} is damaged or missing ({error}): "
                "run the same `uv run prepare.py ...` again, it repairs that"
            ) from None

    def encode(self, text: str | list[str], prepend: int | str | None = None) -> list:
        """Ids of a text, or a list of them for a list of texts.

        prepend: an id or a special token's name to stand in front. Special tokens spelled in a text
        are plain text there. A lone surrogate is encoded as U+FFFD.
        """
        if not isinstance(text, str):
            return [self.encode(one, prepend) for one in text]
        ids = self.encode_array(well_formed(text)).tolist()
        if prepend is None:
            return ids
        if isinstance(prepend, str):
            prepend = self.encoding.encode_single_token(prepend)
        return [prepend, *ids]

    def encode_array(self, text: str) -> np.ndarray:
        starts = range(0, len(text), ENCODE_CHARS) or [0]
        pieces = [text[start : start + ENCODE_CHARS] for start in starts]
        encode = self.encoding.encode_to_numpy
        return np.concatenate([encode(piece, disallowed_special=()) for piece in pieces])

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)

    def get_vocab_size(self) -> int:
        return len(self.token_bytes)

    def get_bos_token_id(self) -> int:
        return len(self.ranks)


def _parse_ranks(raw: bytes) -> list[bytes]:
    """The tokens of a tokenizer's file, by rank. Raises ValueError on damage."""
    lines = [line.split(b" ") for line in raw.splitlines()]
    ranks = [base64.b64decode(token, validate=True) for token, _ in lines]
    if [int(rank) for _, rank in lines] != list(range(len(ranks))):
        raise ValueError("its ranks are not in order")
    if len(set(ranks)) < len(ranks) or b"" in ranks:
        raise ValueError("a token is doubled or empty")
    if not set(ranks) >= {bytes([byte]) for byte in range(256)}:
        raise ValueError("single bytes are missing")
    return ranks


def train_tokenizer(directory: Path, sources: list[Source], vocab_size: int) -> Tokenizer:
    """The set's Tokenizer: the finished one of an earlier try, or trained on training text only."""
    with contextlib.suppress(Fail):
        return Tokenizer.from_directory(directory)
    began = _now()
    texts = _tokenizer_text(sources)
    with ThreadPoolExecutor(1) as pool:  # so that Ctrl-C is heard meanwhile
        tokenizer = pool.submit(Tokenizer.train, texts, vocab_size).result()
    write_atomically(directory / "tokenizer.tiktoken", tokenizer.to_bytes())
    size = tokenizer.get_vocab_size()
    print(f"trained a tokenizer of {size} tokens in {_now() - began:.1f} s", file=sys.stderr)
    return tokenizer


def _tokenizer_text(sources: list[Source]):
    """Yields the first TOKENIZER_CHARS of training text, each document cut."""
    left = TOKENIZER_CHARS
    for source in sources:
        if source.split not in (None, "train"):
            continue
        for split, _, text in documents(source):
            if split != "train":
                continue
            # Of a cut source everything: there a document is no measure.
            learned = len(text) if source.is_cut else TOKENIZER_DOC_CHARS
            for start in range(0, min(len(text), learned), TOKENIZER_DOC_CHARS):
                if left <= 0:
                    return
                part = text[start : start + min(TOKENIZER_DOC_CHARS, left)]
                left -= len(part)
                yield part


# -------------------------------------------------------------------------------------- token cache


def passages(tokenizer: Tokenizer, text: str, size: int) -> list[np.ndarray]:
    """A text's tokens, cut into passages of `size` or a little more, so that packed rows are full.

    Cut in tokens, so exactly, and encoded only once. A passage ends with a blank line where one
    comes within PASSAGE_SLACK, else with a line, else anywhere.
    """
    ids = tokenizer.encode_array(text)
    raw = text.encode()
    ends = np.cumsum(tokenizer.token_bytes[ids])  # (tokens,) bytes up to the end of each
    blank_lines = np.array([match.end() for match in BLANK_LINE.finditer(raw)], dtype=np.int64)
    lines = np.flatnonzero(np.frombuffer(raw, dtype=np.uint8) == ord("\n")) + 1
    places = []  # for each kind of end: how many tokens stand before, rising
    for found in (blank_lines, lines):
        last = ends.searchsorted(found)
        places.append((last + 1)[ends[last] == found])  # most ends are a token's end
    slack = int(PASSAGE_SLACK * size)
    cut = []
    start = 0
    while len(ids) - start > size + slack:
        end = least = start + size
        for candidates in places:
            i = candidates.searchsorted(least)
            if i < len(candidates) and candidates[i] <= least + slack:
                end = int(candidates[i])
                break
        cut.append(ids[start:end])
        start = end
    cut.append(ids[start:])
    return cut


def _encoded(source: Source, tokenizer: Tokenizer, row_length: int, pool, progress: Progress):
    """Yields (split, row group, tokens) of a source. pool: threads for the pieces of a bundle."""
    if not source.is_cut:
        for split, group, text in documents(source):
            yield split, group, tokenizer.encode_array(text)
            progress.add(len(text))
        return

    def of_piece(piece: Piece):
        text = piece.text()
        return source.split, len(text), passages(tokenizer, text, row_length - 1)

    def of_documents():
        for split, _, text in documents(source):
            yield split, len(text), passages(tokenizer, text, row_length - 1)

    window = []  # mixed by their sha256, as neighbours are alike
    chars = 0
    for split, length, cut in (
        pool.map(of_piece, source.pieces) if source.pieces else of_documents()
    ):
        window += [(hashlib.sha256(ids.tobytes()).digest(), split, ids) for ids in cut]
        chars += length
        progress.add(length)
        if chars >= BUNDLE_BYTES:  # of a file that may be huge
            yield from _mixed(window)
            window = []
            chars = 0
    yield from _mixed(window)


def _mixed(window: list):
    for _, split, ids in sorted(window, key=lambda entry: entry[0]):
        yield split, 0, ids


def encode_source(encoded, tokenizer: Tokenizer, path: Path) -> dict:
    """Writes a source's tokens and then, as the sign that they are whole, its manifest entry.

    encoded: its (split, row group, tokens).
    PATH.bin: uint16, all documents one after another, each with BOS in front.
    PATH.idx: int32 (documents, 3): place of its split in SPLITS, its row group, its tokens.
    PATH.json: the entry that is returned, and which tokenizer made it.
    """
    bos = [tokenizer.get_bos_token_id()]
    index = []
    size = dict.fromkeys(SPLITS, 0)
    with open(path.with_suffix(".bin"), "wb") as file:
        for split, group, ids in encoded:
            file.write(np.concatenate([bos, ids]).astype(np.uint16).data)
            index.append((SPLITS.index(split), group, len(ids) + 1))
            size[split] += int(tokenizer.token_bytes[ids].sum())
        file.flush()
        os.fsync(file.fileno())
    index = np.array(index, dtype=np.int32).reshape(-1, 3)
    write_atomically(path.with_suffix(".idx"), index.tobytes())
    entry = {
        "name": path.name,
        "sha256": sha256_of(path.with_suffix(".bin")),
        "index_sha256": sha256_of(path.with_suffix(".idx")),
        "documents": {},
        "bytes": size,  # of text
        "tokens": {},
    }
    for place, split in enumerate(SPLITS):
        lengths = index[index[:, 0] == place, 2]
        entry["documents"][split] = len(lengths)
        entry["tokens"][split] = int(lengths.sum())
    write_atomically(path.with_suffix(".json"), signed({"tokenizer": tokenizer.sha256, **entry}))
    return entry


def _finished_entry(tokenizer: Tokenizer, path: Path) -> dict | None:
    """What encode_source returned for `path` in an earlier try, if its files are what it wrote."""
    try:
        entry = parse_signed(path.with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return None
    if entry.pop("tokenizer") != tokenizer.sha256:
        return None
    try:
        open_tokens(path.parent, entry, verify=True)
    except Fail:
        return None
    return entry


def encode_sources(
    directory: Path, sources: list[Source], tokenizer: Tokenizer, row_length: int
) -> list[dict]:
    """Encodes every source that an earlier try has not; returns the manifest's `tokens`."""
    paths = {source: directory / f"{number:05d}" for number, source in enumerate(sources)}
    workers = os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers)

    def finished(source: Source):
        return source, _finished_entry(tokenizer, paths[source])

    def encode(source: Source, progress: Progress) -> dict:
        encoded = _encoded(source, tokenizer, row_length, pool, progress)
        return encode_source(encoded, tokenizer, paths[source])

    entries = dict(pool.map(finished, sources))
    missing = [source for source in sources if entries[source] is None]
    entries.update(zip(missing, in_parallel(encode, missing, workers, "encoded")))
    return [entries[source] for source in sources]


def open_tokens(directory: Path, entry: dict, verify: bool) -> tuple[np.ndarray, np.ndarray]:
    """(uint16 tokens as a memory map, int64 index) of a manifest entry; see encode_source.

    The index and the size are always checked, the tokens' sha256 with `verify`: for the scored
    splits. Raises Fail on damage.
    """
    path = directory / (entry["name"] + ".bin")
    try:
        raw = path.with_suffix(".idx").read_bytes()
        if hashlib.sha256(raw).hexdigest() != entry["index_sha256"]:
            raise ValueError("not the index that was written")
        if path.stat().st_size != 2 * sum(entry["tokens"].values()):
            raise ValueError("not the size that was written")
        tokens = np.empty(0, dtype=np.uint16)
        if path.stat().st_size:  # as a plain view: slicing np.memmap itself is slow
            tokens = np.asarray(np.memmap(path, dtype=np.uint16, mode="r"))
        if verify and hashlib.sha256(tokens).hexdigest() != entry["sha256"]:
            raise ValueError("not the tokens that were written")
    except (OSError, ValueError) as error:
        raise Fail(
            f"{path} is damaged or missing ({error}): "
            "run the same `uv run prepare.py ...` again, it repairs that"
        ) from None
    return tokens, np.frombuffer(raw, dtype=np.int32).reshape(-1, 3).astype(np.int64)


def check_prepared(split: str):
    """What a run would notice only after minutes: is everything there to train on and to score?

    Raises Fail where a file is damaged or missing, or the split is too small for a row.
    """
    prepared = manifest()
    if not prepared["eval_rows"][split]:
        raise Fail(
            f"the {split} split is smaller than one row of {prepared['seq_len'] + 1} tokens: it "
            "cannot be scored. Add text and prepare again"
        )
    for entry in prepared["tokens"]:
        open_tokens(set_dir(), entry, verify=entry["tokens"][split] > 0)


# ------------------------------------------------------------------------------- prepare(): the map


def prepare(corpus: str, data: Path | None, num_shards: int, settings: dict, force: bool):
    """Fills the cache: sources, tokenizer, tokens, and last the manifest.

    The same again repairs what is damaged, or does nothing. A new set is made beside the one that
    is there, which stays until the new one is whole. Finished pieces of an earlier try are kept.
    """
    began = _now()
    cache = cache_dir()
    request = {"corpus": corpus, **settings}
    if corpus == "climbmix":
        request["num_shards"] = num_shards
    old = _prepared_before(request, force)
    for directory in cache.iterdir():
        if force and re.fullmatch("[0-9a-f]{12}", directory.name):
            _require_unused(directory)

    # 1. The files of text, downloaded where they are not here yet. With them the set has its key.
    row_length = settings["seq_len"] + 1
    sources, how_split = find_sources(corpus, data, num_shards, row_length)
    files = [source.describe() for source in sources]
    if old and corpus == "climbmix" and _remove_damaged_shards(sources, files, old):
        sources = climbmix_sources(num_shards)
        files = [source.describe() for source in sources]
    described = {"format": FORMAT, "corpus": corpus, "request": request, "files": files}
    key = hashlib.sha256(canonical(described)).hexdigest()[:12]
    if old and old["key"] != key:
        raise _another_set("of other files, or of these before they changed")
    if old and not _remove_damaged(cache / key, old):
        print(f"already prepared in {cache}: {corpus}, fingerprint {fingerprint()}; nothing to do")
        return
    directory = cache / (key if old else f"{key}.new")
    if force:
        shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(exist_ok=True)

    # 2. The tokenizer, from training text only.
    tokenizer = train_tokenizer(directory, sources, settings["vocab_size"])

    # 3. Every document as tokens.
    entries = encode_sources(directory, sources, tokenizer, row_length)

    # 4. The rows to score, counted by the packer of part II; and last the manifest.
    eval_rows = count_rows(directory, entries, row_length, settings["eval_tokens"])
    print(how_split)
    print_table(sources, entries, eval_rows, row_length)
    require_rows(entries, eval_rows, row_length, sources[0].splits if sources else None)
    described.update(settings)
    described.update(
        key=key,
        vocab_size=tokenizer.get_vocab_size(),
        eval_rows=eval_rows,
        tokens=entries,
        tokenizer_sha256=tokenizer.sha256,
    )
    _put_in_place(directory, described)
    print(
        f"prepared {corpus} in {cache} in {_now() - began:.1f} s: "
        f"{_total(entries, 'tokens', 'train'):,} training tokens, {eval_rows['val']} rows of "
        f"{settings['seq_len']} to score, fingerprint {fingerprint()}\nnext: uv run train.py"
    )


def _prepared_before(request: dict, force: bool) -> dict | None:
    """The manifest of the set that is there, if it may be the one asked for; None without one."""
    path = cache_dir() / "manifest.json"
    if force or not path.exists():
        return None
    old = load_manifest(path)
    was = old["request"]
    differ = [name for name in {**was, **request} if was.get(name) != request.get(name)]
    if differ:
        now = [f"{name} {was.get(name)}, not {request.get(name)}" for name in differ]
        raise _another_set("; ".join(now))
    return old


def _require_unused(directory: Path):
    held = shared_lock(directory, exclusive=True)
    if held is None:
        raise Fail(
            f"a run is using the set in {cache_dir()}: wait until it has ended, end it, or set "
            "AUTORESEARCH_CACHE to another directory"
        )
    os.close(held)


def _another_set(difference: str) -> Fail:
    return Fail(
        f"{cache_dir()} holds another prepared set ({difference}): set AUTORESEARCH_CACHE to "
        "another directory to keep both, or replace it with --force"
    )


def find_sources(
    corpus: str, data: Path | None, num_shards: int, row_length: int
) -> tuple[list[Source], str]:
    """(the sources, how they are split in words)."""
    if corpus == "climbmix":
        return climbmix_sources(num_shards), "split by shard: the last two are val and test"
    if corpus == "demo":
        files, named = demo_files(), {}
    else:
        files = text_files(data)
        named = {name: named_split(name) for name in files if named_split(name)}
        if {"val", "test"} <= set(named.values()):
            named = {name: named.get(name, "train") for name in files}
    sources, splits = text_sources(files, named, row_length)
    if corpus == "demo":
        return sources, str(splits)
    return sources, f"{_left_out(data)}{_held_out(sources, files, named)}{splits}"


def _held_out(sources: list[Source], files: dict[str, Path], named: dict[str, str]) -> str:
    """A line for each split that files are named for, or that plain files were drawn for."""
    lines = ""
    for split in ("val", "test"):
        pieces = [piece for source in sources if source.split == split for piece in source.pieces]
        if split in named.values():
            names = [name for name in named if named[name] == split]
            lines += f"{split} is what is named so: {some(names)}\n"
        elif pieces and sources[0].splits.stretches is None:
            paths = {piece.path for piece in pieces}
            lines += f"{split} is {some(name for name in files if files[name] in paths)}\n"
    return lines


def _remove_damaged_shards(sources: list[Source], files: list[dict], old: dict) -> bool:
    """Removes the shards that are not what the manifest `old` says. Are there any?"""
    damaged = []
    for source, file, was in zip(sources, files, old["files"]):
        if file["sha256"] != was["sha256"]:
            damaged.append(source.path)
    for path in damaged:
        print(f"{path} is damaged: downloading it again", file=sys.stderr)
        path.unlink()
    return bool(damaged)


def _remove_damaged(directory: Path, old: dict) -> bool:
    """Removes the files that are not what the manifest `old` says. Are there any?"""
    directory.mkdir(exist_ok=True)
    damaged = []
    path = directory / "tokenizer.tiktoken"
    if not path.exists() or sha256_of(path) != old["tokenizer_sha256"]:
        damaged.append(path)
    for entry in old["tokens"]:
        try:
            open_tokens(directory, entry, verify=True)
        except Fail:
            damaged.append(directory / f"{entry['name']}.json")  # without it the rest is not there
    for path in damaged:
        print(f"{path.with_suffix('')} is damaged or missing: making it again", file=sys.stderr)
        path.unlink(missing_ok=True)
    return bool(damaged)


def _put_in_place(directory: Path, described: dict):
    """The finished set `directory` under its own name, the manifest, and no other set any more."""
    cache = cache_dir()
    final = cache / described["key"]
    if directory != final:
        if final.exists():  # the same set, made again by force
            os.rename(final, cache / f"{described['key']}.old{os.getpid()}")
        os.rename(directory, final)
    write_atomically(cache / "manifest.json", signed(described))
    read_manifest.cache_clear()
    for entry in cache.iterdir():
        if re.fullmatch(r"[0-9a-f]{12}(\.new|\.old\d+)?", entry.name) and entry != final:
            shutil.rmtree(entry)


def count_rows(directory: Path, entries: list[dict], row_length: int, eval_tokens: int) -> dict:
    """{split: the rows that its score is made of}."""
    wanted = max(1, eval_tokens // (row_length - 1))
    eval_rows = {}
    for split in ("val", "test"):
        packer = Packer(directory, entries, split, row_length, repeat=False)
        eval_rows[split] = packer.fill(np.empty((wanted, row_length), dtype=np.uint16))
    return eval_rows


def _total(entries: list[dict], what: str, split: str) -> int:
    return sum(entry[what][split] for entry in entries)


def print_table(sources: list[Source], entries: list[dict], eval_rows: dict, row_length: int):
    """What each split holds; the rows of val and test are those of a score."""
    print(f"{'split':5} {'files':>6} {'documents':>11} {'MB':>9} {'tokens':>15} {'rows':>10}")
    for split in SPLITS:
        files = set()
        for source, entry in zip(sources, entries):
            if entry["tokens"][split]:
                files |= {source.path} if source.path else {piece.path for piece in source.pieces}
        tokens = _total(entries, "tokens", split)
        rows = eval_rows.get(split, tokens // row_length)
        print(
            f"{split:5} {len(files):6,} {_total(entries, 'documents', split):11,} "
            f"{_total(entries, 'bytes', split) / 1e6:9,.1f} {tokens:15,} {rows:10,}"
        )


def require_rows(entries: list[dict], eval_rows: dict, row_length: int, splits: Splits | None):
    """Raises Fail where a split is too small to train on or to score; for test only a line."""
    rows = {"train": _total(entries, "tokens", "train"), **eval_rows}
    for split in SPLITS:
        if rows[split]:
            continue
        tokens = _total(entries, "tokens", split)
        message = (
            f"the {split} split has {tokens:,} tokens and one row needs {row_length:,}: "
            f"{row_length - tokens:,} are missing"
        )
        if split == "test":
            print(f"{message}: AUTORESEARCH_SPLIT=test, for the end, will have no score")
        elif splits and split != "train" and split not in splits.wanted:
            raise Fail(f"{message}. Add text to what is named {split}, or lower --seq-len")
        else:
            size = sum(splits.documents.values()) if splits else 0
            raise Fail(f"{message}. {_enough_text(size, row_length)}")
    if eval_rows["val"] * row_length < FEW_TOKENS:
        print("few rows to score: only large differences between scores will mean something")


def _enough_text(size: int, row_length: int) -> str:
    """What to do about too little text (bytes): how much is enough, or for which rows this is."""

    def enough(row_length: int) -> float:
        row = GAP_BYTES * row_length
        gaps = 2 * (row + CUT_BYTES)
        return max(row / HELD_OUT_SHARE, (row + gaps) / (1 - 2 * HELD_OUT_SHARE))

    if enough(row_length) <= size:  # and yet it was not: it is hardly text
        return "Add other text, or lower --seq-len"
    advice = f"Add text until there are {enough(row_length) / 1e3:,.0f} kB"
    lengths = [2**power for power in range(4, 20) if enough(2**power + 1) <= size]
    return f"{advice}, or prepare with --seq-len {lengths[-1]}" if lengths else advice


# ================================================================================= II. in every run

# ------------------------------------------------------------------------------------------- packer


class Packer:
    """Best-fit packing of documents into rows. It is part of the metric, so the rule is exact.

    Whole batches of documents are added until the pool holds POOL_DOCS. Then the longest document
    that fits the space left goes in, the earliest added on a tie; if none fits, the shortest
    (earliest on a tie) is cut to fill the row, its rest dropped.
    """

    def __init__(self, directory: Path, entries, split: str, row_length: int, repeat: bool):
        self.row_length = row_length
        self.epoch = 1
        self.added = 0
        # Sorted (length, -number added, tokens of its source, place of its first): each choice is
        # a bisection, and of equal lengths the earliest stands last.
        self.pool = []
        holding = [entry for entry in entries if entry["tokens"][split]]
        self.batches = self._batches(directory, holding, split, repeat)

    def _batches(self, directory: Path, entries, split: str, repeat: bool):
        """Yields (epoch, tokens, firsts, lengths) of up to BATCH_DOCS documents of a row group."""
        epochs = itertools.count(1) if repeat and entries else [1]
        for epoch in epochs:
            for entry in entries:
                tokens, index = open_tokens(directory, entry, verify=split != "train")
                ends = np.cumsum(index[:, 2])
                of_split = index[:, 0] == SPLITS.index(split)
                groups, lengths = index[of_split, 1], index[of_split, 2]
                firsts = ends[of_split] - lengths
                group_starts = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(groups)]
                for start, end in itertools.pairwise(group_starts):
                    for i in range(start, end, BATCH_DOCS):
                        batch = slice(i, min(i + BATCH_DOCS, end))
                        yield epoch, tokens, firsts[batch].tolist(), lengths[batch].tolist()

    def _fill_pool(self):
        while len(self.pool) < POOL_DOCS:
            batch = next(self.batches, None)
            if batch is None:
                return
            self.epoch, tokens, firsts, lengths = batch
            for first, length in zip(firsts, lengths):
                self.added += 1
                self.pool.append((length, -self.added, tokens, first))
            self.pool.sort()

    def fill(self, rows: np.ndarray) -> int:
        """Writes rows, uint16 (n, row_length).

        Returns how many: fewer than n only at the end of a single pass.
        """
        pool = self.pool
        for number, row in enumerate(rows):
            filled = 0
            while filled < self.row_length:
                if len(pool) < POOL_DOCS:
                    self._fill_pool()
                    if not pool:
                        return number
                space = self.row_length - filled
                shortest = pool[0][0]
                longest = max(space, shortest)  # that may be taken: if none fits, the shortest is
                place = bisect_left(pool, (longest + 1,)) - 1  # the last of that length or less
                length, _, tokens, first = pool.pop(place)
                length = min(length, space)
                row[filled : filled + length] = tokens[first : first + length]
                filled += length
        return len(rows)


def pack_batches(packer: Packer, B: int, T: int, vocab_size: int, pinned: bool):
    """Yields (int64 (2, rows, T): inputs and targets, epoch), fresh memory each time.

    rows is B, or fewer in the last batch of a single pass.
    """
    import torch

    rows = np.empty((B, T + 1), dtype=np.uint16)
    while count := packer.fill(rows):
        if rows[:count].max() >= vocab_size:
            raise Fail(
                "the token cache holds ids beyond the vocabulary: "
                "run the same `uv run prepare.py ...` with --force"
            )
        batch = torch.empty((2, count, T), dtype=torch.int64, pin_memory=pinned)
        view = batch.numpy()
        view[0] = rows[:count, :-1]
        view[1] = rows[:count, 1:]
        yield batch, packer.epoch


# --------------------------------------------------------------------------------------- dataloader


def make_dataloader(tokenizer: Tokenizer, B: int, T: int, split: str, device=None):
    """Yields (inputs, targets, epoch) of the train split for ever.

    Both are int64 (B, T) on `device` (default: training_device()); targets are the inputs shifted
    by one; every row starts with BOS. The first batch starts the clock. The other splits are for
    evaluate_bpb alone: Fail, as on a damaged cache.
    """
    if split != "train":
        fail(f"make_dataloader gives out only `train`, not `{split}`: that is for evaluate_bpb")
    prepared = manifest()
    vocab_size = tokenizer.get_vocab_size()
    if vocab_size != prepared["vocab_size"]:
        expected = prepared["vocab_size"]
        raise ValueError(f"a vocabulary of {vocab_size}: the prepared set has {expected}")
    device = device or training_device()
    packer = Packer(set_dir(), prepared["tokens"], "train", T + 1, repeat=True)
    batches = pack_batches(packer, B, T, vocab_size, pinned=device.type == "cuda")
    clock.expect(device)
    clock.describe(device_batch=B)
    return _on_the_clock(prefetch(batches), device)


def prefetch(batches):
    """The batches, each made by a thread while the one before is used, the first from now on.

    What the thread raises is raised here.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="packer")  # ends when nobody holds it
    coming = thread.submit(next, batches, None)

    def one_ahead(coming):
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch

    return one_ahead(coming)


def _on_the_clock(batches, device):
    for batch, epoch in batches:
        clock.hand_out(batch[0].numel())
        # From pinned memory the copy is asynchronous, and torch's host allocator gives that memory
        # out again only when the copies that read it are done: nothing is overwritten while
        # anything can still read it.
        inputs, targets = batch.to(device, non_blocking=True)
        yield inputs, targets, epoch


# Until train.py and night.py ask for the new names: delete then.
Stop = Fail


def describe_run(attention: str, compiled: bool, dtype: str, fell_back: list[str]):
    clock.describe(attention=attention, compiled=compiled, dtype=dtype, fell_back=fell_back)


# ---------------------------------------------------------------------------------- evaluation


def evaluate_bpb(model, tokenizer: Tokenizer, batch_size: int) -> float:
    """Bits per byte of `model` on the scored split. Ends the clock and writes the ledger.

    model(inputs), int64 (B, T), returns logits (B, T, vocabulary size); B is batch_size, but at
    most half the rows. It never sees the targets. The byte counts are the prepared tokenizer's,
    whatever the one handed over says. The rows are the first evaluation tokens / T of the split's
    packing, each once, so the score does not depend on B.

    Raises Fail, with the reason in the ledger, for a run over its budget, another vocabulary,
    logits that are not a plain finite tensor of that shape, a model that learns, is random or
    keeps state, and one that sees the future (LeakCheck).
    """
    clock.ask_score(next(model.parameters()).device)
    began = _now()
    own, split = Tokenizer.from_directory(), split_name()
    if tokenizer.get_vocab_size() != own.get_vocab_size():
        fail(
            f"the tokenizer has a vocabulary of {tokenizer.get_vocab_size()} and the prepared set "
            f"of {own.get_vocab_size()}: no score"
        )
    examined = EvalModel(model, own.get_vocab_size())
    score = bits_per_byte(examined, _scored_rows(split), own.token_bytes, batch_size)
    seconds = round(_now() - began, 1)
    clock.end(score=score, scoring_seconds=seconds, scoring_passes=examined.passes)
    return score


def _scored_rows(split: str) -> np.ndarray:
    """The rows that a score is taken on, uint16 (n, T + 1). 42 MB for climbmix."""
    prepared = manifest()
    T, count = prepared["seq_len"], prepared["eval_rows"][split]
    if not count:
        fail(f"the {split} split is too small for one row of {T + 1} tokens")
    rows = np.empty((count, T + 1), dtype=np.uint16)
    packer = Packer(set_dir(), prepared["tokens"], split, T + 1, repeat=False)
    again = "run the same `uv run prepare.py ...` with --force"
    if packer.fill(rows) < count:
        raise Fail(f"the {split} split has fewer rows than its manifest says: {again}")
    if rows.max() >= prepared["vocab_size"]:
        raise Fail(f"the token cache holds ids beyond the vocabulary: {again}")
    return rows


def bits_per_byte(
    model: EvalModel, rows: np.ndarray, token_bytes: np.ndarray, batch_size: int
) -> float:
    """The metric: (nats that all targets cost the model) / (ln 2 x the bytes they stand for).

    rows: (n, T + 1) tokens; inputs are a row without its last token, targets without its first.
    token_bytes: (V,). Targets of 0 bytes, the special tokens, are in neither sum.
    Memory: the losses, 4 bytes a token (84 MB for climbmix), twice or so; logits of one batch.
    """
    check = LeakCheck(rows, token_bytes, batch_size)
    losses = []
    with model.eval_mode():
        for call, inputs, targets in check.batches():  # every row once, and a few that only check
            logits = model(inputs)
            losses.append(cross_entropy(logits, targets))
            if call in check.exact_calls:
                check.exact(model, inputs, logits)
    losses = np.concatenate([batch.cpu().numpy() for batch in losses])
    if not np.isfinite(losses).all():
        fail("the model's logits are not finite: no score")
    losses = check.judge(losses)  # (n, T) nats, those of `rows`

    target_bytes = token_bytes[rows[:, 1:]]  # (n, T)
    if not target_bytes.any():
        fail("no target has a byte: no score")
    nats = losses[target_bytes > 0].sum(dtype=np.float64)
    return float(nats / math.log(2) / target_bytes.sum())


def cross_entropy(logits, targets: np.ndarray):
    """Nats, float32 (B, T): logsumexp of the logits minus the target's; NaN if one is not finite.

    In pieces, so that memory stays small. The functions are those of torch's C library, which are
    read-only: what is assigned to torch.nn.functional, torch or torch.Tensor does not reach them.
    What is assigned to torch._C, or to names of this file, does.
    """
    import torch

    C = torch._C._VariableFunctions
    targets = on_device(targets, logits.device).flatten()
    flat = C.flatten(logits, 0, 1)
    at_a_time = 1 << 18 if logits.device.type == "cpu" else 1 << 25  # a CPU's cache; 128 MB
    piece = max(1, at_a_time // logits.shape[-1])
    losses = []
    for i in range(0, len(targets), piece):
        size = min(piece, len(targets) - i)
        logp = C.log_softmax(C.narrow(flat, 0, i, size), -1, dtype=torch.float32)
        nats = C.neg(C.gather(logp, 1, targets[i : i + size, None]))[:, 0]
        losses.append(C.add(nats, C.mul(C.sum(logp, -1), 0)))  # NaN where any is -inf
    return C.reshape(C.cat(losses), logits.shape[:2])


# ------------------------------------------------------------------------------------- command line


def lock(cache: Path):
    """Holds the cache for one prepare.py at a time, until the returned file is closed.

    Raises Fail, saying who holds it.
    """
    import fcntl

    cache.mkdir(parents=True, exist_ok=True)
    file = open(cache / "lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "?"
        raise Fail(
            f"another prepare.py (process {holder}) is working in {cache}: wait until it is done, "
            "or set AUTORESEARCH_CACHE to another directory"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="prepare.py", description="Prepares a corpus for train.py.", allow_abbrev=False
    )
    corpus = parser.add_mutually_exclusive_group()
    corpus.add_argument(
        "--demo",
        action="store_true",
        help="the source of installed packages: offline, no GPU needed",
    )
    corpus.add_argument(
        "--data",
        type=lambda path: Path(path).expanduser(),  # `--data=~/notes` is not the shell's to expand
        metavar="DIR",
        help="your own *.parquet (column text), *.jsonl (field text), *.txt, *.md below DIR, "
        "or one such file",
    )
    corpus.add_argument(
        "--num-shards",
        type=int,
        default=10,
        metavar="N",
        help="climbmix training shards (default 10; -1: all 6,541)",
    )
    for name, meaning in MEANING.items():
        usual, demo = PRESETS["climbmix"][name], PRESETS["demo"][name]
        default = f"{usual:,}" if usual == demo else f"{usual:,}, for the demo {demo:,}"
        parser.add_argument(
            _option(name), type=int, metavar="N", help=f"{meaning} (default {default})"
        )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace what the cache holds (downloads and the ledger are kept)",
    )
    return parser


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def main(argv: list[str] | None = None):
    args = _parser().parse_args(argv)
    corpus = "climbmix"
    if args.demo:
        corpus = "demo"
    elif args.data:
        corpus = "text"
    settings = dict(PRESETS[corpus])
    for name, (low, high) in LIMITS.items():
        given = getattr(args, name)
        if given is not None:
            settings[name] = given
        if not low <= settings[name] <= high:
            raise Fail(f"{_option(name)} {settings[name]}: it must be from {low} to {high}")
    if args.num_shards == 0 or args.num_shards < -1:
        raise Fail(f"--num-shards {args.num_shards}: it must be at least 1, or -1 for all")
    try:
        with lock(cache_dir()):
            prepare(corpus, args.data, args.num_shards, settings, args.force)
    except OSError as error:
        raise _disk_failure(error) from None


def _disk_failure(error: OSError) -> Fail:
    cache = cache_dir().absolute()
    where = Path(error.filename or cache).absolute()
    what = f"{where}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Fail(
            f"{what}; what was finished is kept. Free some space or set AUTORESEARCH_CACHE to "
            "another disk, then run the same command again"
        )
    if where.is_relative_to(cache) or cache.is_relative_to(where):
        return Fail(
            f"the cache {cache} cannot be used ({what}): set AUTORESEARCH_CACHE to a folder that "
            "you can write to"
        )
    return Fail(f"{what}. Make it readable, or take it away")


if __name__ == "__main__":
    try:
        main()
    except Fail as stop:  # at once: threads still at work write only what the next run can use
        print(stop, file=sys.stderr, flush=True)
        os._exit(1)
