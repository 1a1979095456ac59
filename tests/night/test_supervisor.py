"""The supervisor with an engine on paper, where a run ends when the history says so."""

import fcntl
import re
import shutil

import pytest
from repository import make_repository

from autoresearch.common import write_json
from autoresearch.night import rules, settings, supervisor
from autoresearch.night.results import row_of
from autoresearch.night.settings import BASELINE_SEEDS
from autoresearch.night.store import Experiment, Night

PLACES = "ABCDE"


def text_of(changes: dict[str, str]) -> bytes:
    """train.py: line A says 1 with the change A1; far enough apart for changes of both to merge."""
    between = "\n# far enough apart\n\n"
    return between.join(f"{place} = {changes.get(place, 0)}\n" for place in PLACES).encode()


def changes_in(text: bytes) -> dict[str, str]:
    found = re.findall(r"^(\w) = (\w+)$", text.decode(), re.M)
    return {place: value for place, value in found if value != "0"}


class PaperEngine:
    """Runs that only have their files; each is locked until the history ends it."""

    def __init__(self):
        self.count = 4
        self.locks = {}
        self.lost = set()
        self.started = []

    def slots(self):
        return [{"SLOT": str(i)} for i in range(self.count)]

    def status_lines(self):
        return ["on paper"]

    def start(self, experiment, k, run, limit):
        lock = self.locks[experiment.n] = open(experiment.folder / "lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_json(experiment.folder / f"run-{k}.json", run)
        self.started.append((experiment.n, run["base"]))

    def poll(self, experiment):
        if experiment.n not in self.lost:
            return "running", ""
        self.lost.remove(experiment.n)
        self.locks[experiment.n].close()
        return "lost", "cut off: on paper"


class PaperNight:
    """A night whose baseline has ended. gains: of changes, alone or together, in noise floors."""

    def __init__(self, root, gains: dict[str, float]):
        self.root, self.gains = root, gains
        self.night, self.engine = Night(root), PaperEngine()
        # of experiments, by their changes
        self.numbers = {f"seed {seed}": n for n, seed in enumerate(BASELINE_SEEDS, 1)}

    @classmethod
    def made(cls, root):
        """The repository, with the baseline's runs ended."""
        (root / "train.py").write_bytes(text_of({}))
        (root / ".gitignore").write_text("results.tsv\n.night/\n")
        make_repository(root, "autoresearch/nov21")
        paper = cls(root, {})
        paper.begin()
        paper.end(*paper.numbers)

    def begin(self):
        for folder in (self.night.queue, self.night.done):
            folder.mkdir(parents=True)
        commit = self.night.repo.git("rev-parse", "HEAD")
        for seed in BASELINE_SEEDS:
            self.night.enqueue("baseline", commit, commit, "baseline", seed)
        self.supervise()

    def experiment(self, name: str) -> Experiment:
        return Experiment.at(self.night.folder_of(self.numbers[name]))

    def supervise(self):
        """A supervisor that knows only the files looks at them until nothing moves."""
        working = supervisor.Supervisor(Night(self.root), self.engine)
        while working.poll_once():
            pass

    # the steps of a history

    def play(self, history: str):
        for step in filter(None, map(str.strip, history.split(";"))):
            word, *names = step.split()
            getattr(self, word)(*names)

    def tries(self, *names):
        """Experiments on the best as it is now; `A1+B1` changes two lines, `simpler:` says so."""
        for name in names:
            self.night.sync_branch()
            tip, repo = self.night.tip(), self.night.repo
            simpler = name.startswith("simpler:")
            name = name.removeprefix("simpler:")
            changes = changes_in(repo.file_at(tip))
            changes |= {change[0]: change[1] for change in name.split("+")}
            commit = repo.commit_file(text_of(changes), tip, name)
            more = dict(simpler=simpler, change=repo.change_id(tip, commit))
            self.numbers[name] = self.night.enqueue("try", commit, tip, name, 42, **more)
        self.supervise()

    def end(self, *names, slow=False):
        """The runs end between two looks of the supervisor."""
        for name in names:
            experiment = self.experiment(name)
            assert experiment.state() == "running", f"{name} is {experiment.state()}"
            text = self.night.repo.file_at(experiment.runs()[-1]["commit"])
            changes = "+".join(map("".join, changes_in(text).items()))
            together = [self.gains[change] for change in changes.split("+") if change]
            gain = self.gains.get(changes, sum(together))
            seed = experiment.asked["seed"] - BASELINE_SEEDS[0]
            end = dict(code=0, score=1 - gain / 1000 + seed / 2000, failure=None, memory_gb=1.0)
            end |= dict(tokens=300 if slow else 1000, training_seconds=5.0, steps=100)
            end |= dict(conditions={})
            write_json(experiment.path("end.json"), end)
            self.engine.locks[experiment.n].close()
        self.supervise()

    def slow(self, name):
        self.end(name, slow=True)

    def lose(self, name):
        self.engine.lost.add(self.numbers[name])
        self.supervise()

    def slots(self, count):
        self.engine.count = int(count)

    # what came of it

    def name_of(self, commit: str) -> str:
        """Of a kept commit, the experiment; the baseline is `-`."""
        n = rules.kept_as(commit, self.night.records())["n"]
        return "-" if n == 1 else next(name for name, number in self.numbers.items() if number == n)

    def started(self) -> str:
        names = {n: name for name, n in self.numbers.items()}
        return ", ".join(f"{names[n]} on {self.name_of(base)}" for n, base in self.engine.started)

    def branch(self) -> list[str]:
        """The experiments whose commits are on the branch, after the agent's next command."""
        self.night.sync_branch()
        repo = self.night.repo
        tip = repo.git("rev-parse", "HEAD")
        assert (self.root / "train.py").read_bytes() == repo.file_at(tip)
        commits = repo.git("log", "--reverse", "--format=%H").split()
        return [self.name_of(commit) for commit in commits[1:]]

    def fate(self, name: str) -> str:
        [record] = [r for r in self.night.records() if r["n"] == self.numbers[name]]
        runs = len(list((self.night.done / str(record["n"])).glob("run-*.json")))
        score = "-" if record["score"] is None else f"{1000 * (1 - record['score']):g}"
        return f"{record['status']} {score} {runs} runs: {record['why']}"

    def check(self):
        """What holds after any history."""
        records = self.night.records()
        rows = (self.root / "results.tsv").read_text().splitlines()[1:]
        assert rows == [row_of(record) for record in records]
        assert len({record["n"] for record in records}) == len(records) == len(self.numbers)
        namespace = "refs/autoresearch/nov21"
        refs = self.night.repo.git("for-each-ref", "--format=%(objectname)", namespace).split()
        assert {record["commit"] for record in records} <= set(refs)
        best, floor = rules.best_of(records), rules.noise_floor(records)
        for record in records:  # the ratchet: nothing measured is better than the best by more
            if record["score"] is not None:
                assert rules.gain(record["score"], best["score"]) <= floor, record


# fmt: off
HISTORIES = {  # gains; steps; the branch; fates; which runs started on what
    "of wins that end at once the largest is kept, the others follow": (
        dict(A1=5, B1=10, C1=7),
        "tries A1 B1 C1; end A1 B1 C1; end A1 C1; end A1",
        "B1 C1 A1", dict(B1="keep 10 1", C1="keep 17 2", A1="keep 22 3"),
        "A1 on -, B1 on -, C1 on -, C1 on B1, A1 on B1, A1 on C1",
    ),
    "three that wait for one slot go by their gain, before a new idea": (
        dict(A1=5, B1=10, C1=7, D1=20, E1=9),
        "tries A1 B1 C1 D1 E1; slots 1; end A1 B1 C1 D1; end B1; end C1; end A1; end E1",
        "D1 B1 C1 A1 E1", dict(B1="keep 30 2", A1="keep 42 2", E1="keep 51 1"),
        "A1 on -, B1 on -, C1 on -, D1 on -, B1 on D1, C1 on B1, A1 on C1, E1 on A1",
    ),
    "simpler code is compared with the best that it stood on, then with the new one": (
        {"A1": 5, "B1": 0, "C1": 0, "A1+B1": 4.5, "A1+C1": 3},
        "tries A1 simpler:B1 simpler:C1; end A1; end B1 C1; end B1; end C1",
        "A1 B1", dict(B1="keep 4.5 2", C1="discard 3 2"), "A1 on -, B1 on -, C1 on -, B1 on A1, C1 on A1",
    ),
    "what conflicts and is no better than the new best is rejected with its score": (
        dict(A1=5, A2=5.5),
        "tries A1 A2; end A1; end A2",
        "A1", dict(A2="discard 5.5 1 runs: rejected .conflict.: it conflicts with the best, .* by 0.0055"),
        "A1 on -, A2 on -",
    ),
    "it displaces all that was kept since its own base; what ran on those runs again on it": (
        dict(A1=5, A2=12, B1=2, D1=4),
        "tries A1 A2 B1; end A1; end B1; end B1; tries D1; end A2; end D1; end D1",
        "A2 D1", dict(A1="keep 5 1", B1="keep 7 2", A2="keep 12 1", D1="keep 16 2"),
        "A1 on -, A2 on -, B1 on -, B1 on A1, D1 on B1, D1 on A2",
    ),
    "what the best has already is not measured again": (
        dict(A1=5, B1=2),
        "tries A1 A1+B1; end A1+B1; end A1",
        "A1+B1", {"A1": "discard 5 1 runs: rejected .conflict.: its change is in the best, .* already"},
        "A1 on -, A1+B1 on -",
    ),
    "what the engine loses runs again, twice": (
        dict(A1=5, B1=2),
        "tries A1 B1; lose A1; end A1; lose B1; lose B1; lose B1",
        "A1", dict(A1="keep 5 2", B1="crash - 3 runs: cut off 3 times: on paper"),
        "A1 on -, B1 on -, A1 on -, B1 on A1, B1 on A1",
    ),
}
# fmt: on


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A repository's folder with a program.md of its own, after the baseline. To be copied."""
    root = tmp_path_factory.mktemp("paper") / "lab"
    root.mkdir()
    (root / "program.md").write_text("- tag: nov21\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "PROGRAM", root / "program.md")
        PaperNight.made(root)
    return root


@pytest.fixture
def root(template, tmp_path, monkeypatch):
    shutil.copytree(template, tmp_path / "lab")
    monkeypatch.setattr(settings, "PROGRAM", tmp_path / "lab/program.md")
    monkeypatch.setattr("os.fsync", lambda _: None)  # no power is cut here
    return tmp_path / "lab"


@pytest.mark.parametrize("history", HISTORIES)
def test_many_wins_on_one_base(root, history):
    gains, steps, branch, fates, started = HISTORIES[history]
    paper = PaperNight(root, gains)
    paper.play(steps)
    assert paper.branch() == branch.split()
    for name, fate in fates.items():
        assert re.match(fate, paper.fate(name)), paper.fate(name)
    assert paper.started() == started
    paper.check()


def test_the_baseline_is_decided_as_a_whole_and_nothing_before_it(root):
    shutil.rmtree(root / ".night")
    paper = PaperNight(root, dict(A1=5))
    paper.begin()
    paper.tries("A1")
    assert [n for n, _ in paper.engine.started] == [1, 2, 3, 4]  # four slots: nothing idles
    paper.end("seed 42", "A1")
    paper.slow("seed 44")
    paper.end("seed 43")
    assert paper.night.records() == []  # the slow one runs again before any is recorded
    assert paper.experiment("seed 44").runs()[0]["again"] == "slow (30% of its expected rate)"
    paper.end("seed 44")
    assert [r["n"] for r in paper.night.records()] == [1, 2, 3, 4]
    assert [r["status"] for r in paper.night.records()] == ["keep", "discard", "discard", "keep"]
    assert paper.night.engine_state() == {"slots": 4, "lines": ["on paper"]}


def test_what_is_queued_while_the_supervisor_releases_its_lock_is_worked_off(root, monkeypatch):
    paper = PaperNight(root, dict(A1=5))
    monkeypatch.setattr(supervisor, "Night", lambda: Night(root))
    engines = []

    def make_engine(night):
        engines.append(PaperEngine())
        engines[-1].close = close
        return engines[-1]

    def close():
        if len(engines) == 1:  # a command that finds the lock taken starts no supervisor
            tip = paper.night.tip()
            n = paper.night.enqueue("try", tip, tip, "late", 42)
            (paper.night.queue / str(n) / "drop").touch()

    supervisor.supervise(make_engine)
    assert len(engines) == 2 and paper.night.records()[-1]["why"] == "dropped while it waited"
