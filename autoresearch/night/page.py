"""
night.html: what the notebook says and shows, for a person who looks on a phone during the night.

One file without script, font or picture from elsewhere. The supervisor rewrites it, and it reloads
itself; `night.py page --serve PORT` offers it to a browser on this machine.
"""

from __future__ import annotations

import contextlib
import errno
import time
import traceback
from datetime import datetime

from autoresearch.common import Fail, one_line, seconds_of, write_atomically
from autoresearch.night.objects import better_lines, page_object, say, too_good_lines
from autoresearch.night.picture import Picture
from autoresearch.night.report import (
    NightReport,
    change_words,
    cost_line,
    count_line,
    noise_line,
    prediction_line,
)
from autoresearch.night.settings import NIGHT
from autoresearch.night.status import end_of_log
from autoresearch.night.store import PAGE_LOG, Night
from autoresearch.night.svg import FRAMES, escaped, svg

NAME = "night.html"
RELOAD = 20  # seconds
MOST_ROWS = 12  # of a table

# ------------------------------------------------------------------------------- writing, serving


def say_page(night: Night, port: int | None, as_json: bool):
    """The command: writes the page and says where, offers it at a port, or prints its object."""
    if as_json:
        return say(page_object(night, NightReport.of(night)))
    if port is not None:
        return serve(night, port)
    write_page(night)
    problem = end_of_log(night.folder / PAGE_LOG, 1)
    if problem:
        raise Fail(problem[0])
    print(f"written: {night.root / NAME}")
    print("next: open it in a browser, or uv run night.py page --serve 8377 offers it on 127.0.0.1")


def write_page(night: Night):
    """Rewrites night.html. Never raises: what went wrong stands in a log, and the status says so."""
    log = night.folder / PAGE_LOG
    try:
        text = page(night).replace("uv run night.py", escaped(NIGHT))
        write_atomically(night.root / NAME, text.encode())
        log.unlink(missing_ok=True)
    except (Exception, Fail) as error:
        words = one_line(f"{NAME} is not up to date: {type(error).__name__}: {error}", 200)
        with contextlib.suppress(OSError):
            said = f"{traceback.format_exc()}{words} ({log.relative_to(night.root)})\n"
            log.write_bytes(said.encode(errors="backslashreplace"))


class Refresher:
    """Rewrites the page where something changed, and now and then while a run makes progress."""

    def __init__(self, night: Night):
        self.night = night
        self.next = 0.0

    def __call__(self, changed: bool):
        if changed or time.monotonic() >= self.next:
            write_page(self.night)
            self.next = time.monotonic() + RELOAD


def serve(night: Night, port: int):
    """Offers the page, as it would be written now, on 127.0.0.1 until Ctrl-C."""
    with server(night, port) as offering, contextlib.suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{offering.server_port}/ (Ctrl-C ends this and not the night)")
        print("from another machine: ssh -L with that port", flush=True)
        offering.serve_forever()


