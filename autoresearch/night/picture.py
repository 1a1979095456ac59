"""
The picture of a night: what is shown, and where labels have room. It draws nothing: the notebook
does with matplotlib, night.html with SVG, and both show the same.

x is an experiment's place in the order of ending, from 1; y is its score.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from autoresearch.night.journal import gain
from autoresearch.night.results import Row, best_row, gains, too_good_rows
from autoresearch.night.settings import TARGET


@dataclass(frozen=True)
class Picture:
    """Every row stands in `kept` or under one of the marks; a kept one far off stands in both."""

    title: str
    x: tuple[float, float]  # ends of the axis of experiments
    y: tuple[float, float]  # ends of the axis of scores: what was kept, with room for labels
    kept: list[Row]
    marks: dict[str, list[Row]]  # `discarded`, `above this range`, `below it`, `crashed`, ...
    steps: list[tuple[float, float]]  # the best so far from each kept row on, and at the end
    band: float | None  # around the best so far: half its height
    lines: list[list[tuple[float, float]]]  # as steps, of each second line

    @classmethod
    def of(cls, rows: list[Row], band: float | None) -> Picture:
        found = gains(rows)
        kept = [row for row, *_ in found]
        low, high = score_axis(kept or [row for row in rows if row.score is not None], band)
        others = [row for row in rows if row.status == "discard"]
        crashes = [row for row in rows if row.status == "crash"]
        tried = [row for row in rows if not row.is_baseline]
        changes = [row for row in kept if not row.is_baseline]
        title = f"{len(tried)} experiment{'s' * (len(tried) != 1)}, {len(changes)} kept"
        steps = [(float(row.n), best) for row, _, best in found]
        if steps:
            (_, first), (_, best) = steps[0], steps[-1]
            steps.append((len(rows) + 0.5, best))
            change = f" -> {best:.4f} ({best - first:+.4f})" if len(kept) > 1 else ""
            title += f": {first:.4f}{change}"
        last = max(len(rows), 10)
        return cls(
            title,
            (0.5 - 0.04 * last, 0.5 + 1.02 * last),
            (low, high),
            kept,
            {
                "discarded": [row for row in others if low <= row.score <= high],
                "above this range": [row for row in others if row.score > high],
                "below it": [row for row in others if row.score < low],
                "crashed": [row for row in crashes if not row.not_measured],
                "not measured": [row for row in crashes if row.not_measured],
                "too good": too_good_rows(rows),
                "kept, above this range": [row for row in kept if row.score > high],
            },
            steps,
            band,
            second_lines(rows),
        )

    def labelled(self) -> list[Row]:
        """The kept rows in the order in which they get their labels: the baseline, then by gain."""
        by_gain = sorted(gains(self.kept)[1:], key=lambda found: -found[1])
        ordered = self.kept[:1] + [row for row, *_ in by_gain]
        return [row for row in ordered if row.score <= self.y[1]]


def second_lines(rows: list[Row]) -> list[list[tuple[float, float]]]:
    """Of each line beside the best: its steps, from the row where it began to its last one."""
    found = {}
    for row in rows:
        if row.line:
            root, kept = row.line
            begun = [r for r in rows if r.commit.startswith(root) and r.score is not None]
            steps = found.setdefault(root, [(float(r.n), r.score) for r in begun[:1]])
            if steps:
                steps.append((float(row.n), row.score if kept else steps[-1][1]))
    return [steps for steps in found.values() if len(steps) > 1]


def score_axis(rows: list[Row], band: float | None) -> tuple[float, float]:
    """Low and high end: these scores, with room for labels on the better side. Not from 0."""
    scores = [row.score for row in rows] or [1.0]
    if TARGET.lower_is_better:  # a baseline of 999 would press all others into one line
        scores = [score for score in scores if score <= 3 * min(scores)]
    low, high = min(scores), max(scores)
    room = max(high - low, min(10 * (band or 0), 2 * abs(low)), 1e-3 * abs(high))
    below, above = (0.45, 0.35) if TARGET.lower_is_better else (0.35, 0.45)
    return low - below * room, high + above * room


def better_than_best(rows: list[Row]) -> list[Row]:
    """Scores better than the best's that were not kept, the best of them first: each needs a reason."""
    if not any(row.status == "keep" for row in rows):
        return []
    best = best_row(rows).score
    found = [row for row in rows if row.status == "discard" and gain(row.score, best) > 0]
    return sorted(found, key=lambda row: -gain(row.score, best))


# ----------------------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class Labels:
    """Texts on a slant that end at their points, on the better side, and never cross.

    All are parallel, so two of them need only be `apart` from each other across. Lengths are in any
    unit, such as pixels; y grows upwards.
    """

    width: float  # of the frame, whose lower left corner is (0, 0)
    height: float
    letter: float  # width of a letter
    apart: float  # between the middles of two lines of text
    degrees: float = 40 if TARGET.lower_is_better else -40  # anticlockwise
    gap: float = 8  # between a point and its text
    most: int = 45  # letters
    least: int = 8

    def turned(self, x: float, y: float) -> tuple[float, float]:
        """(along the texts, across them): the point, where the page is turned until they are level."""
        cos, sin = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        return x * cos + y * sin, y * cos - x * sin

    def place(
        self, points: list[tuple[float, float]], others: list[tuple[float, float]]
    ) -> list[tuple[int, int]]:
        """(index of a point, letters there is room for), the first points first; the rest get none.

        others: points that no text may cover.
        """
        cos, sin = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        obstacles = [self.turned(*other) for other in others]
        placed, taken = [], []
        for i, (x, y) in enumerate(points):
            along, across = self.turned(x, y)
            if any(abs(across - other) < self.apart for other in taken):
                continue
            to_edge = min(x / cos, (y - (0 if sin > 0 else self.height)) / sin)
            room = to_edge - 1.75 * self.gap
            for other_along, other_across in obstacles:
                covered = abs(across - other_across) < 0.4 * self.apart
                if covered and other_along < along - self.gap:
                    room = min(room, along - 1.75 * self.gap - other_along)
            letters = min(self.most, int(room / self.letter))
            if letters >= self.least:
                taken.append(across)
                placed.append((i, letters))
        return placed


# ------------------------------------------------------------------------------------------- axes


def ticks(low: float, high: float, most: int, least_step: float = 0) -> list[float]:
    """At most `most` + 1 round numbers between the ends, 1, 2 or 5 times a power of ten apart."""
    wanted = max((high - low) / most, least_step, 1e-12)
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= wanted * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def places_after_point(values: list[float]) -> int:
    """How many decimals tell these apart."""
    step = min((b - a for a, b in zip(values, values[1:])), default=1)
    return max(0, min(6, -math.floor(math.log10(step) + 1e-9)))


Scale = Callable[[float], float]


def scale(ends: tuple[float, float], start: float, end: float) -> Scale:
    """The straight line that takes the first of `ends` to `start` and the second to `end`."""
    low, high = ends
    return lambda value: start + (value - low) / (high - low) * (end - start)
