"""
The cache directory while it is prepared: one prepare.py at a time, and the prepared set stays until
another is complete.

    manifest.json      what is prepared; written last: without it nothing is
    <key>/             the prepared set: tokenizer and tokens
    unfinished/        a set that is being made, or was until it was killed
    unpacked/          plain text out of .gz files, while a set is made
    shards/            downloads
    autoresearch.jsonl the ledger
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from autoresearch.common import (
    Fail,
    Lock,
    cache_dir,
    file_name,
    is_there,
    lock,
    signed,
    write_atomically,
)
from autoresearch.referee.manifest import load_manifest, maker_elsewhere, read_manifest


def lock_cache(cache: Path) -> Lock:
    """Waits until no other prepare.py works in the cache; then none does until it is closed."""
    cache.mkdir(parents=True, exist_ok=True)
    held = lock(cache / "lock", wait=False)
    if held is None:
        name = file_name(cache)
        print(f"another prepare.py is working in {name}: waiting for it", file=sys.stderr)
        held = lock(cache / "lock")
    return held


def prepared_before(request: dict) -> dict | None:
    """The manifest of the prepared set, None without one. Raises Fail if the request was another."""
    path = cache_dir() / "manifest.json"
    if not is_there(path):
        return None
    old = load_manifest(path)
    asked = old["request"]
    for name in {**asked, **request}:
        if asked.get(name) != request.get(name):
            raise another_set(f"{name} {asked.get(name)}, not {request.get(name)}")
    return old


def another_set(difference: str) -> Fail:
    maker = maker_elsewhere()
    replace = f"; {maker}" if maker else ", or replace it with --force"
    return Fail(
        f"{file_name(cache_dir())} holds another prepared set ({difference}): set "
        f"AUTORESEARCH_CACHE to another directory to keep both{replace}"
    )


def sets() -> list[Path]:
    return [path for path in cache_dir().iterdir() if re.fullmatch("[0-9a-f]{12}", path.name)]


def unfinished_set() -> Path:
    """An empty directory to make a set in. Raises Fail while a run reads the prepared one."""
    for directory in sets():
        free = lock(directory, wait=False)
        if free is None:
            raise Fail(
                f"a run is using the set in {file_name(cache_dir())}: wait until it has ended, end "
                "it, or set AUTORESEARCH_CACHE to another directory"
            )
        free.close()
    directory = cache_dir() / "unfinished"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    return directory


def unpacked_dir() -> Path:
    return cache_dir() / "unpacked"


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
