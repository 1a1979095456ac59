"""What the tests share: a miniature prepared set, and the two scripts run as a user types them."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: two threads on a busy machine mostly wait for each other
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WORDS = "the cat sat on a mat while dogs ran over hills and rivers under the old blue moon".split()


def write_texts(directory: Path, files: int = 120, seed: int = 0) -> Path:
    """A folder of small text files of random words: something to learn, and enough for every split."""
    import random

    draw = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        paragraphs = [" ".join(draw.choices(WORDS, k=draw.randrange(5, 60))) + ".\n" for _ in range(draw.randrange(1, 20))]
        (directory / f"text{number:04d}.txt").write_text("\n".join(paragraphs))
    return directory


def run(script: str, *arguments, cache: Path, cwd: Path = ROOT, timeout: float = 300, **environment) -> subprocess.CompletedProcess:
    """`python SCRIPT ARGUMENTS` as a subprocess on the given cache; stdout and stderr captured apart."""
    env = {**os.environ, "AUTORESEARCH_CACHE": str(cache), "PYTHONUNBUFFERED": "1", **environment}
    return subprocess.run([sys.executable, script, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="session")
def miniature(tmp_path_factory) -> Path:
    """The cache of a prepared set so small that training on it takes seconds: T = 64, 300 tokens, 2 s."""
    base = tmp_path_factory.mktemp("miniature")
    done = run("prepare.py", "--data", write_texts(base / "texts"), "--seq-len", 64, "--vocab-size", 300, "--eval-tokens", 2048,
               "--time-budget", 2, cache=base / "cache")
    assert done.returncode == 0, done.stderr
    return base / "cache"


@pytest.fixture(autouse=True)
def own_clock(monkeypatch):
    """Every test has a clock of its own: a watchdog counts from the clock's birth, and the tests' process is an old one."""
    import prepare

    monkeypatch.setattr(prepare, "clock", prepare.Clock())


@pytest.fixture
def prepared(miniature, monkeypatch):
    """The `prepare` module on the miniature set."""
    import prepare

    monkeypatch.setenv("AUTORESEARCH_CACHE", str(miniature))
    return prepare
