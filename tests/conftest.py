"""What the tests share: a miniature prepared set, and a clock of their own."""

import faulthandler
import os
import shutil
from pathlib import Path

import pytest
from forks import Forks
from miniature import MINIATURE, run, write_texts

from autoresearch.referee.clock import clock

# Tiny tensors: two threads on a busy machine mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Containers often set it: then each process that a test starts compiles torch's Python again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Begun first, so that the other processes have something to do until the end.
LONGEST = [
    "test_claude.py",
    "test_codex.py",
    "test_ray_engine.py",
    "test_kills.py",
    "test_train.py",
    "test_commands.py",
    "test_leaks.py",
    "test_climbmix.py",
]


def pytest_collection_modifyitems(items):
    last = len(LONGEST)
    items.sort(key=lambda i: LONGEST.index(i.path.name) if i.path.name in LONGEST else last)


@pytest.fixture(scope="session")
def miniature(tmp_path_factory) -> Path:
    """The cache of a prepared set so small that training on it takes seconds.

    T = 64, 300 tokens, a budget of 2 s.
    """
    base = tmp_path_factory.mktemp("miniature")
    texts = write_texts(base / "texts")
    done = run("prepare.py", "--data", texts, *MINIATURE, cache=base / "cache")
    assert done.returncode == 0, done.stderr
    return base / "cache"


@pytest.fixture(scope="module")
def processes(miniature):
    """A fork server that has imported `drive`, on the miniature set. Nothing is compiled."""
    environment = {"AUTORESEARCH_CACHE": str(miniature), "TORCH_COMPILE_DISABLE": "1"}
    forks = Forks("import drive", **environment)
    yield forks
    forks.close()


@pytest.fixture(autouse=True)
def own_clock():
    """Every test has a clock of its own, and none leaves a watchdog behind."""
    clock.__init__()
    yield
    faulthandler.cancel_dump_traceback_later()
    clock.unlock()


@pytest.fixture
def prepared(miniature, monkeypatch):
    """The `prepare` module on the miniature set."""
    import prepare

    monkeypatch.setenv("AUTORESEARCH_CACHE", str(miniature))
    return prepare


@pytest.fixture
def prepared_copy(miniature, tmp_path, monkeypatch):
    """The `prepare` module on a copy of the miniature set, to be written to or broken."""
    import prepare

    shutil.copytree(miniature, tmp_path / "cache")
    (tmp_path / "cache" / "autoresearch.jsonl").unlink(missing_ok=True)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    return prepare
