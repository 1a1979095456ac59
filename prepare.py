"""
prepare.py: everything that stays fixed, so that two scores can be compared. Nobody edits it during research.

    uv run prepare.py               climbmix, for a real GPU           uv run prepare.py --data DIR   your own text
    uv run prepare.py --demo        offline, for any machine           uv run prepare.py --runs       the ledger as a table

Notable, in the order of the rooms:
- one manifest says what was prepared; with this file's source it makes the fingerprint: same fingerprint, comparable scores
- downloads resume, retry and are checked; every finished piece is renamed into place, so killing it loses nothing
- byte-pair tokenizer (rustbpe trains, tiktoken encodes); every document is encoded once, into flat uint16 files
- best-fit packing over a memory map: no padding, every row starts with BOS, rows do not depend on the batch size
- the clock, the watchdog and the ledger belong to this file, not to the code under test
- bits per byte from the model's logits, after a check that no position sees a later token

`train.py` imports MAX_SEQ_LEN, TIME_BUDGET (both from the manifest), Tokenizer, make_dataloader, evaluate_bpb and clock.
Importing this file starts nothing.
"""
from __future__ import annotations

import os, signal, sys
if __name__ == "__main__":  # Ctrl-C at any moment: one line and out; an unfinished piece never carries its final name
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"\nFAIL: interrupted; what was finished is kept: "
                                                         b"run the same command again\n"), os._exit(130)))
import argparse, base64, contextlib, ctypes, functools, hashlib, itertools, json, math, platform, random
import re, shutil, subprocess, sysconfig, threading, time, uuid, weakref
from bisect import bisect_right
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

# ---------------------------------------------------------------------------------------------------------- constants

FORMAT = 1  # of the cache; raised when files written before can no longer be read
PRESETS = {  # what is fixed for each corpus; the command line overrides, the manifest remembers
    "climbmix": dict(seq_len=2048, vocab_size=8192, eval_tokens=40 * 524_288, time_budget=300),
    "text": dict(seq_len=2048, vocab_size=8192, eval_tokens=40 * 524_288, time_budget=300),
    "demo": dict(seq_len=256, vocab_size=2048, eval_tokens=262_144, time_budget=300),
}
LIMITS = dict(seq_len=(16, 1 << 20), vocab_size=(260, 1 << 16), eval_tokens=(1, 1 << 40), time_budget=(1, 1 << 20))
MANIFEST = dict(corpus=str, request=dict, key=str, tokenizer_sha256=str, eval_rows=dict(val=int, test=int), **dict.fromkeys(LIMITS, int),
                tokens=[dict(name=str, sha256=str, index_sha256=str, tokens=dict(train=int, val=int, test=int))])  # what is read of it
HELD_OUT_SHARE = 0.05  # of the documents, for validation and again for test, where no file is named for it

HUB_PATH = "/datasets/karpathy/climbmix-400b-shuffle/resolve/main/"
VAL_SHARD, TEST_SHARD = 6542, 6541  # pinned; training shards count up from 0 and end before these
PARALLEL_DOWNLOADS = 4  # one connection rarely fills a line; many only annoy the server
CONNECT_TIMEOUT, READ_TIMEOUT = 10, 30  # seconds; READ is the longest silence, not the whole transfer
MAX_TRIES = 8  # in a row without one new byte: with the back-off about four minutes of dead network
BACKOFF, MAX_WAIT, MAX_RETRY_AFTER = 1.0, 60.0, 300.0  # seconds: first pause (then doubled), longest, longest a server may ask

SPECIAL_TOKENS = ("<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>")  # the last four ids; the first is BOS
# GPT-4's split pattern, but digits in groups of one or two: a small vocabulary has no room for all three-digit numbers
SPLIT_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
                 r"|\s*[\r\n]|\s+(?!\S)|\s+")
TOKENIZER_CHARS, TOKENIZER_DOC_CHARS = 1_000_000_000, 10_000  # the tokenizer sees so much training text, so much of a document
ENCODE_CHARS = 1 << 18  # at a time: the splitter's regular expression overflows its stack on a run of a million blanks
PASSAGE_SLACK = 0.05  # plain text is cut into passages just over a row; so much further to find a blank line to cut at
BUNDLE_BYTES = 1 << 26  # of plain text files, encoded and mixed together: bounds the memory, and what a restart repeats

BATCH_DOCS, POOL_DOCS = 128, 1000  # packing (part of the metric): batches of 128 documents, a pool of 1,000
POSITION_BITS = 40  # of a pool key

_now = time.monotonic  # bound here: whatever is done to the time module later, the clock keeps its own

# --------------------------------------------------------------------------- the cache, its manifest, its fingerprint

class Stop(SystemExit):
    """A failure a person or an agent can act on: uncaught, Python prints its one line on stderr and exits with 1."""
    def __init__(self, message: str):
        super().__init__("FAIL: " + " ".join(str(message).split()))

def cache_dir() -> Path:
    return Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser()

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

def canonical(value) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

def signed(record: dict) -> bytes:
    """One JSON line with a checksum of itself: finds damage and edits by hand; it is no secret."""
    return json.dumps({**record, "checksum": hashlib.sha256(canonical(record)).hexdigest()[:16]}).encode() + b"\n"

def parse_signed(line: bytes) -> dict:
    """The record that `signed` wrote. Raises ValueError on anything else."""
    try:
        record = json.loads(line)
        if record.pop("checksum") != hashlib.sha256(canonical(record)).hexdigest()[:16]:
            raise ValueError("its checksum does not match")
        return record
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a record ({type(error).__name__})") from None

def _has_shape(value, shape) -> bool:
    if isinstance(shape, type):
        return type(value) is shape and not (shape is int and value < 0)
    if isinstance(shape, list):
        return isinstance(value, list) and all(_has_shape(one, shape[0]) for one in value)
    return isinstance(value, dict) and all(_has_shape(value.get(key), inner) for key, inner in shape.items())

@functools.lru_cache
def _read_manifest(path: Path) -> dict:
    again = "run the same `uv run prepare.py ...` again with --force"
    try:
        record = parse_signed(path.read_bytes())
    except FileNotFoundError:
        raise Stop(f"nothing is prepared in {path.parent}: run `uv run prepare.py` (a GPU), `uv run prepare.py --data DIR` "
                   "(your text) or `uv run prepare.py --demo` (any machine, offline); a half-done one goes on") from None
    except (ValueError, OSError) as error:
        raise Stop(f"{path} is damaged ({error}): {again}") from None
    if record.get("format") != FORMAT:
        raise Stop(f"{path} has format {record.get('format')}, this prepare.py reads {FORMAT}: {again}")
    if not _has_shape(record, MANIFEST) or not all(low <= record[name] <= high for name, (low, high) in LIMITS.items()):
        raise Stop(f"{path} lacks what a manifest must hold: {again}")
    return record

