"""
Own text and the demo: which files are read, and which split a text belongs to.

Files named val.* or test.* (or so) are those splits. The rest is drawn by the sha256 of each text:
a document of a parquet or jsonl file, a plain text file, or 64 kB of a longer one. Equal texts have
one sha256, so none stands on two sides.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
from collections import Counter
from pathlib import Path

from autoresearch.common import Fail, some
from autoresearch.corpus.documents import (
    READERS,
    SUFFIXES,
    Passage,
    Source,
    is_utf8,
    kind_of,
    passages_of,
)
from autoresearch.referee.manifest import SPLITS

# ------------------------------------------------------------------------------------- which files


def text_files(data: Path) -> dict[str, Path]:
    """{name: path} of every file of SUFFIXES below `data`, or of `data` itself if it is one."""
    top = data.parent if data.is_file() else data
    files = {}
    for path in files_below(data):
        if kind_of(path) in SUFFIXES:
            files[path.relative_to(top).as_posix()] = path
    if not files:
        *names, last = [f"*{suffix}" for suffix in SUFFIXES]
        names = f"{', '.join(names)} or {last}"
        raise Fail(f"{data} is no {names}" if data.is_file() else f"no {names} below {data}")
    wrong = [path for path in files.values() if kind_of(path) not in READERS and not is_utf8(path)]
    if wrong:
        raise Fail(
            f"not UTF-8: {some(wrong)}. Save as UTF-8, by an editor or "
            "`iconv -f LATIN1 -t UTF-8 OLD > NEW` (or -f UTF-16), or move away"
        )
    return files


def files_below(data: Path) -> list[Path]:
    """Sorted. Hidden files and what lies behind links to folders are skipped."""
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise Fail(f"--data {data}: there is no such directory")
    found = []
    for root, folders, names in os.walk(data):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def named_split(name: str) -> str | None:
    """The split that a file is named for: val.*, val_*, val-*, val/*; also valid, validation, test."""
    *folders, file = name.split("/")
    for word in (*folders, re.split("[._-]", file)[0]):
        if word in ("val", "valid", "validation"):
            return "val"
        if word == "test":
            return "test"
    return None


DEMO_PACKAGES = ("matplotlib", "networkx", "numpy", "pandas", "sympy")  # installed with the project
BUILT = re.compile(r"version\.py|_version.*\.py|__config__\.py")  # differ by platform and build


def demo_files() -> dict[str, Path]:
    """{name: path} of the .py files of DEMO_PACKAGES: the same text wherever their versions are.

    Without the files that a build writes, and those that are not UTF-8.
    """
    files = {}
    for package in DEMO_PACKAGES:
        found = importlib.util.find_spec(package)
        if found is None or not found.origin:
            raise Fail(f"the demo's text is the source of {package}, which is missing: uv sync")
        directory = Path(found.origin).parent
        for path in sorted(directory.rglob("*.py")):
            if not BUILT.fullmatch(path.name) and is_utf8(path):
                files[path.relative_to(directory.parent).as_posix()] = path
    return files


# ------------------------------------------------------------------------------------- which split

SHARE = 0.05  # of the text for val, as much for test, where no file is named so


class Splits:
    """Which split a text belongs to, by its sha256."""

    def __init__(self):
        self.named = {}  # {sha256: split} of the texts in files that are named for val or test
        self.drawn = {}  # {sha256: split} of the others, as far as they are val or test

    def of(self, digest: bytes, file_split: str | None) -> str | None:
        """file_split: what its file is named for. None: it is left out here."""
        if digest in self.named:  # it belongs into that file, and into no other
            return file_split if file_split == self.named[digest] else None
        return file_split or self.drawn.get(digest, "train")


def draw(sizes: dict[bytes, int], wanted: list[str]) -> dict[bytes, str]:
    """{sha256: split} of the texts that are held out, of {sha256: bytes} of all.

    The first SHARE of the bytes, in the order of the hashes, is the first split wanted, the next
    SHARE the second. Texts larger than a share come last in that order, so that none of them takes
    many times its share. With a text for training and one for each split, each gets one.
    """
    share = SHARE * sum(sizes.values())
    left = sorted(sizes, key=lambda digest: (sizes[digest] > share, digest), reverse=True)
    drawn = {}
    for number, split in enumerate(wanted):
        for_others = len(wanted) - number  # a text for each split that follows, training the last
        taken = 0
        while taken < share and len(left) > for_others:
            digest = left.pop()
            drawn[digest] = split
            taken += sizes[digest]
    return drawn


def split_files(files: dict[str, Path], named: dict[str, str]) -> list[Source]:
    """The sources of files, both by name; named: the split that a file is for."""
    splits = Splits()
    passages: dict[str, list[Passage]] = {}  # of plain text
    sources = []
    for name, path in files.items():
        if kind_of(path) in READERS:
            split_of = functools.partial(splits.of, file_split=named.get(name))
            sources.append(Source(name, named.get(name), path, split_of=split_of))
        else:
            passages[name] = passages_of(path)

    def texts(of_split: tuple):
        """Yields (sha256, bytes, split) of the texts in files that are named for one of these."""
        for name in passages:
            if named.get(name) in of_split:
                for passage in passages[name]:
                    yield passage.digest, passage.end - passage.start, named.get(name)
        for source in sources:
            if source.split in of_split:
                for _, text in source.read():
                    raw = text.encode()
                    yield hashlib.sha256(raw).digest(), len(raw), source.split

    splits.named = {digest: split for digest, _, split in texts(("val", "test"))}
    wanted = [split for split in ("val", "test") if split not in named.values()]
    if wanted:
        sizes = {digest: size for digest, size, _ in texts((None,))}
        splits.drawn = draw({d: sizes[d] for d in sizes if d not in splits.named}, wanted)

    for split in SPLITS:
        of_split = []
        for name in passages:
            mine = [p for p in passages[name] if splits.of(p.digest, named.get(name)) == split]
            of_split += [(piece.digest, name, piece) for piece in joined(mine)]
        # In the order of their hashes, so that every bundle is a fair sample.
        sources += bundles(sorted(of_split, key=lambda entry: entry[:2]), split)
    return sources


PIECE_BYTES = 1 << 20  # of plain text, cut into rows as one: what does not fill a row is its end
BUNDLE_BYTES = 1 << 26  # of plain text, encoded and mixed as one


def joined(passages: list[Passage]) -> list[Passage]:
    """Passages of one file, neighbours joined to pieces of up to PIECE_BYTES."""
    pieces = []
    for passage in passages:
        last = pieces[-1] if pieces else None
        if last and last.end == passage.start and passage.end - last.start <= PIECE_BYTES:
            digest = hashlib.sha256(last.digest + passage.digest).digest()
            pieces[-1] = Passage(passage.path, last.start, passage.end, digest)
        else:
            pieces.append(passage)
    return pieces


def bundles(of_split: list[tuple[bytes, str, Passage]], split: str) -> list[Source]:
    """The passages (sha256, name, passage), in order, in sources of BUNDLE_BYTES or a little more."""
    cut = [[]]
    size = 0
    for _, name, passage in of_split:
        if size >= BUNDLE_BYTES:
            cut.append([])
            size = 0
        cut[-1].append((name, passage))
        size += passage.end - passage.start
    sources = []
    for bundle in filter(None, cut):
        names = {name for name, _ in bundle}
        label = names.pop() if len(names) == 1 else f"{len(names)} text files"
        sources.append(Source(label, split, passages=tuple(passage for _, passage in bundle)))
    return sources


# ------------------------------------------------------------------------------ the two corpora


def demo() -> tuple[list[Source], str]:
    """(its sources, how they are split in words)."""
    return split_files(demo_files(), {}), drawn_in_words(["val", "test"])


def own_text(data: Path) -> tuple[list[Source], str]:
    """(its sources; what is not read and how it is split, in words, for a person to check)."""
    files = text_files(data)
    named = {name: named_split(name) for name in files if named_split(name)}
    if {"val", "test"} <= set(named.values()):
        named = {name: named.get(name, "train") for name in files}
    sources = split_files(files, named)

    lines = not_read(data)
    wanted = []
    for split in ("val", "test"):
        names = [name for name in named if named[name] == split]
        if names:
            lines.append(f"{split} by name: {some(names, 4)}")
        else:
            wanted.append(split)
    if wanted:
        lines.append(drawn_in_words(wanted))
    return sources, "\n".join(lines)


def drawn_in_words(wanted: list[str]) -> str:
    return f"split by the sha256 of each text: {SHARE:.0%} of the bytes for {' and '.join(wanted)}"


def not_read(data: Path) -> list[str]:
    """A line that counts the files below `data` that are not read, by their kind; or none."""
    kinds = Counter()
    for path in files_below(data):
        if kind_of(path) not in SUFFIXES:
            kinds[kind_of(path) or "without a suffix"] += 1
        elif not path.stat().st_size:
            kinds["empty"] += 1
    most_first = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
    counted = [f"{count:,} {kind}" for kind, count in most_first]
    return [f"not read: {some(counted, 4)}"] if counted else []
