"""The audit on honest nights and on falsified ones, each falsified by one edit."""

import dataclasses
import hashlib
from pathlib import Path

import pytest
from repository import git, make_repository

from autoresearch.night.audit import audit_lines
from autoresearch.night.report import NightReport
from autoresearch.night.results import Row

LOCKED = b"easy = False\n"  # what prepare.py and autoresearch/common.py hold here
FINE = "Nothing found that speaks against these numbers."


def short_sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


class Lab(NightReport):
    """A repository after a night, and the report on it that the audit is given."""

    def __init__(self, root: Path):
        super().__init__(root, rows=[], branch="autoresearch/test")

    def git(self, *words) -> str:
        return git(self.root, *words)

    @property
    def tip(self) -> str:
        return self.git("rev-parse", "HEAD")

    def commit(self, source: str, *more: str) -> str:
        (self.root / "train.py").write_text(source)
        self.git("add", "train.py", *more)
        self.git("commit", "-qm", source)
        return self.tip

    def measure(self, commit: str, score: float | None, source=b"", by_night=True, **more) -> dict:
        """A run's two lines in the ledger. Returns the second, to be edited."""
        run = f"{len(self.ledger):012x}"
        repo = self.root / ".night/test/queue/1/tree" if by_night else self.root
        start = {"run": run, "event": "start", "time": "2026-03-05T01:00:00Z", "repo": str(repo)}
        start |= {"branch": "HEAD" if by_night else "autoresearch/test", "commit": commit}
        start |= {"fingerprint": "f" * 12, "device": "H200"}
        start |= {"changed": False, "seed": 42, "split": "val"}
        if source:
            start["train_sha256"] = hashlib.sha256(source).hexdigest()
        names = ("prepare.py", "autoresearch/common.py")
        imported = {"imported": {name: short_sha256(LOCKED) for name in names}}
        result = {"score": score + 3e-7} if score else {"failure": "loss diverged"}
        end = {**start, "event": "end", **imported, **result, **more}
        self.ledger += [{**start, **{key: more[key] for key in more if key in start}}, end]
        if by_night:
            self.started[run] = {"id": run}
        return end

    def experiment(self, commit, score, status, what, **more) -> dict:
        source = (self.git("show", f"{commit}:train.py") + "\n").encode()
        end = self.measure(commit, score, source, **more)
        n = len(self.rows) + 1
        self.rows.append(Row(n, commit[:7], score, 1.0, status, what))
        record = {"n": n, "commit": commit, "base": self.git("rev-parse", f"{commit}~1")}
        record |= {"score": score, "status": status, "run": end["run"], "kind": "try"}
        self.records.append({**record, "simpler": False, "slow": None})
        return end

    def claim(self, n: int, **changes):
        self.rows[n - 1] = dataclasses.replace(self.rows[n - 1], **changes)

    def keep(self, score: float, files=(), what="six", **more) -> dict:
        """One more experiment on top of the branch."""
        return self.experiment(self.commit(f"{what}\n", *files), score, "keep", what, **more)

    def confirm(self):
        """Baseline and best on the test split."""
        for n, record in enumerate([self.records[0], self.records[-1]] * 3, 8):
            confirmed = {"n": n, "commit": record["commit"], "seed": 45 + (n - 8) // 2}
            end = self.measure(record["commit"], 0.98, split="test", seed=confirmed["seed"])
            self.confirmed.append({**confirmed, "score": end["score"], "run": end["run"]})

    def audit(self) -> list[str]:
        return audit_lines(self)


@pytest.fixture
def lab(tmp_path) -> Lab:
    """Baseline with another seed, 3 kept, 1 discarded, 1 crash, and a slow run that was repeated."""
    lab = Lab(tmp_path)
    (tmp_path / "autoresearch").mkdir()
    for name in ("prepare.py", "autoresearch/common.py"):
        (tmp_path / name).write_bytes(LOCKED)
    make_repository(tmp_path, "autoresearch/test")
    base = lab.commit("the lab\n")
    lab.experiment(base, 1.0, "keep", "baseline")
    lab.experiment(base, 1.0004, "discard", "baseline, seed 43", seed=43)
    lab.experiment(lab.commit("one\n"), 0.99, "keep", "one")
    lab.experiment(lab.commit("two\n"), 0.995, "discard", "two")
    lab.git("reset", "-q", "--hard", "HEAD~1")
    lab.experiment(lab.commit("three\n"), None, "crash", "three [loss diverged]")
    lab.git("reset", "-q", "--hard", "HEAD~1")
    lab.experiment(lab.commit("four\n"), 0.98, "keep", "four")
    lab.measure(lab.tip, 0.981)
    lab.experiment(lab.commit("five\n"), 0.97, "keep", "five")
    return lab


def test_nothing_speaks_against_an_honest_night(lab):
    assert lab.audit() == [
        "  6 of 6 scores match the ledger",
        "  every measured score has its row",
        "  one fingerprint throughout: ffffffffffff",
        "  one device throughout: H200",
        "  every kept commit is on the branch and touches only train.py",
        FINE,
    ]


class Falsify:
    def claim_a_score(lab):
        lab.claim(7, score=0.969998)
        return [
            "5 of 6 scores match the ledger; not experiment 7 (",
            "0.969998 claimed, 0.970000 measured",
        ]

    def invent_a_row(lab):
        lab.rows.append(Row(8, "abcdef0", 0.95, 1.0, "discard", "never run"))
        return [
            "not experiment 8 (abcdef0: 0.950000 claimed, nothing measured)",
            "did not write so: 8",
        ]

    def lose_an_experiment_from_row_and_journal(lab):
        run = lab.records[3]["run"]
        del lab.rows[3], lab.records[3], lab.started[run]  # as NightReport.here finds it then
        return ["1 measured scores have no row: 0.995000 ("]

    def touch_a_locked_file(lab):
        (lab.root / "prepare.py").write_text("easy = True\n")
        lab.keep(0.9, files=["prepare.py"], imported={})
        return ["commits that touch more than train.py: ", "(prepare.py)"]

    def measure_on_another_machine(lab):
        lab.keep(0.90, fingerprint="e" * 12, device="A100")
        return [
            "2 fingerprints, whose scores cannot be compared: ffffffffffff (8 runs), eeeeeeeeeeee (",
            "2 devices, whose scores cannot be compared: H200 (8 runs), A100 (1 runs)",
        ]

    def commit_without_a_row(lab):
        lab.commit("nobody knows\n")
        return ["on the branch, but in no row as kept: "]

    def uncommitted_train(lab):
        lab.ledger[-1]["changed"] = True
        return ["train.py had uncommitted changes in experiments: 7"]

    def pick_the_luckier_run_without_records(lab):
        lab.records, lab.started = [], {}
        return ["1 measured scores have no row: 0.981000 ("]

    def lucky_seed(lab):
        lab.keep(0.9, seed=7)
        return ["kept with another seed than 42: 8"]

    def look_at_the_test_split(lab):
        for _ in range(3):
            lab.measure(lab.tip, 0.98, by_night=False, split="test")
        return ["the test split was scored 3 times"]

    def import_a_helper_from_elsewhere_later(lab):
        lab.ledger[-1]["imported"]["/tmp/helper.py"] = "0" * 16
        return ["imported, and not in the commit: /tmp/helper.py (in "]

    def train_while_the_clock_stands(lab):
        for i, run in enumerate(lab.ledger[1::2]):
            run |= dict(startup_seconds=40, training_seconds=300, scoring_seconds=9)
            lab.started[run["run"]]["wall_seconds"] = 355 + i  # half a second of it for each import
        lab.started[lab.ledger[-1]["run"]]["wall_seconds"] += 100
        return ["lasted longer than its own clock says: ", " by 113 s"]

    def train_on_with_the_rows_at_hand(lab):
        for run in lab.ledger[1::2]:
            run |= dict(startup_seconds=40, training_seconds=300, scoring_seconds=9)
            lab.started[run["run"]] |= dict(wall_seconds=353, asked_seconds=343)
        lab.started[lab.ledger[-1]["run"]]["asked_seconds"] -= 9
        return ["its own clock says, with the rows of its score at hand: ", " by 10 s"]

    def replace_the_judge(lab):
        lab.ledger[-1]["replaced"] = ["prepare.cross_entropy"]
        return ["locked code was replaced while it ran: prepare.cross_entropy (in "]

    def load_the_weights_of_an_earlier_run(lab):
        lab.ledger[-1]["opened"] = ["/tmp/weights.pt"]
        return ["train.py opened or started what is not the run's own: /tmp/weights.pt (in "]

    def load_them_before_anybody_looks(lab):
        lab.keep(0.9, what="open('/tmp/weights.pt'); import prepare")
        return ["other code than the first run's before train.py imports the referee: "]

    def damage_the_journal(lab):
        lab.damaged_records = 1  # as NightReport.here counts them
        return ["1 lines of the night's journal are damaged"]

    def run_another_script(lab):
        lab.ledger[-1]["train_sha256"] = "0" * 64
        return ["what ran is not the train.py of its commit: "]

    def edit_the_confirmation(lab):
        lab.confirm()
        lab.confirmed[3]["score"] -= 0.001
        return ["5 of 6 scores of the confirmation match the ledger; not 11"]

    def leave_a_bad_score_out_of_the_confirmation(lab):
        lab.confirm()
        lab.confirmed[5]["score"] = None
        return ["scored on the test split, not in the confirmation: "]


def cases_of(group: type) -> list:
    return [case for name, case in vars(group).items() if not name.startswith("_")]


@pytest.mark.parametrize("falsify", cases_of(Falsify), ids=lambda case: case.__name__)
def test_the_audit_finds(lab, falsify):
    sentences = falsify(lab)
    said = lab.audit()
    doubts = [line for line in said if line.startswith("! ")]
    for sentence in sentences:
        assert any(sentence in line for line in doubts), said
    assert said[-1] == f"{len(doubts)} thing{'s' if len(doubts) > 1 else ''} to look at"


class Honest:
    def a_displaced_best_and_a_branch_that_has_not_moved_yet(lab):
        before = lab.tip
        lab.git("reset", "-q", "--hard", lab.records[2]["commit"])
        lab.keep(0.9)
        lab.records[-1]["displaced"] = lab.records[-2]["commit"]
        lab.git("reset", "-q", "--hard", before)

    def a_night_before_and_another_clone(lab):
        elsewhere = {"branch": "autoresearch/before"}, {"repo": "/clone"}
        for number, more in zip("12", elsewhere):
            lab.measure(number * 40, 0.5, by_night=False, **more)

    def baseline_and_winner_on_the_test_split_by_hand(lab):
        for commit in ("HEAD", "HEAD~3"):
            lab.measure(lab.git("rev-parse", commit), 0.98, by_night=False, split="test")

    def a_kernel_that_every_run_imports(lab):
        for run in lab.ledger[1::2]:
            run["imported"]["/hub/kernel.py"] = "0" * 16


@pytest.mark.parametrize("happens", cases_of(Honest), ids=lambda case: case.__name__)
def test_the_audit_does_not_cry_wolf(lab, happens):
    happens(lab)
    assert lab.audit()[-1] == FINE, lab.audit()


def test_without_git_the_audit_says_so(tmp_path):
    rows = [Row(1, "baseline", 0.9979, None, "keep", "baseline")]
    said = audit_lines(NightReport(tmp_path, rows))
    assert "! the ledger holds no run of this night: no score can be checked" in said
    assert any("is not checked: git rev-parse --git-dir: fatal: not a git" in line for line in said)
    assert said[-1] == "2 things to look at"
