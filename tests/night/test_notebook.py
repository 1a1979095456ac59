"""The notebook, run top to bottom in one kernel on a dozen logs: what it says, and what its picture shows.

Each log is a folder with its own copy of night.py and prepare.py, as a user has it.
"""

import dataclasses
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
from miniature import ROOT
from nbclient import NotebookClient

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
os.chdir({folder!r})
sys.path[:] = [{folder!r}, *[path for path in sys.path if "mornings" not in path]]
os.environ["AUTORESEARCH_CACHE"] = {folder!r} + "/cache"
sys.modules.pop("night", None), sys.modules.pop("prepare", None)
"""
PROBE = """
import json
from matplotlib.text import Text
from matplotlib.transforms import Affine2D
axes = figure.axes[0]
figure.canvas.draw()
level = Affine2D().rotate_deg(-axes.texts[0].get_rotation() if axes.texts else 0)
boxes, inside = [], []
for text in axes.texts:  # as they lie when the page is turned by their slant
    slanted = Text.get_window_extent(text)
    inside.append(axes.bbox.x0 <= slanted.x0 and axes.bbox.y0 <= slanted.y0)
    text.set_rotation(0)
    box = Text.get_window_extent(text)
    end, (width, height) = level.transform((box.x1, (box.y0 + box.y1) / 2)), box.size
    boxes.append(box.from_bounds(end[0] - width, end[1] - height / 2, width, height))
