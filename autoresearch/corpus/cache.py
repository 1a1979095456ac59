"""
The cache directory while it is prepared: one prepare.py at a time, and the set that is there stays
until another is whole.

    manifest.json      what is prepared; written last: without it nothing is
    <key>/             the prepared set: tokenizer and tokens
    unfinished/        a set that is being made, or was until it was killed
    shards/            downloads
    autoresearch.jsonl the ledger
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from pathlib import Path

from autoresearch.common import Fail, cache_dir, signed, write_atomically
from autoresearch.referee.manifest import load_manifest, read_manifest, shared_lock

SET_NAME = re.compile("[0-9a-f]{12}")


def lock(cache: Path):
    """Holds the cache for one prepare.py at a time, until the returned file is closed.

    Raises Fail, saying who holds it.
    """
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


def prepared_before(request: dict) -> dict | None:
    """The manifest of the set that is there, if it was asked for in these words; None without one.

    Raises Fail where another is there.
    """
    path = cache_dir() / "manifest.json"
    if not path.exists():
        return None
    old = load_manifest(path)
    was = old["request"]
    differ = [name for name in {**was, **request} if was.get(name) != request.get(name)]
    if differ:
        now = [f"{name} {was.get(name)}, not {request.get(name)}" for name in differ]
        raise another_set("; ".join(now))
    return old


def another_set(difference: str) -> Fail:
    return Fail(
        f"{cache_dir()} holds another prepared set ({difference}): set AUTORESEARCH_CACHE to "
        "another directory to keep both, or replace it with --force"
    )


def unfinished_set() -> Path:
    """An empty directory to make a set in. Raises Fail while a run reads the one that is there."""
    cache = cache_dir()
    for directory in cache.iterdir():
        if SET_NAME.fullmatch(directory.name):
            free = shared_lock(directory, exclusive=True)
            if free is None:
                raise Fail(
                    f"a run is using the set in {cache}: wait until it has ended, end it, or set "
                    "AUTORESEARCH_CACHE to another directory"
                )
            os.close(free)
    directory = cache / "unfinished"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    return directory


def put_in_place(directory: Path, described: dict):
    """The finished set under its own name, then its manifest; then no other set any more."""
    cache = cache_dir()
    final = cache / described["key"]
    if final.exists():  # the same set, made again: while it is replaced, nothing is prepared
        (cache / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(final)
    os.rename(directory, final)
    write_atomically(cache / "manifest.json", signed(described))
    read_manifest.cache_clear()
    for other in cache.iterdir():
        if SET_NAME.fullmatch(other.name) and other != final:
            shutil.rmtree(other)


def disk_failure(error: OSError) -> Fail:
    """What a person can do about a disk that is full, or a file that may not be used."""
    cache = cache_dir().absolute()
    where = Path(error.filename or cache).absolute()
    what = f"{where}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Fail(
            f"{what}; downloads are kept. Free some space or set AUTORESEARCH_CACHE to another "
            "disk, then run the same command again"
        )
    if where.is_relative_to(cache) or cache.is_relative_to(where):
        return Fail(
            f"the cache {cache} cannot be used ({what}): set AUTORESEARCH_CACHE to a folder that "
            "you can write to"
        )
    return Fail(f"{what}. Make it readable, or take it away")
