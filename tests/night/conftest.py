"""Labs for the tests of the night: made once, copied by each test."""

import pytest
from lab import Lab
from repository import make_repository

from autoresearch.night import settings
from autoresearch.night.store import Night


@pytest.fixture(scope="session")
def fresh(tmp_path_factory) -> Lab:
    """A lab in which no night has begun. To be copied."""
    return Lab.made(tmp_path_factory.mktemp("fresh") / "it")


@pytest.fixture(scope="session")
def begun(fresh, tmp_path_factory) -> Lab:
    """A lab whose baseline has ended: 1.0000 to 1.0002. To be copied."""
    lab = fresh.copy(tmp_path_factory.mktemp("begun") / "it")
    lab.say("begin")
    lab.until_ended(3)
    lab.until_idle()
    assert "keep  val_bpb 1.000000" in lab.say("wait", 0)
    return lab


@pytest.fixture
def lab(begun, tmp_path) -> Lab:
    return begun.copy(tmp_path / "it")


@pytest.fixture
def night(tmp_path, monkeypatch) -> Night:
    """A night in a repository of its own, on its branch, with nothing queued and no supervisor."""
    monkeypatch.setattr(settings, "PROGRAM", tmp_path / "program.md")
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    (tmp_path / "program.md").write_text("- tag: nov21\n")
    (tmp_path / "train.py").write_text("x = 1\n")
    (tmp_path / ".gitignore").write_text("results.tsv\n.night/\n")
    make_repository(tmp_path, "autoresearch/nov21")
    night = Night(tmp_path)
    night.queue.mkdir(parents=True)
    night.done.mkdir()
    return night
