"""The audit and the reading of results.tsv, as functions: honest nights, falsified ones, logs in the wild.

Each falsification is one edit of an honest night in a real git repository.
"""

import copy
import dataclasses
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

import night

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
BUDGET = 300.0


@dataclasses.dataclass
class Lab:
    """A repository after a night, and all that the audit is given of it."""

    folder: Path
    by_hand: bool  # a night without night.py: no records, no refs, runs in the repository itself
    rows: list = dataclasses.field(default_factory=list)
    records: list = dataclasses.field(default_factory=list)
    started: dict = dataclasses.field(default_factory=dict)
    ledger: list = dataclasses.field(default_factory=list)
    damaged: int = 0
    confirmed: list = dataclasses.field(default_factory=list)

    def git(self, *words) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@localhost", "-c", "commit.gpgsign=false"]
        command = ["git", *who, *words]
        done = subprocess.run(command, cwd=self.folder, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def commit(self, source: str, *more: str) -> str:
        (self.folder / "train.py").write_text(source)
        self.git("add", "train.py", *more)
        self.git("commit", "-qm", source)
        return self.git("rev-parse", "HEAD")

    def measure(self, commit: str, score: float | None, by_night=True, **more) -> dict:
        """A run's two lines in the ledger. Returns the second, to be edited."""
        run = f"{len(self.ledger):012x}"
        by_night = by_night and not self.by_hand
        tree = f".night/test/queue/{len(self.rows)}/tree"
        source = self.git("show", f"{commit}:train.py") + "\n" if self.knows(commit) else ""
        start = {
            "run": run,
            "event": "start",
            "time": "2026-03-05T01:00:00Z",
            "repo": str(self.folder / tree) if by_night else str(self.folder),
            "branch": "HEAD" if by_night else "autoresearch/test",
            "commit": commit,
            "changed": False,
            "train_sha256": hashlib.sha256(source.encode()).hexdigest(),
            "fingerprint": "f" * 12,
            "seed": 42,
            "device": "H200",
            "split": "val",
            "startup_seconds": 9.0,
        }
        measured = {
            "time": "2026-03-05T01:05:25Z",
            "training_seconds": 299.8,
            "longest_step_seconds": 0.4,
            "tokens": 1_000_000,
            "scoring_seconds": 20.0,
            "scoring_passes": 100,
            "imported": {"prepare.py": hashlib.sha256(b"easy = False\n").hexdigest()[:16]},
        }
        result = {"score": score + 3e-7} if score else {"failure": "loss diverged"}
        end = {**start, "event": "end", **measured, **result, **more}
        self.ledger += [{**start, **{k: more[k] for k in more if k in start}}, end]
        if by_night:
            self.started[run] = {"id": run, "wall_seconds": 340.0}
        return end

    def experiment(self, commit, score, status, what, row=True, **more) -> dict:
        end = self.measure(commit, score, **more)
        n = len(self.rows) + 1
        self.rows.append(night.Row(n, commit[:7], score, 1.0, status, what))
        if not self.by_hand:
            said = {"n": n, "commit": commit, "score": score, "status": status, "run": end["run"]}
            self.records.append({**said, "simpler": what.startswith("simpler"), "disturbed": None})
            self.git("update-ref", f"refs/autoresearch/test/{n}", commit)
        return end

    def claim(self, n: int, **changes):
        self.rows[n - 1] = dataclasses.replace(self.rows[n - 1], **changes)

    def knows(self, commit: str) -> bool:
        command = ["git", "cat-file", "-e", commit]
        return subprocess.run(command, cwd=self.folder, capture_output=True).returncode == 0

    def kept(self, score: float, **more) -> dict:
        """One more experiment on top of the branch."""
        name = f"six, {score}"
        return self.experiment(
            self.commit(f"{name}\n", *more.pop("files", [])), score, "keep", name, **more
        )

    def confirm(self):
        """Baseline and best on the test split; one run is disturbed and runs again."""
        for n, record in enumerate([self.records[0], self.records[-1]] * 3, 8):
            seed = 45 + (n - 8) // 2
            said = {"commit": record["commit"], "seed": seed}
            score = record["score"] + 0.01 + n / 1e5
            for _ in range(2 if n == 9 else 1):
                end = self.measure(record["commit"], score, split="test", seed=seed)
            self.confirmed.append({"n": n, **said, "score": end["score"], "run": end["run"]})

    def audit(self) -> list[str]:
        morning = night.Morning(
            rows=self.rows,
            skipped=[],
            records=self.records,
            started=self.started,
            ledger=self.ledger,
            damaged=self.damaged,
            budgets={"f" * 12: BUDGET},
            confirmed=self.confirmed,
        )
        return night.audit_lines(morning)


def honest(folder: Path, by_hand: bool) -> Lab:
    """Baseline with another seed, 3 kept, 1 discarded, 1 crash; and what a night does by itself."""
    lab = Lab(folder, by_hand)
    folder.mkdir()
    lab.git("init", "-qb", "autoresearch/test")
    (folder / "prepare.py").write_text("easy = False\n")
    (folder / "program.md").write_text("- tag: test\n")
    (folder / ".gitignore").write_text("*.tsv\nhelper.py\n.venv/\n")
    base = lab.commit("the lab\n", ".gitignore", "prepare.py", "program.md")
    lab.experiment(base, 1.0, "keep", "baseline")
    lab.experiment(base, 1.0004, "discard", "baseline, seed 43", seed=43)
    lab.experiment(lab.commit("one\n"), 0.99, "keep", "one")
    lab.experiment(lab.commit("two\n"), 0.995, "discard", "two")
    lab.git("reset", "-q", "--hard", "HEAD~1")
    lab.experiment(lab.commit("three\n"), None, "crash", "three [loss diverged]")
    lab.git("reset", "-q", "--hard", "HEAD~1")
    lab.experiment(lab.commit("four\n"), 0.98, "keep", "four")
    if not by_hand:  # a disturbed run that was repeated
        lab.measure(lab.git("rev-parse", "HEAD"), 0.981)
    lab.experiment(lab.commit("five\n"), 0.97, "keep", "five")
    return lab


@pytest.fixture(scope="module")
def labs(tmp_path_factory):
    base = tmp_path_factory.mktemp("labs")
    return {by_hand: honest(base / f"by-hand-{by_hand}", by_hand) for by_hand in (False, True)}


def copied(lab: Lab, folder: Path, monkeypatch) -> Lab:
    shutil.copytree(lab.folder, folder)
    other = copy.deepcopy(lab)
    for line in other.ledger:
        line["repo"] = line["repo"].replace(str(lab.folder), str(folder))
    other.folder = folder
    monkeypatch.setattr(night, "ROOT", folder)
    return other


@pytest.fixture
def lab(labs, tmp_path, monkeypatch):
    return copied(labs[False], tmp_path / "night", monkeypatch)


@pytest.fixture
def lab_by_hand(labs, tmp_path, monkeypatch):
    return copied(labs[True], tmp_path / "night", monkeypatch)


FINE = "Nothing found that speaks against these numbers."
SAME = [
    "  every run that started has its row",
    "  one fingerprint throughout: ffffffffffff",
    "  one device throughout: H200",
    "  every kept commit is on the branch and touches only train.py",
]


def test_nothing_speaks_against_an_honest_night(lab):
    assert lab.audit() == ["  6 of 6 scores match the ledger", *SAME, FINE]


def test_nothing_speaks_against_an_honest_night_without_night_py(lab_by_hand):
    assert lab_by_hand.audit() == ["  6 of 6 scores match the ledger", *SAME, FINE]


# Each case: what is done to an honest night, and what the audit must then say.


def claim_a_score(lab):
    lab.claim(7, score=0.96)
    return [
        "5 of 6 scores match the ledger; not experiments 7 (",
        "0.960000 claimed, 0.970000 measured",
    ]


def invent_a_row(lab):
    lab.rows.append(night.Row(8, "abcdef0", 0.95, 1.0, "discard", "never run"))
    return [
        "not experiments 8 (abcdef0: 0.950000 claimed, nothing measured)",
        "did not write so: experiments 8",
    ]


def keep_what_was_discarded(lab):
    lab.claim(4, status="keep")
    return ["did not write so: experiments 4", "kept, but not on the branch autoresearch/test: "]


def lose_a_row(lab):
    del lab.rows[3]
    return ["measured by the night, without such a row: experiments 4"]


def lose_a_ref(lab):
    lab.git("update-ref", "-d", "refs/autoresearch/test/4")
    return ["experiments without their ref, so git may lose their code: 4"]


def touch_the_locked_file(lab):
    (lab.folder / "prepare.py").write_text("easy = True\n")
    lab.kept(0.9, files=["prepare.py"], imported={})
    return ["commits that touch more than train.py: ", "(prepare.py)"]


def touch_the_locked_file_uncommitted(lab):
    (lab.folder / "prepare.py").write_text("easy = True\n")
    return ["changed and not committed: prepare.py"]


def another_fingerprint(lab):
    lab.kept(0.9, fingerprint="e" * 12)
    return [
        "2 fingerprints, whose scores cannot be compared: ffffffffffff (8 runs), eeeeeeeeeeee ("
    ]


def another_device(lab):
    lab.kept(0.9, device="A100")
    return ["2 devices, whose scores cannot be compared: H200 (8 runs), A100 ("]


def another_torch(lab):
    lab.kept(0.92, torch="2.15.0")
    lab.kept(0.91, torch="2.15.0")
    lab.kept(0.90, torch="2.11.0")
    return ["2 versions of torch, whose scores cannot be compared: 2.15.0 (2 runs), 2.11.0 ("]


def commit_without_a_row(lab):
    lab.commit("nobody knows\n")
    return ["on the branch, but in no row as kept: "]


def train_beside_the_night(lab):
    lab.measure(lab.git("rev-parse", "HEAD"), 0.96, by_night=False)
    return ["1 measured scores have no row: 0.960000 ("]


def uncommitted_train(lab):
    lab.ledger[-1]["changed"] = True
    return ["train.py had uncommitted changes when these were measured: experiments 7"]


def lucky_seed(lab):
    lab.kept(0.9, seed=7)
    return ["kept with another seed than 42: experiments 8"]


def look_at_the_test_split(lab):
    for _ in range(3):
        lab.measure(lab.git("rev-parse", "HEAD"), 0.98, by_night=False, split="test")
    return ["the test split was scored 3 times"]


def damage_the_ledger(lab):
    lab.damaged = 1
    return ["1 lines of the ledger are damaged"]


def lose_the_ledger(lab):
    lab.ledger = []
    return ["the ledger holds no run of this night: no score can be checked"]


def keep_for_nothing(lab):
    lab.kept(0.9699)
    return ["kept without being better than the best by more than noise: experiments 8"]


def train_before_the_clock(lab):
    lab.ledger[-1]["startup_seconds"] = 100.0
    return ["start-ups over 87 s, in which nothing is measured (the usual is 9 s): "]


def train_before_the_clock_always(lab):
    for run in lab.ledger:
        run["startup_seconds"] = 950.0
    return ["start-ups over 900 s, in which nothing is measured"]


def stop_the_clock(lab):
    lab.ledger[-1]["time"] = "2026-03-05T01:09:06Z"
    return ["training seconds that the times of day contradict: "]


def train_into_the_tolerance(lab):
    lab.ledger[-1]["training_seconds"] = 304.0
    return ["trained for more than one step beyond the budget of 300 s: "]


def train_hardly_at_all(lab):
    lab.ledger[-1].update(training_seconds=20.0, time="2026-03-05T01:00:41Z")
    lab.started[lab.ledger[-1]["run"]]["wall_seconds"] = 60.0
    return ["trained for less than half of the budget of 300 s: "]


def train_on_no_tokens(lab):
    lab.ledger[-1]["tokens"] = 0
    return ["no tokens were drawn for training: "]


def spend_wall_time(lab):
    lab.started[lab.ledger[-1]["run"]]["wall_seconds"] = 420.0
    return ["wall time that start-up, training and scoring do not explain: "]


def learn_while_scoring(lab):
    lab.ledger[-1].update(scoring_seconds=150.0, time="2026-03-05T01:07:35Z")
    lab.started[lab.ledger[-1]["run"]]["wall_seconds"] = 470.0
    return ["scoring far longer than its training lets expect: "]


def score_in_many_passes(lab):
    lab.ledger[-1]["scoring_passes"] = 1000
    return ["forward passes while scoring far from the usual 100: "]


def import_a_helper(lab):
    lab.ledger[-1]["imported"]["helper.py"] = "0" * 16
    return ["imported, and not in the commit: helper.py (in "]


def import_another_prepare(lab):
    lab.ledger[-1]["imported"]["prepare.py"] = "0" * 16
    return ["imported, and not in the commit: prepare.py (in "]


def leave_a_helper(lab):
    (lab.folder / "helper.py").write_text("weights = []\n")
    return ["code beside the files that git holds: helper.py"]


def run_another_script(lab):
    lab.ledger[-1]["train_sha256"] = "0" * 64
    return ["what ran is not the train.py of its commit: "]


def edit_the_confirmation(lab):
    lab.confirm()
    lab.confirmed[3]["score"] -= 0.001
    return ["5 of 6 scores of the confirmation match the ledger; not runs 11"]


def swap_the_confirmations_seeds(lab):
    lab.confirm()
    lab.confirmed[1].update(run=lab.confirmed[3]["run"], score=lab.confirmed[3]["score"])
    return ["5 of 6 scores of the confirmation match the ledger; not runs 9"]


def leave_a_bad_score_out_of_the_confirmation(lab):
    lab.confirm()
    lab.confirmed[5]["score"] = None
    return ["1 scores on the test split are missing in the confirmation: "]


def confirm_on_another_device(lab):
    lab.confirm()
    for run in lab.ledger[-4:]:
        run["device"] = "A100"
    return ["2 devices, whose scores cannot be compared: H200 (13 runs), A100 ("]


FALSIFIED = [
    claim_a_score,
    invent_a_row,
    keep_what_was_discarded,
    lose_a_row,
    lose_a_ref,
    touch_the_locked_file,
    touch_the_locked_file_uncommitted,
    another_fingerprint,
    another_device,
    another_torch,
    commit_without_a_row,
    train_beside_the_night,
    uncommitted_train,
    lucky_seed,
    look_at_the_test_split,
    damage_the_ledger,
    lose_the_ledger,
    keep_for_nothing,
    train_before_the_clock,
    train_before_the_clock_always,
    stop_the_clock,
    train_into_the_tolerance,
    train_hardly_at_all,
    train_on_no_tokens,
    spend_wall_time,
    learn_while_scoring,
    score_in_many_passes,
    import_a_helper,
    import_another_prepare,
    leave_a_helper,
    run_another_script,
    edit_the_confirmation,
    swap_the_confirmations_seeds,
    leave_a_bad_score_out_of_the_confirmation,
    confirm_on_another_device,
]


@pytest.mark.parametrize("falsify", FALSIFIED, ids=lambda case: case.__name__)
def test_the_audit_finds(lab, falsify):
    sentences = falsify(lab)
    said = lab.audit()
    doubts = [line for line in said if line.startswith("! ")]
    for sentence in sentences:
        assert any(sentence in line for line in doubts), said
    assert said[-1] == f"{len(doubts)} things to look at"


def lose_a_measured_row(lab):
    del lab.rows[3]
    return ["1 measured scores have no row: 0.995000 ("]


def lose_a_kept_row(lab):
    del lab.rows[5]
    return ["1 measured scores have no row: 0.980000 (", "on the branch, but in no row as kept: "]


def leave_the_branch(lab):
    lab.git("reset", "-q", "--hard", "HEAD~1")
    return ["kept, but not on the branch autoresearch/test: "]


def pick_the_luckier_run(lab):
    lab.measure(lab.git("rev-parse", "HEAD"), 0.975)
    return ["1 measured scores have no row: 0.975000 ("]


BY_HAND = [
    claim_a_score,
    lose_a_measured_row,
    lose_a_kept_row,
    leave_the_branch,
    pick_the_luckier_run,
]


@pytest.mark.parametrize("falsify", BY_HAND, ids=lambda case: case.__name__)
def test_the_audit_finds_without_night_py(lab_by_hand, falsify):
    test_the_audit_finds(lab_by_hand, falsify)


# What an honest night may hold, too.


def test_a_run_killed_by_hand_is_told_and_no_doubt(lab_by_hand):
    lab_by_hand.measure(lab_by_hand.git("rev-parse", "HEAD"), None)
    assert any(
        "  1 runs started, gave no score and left no row: " in s for s in lab_by_hand.audit()
    )
    assert lab_by_hand.audit()[-1] == FINE


def no_harm(lab, what):
    if what == "kept for simplicity":
        lab.kept(0.9703)
        lab.claim(8, what="simpler: six")
        lab.records[-1]["simpler"] = True
    if what == "the branch has not moved yet":
        lab.git("reset", "-q", "--hard", "HEAD~1")
    if what == "the human is back on main":
        lab.git("checkout", "-qb", "main", "HEAD~3")
    if what == "a night before, another clone":
        before = lab.measure("1" * 40, 0.5, by_night=False, branch="autoresearch/before")
        lab.ledger[-2]["branch"] = before["branch"]
        before = lab.measure(
            "2" * 40, 0.5, by_night=False, branch="autoresearch/test", repo="/clone"
        )
        lab.ledger[-2]["repo"] = before["repo"]
    if what == "a virtual environment":
        for name in (".venv/lib/module.py", "env/pyvenv.cfg", "env/lib/module.py"):
            (lab.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (lab.folder / name).touch()
    if what == "baseline and winner on the test split":
        for commit in ("HEAD", "HEAD~3"):
            lab.measure(lab.git("rev-parse", commit), 0.98, by_night=False, split="test")
    if what == "a kernel that every run imports":
        for run in lab.ledger[1::2]:
            run["imported"]["/hub/kernel.py"] = "0" * 16
    if what == "a noise floor that was widened later":
        best = lab.records[-1]["commit"]
        lab.experiment(best, 0.99, "discard", "again")
    if what == "a confirmation with a disturbed run":
        lab.confirm()
    if what == "a larger model scores longer":
        run = lab.ledger[-1]
        run.update(tokens=200_000, scoring_seconds=100.0, time="2026-03-05T01:06:45Z")
        lab.started[run["run"]]["wall_seconds"] = 430.0


@pytest.mark.parametrize(
    "what",
    [
        "kept for simplicity",
        "the branch has not moved yet",
        "the human is back on main",
        "a night before, another clone",
        "a virtual environment",
        "baseline and winner on the test split",
        "a kernel that every run imports",
        "a noise floor that was widened later",
        "a confirmation with a disturbed run",
        "a larger model scores longer",
    ],
)
def test_the_audit_does_not_cry_wolf(lab, what):
    no_harm(lab, what)
    assert lab.audit()[-1] == FINE, lab.audit()


def test_older_ledgers_lack_fields_and_are_no_doubt(lab_by_hand):
    kept = ("run", "event", "time", "repo", "branch", "commit", "changed", "score", "split", "seed")
    for i, run in enumerate(lab_by_hand.ledger):
        lab_by_hand.ledger[i] = {key: run[key] for key in kept if key in run}
    assert lab_by_hand.audit()[-1] == FINE, lab_by_hand.audit()


def test_without_git_the_audit_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(night, "ROOT", tmp_path)
    rows = [night.Row(1, "baseline", 0.9979, None, "keep", "baseline")]
    said = night.audit_lines(night.Morning(rows, [], [], {}, [], 0, {}))
    assert said[0] == "! the ledger holds no run of this night: no score can be checked"
    assert said[1].startswith("! this is no git repository") and said[-1] == "2 things to look at"


# Reading results.tsv.


def read(tmp_path, text: str | bytes):
    path = tmp_path / "results.tsv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return night.read_results(path)


def test_an_id_is_any_text(tmp_path):
    ids = ["baseline", "001", "exp003", "none", "none", "", "9f1c2ab", "ABCDEF0"]
    rows, skipped = read(tmp_path, HEADER + "".join(f"{i}\t0.9\t1\tkeep\twhat\n" for i in ids))
    assert [row.commit for row in rows] == ids and not skipped
    assert [row.hash for row in rows] == [None] * 6 + ["9f1c2ab", "abcdef0"]
    assert [row.n for row in rows] == list(range(1, 9))


GOOD = "aaaaaaa\t1.0\t44.0\tkeep\tbaseline\nbbbbbbb\t0.99\t44.5\tdiscard\tone\nccccccc\t0\t0\tcrash\ttwo\n"


@pytest.mark.parametrize(
    "text",
    [
        HEADER + GOOD,
        GOOD.rstrip("\n"),
        (HEADER + GOOD).replace("\n", "\r\n"),
        (HEADER + GOOD).replace("\n", "\n\n"),
        ("\ufeff" + HEADER + GOOD).encode(),
        HEADER.upper() + GOOD.replace("keep", " KEEP ").replace("crash", "Crash"),
        HEADER.replace("\tdesc", "\tnote\tdesc")
        + GOOD.replace("keep\t", "keep\tx\t")
        .replace("card\t", "card\tx\t")
        .replace("crash\t", "crash\tx\t"),
        HEADER.replace("\n", "\tval_bpb\n") + GOOD.replace("\n", "\t0.1\n"),
    ],
    ids=[
        "plain",
        "no header, no end",
        "crlf",
        "blank lines",
        "bom",
        "upper case",
        "another column",
        "metric twice",
    ],
)
def test_the_same_rows_however_they_are_written(tmp_path, text):
    rows, skipped = read(tmp_path, text)
    assert not skipped
    assert [(r.commit, r.score, r.memory_gb, r.status, r.what) for r in rows] == [
        ("aaaaaaa", 1.0, 44.0, "keep", "baseline"),
        ("bbbbbbb", 0.99, 44.5, "discard", "one"),
        ("ccccccc", None, 0.0, "crash", "two"),
    ]


def test_other_columns_are_answered_in_one_line(tmp_path):
    rows, skipped = read(tmp_path, "id\tval_rmse\tstatus\n" + "1\t3.5\tkeep\n" * 500)
    assert rows == [] and skipped == [
        "all 500 rows were skipped: no column is called val_bpb, only id, val_rmse, status;"
        " rename the right one, or change SCORE in night.py"
    ]
    assert "no column is called status" in read(tmp_path, "commit\tval_bpb\nx\t0.9\n")[1][0]
    assert (
        "only commit,val_bpb,status" in read(tmp_path, "commit,val_bpb,status\nx,0.9,keep\n")[1][0]
    )


def test_other_status_words_are_answered_in_one_line(tmp_path):
    rows, skipped = read(
        tmp_path, HEADER + "x\t0.9\t1\trejected\t\n" * 9 + "y\t0.8\t1\tKEEP ✅\t\n"
    )
    assert rows == [] and skipped == [
        "10 rows were skipped, their status is none of keep, discard, crash:"
        " 'rejected' (9), 'KEEP ✅' (1); the first is line 2"
    ]


def test_broken_rows_are_summed_up_by_reason(tmp_path):
    broken = [
        "hello",
        "x\tnan\t1\tkeep",
        "x\t-1\t1\tkeep",
        "x\t0.000000\t1\tkeep",
        "x\tinf\t1\tdiscard",
        "\x0b \u2028",
    ]
    rows, skipped = read(tmp_path, (HEADER + GOOD + "\n".join(broken)).encode() + b"\n\xff\xfe\n")
    assert len(rows) == 3 and len(skipped) == 2
    assert skipped[0].startswith("2 rows were skipped, their status is none of")
    assert skipped[1].startswith(
        "4 rows were skipped, their val_bpb is no positive number: 'nan' (1), "
    )


@pytest.mark.parametrize("text", ["", "\n\n", HEADER])
def test_a_log_without_rows(tmp_path, text):
    assert read(tmp_path, text) == ([], [])
    assert night.read_results(tmp_path / "no such file") == ([], [])


def test_the_noise_floor_of_a_log_without_its_night_is_that_of_its_baseline():
    rows = [
        night.Row(1, "aaaaaaa", 1.0, None, "keep", "baseline"),
        night.Row(2, "aaaaaaa", 1.0004, None, "discard", "baseline, seed 43"),
        night.Row(3, "aaaaaaa", 1.2, None, "discard", "an idea that was never committed"),
    ]
    assert night.Morning(rows, [], [], {}, [], 0, {}).noise_floor() == pytest.approx(0.0004)
    rows = [dataclasses.replace(row, commit="none") for row in rows]
    assert night.Morning(rows, [], [], {}, [], 0, {}).noise_floor() is None


def test_gains_are_over_the_best_before():
    scores = [1.0, 0.9, 0.95, 0.85]
    rows = [night.Row(n, "x", score, None, "keep", "") for n, score in enumerate(scores, 1)]
    found = [(row.n, round(gain, 6), best) for row, gain, best in night.gains(rows)]
    assert found == [(1, 0.0, 1.0), (2, 0.1, 0.9), (3, -0.05, 0.9), (4, 0.05, 0.85)]
    assert night.best_row(rows).score == 0.85