def manifest() -> dict:
    """What is prepared. Raises Stop, with the command to type, where nothing is, or where it is damaged."""
    return _read_manifest(cache_dir() / "manifest.json")

def set_dir() -> Path:
    return cache_dir() / Path(manifest()["key"]).name

def fingerprint() -> str:
    """12 hex digits of the manifest and this file's source."""
    source = Path(__file__).read_bytes().replace(b"\r\n", b"\n")
    return hashlib.sha256(canonical(manifest()) + source).hexdigest()[:12]

def __getattr__(name: str):  # `from prepare import MAX_SEQ_LEN` reads the manifest, and only then
    if name in ("MAX_SEQ_LEN", "TIME_BUDGET"):
        return manifest()["seq_len" if name == "MAX_SEQ_LEN" else "time_budget"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

def _environment(name: str, default: str, pattern: str) -> str:
    value = os.environ.get(name) or default
    if not re.fullmatch(pattern, value):
        raise Stop(f"{name}={value}: it must match {pattern}")
    return value

def seed() -> int:
    """42, or $AUTORESEARCH_SEED: to measure the noise floor, not something to tune."""
    return int(_environment("AUTORESEARCH_SEED", "42", r"\d{1,9}"))

def split_name() -> str:
    """The split that is scored: val, or test with $AUTORESEARCH_SPLIT=test: once, at the very end, by the human."""
    return _environment("AUTORESEARCH_SPLIT", "val", "val|test")

# ------------------------------------------------------------------------------------------ documents: own text, demo

@dataclass
class Source:
    """A parquet or jsonl file, or a bundle of plain text files: encoded as a unit, restarted as a unit."""
    name: str
    paths: list[Path]
    split: str | None  # None: each document goes by its sha256

    def describe(self) -> dict:
        digests = [sha256_of(path) for path in self.paths]
        whole = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        return {"name": self.name, "files": len(digests), "size": sum(p.stat().st_size for p in self.paths), "sha256": whole}

def text_sources(directory: Path) -> list[Source]:
    """Every *.parquet, *.jsonl, *.txt and *.md below `directory`, where links to folders are not followed."""
    if not directory.is_dir():
        raise Stop(f"--data {directory}: there is no such directory")
    found = [Path(root, name) for root, _, names in os.walk(directory) for name in names]
    splits = {path: named and named[0] for path in sorted(found) for named in [re.match("val|test", path.name)]
              if path.suffix in (".parquet", ".jsonl", ".txt", ".md") and path.is_file()}
    rest = "train" if {"val", "test"} <= {*splits.values()} else None
    return _bundled(directory, {path: split or rest for path, split in splits.items()})

def demo_sources() -> list[Source]:
    """The running Python's own standard library: about 30 MB of text that every machine has."""
    def is_text(path):  # a few of its test files are broken on purpose
        with contextlib.suppress(UnicodeDecodeError):
            return bool(path.read_text("utf-8"))
    directory = Path(sysconfig.get_paths()["stdlib"])
    found = sorted(p for p in directory.rglob("*.py") if not {"site-packages", "dist-packages"} & {*p.parts} and is_text(p))
    return _bundled(directory, dict.fromkeys(found))

def _bundled(directory: Path, splits: dict[Path, str | None]) -> list[Source]:
    name = {path: path.relative_to(directory).as_posix() for path in splits}
    sources = [Source(name[path], [path], split) for path, split in splits.items() if path.suffix in READERS]
    for split in dict.fromkeys(splits.values()):
        paths = [path for path in splits if splits[path] == split and path.suffix not in READERS]
        paths.sort(key=lambda path: hashlib.sha256(os.fsencode(name[path])).digest())  # every bundle a fair sample
        bundles, size = [], BUNDLE_BYTES
        for path in paths:
            if size >= BUNDLE_BYTES:
                bundles, size = [*bundles, []], 0
            bundles[-1].append(path)
            size += path.stat().st_size
        sources += [Source(name[bundle[0]], bundle, split) for bundle in bundles]
    return sources

def read(source: Source, size: int = TOKENIZER_DOC_CHARS, measure=len):
    """Yields (group, sha256 of the document, text) in file order; a group is a parquet row group, or else the whole source.

    A plain text file is one document, given out in passages (see _passages); as neighbours are alike, those are mixed.
    Raises Stop, naming file and place, on anything that is not text.
    """
    if reader := READERS.get(source.paths[0].suffix):
        for group, text in reader(source.paths[0]):
            yield group, hashlib.sha256(text.encode()).digest(), text
    else:
        passages = ((0, digest, text) for path in source.paths for digest in [bytes.fromhex(sha256_of(path))]
                    for text in _passages(path, size, measure))
        while window := list(_up_to(BUNDLE_BYTES, passages)):  # a file may be far larger
            yield from sorted(window, key=lambda passage: hashlib.sha256(passage[2].encode()).digest())

def _up_to(chars: int, passages):
    for passage in passages:
        yield passage
        if (chars := chars - len(passage[2])) <= 0:
            return

def documents(source: Source, size: int = TOKENIZER_DOC_CHARS, measure=len, held_out: dict[bytes, str] = {}):
    """Yields (split, group, text) as `read` does. held_out: {sha256: split} of the documents in files named for a split."""
    named = {*held_out.values()}
    for group, digest, text in read(source, size, measure):
        share = int.from_bytes(digest[:8], "big") / 2**64
        drawn = "val" if share < HELD_OUT_SHARE else "test" if share < 2 * HELD_OUT_SHARE else "train"
        split = source.split or ("train" if drawn in named else drawn)
        if text and held_out.get(digest, split) == split:  # no document on two sides
            yield split, group, text

def _parquet_documents(path: Path):
    import pyarrow as pa, pyarrow.parquet as pq
    try:
        file = pq.ParquetFile(path)
        if "text" not in (names := file.schema_arrow.names):
            raise Stop(f"{path} has no column `text`, only: {', '.join(names)[:200]}")
        for group in range(file.num_row_groups):
            for rows in file.iter_batches(row_groups=[group], columns=["text"], batch_size=1024):
                yield from ((group, text) for text in rows.column(0).cast(pa.string()).to_pylist() if text)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise Stop(f"{path} is not readable as parquet ({str(error)[:200]}): replace it or remove it") from None

def well_formed(text: str) -> str:
    """A lone surrogate, which JSON and Python can carry and UTF-8 cannot, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

def _jsonl_documents(path: Path):
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    yield 0, well_formed(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise Stop(f"{path}, line {number}: not a JSON object with a string `text` ({type(error).__name__})") from None

def _passages(path: Path, size: int, measure):
    """Cuts a text file at line ends into passages of just over `size`, so that packed rows are full and lose little.

    measure(line) says how much a line adds. A blank line no further than PASSAGE_SLACK on is preferred as the end.
    """
    held, total = [], 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            while line := file.readline(size):  # or a piece of a longer one
                held.append(line)
                total += measure(line)
                if total >= size and (not line.strip() or total >= size * (1 + PASSAGE_SLACK)):
                    yield "".join(held)
                    held, total = [], 0
        yield "".join(held)
    except UnicodeDecodeError as error:
        raise Stop(f"{path} is not UTF-8 ({error.reason}): convert it (iconv -f LATIN1 -t UTF-8) or remove it") from None

READERS = {".parquet": _parquet_documents, ".jsonl": _jsonl_documents}  # anything else is plain text

# -------------------------------------------------------------------------------------------------- documents: climbmix

class Retry(Exception):
    """This download may go better next time. wait: seconds the server asked for; discard: the bytes at hand are wrong."""
    def __init__(self, reason: str, wait: float | None = None, discard: bool = False):
        super().__init__(reason)
        self.wait, self.discard = wait, discard

def climbmix_sources(num_shards: int) -> list[Source]:
    """The shards in order, validation and test last, downloading what is missing (num_shards < 0: all)."""
    numbers = range(TEST_SHARD if num_shards < 0 else min(num_shards, TEST_SHARD))
    splits = {**{n: "train" for n in numbers}, VAL_SHARD: "val", TEST_SHARD: "test"}
    (directory := cache_dir() / "shards").mkdir(exist_ok=True)
    sources = [Source(name := f"shard_{n:05d}.parquet", [directory / name], split) for n, split in splits.items()]
    missing = [source.paths[0] for source in sources if not source.paths[0].exists()]
    in_parallel(download, missing, PARALLEL_DOWNLOADS, "downloaded")
    return sources

def download(final: Path, progress: Progress):
    """One shard: resumed, retried, size and sha256 checked, opened as parquet, and only then renamed into place.

    Raises Stop, naming the file, after the last try; what has arrived stays in NAME.part for the next run.
    """
    part, tries, most = final.with_name(final.name + ".part"), 0, 0
    while True:
        part.touch()
        try:
            digest = _fetch(final.name, part, part.stat().st_size, progress)
            if digest and sha256_of(part) != digest:
                raise Retry("its sha256 is wrong", discard=True)
            try:
                next(_parquet_documents(part), None)
            except Stop as problem:
                raise Retry(str(problem.code).removeprefix("FAIL: "), discard=True) from None
            break
        except Retry as failure:
            if failure.discard:
                part.write_bytes(b"")
            arrived = part.stat().st_size
            tries = 0 if arrived > most else tries + 1  # a line that drops but moves on is not a failure
            most = max(most, arrived)
            if tries >= MAX_TRIES:
                raise Stop(f"{final.name}: {failure}; what has arrived is kept: run the same command again") from None
            pause = failure.wait if failure.wait is not None else min(BACKOFF * 2**tries, MAX_WAIT) * random.uniform(0.5, 1)
            progress.say(f"{final.name}: {failure}; trying again in {pause:.0f} s\n")
            time.sleep(pause)
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, final)

def _fetch(name: str, part: Path, have: int, progress: Progress) -> str | None:
    """Appends to `part` the bytes after `have`; returns the sha256 that the server gave for the whole file, if it did."""
    import requests
    url = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/") + HUB_PATH + name
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    if token := os.environ.get("HF_TOKEN", "").strip():  # requests drops this header where a redirect leaves the host
        headers["Authorization"] = f"Bearer {token}"
    try:
        host = urlsplit(url).netloc.rpartition("@")[2]
        with requests.get(url, headers=headers, stream=True, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT)) as reply:
            status = reply.status_code
            linked = (r.headers.get("X-Linked-ETag", "").removeprefix("W/").strip('"') for r in [*reply.history, reply])
            digest = next((etag for etag in linked if re.fullmatch("[0-9a-f]{64}", etag)), None)
            place = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", reply.headers.get("Content-Range", ""))
            if status == 416 and place and place[2] == str(have):
                return digest  # complete already: only the rename was missing
            if status == 416 or status == 206 and not (place and place[1] == str(have)):
                raise Retry(f"{host} does not go on at byte {have:,}", discard=True)
            if status in (408, 429) or status >= 500:
                asked = reply.headers.get("Retry-After", "")
                raise Retry(f"{host} answered {status}", wait=min(int(asked), MAX_RETRY_AFTER) if asked.isdigit() else None)
            if status not in (200, 206):
                raise Stop(f"{name}: {host} answered {status}" + " (check HF_TOKEN)" * (status in (401, 403)))
            length = reply.headers.get("Content-Length", "")
            total = int(length) + have * (status == 206) if length.isdigit() else None
            with open(part, "ab" if status == 206 else "wb") as file:
                for block in reply.iter_content(1 << 14):  # a block that is not full is lost when the line drops
                    file.write(block)
                    progress.add(len(block))
    except ValueError as error:  # an error's text may hold the token or a signed address: only its kind is shown
        raise Stop(f"{name}: HF_ENDPOINT or HF_TOKEN cannot be used ({type(error).__name__})") from None
    except requests.RequestException as error:
        raise Retry(f"{type(error).__name__} at {host}") from None
    if total is not None and (size := part.stat().st_size) != total:
        raise Retry(f"{size:,} of {total:,} bytes arrived", discard=size > total)
    return digest

class Progress:
    """Files, MB, rate, time left: one line rewritten on a terminal, one line a file otherwise. Threads share it."""
    def __init__(self, verb: str, files: int):
        self.verb, self.files, self.done, self.bytes, self.began, self.drawn = verb, files, 0, 0, _now(), _now()
        self.lock, self.terminal = threading.Lock(), sys.stderr.isatty()

    def say(self, line: str):
        print(("\r\033[K" if self.terminal else "") + line, end="", file=sys.stderr, flush=True)

    def add(self, count: int = 0, finished: str | None = None):
        with self.lock:
            self.bytes, self.done = self.bytes + count, self.done + (finished is not None)
            megabytes, seconds = self.bytes / 1e6, max(_now() - self.began, 1e-3)
            if finished and not (self.terminal and self.done < self.files):
                self.say(f"{self.verb} {finished} ({self.done}/{self.files}, {seconds:.1f} s)\n")
            elif self.terminal and _now() - self.drawn > 0.2:
                self.drawn, left = _now(), f", about {seconds / self.done * (self.files - self.done):.0f} s left" if self.done else ""
                self.say(f"{self.verb} {self.done}/{self.files}, {megabytes:,.0f} MB at {megabytes / seconds:.1f} MB/s{left}")

def in_parallel(function, items: list, workers: int, verb: str) -> list:
    """[function(item, progress), ...] by threads. A failure is raised at once: what is finished stays finished."""
    progress, pool = Progress(verb, len(items)), ThreadPoolExecutor(workers)
    def one(item):
        result = function(item, progress)
        progress.add(finished=item.name)
        return result
    futures = [pool.submit(one, item) for item in items]
    done = wait(futures, return_when=FIRST_EXCEPTION).done
    pool.shutdown(wait=False, cancel_futures=True)
    for future in done:
        future.result()
    return [future.result() for future in futures]

# ------------------------------------------------------------------------------------------------------------ tokenizer

class Tokenizer:
    """Byte-pair encoding, stored as data: a `base64 rank` line for each token (tiktoken's format), nothing that can run.

    token_bytes: int64 (vocabulary size,), how many bytes a token stands for; 0 for the special ones.
    """
    def __init__(self, ranks: list[bytes]):
        import tiktoken
        self.ranks, ids = ranks, {token: rank for rank, token in enumerate(ranks)}
        specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding("autoresearch", pat_str=SPLIT_PATTERN, mergeable_ranks=ids, special_tokens=specials)
        self.token_bytes = np.array([len(token) for token in ranks] + [0] * len(specials), dtype=np.int64)

    @classmethod
    def train(cls, texts, vocab_size: int) -> Tokenizer:
        """Trains on an iterable of strings. vocab_size counts the special tokens; very little text gives fewer."""
        import rustbpe
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(texts, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        return cls([bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])])

    def to_bytes(self) -> bytes:
        return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(self.ranks))

    @classmethod
    def from_directory(cls, directory: str | Path | None = None) -> Tokenizer:
        """The prepared tokenizer, checked against the manifest, or the one in `directory`. Raises Stop on damage."""
        path = Path(directory or set_dir()) / "tokenizer.tiktoken"
        try:
            raw = path.read_bytes()
            if directory is None and hashlib.sha256(raw).hexdigest() != manifest()["tokenizer_sha256"]:
                raise ValueError("not the one that was prepared")
            lines = [line.split(b" ") for line in raw.splitlines()]
            ranks = [base64.b64decode(token, validate=True) for token, _ in lines]
            if [int(rank) for _, rank in lines] != [*range(len({*ranks} - {b""}))] or not {bytes([b]) for b in range(256)} <= {*ranks}:
                raise ValueError("tokens doubled, empty or out of order, or single bytes missing")
            return cls(ranks)
        except (OSError, ValueError) as error:
            raise Stop(f"{path} is damaged or missing ({error}): run the same `uv run prepare.py ...` with --force") from None

    def encode(self, text: str | list[str], prepend: int | str | None = None) -> list:
        """Ids of a text, or a list of them for a list of texts; special tokens spelled in a text are plain text there.

        prepend: an id or a special token's name to stand in front. A lone surrogate is encoded as U+FFFD.
        """
        if not isinstance(text, str):
            return [self.encode(one, prepend) for one in text]
        front = self.encoding.encode_single_token(prepend) if isinstance(prepend, str) else prepend
        return ([] if front is None else [front]) + self.encode_array(well_formed(text)).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        pieces = [text[i : i + ENCODE_CHARS] for i in range(0, len(text), ENCODE_CHARS)] or [""]
        return np.concatenate([self.encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces])

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)

    def get_vocab_size(self) -> int:
        return len(self.token_bytes)

    def get_bos_token_id(self) -> int:
        return len(self.ranks)

# ------------------------------------------------------------------------------------------------ token cache, packing

SPLITS = ("train", "val", "test")

def encode_source(texts, progress: Progress, tokenizer: Tokenizer, path: Path) -> dict:
    """Writes a source's tokens and then, as the sign that they are whole, their index; returns its manifest entry.

    texts: its (split, group, text).
    PATH.bin: uint16, all documents one after another, each with BOS in front.
    PATH.idx: int32 (documents, 3): place of its split in SPLITS, its row group, its tokens.
    """
    data, index_path = path.with_suffix(".bin"), path.with_suffix(".idx")
    if not index_path.exists():
        bos, index = [tokenizer.get_bos_token_id()], []
        with open(data, "wb") as file:
            for split, group, text in texts:
                ids = np.concatenate([bos, tokenizer.encode_array(text)])
                file.write(ids.astype(np.uint16).data)
                index.append((SPLITS.index(split), group, len(ids)))
                progress.add(len(text))
            file.flush()
            os.fsync(file.fileno())
        write_atomically(index_path, np.array(index, dtype=np.int32).reshape(-1, 3).tobytes())
    index = np.fromfile(index_path, dtype=np.int32).reshape(-1, 3)
    tokens = {split: int(index[index[:, 0] == i, 2].sum()) for i, split in enumerate(SPLITS)}
    return {"name": path.name, "sha256": sha256_of(data), "index_sha256": sha256_of(index_path), "tokens": tokens}

def open_tokens(directory: Path, entry: dict, verify: bool) -> tuple[np.ndarray, np.ndarray]:
    """(uint16 tokens as a memory map, int32 index) of a manifest entry; see encode_source. Raises Stop on damage.

    The index and the size are always checked, the tokens' sha256 with `verify`: for the scored splits.
    """
    path = directory / (Path(entry["name"]).name + ".bin")
    try:
        raw = path.with_suffix(".idx").read_bytes()
        if hashlib.sha256(raw).hexdigest() != entry["index_sha256"] or path.stat().st_size != 2 * sum(entry["tokens"].values()):
            raise ValueError("not what was written")
        tokens = np.asarray(np.memmap(path, dtype=np.uint16, mode="r"))  # a plain view: slicing np.memmap itself is slow
        if verify and hashlib.sha256(tokens).hexdigest() != entry["sha256"]:
            raise ValueError("not the tokens that were written")
    except (OSError, ValueError) as error:
        raise Stop(f"{path} is damaged or missing ({error}): run the same `uv run prepare.py ...` with --force") from None
    return tokens, np.frombuffer(raw, dtype=np.int32).reshape(-1, 3).astype(np.int64)

class Packer:
    """Best-fit packing of documents into rows. It is part of the metric, so the rule is exact.

    Whole batches of documents are added until the pool holds POOL_DOCS. Then the longest document that fits the space left
    goes in, the earliest added on a tie; if none fits, the shortest (earliest on a tie) is cut to fill the row, its rest
    dropped. The pool is a sorted list of integers, length << POSITION_BITS | (MASK - position): each choice is a bisection.
    """
    MASK = (1 << POSITION_BITS) - 1

    def __init__(self, directory: Path, entries: list[dict], split: str, row_length: int, repeat: bool):
        self.row_length, self.epoch, self.added = row_length, 1, 0
        self.pool, self.where = [], {}  # where: position -> (tokens, index of the first)
        self.batches = self._batches(directory, [e for e in entries if e["tokens"][split]], split, repeat)

    def _batches(self, directory, entries, split, repeat):
        """Yields (epoch, tokens, firsts, lengths) of up to BATCH_DOCS documents that do not cross a row group."""
        for epoch in itertools.count(1) if repeat and entries else [1]:
            for entry in entries:
                tokens, index = open_tokens(directory, entry, verify=split != "train")
                firsts, mine = np.cumsum(index[:, 2]) - index[:, 2], index[:, 0] == SPLITS.index(split)
                firsts, (_, groups, lengths) = firsts[mine], index[mine].T
                ends = [*(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(groups)]
                for begin, end in zip([0, *ends], ends):
                    for i in range(begin, end, BATCH_DOCS):
                        some = slice(i, min(i + BATCH_DOCS, end))
                        yield epoch, tokens, firsts[some].tolist(), lengths[some].tolist()

    def _fill_pool(self):
        while len(self.pool) < POOL_DOCS and (batch := next(self.batches, None)):
            self.epoch, tokens, firsts, lengths = batch
            for self.added, (first, length) in enumerate(zip(firsts, lengths), self.added + 1):
                self.where[self.added] = tokens, first
                self.pool.append(length << POSITION_BITS | (self.MASK - self.added))
            self.pool.sort()

    def fill(self, rows: np.ndarray) -> int:
        """Writes rows, uint16 (n, row_length); returns how many: fewer than n only at the end of a single pass."""
        pool, where, mask = self.pool, self.where, self.MASK
        for number, row in enumerate(rows):
            filled = 0
            while filled < self.row_length:
                if len(pool) < POOL_DOCS:
                    self._fill_pool()
                    if not pool:
                        return number
                space = self.row_length - filled
                best = bisect_right(pool, space << POSITION_BITS | mask) or bisect_right(pool, pool[0] | mask)
                key = pool.pop(best - 1)
                tokens, first = where.pop(mask - (key & mask))
                length = min(key >> POSITION_BITS, space)
                row[filled : filled + length] = tokens[first : first + length]
                filled += length
        return len(rows)

# ----------------------------------------------------------------------------------------------------------- dataloader

def training_device():
    """CUDA (torch calls ROCm so too), Apple's MPS, or the CPU."""
    import torch
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")

def device_name(device) -> str:
    import torch
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, TypeError):
        return re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1].strip()
    return platform.processor() or platform.machine()

