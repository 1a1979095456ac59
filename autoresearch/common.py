"""
What every room stands on: one way to fail, to write a file, to lock it, to call git, to print a line.

Standard library only, for the night imports it without torch, numpy or an installed package.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import resource
import stat
import subprocess
import sys
import time
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


def file_name(path: Path | str, most: int = 160) -> str:
    """A file's name on one line: what does not print is escaped, the middle of a long name left out."""

    def escaped(c: str) -> str:
        if c.isprintable():
            return c
        if "\udc80" <= c <= "\udcff":  # os.fsdecode's, for a byte that is no UTF-8
            return f"\\x{ord(c) - 0xDC00:02x}"
        return repr(c)[1:-1]

    text = "".join(map(escaped, os.fspath(path)))
    half = most // 2
    return text if len(text) <= most else f"{text[: half - 3]}...{text[-half:]}"


def prepare_output():
    """Standard output takes any line: it escapes what its encoding lacks, and is there if closed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    with contextlib.suppress(AttributeError):  # somebody's own object
        sys.stdout.reconfigure(errors="backslashreplace")


def cut(text: str, most: int) -> str:
    """At most so many characters; what is cut off shows as `...`."""
    return text if len(text) <= most else text[: most - 4] + " ..."


def one_line(text, most: int = 110) -> str:
    """Printable, without tabs and newlines, cut to `most` characters."""
    return cut(printable(" ".join(str(text).split())), most)


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
    """A path of the environment: `~` and relative paths as a shell means them.

    Raises Fail for `~` where there is no home directory.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise Fail(
            f"{path}: user {os.geteuid()} has no home directory here: set HOME, or "
            "AUTORESEARCH_CACHE to a folder"
        )
    return Path(os.path.abspath(expanded))


def cache_dir() -> Path:
    """$AUTORESEARCH_CACHE, or a folder in the home directory."""
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


# ------------------------------------------------------------------------------------- processors


def cores() -> int:
    """Those that this process may use, by its affinity and by its container's quota.

    Processes in a container see all of the machine's; macOS counts all.
    """
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([seen, *map(math.ceil, cpu_quotas())]))


def cpu_quotas(root: Path = Path("/")) -> list[float]:
    """The processors that each of this process's control groups may use; none without limits."""
    quotas = []
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            top = root / "sys/fs/cgroup"
            files = ["cpu.max"]  # `QUOTA PERIOD` or `max PERIOD`
            if controllers:  # version 1: a tree for each controller
                top /= "cpu"
                files = ["cpu.cfs_quota_us", "cpu.cfs_period_us"]  # -1 without a limit
                if "cpu" not in controllers.split(","):
                    continue
            group = top / place.lstrip("/")  # not there where only the container's own is mounted
            for folder in (group, *group.parents):
                with contextlib.suppress(OSError, ValueError):
                    words = " ".join((folder / file).read_text() for file in files).split()
                    if int(words[0]) > 0:
                        quotas.append(int(words[0]) / int(words[1]))
    return quotas


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


def stamp() -> list:
    """[id of this boot, or "" where the system has none; seconds]: for durations between processes.

    The time of day will not do: somebody may set it meanwhile.
    """
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return [boot, time.monotonic()]


def seconds_between(began: list | None, ended: list | None) -> float | None:
    """The seconds between two stamps; None where they are of two boots, or one is missing."""
    if not began or not ended or began[0] != ended[0] or began[1] > ended[1]:
        return None
    return ended[1] - began[1]


# ------------------------------------------------------------------------------------------- files


def file_problem(error: OSError, path: Path | str | None = None, missing: str = "") -> str:
    """What an OSError says of a file, and what to type. It never says that the file is damaged.

    path: where the error names none. missing: what to type where there is no such file.
    """
    path = path or error.filename
    name = file_name(path) if path else "writing"  # errors of write() name no file
    path = Path(os.fsdecode(path or cache_dir()))
    if error.errno in (errno.EMFILE, errno.ENFILE):
        limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 65536 if most == resource.RLIM_INFINITY else min(most, 65536)
        more = f"`ulimit -n {wanted}`" if wanted > limit else "`ulimit -n 65536` as root"
        return f"{name}: too many files are open (the limit is {limit}): {more}"
    if error.errno == errno.ENOENT:
        return f"{name} is missing" + (missing and f": {missing}")
    elsewhere = ""
    with contextlib.suppress(Fail):
        if path.is_relative_to(cache_dir()) or cache_dir().is_relative_to(path):
            elsewhere = "set AUTORESEARCH_CACHE to another folder"
    if error.errno in (errno.EACCES, errno.EPERM):
        what = _forbidden(path)
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = "the disk, or your share of it, is full: free some space"
    elif error.errno == errno.EROFS:
        what = "the file system is read-only: mount it writable"
    else:
        return f"{name}: {error.strerror or error}" + (elsewhere and f": {elsewhere}")
    return f"{name}: {what}" + (elsewhere and f", or {elsewhere}")


