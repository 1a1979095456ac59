"""Many slots: what becomes of wins on a best that has moved, and which GPU a run sees.

The histories are played by night.py's own supervisor on a real git repository; only the runs are on
paper: each ends when the history says so, with the score that the table gives the file in its
worktree.
"""

import itertools
import re
import shutil
import subprocess

import pytest

import night

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="needs git")

PLACES = "ABCDE"


def text_of(changes: dict[str, str]) -> str:
    """train.py: line A says 1 with the change A1; far enough apart for changes of both to merge."""
    between = "\n# far enough apart\n\n"
    return between.join(f"{place} = {changes.get(place, 0)}\n" for place in PLACES)


def changes_in(text: str) -> dict[str, str]:
    return {
        place: value for place, value in re.findall(r"^(\w) = (\w+)$", text, re.M) if value != "0"
    }


class PaperNight:
    """A night whose baseline has ended. gains: of changes, alone or together, in noise floors."""

    def __init__(self, root, monkeypatch, gains: dict[str, float]):
        self.root, self.gains, self.slots = root, gains, 4
        seeds = enumerate(night.BASELINE_SEEDS, 1)
        self.numbers = {f"seed {seed}": n for n, seed in seeds}  # of experiments, by their changes
        self.started: list[str] = []
        monkeypatch.setattr(night, "ROOT", root)
        monkeypatch.setattr(night, "cache_folder", lambda: root.parent)
        monkeypatch.setattr(night, "slots", lambda: [{"SLOT": str(i)} for i in range(self.slots)])
        monkeypatch.setattr(night.Isolation, "here", lambda _: night.Isolation([], ""))
        monkeypatch.setattr(night.os, "fork", lambda: 1)  # nobody watches, the run is on paper
        monkeypatch.setattr(night.os, "fsync", lambda _: None)  # no power is cut here
        monkeypatch.setattr(night.Experiment, "alive", lambda _: True)
        self.night = night.Night()

    @classmethod
    def made(cls, root):
        """The night to be copied, with its baseline's three runs ended."""
        root.mkdir()
        (root / "program.md").write_text("- tag: nov21\n")
        (root / ".gitignore").write_text("results.tsv\n.night/\n")
        (root / "train.py").write_text(text_of({}))
        for words in ("init -q -b autoresearch/nov21", "add -A", "commit -qm lab"):
            identity = ["-c", "user.name=Human", "-c", "user.email=human@lab"]
            subprocess.run(["git", *identity, *words.split()], cwd=root, check=True)
        with pytest.MonkeyPatch.context() as patch:
            paper = cls(root, patch, {})
            for folder in (paper.night.queue, paper.night.done):
                folder.mkdir(parents=True)
            commit = paper.git("rev-parse", "HEAD")
            for seed in night.BASELINE_SEEDS:
                night.enqueue(paper.night, "baseline", commit, commit, "baseline", seed)
            paper.supervise()
            paper.end(*paper.numbers)

    def git(self, *words) -> str:
        command = ["git", *words]
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def experiment(self, name: str) -> night.Experiment:
        return night.Experiment.at(self.night.folder_of(self.numbers[name]))

    def name_of(self, commit: str) -> str:
        """Of a kept commit, the experiment."""
        record = next(r for r in self.night.records() if r["commit"] == commit)
        names = {n: name for name, n in self.numbers.items()}
        return names[record["n"]]

    def supervise(self):
        """A supervisor that knows only the files looks at them until nothing moves."""
        paper = self

        class Told(night.Supervisor):
            def start(self, experiment, slot):
                best = night.best_of(self.records)
                name = next(name for name, n in paper.numbers.items() if n == experiment.n)
                paper.started.append(f"{name} on {paper.name_of(best['commit']) if best else '-'}")
                super().start(experiment, slot)

        supervisor = Told(self.night)
        while supervisor.turn():
            pass

    # the steps of a history

    def play(self, history: str):
        for step in filter(None, map(str.strip, history.split(";"))):
            word, *names = step.split()
            getattr(self, word)(*names)

    def tries(self, *names):
        """Experiments on the best as it is now; `A1+B1` changes two lines, `simpler:` says so."""
        for name in names:
            self.night.settle()
            tip = self.night.tip()
            simpler = name.startswith("simpler:")
            name = name.removeprefix("simpler:")
            changes = changes_in(night.file_at(tip).decode())
            changes |= {change[0]: change[1] for change in name.split("+")}
            commit = night.commit_file(text_of(changes).encode(), tip, name)
            more = dict(simpler=simpler, change=night.change_id(tip, commit))
            self.numbers[name] = night.enqueue(self.night, "try", commit, tip, name, 42, **more)
        self.supervise()

    def end(self, *names, score=True, slow=False):
        """The runs end between two looks of the supervisor."""
        for name in names:
            experiment = self.experiment(name)
            assert experiment.state() == "running", f"{name} is {experiment.state()}"
            text = (experiment.folder / "tree/train.py").read_text()
            changes = "+".join(map("".join, changes_in(text).items()))
            together = [self.gains[change] for change in changes.split("+") if change]
            gain = self.gains.get(changes, sum(together))
            seed = experiment.asked["seed"] - night.BASELINE_SEEDS[0]
            end = dict(code=0, score=1 - gain / 1000 + seed / 2000, failure=None, memory_gb=1.0)
            end |= dict(tokens=1000, training_seconds=5.0, wall_seconds=6.0, steps=100, pace=[])
            if slow:  # 100 tokens a second at its best, 60 on average
                pace = [[0.5, 100], [1, 150], [1.5, 200], [2, 220], [3, 240], [4, 270], [5, 300]]
                end |= dict(tokens=300, pace=[*pace, [5, 300]])
            if not score:
                end |= dict(code=1, score=None, failure="it broke")
            night.write_json(experiment.folder / f"end-{len(experiment.runs())}.json", end)
        self.supervise()

    def breaks(self, name):
        self.end(name, score=False)

    def slow(self, name):
        self.end(name, slow=True)

    def drop(self, *names):
        """As the agent; what runs is ended by the process beside it."""
        for name in names:
            (self.experiment(name).folder / "drop").touch()
            if self.experiment(name).state() == "running":
                self.breaks(name)
        self.supervise()

    def knob(self, slots):
        self.slots = int(slots)

    # what came of it

    def kept(self) -> str:
        """The branch, after the agent's next command."""
        self.night.settle()
        assert (self.root / "train.py").read_bytes() == night.file_at(self.git("rev-parse", "HEAD"))
        commits = self.git("log", "--reverse", "--format=%H").split()
        return " ".join(map(self.name_of, commits[1:]))

    def fate(self, name: str) -> str:
        [record] = [r for r in self.night.records() if r["n"] == self.numbers[name]]
        runs = len(list((self.night.done / str(record["n"])).glob("run-*.json")))
        score = "-" if record["score"] is None else f"{1000 * (1 - record['score']):g}"
        return f"{record['status']} {score} {runs} runs: {record['why']}"

    def check(self):
        """What holds after any history."""
        records = self.night.records()
        rows = (self.root / "results.tsv").read_text().splitlines()[1:]
        assert rows == [night.row_of(record) for record in records]
        assert len({record["n"] for record in records}) == len(records) == len(self.numbers)
        refs = self.git("for-each-ref", "--format=%(objectname)", "refs/autoresearch/nov21").split()
        assert {record["commit"] for record in records} <= set(refs)
        kept = [record for record in records if record["status"] == "keep"]
        for before, after in itertools.pairwise(kept):
            assert after["base"] == before["commit"]
            assert after["simpler"] or after["score"] < before["score"] - 0.001
        assert len(self.git("worktree", "list").splitlines()) == 1

    def refs(self) -> str:
        names = self.git("for-each-ref", "--format=%(refname:lstrip=3)", "refs/autoresearch/nov21")
        made = [re.fullmatch(r"(\d+)-on-(\w+)", name) for name in names.split()]
        by_number = {str(n): name for name, n in self.numbers.items()}
        commits = {r["commit"][:7]: r["commit"] for r in self.night.records()}
        return ", ".join(
            sorted(f"{by_number[m[1]]} on {self.name_of(commits[m[2]])}" for m in made if m)
        )


