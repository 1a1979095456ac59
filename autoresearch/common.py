"""
What every room stands on: one way to fail, to write a file, to call git, to print a line.

Standard library only, for the night imports it without torch, numpy or an installed package.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # where prepare.py, train.py and night.py stand

# ------------------------------------------------------------------------------- failing, printing


class Fail(SystemExit):
    """A failure a person or an agent can act on: what happened, to what, what to type next.

    Uncaught, Python prints its one line, `FAIL: ...`, and exits with 1.
    """

    def __init__(self, message: str):
        super().__init__("FAIL: " + one_line(message, 1000))


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def one_line(text, most: int = 110) -> str:
    """Printable, without tabs and newlines, cut to `most` characters."""
    text = printable(" ".join(str(text).split()))
    return text if len(text) <= most else text[: most - 4] + " ..."


def some(items, most: int = 6) -> str:
    """The first few items as text, and how many more there are."""
    items = [str(item) for item in items]
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


class Parser(argparse.ArgumentParser):
    """A mistake on the command line is a Fail."""

    def error(self, message: str):
        raise Fail(f"{message}. `uv run {self.prog.split()[0]} --help` shows all")


# ------------------------------------------------------------------------------------ environment


def environment(name: str, default: str, pattern: str) -> str:
    """$NAME, or the default where it is unset or empty. Raises Fail where it does not match."""
    value = os.environ.get(name) or default
    if not re.fullmatch(pattern, value):
        raise Fail(f"{name}={value}: it must match {pattern}")
    return value


# Variables that name a folder of the user's; a relative one means where the command was typed.
FOLDERS = "AUTORESEARCH_CACHE HF_HOME HF_HUB_CACHE KERNELS_CACHE TORCHINDUCTOR_CACHE_DIR".split()
FOLDERS += "TRITON_CACHE_DIR XDG_CACHE_HOME TMPDIR".split()


def absolute(path: str) -> Path:
    """A path of the environment: `~` and relative paths as a shell means them."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def cache_dir() -> Path:
    return absolute(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch")


def inherited_environment() -> dict[str, str]:
    """The user's variables for our own processes, which work in other folders than the command."""
    given = {name: os.environ[name] for name in FOLDERS if os.environ.get(name)}
    return {**os.environ, **{name: str(absolute(path)) for name, path in given.items()}}


def seed() -> int:
    """42, or $AUTORESEARCH_SEED: to measure the noise of a score, not something to tune."""
    return int(environment("AUTORESEARCH_SEED", "42", r"\d{1,9}"))


def split_name() -> str:
    """The split that is scored: val, or test with $AUTORESEARCH_SPLIT=test, which is the human's."""
    return environment("AUTORESEARCH_SPLIT", "val", "val|test")


# -------------------------------------------------------------------------------------------- time


def utc(seconds: float | None = None) -> str:
    """`2026-11-25T23:59:59Z` of seconds since 1970, or of now."""
    moment = datetime.now(timezone.utc)
    if seconds is not None:
        moment = datetime.fromtimestamp(seconds, timezone.utc)
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"


def seconds_of(time_of_day: str) -> float:
    """Seconds since 1970 of what `utc` wrote."""
    return datetime.strptime(time_of_day, "%Y-%m-%dT%H:%M:%S%z").timestamp()


# ------------------------------------------------------------------------------------------- files


def write_atomically(path: Path, content: bytes, mode: int = 0o644):
    """All of the bytes under `path` or nothing, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: dict):
    write_atomically(path, json.dumps(value).encode())


def read_json(path: Path | str) -> dict | None:
    """None while there is no such file."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return json.load(file)
    return None


def append_line(path: Path, line: bytes):
    """One line in one write, under a lock. A line that a power cut tore stays alone.

    Raises OSError, also where only a part could be written.
    """
    with open(path, "ab+", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
        content = (b"\n" if torn else b"") + line.rstrip(b"\n") + b"\n"
        if file.write(content) != len(content):
            raise OSError(28, "only a part of a line was written: is the disk full?", str(path))
        os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------ records with a checksum


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


# --------------------------------------------------------------------------------------------- git

# Of the variables named GIT_*, those that reach our own git: which configuration, who commits, how
# to fetch. The rest would lead it elsewhere: git exports GIT_DIR and GIT_INDEX_FILE to every hook.
GIT_VARIABLES = re.compile(
    "GIT_(CONFIG_(GLOBAL|SYSTEM|NOSYSTEM|COUNT|KEY_.*|VALUE_.*)|(AUTHOR|COMMITTER)_(NAME|EMAIL)"
    "|EXEC_PATH|ASKPASS|SSH.*|SSL_.*)"
)
GIT_SETTINGS = (
    "core.hooksPath=/dev/null",  # the user's hooks are for the user's commits
    "core.fsmonitor=false",  # a hook, too; or a daemon in each run's worktree
    "core.quotePath=false",
    "i18n.commitEncoding=UTF-8",
)
AS_COMMITTED = ("-c", "core.autocrlf=false", "-c", "core.eol=lf")  # a checkout with LF, not CRLF


def git(*words: str, at: Path = ROOT, give: bytes = b"", check: bool = True) -> str | None:
    """git's answer in the folder `at`, stripped. Where git fails: Fail; with check=False None."""
    answer = git_bytes(*words, at=at, give=give, check=check)
    return None if answer is None else answer.decode(errors="replace").strip()


def git_bytes(*words: str, at: Path = ROOT, give: bytes = b"", check: bool = True) -> bytes | None:
    """The same as bytes. A Fail has git's own words: they name the command that helps."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GIT_") or GIT_VARIABLES.fullmatch(name)
    }
    environment |= {"GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"}
    options = [word for setting in GIT_SETTINGS for word in ("-c", setting)]
    command = ["git", *options, "-C", str(at), *words]
    try:
        done = subprocess.run(command, input=give, capture_output=True, env=environment)
    except FileNotFoundError:
        if not check:
            return None
        raise Fail("git is not installed: install it, then say the same again") from None
    if done.returncode == 0:
        return done.stdout
    if check:
        said = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
        spoken = [word for word in words if word != "-c" and "=" not in word]
        raise Fail(f"git {' '.join(spoken[:2])}: {said}")
    return None