def _forbidden(path: Path) -> str:
    """Who may not use a file, whose it is, and what to type."""
    for place in (path, *path.parents):  # the folder that hides it, where it cannot be looked at
        with contextlib.suppress(OSError):
            info = place.stat()
            break
    rights = f"mode {stat.S_IMODE(info.st_mode):o}"
    if info.st_uid == os.geteuid():
        return f"your own rights ({rights}) forbid it: `chmod -R u+rwX {file_name(place)}`"
    return (
        f"user {os.geteuid()} may not do that: {file_name(place)} belongs to user {info.st_uid} "
        f"({rights}), who can type `chmod -R a+rX {file_name(place)}`"
    )


def is_there(path: Path) -> bool:
    """Whether a file of ours exists. Raises Fail where that cannot be told."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise Fail(file_problem(error, path)) from None
    return True


@contextlib.contextmanager
def open_ours(path: Path, mode: str = "rb", missing: str = ""):
    """A file of ours, open in the `with` block. Raises Fail for every OSError in it: file_problem."""
    try:
        with open(path, mode) as file:
            yield file
    except OSError as error:
        raise Fail(file_problem(error, path, missing)) from None


def write_atomically(path: Path, content: bytes, mode: int = 0o644):
    """All of the bytes under `path` or nothing, also after a power cut.

    Raises OSError, naming the file, and leaves nothing behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_json(path: Path, value: dict):
    write_atomically(path, json.dumps(value).encode())


def read_json(path: Path | str) -> dict | None:
    """None while there is no such file. Raises Fail where it is torn."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        try:
            return json.load(file)
        except ValueError:
            name = file_name(path)
            raise Fail(
                f"{name} is damaged, as by a power cut: move it away, then run again"
            ) from None
    return None


def append_line(path: Path, line: bytes):
    """One line in one write, under a lock. A line that a power cut tore stays alone.

    Raises OSError, also where only a part could be written.
    """
    with lock(path), open(path, "ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
        content = (b"\n" if torn else b"") + line.rstrip(b"\n") + b"\n"
        if file.write(content) != len(content):
            raise OSError(
                errno.ENOSPC, "only a part of a line was written: is the disk full?", str(path)
            )
        os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------ locks


class Lock:
    """A lock that is held until it is closed, here and in processes that are forked meanwhile."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def fileno(self) -> int:
        return self.descriptor

    def close(self):
        os.close(self.descriptor)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def lock(path: Path, shared: bool = False, wait: bool = True) -> Lock | None:
    """Locks a file, which is made where it is missing, or a folder.

    None where others hold it; with `wait` they are waited for. Raises OSError where it cannot be
    opened. Where the file system has no locks, as some network shares, one in /tmp takes its place.
    """
    descriptor = _open_to_lock(path)
    try:
        return _flock(descriptor, shared, wait)
    except OSError as error:
        os.close(descriptor)
        return _flock(_open_to_lock(_in_tmp(path, error)), shared, wait)


def _flock(descriptor: int, shared: bool, wait: bool) -> Lock | None:
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return Lock(descriptor)


def _open_to_lock(path: Path) -> int:
    if path.is_dir():
        return os.open(path, os.O_RDONLY)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # NFS locks only what can be written
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not path.exists():
            raise
    return os.open(path, os.O_RDONLY)


_without_locks: set[Path] = set()  # folders that were warned of


def _in_tmp(path: Path, error: OSError) -> Path:
    """The file whose lock stands for that of `path`: the same for all processes of this user."""
    path = Path(os.path.realpath(path))
    if path.parent not in _without_locks:
        _without_locks.add(path.parent)
        print(
            f"warning: {file_name(path.parent)} has no locks ({error.strerror}): locks in /tmp keep "
            "apart what you run on this machine; let no other machine or user write there meanwhile",
            file=sys.stderr,
            flush=True,
        )
    folder = Path(f"/tmp/autoresearch-locks-{os.geteuid()}")  # not $TMPDIR: every run has its own
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "it is another user's", str(folder))
    return folder / hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


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
    "core.fileMode=false",  # a chmod is no edit
    "core.quotePath=false",
    "i18n.commitEncoding=UTF-8",
)
AS_COMMITTED = ("-c", "core.autocrlf=false", "-c", "core.eol=lf")  # a checkout with LF, not CRLF


def git(*words: str, at: Path = ROOT, give: bytes = b"", check: bool = True) -> str | None:
    """git's answer in the folder `at`, stripped. Where git fails: Fail; with check=False None."""
    answer = git_bytes(*words, at=at, give=give, check=check)
    return None if answer is None else answer.decode(errors="replace").strip()


def git_bytes(
    *words: str, at: Path = ROOT, give: bytes = b"", check: bool = True, index: Path | None = None
) -> bytes | None:
    """The same as bytes. A Fail has git's own words: they name the command that helps.

    index: a file to use in place of the repository's index.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GIT_") or GIT_VARIABLES.fullmatch(name)
    }
    environment |= {"GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"}
    if index:
        environment["GIT_INDEX_FILE"] = str(index)
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