def make_dataloader(tokenizer: Tokenizer, B: int, T: int, split: str, device=None) -> DataLoader:
    """Yields (inputs, targets, epoch), int64 of shape (B, T) on `device` (default: training_device()).

    `train` goes on for ever, and its first batch starts the clock; `val` and `test` are one pass, whose last batch may
    have fewer rows. Targets are the inputs shifted by one; every row starts with BOS. Raises Stop on a damaged cache.
    """
    prepared, training = manifest(), split == "train"
    if split not in SPLITS or tokenizer.get_vocab_size() != prepared["vocab_size"]:
        raise ValueError(f"split {split!r}, vocabulary {tokenizer.get_vocab_size()}: the prepared set has {SPLITS} "
                         f"and {prepared['vocab_size']}")
    device = device or training_device()
    packer = Packer(set_dir(), prepared["tokens"], split, T + 1, repeat=training)
    loader = DataLoader(pack_batches(packer, B, T, prepared["vocab_size"], device.type == "cuda"), device, training)
    if training:
        clock._expect(loader)
    return loader

def pack_batches(packer: Packer, B: int, T: int, vocab_size: int, pinned: bool):
    """Yields (int64 (2, rows, T): inputs and targets, epoch), fresh memory each time."""
    import torch
    rows = np.empty((B, T + 1), dtype=np.uint16)
    while count := packer.fill(rows):
        if rows[:count].max() >= vocab_size:
            raise Stop("the token cache holds ids beyond the vocabulary: run the same `uv run prepare.py ...` with --force")
        batch = torch.empty((2, count, T), dtype=torch.int64, pin_memory=pinned)
        view = batch.numpy()
        view[0], view[1] = rows[:count, :-1], rows[:count, 1:]
        yield batch, packer.epoch

