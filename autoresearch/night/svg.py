"""
The picture of a night as SVG, to stand inside a page that has the colours (page.STYLE).
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

from autoresearch.common import one_line, printable
from autoresearch.night.picture import Labels, Picture, places_after_point, scale, ticks
from autoresearch.night.results import Row


def escaped(value) -> str:
    """Any text, as text of a page: whatever an agent or a log says is never markup."""
    return html.escape(printable(str(value)))


@dataclass(frozen=True)
class Frame:
    """A size of the picture, in pixels. y grows downwards."""

    name: str  # the class under which the page shows or hides it
    width: int
    height: int
    left: int  # margins of the frame; above it are the runs without a score
    top: int
    font: int
    right: int = 8
    bottom: int = 36


FRAMES = (Frame("narrow", 360, 340, 44, 42, 10), Frame("wide", 1040, 520, 60, 46, 12))
LETTER = 0.57  # width of a letter, in sizes of the font
CROSS = "M-4-4 4 4M-4 4 4-4"
DIAMOND = "M0-4.5 4.5 0 0 4.5-4.5 0Z"
UP, DOWN = "M0-5 5 4H-5Z", "M0 5 5-4H-5Z"


def svg(picture: Picture, frame: Frame, hours: dict[int, str], said: dict[int, str]) -> str:
    """hours: the time of day when the row of a place ended. said: its tooltip, not yet escaped."""
    right, bottom = frame.width - frame.right, frame.height - frame.bottom
    x = scale(picture.x, frame.left, right)
    unbounded = scale(picture.y, bottom, frame.top)

    def y(score: float) -> float:
        return min(max(unbounded(score), frame.top), bottom)

    radius = max(1.8, 3.6 - sum(map(len, picture.marks.values())) / 200)  # of a dot

    def marker(row: Row, height: float, name: str, path: str = "") -> str:
        title = f"<title>{escaped(said[row.n])}</title>" if row.n in said else ""
        if not path:
            place = f'cx="{x(row.n):.1f}" cy="{height:.1f}"'
            size = radius + 1.2 if name == "keep" else radius
            return f'<circle class="{name}" {place} r="{size:.1f}">{title}</circle>'
        move = f'transform="translate({x(row.n):.1f} {height:.1f})"'
        return f'<path class="{name}" d="{path}" {move}>{title}</path>'

    marks = picture.marks
    parts = [*_axes(picture, frame, x, y, hours), *_steps(picture, x, y)]
    parts += [marker(row, y(row.score), "discard") for row in marks["discarded"]]
    parts += [marker(row, frame.top + 6, "discard", UP) for row in marks["above this range"]]
    parts += [marker(row, bottom - 6, "discard", DOWN) for row in marks["below it"]]
    parts += [marker(row, frame.top - 10, "crash", CROSS) for row in marks["crashed"]]
    parts += [marker(row, frame.top - 26, "unmeasured", DIAMOND) for row in marks["not measured"]]
    far = marks["kept, above this range"]
    parts += [marker(row, frame.top + 6, "keep", UP) for row in far]
    parts += [marker(row, y(row.score), "keep") for row in picture.kept if row not in far]
    for row in marks["too good"]:  # a ring around the point
        place = f'cx="{x(row.n):.1f}" cy="{y(row.score):.1f}"'
        parts.append(f'<circle class="toogood" {place} r="{radius + 5:.1f}"/>')
    parts += _labels(picture, frame, x, y)
    box = f'viewBox="0 0 {frame.width} {frame.height}" font-size="{frame.font}"'
    name = f'class="{frame.name}" role="img" aria-label="{escaped(picture.title)}"'
    return f"<svg {name} {box}>{''.join(parts)}</svg>"


def _axes(picture, frame, x, y, hours) -> list[str]:
    right, bottom = frame.width - frame.right, frame.height - frame.bottom
    parts = []
    heights = ticks(*picture.y, most=frame.height // 60)
    digits = places_after_point(heights)
    for value in heights:
        at = f"{y(value):.1f}"
        parts.append(f'<path class="grid" d="M{frame.left} {at}H{right}"/>')
        text = f'<text class="tick" x="{frame.left - 6}" y="{at}" dy=".35em" text-anchor="end">'
        parts.append(f"{text}{value:.{digits}f}</text>")
    for value in ticks(max(1, picture.x[0]), picture.x[1], frame.width // 70, least_step=1):
        at = f"{x(value):.1f}"
        text = f'<text class="tick" x="{at}" text-anchor="middle" y="'
        parts.append(f'{text}{bottom + frame.font + 4}">{value:.0f}</text>')
        if int(value) in hours:
            parts.append(
                f'{text}{bottom + 2 * frame.font + 6}">{escaped(hours[int(value)])}</text>'
            )
    return [*parts, f'<path class="axis" d="M{frame.left} {bottom}H{right}"/>']


def _steps(picture, x, y) -> list[str]:
    """The best so far, and the noise around it."""
    if not picture.steps:
        return []
    boxes, line = [], ""
    for (start, score), (end, _) in zip(picture.steps, picture.steps[1:]):
        line += f"{'H' if line else 'M'}{x(start):.1f}{'V' if line else ' '}{y(score):.1f}"
        if picture.band:
            high, low = y(score + picture.band), y(score - picture.band)
            boxes.append(f"M{x(start):.1f} {high:.1f}H{x(end):.1f}V{low:.1f}H{x(start):.1f}Z")
    line += f"H{x(picture.steps[-1][0]):.1f}"
    others = []
    for steps in picture.lines:
        path = "".join(f"H{x(at):.1f}V{y(score):.1f}" for at, score in steps[1:])
        others.append(f'<path class="line" d="M{x(steps[0][0]):.1f} {y(steps[0][1]):.1f}{path}"/>')
    band = f'<path class="band" d="{"".join(boxes)}"/>'
    return [band, *others, f'<path class="best" d="{line}"/>']


def _labels(picture, frame, x, y) -> list[str]:
    bottom = frame.height - frame.bottom
    labels = Labels(
        width=frame.width - frame.right - frame.left,
        height=bottom - frame.top,
        letter=LETTER * frame.font,
        apart=1.4 * frame.font,
    )

    def place(row: Row) -> tuple[float, float]:
        return x(row.n) - frame.left, bottom - y(row.score)

    rows = picture.labelled()
    shown = [*picture.marks["discarded"], *picture.kept]
    angle = math.radians(labels.degrees)
    parts = []
    for i, letters in labels.place([place(row) for row in rows], [place(row) for row in shown]):
        end = x(rows[i].n) - labels.gap * math.cos(angle)
        height = y(rows[i].score) + labels.gap * math.sin(angle)
        turn = f"translate({end:.1f} {height:.1f}) rotate({-labels.degrees:.0f})"
        text = escaped(one_line(rows[i].what or rows[i].commit, letters))
        parts.append(f'<text class="label" transform="{turn}" dy=".35em">{text}</text>')
    return parts
