"""The morning: analysis.ipynb itself, run by nbclient on nights that are honest, broken, and falsified.

One kernel runs the notebook's cells on one fixture after another: each is a folder that it changes into.
"""
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import ROOT
from prepare import signed

NOTEBOOK = nbformat.read(ROOT / "analysis.ipynb", as_version=4)
CELLS = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
PROBE = '''
import json
axes = figure.axes[0]
figure.canvas.draw()
texts = [text for text in axes.texts if text.get_text() != "no score yet"]
boxes = [plt.matplotlib.text.Text.get_window_extent(text) for text in texts]
points = axes.transData.transform([*zip(rows.index, rows.score)]) if len(rows) else []
print("PROBE", json.dumps(dict(
    rows=len(rows), kept=len(kept), broken=len(broken), noise=noise, labels=[text.get_text() for text in texts],
    overlaps=sum(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]),
    covered=sum(bool(box.contains(*point)) for box in boxes for point in points),
    outside=sum(box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.x1 or box.y1 > figure.bbox.y1 for box in boxes),
    scale=[axes.get_xscale(), axes.get_yscale()], limits=axes.get_ylim(),
    markers={(text := c.get_label().split(" (")[0]): len(c.get_offsets()) for c in axes.collections if "(" in c.get_label()}), default=float))
'''


def run_notebook(folders: dict[str, Path], picture: bool) -> dict[str, str]:
    """What the notebook prints in each folder, errors included."""
    cells, owner = [], []
    for name, folder in folders.items():
        enter = f"import os, sys\nos.chdir({str(folder)!r})\nsys.path.insert(0, {str(ROOT)!r})\nos.environ['AUTORESEARCH_CACHE'] = 'cache'"
        for source in [enter, *(cell.replace("plt.show()", PROBE) for cell in CELLS if picture or "def draw" not in cell)]:
            cells.append(nbformat.v4.new_code_cell(source))
            owner.append(name)
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=NOTEBOOK.metadata)
    NotebookClient(notebook, timeout=120, iopub_timeout=60, coalesce_streams=True, allow_errors=True).execute(env={**os.environ, "OMP_NUM_THREADS": "1"})
    said = dict.fromkeys(folders, "")
    for name, cell in zip(owner, notebook.cells):
        for output in cell.outputs:
            if output.output_type == "error":
                said[name] += f"ERROR {output.ename}: {output.evalue}\n" + "\n".join(output.traceback)
            data = output.get("data", {})
            said[name] += "\n" + output.get("text", "") + data.get("text/markdown", "") + data.get("text/html", "")
    return said


def probe(text: str) -> dict:
    return json.loads(re.findall(r"^PROBE (.*)", text, re.M)[0])


def random_night(count: int, seed=1) -> list[str]:
    """Rows as a long night leaves them: gains that grow rarer, failures far off, crashes."""
    draw, best, rows = random.Random(seed), 0.9979, []
    for number in range(count):
        commit, kind = f"{draw.randrange(16**7):07x}", draw.random()
        if number == 1:
            rows.append(f"{rows[0][:7]}\t{best + 0.0004:.6f}\t44.0\tdiscard\tbaseline, seed 43")
        elif number == 0 or kind < max(0.04, 0.35 / (1 + number / 12)):
            best -= (0.0005 + draw.expovariate(400) / (1 + number / 25)) * (number > 0)
            rows.append(f"{commit}\t{best:.6f}\t44.1\tkeep\tidea {number}: {'a long story of what changes and why ' * draw.randrange(1, 4)}")
        elif kind > 0.9:
            rows.append(f"{commit}\t0.000000\t0.0\tcrash\tidea {number} [exit 1]")
        else:
            rows.append(f"{commit}\t{best + abs(draw.gauss(0, 0.004)) + 0.3 * (kind > 0.88):.6f}\t44.0\tdiscard\tidea {number}")
    return rows


# ------------------------------------------------------------------------------------------------------ tables, picture

GOOD = ["aaaaaaa\t1.000000\t44.0\tkeep\tbaseline", "aaaaaaa\t1.000400\t44.0\tdiscard\tbaseline, seed 43",
        "bbbbbbb\t0.990000\t44.5\tkeep\tlarger <b>gain</b> | with a bar", "ccccccc\t0.995000\t44.0\tdiscard\tworse",
        "ddddddd\t0.000000\t0.0\tcrash\tbroken [exit 1]", "eeeeeee\t0.988000\t44.0\tkeep\tsmaller gain"]