marks = {c.get_label().split(" (")[0]: c.get_offsets() for c in axes.collections if "(" in c.get_label()}
points = axes.transData.transform([(row.n, row.score) for row in scored]) if scored else []
points = [level.transform(point) for point in points]
print("PROBE", json.dumps({
    "labels": len(boxes),
    "outside": len(boxes) - sum(map(bool, inside)),
    "overlaps": sum(bool(a.overlaps(b)) for i, a in enumerate(boxes) for b in boxes[:i]),
    "covered": sum(bool(box.contains(*point)) for box in boxes for point in points),
    "marks": {label: len(offsets) for label, offsets in marks.items()},
}))
"""


def long_night(count: int, kept: int) -> str:
    """Rows as a long night leaves them: gains that grow rarer, failures far off, crashes; ids of any kind."""
    draw = random.Random(count)
    places = {i + int((count - kept) * (i / kept) ** 1.7) for i in range(kept)}
    best, lines = 0.9979, []
    for n in range(count):
        name = "baseline" if n == 0 else f"exp{n:03}"
        if n in places:
            if n:
                best -= draw.expovariate(1) * 0.0282 / kept
            lines.append(
                f"{name}\t{best:.6f}\t44.1\tkeep\tidea {n}, which halves the batch and more"
            )
        elif draw.random() < 0.1:
            lines.append(f"{name}\t0.000000\t0.0\tcrash\tidea {n} [exit 1]")
        else:
            far = draw.choice([0] * 9 + [0.3])
            lines.append(
                f"{name}\t{best + abs(draw.gauss(0, 0.004)) + far:.6f}\t44.0\tdiscard\tidea {n}"
            )
    return HEADER + "\n".join(lines) + "\n"


@dataclasses.dataclass
class Log:
    text: str | None  # of results.tsv
    says: list[str]
    marks: dict[str, int] = dataclasses.field(
        default_factory=dict
    )  # how many of each in the picture
    ledger: Path | None = None


SIX = [
    "6 experiments: 3 kept, 2 discarded, 1 crashed",
    "noise floor: 0.000400",
    "30.0 times the noise floor",
]
LOGS = {
    "no file": Log(None, ["0 experiments: 0 kept", "nothing kept yet", "this log has none"]),
    "header": Log(HEADER, ["0 experiments: 0 kept", "nothing was predicted"]),
    "good": Log(HEADER + GOOD, SIX, {"kept": 3, "discarded": 2, "crashed": 1}),
    "crlf": Log((HEADER + GOOD).replace("\n", "\r\n"), SIX),
    "crash first": Log(HEADER + "exp\t0\t0\tcrash\tx\n" + GOOD, ["7 experiments: 3 kept"]),
    "only crashes": Log(HEADER + "exp\t0\t0\tcrash\tx\n" * 5, ["nothing kept yet"], {"crashed": 5}),
    "only discarded": Log(
        HEADER + "exp\t0.9\t1\tdiscard\tx\n", ["1 experiments: 0 kept"], {"discarded": 1}
    ),
    "one": Log(
        HEADER + GOOD.split("\n")[0],
        ["1 experiments: 1 kept", "nothing of the night's hours"],
        {"kept": 1},
    ),
    "duplicates": Log(HEADER + GOOD + GOOD, ["12 experiments: 6 kept"], {"kept": 6}),
    "broken": Log(
        HEADER + GOOD + "hello\nx\tnan\t1\tkeep\t\n", [*SIX, "! 1 rows were skipped, their status"]
    ),
    "other columns": Log(
        "id\tval_rmse\tstatus\n1\t3\tkeep\n", ["! all 1 rows were skipped: no column is"]
    ),
    "126": Log(
        long_night(126, 23), ["126 experiments: 23 kept", "0.997900  baseline", "... and 7 more"]
    ),
    "1000": Log(long_night(1000, 60), ["1000 experiments: "]),
    "example": Log(
        (ROOT / "bench/night/results.tsv").read_text(),
        ["20 of 20 scores match the ledger", "0.5 hours of 2 slots: 31% training, 42% compiling"],
        {"kept": 6, "discarded": 14, "crashed": 2},
        ROOT / "bench/night/autoresearch.jsonl",
    ),
}


@pytest.fixture(scope="module")
def mornings(tmp_path_factory) -> dict[str, str]:
    """What the notebook prints in each folder, errors included; all in one kernel."""
    base = tmp_path_factory.mktemp("mornings")
    cells, names = [], []
    for name, log in LOGS.items():
        folder = base / name.replace(" ", "-")
        folder.mkdir()
        for script in ("night.py", "prepare.py"):
            shutil.copy(ROOT / script, folder)
        if log.text is not None:
            (folder / "results.tsv").write_bytes(log.text.encode())
        (folder / "cache").mkdir()
        if log.ledger:
            shutil.copy(log.ledger, folder / "cache/autoresearch.jsonl")
        code = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]
        code = [source.replace("plt.show()", "plt.close()") for source in code]
        code = [source.replace("dpi=150", "dpi=50") for source in code]  # quicker to draw
        code = [
            source.replace('draw("progress.png")', 'draw("progress.png")' + PROBE)
            for source in code
        ]
        for source in [ENTER.format(folder=str(folder)), *code]:
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
    for name in LOGS:
        for picture in ("progress.png", "hours.png"):
            content = (base / name.replace(" ", "-") / picture).read_bytes()
            assert content.startswith(b"\x89PNG"), said[name]
    return said


@pytest.mark.parametrize("name", LOGS)
def test_runs_top_to_bottom_and_says_what_the_log_says(mornings, name):
    said, log = mornings[name], LOGS[name]
    assert "ERROR" not in said, said[-3000:]
    for sentence in log.says:
        assert sentence in said, said[:3000]
    assert "this is no git repository" in said and re.search(r"^\d things to look at$", said, re.M)
    shown = json.loads(re.findall(r"^PROBE (.*)", said, re.M)[0])
    assert shown["overlaps"] == shown["covered"] == shown["outside"] == 0
    for kind, count in log.marks.items():
        assert shown["marks"][kind] == count
    rows = (
        sum(log.text.lower().count(f"\t{status}") for status in ("keep", "discard", "crash"))
        if log.text
        else 0
    )
    if name not in ("broken", "other columns"):
        assert sum(shown["marks"].values()) == rows  # the picture hides no experiment


def test_the_largest_gain_comes_first_and_text_is_no_markup(mornings):
    said = mornings["good"]
    table = said[said.index("<table") : said.index("</table>")]
    assert table.index("+0.010000") < table.index("+0.002000") and "+0.000000" not in table
    assert "larger &lt;b&gt;gain&lt;/b&gt; $x$" in table


def test_a_long_night_is_labelled_and_fits_a_screen(mornings):
    for name in ("126", "1000"):
        shown = json.loads(re.findall(r"^PROBE (.*)", mornings[name], re.M)[0])
        assert shown["labels"] >= 8 and mornings[name].count("<tr") <= 17


def test_git_keeps_the_notebook_without_outputs():
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in NOTEBOOK.cells)


def test_headless_by_one_command(tmp_path: Path):
    """As the README shows it."""
    for name in ("analysis.ipynb", "night.py", "prepare.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "results.tsv").write_text(HEADER + GOOD)
    command = [sys.executable, "-m", "jupyter", "execute", "--output=morning", "analysis.ipynb"]
    environment = {**os.environ, "AUTORESEARCH_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "6 experiments: 3 kept" in (tmp_path / "morning.ipynb").read_text()
    assert (tmp_path / "analysis.ipynb").read_bytes() == (ROOT / "analysis.ipynb").read_bytes()