# fmt: off
HISTORIES = {
    "each win runs again on the one before": (
        dict(A1=5, B1=10, C1=3),
        "tries A1 B1 C1; end A1; end B1; end C1; end C1; end B1; end B1",
        "A1 C1 B1", dict(A1="keep 5 1", C1="keep 8 2", B1="keep 18 3"),
        "A1 on seed 42, B1 on seed 42, C1 on seed 42, B1 on A1, C1 on A1, B1 on C1",
        "B1 on A1, B1 on C1, C1 on A1",
    ),
    "of wins that end at once the largest is kept, the others follow": (
        dict(A1=5, B1=10, C1=7),
        "tries A1 B1 C1; end A1 B1 C1; end A1 C1; end A1",
        "B1 C1 A1", dict(B1="keep 10 1", C1="keep 17 2", A1="keep 22 3"),
        "A1 on seed 42, B1 on seed 42, C1 on seed 42, C1 on B1, A1 on B1, A1 on C1",
        "A1 on B1, A1 on C1, C1 on B1",
    ),
    "three that wait for one slot go by their gain, before a new idea": (
        dict(A1=5, B1=10, C1=7, D1=20, E1=9),
        "tries A1 B1 C1 D1 E1; knob 1; end A1 B1 C1 D1; end B1; end C1; end A1; end E1",
        "D1 B1 C1 A1 E1", dict(B1="keep 30 2", A1="keep 42 2", E1="keep 51 1"),
        "A1 on seed 42, B1 on seed 42, C1 on seed 42, D1 on seed 42,"
        " B1 on D1, C1 on B1, A1 on C1, E1 on A1",
        "A1 on C1, B1 on D1, C1 on B1, E1 on A1",
    ),
    "one ends while another's second run lasts": (
        {"A1": 5, "B1": 10, "C1": 3, "A1+C1": 5.5},
        "tries A1 B1 C1; end A1; end B1; end C1; end B1; end C1",
        "A1 B1", dict(B1="keep 15 2", C1="discard 5.5 2 runs: the best moved; on .* better by 0.0005"),
        "A1 on seed 42, B1 on seed 42, C1 on seed 42, B1 on A1, C1 on A1",
        "B1 on A1, C1 on A1",
    ),
    "the best moves twice under one run, which runs again once": (
        dict(A1=5, B1=10, C1=3),
        "tries A1 C1; end A1; tries B1; end B1; end C1; end C1",
        "A1 B1 C1", dict(C1="keep 18 2"),
        "A1 on seed 42, C1 on seed 42, B1 on A1, C1 on B1",
        "C1 on B1",
    ),
    "a second run that is not better is no win": (
        {"A1": 5, "B1": 4, "A1+B1": 5},
        "tries A1 B1; end A1 B1; end B1",
        "A1", dict(B1="discard 5 2 runs: equal to the best"),
        "A1 on seed 42, B1 on seed 42, B1 on A1", "B1 on A1",
    ),
    "within the noise of its own base there is no second run": (
        dict(A1=5, B1=0.5),
        "tries A1 B1; end A1; end B1",
        "A1", dict(B1="discard 0.5 1 runs: the best moved; on .* within the noise"),
        "A1 on seed 42, B1 on seed 42", "",
    ),
    "simpler code is measured by the best that it stood on, then by the new one": (
        {"A1": 5, "B1": 0, "C1": 0, "A1+B1": 4.5, "A1+C1": 3},
        "tries A1 simpler:B1 simpler:C1; end A1; end B1 C1; end B1; end C1",
        "A1 B1", dict(B1="keep 4.5 2", C1="discard 3 2"),
        "A1 on seed 42, B1 on seed 42, C1 on seed 42, B1 on A1, C1 on A1", "B1 on A1, C1 on A1",
    ),
    "what conflicts is handed back with the score it won with": (
        dict(A1=5, A2=8, B1=0),
        "tries A1 A2; end A1; end A2",
        "A1", dict(A2="discard 8 1 runs: handed back: it conflicts with the best, .* better by 0.008"),
        "A1 on seed 42, A2 on seed 42, A2 on A1", "",
    ),
    "what waited and conflicts is handed back unmeasured": (
        dict(A1=5, A2=8),
        "knob 1; tries A1 A2; end A1",
        "A1", dict(A2="crash - 0 runs: handed back: it conflicts with the best"),
        "A1 on seed 42, A2 on A1", "",
    ),
    "what the best has already is not measured again": (
        dict(A1=5, B1=2),
        "tries A1 A1+B1; end A1+B1; end A1",
        "A1+B1", {"A1": "discard 5 1 runs: handed back: its change is in the best, .* already"},
        "A1 on seed 42, A1+B1 on seed 42, A1 on A1+B1", "",
    ),
    "a part of it that the best has already is no conflict": (
        dict(A1=5, B1=2),
        "tries A1 A1+B1; end A1; end A1+B1; end A1+B1",
        "A1 A1+B1", {"A1+B1": "keep 7 2"},
        "A1 on seed 42, A1+B1 on seed 42, A1+B1 on A1", "A1+B1 on A1",
    ),
    "dropped while it waits for its second run, and while that lasts": (
        dict(A1=5, B1=9, C1=7),
        "tries A1 B1 C1; knob 1; end A1; end B1; end C1; drop C1; drop B1",
        "A1", dict(C1="crash - 1 runs: dropped while it waited", B1="crash - 2 runs: dropped"),
        "A1 on seed 42, B1 on seed 42, C1 on seed 42, B1 on A1", "B1 on A1",
    ),
    "a disturbed run on the new best is repeated, whatever was disturbed on the old one": (
        dict(A1=5, B1=10),
        "tries A1 B1; slow B1; end A1; end B1; slow B1; end B1",
        "A1 B1",
        dict(B1="keep 15 4"),
        "A1 on seed 42, B1 on seed 42, B1 on seed 42, B1 on A1, B1 on A1",
        "B1 on A1",
    ),
    "two that go well alone and break together": (
        dict(A1=5, B1=9),
        "tries A1 B1; end A1; end B1; breaks B1",
        "A1", dict(B1="crash - 2 runs: it broke"),
        "A1 on seed 42, B1 on seed 42, B1 on A1", "B1 on A1",
    ),
}
# fmt: on


@pytest.fixture(scope="module")
def after_baseline(tmp_path_factory):
    root = tmp_path_factory.mktemp("paper") / "lab"
    PaperNight.made(root)
    return root


@pytest.mark.parametrize("history", HISTORIES)
def test_many_wins_on_one_base(after_baseline, tmp_path, monkeypatch, history):
    gains, steps, kept, fates, started, refs = HISTORIES[history]
    shutil.copytree(after_baseline, tmp_path / "lab")
    paper = PaperNight(tmp_path / "lab", monkeypatch, gains)
    paper.play(steps)
    assert paper.kept() == kept
    for name, fate in fates.items():
        assert re.match(fate, paper.fate(name)), paper.fate(name)
    assert ", ".join(paper.started) == started
    assert paper.refs() == refs
    paper.check()
