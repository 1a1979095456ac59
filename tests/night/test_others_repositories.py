"""Repositories, folders and shells as people have them."""

import os
import subprocess

import pytest
from repository import git, make_repository

from autoresearch.night import settings
from autoresearch.night.report import NightReport

REFUSES = "#!/bin/sh\necho ran >> {log}\nexit 1\n"
HOOKS = "post-checkout reference-transaction post-index-change pre-commit fsmonitor".split()


def a_night(lab) -> str:
    """Baseline and one change, and what the audit says of them."""
    lab.say("begin")
    lab.until_ended(3)
    lab.until_ended(lab.attempt("wider", WIDTH=1))
    lab.say()
    lab.until_idle()
    lab.check()
    return lab.say("audit")


@pytest.fixture
def fresh_lab(fresh, tmp_path):
    return fresh.copy(tmp_path / "it")


def test_a_night_runs_none_of_the_users_hooks(fresh_lab):
    log = fresh_lab.folder / "hooks"
    fresh_lab.git("config", "core.fsmonitor", ".git/hooks/fsmonitor")
    (fresh_lab.root / ".git/hooks").mkdir(exist_ok=True)
    for name in HOOKS:
        hook = fresh_lab.root / ".git/hooks" / name
        hook.write_text(REFUSES.format(log=log))
        hook.chmod(0o755)
    (fresh_lab.root / "train.py").chmod(0o755)  # no edit either
    fresh_lab.say("begin")
    fresh_lab.until_ended(3)
    fresh_lab.say()
    assert not log.exists(), log.read_text()


def test_the_variables_of_a_hook_lead_to_no_other_repository(fresh_lab, monkeypatch):
    other = fresh_lab.folder / "other"
    other.mkdir()
    make_repository(other)
    before = git(other, "for-each-ref")
    fresh_lab.env |= {"GIT_DIR": f"{other}/.git", "GIT_WORK_TREE": str(other)}
    fresh_lab.env |= {"GIT_INDEX_FILE": f"{other}/.git/index", "GIT_EXTERNAL_DIFF": "false"}
    fresh_lab.env |= {"GIT_NAMESPACE": "ns", "GIT_LITERAL_PATHSPECS": "1"}
    fresh_lab.say("begin")
    fresh_lab.until_ended(3)
    fresh_lab.say()
    assert git(other, "for-each-ref") == before
    assert "refs/heads/autoresearch/nov21" in git(fresh_lab.root, "for-each-ref")


@pytest.mark.parametrize("eol", ["autocrlf", "attributes"])
def test_a_checkout_with_other_line_ends_is_no_edit_and_no_doubt(fresh_lab, eol):
    lab = fresh_lab
    if eol == "autocrlf":
        lab.git("config", "core.autocrlf", "true")
    else:
        (lab.root / ".git/info").mkdir()
        (lab.root / ".git/info/attributes").write_text("*.py text eol=crlf\n")
    for name in ("train.py", "night.py"):
        (lab.root / name).unlink()
        lab.git("checkout", "--", name)
    assert b"\r\n" in (lab.root / "train.py").read_bytes()
    said = a_night(lab)
    assert "what ran is not" not in said
    numbers = lab.git("show", "--numstat", "--format=", lab.record(4)["commit"]).split()
    assert numbers[:2] == ["1", "1"]
    lab.git("checkout", "-q", "main")
    lab.git("checkout", "-q", "autoresearch/nov21")  # CRLF again
    assert "has no edits" in lab.refused("try", "nothing")


def test_what_git_refuses_is_said_in_its_words(fresh_lab):
    """Somebody else's clone, as in a container; git's answer holds the command that helps."""
    if os.getuid():
        pytest.skip("only root can give a folder to somebody else")
    subprocess.run(["chown", "-R", "1234:1234", fresh_lab.root], check=True)
    for words in (["begin"], []):
        said = fresh_lab.refused(*words)
        assert f"git config --global --add safe.directory {fresh_lab.root}" in said
    audit = fresh_lab.say("audit")
    assert f"safe.directory {fresh_lab.root}" in audit


def test_a_relative_cache_means_the_folder_where_it_was_typed(fresh_lab):
    fresh_lab.env["AUTORESEARCH_CACHE"] = os.path.relpath(fresh_lab.cache, fresh_lab.root)
    fresh_lab.say("begin")
    assert fresh_lab.until_ended(3)["score"] is not None


def test_a_ledger_that_cannot_be_written_is_said_before_the_first_run(fresh_lab):
    (fresh_lab.cache / "autoresearch.jsonl").unlink()
    (fresh_lab.cache / "autoresearch.jsonl").mkdir()
    assert "autoresearch.jsonl: Is a directory" in fresh_lab.refused("begin")


def test_a_reader_that_has_read_enough_is_no_failure(lab):
    process = lab.start(PYTHONUNBUFFERED="1")
    process.stdout.close()
    assert process.wait(20) == 0 and process.stderr.read() == ""


def test_a_damaged_line_of_the_journal_is_news(lab, monkeypatch):
    monkeypatch.setattr(settings, "PROGRAM", lab.root / "program.md")
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(lab.cache))
    with open(lab.state_dir / "nov21/journal.jsonl", "ab") as file:
        file.write(b"{torn\n")
    report = NightReport.here(lab.root)
    assert report.damaged_records == 1 and len(report.records) == 3
