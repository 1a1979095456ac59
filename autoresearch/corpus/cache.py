"""
The cache directory while it is prepared: one prepare.py at a time, and the prepared set stays until
another is complete.

    manifest.json      what is prepared; written last: without it nothing is
    <key>/             the prepared set: tokenizer and tokens
    unfinished/        a set that is being made, or was until it was killed
    shards/            downloads
    autoresearch.jsonl the ledger
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import sys
from pathlib import Path

from autoresearch.common import Fail, cache_dir, signed, write_atomically
from autoresearch.referee.manifest import load_manifest, read_manifest, shared_lock


def lock(cache: Path):
    """Waits until no other prepare.py works in the cache; then none does until the file is closed."""
    cache.mkdir(parents=True, exist_ok=True)
    file = open(cache / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another prepare.py is working in {cache}: waiting for it", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def prepared_before(request: dict) -> dict | None:
    """The manifest of the prepared set, None without one. Raises Fail if the request was another."""
    path = cache_dir() / "manifest.json"
    if not path.exists():
        return None
    old = load_manifest(path)
    asked = old["request"]
    for name in {**asked, **request}:
        if asked.get(name) != request.get(name):
            raise another_set(f"{name} {asked.get(name)}, not {request.get(name)}")
    return old


def another_set(difference: str) -> Fail:
    return Fail(
        f"{cache_dir()} holds another prepared set ({difference}): set AUTORESEARCH_CACHE to "
        "another directory to keep both, or replace it with --force"
    )


def sets() -> list[Path]:
    return [path for path in cache_dir().iterdir() if re.fullmatch("[0-9a-f]{12}", path.name)]


def unfinished_set() -> Path:
    """An empty directory to make a set in. Raises Fail while a run reads the prepared one."""
    for directory in sets():
        free = shared_lock(directory, exclusive=True)
        if free is None:
            raise Fail(
                f"a run is using the set in {cache_dir()}: wait until it has ended, end it, or set "
                "AUTORESEARCH_CACHE to another directory"
            )
        os.close(free)
    directory = cache_dir() / "unfinished"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    return directory


def put_in_place(directory: Path, described: dict):
    """The finished set takes its name, the manifest names it, and then the others go."""
    final = cache_dir() / described["key"]
    if final.exists():  # the same set, made again by --force
        shutil.rmtree(final)
    os.rename(directory, final)
    write_atomically(cache_dir() / "manifest.json", signed(described))
    read_manifest.cache_clear()
    remove_others(final)


def remove_others(prepared: Path):
    """Deletes the sets that the manifest does not name; a kill may have left one."""
    for directory in sets():
        if directory != prepared:
            shutil.rmtree(directory)
