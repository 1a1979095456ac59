"""What the tests share: a miniature prepared set, and the two scripts run as a user types them."""

import faulthandler
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Tiny tensors: two threads on a busy machine mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MINIATURE = "--seq-len 64 --vocab-size 300 --eval-tokens 2048 --time-budget 2".split()
WORDS = "the cat sat on a mat while dogs ran over hills and rivers under the old blue moon".split()


# Begun first, so that the other processes have something to do until the end.
LONGEST = [
    "test_training.py",
    "test_night.py",
    "test_cluster.py",
    "test_cheats.py",
    "test_leaks.py",
]


def pytest_collection_modifyitems(items):
    last = len(LONGEST)
    items.sort(key=lambda i: LONGEST.index(i.path.name) if i.path.name in LONGEST else last)


def write_texts(directory: Path, files: int = 120, seed: int = 0) -> Path:
    """A folder of small text files of random words: something to learn, enough for every split."""
    draw = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        paragraphs = []
        for _ in range(draw.randrange(1, 20)):
            paragraphs.append(" ".join(draw.choices(WORDS, k=draw.randrange(5, 60))) + ".\n")
        (directory / f"text{number:04d}.txt").write_text("\n".join(paragraphs))
    return directory


def run(
    script: str, *arguments, cache: Path, cwd: Path = ROOT, timeout: float = 300, **environment
) -> subprocess.CompletedProcess:
    """`python SCRIPT ARGUMENTS` as a subprocess on the given cache; its output captured."""
    own = {"AUTORESEARCH_CACHE": str(cache), "PYTHONUNBUFFERED": "1"}
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **own, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


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


@pytest.fixture(autouse=True)
def own_clock(monkeypatch):
    """Every test has a clock of its own, and none leaves a watchdog behind."""
    import prepare

    monkeypatch.setattr(prepare, "clock", prepare.Clock())
    yield
    faulthandler.cancel_dump_traceback_later()
    if prepare.clock._held is not None:
        os.close(prepare.clock._held)


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


def draw_a_batch(prepare):
    """What a run must have done before it may ask for a score. Returns the loader."""
    loader = prepare.make_dataloader(prepare.Tokenizer.from_directory(), 2, 64, "train")
    next(loader)
    return loader
