"""
climbmix: shards of web text from the Hugging Face hub.

A download resumes where an earlier one ended, and gets its name only when it has been checked. It
fails in two ways: nobody can be reached, which ends it at once, or the transfer broke, which is
tried again.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

from autoresearch.common import Fail, cache_dir, sha256_of
from autoresearch.corpus.documents import Source, read_parquet
from autoresearch.corpus.report import Progress, in_parallel

HUB_PATH = "/datasets/karpathy/climbmix-400b-shuffle/resolve/main/"
VAL_SHARD = 6542  # pinned; training shards count up from 0 and end before these two
TEST_SHARD = 6541
PARALLEL_DOWNLOADS = 4  # one connection rarely fills a line; many only annoy the server


def climbmix(num_shards: int) -> list[Source]:
    """The shards in order, validation and test last. Downloads the missing ones.

    num_shards: of the training split; -1 for all.
    """
    count = TEST_SHARD if num_shards == -1 else num_shards
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

TRIES = 6
FIRST_PAUSE = 2.0  # seconds, doubled with every try: a minute in all
MAX_RETRY_AFTER = 300  # seconds: the longest pause a server may ask for


class Broken(Exception):
    """A transfer that failed and may succeed when it is tried again."""

    pause = None  # seconds that the server asked for


def download(final: Path, progress: Progress):
    """One shard, complete under its name or not there.

    Raises Fail, naming the file. The bytes that have arrived stay in NAME.part for the next command.
    """
    part = final.with_name(final.name + ".part")
    part.touch()
    for attempt in range(TRIES):
        try:
            fetch(final.name, part, progress)
            os.replace(part, final)
            return
        except Broken as failure:
            reason = str(failure)
            if attempt < TRIES - 1:
                pause = failure.pause or FIRST_PAUSE * 2**attempt
                progress.say(f"{final.name}: {reason}; trying again in {pause:.0f} s\n")
                time.sleep(pause)
    raise Fail(
        f"{final.name}: {reason}, after {TRIES} tries; what has arrived is kept: "
        "run the same command again"
    )


CONNECT_TIMEOUT = 10  # seconds
READ_TIMEOUT = 30  # seconds without a byte; the whole transfer may take longer


def fetch(name: str, part: Path, progress: Progress):
    """Appends the missing bytes to `part` and checks the whole file. Raises Broken or Fail.

    No message quotes an error of requests: its text may hold the token or a signed address.
    """
    import requests

    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    have = part.stat().st_size
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    token = os.environ.get("HF_TOKEN", "").strip()
    if token:  # requests drops this header where a redirect leaves the host
        headers["Authorization"] = f"Bearer {token}"
    try:
        with requests.get(
            endpoint.rstrip("/") + HUB_PATH + name,
            headers=headers,
            stream=True,
            timeout=(CONNECT_TIMEOUT, READ_TIMEOUT),
        ) as reply:
            if reply.status_code == 416:  # `part` is as long as the file or longer
                part.write_bytes(b"")
            check_status(reply, name)
            save(reply, part, have, progress)
            check_shard(part, linked_sha256(reply))
    except ValueError:  # of the address or a header
        raise Fail(f"{name}: HF_ENDPOINT or HF_TOKEN cannot be used") from None
    except requests.RequestException as error:
        kind = type(error).__name__
        if isinstance(error, requests.ConnectionError) and not progress.bytes:
            raise Fail(
                f"{name}: {endpoint} cannot be reached ({kind}): look at the network and at "
                "HF_ENDPOINT, or take `uv run prepare.py --demo`, which needs neither"
            ) from None
        raise Broken(f"the connection broke ({kind})") from None


def check_status(reply, name: str):
    """Raises unless the reply's body is the file or a part of it."""
    status = reply.status_code
    if status in (408, 416, 429) or status >= 500:
        failure = Broken(f"the server answered {status}")
        seconds = reply.headers.get("Retry-After", "")
        if seconds.isdigit():
            failure.pause = min(int(seconds), MAX_RETRY_AFTER)
        raise failure
    if status not in (200, 206):
        raise Fail(f"{name}: the server answered {status}: check HF_TOKEN and HF_ENDPOINT")


def save(reply, part: Path, have: int, progress: Progress):
    """Appends the body to the `have` bytes of `part`; a whole file replaces them.

    A body that is shorter than its Content-Length raises an error of requests.
    """
    resumed = reply.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    if not progress.bytes:
        size = int(reply.headers.get("Content-Length", 0))
        check_space(have + size if resumed else size, part.parent, progress.files)
    with open(part, "ab" if resumed else "wb") as file:
        # Small blocks: one that is not full is lost when the line drops.
        for block in reply.iter_content(1 << 14):
            file.write(block)
            progress.add(len(block))
        file.flush()
        os.fsync(file.fileno())


SHARD_TOKEN_BYTES = 125_000_000  # of tokens: 250 million characters, 4 a token, 2 bytes a token


def check_space(size: int, directory: Path, files: int):
    """Before the first byte: is there room for all missing shards? They are alike in size."""
    needed = files * (size + SHARD_TOKEN_BYTES)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise Fail(
            f"{files} shards of {size / 1e6:,.0f} MB and their tokens need {needed / 1e9:,.1f} GB, "
            f"and {free / 1e9:,.1f} GB are free in {directory}: free some space, lower "
            "--num-shards, or set AUTORESEARCH_CACHE to another disk"
        )


def linked_sha256(reply) -> str | None:
    """The file's sha256 from X-Linked-ETag, a header of the redirect or of the reply."""
    for answer in [*reply.history, reply]:
        etag = answer.headers.get("X-Linked-ETag", "").strip('"')
        if re.fullmatch("[0-9a-f]{64}", etag):
            return etag
    return None


def check_shard(part: Path, sha256: str | None):
    """Raises Broken, and discards the bytes, where they are not the shard."""
    try:
        if sha256 and sha256_of(part) != sha256:
            raise Broken("its sha256 is wrong")
        next(read_parquet(part), None)
    except (Broken, Fail) as failure:
        part.write_bytes(b"")
        raise Broken(failure) from None