CRASHES = [f"{n:07x}\t0.000000\t0.0\tcrash\tcrash {n}" for n in range(5)]
BROKEN = [GOOD[0], "bbbbbbb\t0.99", "ccccccc\tnan\t1.0\tkeep\tx", "ddddddd\t-1\t1\tdiscard\tx", "hello", "\x00\x0b\u2028 $x$ \\alpha",
          "eeeeeee\t0.9\t1.0\tmaybe\tx", "fffffff\t0.000000\t0.0\tkeep\tx", "1234567\t0.98\tmuch\tkeep\t$\\frac$ _^",
          "7654321\t0.97\t1.0\tke"]
NIGHTS = {  # name: (bytes of results.tsv or None, experiments, kept, broken rows)
    "no file": (None, 0, 0, 0),
    "empty": (b"", 0, 0, 0),
    "header": (HEADER.encode(), 0, 0, 0),
    "good": ((HEADER + "\n".join(GOOD) + "\n").encode(), 6, 3, 0),
    "no header, no end": ("\n".join(GOOD).encode(), 6, 3, 0),
    "only crashes": ((HEADER + "\n".join(CRASHES)).encode(), 5, 0, 0),
    "crash first": ((HEADER + "\n".join(CRASHES[:1] + GOOD)).encode(), 7, 3, 0),
    "only discarded": ((HEADER + GOOD[3] + "\n").encode(), 1, 0, 0),
    "crlf": ((HEADER + "\n".join(GOOD) + "\n").replace("\n", "\r\n").encode(), 6, 3, 0),
    "bom, blank lines": (b"\xef\xbb\xbf" + (HEADER + "\n\n".join(GOOD) + "\n\n").encode(), 6, 3, 0),
    "upper case": ((HEADER.upper() + "\n".join(row.replace("keep", " KEEP ").replace("crash", "Crash") for row in GOOD)).encode(), 6, 3, 0),
    "missing columns": (("commit\tval_bpb\tstatus\n" + "\n".join("\t".join([*f[:2], f[3]])
                         for f in (r.split("\t") for r in GOOD))).encode(), 6, 3, 0),
    "extra columns": (("note\tstatus\tcommit\tdescription\tval_bpb\n" + "\n".join("\t".join(["x", f[3], f[0], f[4], f[1], "y"])
                       for f in (r.split("\t") for r in GOOD))).encode(), 6, 3, 0),
    "no commit column": (("val_bpb\tstatus\n" + "0.99\tkeep\n").encode(), 0, 0, 2),
    "duplicates": ((HEADER + "\n".join(GOOD + GOOD)).encode(), 12, 6, 0),
    "broken": ((HEADER + "\n".join(BROKEN)).encode() + b"\n\xff\xfe\n", 2, 2, 9),
    "one": ((HEADER + GOOD[0]).encode(), 1, 1, 0),
    **{f"{n} rows": ((HEADER + "\n".join(random_night(n)) + "\n").encode(), n, None, 0) for n in (15, 120, 1000)},
}


@pytest.fixture(scope="module")
def mornings(tmp_path_factory):
    base, folders = tmp_path_factory.mktemp("mornings"), {}
    for name, (content, *_) in NIGHTS.items():
        folders[name] = base / name.replace(" ", "_")
        folders[name].mkdir()
        if content is not None:
            (folders[name] / "results.tsv").write_bytes(content)
    said = run_notebook(folders, picture=True)
    return {name: (said[name], folders[name]) for name in folders}


@pytest.mark.parametrize("name", NIGHTS)
def test_runs_on_any_results(mornings, name):
    (said, folder), (content, experiments, kept, broken) = mornings[name], NIGHTS[name]
    assert "ERROR" not in said, said[-3000:]
    found = probe(said)
    kept = (content or b"").count(b"\tkeep\t") if kept is None else kept
    assert (found["rows"], found["kept"], found["broken"]) == (experiments, kept, broken)
    assert f"{experiments} experiments: {kept} kept" in said and (f"{broken} broken rows" in said) == bool(broken)
    assert "no ledger in cache" in said  # and it says so instead of failing
    assert (folder / "progress.png").read_bytes().startswith(b"\x89PNG")
    assert found["overlaps"] == found["covered"] == found["outside"] == 0 and found["scale"] == ["linear", "linear"]
    assert len(found["labels"]) >= min(kept, 6) * 0.8
    assert max(len(table.split("<tr")) for table in re.findall(r"<table.*?</table>", said, re.S) or [""]) <= 18  # fits a screen


