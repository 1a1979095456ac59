"""
The manifest of the prepared set, and the fingerprint that makes two scores comparable.

No numpy here: the night imports it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from pathlib import Path
from types import MappingProxyType

from autoresearch.common import (
    ROOT,
    Fail,
    cache_dir,
    canonical,
    file_name,
    is_there,
    open_ours,
    parse_signed,
)

FORMAT = 2  # of the cache; raised when its files, or the rules that made them, are no longer these
SPLITS = ("train", "val", "test")  # in the token cache's index, by their place here
HELD_OUT = "held-out"  # the set's folder with all of val and test; hidden from the night's runs


def maker_elsewhere() -> str:
    """In words, whose prepared set it is; empty where it is this user's own."""
    for path in (cache_dir() / "manifest.json", cache_dir()):
        with contextlib.suppress(OSError):
            owner = path.stat().st_uid
            return "" if owner == os.geteuid() else f"user {owner} has made it"
    return ""


def again() -> str:
    """How the prepared set is made anew. Nobody is told to replace that of another user."""
    maker = maker_elsewhere()
    if maker:
        return f"{maker}: tell them, or set AUTORESEARCH_CACHE to a folder of your own"
    return "run the same `uv run prepare.py ...` with --force"


def damaged(path: Path) -> Fail:
    """For bytes that are not those that were written; what cannot be read is a `file_problem`."""
    return Fail(f"{file_name(path)} is damaged: {again()}")


def open_prepared(path: Path):
    """A file of the prepared set, in a `with`: open_ours."""
    return open_ours(path, missing=again())


def read_checked(path: Path, sha256: str) -> bytes:
    """A file of the prepared set. Raises Fail where it is damaged or cannot be read."""
    with open_prepared(path) as file:
        content = file.read()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise damaged(path)
    return content


def load_manifest(path: Path) -> dict:
    """The manifest in a file. Raises Fail where there is none, or where it is damaged."""
    if not is_there(path):
        raise Fail(
            f"nothing is prepared in {file_name(path.parent)}: run `uv run prepare.py` (a GPU), "
            "`uv run prepare.py --data DIR` (your text) or `uv run prepare.py --demo` "
            "(any machine, offline); an interrupted one continues"
        )
    with open_ours(path) as file:
        content = file.read()
    try:
        record = parse_signed(content)
    except ValueError:
        raise damaged(path) from None
    if record.get("format") != FORMAT:
        raise Fail(f"{file_name(path)} is of another version of prepare.py: {again()}")
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


def rows_path(split: str) -> Path:
    """The file with the rows that are scored, packed: uint16 (rows, sequence length + 1)."""
    return set_dir() / HELD_OUT / f"{split}.rows"


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
