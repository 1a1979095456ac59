"""
prepare.py: everything that stays fixed, so that two scores can be compared.
Nobody edits it during research.

    uv run prepare.py               climbmix, for a real GPU
    uv run prepare.py --data DIR    your own text
    uv run prepare.py --demo        offline, for any machine

Notable, in the order of the rooms:
- part I runs once. Downloads resume, retry and are checked; every finished piece is renamed into
  place, so killing it loses nothing; `prepare()` at its end is the map
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
import contextlib
import faulthandler
import functools
import hashlib
import itertools
import json
import math
import platform
import random
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import threading
import time
import uuid
import warnings
from bisect import bisect_left
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType, ModuleType
from urllib.parse import urlsplit

import numpy as np

# ========================================================================================== I. once

# ---------------------------------------------------------------------------------------- constants

FORMAT = 1  # of the cache; raised when its files, or the rules that made them, are no longer these
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
HELD_OUT_SHARE = 0.05  # of the documents for val, as many for test, where no file is named so

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
PASSAGE_ROWS = 1.02  # plain text is cut into passages just over a row
PASSAGE_SLACK = 0.05  # so much further on, a blank line to cut at is still preferred
BUNDLE_BYTES = 1 << 26  # of plain text, encoded and mixed as one: bounds memory and lost work

BATCH_DOCS = 128  # packing, part of the metric: documents come in batches of so many
POOL_DOCS = 1000  # and are chosen from a pool of at least so many

START_LIMIT = 1200  # seconds to compile and warm up in: a slow machine with cold caches needs many
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
AMD_DRIVER = Path("/sys/module/amdgpu/version")
PACE_SHARE = 0.05  # of the budget between two samples of a run's pace in the ledger

# ------------------------------------------------------------------------------------------ helpers

_now = time.monotonic  # bound here: whatever is done to `time` later, the clock keeps its own


class Stop(SystemExit):
    """A failure a person or an agent can act on. Uncaught, Python prints its line and exits 1."""

    def __init__(self, message: str):
        one_line = " ".join(str(message).split())
        super().__init__("FAIL: " + one_line)


def cache_dir() -> Path:
    return Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser()


def _environment(name: str, default: str, pattern: str) -> str:
    value = os.environ.get(name) or default
    if not re.fullmatch(pattern, value):
        raise Stop(f"{name}={value}: it must match {pattern}")
    return value


def seed() -> int:
    """42, or $AUTORESEARCH_SEED: to measure the noise floor, not something to tune."""
    return int(_environment("AUTORESEARCH_SEED", "42", r"\d{1,9}"))


def split_name() -> str:
    """The split that is scored: val, or test with $AUTORESEARCH_SPLIT=test.

    That one is for the human, once, at the very end.
    """
    return _environment("AUTORESEARCH_SPLIT", "val", "val|test")


def write_atomically(path: Path, data: bytes):
    """All of the bytes under `path` or nothing, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def well_formed(text: str) -> str:
    """A lone surrogate, which JSON and Python can carry and UTF-8 cannot, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def canonical(value) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _checksum(record: dict) -> str:
    return hashlib.sha256(canonical(record)).hexdigest()[:16]


def signed(record: dict) -> bytes:
    """One JSON line with a checksum of itself: finds damage and edits by hand; it is no secret."""
    return json.dumps({**record, "checksum": _checksum(record)}).encode() + b"\n"


def parse_signed(line: bytes) -> dict:
    """The record that `signed` wrote. Raises ValueError on anything else."""
    try:
        record = json.loads(line)
        checksum = record.pop("checksum")
        matches = checksum == _checksum(record)
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a record ({type(error).__name__})") from None
    if not matches:
        raise ValueError("its checksum does not match")
    return record


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


# ------------------------------------------------------------------------- manifest and fingerprint


def _load_manifest(path: Path) -> dict:
    again = "run the same `uv run prepare.py ...` again with --force"
    try:
        record = parse_signed(path.read_bytes())
    except FileNotFoundError:
        raise Stop(
            f"nothing is prepared in {path.parent}: run `uv run prepare.py` (a GPU), "
            "`uv run prepare.py --data DIR` (your text) or `uv run prepare.py --demo` "
            "(any machine, offline); a half-done one goes on"
        ) from None
    except (ValueError, OSError) as error:
        raise Stop(f"{path} is damaged ({error}): {again}") from None
    found = record.get("format")
    if found != FORMAT:
        raise Stop(f"{path} has format {found}, this prepare.py reads {FORMAT}: {again}")
    return record


def _read_only(value):
    if isinstance(value, dict):
        return MappingProxyType({key: _read_only(inner) for key, inner in value.items()})
    if isinstance(value, list):
        return tuple(_read_only(inner) for inner in value)
    return value


@functools.lru_cache
def _read_manifest(path: Path) -> MappingProxyType:
    return _read_only(_load_manifest(path))


def manifest() -> MappingProxyType:
    """What is prepared, read once and read-only: editing it raises TypeError.

    Raises Stop, with the command to type, where nothing is, or where it is damaged.
    """
    return _read_manifest(cache_dir() / "manifest.json")


def set_dir() -> Path:
    """The directory of the prepared tokenizer and tokens."""
    return cache_dir() / manifest()["key"]


def fingerprint() -> str:
    """12 hex digits of the manifest and this file's source, both as they are on the disk now."""
    record = _load_manifest(cache_dir() / "manifest.json")
    source = Path(__file__).read_bytes().replace(b"\r\n", b"\n")
    return hashlib.sha256(canonical(record) + source).hexdigest()[:12]


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
            raise Stop(f"{path} has no column `text`, only: {', '.join(names)[:200]}")
        for group in range(file.num_row_groups):
            for rows in file.iter_batches(row_groups=[group], columns=["text"], batch_size=1024):
                for text in rows.column(0).cast(pa.string()).to_pylist():
                    if text:
                        yield group, text
    except (pa.ArrowException, OSError, UnicodeError) as error:
        reason = str(error)[:200]
        raise Stop(
            f"{path} is not readable as parquet ({reason}): replace it or remove it"
        ) from None


