"""What the ledger says of a run beside its score: commit, device, imported files."""

import hashlib
import importlib
import json
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from miniature import ROOT, draw_a_batch

from autoresearch.referee import provenance
from autoresearch.referee.ledger import read_ledger
from autoresearch.referee.provenance import describe_run, imported_files, kit_sha256

CPU = torch.device("cpu")
SCRIPT = ROOT / "train.py"


def git(directory, *words) -> str:
    command = ["git", "-C", directory, "-c", "user.name=n", "-c", "user.email=e@x", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_without_git_its_part_is_null(prepared, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    run = describe_run(SCRIPT, None, CPU)
    assert [run[name] for name in ("repo", "branch", "commit", "changed")] == [None] * 4
    assert run["fingerprint"] == prepared.fingerprint() and run["torch"] == torch.__version__


def test_with_git(prepared, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("1")
    git(tmp_path, "init", "-b", "autoresearch/mar5")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    (tmp_path / "run.log").write_text("what else lies there is no change of the script")
    run = describe_run(script, "of what runs", CPU)
    assert run["branch"] == "autoresearch/mar5"
    assert run["commit"] == git(tmp_path, "rev-parse", "HEAD")
    assert run["changed"] is False and run["repo"] == str(tmp_path.resolve())
    assert run["train_sha256"] == "of what runs" and run["kit_sha256"] == kit_sha256()
    script.write_text("2")
    again = describe_run(script, "of what runs", CPU)
    assert again["changed"] is True and again["run"] != run["run"]


def test_the_script_is_described_as_it_was_read_and_not_as_it_is_edited(
    prepared_copy, tmp_path, monkeypatch
):
    (tmp_path / "train.py").write_text("1")
    monkeypatch.setattr(
        sys.modules["__main__"], "__file__", str(tmp_path / "train.py"), raising=False
    )
    prepared_copy.clock.__init__()
    (tmp_path / "train.py").write_text("2")
    draw_a_batch(prepared_copy)
    (start,), _ = read_ledger()
    assert start["script"] == "train.py"
    assert start["train_sha256"] == hashlib.sha256(b"1").hexdigest()


def test_an_edit_in_the_kit_shows(monkeypatch, tmp_path):
    (tmp_path / "autoresearch" / "kit").mkdir(parents=True)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    seen = {kit_sha256()}
    for content in (b"a = 1\n", b"a = 2\n"):
        (tmp_path / "autoresearch" / "kit" / "loss.py").write_bytes(content)
        seen.add(kit_sha256())
        (tmp_path / "autoresearch" / "kit" / "loss.py").write_bytes(content[:-1] + b"\r\n")
        assert kit_sha256() in seen
    assert len(seen) == 3


def test_a_run_takes_the_id_it_is_given(prepared_copy, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_RUN", "0123456789ab")
    draw_a_batch(prepared_copy)
    (start,), _ = read_ledger()
    assert start["run"] == "0123456789ab"


def test_an_id_of_another_form_is_refused(prepared, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_RUN", "../../../etc")
    with pytest.raises(prepared.Fail, match="AUTORESEARCH_RUN"):
        describe_run(SCRIPT, None, CPU)


def test_imported_files_are_those_that_no_package_brought(prepared, tmp_path, monkeypatch):
    here = tmp_path / "night"
    contents = {
        here / "inner" / "helper_of_mine.py": b"a = 1\n",
        tmp_path / "elsewhere" / "helper_of_theirs.py": b"b = 2\n",
        tmp_path / "compiled" / "made_by_the_compiler.py": b"c = 3\n",
        tmp_path / "autoresearch" / "kit" / "part_of_the_kit.py": b"d = 4\n",
    }
    for path, content in contents.items():
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        monkeypatch.syspath_prepend(path.parent)
    (here / "train.py").write_text("")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    before = set(imported_files(here / "train.py"))
    in_memory = ModuleType("in_memory")  # as torch makes one; no file, so none to compare
    in_memory.__file__ = "<in_memory>.py"
    monkeypatch.setitem(sys.modules, "in_memory", in_memory)
    for path in contents:
        importlib.import_module(path.stem)
    try:
        imported = imported_files(here / "train.py")
    finally:
        for path in contents:
            del sys.modules[path.stem]
    assert {name: imported[name] for name in set(imported) - before} == {
        "inner/helper_of_mine.py": hashlib.sha256(b"a = 1\n").hexdigest()[:16],
        str(tmp_path / "elsewhere" / "helper_of_theirs.py"): (
            hashlib.sha256(b"b = 2\n").hexdigest()[:16]
        ),
    }
    assert not [name for name in imported if "/torch/" in name or "pathlib" in name]
    assert json.dumps(imported)


# ---- which device


@pytest.mark.skipif(torch.cuda.is_available(), reason="the card here is usable")
def test_a_card_that_torch_cannot_use_is_not_answered_by_hours_on_the_cpu(
    prepared, tmp_path, monkeypatch
):
    monkeypatch.setattr(provenance, "NVIDIA_CARD", tmp_path / "nvidia0")
    assert provenance.training_device() == CPU  # no card at all
    (tmp_path / "nvidia0").touch()
    with pytest.raises(prepared.Fail, match="cannot use it.*AUTORESEARCH_DEVICE=cpu"):
        provenance.training_device()
    # hidden on purpose, asked for, or the demo, which is made for a CPU
    for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("AUTORESEARCH_DEVICE", "cpu")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert provenance.training_device() == CPU
    monkeypatch.setattr(provenance, "manifest", lambda: {"corpus": "demo"})
    assert provenance.training_device() == CPU


def test_no_other_device_can_be_asked_for(prepared, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_DEVICE", "gpu0")
    with pytest.raises(prepared.Fail, match="AUTORESEARCH_DEVICE=gpu0: it must match cpu"):
        provenance.training_device()