def test_says_what_the_rows_say(mornings):
    for name in ("good", "crlf", "upper case", "extra columns", "missing columns", "bom, blank lines", "no header, no end"):
        said = mornings[name][0]
        assert "6 experiments: 3 kept, 2 discarded, 1 crashed" in said and "noise floor: 0.000400" in said
        assert re.search(r"change +-0\.012000 \(-1\.20%, 30\.0 times the noise floor\)", said)
        table = re.findall(r"<table.*?</table>", said, re.S)[-1]
        assert table.index("bbbbbbb") < table.index("eeeeeee") and "+0.010000" in table and "+0.002000" in table and "aaaaaaa" not in table
        assert probe(said)["markers"] == {"discarded": 2, "kept": 3, "crashed": 1}
    assert "larger &lt;b&gt;gain" in mornings["good"][0]
    assert "line 3: status ''" in mornings["broken"][0] and "line 8: status 'maybe'" in mornings["broken"][0]
    assert "nothing kept yet" in mornings["only crashes"][0] and "no change kept yet" in mornings["one"][0]
    assert probe(mornings["only crashes"][0])["markers"] == {"crashed": 5}


def test_the_picture_hides_no_experiment(mornings):
    said = mornings["120 rows"][0]
    scores = [float(row.split("\t")[1]) for row in random_night(120)]
    found = probe(said)
    low, high = found["limits"]
    markers = found["markers"]
    assert markers["crashed"] == sum(score == 0 for score in scores)
    assert markers["of these above this range"] == sum(score > high for score in scores) > 0
    assert markers["kept"] + markers["discarded"] == sum(low < score <= high for score in scores)
    assert sum(markers.values()) == 120


# ------------------------------------------------------------------------------------------------------------ the audit

class Lab:
    """A repository after an honest night: baseline, noise floor, 3 kept, 1 discarded, 1 crash; and its ledger."""

    def __init__(self, folder: Path):
        self.folder, self.number = folder, 0
        folder.mkdir()
        self.git("init", "-qb", "autoresearch/test")
        for name in ("prepare.py", "train.py"):
            (folder / name).write_text("print()\n")
        (folder / ".gitignore").write_text("results.tsv\ncache/\n*.png\n")
        self.rows, self.ledger = [], []
        base = self.commit("the lab", ".gitignore", "prepare.py")
        self.experiment(base, 1.0, "keep", "baseline")
        self.experiment(base, 1.0004, "discard", "baseline, seed 43", seed=43)
        self.experiment(self.commit("one"), 0.99, "keep", "one")
        self.experiment(self.commit("two"), 0.995, "discard", "two")
        self.git("reset", "-q", "--hard", "HEAD~1")
        self.experiment(self.commit("three"), None, "crash", "three [exit 1]", failure="out of memory")
        self.git("reset", "-q", "--hard", "HEAD~1")
        self.experiment(self.commit("four"), 0.98, "keep", "four")
        self.experiment(self.commit("five"), 0.97, "keep", "five")

    def git(self, *words) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@localhost", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *who, *words], cwd=self.folder, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, text, *more) -> str:
        self.number += 1
        (self.folder / "train.py").write_text(f"print({self.number})\n")
        self.git("add", "train.py", *more)
        self.git("commit", "-qm", text)
        return self.git("rev-parse", "HEAD")

    def experiment(self, commit, score, status, what, **more):
        self.rows.append([commit[:7], f"{score or 0:.6f}", "1.0", status, what])
        self.measure(commit, score, **more)

    def measure(self, commit, score, end=True, **more):
        source = subprocess.run(["git", "show", f"{commit}:train.py"], cwd=self.folder, capture_output=True).stdout
        run = dict(run=f"{len(self.ledger):012x}", time="2026-03-05T01:02:03Z", branch="autoresearch/test", commit=commit, changed=False,
                   train_sha256=hashlib.sha256(source).hexdigest(), fingerprint="f" * 12, seed=42, device="cpu", split="val", startup_seconds=9.0)
        result = dict(score=score and score + 3e-7) if score else dict(failure=more.pop("failure", "no reason"))
        self.ledger.append({"event": "start", **run, **{k: v for k, v in more.items() if k != "failure"}})
        if end:
            self.ledger.append({**self.ledger[-1], "event": "end", "time": "2026-03-05T01:02:06Z", "training_seconds": 2.0, "tokens": 1000, **result})

    def write(self, folder: Path):
        shutil.copytree(self.folder, folder)
        (folder / "cache").mkdir(exist_ok=True)
        with open(folder / "cache/autoresearch.jsonl", "wb") as file:
            for record in self.ledger:
                file.write(signed({**record, "repo": str(folder)}) if isinstance(record, dict) else record)
        (folder / "results.tsv").write_text(HEADER + "".join("\t".join(row) + "\n" for row in self.rows))
        return folder


