"""
climbmix: shards of web text from the Hugging Face hub.

A download continues where an earlier one ended, is checked, and only then gets its name. Two kinds
of failure: nobody there, which ends at once; and a broken transfer, which is tried again.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import time
from pathlib import Path
from urllib.parse import urlsplit

from autoresearch.common import Fail, cache_dir, sha256_of
from autoresearch.corpus.documents import Source, read_parquet
from autoresearch.corpus.report import Progress, in_parallel

HUB_PATH = "/datasets/karpathy/climbmix-400b-shuffle/resolve/main/"
VAL_SHARD = 6542  # pinned; training shards count up from 0 and end before these two
TEST_SHARD = 6541
PARALLEL_DOWNLOADS = 4  # one connection rarely fills a line; many only annoy the server


def climbmix(num_shards: int) -> list[Source]:
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
        sources.append(Source(name, split, directory / name))
    missing = [source.path for source in sources if not source.path.exists()]
    in_parallel(download, missing, PARALLEL_DOWNLOADS, "downloaded")
    return sources


# --------------------------------------------------------------------------------------- one shard

MAX_TRIES = 6  # in a row without one new byte; with the pauses about a minute
FIRST_PAUSE = 2.0  # seconds, doubled with every try
MAX_RETRY_AFTER = 300.0  # seconds: the longest pause a server may ask for


class DownloadError(Exception):
    """A try that failed; the next may not.

    wait: seconds the server asked for. discard: what has arrived is wrong. unreachable: nobody
    answered there.
    """

    def __init__(self, reason: str, wait=None, discard=False, unreachable=False):
        super().__init__(reason)
        self.wait = wait
        self.discard = discard
        self.unreachable = unreachable


def download(final: Path, progress: Progress):
    """One shard, all of it under its name or nothing.

    Raises Fail, naming the file, after the last try; what has arrived stays in NAME.part for the
    next command.
    """
    part = final.with_name(final.name + ".part")
    part.touch()
    most = part.stat().st_size  # bytes that have been there at once
    in_vain = 0  # tries
    while True:
        try:
            fetch(final.name, part, progress)
            break
        except DownloadError as failure:
            if failure.unreachable and not progress.bytes:  # no byte of any file ever came
                raise Fail(
                    f"{final.name}: {failure}: look at the network and at HF_ENDPOINT, or take "
                    "`uv run prepare.py --demo`, which needs neither"
                ) from None
            if failure.discard:
                part.write_bytes(b"")
            arrived = part.stat().st_size
            in_vain = 0 if arrived > most else in_vain + 1  # a line that drops but moves on is none
            most = max(most, arrived)
            if in_vain >= MAX_TRIES:
                raise Fail(
                    f"{final.name}: {failure}, after {MAX_TRIES} tries; what has arrived is kept: "
                    "run the same command again"
                ) from None
            pause = failure.wait
            if pause is None:
                pause = FIRST_PAUSE * 2 ** max(0, in_vain - 1) * random.uniform(0.5, 1)
            progress.say(f"{final.name}: {failure}; trying again in {pause:.0f} s\n")
            time.sleep(pause)
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, final)


CONNECT_TIMEOUT = 10  # seconds
READ_TIMEOUT = 30  # seconds: the longest silence, not the whole transfer


def fetch(name: str, part: Path, progress: Progress):
    """Appends to `part` what it lacks, and checks the whole. Raises DownloadError or Fail."""
    import requests

    url = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/") + HUB_PATH + name
    have = part.stat().st_size
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    token = os.environ.get("HF_TOKEN", "").strip()
    if token:  # requests drops this header where a redirect leaves the host
        headers["Authorization"] = f"Bearer {token}"
    try:
        with requests.get(
            url, headers=headers, stream=True, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT)
        ) as reply:
            beyond_the_end = reply.headers.get("Content-Range") == f"bytes */{have}"
            if not (reply.status_code == 416 and beyond_the_end):  # else all of it is here
                check_status(reply, name)
                save(reply, part, have, progress)
            check_shard(part, linked_sha256(reply))
    except ValueError as error:
        # An error's text may hold the token or a signed address: only its kind is shown.
        kind = type(error).__name__
        raise Fail(f"{name}: HF_ENDPOINT or HF_TOKEN cannot be used ({kind})") from None
    except requests.RequestException as error:
        raise explain(error, url) from None


def explain(error, url: str) -> DownloadError:
    """What a request that failed says to a person; its own text may hold the token."""
    import requests
    import urllib3

    request = error.request  # which a redirect may have led elsewhere
    host = urlsplit(url if request is None else request.url).hostname
    nobody = (requests.ConnectTimeout, requests.exceptions.ProxyError)
    cause = error
    while cause is not None:
        if isinstance(cause, (*nobody, urllib3.exceptions.NewConnectionError)):
            why = getattr(cause.__cause__, "strerror", None) or type(cause).__name__
            return DownloadError(f"{host} cannot be reached ({why})", unreachable=True)
        cause = cause.__cause__ or cause.__context__
    return DownloadError(f"the connection to {host} broke ({type(error).__name__})")


def check_status(reply, name: str):
    """Raises unless the reply's body is the file, or a part of it."""
    status = reply.status_code
    said = f"{urlsplit(reply.url).hostname} answered {status}"
    if status in (408, 416, 429) or status >= 500:
        asked = reply.headers.get("Retry-After", "")
        wait = min(float(asked), MAX_RETRY_AFTER) if asked.isdigit() else None
        raise DownloadError(said, wait, discard=status == 416)
    if status not in (200, 206):
        raise Fail(f"{name}: {said}: check HF_TOKEN and HF_ENDPOINT")


