"""The notebook, run top to bottom in one kernel on many logs: what it says and what it shows."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from miniature import ROOT
from nbclient import NotebookClient
from repository import make_repository

NOTEBOOK = nbformat.read(ROOT / "analysis.ipynb", as_version=4)
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
GOOD = """aaaaaaa\t1.000000\t44.0\tkeep\tbaseline
aaaaaaa\t1.000400\t44.0\tdiscard\tbaseline, seed 43
bbbbbbb\t0.990000\t44.5\tkeep\tlarger <b>gain</b> $x$
ccccccc\t0.995000\t44.0\tdiscard\tworse
ddddddd\t0.000000\t0.0\tcrash\tbroken [exit 1]
eeeeeee\t0.988000\t44.0\tkeep\tsmaller gain
"""
ENTER = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
os.chdir({folder!r})
os.environ["AUTORESEARCH_CACHE"] = {folder!r} + "/cache"
"""
PROBE = """
import json
from matplotlib.text import Text
from matplotlib.transforms import Affine2D
axes = figure.axes[0]
figure.canvas.draw()
level = Affine2D().rotate_deg(-axes.texts[0].get_rotation() if axes.texts else 0)
boxes = []
for text in axes.texts:  # as they lie when the page is turned by their slant
    text.set_rotation(0)
    box = Text.get_window_extent(text)
    end, (width, height) = level.transform((box.x1, (box.y0 + box.y1) / 2)), box.size
    boxes.append(box.from_bounds(end[0] - width, end[1] - height / 2, width, height))
marks = {c.get_label().split(" (")[0]: c.get_offsets() for c in axes.collections if "(" in c.get_label()}
points = table.dropna(subset=["score"])[["n", "score"]].to_numpy()
points = [level.transform(axes.transData.transform(point)) for point in points]
print("PROBE", json.dumps({
    "labels": len(boxes),
    "overlaps": sum(bool(a.overlaps(b)) for i, a in enumerate(boxes) for b in boxes[:i]),
    "covered": sum(bool(box.contains(*point)) for box in boxes for point in points),
    "marks": {label: len(offsets) for label, offsets in marks.items()},
}))
"""


def long_night(count: int) -> str:
    """Rows as a long night leaves them: gains that grow rarer, failures far off, crashes."""
    lines, best = ["baseline\t0.997900\t44.1\tkeep\tbaseline"], 0.9979
    for n in range(1, count):
        if n < 12 or n % 12 == 0:
            best -= 0.004 / n
            lines.append(f"exp{n:03}\t{best:.6f}\t44.1\tkeep\tidea {n}, which halves the batch")
        elif n % 10 == 1:
            lines.append(f"exp{n:03}\t0.000000\t0.0\tcrash\tidea {n} [exit 1]")
        else:
            score = best + n % 7 / 1000 + (0.3 if n % 13 == 0 else 0)
            lines.append(f"exp{n:03}\t{score:.6f}\t44.0\tdiscard\tidea {n}")
    return HEADER + "\n".join(lines) + "\n"


@dataclasses.dataclass
class Log:
    text: str | None  # of results.tsv
    says: list[str]
    marks: dict = dataclasses.field(default_factory=dict)  # how many of each in the picture
    ledger: Path | None = None
    records: list | None = None  # of the night's journal


def record(n: int, score: float, **more) -> dict:
    said = {"n": n, "score": score, "status": "keep", "kind": "try", "run": f"{n}", "seed": 42}
    said |= {"message": "wider", "simpler": False, "expect": None, "got": None}
    said |= {"commit": "a" * 40, "base": "a" * 40, "ended": f"2026-03-05T01:0{n}:00Z"}
    return {**said, **more}


