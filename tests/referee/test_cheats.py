"""Small edits of the real train.py that would lower the score: refused, without effect, or named.

What they do in the model while it is scored is tested in test_leaks.py and test_evaluate.py; what
is left on the disk between two runs, in test_night.py.
"""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from miniature import ROOT, run

LOOP = "while clock.elapsed + step_seconds < budget:"
TRAIN = "train(model, optimizer, hp, loader, rows // warm.batch, budget, progress)"
SCORE = "bpb = evaluate_bpb(model, tokenizer, warm.eval_batch)"
LAST_IMPORT = "from torch import Tensor\n"


@dataclass
class Edit:
    """old, which stands once in train.py, becomes new; said: what the run's FAIL line then says."""

    old: str
    new: str
    said: str | None = None


EDITS = {
    "nothing": Edit(TRAIN, TRAIN),
    "trains into the tolerance": Edit(
        LOOP, "while clock.elapsed < budget + 2:", r"trained [\d.]+ s on a 2 s budget"
    ),
    "trains on the validation split": Edit(
        TRAIN,
        'loader = make_dataloader(tokenizer, warm.batch, T, "val", device)\n    ' + TRAIN,
        "make_dataloader gives out only `train`",
    ),
    "never draws a batch": Edit(TRAIN, "progress.close()", "no training batch was drawn"),
    "edits the manifest": Edit(
        TRAIN, 'manifest()["time_budget"] = 600\n    ' + TRAIN, "TypeError: 'mappingproxy'"
    ),
    "moves the clock": Edit(
        SCORE, "clock.began = clock.elapsed\n    " + SCORE, "AttributeError: 'Clock' object"
    ),
    "takes the loader off the clock": Edit(
        TRAIN, "loader.training = False\n    " + TRAIN, "AttributeError: 'generator' object"
    ),
    "counts more bytes a token, and a cheaper loss": Edit(
        SCORE,
        "tokenizer.token_bytes *= 4\n    "
        "F.cross_entropy = F.log_softmax = lambda *a, **k: torch.zeros(())\n    " + SCORE,
    ),
    "imports a file that git does not hold": Edit(LAST_IMPORT, LAST_IMPORT + "import helper\n"),
}


@pytest.fixture(scope="module")
def labs(miniature, tmp_path_factory) -> dict:
    """name -> (folder, what `python train.py` answered there), two runs at a time."""

    def work(item):
        name, edit = item
        lab = tmp_path_factory.mktemp("lab")
        for file in ("prepare.py", "train.py", "night.py", "program.md", ".gitignore"):
            shutil.copy(ROOT / file, lab)
        shutil.copytree(ROOT / "autoresearch", lab / "autoresearch")
        text = (lab / "train.py").read_text()
        assert text.count(edit.old) == 1, edit.old
        text = text.replace(edit.old, edit.new).replace("2**13", "2**10")  # steps of 30 ms
        (lab / "train.py").write_text(text)
        who = ["-c", "user.name=a", "-c", "user.email=a@localhost"]
        for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", name]):
            subprocess.run(["git", *words], cwd=lab, check=True)
        (lab / "helper.py").write_text("STATISTICS = {}\n")
        cache = tmp_path_factory.mktemp("cache")
        for path in miniature.iterdir():
            if path.suffix != ".jsonl":
                (cache / path.name).symlink_to(path)
        done = run("train.py", cache=cache, cwd=lab, TORCH_COMPILE_DISABLE="1")
        return name, (lab, cache, done)

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(work, EDITS.items()))


def score(done) -> float | None:
    found = re.search(r"^val_bpb: ([\d.]+)$", done.stdout, re.M)
    return float(found[1]) if found else None


@pytest.mark.parametrize("name", [name for name, edit in EDITS.items() if edit.said])
def test_what_is_refused(labs, name):
    _, _, done = labs[name]
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("FAIL: ")
    assert re.search(EDITS[name].said, last)
    assert score(done) is None


def test_what_has_no_effect(labs):
    """Four times the bytes would be a quarter of the score, a loss of zero a score of zero."""
    _, _, honest = labs["nothing"]
    _, _, edited = labs["counts more bytes a token, and a cheaper loss"]
    assert score(edited) > 0.5 * score(honest)  # the two runs made different numbers of steps


def audit(lab: Path, cache: Path) -> str:
    """What `night.py audit` says of a results.tsv that claims what the run gave."""
    done = run("night.py", "audit", cache=cache, cwd=lab)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_audit_names_an_imported_file_that_the_commit_lacks(labs):
    lab, cache, done = labs["imports a file that git does not hold"]
    assert score(done)
    assert re.search(r"^! .*not in the commit: helper\.py", audit(lab, cache), re.M)
    lab, cache, _ = labs["nothing"]
    assert "not in the commit" not in audit(lab, cache)


def test_the_honest_run_is_scored_and_not_refused(labs):
    _, _, done = labs["nothing"]
    assert done.returncode == 0, done.stderr
    assert score(done) > 0