def _jsonl_documents(path: Path):
    """Yields (0, text): the whole file is one group."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = well_formed(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                kind = type(error).__name__
                raise Stop(
                    f"{path}, line {number}: not a JSON object with a string `text` ({kind})"
                ) from None
            yield 0, text


def _passages(path: Path, size: int, measure):
    """Cuts a text file at line ends into passages of just over `size`.

    So packed rows are full and lose little. measure(line) says how much a line adds. A blank line
    no further than PASSAGE_SLACK on is preferred as the end.
    """
    lines = []
    total = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            while line := file.readline(size):  # or a piece of a longer one
                lines.append(line)
                total += measure(line)
                is_blank = not line.strip()
                if total >= size and (is_blank or total >= size * (1 + PASSAGE_SLACK)):
                    yield "".join(lines)
                    lines = []
                    total = 0
        yield "".join(lines)
    except UnicodeDecodeError as error:
        raise Stop(
            f"{path} is not UTF-8 ({error.reason}): convert it (iconv -f LATIN1 -t UTF-8) "
            "or remove it"
        ) from None


READERS = {".parquet": _parquet_documents, ".jsonl": _jsonl_documents}
SUFFIXES = (*READERS, ".txt", ".md")  # what no reader knows is plain text

# --------------------------------------------------------------------- documents: own text and demo


@dataclass
class Source:
    """A parquet or jsonl file, or a bundle of plain text files: encoded and restarted as a unit."""

    name: str
    paths: list[Path]
    split: str | None  # None: each document goes by its sha256

    def describe(self) -> dict:
        """What the manifest says of it."""
        digests = [sha256_of(path) for path in self.paths]
        digest = digests[0]
        if len(digests) > 1:
            digest = hashlib.sha256("".join(digests).encode()).hexdigest()
        size = sum(path.stat().st_size for path in self.paths)
        return {"name": self.name, "files": len(digests), "size": size, "sha256": digest}


def text_sources(directory: Path) -> list[Source]:
    """Every file of SUFFIXES below `directory`; links to folders are no part.

    Files named val* and test* are those splits. With both named, the rest is for training.
    """
    if not directory.is_dir():
        raise Stop(f"--data {directory}: there is no such directory")
    found = [Path(root, name) for root, _, names in os.walk(directory) for name in names]
    splits = {}
    for path in sorted(found):
        if path.suffix in SUFFIXES and path.is_file():
            named = re.match("val|test", path.name)
            splits[path] = named[0] if named else None
    if {"val", "test"} <= set(splits.values()):
        splits = {path: split or "train" for path, split in splits.items()}
    return _sources(directory, splits)


def demo_sources() -> list[Source]:
    """The running Python's own standard library: about 30 MB of text that every machine has."""
    directory = Path(sysconfig.get_paths()["stdlib"])
    splits = {}
    for path in sorted(directory.rglob("*.py")):
        installed = {"site-packages", "dist-packages"} & set(path.parts)
        if not installed and _is_text(path):
            splits[path] = None
    return _sources(directory, splits)


def _is_text(path: Path) -> bool:
    """Not empty, and UTF-8: a few of the standard library's test files are broken on purpose."""
    try:
        return path.read_text("utf-8") != ""
    except UnicodeDecodeError:
        return False


def _sources(directory: Path, splits: dict[Path, str | None]) -> list[Source]:
    """One source for each file that has a reader; plain text files bundled, split by split."""
    name = {path: path.relative_to(directory).as_posix() for path in splits}
    sources = []
    plain = {}  # split: paths
    for path, split in splits.items():
        if path.suffix in READERS:
            sources.append(Source(name[path], [path], split))
            plain.setdefault(split, [])  # bundles stand in the order in which splits first came
        else:
            plain.setdefault(split, []).append(path)
    for split, paths in plain.items():
        # By the hash of their names, so that every bundle is a fair sample.
        paths.sort(key=lambda path: hashlib.sha256(os.fsencode(name[path])).digest())
        for bundle in _bundles(paths):
            sources.append(Source(name[bundle[0]], bundle, split))
    return sources


def _bundles(paths: list[Path]):
    """Yields lists of the paths, in order, each ended by the file that fills BUNDLE_BYTES."""
    bundle = []
    size = 0
    for path in paths:
        bundle.append(path)
        size += path.stat().st_size
        if size >= BUNDLE_BYTES:
            yield bundle
            bundle = []
            size = 0
    if bundle:
        yield bundle


def read(source: Source, size: int = TOKENIZER_DOC_CHARS, measure=len):
    """Yields (group, sha256 of the document, text) in file order.

    A group is a parquet row group, or else the whole source. A plain text file is one document,
    given out in passages (see _passages). Raises Stop, naming file and place, on anything that is
    not text.
    """
    reader = READERS.get(source.paths[0].suffix)
    if reader is None:
        yield from _mixed_passages(source, size, measure)
        return
    for group, text in reader(source.paths[0]):
        yield group, hashlib.sha256(text.encode()).digest(), text


def _mixed_passages(source: Source, size: int, measure):
    """The passages of a bundle, mixed: neighbours are alike. A window, as a file may be huge."""
    window = []
    chars = 0
    for path in source.paths:
        digest = bytes.fromhex(sha256_of(path))
        for text in _passages(path, size, measure):
            window.append((0, digest, text))
            chars += len(text)
            if chars >= BUNDLE_BYTES:
                yield from sorted(window, key=_hash_of_text)
                window = []
                chars = 0
    yield from sorted(window, key=_hash_of_text)


def _hash_of_text(passage: tuple[int, bytes, str]) -> bytes:
    return hashlib.sha256(passage[2].encode()).digest()


def held_out_documents(sources: list[Source]) -> dict[bytes, str]:
    """{sha256: split} of the documents in files that are named for a split."""
    held_out = {}
    for source in sources:
        if source.split in ("val", "test"):
            for _, digest, _ in read(source):
                held_out[digest] = source.split
    return held_out


def documents(source: Source, size=TOKENIZER_DOC_CHARS, measure=len, held_out=None):
    """Yields (split, group, text) as `read` does; held_out: see held_out_documents.

    No document stands on two sides: what a named file holds is left out everywhere else.
    """
    held_out = held_out or {}
    named = set(held_out.values())
    for group, digest, text in read(source, size, measure):
        split = source.split
        if split is None:
            split = _drawn_split(digest)
            if split in named:
                split = "train"  # the files named for that split are all of it
        if text and held_out.get(digest, split) == split:
            yield split, group, text


def _drawn_split(digest: bytes) -> str:
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < HELD_OUT_SHARE:
        return "val"
    if share < 2 * HELD_OUT_SHARE:
        return "test"
    return "train"


# ------------------------------------------------------------------------------ documents: climbmix


class Retry(Exception):
    """This download may go better next time.

    wait: seconds the server asked for, or None; discard: the bytes at hand are wrong.
    """

    def __init__(self, reason: str, wait: float | None = None, discard: bool = False):
        super().__init__(reason)
        self.wait = wait
        self.discard = discard


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
        sources.append(Source(name, [directory / name], split))
    missing = [source.paths[0] for source in sources if not source.paths[0].exists()]
    in_parallel(download, missing, PARALLEL_DOWNLOADS, "downloaded")
    return sources


def download(final: Path, progress: Progress):
    """One shard: resumed, retried, checked, and only then renamed into place.

    Raises Stop, naming the file, after the last try; what has arrived stays in NAME.part for the
    next run.
    """
    part = final.with_name(final.name + ".part")
    part.touch()
    tries = 0
    most = 0  # bytes that have been there at once
    while True:
        try:
            digest = _fetch(final.name, part, progress)
            _check_shard(part, digest)
            break
        except Retry as failure:
            if failure.discard:
                part.write_bytes(b"")
            arrived = part.stat().st_size
            # A line that drops but moves on is not a failure.
            tries = 0 if arrived > most else tries + 1
            most = max(most, arrived)
            if tries >= MAX_TRIES:
                raise Stop(
                    f"{final.name}: {failure}; what has arrived is kept: run the same command again"
                ) from None
            pause = failure.wait
            if pause is None:
                pause = min(BACKOFF * 2**tries, MAX_WAIT) * random.uniform(0.5, 1)
            progress.say(f"{final.name}: {failure}; trying again in {pause:.0f} s\n")
            time.sleep(pause)
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, final)