def claim_a_score(lab):
    lab.rows[-1][1] = "0.960000"
def invent_a_row(lab):
    lab.rows.insert(3, ["abcdef0", "0.985000", "1.0", "discard", "never run"])
def touch_prepare(lab):
    (lab.folder / "prepare.py").write_text("print('easier')\n")
    lab.experiment(lab.commit("six", "prepare.py"), 0.9, "keep", "six")
def touch_prepare_uncommitted(lab):
    (lab.folder / "prepare.py").write_text("print('easier')\n")
def another_fingerprint(lab):
    lab.experiment(lab.commit("six"), 0.9, "keep", "six", fingerprint="e" * 12)
def leave_the_branch(lab):
    lab.git("reset", "-q", "--hard", "HEAD~1")
def commit_without_a_row(lab):
    lab.commit("nobody knows")
def lose_a_row(lab):
    del lab.rows[3]
def lose_a_kept_row(lab):
    del lab.rows[5]
def killed(lab):
    lab.measure("1" * 40, None, end=False)
def repeated(lab):
    lab.measure(lab.git("rev-parse", "HEAD"), None, end=False)
def uncommitted_train(lab):
    lab.ledger[-1]["changed"] = True
def lucky_seed(lab):
    lab.experiment(lab.commit("six"), 0.9, "keep", "six", seed=7)
def score_the_test(lab):
    for _ in range(3):
        lab.measure(lab.git("rev-parse", "HEAD"), 0.98, split="test")
def score_the_test_twice(lab):
    for _ in range(2):
        lab.measure(lab.git("rev-parse", "HEAD"), 0.98, split="test")
def damaged_ledger(lab):
    lab.ledger.insert(0, b'{"score": 0.1}\n')
def kept_for_nothing(lab):
    lab.experiment(lab.commit("six"), 0.9699, "keep", "six")
def kept_for_simplicity(lab):
    lab.experiment(lab.commit("six"), 0.9701, "keep", "simpler: six")
def another_repository(lab):
    lab.measure("2" * 40, 0.5, repo="elsewhere")
    lab.ledger[-1] = lab.ledger[-2] = dict(lab.ledger[-1], branch="main")
def back_on_main(lab):
    lab.git("checkout", "-qb", "main", "HEAD~3")

def train_before_the_clock(lab):
    lab.ledger[-2]["startup_seconds"] = lab.ledger[-1]["startup_seconds"] = 400.0
def stop_the_clock(lab):
    lab.ledger[-1].update(time="2026-03-05T01:07:06Z", training_seconds=0.0)
def swap_the_script(lab):
    lab.ledger[-1]["train_sha256"] = "0" * 64

