"""Files of ours that refuse, names that would forge a line, locks where the file system has none."""

import errno
import fcntl
import os
import tempfile
from pathlib import Path

import pytest

from autoresearch import common
from autoresearch.common import Fail, file_name, file_problem, lock, open_ours
from autoresearch.corpus.cache import another_set
from autoresearch.referee import manifest
from autoresearch.referee.ledger import append_record, read_ledger


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


# ---- what refuses, and what to type


@pytest.mark.parametrize(
    "number, words",
    {
        errno.ENOENT: ["missing: prepare it"],
        errno.EACCES: ["chmod", "AUTORESEARCH_CACHE"],
        errno.EMFILE: ["too many files", "ulimit -n"],
        errno.ENOSPC: ["full: free some space", "AUTORESEARCH_CACHE"],
        errno.EROFS: ["read-only", "AUTORESEARCH_CACHE"],
        errno.EIO: ["Input/output error"],
    }.items(),
)
def test_what_refuses_is_told_apart_and_never_called_damage(cache, number, words):
    error = OSError(number, os.strerror(number))
    said = file_problem(error, cache / "a.bin", "prepare it")
    assert str(cache / "a.bin") in said and "damage" not in said and "--force" not in said
    for word in words:
        assert word in said


def test_a_forbidden_folder_is_named_with_its_owner_and_its_rights():
    held = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        inner = Path(folder, "inner")
        inner.mkdir(mode=0)
        os.chmod(folder, 0o755)
        if held == 0:  # root may read everything
            os.seteuid(1000)
        try:
            with pytest.raises(Fail) as failure, open_ours(inner / "a"):
                pass
        finally:
            os.seteuid(held)
    whose = "belongs to user 0" if held == 0 else "your own rights"
    for word in (whose, "mode 0", f"{inner}`"):
        assert word in str(failure.value)


def test_nobody_is_told_to_replace_the_set_of_another_user(cache, monkeypatch):
    (cache / "manifest.json").write_text("{}")
    assert "--force" in str(manifest.damaged(cache / "manifest.json"))
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    for failure in (manifest.damaged(cache / "manifest.json"), another_set("of other files")):
        assert "--force" not in str(failure) and "AUTORESEARCH_CACHE" in str(failure)
        assert f"user {cache.stat().st_uid} has made it" in str(failure)


def test_without_a_home_the_cache_asks_for_a_folder(monkeypatch):
    monkeypatch.delenv("AUTORESEARCH_CACHE", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987_654_321)
    with pytest.raises(Fail, match="no home directory here: set HOME"):
        common.cache_dir()


# ---- names


@pytest.mark.parametrize(
    "name, shown",
    [
        (b"caf\xe9.txt", r"caf\xe9.txt"),
        ("café/日.txt".encode(), "café/日.txt"),
        (b"a\nFAIL: b\x1b[31m\t", r"a\nFAIL: b\x1b[31m\t"),
    ],
)
def test_a_name_is_one_line_that_shows_its_odd_bytes(name, shown):
    assert file_name(Path(os.fsdecode(name))) == shown


def test_a_long_name_keeps_its_ends():
    shown = file_name("a" * 300 + ".txt")
    assert len(shown) <= 160 and shown.startswith("aaa") and shown.endswith("a.txt")


# ---- locks


def test_a_file_system_without_locks(cache, monkeypatch, capsys):
    """No flock below the cache: processes are kept apart all the same, and one line says how."""
    real = fcntl.flock

    def flock(descriptor, kind):
        if os.fstat(descriptor).st_ino in {
            path.stat().st_ino for path in (cache, *cache.iterdir())
        }:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        real(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    for path in (cache, cache / "lock"):
        readers = [lock(path, shared=True, wait=False) for _ in range(2)]
        assert all(readers) and lock(path, wait=False) is None
        for reader in readers:
            reader.close()
        with lock(path):
            assert lock(path, shared=True, wait=False) is None
    append_record({"n": 1})
    assert read_ledger() == ([{"n": 1}], 0)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" has no locks (No locks available)")[0] for line in said] == [
        f"warning: {place}" for place in (cache.parent, cache)
    ]
