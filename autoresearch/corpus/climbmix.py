"""climbmix: shards from the Hugging Face hub."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import shutil
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

from autoresearch.common import Fail, cache_dir, sha256_of
from autoresearch.corpus.documents import read_parquet
from autoresearch.corpus.progress import Progress, in_parallel
from autoresearch.corpus.text import Source

_now = time.monotonic

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
        next(read_parquet(part), None)
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
