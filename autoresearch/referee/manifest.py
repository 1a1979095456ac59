"""
The manifest of the prepared set, and the fingerprint that makes two scores comparable.

No numpy here: the night imports it.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
from pathlib import Path
from types import MappingProxyType

from autoresearch.common import ROOT, Fail, cache_dir, canonical, parse_signed

FORMAT = 1  # of the cache; raised when its files, or the rules that made them, are no longer these
SPLITS = ("train", "val", "test")  # in the token cache's index, by their place here
AGAIN = "run the same `uv run prepare.py ...` with --force"


def damaged(path: Path) -> Fail:
    return Fail(f"{path} is damaged or missing: {AGAIN}")


def read_checked(path: Path, sha256: str) -> bytes:
    """A file of the prepared set. Raises Fail where it is damaged or missing."""
    content = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise damaged(path)
    return content


def load_manifest(path: Path) -> dict:
    """The manifest in a file. Raises Fail where there is none, or where it is damaged."""
    try:
        record = parse_signed(path.read_bytes())
    except FileNotFoundError:
        raise Fail(
            f"nothing is prepared in {path.parent}: run `uv run prepare.py` (a GPU), "
            "`uv run prepare.py --data DIR` (your text) or `uv run prepare.py --demo` "
            "(any machine, offline); an interrupted one continues"
        ) from None
    except ValueError:
        raise damaged(path) from None
    if record.get("format") != FORMAT:
        raise Fail(f"{path} is of another version of prepare.py: {AGAIN}")
    return record


def _read_only(value):
    if isinstance(value, dict):
        return MappingProxyType({key: _read_only(inner) for key, inner in value.items()})
    if isinstance(value, list):
        return tuple(_read_only(inner) for inner in value)
    return value


@functools.lru_cache
def read_manifest(path: Path) -> MappingProxyType:
    return _read_only(load_manifest(path))


def manifest() -> MappingProxyType:
    """What is prepared, read once and read-only: editing it raises TypeError.

    Raises Fail, with the command to type, where nothing is prepared or the manifest is damaged.
    """
    return read_manifest(cache_dir() / "manifest.json")


def set_dir() -> Path:
    """The directory of the prepared tokenizer and tokens."""
    return cache_dir() / manifest()["key"]


def fingerprint() -> str:
    """12 hex digits of the manifest and of the source that measures, both as they are on disk now.

    Same fingerprint, comparable scores.
    """
    record = load_manifest(cache_dir() / "manifest.json")
    digest = hashlib.sha256(canonical(record))
    for path in measuring_sources():
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:12]


def measuring_sources() -> list[Path]:
    """The files that decide what a score is: prepare.py, autoresearch/common.py and the referee."""
    package = ROOT / "autoresearch"
    return [ROOT / "prepare.py", package / "common.py", *sorted(package.glob("referee/*.py"))]


def shared_lock(directory: Path, exclusive: bool = False) -> int | None:
    """Locks a prepared set for reading, or exclusively, until the returned descriptor is closed.

    None where others hold it, or where the file system has no locks.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