EVERYTHING = "every kept commit is on the branch and touches only train.py"
AUDITS = {  # falsification: (lines that must be there, with their first character; is the whole night fine?)
    None: (["  6 of 6 scores match the ledger",
            "  one fingerprint throughout: ffffffffffff", f"  {EVERYTHING}", "  every run that started has its row"], True),
    claim_a_score: (["! 5 of 6 scores match the ledger; not experiments 7 (",
                     "0.960000 claimed, 0.970000 measured", "! 1 measured scores have no row: 0.970000"], False),
    invent_a_row: (["! 6 of 7 scores match the ledger; not experiments 4 (abcdef0: 0.985000 claimed, nothing measured)"], False),
    touch_prepare: (["! commits that touch more than train.py: ", "(prepare.py)"], False),
    touch_prepare_uncommitted: (["! changed and not committed: prepare.py"], False),
    another_fingerprint: (["! 2 fingerprints, whose scores cannot be compared: ffffffffffff (7 runs), eeeeeeeeeeee (1 runs)"], False),
    leave_the_branch: (["! kept, but not on the branch autoresearch/test: "], False),
    commit_without_a_row: (["! on the branch, but in no row as kept: "], False),
    lose_a_row: (["  5 of 5 scores match the ledger", "! 1 measured scores have no row: 0.995000 ("], False),
    lose_a_kept_row: (["! 1 measured scores have no row: 0.980000 (", "! on the branch, but in no row as kept: "], False),
    killed: (["  1 runs started, gave no score and left no row: 1111111 at 2026-03-05"], True),
    repeated: (["  6 of 6 scores match", "  1 runs started, gave no score and left no row: "], True),
    uncommitted_train: (["! train.py had uncommitted changes when these were measured: experiments 7"], False),
    lucky_seed: (["! kept with another seed than 42: experiments 8"], False),
    score_the_test: (["! the test split was scored 3 times", "  6 of 6 scores match"], False),
    score_the_test_twice: (["  the test split was scored 2 times"], True),
    damaged_ledger: (["! 1 lines of the ledger are damaged"], False),
    kept_for_nothing: (["! kept without being better than the best by more than noise: experiments 8"], False),
    kept_for_simplicity: (["  7 of 7 scores match"], True),
    another_repository: (["  6 of 6 scores match", "  every run that started has its row"], True),
    train_before_the_clock: (["  6 of 6 scores match", "! start-ups far longer than the usual 9 s, in which nothing is measured: "], False),
    stop_the_clock: (["! training seconds that the times of day contradict: "], False),
    swap_the_script: (["! what ran is not the train.py of its commit: "], False),
    back_on_main: ([f"  {EVERYTHING}", "  6 of 6 scores match"], True),
}


@pytest.fixture(scope="module")
def audits(tmp_path_factory):
    base = tmp_path_factory.mktemp("audits")
    honest, folders = Lab(base / "honest"), {}
    for falsify in AUDITS:
        lab = object.__new__(Lab)
        lab.__dict__.update(honest.__dict__, folder=base / f"work-{getattr(falsify, '__name__', 'honest')}",
                            rows=[row[:] for row in honest.rows], ledger=[dict(record) for record in honest.ledger])
        shutil.copytree(honest.folder, lab.folder)
        if falsify:
            falsify(lab)
        folders[falsify] = lab.write(base / f"night-{getattr(falsify, '__name__', 'honest')}")
    return run_notebook(folders, picture=False)


@pytest.mark.parametrize("falsify", AUDITS, ids=lambda f: getattr(f, "__name__", "honest"))
def test_the_audit_finds_it(audits, falsify):
    said, (lines, fine) = audits[falsify], AUDITS[falsify]
    assert "ERROR" not in said, said[-3000:]
    for line in lines:
        assert ("\n" + line if line[0] in "! " else line) in "\n" + said, (line, said[-1500:])
    assert ("Nothing found that speaks against these numbers." in said) == fine, said[-1500:]
    assert len(re.findall("^! ", said, re.M)) == (0 if fine else int(re.findall(r"^(\d+) things to look at", said, re.M)[0]))


def test_headless_by_one_command(tmp_path):
    """As the README shows it, in a fresh checkout; git keeps the notebook without outputs."""
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in NOTEBOOK.cells)
    for name in ("analysis.ipynb", "prepare.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "results.tsv").write_text(HEADER + "\n".join(GOOD) + "\n")
    done = subprocess.run([sys.executable, "-m", "jupyter", "execute", "--output=morning", "analysis.ipynb"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=120, env={**os.environ, "AUTORESEARCH_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "progress.png").exists() and "6 experiments: 3 kept" in (tmp_path / "morning.ipynb").read_text()
    assert (tmp_path / "analysis.ipynb").read_bytes() == (ROOT / "analysis.ipynb").read_bytes()
