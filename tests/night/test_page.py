"""night.html: its numbers against journal and ledger, its looks in a real browser, and what it survives."""

import html
import json
import random
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from miniature import ROOT

from autoresearch.common import Fail
from autoresearch.night import page, results
from autoresearch.night.picture import Labels, ticks

UGLY = (
    "<script>document.title = 'pwned'</script> <img src=x onerror=alert(1)> & \"it's\" \u202eback"
)
UGLY += " long" + "er" * 60
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


class Page(HTMLParser):
    """The tags of a page, and the cells of each row of its tables."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.rows, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def on_paper(night, count: int):
    """A night of so many experiments: a falling best, failures far off, crashes, one that runs."""
    chance, best, records = random.Random(count), 1.9, []
    for n in range(1, count + 1):
        record = dict(n=n, kind="try", seed=42, message=f"idea {n} {UGLY}", simpler=False)
        record |= dict(
            commit=f"{n:040x}", base="a" * 40, status="discard", why=f"worse {UGLY}", score=best
        )
        record |= dict(
            expect=-0.01, got=0.01, memory_gb=2.0, k=1, ended=f"2026-03-05T0{n % 10}:00:00Z"
        )
        if n <= 3:
            record |= dict(kind="baseline", commit="a" * 40, score=best + 0.002 * n, expect=None)
        if n == 1 or n > 3 and chance.random() < 3 / n:
            best -= chance.random() * 0.1
            record |= dict(status="keep", why="better", score=best)
        elif n > 3 and n % 7 == 0:
            record |= dict(status="crash", why="exit 1", score=None, got=None)
        elif n > 3 and n % 11 == 0:
            record |= dict(status="crash", why="not measured: machine busy", score=None, got=None)
        elif n > 3:
            record["score"] += chance.choice([0.9, 0.03, 0.02, 0.01, -0.001])
        records.append(record)
    night.journal.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = ["\t".join(results.COLUMNS), *map(results.row_of, records), f"{UGLY}\tx\n"]
    night.results.write_text("\n".join(rows) + "\n")
    night.enqueue("try", night.tip(), night.tip(), UGLY, 42)
    return records


def test_the_page_says_what_journal_and_ledger_say(lab):
    lab.attempt(f"wider {UGLY}", "--expect", "-0.02", WIDTH=1)
    lab.until_ended(4)
    lab.say()  # the best into the file
    for constants in (dict(EVENT="nan"), dict(WIDTH=-1)):
        lab.until_ended(lab.attempt(f"worse {UGLY}", **constants))
        lab.say("bring", "best")
    lab.until_idle()
    lab.until(lambda: "nothing runs, nothing waits" in (lab.root / "night.html").read_text())
    shown = Page((lab.root / "night.html").read_text())
    scores = {line["run"]: line["score"] for line in lab.ledger() if "score" in line}
    told = {}
    for record in lab.records():
        score = scores.get(record["run"])
        told[str(record["n"])] = [f"{score:.6f}" if score else "–", record["status"]]
    assert {row[0]: row[1:3] for row in shown.rows[::-1] if row and row[2]} == told
    assert "3 experiments: 1 kept, 1 discarded, 1 crashed; noise: 0.000105" in shown.text
    assert "-0.010000 (-1.00%, 95.4 times the noise) from the baseline's 1.00" in shown.text
    assert "1 predictions (night.py try --expect): 1 right in direction, 0 in size" in shown.text
    assert ["4", "-0.0200", "-0.0099"] in [row[:3] for row in shown.rows]
    assert not {"script", "img"} & {*shown.tags} and "<script>document.title" in shown.text
    # the objects of --json say the same, also of what runs
    held = lab.attempt("held", HOLD="x", DEPTH=1)
    lab.until_held(held)
    drawn = json.loads(lab.say("page", "--json"))
    [running] = drawn["open"]
    assert (running["n"], running["percent"]) == (7, 40)
    assert running["loss"] == running["best_loss"] == pytest.approx(2.6)
    lab.say("page")
    assert "7: training 40%, loss 2.6 (best at 40%: 2.6)" in (lab.root / "night.html").read_text()
    assert [row["score"] for row in drawn["rows"]] == [r["score"] for r in lab.records()]
    status = json.loads(lab.say("--json"))
    assert status["best"] == drawn["best"] and status["best"]["score"] == lab.best()["score"]
    assert status["next"] in lab.say() and len(status["rows"]) == 5
    runs = json.loads(lab.say("runs", "3", "--json"))["runs"]
    assert [run["run"] for run in runs[:2]] == [record["run"] for record in lab.records()[-2:]]
    audit = json.loads(lab.say("audit", "--json"))
    lines = [f"{' ' if f['fine'] else '!'} {f['words']}" for f in audit["findings"]]
    assert [*lines, audit["summary"]] == lab.say("audit").splitlines()[: len(lines) + 1]
    documented = (ROOT / "docs/night-json.md").read_text()
    objects = [drawn, status, audit, running, *drawn["rows"], *drawn["kept"], drawn["counts"]]
    assert all(f"`{key}`" in documented for each in objects for key in each)
    lab.until_ended(held, go="x")


@pytest.mark.parametrize("count", [0, 1, 3, 20, 500])
def test_a_night_of_any_length_is_drawn_whole_and_quickly(night, count):
    records = on_paper(night, count)
    began = time.process_time()
    page.write_page(night)
    assert time.process_time() - began < 0.2
    assert not (night.folder / "page.log").exists()
    text = (night.root / "night.html").read_text()
    assert "script" not in Page(text).tags and "\u202e" not in text
    for picture in re.findall(r"<svg.*?</svg>", text, re.S):
        marks = [e.get("class") for e in ElementTree.fromstring(picture).iter()]
        for status in ("keep", "discard"):
            assert marks.count(status) == [r["status"] for r in records].count(status)
        lost = [r["why"] for r in records if r["score"] is None]
        assert marks.count("crash") == lost.count("exit 1")
        assert marks.count("unmeasured") == len(lost) - lost.count("exit 1")
    best = next((r["score"] for r in records[::-1] if r["status"] == "keep"), 0)
    better = [r for r in records if r["score"] and r["score"] < best]
    assert bool(better) == (count == 500)
    for record in sorted(better, key=lambda record: record["score"])[:5]:
        assert f"{record['n']} is better than the best and not kept: {record['score']:.6f}" in text
    assert len(re.findall("<svg", text)) == (2 if count else 0)


PROBE = """<script>addEventListener("load", () => {
  const labels = [...document.querySelectorAll("svg .label")].filter(e => e.getClientRects().length);
  const boxes = labels.map(e => {
    const b = e.getBBox(), at = e.transform.baseVal[0].matrix;
    return [at.e, at.f, b.x, b.y, b.width, b.height];
  });
  const shown = [...document.querySelectorAll("svg")].filter(e => e.clientWidth);
  parent.document.body.dataset["at" + innerWidth] = JSON.stringify({
    boxes, shown: shown.map(e => e.classList[0]), width: document.documentElement.scrollWidth,
    back: getComputedStyle(document.body).backgroundColor });
})</script>"""
SCREENS = {390: "narrow", 1280: "wide"}


def looked_at(night, folder) -> dict[int, dict]:
    """What a browser in dark mode shows of the page, in frames of these widths."""
    folder.mkdir()
    text = re.sub("<meta http-equiv.*?>", "", page.page(night)).replace(
        "</body>", PROBE + "</body>"
    )
    frame = '<iframe style="border: 0" height="1800" width="{}" srcdoc="{}"></iframe>'
    frames = "".join(frame.format(width, html.escape(text)) for width in SCREENS)
    (folder / "frames.html").write_text(f'<body style="margin: 0">{frames}</body>')
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1700,1800"]
    options += ["--blink-settings=preferredColorScheme=0", f"--user-data-dir={folder}/profile"]
    options += ["--dump-dom", f"--screenshot={folder}/shot.png", (folder / "frames.html").as_uri()]
    done = subprocess.run([CHROMIUM, *options], capture_output=True, timeout=120)
    assert (folder / "shot.png").stat().st_size > 50_000
    found = re.findall(r'data-at(\d+)="(.*?)"', done.stdout.decode())
    return {int(width): json.loads(html.unescape(answer)) for width, answer in found}


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")
def test_in_a_browser_labels_stand_apart_and_nothing_is_wider_than_the_screen(night, tmp_path):
    on_paper(night, 60)
    seen = looked_at(night, tmp_path / "browser")
    for screen, picture in SCREENS.items():
        shown = seen[screen]
        assert shown["width"] <= screen and shown["shown"] == [picture]
        assert max(map(int, re.findall(r"\d+", shown["back"])[:3])) < 60  # dark
        # All lie on one slant: turned by it they are upright boxes.
        boxes = []
        for x, y, left, top, wide, high in shown["boxes"]:
            along, across = Labels(1, 1, 1, 1).turned(x, -y)
            boxes.append((along + left, along + left + wide, top - across, top + high - across))
        assert len(boxes) >= 4
        for i, (left, right, top, bottom) in enumerate(boxes):
            for other in boxes[:i]:
                assert other[0] > right or other[1] < left or other[2] > bottom or other[3] < top


def test_labels_cross_neither_each_other_nor_a_point_nor_the_frame():
    chance = random.Random(1)
    for _ in range(50):
        labels = Labels(300, 200, letter=5, apart=14)
        points = [(chance.random() * 300, chance.random() * 200) for _ in range(40)]
        placed = labels.place(points, points)
        assert placed
        lines = []
        for i, letters in placed:
            along, across = labels.turned(*points[i])
            end = along - labels.gap
            lines.append((end - letters * labels.letter, end, across))
            for other in points:
                place, beside = labels.turned(*other)
                on_it = lines[-1][0] < place < end and abs(beside - across) < 0.4 * labels.apart
                assert not on_it
        for i, (_, _, across) in enumerate(lines):
            assert all(abs(across - other[2]) >= labels.apart for other in lines[:i])


def test_ticks_are_round_and_as_many_as_have_room():
    assert ticks(1.2, 2.05, 5) == pytest.approx([1.2, 1.4, 1.6, 1.8, 2.0])
    assert ticks(0.1, 10.7, 20, least_step=1) == list(range(1, 11))
    for low, high in ((0.99, 0.9901), (-3, 500), (1e-4, 2e-4)):
        assert 2 <= len(ticks(low, high, 6)) <= 7


def test_it_is_offered_on_loopback_and_nothing_else_is(night):
    on_paper(night, 4)
    with page.server(night, 0) as offering:
        assert offering.server_address[0] == "127.0.0.1"
        threading.Thread(target=offering.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{offering.server_port}"
        with urllib.request.urlopen(here, timeout=10) as answer:
            assert "idea 4" in answer.read().decode()
        for path, data, code in (
            ("/results.tsv", None, 404),
            ("/../x", None, 404),
            ("/", b"x", 501),
        ):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(here + path, data, timeout=10)
            assert refused.value.code == code
        with pytest.raises(
            Fail, match=f"port {offering.server_port} is taken: another one, such as"
        ):
            page.server(night, offering.server_port)
        offering.shutdown()
    with pytest.raises(Fail, match="port 70000 is no port"):
        page.server(night, 70_000)


def test_a_page_that_cannot_be_written_stops_nothing_and_the_status_says_so(lab):
    (lab.root / "night.html").unlink()
    (lab.root / "night.html/in-the-way").mkdir(parents=True)
    assert lab.until_ended(lab.attempt("wider", WIDTH=1))["status"] == "keep"
    lab.until_idle()
    assert "night.html is not up to date: " in lab.say()
    assert "night.html is not up to date: " in lab.refused("page")
    (lab.root / "night.html/in-the-way").rmdir()
    (lab.root / "night.html").rmdir()
    assert "night.html" in lab.say("page") and "not up to date" not in lab.say()
    lab.check()