def save(reply, part: Path, have: int, progress: Progress):
    """Writes the body behind the `have` bytes of `part`, or over them if it is the whole file."""
    continues = reply.status_code == 206
    if continues and not reply.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        raise DownloadError(f"it does not continue at byte {have:,}", discard=True)
    length = reply.headers.get("Content-Length", "")
    total = int(length) + (have if continues else 0) if length.isdigit() else None
    if total and not progress.bytes:
        check_space(total, part.parent, progress.files)
    with open(part, "ab" if continues else "wb") as file:
        # Small blocks: one that is not full is lost when the line drops.
        for block in reply.iter_content(1 << 14):
            file.write(block)
            progress.add(len(block))
    size = part.stat().st_size
    if total is not None and size != total:
        raise DownloadError(f"{size:,} of {total:,} bytes arrived")


SHARD_TOKEN_BYTES = 125_000_000  # of tokens: 250 million characters, 4 a token, 2 bytes a token


def check_space(size: int, directory: Path, files: int):
    """Before the first byte: is there room for all that is missing? Shards are alike in size."""
    begun = 0
    for path in directory.glob("*.part"):
        with contextlib.suppress(FileNotFoundError):  # another thread has just finished it
            begun += path.stat().st_size
    needed = files * (size + SHARD_TOKEN_BYTES) - begun
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise Fail(
            f"{files} shards of {size / 1e6:,.0f} MB and their tokens need {needed / 1e9:,.1f} GB, "
            f"and {free / 1e9:,.1f} GB are free in {directory}: free some space, lower "
            "--num-shards, or set AUTORESEARCH_CACHE to another disk"
        )


def linked_sha256(reply) -> str | None:
    """The sha256 of the file from X-Linked-ETag, which stands in the redirect or the reply."""
    for answer in [*reply.history, reply]:
        etag = answer.headers.get("X-Linked-ETag", "").removeprefix("W/").strip('"')
        if re.fullmatch("[0-9a-f]{64}", etag):
            return etag
    return None


def check_shard(part: Path, sha256: str | None):
    if sha256 and sha256_of(part) != sha256:
        raise DownloadError("its sha256 is wrong", discard=True)
    try:
        next(read_parquet(part), None)
    except Fail:
        problem = "it is no parquet file with a column `text` (a login page?)"
        raise DownloadError(problem, discard=True) from None