CRASHES = HEADER + "e\t0\t0\tcrash\tx\n" * 5
SIX = [
    "4 experiments: 2 kept, 1 discarded, 1 crashed",
    "noise: 0.000419",
    "change: -0.012000 (-1.20%, 28.6 times the noise)",
]
JOURNAL = [record(1, 1.0), record(2, 0.99, commit="b" * 40, expect=-0.02, got=-0.01)]
LOGS = {
    "no file": Log(None, ["0 experiments: 0 kept", "nothing kept yet", "this log has none"]),
    "header": Log(HEADER, ["0 experiments: 0 kept", "No row was read, so nothing was checked."]),
    "good": Log(HEADER + GOOD, SIX, {"kept": 3, "discarded": 2, "crashed": 1}),
    "only crashes": Log(CRASHES, ["nothing kept yet"], {"crashed": 5}),
    "broken": Log(
        HEADER + GOOD + "hello\nx\tnan\t1\tkeep\t\n",
        [*SIX, "! 2 rows were skipped, a row needs a status"],
    ),
    "999": Log(
        HEADER + GOOD.replace("1.000000", "999.0", 1),
        ["4 experiments: 2 kept"],
        {"kept, above this range": 1, "discarded": 2},
    ),
    "126": Log(long_night(126), ["125 experiments: 21 kept"]),
    "example": Log(
        (ROOT / "bench/night/results.tsv").read_text(),
        ["32 of 32 scores match the ledger", "0.5 hours, 2 slots, a run in them 74% of the time."],
        {"kept": 9, "discarded": 23, "crashed": 2},
        ROOT / "bench/night/autoresearch.jsonl",
    ),
    "night": Log(
        HEADER + "aaaaaaa\t1.0\t1\tkeep\tbaseline\nbbbbbbb\t0.99\t1\tkeep\twider\n",
        [
            "1 predictions (night.py try --expect): 1 right in direction, 1 in size",
            "the best is not confirmed yet: uv run night.py confirm",
            "kept, but git knows no such commit: aaaaaaa, bbbbbbb",
        ],
        records=JOURNAL,
    ),
}


def make(folder: Path, log: Log):
    (folder / "cache").mkdir(parents=True)
    if log.text is not None:
        (folder / "results.tsv").write_bytes(log.text.encode())
    if log.ledger:
        shutil.copy(log.ledger, folder / "cache/autoresearch.jsonl")
    if log.records:  # of the tag in this repository's program.md
        make_repository(folder)
        tag = re.search(r"^- tag: (\S+)", (ROOT / "program.md").read_text(), re.M)[1]
        (folder / f".night/{tag}/queue").mkdir(parents=True)
        lines = "".join(json.dumps(record) + "\n" for record in log.records)
        (folder / f".night/{tag}/journal.jsonl").write_text(lines)


@pytest.fixture(scope="module")
def mornings(tmp_path_factory) -> dict[str, str]:
    """What the notebook prints in each folder, errors included; all in one kernel."""
    base = tmp_path_factory.mktemp("mornings")
    sources = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]
    cells, names = [], []
    for name, log in LOGS.items():
        folder = base / name.replace(" ", "-")
        make(folder, log)
        for source in [ENTER.format(root=str(ROOT), folder=str(folder)), *sources]:
            here = f"NightReport.here(Path({str(folder)!r}))"
            source = source.replace("NightReport.here()", here)
            source = source.replace("plt.show()", "plt.close()").replace("dpi=150", "dpi=50")
            source = source.replace('draw("progress.png")', 'draw("progress.png")' + PROBE)
            cells.append(nbformat.v4.new_code_cell(source))
            names.append(name)
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=NOTEBOOK.metadata)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    NotebookClient(notebook, timeout=300, allow_errors=True).execute(env=environment)
    said = dict.fromkeys(LOGS, "")
    for name, cell in zip(names, notebook.cells):
        for output in cell.outputs:
            if output.output_type == "error":
                said[name] += "ERROR " + "\n".join(output.traceback)
            said[name] += output.get("text", "") + output.get("data", {}).get("text/html", "")
    return said


def shown(said: str) -> dict:
    return json.loads(re.findall(r"^PROBE (.*)", said, re.M)[0])


@pytest.mark.parametrize("name", LOGS)
def test_runs_top_to_bottom_and_says_what_the_log_says(mornings, name):
    said, log = mornings[name], LOGS[name]
    assert "ERROR" not in said, said[-3000:]
    for sentence in log.says:
        assert sentence in said, said[:3000]
    picture = shown(said)
    assert picture["overlaps"] == picture["covered"] == 0
    assert picture["labels"] >= {"126": 8}.get(name, 0)
    for kind, count in log.marks.items():
        assert picture["marks"][kind] == count


def test_the_largest_gain_comes_first_and_text_is_no_markup(mornings):
    said = mornings["good"]
    table = said[said.index("2 changes were kept") :]
    assert 0 < table.index("0.010000") < table.index("0.002000")
    assert "larger &lt;b&gt;gain&lt;/b&gt; $x$" in table and "tex2jax_ignore" in table


def test_git_keeps_the_notebook_without_outputs():
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in NOTEBOOK.cells)