class DataLoader:
    """What make_dataloader returns: a thread packs the next batch while the current one trains; its exceptions come here."""
    def __init__(self, batches, device, training: bool):
        self.batches, self.device, self.training = batches, device, training
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="packer")  # ends with this object, at exit after one batch
        self.ahead = self.thread.submit(next, batches, None)

    def __iter__(self):
        return self

    def __next__(self):
        if (item := self.ahead.result()) is None:
            raise StopIteration
        self.ahead = self.thread.submit(next, self.batches, None)
        batch, epoch = item
        if self.training:
            clock._hand_out(batch[0].numel())
        # From pinned memory the copy is asynchronous, and torch's host allocator gives that memory out again only when
        # the copies that read it are done: nothing is overwritten while anything can still read it.
        inputs, targets = batch.to(self.device, non_blocking=True)
        return inputs, targets, epoch

# -------------------------------------------------------------------------------------------- clock, watchdog, ledger

class Clock:
    """The run's time. It starts when the first training batch is handed out and ends when the score is asked for."""
    def __init__(self):
        self.made, self.began, self.ended = _now(), None, None
        self.run, self.tokens = None, 0  # run: what the ledger says of it
        self.script = Path(getattr(sys.modules["__main__"], "__file__", None) or "train.py").resolve()
        self.sha256 = sha256_of(self.script) if self.script.is_file() else None  # now: as it is read, not as it is edited later

    @property
    def elapsed(self) -> float:
        """Training seconds so far."""
        return 0.0 if self.began is None else (self.ended or _now()) - self.began

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, 0 to 1."""
        return min(self.elapsed / manifest()["time_budget"], 1.0)

    @property
    def expired(self) -> bool:
        return self.progress >= 1.0

    def _expect(self, loader: DataLoader):
        """A training loader exists: notes what is about to run; as long as the loader lives, so does its watchdog."""
        self.run, budget = self.run or _describe_run(loader.device), manifest()["time_budget"]
        left = _watchdog_limit(budget) - (_now() - self.made)
        weakref.finalize(loader, _arm_watchdog(left)).atexit = False  # still set while the process shuts down

    def _hand_out(self, tokens: int):
        self.tokens += tokens
        if self.began is None:
            self.run["startup_seconds"] = round(_now() - self.made, 1)
            _append_to_ledger({"event": "start", **self.run, "time": _utc()})
            self.began = _now()

    def _score_asked(self, device):
        if self.ended:
            fail("this run has been scored already: one score for one training")
        self.run = self.run or _describe_run(device)
        if self.began is not None:
            if device.type != "cpu":  # queued work is training too
                import torch
                torch.accelerator.synchronize(device)
            self.ended, budget = _now(), manifest()["time_budget"]
            if self.elapsed > budget + max(0.05 * budget, 5):
                fail(f"trained {self.elapsed:.0f} s on a {budget} s budget: stop before the step that would not fit")

clock = Clock()

def fail(message: str):
    """Ends the run without a score: into the ledger, then as Stop."""
    _end_run(failure=message)
    raise Stop(message)

def _end_run(**result):
    run, clock.run = clock.run, None  # a run ends once
    if run:
        _append_to_ledger({"event": "end", **run, "time": _utc(), "training_seconds": round(clock.elapsed, 1),
                           "tokens": clock.tokens, **result})

def _utc() -> str:
    return f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"

def _describe_run(device) -> dict:
    """What the ledger says of a run; git's part is null where there is no git."""
    script = clock.script
    def git(*words):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(["git", "-C", str(script.parent), *words], capture_output=True, text=True, timeout=10)
            return done.stdout.strip() if done.returncode == 0 else None
    changed = git("status", "--porcelain", "--", script.name)
    return {"run": uuid.uuid4().hex[:12], "time": _utc(), "repo": git("rev-parse", "--show-toplevel"), "pid": os.getpid(),
            "branch": git("rev-parse", "--abbrev-ref", "HEAD"), "commit": git("rev-parse", "HEAD"), "script": script.name,
            "changed": None if changed is None else bool(changed),  # does the script differ from that commit?
            "train_sha256": clock.sha256, "fingerprint": fingerprint(), "seed": seed(),
            "device": device_name(device), "split": split_name()}