def _check_shard(part: Path, digest: str | None):
    if digest and sha256_of(part) != digest:
        raise Retry("its sha256 is wrong", discard=True)
    try:
        next(_parquet_documents(part), None)
    except Stop as problem:
        raise Retry(str(problem.code).removeprefix("FAIL: "), discard=True) from None


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
                _save(reply, part, have, progress)
            return _linked_sha256(reply)
    except ValueError as error:
        # An error's text may hold the token or a signed address: only its kind is shown.
        kind = type(error).__name__
        raise Stop(f"{name}: HF_ENDPOINT or HF_TOKEN cannot be used ({kind})") from None
    except requests.RequestException as error:
        raise Retry(f"{type(error).__name__} at {host}") from None


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
    """Raises Retry or Stop unless the reply's body is the file, or its part from byte `have` on."""
    status = reply.status_code
    first, _ = _content_range(reply)
    if status == 416 or (status == 206 and first != str(have)):
        raise Retry(f"{host} does not go on at byte {have:,}", discard=True)
    if status in (408, 429) or status >= 500:
        asked = reply.headers.get("Retry-After", "")
        wait = min(int(asked), MAX_RETRY_AFTER) if asked.isdigit() else None
        raise Retry(f"{host} answered {status}", wait)
    if status in (401, 403):
        raise Stop(f"{name}: {host} answered {status} (check HF_TOKEN)")
    if status not in (200, 206):
        raise Stop(f"{name}: {host} answered {status}")


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

    def to_bytes(self) -> bytes:
        lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(self.ranks)]
        return b"".join(lines)

    @classmethod
    def from_directory(cls, directory: str | Path | None = None) -> Tokenizer:
        """The prepared tokenizer, checked against the manifest, or the one in `directory`.

        Raises Stop on damage.
        """
        path = Path(directory or set_dir()) / "tokenizer.tiktoken"
        try:
            raw = path.read_bytes()
            if directory is None:
                if hashlib.sha256(raw).hexdigest() != manifest()["tokenizer_sha256"]:
                    raise ValueError("not the one that was prepared")
            return cls(_parse_ranks(raw))
        except (OSError, ValueError) as error:
            raise Stop(
                f"{path} is damaged or missing ({error}): "
                "run the same `uv run prepare.py ...` with --force"
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


def train_tokenizer(directory: Path, sources: list[Source], held_out: dict, vocab_size: int):
    """The set's Tokenizer: trained on training text only, or the finished one of an earlier try."""
    path = directory / "tokenizer.tiktoken"
    if not path.exists():
        began = _now()
        texts = _tokenizer_text(sources, held_out)
        with ThreadPoolExecutor(1) as pool:  # so that Ctrl-C is heard meanwhile
            tokenizer = pool.submit(Tokenizer.train, texts, vocab_size).result()
        write_atomically(path, tokenizer.to_bytes())
        size = tokenizer.get_vocab_size()
        print(f"trained a tokenizer of {size} tokens in {_now() - began:.1f} s", file=sys.stderr)
    return Tokenizer.from_directory(directory)


def _tokenizer_text(sources: list[Source], held_out: dict):
    """Yields the first TOKENIZER_CHARS of training text, each document cut."""
    left = TOKENIZER_CHARS
    for source in sources:
        if source.split not in (None, "train"):
            continue
        for split, _, text in documents(source, held_out=held_out):
            if split != "train":
                continue
            if left <= 0:
                return
            text = text[: min(TOKENIZER_DOC_CHARS, left)]
            left -= len(text)
            yield text


# -------------------------------------------------------------------------------------- token cache


def encode_source(texts, progress: Progress, tokenizer: Tokenizer, path: Path) -> dict:
    """Writes a source's tokens and then, as the sign that they are whole, their index.

    texts: its (split, group, text).
    PATH.bin: uint16, all documents one after another, each with BOS in front.
    PATH.idx: int32 (documents, 3): place of its split in SPLITS, its row group, its tokens.
    Returns its entry in the manifest.
    """
    data_path = path.with_suffix(".bin")
    index_path = path.with_suffix(".idx")
    if not index_path.exists():
        bos = [tokenizer.get_bos_token_id()]
        index = []
        with open(data_path, "wb") as file:
            for split, group, text in texts:
                ids = np.concatenate([bos, tokenizer.encode_array(text)])
                file.write(ids.astype(np.uint16).data)
                index.append((SPLITS.index(split), group, len(ids)))
                progress.add(len(text))
            file.flush()
            os.fsync(file.fileno())
        write_atomically(index_path, np.array(index, dtype=np.int32).tobytes())
    index = np.fromfile(index_path, dtype=np.int32).reshape(-1, 3)
    tokens = {}
    for place, split in enumerate(SPLITS):
        tokens[split] = int(index[index[:, 0] == place, 2].sum())
    return {
        "name": path.name,
        "sha256": sha256_of(data_path),
        "index_sha256": sha256_of(index_path),
        "tokens": tokens,
    }


def encode_sources(
    directory: Path, sources: list[Source], held_out: dict, tokenizer: Tokenizer, row_length: int
) -> list[dict]:
    """Encodes every source that an earlier try has not; returns the manifest's `tokens`."""
    number = {source.name: i for i, source in enumerate(sources)}
    passage_size = math.ceil(PASSAGE_ROWS * row_length)

    def tokens_in(line: str) -> int:
        return len(tokenizer.encoding.encode_ordinary(line))

    def encode(source: Source, progress: Progress) -> dict:
        texts = documents(source, passage_size, tokens_in, held_out)
        path = directory / f"{number[source.name]:05d}"
        return encode_source(texts, progress, tokenizer, path)

    return in_parallel(encode, sources, os.cpu_count() or 1, "encoded")


def open_tokens(directory: Path, entry: dict, verify: bool) -> tuple[np.ndarray, np.ndarray]:
    """(uint16 tokens as a memory map, int64 index) of a manifest entry; see encode_source.

    The index and the size are always checked, the tokens' sha256 with `verify`: for the scored
    splits. Raises Stop on damage.
    """
    path = directory / (entry["name"] + ".bin")
    try:
        raw = path.with_suffix(".idx").read_bytes()
        if hashlib.sha256(raw).hexdigest() != entry["index_sha256"]:
            raise ValueError("not the index that was written")
        if path.stat().st_size != 2 * sum(entry["tokens"].values()):
            raise ValueError("not the size that was written")
        # A plain view: slicing np.memmap itself is slow.
        tokens = np.asarray(np.memmap(path, dtype=np.uint16, mode="r"))
        if verify and hashlib.sha256(tokens).hexdigest() != entry["sha256"]:
            raise ValueError("not the tokens that were written")
    except (OSError, ValueError) as error:
        raise Stop(
            f"{path} is damaged or missing ({error}): "
            "run the same `uv run prepare.py ...` with --force"
        ) from None
    return tokens, np.frombuffer(raw, dtype=np.int32).reshape(-1, 3).astype(np.int64)


# ------------------------------------------------------------------------------- prepare(): the map


def prepare(corpus: str, data: Path | None, num_shards: int, settings: dict, force: bool):
    """Fills the cache: sources, tokenizer, tokens, and last the manifest.

    The same again does nothing. Finished pieces of an earlier try are kept.
    """
    began = _now()
    cache = cache_dir()
    request = {"corpus": corpus, **settings}
    if corpus == "climbmix":
        request["num_shards"] = num_shards
    old = _prepared_before(request, force)

    # 1. The files of text, downloaded where they are not here yet. With them the set has its key.
    sources = find_sources(corpus, data, num_shards)
    files = [source.describe() for source in sources]
    described = {"format": FORMAT, "corpus": corpus, "request": request, "files": files}
    key = hashlib.sha256(canonical(described)).hexdigest()[:12]
    if old and old["key"] != key:
        raise _another_set()
    if old:
        print(f"already prepared in {cache}: {corpus}, fingerprint {fingerprint()}; nothing to do")
        return
    directory = _make_room(key, force)

    # 2. The tokenizer, from training text only.
    held_out = held_out_documents(sources) if corpus == "text" else {}
    tokenizer = train_tokenizer(directory, sources, held_out, settings["vocab_size"])

    # 3. Every document as tokens.
    row_length = settings["seq_len"] + 1
    entries = encode_sources(directory, sources, held_out, tokenizer, row_length)

    # 4. The rows to score, counted by the packer of part II; and last the manifest.
    eval_rows = count_rows(directory, entries, row_length, settings["eval_tokens"])
    described.update(settings)
    described.update(
        key=key,
        vocab_size=tokenizer.get_vocab_size(),
        eval_rows=eval_rows,
        tokens=entries,
        tokenizer_sha256=sha256_of(directory / "tokenizer.tiktoken"),
    )
    write_atomically(cache / "manifest.json", signed(described))
    _read_manifest.cache_clear()
    print(
        f"prepared {corpus} in {cache} in {_now() - began:.1f} s: "
        f"{_tokens_of(entries, 'train'):,} training tokens, {eval_rows['val']} rows of "
        f"{settings['seq_len']} to score, fingerprint {fingerprint()}\nnext: uv run train.py"
    )


def _prepared_before(request: dict, force: bool):
    """The manifest of the set that is there, if it may be the one asked for; None without one."""
    if force or not (cache_dir() / "manifest.json").exists():
        return None
    old = manifest()
    if old["request"] != request:
        raise _another_set()
    return old


def _another_set() -> Stop:
    return Stop(
        f"{cache_dir()} holds another prepared set: set AUTORESEARCH_CACHE to another directory "
        "to keep both, or replace it with --force"
    )


def find_sources(corpus: str, data: Path | None, num_shards: int) -> list[Source]:
    if corpus == "climbmix":
        return climbmix_sources(num_shards)
    if corpus == "demo":
        return demo_sources()
    sources = text_sources(data)
    if not sources:
        *names, last = [f"*{suffix}" for suffix in SUFFIXES]
        raise Stop(f"no {', '.join(names)} or {last} below {data}")
    return sources


def _make_room(key: str, force: bool) -> Path:
    """The set's directory. Other sets, and with `force` this one, are rebuilt from the sources."""
    cache = cache_dir()
    (cache / "manifest.json").unlink(missing_ok=True)
    for entry in cache.iterdir():
        if re.fullmatch("[0-9a-f]{12}", entry.name) and (force or entry.name != key):
            shutil.rmtree(entry)
    directory = cache / key
    directory.mkdir(exist_ok=True)
    return directory


def count_rows(directory: Path, entries: list[dict], row_length: int, eval_tokens: int) -> dict:
    """{split: the rows that its score is made of}. Raises Stop where there is too little text."""
    wanted = max(1, eval_tokens // (row_length - 1))
    eval_rows = {}
    for split in ("val", "test"):
        packer = Packer(directory, entries, split, row_length, repeat=False)
        eval_rows[split] = packer.fill(np.empty((wanted, row_length), dtype=np.uint16))
    if not _tokens_of(entries, "train"):
        raise _too_small("train", entries, row_length)
    if not eval_rows["val"]:
        raise _too_small("val", entries, row_length)
    return eval_rows


def _tokens_of(entries: list[dict], split: str) -> int:
    return sum(entry["tokens"][split] for entry in entries)


def _too_small(split: str, entries: list[dict], row_length: int) -> Stop:
    tokens = _tokens_of(entries, split)
    return Stop(
        f"the {split} split has {tokens:,} tokens and one row needs {row_length:,}: "
        f"{row_length - tokens:,} are missing. Add text, or lower --seq-len"
    )


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
            raise Stop(
                "the token cache holds ids beyond the vocabulary: "
                "run the same `uv run prepare.py ...` with --force"
            )
        batch = torch.empty((2, count, T), dtype=torch.int64, pin_memory=pinned)
        view = batch.numpy()
        view[0] = rows[:count, :-1]
        view[1] = rows[:count, 1:]
        yield batch, packer.epoch


# --------------------------------------------------------------------------------------- dataloader


def training_device():
    """CUDA (torch calls ROCm so too), Apple's MPS, or the CPU.

    Raises Stop where a card is there that torch cannot use: a CPU would train for hours unnoticed.
    The demo is made for a CPU, and $AUTORESEARCH_DEVICE=cpu asks for one.
    """
    import torch

    wanted = os.environ.get("AUTORESEARCH_DEVICE", "")
    if wanted not in ("", "cpu"):
        fail(
            f"AUTORESEARCH_DEVICE is {wanted!r}: only `cpu` means something, otherwise leave it out"
        )
    if wanted == "cpu":
        return torch.device("cpu")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if usable:
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    if manifest()["corpus"] != "demo" and (card := _unusable_card(torch)):
        why = " ".join(str(said[0].message).split()) if said else "torch does not say why"
        fail(
            f"{card}, but torch {torch.__version__} cannot use it ({why[:300]}). Install a driver for "
            f"CUDA {torch.version.cuda} or newer from https://www.nvidia.com/drivers, or train on the "
            "processor with AUTORESEARCH_DEVICE=cpu"
        )
    return torch.device("cpu")


def _unusable_card(torch) -> str | None:
    """What shows an NVIDIA card that is meant to be used by a torch that is built for one."""
    if not torch.version.cuda or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    if Path("/dev/nvidia0").exists():
        return "there is an NVIDIA card (/dev/nvidia0)"
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    cards = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return f"there is an NVIDIA card ({cards[0]})" if cards else None


def driver_version() -> str | None:
    """The version of the NVIDIA or AMD kernel driver, or None."""
    with contextlib.suppress(OSError):
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", NVIDIA_DRIVER.read_text())
        if found:
            return found[1]
    with contextlib.suppress(OSError):
        return AMD_DRIVER.read_text().strip()
    return None


def device_name(device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if model:
            return model[1].strip()
    return platform.processor() or platform.machine()


def make_dataloader(tokenizer: Tokenizer, B: int, T: int, split: str, device=None):
    """Yields (inputs, targets, epoch) of the train split for ever.

    Both are int64 (B, T) on `device` (default: training_device()); targets are the inputs shifted
    by one; every row starts with BOS. The first batch starts the clock. The other splits are for
    evaluate_bpb alone: Stop, as on a damaged cache.
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
    clock._expect(device)
    clock._conditions["device_batch"] = B
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
        clock._hand_out(batch[0].numel())
        # From pinned memory the copy is asynchronous, and torch's host allocator gives that memory
        # out again only when the copies that read it are done: nothing is overwritten while
        # anything can still read it.
        inputs, targets = batch.to(device, non_blocking=True)
        yield inputs, targets, epoch


# ------------------------------------------------------------------------------- clock and watchdog


class Clock:
    """The run's time: from the first training batch handed out until the score is asked for.

    `elapsed` and `progress` are for everybody. All else is private, and no other name can be set.

    A step is what lies between two batches before each of which the clock was looked at: a loop
    looks once a step, so that gradient accumulation, which draws several batches, is one step.
    """

    __slots__ = (
        "_made _began _ended _budget _script _script_sha256 _run _tokens _batches "
        "_looked _step_began _longest_step _pace _next_sample _conditions"
    ).split()

    def __init__(self):
        self._made = _now()
        self._began = None
        self._ended = None
        self._budget = None  # seconds
        main_file = getattr(sys.modules["__main__"], "__file__", None)
        self._script = Path(main_file or "train.py").resolve()
        self._script_sha256 = None
        if self._script.is_file():  # now: as it is read, not as it is edited later
            self._script_sha256 = sha256_of(self._script)
        self._run = None  # what the ledger says of it
        self._tokens = 0  # handed out, as are the batches
        self._batches = 0
        self._looked = False
        self._step_began = None
        self._longest_step = 0.0  # seconds
        self._pace = []  # [seconds, tokens handed out before]
        self._next_sample = 0.0  # seconds
        self._conditions = {}  # what changes a run's speed without being its code

    @property
    def elapsed(self) -> float:
        """Training seconds so far."""
        self._looked = True
        return self._seconds()

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, 0 to 1."""
        budget = self._budget or manifest()["time_budget"]
        return min(self.elapsed / budget, 1.0)

    def _seconds(self) -> float:
        if self._began is None:
            return 0.0
        end = _now() if self._ended is None else self._ended
        return end - self._began

    def _expect(self, device):
        """A training loader exists. The first one starts the watchdog; no other ever touches it."""
        if self._budget is None:
            self._run = _describe_run(device)
            self._budget = manifest()["time_budget"]
            self._next_sample = PACE_SHARE * self._budget
            _arm_watchdog(START_LIMIT)

    def _hand_out(self, tokens: int):
        if self._began is None:
            self._start()
        now = _now()
        if self._looked:
            self._longest_step = max(self._longest_step, now - self._step_began)
            self._step_began = now
            self._looked = False
        if now - self._began >= self._next_sample:
            self._pace.append([round(now - self._began, 3), self._tokens])
            interval = PACE_SHARE * self._budget
            self._next_sample = ((now - self._began) // interval + 1) * interval
        self._batches += 1
        self._tokens += tokens

    def _start(self):
        if self._run is not None:  # None where a failure has ended it already
            self._run["startup_seconds"] = round(_now() - self._made, 1)
            _append_to_ledger({"event": "start", **self._run, **self._conditions, "time": _utc()})
        _arm_watchdog(_training_limit(self._budget))
        self._began = self._step_began = _now()

    def _score_asked(self, device):
        """Ends the clock. Raises Stop for a run that gets no score whatever its model is."""
        if self._ended is not None:
            fail("this run has been scored already: one score for one training")
        if device.type != "cpu":  # queued work is training too
            import torch

            torch.accelerator.synchronize(device)
        self._ended = _now()
        self._run = self._run or _describe_run(device)
        if self._began is None:
            fail(
                "no training batch was drawn: a score is for what a run learned from "
                'make_dataloader(tokenizer, B, T, "train")'
            )
        tolerance = max(self._longest_step, 0.01 * self._budget)
        if self._seconds() > self._budget + tolerance:
            fail(
                f"trained {round(self._seconds(), 1):g} s on a {self._budget} s budget: "
                "stop before the step that would not fit"
            )
        began_with = self._run["fingerprint"]
        ends_with = fingerprint()
        if ends_with != began_with:
            fail(
                "the prepared set or prepare.py was changed during the run: its fingerprint is "
                f"{ends_with}, this run began with {began_with}. Run again"
            )


clock = Clock()


def _training_limit(budget: int) -> int:
    """Seconds from the first batch to the process's end, the score included."""
    return max(2 * budget, budget + 300)


def _arm_watchdog(seconds: float):
    """Ends this process so many seconds from now, whatever hangs, and shows on stderr where.

    A process has one such timer: to arm it again replaces it. It fires in a thread of C that needs
    no GIL, and exits with 1; the ledger then has the run's start and no end, and children live on.
    Nobody calls it off: a process that hangs after its score must end too.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)


# ------------------------------------------------------------------------------------------- ledger


def fail(message: str):
    """Ends the run without a score: into the ledger, then as Stop."""
    _end_run(failure=message)
    raise Stop(message)


def describe_run(attention: str, compiled: bool, dtype: str, fell_back: list[str]):
    """Into the ledger, from now on: what changes a run's speed without being its code.

    fell_back: why something slower than the best was taken, a sentence each. Runs that differ in
    these because of the machine are not comparable; night.py runs them once more.
    """
    clock._conditions |= {
        "attention": str(attention)[:40],
        "compiled": bool(compiled),
        "dtype": str(dtype)[:40],
        "fell_back": [str(reason)[:300] for reason in fell_back][:4],
    }


def _end_run(**result):
    run = clock._run
    clock._run = None  # a run ends once
    if run is None:
        return
    measured = {
        "training_seconds": round(clock._seconds(), 3),
        "tokens": clock._tokens,
        "batches": clock._batches,
        "longest_step_seconds": round(clock._longest_step, 3),
        "pace": clock._pace,
        "imported": _imported(),
    }
    _append_to_ledger(
        {"event": "end", **run, **clock._conditions, "time": _utc(), **measured, **result}
    )


def _utc() -> str:
    return f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"


def _describe_run(device) -> dict:
    """What the ledger says of a run; git's part is null where there is no git."""
    import torch

    changed = _git("status", "--porcelain", "--", clock._script.name)
    return {
        "run": _environment("AUTORESEARCH_RUN", uuid.uuid4().hex[:12], "[0-9a-f]{12}"),
        "time": _utc(),
        "repo": _git("rev-parse", "--show-toplevel"),
        "pid": os.getpid(),
        "branch": _git("rev-parse", "--abbrev-ref", "HEAD"),
        "commit": _git("rev-parse", "HEAD"),
        "script": clock._script.name,
        "changed": None if changed is None else changed != "",  # does it differ from that commit?
        "train_sha256": clock._script_sha256,
        "fingerprint": fingerprint(),
        "seed": seed(),
        "device": device_name(device),
        "torch": torch.__version__,
        "driver": driver_version(),
        "split": split_name(),
    }


def _git(*words: str) -> str | None:
    """What git says in the script's directory, or None."""
    command = ["git", "-C", str(clock._script.parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _imported() -> dict[str, str]:
    """{path: start of its sha256} of the imported files that neither Python nor a package brought.

    Paths below the script's directory are relative to it. Without the script, this file, and what
    torch.compile wrote into its own cache.
    """
    known = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    known += [*site.getsitepackages(), site.getusersitepackages()]
    compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR")  # torch sets it itself
    if compiled:
        known += [compiled, re.sub(r"-\d+$", "", compiled)]  # and the one it was made beside
    folders = tuple({os.path.realpath(folder) + os.sep for folder in known})
    files = set()
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            file = vars(module).get("__file__")  # getattr would wake a lazy module
            if isinstance(file, str):
                files.add(Path(os.path.realpath(file)))
    files -= {clock._script, Path(__file__).resolve()}
    imported = {}
    for file in sorted(files):
        if str(file).startswith(folders):
            continue
        name = file
        if file.is_relative_to(clock._script.parent):
            name = file.relative_to(clock._script.parent)
        try:
            imported[str(name)] = sha256_of(file)[:16]
        except OSError:
            imported[str(name)] = "unreadable"
    return imported


def _append_to_ledger(record: dict):
    """One line in one write. A ledger that cannot be written warns and does not lose the run."""
    import fcntl

    path = cache_dir() / "autoresearch.jsonl"
    line = signed(record)
    try:
        with open(path, "ab+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            if end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n":
                line = b"\n" + line  # the last line is torn, and this one must not stick to it
            if file.write(line) != len(line):
                raise OSError(None, "only a part was written: is the disk full?")
            os.fsync(file.fileno())
    except OSError as error:
        print(
            f"warning: the ledger {path} cannot be written ({error.strerror}); the run goes on",
            file=sys.stderr,
            flush=True,
        )


def read_ledger(start: int = 0) -> tuple[list[dict], int]:
    """(the ledger's records, oldest first; how many lines were damaged and skipped).

    start: the byte, where a line begins, from which on it is read.
    """
    path = cache_dir() / "autoresearch.jsonl"
    if not path.is_file():
        return [], 0
    with open(path, "rb") as file:
        file.seek(start)
        lines = file.read().split(b"\n")
    records = []
    damaged = 0
    for line in lines:
        if not line:
            continue
        try:
            records.append(parse_signed(line))
        except ValueError:
            damaged += 1
    return records, damaged


# ---------------------------------------------------------------------------------- evaluation


def evaluate_bpb(model, tokenizer: Tokenizer, batch_size: int) -> float:
    """Bits per byte of `model` on the scored split. Ends the clock and writes the ledger.

    model(inputs), int64 (B, T), returns logits (B, T, vocabulary size); B is batch_size, but at
    most half the rows. It never sees the targets. The byte counts are the prepared tokenizer's,
    whatever the one handed over says. The rows are the first evaluation tokens / T of the split's
    packing, each once, so the score does not depend on B.

    Raises Stop, with the reason in the ledger, for a run over its budget, another vocabulary,
    logits that are not a plain finite tensor of that shape, a model that learns, is random or
    keeps state, and one that sees the future (LeakCheck).
    """
    clock._score_asked(next(model.parameters()).device)
    began = _now()
    own, split = Tokenizer.from_directory(), split_name()
    if tokenizer.get_vocab_size() != own.get_vocab_size():
        fail(
            f"the tokenizer has a vocabulary of {tokenizer.get_vocab_size()} and the prepared set "
            f"of {own.get_vocab_size()}: no score"
        )
    examined = Examined(model, own.get_vocab_size())
    score = bits_per_byte(examined, _scored_rows(split), own.token_bytes, batch_size)
    seconds = round(_now() - began, 1)
    _end_run(score=score, scoring_seconds=seconds, scoring_passes=examined.passes)
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
        raise Stop(f"the {split} split has fewer rows than its manifest says: {again}")
    if rows.max() >= prepared["vocab_size"]:
        raise Stop(f"the token cache holds ids beyond the vocabulary: {again}")
    return rows


def bits_per_byte(
    model: Examined, rows: np.ndarray, token_bytes: np.ndarray, batch_size: int
) -> float:
    """The metric: (nats that all targets cost the model) / (ln 2 x the bytes they stand for).

    rows: (n, T + 1) tokens; inputs are a row without its last token, targets without its first.
    token_bytes: (V,). Targets of 0 bytes, the special tokens, are in neither sum.
    Memory: the losses, 4 bytes a token (84 MB for climbmix), twice or so; logits of one batch.
    """
    check = LeakCheck(rows, token_bytes, batch_size)
    losses = []
    with model.being_scored():
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


def on_device(array: np.ndarray, device):
    """A fresh int64 tensor; to CUDA from pinned memory, so that no copy waits for queued work."""
    import torch

    tensor = torch.from_numpy(array.astype(np.int64))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Examined:
    """A model as the evaluation calls it: its passes counted, itself held to what a score needs."""

    def __init__(self, model, vocab_size: int):
        self.model = model
        self.vocab_size = vocab_size
        self.device = next(model.parameters()).device
        self.passes = 0

    def __call__(self, inputs: np.ndarray):
        """Logits (B, T, V) of inputs (B, T), in memory that the next call may write over."""
        self.passes += 1
        given = on_device(inputs, self.device)  # a copy: writing into it changes nothing here
        logits = self.model(given)
        shape = (*inputs.shape, self.vocab_size)
        if type(logits) is not type(given) or logits.shape != shape:
            what = type(logits).__name__
            if hasattr(logits, "shape"):
                what += f" {tuple(logits.shape)}"
            fail(
                f"model(inputs) returned {what}, not logits of shape "
                f"(batch, sequence, vocabulary) = {shape} in a plain Tensor"
            )
        return logits

    @contextlib.contextmanager
    def being_scored(self):
        """In eval mode, without gradients; afterwards mode and torch's generators are as before.

        Raises Stop if the weights are not, or if autograd is asked to prepare a backward pass.
        """
        import torch

        mode, before = self.model.training, self._weights()
        devices = [self.device] if self.device.type == "cuda" else []
        no_graph = torch.autograd.graph.saved_tensors_hooks(
            self._refuse_to_learn, lambda kept: kept
        )
        try:
            self.model.eval()
            with torch.no_grad(), torch.random.fork_rng(devices), no_graph:
                yield
        finally:
            self.model.train(mode)
        if not torch.equal(self._weights(), before):
            fail(
                "the model's weights changed while it was scored: end every thread that trains "
                "before asking for the score"
            )

    def _weights(self):
        import torch

        sums = [p.detach().flatten().view(torch.uint8).sum() for p in self.model.parameters()]
        return torch.stack(sums)

    def _refuse_to_learn(self, tensor):
        """Called where autograd keeps a tensor for a backward pass, which scoring never needs."""
        fail(
            "the model prepares a backward pass while it is scored: all learning is on the clock, "
            "before the score is asked for"
        )


# ---------------------------------------------------------------------------------- leak check

# What each check adds: a share of the scored rows (exact probes: of the calls), and the least.
CUT_SHARE, MIN_CUT_ROWS = 0.0125, 24
AGAIN_SHARE, MIN_AGAIN_ROWS = 0.004, 8
EXACT_SHARE, MIN_EXACT_CALLS, MIN_EXACT_PROBES = 0.008, 2, 8

# What is no longer rounding, in nats a target. Honest models on a CPU: 0, FFT convolution under 1e-5.
MOVED_NATS = 0.05  # rows again, on average, either way
GAINED_NATS = 0.005  # rows again, on average, to the better: what learning does
LOST_NATS = 0.02  # cut rows, on average: what a leak gains is lost there
# Cut rows against all targets, in standard deviations of their mean. In 4 million draws from real
# losses: 6.3 at most with 16 rows, 5.5 with 32, 5.7 with 128. Fewer rows are no sample.
UNLIKE_SIGMAS, UNLIKE_ROWS = 7, 16

CONTINUATION_WINDOW = 1 << 20  # tokens, in which another continuation is looked for
_draw = random.SystemRandom()  # no seed's: what cannot be foreseen cannot be fitted


@dataclass(frozen=True)
class Entry:
    """A row of the stream that the model is given."""

    when: float  # in scored rows: entries come in this order
    kind: str  # "scored", "cut" or "again"
    row: int
    cut: int = 0  # the position whose target is hidden from a cut row


class LeakCheck:
    """Is the score what the model knows? Not if it reads what it must tell, or learns meanwhile.

    Among the rows that are scored stand a few that only check, at places that nobody can foresee:
    - Cut rows. A row whose turn comes in a later call, up to a random position; then the text of
      another place that goes on after the same tokens. The target there cannot be read anywhere.
      It must not cost more than it will in the whole row, where a model that leaks reads it; and
      not more than targets do on average, which holds even if the model tells the same both times.
    - Rows again. A row of an early call in a late one, in other company: if its losses moved, the
      model keeps state: it counts its calls, remembers, or learns from what it is scored on.
    - Exact probes, calls of their own: see ExactCheck. They find mistakes too small to matter.

    Not caught: a model that learns without autograd and answers every row that it has had before
    as it did then; a leak that shuns places where a cut is likely, which it must find by itself,
    from the row alone; one that gains less than LOST_NATS and passes ExactCheck.
    """

    def __init__(self, rows: np.ndarray, token_bytes: np.ndarray, batch_size: int):
        """rows: (n, T + 1). A batch is at most half of them: there is an early and a late."""
        self.rows = rows
        self.has_bytes = token_bytes > 0
        self.batch_size = max(1, min(batch_size, len(rows) // 2))
        self.stream = sorted(self._entries(), key=lambda entry: entry.when)
        self.exact = ExactCheck(rows.shape[1] - 1)
        self.exact_calls = self._exact_calls()

    def _entries(self) -> list[Entry]:
        n, B = len(self.rows), self.batch_size
        entries = [Entry(row, "scored", row) for row in range(n)]

        late = range(B, n)  # a cut row comes at least B rows, so one call, before the whole one
        count = max(MIN_CUT_ROWS, int(CUT_SHARE * n))
        for row in _draw.sample(late, min(count, len(late))):
            positions = np.flatnonzero(self.has_bytes[self.rows[row, 1:-1]])
            if len(positions):
                when = _draw.uniform(-0.5, row - B)  # from before row 0 on
                entries.append(Entry(when, "cut", row, int(_draw.choice(positions))))

        early = range((n - B + 1) // 2)
        count = max(MIN_AGAIN_ROWS, int(AGAIN_SHARE * n))
        for row in _draw.sample(early, min(count, len(early))):
            when = _draw.uniform(max(row + B, n / 2), n)
            entries.append(Entry(when, "again", row))
        while len(entries) % B:  # all calls have one shape
            entries.append(Entry(n, "again", _draw.choice(early)))
        return entries

    def _exact_calls(self) -> set[int]:
        """The first, where a plain mistake is found at once, and some that nobody can foresee."""
        calls = len(self.stream) // self.batch_size
        enough = math.ceil(MIN_EXACT_PROBES / self.batch_size)
        count = max(MIN_EXACT_CALLS, enough, int(EXACT_SHARE * calls))
        return {0, *_draw.sample(range(1, calls), min(count, calls) - 1)}

    def batches(self):
        """Yields (call, inputs, targets), both uint16 (B, T), each memory of its own."""
        B = self.batch_size
        for call in range(len(self.stream) // B):
            entries = self.stream[call * B : (call + 1) * B]
            rows = self.rows[[entry.row for entry in entries]]
            inputs, targets = rows[:, :-1].copy(), rows[:, 1:].copy()
            for row, entry in zip(inputs, entries):
                if entry.kind == "cut":
                    row[entry.cut + 1 :] = self._continuation(entry)
            yield call, inputs, targets

    def _continuation(self, entry: Entry) -> np.ndarray:
        """What is to stand after the cut: the text of another place after the same tokens.

        The same 4, or as many as are found, so that no token that does not fit tells of the cut.
        """
        text = self.rows.ravel()
        cut = entry.row * self.rows.shape[1] + entry.cut
        start = _draw.randrange(max(1, len(text) - CONTINUATION_WINDOW))
        window = text[start : start + CONTINUATION_WINDOW]
        places = 3 + np.flatnonzero((window[3:-1] == text[cut]) & (window[4:] != text[cut + 1]))
        for back in (1, 2, 3):
            alike = places[window[places - back] == text[cut - back]]
            if not len(alike):
                break
            places = alike
        if len(places):
            place = start + int(_draw.choice(places))
        else:
            place = _draw.randrange(len(text))
        length = self.rows.shape[1] - 2 - entry.cut
        return np.take(text, range(place + 1, place + 1 + length), mode="wrap")

    def judge(self, losses: np.ndarray) -> np.ndarray:
        """The losses (n, T) of `rows`, from those of the stream. Raises Stop if a check failed."""
        # The stream is sorted by `when`, which for a scored row is its number: these are in order.
        scored = losses[[entry.kind == "scored" for entry in self.stream]]
        moved, hidden, shown = [], [], []
        for entry, mine in zip(self.stream, losses):
            if entry.kind == "again":
                moved.append(mine - scored[entry.row])
            if entry.kind == "cut":
                hidden.append(mine[entry.cut])
                shown.append(scored[entry.row, entry.cut])
        if moved:
            self._judge_state(np.array(moved))
        if hidden:
            everywhere = scored[self.has_bytes[self.rows[:, 1:]]]
            self._judge_leak(np.array(hidden), np.array(shown), everywhere)
        return scored

    @staticmethod
    def _judge_state(moved: np.ndarray):
        """moved: losses of rows run again, less those of the first time."""
        distance, gain = np.abs(moved).mean(), -moved.mean()
        if distance > MOVED_NATS or gain > GAINED_NATS:
            fail(
                "the model keeps state while it is scored: rows of early calls, run again in late "
                f"ones, got other logits ({distance:.3f} nats a target): no score. The same input "
                "must get the same answer"
            )

    @staticmethod
    def _judge_leak(hidden: np.ndarray, shown: np.ndarray, everywhere: np.ndarray):
        """Losses of the same targets in cut rows and in whole ones; everywhere: of all targets."""
        lost = (hidden - shown).mean()
        sigma = everywhere.std() / math.sqrt(len(hidden))
        unlike = hidden.mean() - everywhere.mean() > UNLIKE_SIGMAS * sigma
        if lost > LOST_NATS or (unlike and len(hidden) >= UNLIKE_ROWS):
            fail(
                f"the model sees the future: {len(hidden)} targets cost {hidden.mean():.3f} nats "
                f"each where other text stands from there on, {shown.mean():.3f} where they stand "
                f"themselves, and all targets {everywhere.mean():.3f}. Every position may only "
                "read itself and earlier ones of its own row"
            )


class ExactCheck:
    """Logits up to a position must not change when later tokens do, nor when other rows do.

    Every row of a batch is changed after a position of its own: to text from elsewhere in the
    batch, or to one token repeated, which moves averages most. Of two neighbouring positions one
    at least lies inside any block. Cost: one forward pass.
    Not caught: a leak at few positions, between those probed; one far below 1/100 of the signal;
    a model that recognises the probe, by the break in its text or because it has had the row.
    """

    # The largest differences of logits that count as rounding: root mean square over the
    # vocabulary, in units of the logits' spread. Measured: FFT convolution in bf16 gives up to
    # 0.0007 (NEAR) and 0.012 (ANYWHERE); a leak of 1/100 of the signal 0.0027 and more (NEAR).
    NEAR = 0.002  # mean over the probes, right before a change or on average
    ANYWHERE = 0.05  # any one position

    def __init__(self, T: int):
        self.probes = self._probes(T)
        self.near = []  # (difference, position) of every probe so far

    @staticmethod
    def _probes(T: int):
        """Yields (position, repeat one token after it?): the first and last few, then anywhere."""
        yield from ((0, True), (T - 2, False), (1, True), (T - 3, False))
        place = _draw.random()
        while True:
            place = (place + 0.618034) % 1  # the golden ratio: it soon has been everywhere
            p = int(place * (T - 1))
            yield p, True
            yield p + 1, False

    def __call__(self, model, inputs: np.ndarray, logits):
        """Probes once; logits: what model(inputs) gave. Raises Stop."""
        logits = logits.clone()  # a compiled model may return the same memory again
        seen, largest = self._seen(model, inputs, logits)
        if seen is None:
            return
        if (model(inputs) - logits).abs().max() > 0.1 * largest:
            fail(
                "the model gives other logits for the same input: is dropout on in eval mode, "
                "or a thread still training?"
            )
        fail(
            f"the model sees the future (position {seen}): its logits there change with later "
            "tokens or with other rows of the batch. Every position may only read itself and "
            "earlier ones of its own row"
        )

    def _seen(self, model, inputs, logits) -> tuple[int | None, float]:
        """(a position whose logits change and must not, or None; the largest change of a logit)."""
        (B, T), V = inputs.shape, logits.shape[-1]
        probes = list(itertools.islice(self.probes, B))
        changed_inputs = inputs.copy()
        elsewhere = np.roll(inputs.ravel(), _draw.randrange(1, B * T)).reshape(B, T)
        for row, (p, repeated) in enumerate(probes):
            another = (int(inputs[row, min(p + 1, T - 1)]) + _draw.randrange(1, V)) % V
            changed_inputs[row, p + 1 :] = another if repeated else elsewhere[row, p + 1 :]
        changed_logits = model(changed_inputs)
        seen, largest = None, 0.0
        for row, (p, _) in enumerate(probes):
            before = logits[row, : p + 1].float()
            difference = changed_logits[row, : p + 1].float() - before
            part = before[:, :: max(1, V // 512)]  # enough to read the spread from
            center = part.median(-1, keepdim=True).values
            spread = (part - center).abs().median(-1).values.clamp(1e-6, 10)  # ignores outliers
            amount = difference.square().mean(-1).sqrt() / spread
            if not amount.isfinite().all():
                fail("the model's logits are not finite: no score")
            largest = max(largest, difference.abs().max().item())
            # some leaks are strongest right there, others everywhere
            self.near.append((max(amount[-1], amount.mean()).item(), p))
            if amount.max() > self.ANYWHERE:
                seen = int(amount.argmax())
        if seen is None and len(self.near) >= MIN_EXACT_PROBES:
            if sum(amount for amount, _ in self.near) > self.NEAR * len(self.near):
                seen = max(self.near)[1]
        return seen, largest


# ------------------------------------------------------------------------------------- command line


def lock(cache: Path):
    """Holds the cache for one prepare.py at a time, until the returned file is closed.

    Raises Stop, saying who holds it.
    """
    import fcntl

    cache.mkdir(parents=True, exist_ok=True)
    file = open(cache / "lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "?"
        raise Stop(
            f"another prepare.py (process {holder}) is working in {cache}: wait until it is done, "
            "or set AUTORESEARCH_CACHE to another directory"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare.py", description="Prepares a corpus for train.py."
    )
    corpus = parser.add_mutually_exclusive_group()
    corpus.add_argument(
        "--demo",
        action="store_true",
        help="Python's own standard library: offline, no GPU needed",
    )
    corpus.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="your own *.parquet (text), *.jsonl (text), *.txt, *.md",
    )
    corpus.add_argument(
        "--num-shards",
        type=int,
        default=10,
        metavar="N",
        help="climbmix training shards (default 10; -1: all 6,541)",
    )
    for name, (low, high) in LIMITS.items():
        parser.add_argument(
            _option(name),
            type=int,
            metavar="N",
            help=f"{low} to {high}; the default is the corpus's",
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
            raise Stop(f"{_option(name)} {settings[name]}: it must be from {low} to {high}")
    if args.num_shards == 0 or args.num_shards < -1:
        raise Stop(f"--num-shards {args.num_shards}: it must be at least 1, or -1 for all")
    try:
        with lock(cache_dir()):
            prepare(corpus, args.data, args.num_shards, settings, args.force)
    except OSError as error:
        where = error.filename or cache_dir()
        raise Stop(
            f"{where}: {error.strerror or error}; what was finished is kept. "
            "Free some space or set AUTORESEARCH_CACHE, then run the same command again"
        ) from None


if __name__ == "__main__":
    try:
        main()
    except Stop as stop:  # at once: threads still at work write only what the next run can use
        print(stop, file=sys.stderr, flush=True)
        os._exit(1)