def server(night: Night, port: int):
    """A ThreadingHTTPServer, bound. port: 0 for any. Raises Fail where the port cannot be had."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer  # 40 ms of every command

    class Page(BaseHTTPRequestHandler):
        timeout = 10  # seconds for a request

        def do_GET(self):
            if self.path not in ("/", f"/{NAME}"):
                return self.send_error(404)
            try:
                content = page(Night(night.root)).encode()
            except (Exception, Fail) as error:
                return self.send_error(500, explain=one_line(error))
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Page)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        problem = "is taken" if taken else f"cannot be used ({error.strerror})"
    except OverflowError:
        problem = "is no port (they go to 65535)"
    other = port + 1 if 0 < port < 65535 else 8377
    raise Fail(f"port {port} {problem}: another one, such as uv run night.py page --serve {other}")


# --------------------------------------------------------------------------------------- the page


def page(night: Night) -> str:
    report = NightReport.of(night)
    now = page_object(night, report)
    body = "".join(
        [
            _head(now),
            _best(now, report),
            _open(now),
            _picture(now, report),
            _last_rows(now),
            _kept(now),
            _predictions(now, report),
            _confirmation(now),
            _cost(now),
        ]
    )
    title = f"{now['best']['score']:.4f}" if now["best"] else now["state"]
    return PAGE.format(
        title=escaped(f"{title} · night {now['night']}"), style=STYLE, reload=RELOAD, body=body
    )


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escaped(title)}</h2>{''.join(parts)}</section>" if parts else ""


def _line(text: str, name: str = "") -> str:
    return f'<p class="{name}">{escaped(text)}</p>'


def _table(names: list[str], rows: list[list[str]], more: int = 0) -> str:
    """names: of the columns; the last one takes the room that is left. rows: cells of markup."""
    if not rows:
        return ""
    head = "".join(f"<th>{escaped(name)}</th>" for name in names)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    rest = _line(f"and {more} more", "quiet") if more > 0 else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>{rest}"


def _number(row: dict) -> str:
    """As `night.py show` takes it."""
    return escaped("" if row["n"] is None else row["n"])


def _score(row: dict) -> str:
    return "–" if row["score"] is None else f"{row['score']:.6f}"


def _time(utc: str) -> str:
    return f"{datetime.fromtimestamp(seconds_of(utc)):%H:%M:%S}"


def _head(now: dict) -> str:
    states = [one["state"] for one in now["open"]]
    words = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    if now["state"] == "stopped":
        words = ["stopped by the human", *words]
    state = ", ".join(words) or "nothing runs, nothing waits"
    return (
        f"<header><h1>Night {escaped(now['night'])}</h1>"
        f'<p><span class="state {escaped(now["state"])}">{escaped(state)}</span> '
        f'<span class="quiet">written {_time(now["written"])}</span></p></header>'
        + "".join(_line(f"! {warning}", "warning") for warning in now["warnings"])
    )


def _best(now: dict, report: NightReport) -> str:
    best, first, noise = now["best"], now["baseline"], now["noise"]
    better = "lower" if now["lower_is_better"] else "higher"
    parts = [f'<p class="quiet">best {escaped(now["metric"])} ({better} is better)</p>']
    if best:
        parts.append(f'<p class="number">{_score(best)}</p>')
        if first["row"] != best["row"]:
            change = change_words(first["score"], best["score"], noise)
            parts.append(_line(f"{change} from the baseline's {_score(first)}"))
        parts.append(_line(f"{_number(best)}: {best['description']} [{best['commit']}]"))
    else:
        parts.append('<p class="number">–</p>')
    parts.append(_line(f"{count_line(report)}; {noise_line(noise)}", "quiet"))
    return f'<section class="card">{"".join(parts)}</section>'


def _open(now: dict) -> str:
    items = []
    for one in now["open"]:
        share = one["percent"]
        bar = f'<progress max="100" value="{share:.0f}"></progress>' if share is not None else ""
        items.append(f"<li>{escaped(one['words'])}{bar}</li>")
    return _section("Now", f"<ul>{''.join(items)}</ul>") if items else ""


def _picture(now: dict, report: NightReport) -> str:
    if not report.rows:
        return _section("Picture", _line("nothing has ended yet", "quiet"))
    picture = Picture.of(report.rows, now["band"])
    ended = {row["row"]: row["ended"] for row in now["rows"] if row["ended"]}
    hours = {place: _time(utc)[:5] for place, utc in ended.items()}
    said = {
        row["row"]: f"{_number(row)}: {_score(row)} {row['description']}" for row in now["rows"]
    }
    shown = {"kept": picture.kept, **picture.marks}
    marks = [
        f'<li class="{label.split()[0].strip(",")}">{label} ({len(rows)})</li>'
        for label, rows in shown.items()
        if rows
    ]
    if picture.kept:
        marks.append('<li class="best">best so far</li>')
        if picture.band:
            marks.append(
                f'<li class="floor">one standard error of the best: {picture.band:.6f}</li>'
            )
    if picture.lines:
        marks.append('<li class="line">a second line (try --on N)</li>')
    narrow, wide = FRAMES
    return _section(
        picture.title,
        svg(picture, narrow, hours, {}),
        svg(picture, wide, hours, said),
        f'<ul class="legend">{"".join(marks)}</ul>',
        *map(_line, [*now["lines"], *too_good_lines(report), *better_lines(report)]),
    )


def _last_rows(now: dict) -> str:
    rows = []
    for row in now["rows"][::-1][:MOST_ROWS]:
        told = row["kind"] == "baseline" or row["score"] is None  # a crash's row says why itself
        why = "" if told else row["why"] or ""
        said = f"{escaped(row['description'])}<small>{escaped(why)}</small>"
        status = "not measured" if row["not_measured"] else row["status"]
        name = "discard" if row["not_measured"] else row["status"]
        mark = f'<span class="{escaped(name)}">{escaped(status)}</span>'
        rows.append([_number(row), _score(row), mark, said])
    more = len(now["rows"]) - len(rows)
    table = _table(["", now["metric"], "", "what"], rows, more)
    return _section("Last experiments", table) if rows else ""


def _kept(now: dict) -> str:
    by_place = {row["row"]: row for row in now["rows"]}
    kept = sorted(now["kept"][1:], key=lambda change: -change["gain"])
    rows = []
    for change in kept[:MOST_ROWS]:
        row = by_place[change["row"]]
        cells = [_number(row), f"{change['gain']:.6f}", _score(row), escaped(row["description"])]
        rows.append(cells)
    table = _table(["", "gain", now["metric"], "what"], rows, len(kept) - len(rows))
    return _section("What each kept change gave, largest first", table) if rows else ""


def _predictions(now: dict, report: NightReport) -> str:
    told = [r for r in now["rows"][::-1] if r["expect"] is not None and r["got"] is not None]
    rows = [
        [_number(row), f"{row['expect']:+.4f}", f"{row['got']:+.4f}", escaped(row["description"])]
        for row in told[:MOST_ROWS]
    ]
    line = _line(prediction_line(report.records, now["noise"]))
    table = _table(["", "expected", "got", "what"], rows, len(told) - len(rows))
    return _section("What the agent predicted", line, table) if rows else ""


def _confirmation(now: dict) -> str:
    lines = "\n".join(map(escaped, now["confirmation"]))
    return _section("Is it real?", f"<pre>{lines}</pre>") if now["kept"] else ""


def _cost(now: dict) -> str:
    return _section("Cost", _line(cost_line(now["cost"]))) if now["cost"] else ""


# ------------------------------------------------------------------------------------------ looks

STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #f3f5f4; --ink: #1f2937; --quiet: #6b7280;
  --grid: #e5e7eb; --keep: #047857; --crash: #b91c1c; --dot: #9ca3af; --warn: #92400e; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --card: #1d2226; --ink: #e5e7eb;
  --quiet: #9ca3af; --grid: #2b3137; --keep: #34d399; --crash: #f87171; --dot: #8b939e;
  --warn: #fbbf24; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 1080px; background: var(--back);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 20px; margin: 0; }
h2 { font-size: 15px; margin: 28px 0 8px; }
p { margin: 4px 0; }
.quiet, small, th { color: var(--quiet); font-weight: normal; }
small { display: block; font-size: 12px; }
.state { font-weight: 600; } .running { color: var(--keep); }
.stopped, .crash { color: var(--crash); } .keep { color: var(--keep); font-weight: 600; }
.discard { color: var(--quiet); }
.warning { color: var(--warn); font-size: 13px; }
.card { background: var(--card); border-radius: 10px; padding: 12px 16px; margin-top: 12px; }
.number { font-size: 44px; line-height: 1.1; font-weight: 650; }
.number, td { font-variant-numeric: tabular-nums; }
ul { margin: 0; padding: 0; list-style: none; } li { margin: 4px 0; }
progress { display: block; width: 100%; height: 6px; accent-color: var(--keep); }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: left; vertical-align: top; padding: 5px 10px 5px 0; white-space: nowrap; }
th:last-child, td:last-child { width: 100%; white-space: normal; padding-right: 0; }
td:nth-child(3) { white-space: normal; overflow-wrap: normal; }
tr { border-bottom: 1px solid var(--grid); }
pre { font-size: 12px; white-space: pre-wrap; margin: 0; }
svg { display: block; width: 100%; height: auto; fill: var(--ink); }
.narrow { max-width: 560px; margin: 0 auto; } .wide { display: none; }
@media (min-width: 760px) { .narrow { display: none; } .wide { display: block; } }
svg .tick { fill: var(--quiet); } svg .label { text-anchor: end; }
svg .grid, svg .axis { stroke: var(--grid); fill: none; } svg .axis { stroke: var(--dot); }
svg .best { stroke: var(--keep); stroke-width: 2; fill: none; }
svg .line { stroke: var(--keep); stroke-width: 1.2; stroke-dasharray: 4 3; fill: none; }
svg .band { fill: var(--keep); opacity: .15; }
svg .discard { fill: var(--dot); fill-opacity: .8; }
svg .keep { fill: var(--keep); stroke: var(--back); }
svg .crash { stroke: var(--crash); stroke-width: 1.6; fill: none; }
svg .toogood { stroke: var(--crash); stroke-width: 1.6; fill: none; }
svg .unmeasured { stroke: var(--dot); stroke-width: 1.4; fill: none; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 12px; color: var(--quiet); }
.legend li::before { content: "●"; margin-right: 6px; color: var(--dot); }
.legend .kept::before { color: var(--keep); } .legend .best::before { color: var(--keep);
  content: "━"; } .legend .floor::before { color: var(--keep); opacity: .35; content: "■"; }
.legend .crashed::before { color: var(--crash); content: "✕"; }
.legend .above::before { content: "▲"; } .legend .below::before { content: "▼"; }
.legend .not::before { content: "◇"; }
.legend .line::before { color: var(--keep); content: "╌"; }
"""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta http-equiv="refresh" content="{reload}">
<title>{title}</title>
<style>{style}</style>
<body>{body}</body>
</html>
"""