def _append_to_ledger(record: dict):
    import fcntl
    path = cache_dir() / "autoresearch.jsonl"
    try:
        with open(path, "ab+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"  # the next line must not stick to it
            line = b"\n" * torn + signed(record)
            if file.write(line) != len(line):
                raise OSError(None, "only a part was written: is the disk full?")
            os.fsync(file.fileno())
    except OSError as error:
        print(f"warning: the ledger {path} cannot be written ({error.strerror}); the run goes on", file=sys.stderr, flush=True)

def read_ledger(start=0) -> tuple[list[dict], int]:
    """(the ledger's records, oldest first; how many lines were damaged and skipped)."""
    path, records, damaged = cache_dir() / "autoresearch.jsonl", [], 0
    for line in filter(None, path.read_bytes()[start:].split(b"\n") if path.is_file() else []):
        try:
            records.append(parse_signed(line))
        except ValueError:
            damaged += 1
    return records, damaged

COLUMNS = "{:20}  {:8}  {:5}  {:>8}  {:>7}  {:>8}  {:>4}  {}"

def show_runs():
    """The ledger as a table, newest last; a start without an end has crashed, or is running."""
    records, damaged = read_ledger()
    rows = {}
    for r in records:
        try:
            status = r.get("failure") or ("scored" if r["event"] == "end" else "running" if _alive(r["pid"]) else "crashed")
            score = f"{r['score']:.6f}" if "score" in r else "-"
            tokens = f"{r['tokens'] / 1e6:.1f}" if "tokens" in r else "-"
            commit = (r["commit"] or "-")[:7] + "*" * bool(r["changed"])
            row = COLUMNS.format(r["time"], commit, r["split"], score, r.get("training_seconds", "-"), tokens, r["seed"], status)
            rows[r["run"]] = "".join(c if c.isprintable() else "?" for c in row)  # the end replaces the start
        except (KeyError, TypeError, ValueError, OverflowError):  # signed, but not by this file
            damaged += 1
    print(COLUMNS.format("time", "commit", "split", "score", "seconds", "M tokens", "seed", "status"), *rows.values(), sep="\n")
    print(f"{len(rows)} runs" + f", {damaged} damaged lines skipped" * bool(damaged) + "; * has uncommitted changes")

def _alive(pid: int) -> bool:
    try:
        return os.kill(pid, 0) is None
    except OSError as error:
        return isinstance(error, PermissionError)

def _watchdog_limit(budget: int) -> float:
    return max(2 * budget, budget + 300)

def _arm_watchdog(seconds: float):
    """Ends this process `seconds` from now with exit code 124, whatever hangs. Returns a function that calls it off.

    A thread does it, children included. Where native code holds the GIL no Python thread runs: two seconds later two
    timers of libc do it, whose callbacks are puts and _exit themselves (timer_create with SIGEV_THREAD; Linux only).
    """
    line = b"FAIL: timeout: the process was still running after its time; train.py must stop by `clock` and then score"
    def expire():
        _end_run(failure="timeout")
        with contextlib.suppress(OSError):
            for children in Path("/proc/self/task").glob("*/children"):
                for pid in children.read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
        os.write(1, b"\n" + line + b"\n")
        os._exit(124)
    thread = threading.Timer(seconds := max(seconds, 0), expire)
    thread.daemon = True
    thread.start()
    if not sys.platform.startswith("linux"):
        return thread.cancel
    libc, timers, text = ctypes.CDLL("librt.so.1"), [], ctypes.create_string_buffer(line)
    libc.setvbuf(ctypes.c_void_p.in_dll(libc, "stdout"), None, 2, 0)  # unbuffered: _exit does not flush
    for name, argument, delay in (("puts", ctypes.addressof(text), 2), ("_exit", 124, 3)):
        event = (ctypes.c_uint64 * 8)(argument, 2 << 32, ctypes.cast(getattr(libc, name), ctypes.c_void_p).value)
        timer, when = ctypes.c_void_p(), (ctypes.c_long * 4)(0, 0, int(seconds) + delay, 0)  # struct sigevent, itimerspec
        if libc.timer_create(1, event, ctypes.byref(timer)) == 0:  # 1: CLOCK_MONOTONIC
            libc.timer_settime(timer, 0, when, None)
            timers.append(timer)
    return lambda _keep=text: (thread.cancel(), [libc.timer_delete(timer) for timer in timers])

# ----------------------------------------------------------------------------------------------------------- evaluation

LEAK_SHARE = 0.015  # of the evaluation's forward passes goes into the leak check, but at least LEAK_POSITIONS are probed
LEAK_POSITIONS = 8
_leak_draw = random.SystemRandom()  # no seed's: what cannot be foreseen cannot be fitted
# Largest differences of logits that count as rounding: root mean square over the vocabulary, in units of the logits' spread.
# Measured: FFT convolution in bf16 gives up to 0.0007 and 0.012; a leak of 1/100 of the signal, 0.0027 and more (NEAR).
LEAK_NEAR, LEAK_ANYWHERE = 0.002, 0.05  # mean over the probes, right before a change or on average; any one position

def evaluate_bpb(model, tokenizer: Tokenizer, batch_size: int) -> float:
    """Bits per byte of `model` on the scored split: cross-entropy in nats / (ln 2 x bytes), both summed in float64.

    model(inputs), int64 (batch_size, T), returns logits (batch_size, T, vocabulary size). It never sees the targets, the
    loss is computed here in float32, and targets of no bytes (special tokens) count in neither sum. The rows are the first
    evaluation tokens / T of the split's packing, each once, whatever batch_size is. Ends the clock; writes the ledger.
    Raises Stop for a run over its budget, a model that sees the future (see _leak), that is random or still in
    training, or whose logits are not finite or of the wrong shape.
    """
    import torch
    device, training = next(model.parameters()).device, model.training
    clock._score_asked(device)
    weights = lambda: torch.stack([p.detach().flatten().view(torch.uint8).sum() for p in model.parameters()])
    before = weights()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            score = _score(model, tokenizer, batch_size, device)
    finally:
        model.train(training)
    if not torch.equal(weights(), before):
        fail("the model's weights changed while it was scored: end every thread that trains before asking for the score")
    _end_run(score=score)
    return score

def _score(model, tokenizer, batch_size, device) -> float:
    import torch
    split, T, V = split_name(), manifest()["seq_len"], tokenizer.get_vocab_size()
    rows = manifest()["eval_rows"][split]
    if not rows:
        fail(f"the {split} split is too small for one row of {T + 1} tokens")
    batch_size = min(batch_size, rows)
    batches = math.ceil(rows / batch_size)
    loader = make_dataloader(tokenizer, batch_size, T, split, device)
    token_bytes = torch.from_numpy(tokenizer.token_bytes).to(device)
    nats, count = torch.zeros((), dtype=torch.float64, device="cpu" if device.type == "mps" else device), 0  # mps: no float64
    piece = max(1, (1 << 18 if device.type == "cpu" else 1 << 25) // V)  # 128 MB of float32; on a CPU what its cache holds
    rounds, near, probes = max(math.ceil(LEAK_POSITIONS / batch_size), int(batches * LEAK_SHARE) - 1), [], _leak_probes(T)
    probed = [0, *_leak_draw.choices(range(batches), k=rounds - 1)]  # a model cannot foresee which calls these are

    def forward(inputs):
        logits = model(inputs.clone())  # memory of its own, which no target shares and no write spoils
        if not isinstance(logits, torch.Tensor) or logits.shape != (*inputs.shape, V):
            fail(f"model(inputs) returned {tuple(getattr(logits, 'shape', [type(logits).__name__]))}, "
                 f"not logits of shape (batch, sequence, vocabulary) = {(*inputs.shape, V)}")
        return logits

    model.eval()
    whole = torch.empty((batch_size, T), dtype=torch.int64, device=device)  # a short last batch keeps rows of the one before
    for number in range(batches):
        if (batch := next(loader, None)) is None:
            raise Stop(f"the {split} split has fewer rows than its manifest says: run the same `uv run prepare.py ...` with --force")
        inputs, targets, _ = batch
        inputs, targets = inputs[:rows], targets[:rows].flatten()
        rows -= len(inputs)
        whole[: len(inputs)] = inputs
        logits = forward(whole)
        for flat, target in zip(logits.flatten(0, 1)[: len(targets)].split(piece), targets.split(piece)):
            flat, counted = flat.float(), token_bytes[target]
            losses = torch.nn.functional.cross_entropy(flat, target, reduction="none")
            losses = losses * (counted > 0) + 0 * flat.sum(-1)  # one logit that is not finite spoils the sum
            nats += losses.to(nats.device).double().sum()
            count += counted.sum()
        for _ in range(probed.count(number)):
            logits = logits.clone()  # a compiled model may return the same memory again
            _leak_check(forward, whole, logits, probes, near)
    model.train()  # must not leak either: mostly it computes the same, and one pass more shows that
    with torch.compiler.set_stance("eager_on_recompile"):
        def seeded(inputs):
            torch.manual_seed(0)  # honest dropout drops the same twice
            return forward(inputs)
        logits, some, near, probes = logits.clone(), whole[:LEAK_POSITIONS], [], _leak_probes(T)
        if any(_leak(seeded, whole, logits, probes, near)[0] is not None for _ in range(math.ceil(LEAK_POSITIONS / batch_size))):
            logits = seeded(some).clone()
            if torch.equal(logits, seeded(some)):  # else random in a way of its own: there is nothing to compare
                _leak_check(seeded, some, logits, _leak_probes(T), [])
    bits = (nats / math.log(2) / count).item()
    if not math.isfinite(bits):
        fail("the model's logits are not finite, or no target has a byte: no score")
    return bits

def _leak_probes(T: int):
    """Yields (position, whether to repeat one token after it): the first and last few, then pairs of neighbours anywhere."""
    yield from ((0, True), (T - 2, False), (1, True), (T - 3, False))
    place = _leak_draw.random()
    while True:
        place = (place + 0.618034) % 1  # the golden ratio: wherever it starts, it soon has been everywhere
        p = int(place * (T - 1))
        yield p, True
        yield p + 1, False

def _leak(forward, inputs, logits, probes, near: list) -> tuple[int | None, float]:
    """(a position whose logits change when later tokens or other rows do, or None; the largest difference of a logit).

    inputs: (B, T); logits: what forward(inputs) gave; near: (difference, position) of the rounds so far. Every row is changed
    after a position of its own and its logits up to there are compared. It is changed to text from elsewhere in the batch, or
    to one token repeated, which moves averages most. Of two neighbouring positions one at least lies inside any block.
    Cost: one forward pass; with the batches that the evaluation uses, under 2% of it.
    It cannot catch: a leak at few positions, small or between those probed, one far below 1/100 of the signal, a model
    that recognises the probe (the text breaks off there), or one that knows the scored text by heart.
    """
    import torch
    (B, T), V = inputs.shape, logits.shape[-1]
    probed, elsewhere = inputs.clone(), inputs.flatten().roll(_leak_draw.randrange(1, B * T)).view(B, T)
    rows = list(zip(range(B), probes))
    for row, (p, repeated) in rows:
        one = (inputs[row, p + 1 : p + 2] + _leak_draw.randrange(1, V)) % V
        probed[row, p + 1 :] = one if repeated else elsewhere[row, p + 1 :]
    changed, stride = forward(probed), max(1, V // 512)  # the spread is read from a part of the vocabulary
    largest, seen = 0.0, None
    for row, (p, _) in rows:
        before = logits[row, : p + 1].float()
        difference, part = changed[row, : p + 1].float() - before, before[:, ::stride]
        spread = (part - part.median(-1, keepdim=True).values).abs().median(-1).values.clamp(1e-6, 10)  # no outlier moves it
        amount = difference.square().mean(-1).sqrt() / spread
        if not amount.isfinite().all():
            fail("the model's logits are not finite: no score")
        largest = max(largest, difference.abs().max().item())
        near.append((max(amount[-1], amount.mean()).item(), p))  # some leaks are strongest there, others everywhere
        if amount.max() > LEAK_ANYWHERE:
            seen = int(amount.argmax())
    if seen is None and len(near) >= LEAK_POSITIONS and sum(amount for amount, _ in near) > LEAK_NEAR * len(near):
        seen = max(near)[1]
    return seen, largest

def _leak_check(forward, inputs, logits, probes, near: list):
    """Raises Stop where _leak finds one: in its own words where the model answers the same input in two ways."""
    seen, largest = _leak(forward, inputs, logits, probes, near)
    if seen is not None:
        if (forward(inputs) - logits).abs().max() > 0.1 * largest:
            fail("the model gives other logits for the same input: is dropout on in eval mode, or a thread still training?")
        fail(f"the model sees the future (position {seen}): its logits there change with later tokens or with other rows of "
             "the batch. Every position may only read itself and earlier ones of its own row")

# --------------------------------------------------------------------------------------------------------- command line

def lock(cache: Path):
    """Holds the cache for one prepare.py at a time, until the returned file is closed. Raises Stop, saying who holds it."""
    import fcntl
    cache.mkdir(parents=True, exist_ok=True)
    file = open(cache / "lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise Stop(f"another prepare.py (process {file.read().strip() or '?'}) is working in {cache}: wait until it is done, "
                   "or set AUTORESEARCH_CACHE to another directory") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file

def prepare(corpus: str, data: Path | None, num_shards: int, settings: dict, force: bool):
    """Fills the cache: sources, tokenizer, tokens, and last the manifest. Finished pieces of an earlier try are kept."""
    began, cache, path = _now(), cache_dir(), cache_dir() / "manifest.json"
    request = {"corpus": corpus, **settings, **({"num_shards": num_shards} if corpus == "climbmix" else {})}
    old = manifest() if path.exists() and not force else None
    different = Stop(f"{cache} holds another prepared set: set AUTORESEARCH_CACHE to another directory to keep both, "
                     "or replace it with --force")
    if old and old["request"] != request:
        raise different
    sources = climbmix_sources(num_shards) if corpus == "climbmix" else text_sources(data) if data else demo_sources()
    if not sources:
        raise Stop(f"no *.parquet, *.jsonl, *.txt or *.md below {data}")
    described = {"format": FORMAT, "corpus": corpus, "request": request, "files": [source.describe() for source in sources]}
    key = hashlib.sha256(canonical(described)).hexdigest()[:12]
    if old and old["key"] != key:
        raise different
    if old:
        return print(f"already prepared in {cache}: {corpus}, fingerprint {fingerprint()}; nothing to do")
    path.unlink(missing_ok=True)
    for entry in cache.iterdir():  # other sets, and with --force this one: they are rebuilt from the sources
        if re.fullmatch("[0-9a-f]{12}", entry.name) and (force or entry.name != key):
            shutil.rmtree(entry)
    (directory := cache / key).mkdir(exist_ok=True)

    held_out = {digest: source.split for source in sources if corpus == "text" and source.split in ("test", "val")
                for _, digest, _ in read(source)}
    tokenizer_path, row = directory / "tokenizer.tiktoken", settings["seq_len"] + 1
    if not tokenizer_path.exists():
        def training_text(left=TOKENIZER_CHARS):
            for source in sources:
                for split, _, text in documents(source, held_out=held_out) if source.split in (None, "train") else ():
                    if left <= 0:
                        return
                    if split == "train":
                        yield (text := text[: min(TOKENIZER_DOC_CHARS, left)])
                        left -= len(text)
        step = _now()
        with ThreadPoolExecutor(1) as pool:  # so that Ctrl-C is heard meanwhile
            tokenizer = pool.submit(Tokenizer.train, training_text(), settings["vocab_size"]).result()
        write_atomically(tokenizer_path, tokenizer.to_bytes())
        print(f"trained a tokenizer of {tokenizer.get_vocab_size()} tokens in {_now() - step:.1f} s", file=sys.stderr)
    tokenizer = Tokenizer.from_directory(directory)
    def encode(source, progress, number={source.name: i for i, source in enumerate(sources)}):
        tokens_of = lambda line: len(tokenizer.encoding.encode_ordinary(line))
        texts = documents(source, math.ceil(1.02 * row), tokens_of, held_out)
        return encode_source(texts, progress, tokenizer, directory / f"{number[source.name]:05d}")
    entries = in_parallel(encode, sources, os.cpu_count() or 1, "encoded")
    totals = {split: sum(e["tokens"][split] for e in entries) for split in SPLITS}
    eval_rows = {}
    for split in ("val", "test"):
        wanted = max(1, settings["eval_tokens"] // settings["seq_len"])
        eval_rows[split] = Packer(directory, entries, split, row, repeat=False).fill(np.empty((wanted, row), dtype=np.uint16))
    for split, rows in {"train": totals["train"], "val": eval_rows["val"]}.items():
        if not rows:
            raise Stop(f"the {split} split has {totals[split]:,} tokens and one row needs {row:,}: {row - totals[split]:,} are missing. "
                       "Add text, or lower --seq-len")
    described.update(settings, key=key, vocab_size=tokenizer.get_vocab_size(), eval_rows=eval_rows, tokens=entries,
                     tokenizer_sha256=sha256_of(tokenizer_path))
    write_atomically(path, signed(described))
    print(f"prepared {corpus} in {cache} in {_now() - began:.1f} s: {totals['train']:,} training tokens, {eval_rows['val']} rows of "
          f"{row - 1} to score, fingerprint {fingerprint()}\nnext: uv run train.py")

def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="prepare.py", description="Prepares a corpus for train.py, or shows the ledger.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--demo", action="store_true", help="Python's own standard library: offline, no GPU needed")
    which.add_argument("--data", type=Path, metavar="DIR", help="your own *.parquet (text), *.jsonl (text), *.txt, *.md")
    which.add_argument("--num-shards", type=int, default=10, metavar="N", help="climbmix training shards (default 10; -1: all 6,541)")
    which.add_argument("--runs", action="store_true", help="show the ledger as a table")
    for name, (low, high) in LIMITS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, metavar="N", help=f"{low} to {high}; the default is the corpus's")
    parser.add_argument("--force", action="store_true", help="replace what the cache holds (downloads and the ledger are kept)")
    args = parser.parse_args(argv)
    if args.runs:
        return show_runs()
    corpus = "demo" if args.demo else "text" if args.data else "climbmix"
    settings = {name: default if getattr(args, name) is None else getattr(args, name) for name, default in PRESETS[corpus].items()}
    for name, (low, high) in LIMITS.items():
        if not low <= settings[name] <= high:
            raise Stop(f"--{name.replace('_', '-')} {settings[name]}: it must be from {low} to {high}")
    if args.num_shards == 0 or args.num_shards < -1:
        raise Stop(f"--num-shards {args.num_shards}: it must be at least 1, or -1 for all")
    try:
        with lock(cache_dir()):
            prepare(corpus, args.data, args.num_shards, settings, args.force)
    except OSError as error:
        where = error.filename or cache_dir()
        raise Stop(f"{where}: {error.strerror or error}; what was finished is kept. Free some space or set AUTORESEARCH_CACHE, "
                   "then run the same command again") from None

if __name__ == "__main__":
    try:
        main()
    except Stop as stop:  # at once: threads still at work write only what the next run can use
        print(stop, file=sys.stderr, flush=True)
        os._exit(1)

