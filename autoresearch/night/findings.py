"""
What an audit finds, one sentence each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from autoresearch.common import printable, some


@dataclass(frozen=True)
class Finding:
    fine: bool  # False where it speaks against the results
    words: str

    def __str__(self) -> str:
        return f"{' ' if self.fine else '!'} {printable(self.words)}"


def doubt(words: str, items) -> Iterator[Finding]:
    """A finding against the results where there are such items."""
    items = list(items)
    if items:
        yield Finding(False, f"{words}: {some(items)}")


def matching(what: str, count: int, wrong: list) -> Iterator[Finding]:
    """How many of `count` scores match the ledger, and which do not."""
    if count:
        words = f"{count - len(wrong)} of {count} {what} match the ledger"
        yield Finding(not wrong, words + (f"; not {some(wrong)}" if wrong else ""))


def commit_of(run: dict) -> str:
    return (run.get("commit") or "")[:7]


def name_of(run: dict) -> str:
    return f"{commit_of(run) or '-'} at {run.get('time')}"
