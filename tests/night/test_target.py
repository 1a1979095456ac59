"""Any target: another file, another command, another metric, in a repository of its own."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lab import needs_proc
from miniature import ROOT
from repository import git, make_repository

from autoresearch.common import Fail
from autoresearch.night import target
from autoresearch.night.target import TRAIN_PY, judged, metrics_in, read_target

pytestmark = needs_proc

JUDGE = """
import os, sys
import answer
if "--slowly" in sys.argv:
    print("METRIC points=1")
print("METRIC size=3")
print("METRIC points=1000")
print(f"METRIC points={answer.VALUE + (10 if '--held-out' in sys.argv else 0)}")
"""
PROGRAM = """- tag: t1
- edit: lib/answer.py, notes.txt
- run: cp lib/answer.py . && {python} "judge it.py" | cat
- confirm: cp lib/answer.py . && {python} "judge it.py" --held-out
- check: ! grep -q FORBIDDEN lib/answer.py
- metric: points, higher
- limit: 30
- calm: off
"""


class Place:
    """A repository with a night of its own, and night.py far away."""

    def __init__(self, root: Path, **settings):
        self.root = root
        (root / "lib").mkdir(parents=True)
        (root / "lib/answer.py").write_text("VALUE = 1\n")
        (root / "notes.txt").write_text("none\n")
        (root / "judge it.py").write_text(JUDGE)
        program = PROGRAM.replace("{python}", shlex.quote(sys.executable))
        for name, line in settings.items():
            lines = [x for x in program.splitlines() if not x.startswith(f"- {name}:")]
            program = "\n".join([*lines, *([line] if line else [])]) + "\n"
        (root / "program.md").write_text(program)
        make_repository(root, "main")
        left_out = ("AUTORESEARCH", "GIT_", "RAY_", "PYTHONPATH")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
        self.env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}

    def run(self, *words, at: str = ".") -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            "-S",
            ROOT / "night.py",
            *map(str, words),
        ]  # nothing is installed
        return subprocess.run(
            command, cwd=self.root / at, env=self.env, capture_output=True, text=True, timeout=60
        )

    def say(self, *words, at: str = ".") -> str:
        done = self.run(*words, at=at)
        assert done.returncode == 0 and not done.stderr, (words, done.stdout, done.stderr)
        return done.stdout

    def refused(self, *words) -> str:
        done = self.run(*words)
        assert done.returncode == 1 and done.stderr.startswith("FAIL: "), (words, done.stdout)
        assert done.stderr.count("\n") == 1
        return done.stderr

    def attempt(self, words: str, value: str) -> dict:
        (self.root / "lib/answer.py").write_text(value)
        n = int(self.say("try", words).split(":")[0])
        while not any(record["n"] == n for record in self.records()):
            self.say("wait", 5)
        return next(record for record in self.records() if record["n"] == n)

    def records(self) -> list[dict]:
        text = (self.root / ".night/t1/journal.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def until(self, count: int):
        for _ in range(100):
            self.say("wait", 5)
            if (self.root / ".night/t1/journal.jsonl").is_file() and len(self.records()) >= count:
                return
        raise AssertionError(self.say())


def test_a_night_of_another_target_in_a_repository_of_its_own(tmp_path):
    place = Place(tmp_path / "it")
    said = place.say("begin", at="lib")
    assert "target: lib/answer.py, notes.txt; METRIC points, higher is better" in said
    assert f"next: edit lib/answer.py, notes.txt and python3 {ROOT}/night.py try" in said
    place.until(3)
    better = place.attempt("two", "VALUE = 2\n")
    assert (better["status"], better["score"], better["got"]) == ("keep", 2.0, 1.0)
    worse = place.attempt("less", "VALUE = 0.5\n")
    assert (worse["status"], worse["score"]) == ("discard", 0.5)
    crash = place.attempt("what the check refuses", "VALUE = 3  # FORBIDDEN\n")
    assert (crash["status"], crash["why"]) == ("crash", "the check did not succeed")
    silent = place.attempt("no number", "VALUE = 3\nimport sys; sys.exit(0)\n")
    assert silent["why"].startswith("it printed no line `METRIC points=...`")
    table = (place.root / "results.tsv").read_text().splitlines()
    assert table[0] == "commit\tpoints\tmemory_gb\tstatus\tdescription"
    assert table[4].split("\t")[1:5:2] == ["2.000000", "keep"]
    lines = (place.root / ".night/autoresearch.jsonl").read_text().splitlines()
    end = [json.loads(line) for line in lines if better["run"] in line][-1]
    assert end["metrics"] == {"points": 2.0, "size": 3.0} and end["score"] == 2.0
    assert set(end["files"]) == {"lib/answer.py", "notes.txt"}
    audit = place.say("audit")
    assert "one fingerprint throughout" in audit and "5 of 5 scores match the ledger" in audit
    assert "Nothing found that speaks against these numbers." in audit
    git = ["git", "status", "--porcelain", "--untracked-files=all"]
    assert subprocess.run(git, cwd=place.root, capture_output=True, text=True).stdout == ""
    confirmed = place.say("confirm", "--seeds", 2)
    assert "points" in confirmed and "1.000000 better" in confirmed


def test_only_the_targets_files_may_change(tmp_path):
    place = Place(tmp_path / "it")
    place.say("begin")
    (place.root / "judge it.py").write_text("print('METRIC points=9')\n")
    (place.root / "lib/answer.py").write_text("VALUE = 2\n")
    said = place.refused("try", "a kinder judge")
    assert (
        "changed, and not in `edit`: judge it.py" in said and "git checkout 'judge it.py'" in said
    )
    place.say("stop")


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(metric=""), "says `edit` without `metric`: add a line such as `- metric: ns_per_row"),
        (dict(run=""), "says `edit` without `run`"),
        (dict(metric="- metric: points"), "setting `metric: points`: it must be a name and which"),
        (dict(edit="- edit: lib"), "`edit: lib`: it is a folder: name its files"),
        (dict(edit="- edit: lib/new.py"), "it is not in git: make it, git add it, and commit"),
        (dict(edit="- edit: program.md"), "`program.md` cannot be changed by experiments"),
        (dict(edit="- edit: ../else.py"), "cannot be changed by experiments"),
        (dict(tag=""), "program.md has no line `- tag: ...`"),
    ],
)
def test_settings_that_cannot_be_used_are_said_when_the_night_begins(tmp_path, settings, says):
    assert says in Place(tmp_path / "it", **settings).refused("begin")


def test_a_link_is_no_file_to_change(tmp_path):
    place = Place(tmp_path / "it", edit="- edit: link.py")
    (place.root / "link.py").symlink_to("lib/answer.py")
    git(place.root, "add", "-A")
    git(place.root, "commit", "-q", "-m", "link")
    assert "`edit: link.py`: it is a link" in place.refused("begin")


def test_a_bare_repository_has_no_night(tmp_path):
    subprocess.run(["git", "init", "-q", "--bare", tmp_path / "it"], check=True)
    night = [sys.executable, ROOT / "night.py", "begin"]
    told = subprocess.run(night, cwd=tmp_path / "it", capture_output=True, text=True)
    assert told.returncode == 1 and "is a bare repository: git clone it" in told.stderr


def test_without_the_settings_it_is_train_py():
    assert read_target({}) is TRAIN_PY
    with pytest.raises(Fail, match="says `confirm` without `edit`"):
        read_target({"confirm": "make"})


@pytest.mark.parametrize(
    "log, score, why",
    [
        (b"METRIC ns=3\nMETRIC ns=2.5\n", 2.5, None),  # the last one counts
        (b"METRIC ns=2.5 ns\n", None, "it printed no line `METRIC ns=...`"),
        (b"  METRIC ns=1\nmetric ns=1\nMETRIC bytes=4\n", None, "it printed METRIC bytes"),
        (b"METRIC ns=fast\n", None, "METRIC ns=fast is no finite number"),
        (b"METRIC ns=inf\n", None, "METRIC ns=inf is no finite number"),
        (b"METRIC ns=nan\n", None, "is no finite number"),
        (b"x" * 5_000_000 + b"\nMETRIC ns=7\r\n" + b"\xff\0" * 100_000, 7.0, None),
        (b"METRIC ns=1e-3", 0.001, None),  # without a newline at the end
    ],
)
def test_the_score_is_the_last_metric_line(tmp_path, log, score, why):
    path = tmp_path / "log"
    path.write_bytes(log)
    aim = read_target({"edit": "a.c", "run": "make", "metric": "ns, lower"})
    found, reason, _ = judged(aim, path, 0)
    assert found == score and (why is None) == (reason is None) and (why or "") in (reason or "")
    assert judged(aim, path, 1)[0] is None  # exit code other than 0


def test_of_100_mb_of_output_the_metrics_are_found(tmp_path):
    with open(tmp_path / "log", "wb") as file:
        for _ in range(100):
            file.write(b"y" * (1 << 20))
        file.write(b"\nMETRIC ns=4\n")
    assert metrics_in(tmp_path / "log") == {"ns": "4"}


def test_what_measures_is_part_of_the_fingerprint(tmp_path):
    place = Place(tmp_path / "it")
    aim = read_target({"edit": "lib/answer.py", "run": "make", "metric": "points, higher"})

    def commit(path: str) -> str:
        (place.root / path).write_text(f"# {path}\n")
        git(place.root, "add", "-A")
        git(place.root, "-c", "core.hooksPath=/dev/null", "commit", "-q", "-m", "x")
        return target.judge_fingerprint(aim, place.root, "HEAD")

    first = target.judge_fingerprint(aim, place.root, "HEAD")
    assert commit("lib/answer.py") == first
    assert commit("judge it.py") != first


@pytest.mark.parametrize("example", ["kernel", "extract"])
def test_an_example_becomes_a_repository_whose_judge_scores_it(example, tmp_path):
    if example == "kernel" and not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    new = [sys.executable, ROOT / "night.py", "new", example, tmp_path / "a b" / example]
    env = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull}
    said = subprocess.run(new, capture_output=True, text=True, env=env)
    assert said.returncode == 0 and f"  cd '{tmp_path}/a b/{example}'\n" in said.stdout, said
    again = subprocess.run(new, capture_output=True, text=True, env=env)
    assert again.returncode == 1 and "is there already: name a folder that is not" in again.stderr
    root = tmp_path / "a b" / example
    git = ["git", "-C", root, "status", "--porcelain"]
    assert subprocess.run(git, capture_output=True, text=True).stdout == ""
    assert "NIGHT" not in (root / "program.md").read_text()
    allowed = json.loads((root / ".claude/settings.json").read_text())["permissions"]["allow"]
    assert f"Bash(python3 {ROOT}/night.py *)" in allowed
    for words in ([], ["--held-out"]):
        ran = subprocess.run(
            [sys.executable, "judge.py", *words], cwd=root, capture_output=True, text=True
        )
        assert ran.returncode == 0 and ran.stdout.splitlines()[-1].startswith("METRIC "), ran


def test_the_kernels_judge_refuses_a_wrong_result(tmp_path):
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    shutil.copytree(ROOT / "examples/kernel", tmp_path / "it")
    text = (tmp_path / "it/kernel.c").read_text()
    (tmp_path / "it/kernel.c").write_text(text.replace("double sum = 0;", "double sum = 1e-4;"))
    judge = [sys.executable, "judge.py"]
    ran = subprocess.run(judge, cwd=tmp_path / "it", capture_output=True, text=True)
    assert ran.returncode == 1 and "FAIL: wrong by" in ran.stderr
