"""Own text and the demo: which files, and which split a document belongs to."""

from __future__ import annotations

import codecs
import hashlib
import importlib.util
import mmap
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from autoresearch.common import Fail, sha256_of, some
from autoresearch.corpus.documents import (
    CUT_BYTES,
    PIECE_BYTES,
    READERS,
    SUFFIXES,
    cut_place,
    is_text,
    kind_of,
    not_utf8,
)

SPLITS = ("train", "val", "test")

# Whose source the demo is made of: all come with what train.py and the notebook need.
DEMO_PACKAGES = ("matplotlib", "networkx", "numpy", "pandas", "sympy")
BUILT = re.compile(r"version\.py|_version.*\.py|__config__\.py")  # differ by platform and build
HELD_OUT_SHARE = 0.05  # of the text for val, as much for test, where no file is named so
MIN_DRAWN = 20  # documents in each, or the draw is left: few give by chance far too much or nothing
GAP_BYTES = 8  # of text for each token of the row that a gap holds; prose and code have 3 to 5
BUNDLE_BYTES = 1 << 26  # of plain text, encoded and mixed as one: bounds memory and lost work


@dataclass(frozen=True)
class Piece:
    """Bytes of a plain text file, from one blank line to another: read and encoded at a time."""

    path: Path
    digest: bytes  # sha256 of the whole file
    start: int
    end: int

    def text(self) -> str:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            raw = file.read(self.end - self.start)
        if self.start == 0:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise Fail(f"{self.path} is no longer UTF-8 ({error.reason})") from None


@dataclass(eq=False)
class Source:
    """A parquet or jsonl file, or a bundle of plain text: encoded and restarted as a unit."""

    name: str
    path: Path | None  # None for a bundle
    split: str | None  # None: its documents go by `splits`
    splits: Splits | None = None  # own text only
    pieces: tuple[Piece, ...] = ()  # of a bundle

    def describe(self) -> dict:
        """What the manifest says of it."""
        record = {"name": self.name, "split": self.split}
        if self.path:
            return {**record, "size": self.path.stat().st_size, "sha256": sha256_of(self.path)}
        digest = hashlib.sha256()
        for piece in self.pieces:
            digest.update(piece.digest + b"%d %d\n" % (piece.start, piece.end))
        size = sum(piece.end - piece.start for piece in self.pieces)
        return {**record, "size": size, "sha256": digest.hexdigest()}

    @property
    def is_cut(self) -> bool:
        """Are its texts cut into passages, rather than documents that stay whole?"""
        return self.path is None or (self.splits is not None and self.splits.stretches is not None)


class Splits:
    """Which split a document of own text belongs to. None belongs to two.

    What a file named for a split holds belongs there, and is left out everywhere else. The rest is
    drawn, each document by the sha256 of its text. Where so few are drawn that chance decides, all
    text is laid end to end instead, by name, and cut in stretches: val, train, test, and between
    them gaps of a row and more that belong nowhere, so that no passage has its neighbour on the
    other side.
    """

    def __init__(self, held_out: dict[bytes, str], wanted: list[str], row_length: int):
        self.held_out = held_out  # {sha256: split} of the documents in files named for one
        self.wanted = wanted  # of val and test, what no file is named for
        self.gap = GAP_BYTES * row_length + CUT_BYTES
        self.stretches = None  # {sha256: [(start, end, split)]} in bytes
        self.documents = {}  # {sha256: bytes} of the rest, as far as they had to be counted
        self.drawn = dict.fromkeys(SPLITS, 0)  # how many of them a draw gives, and their bytes
        self.drawn_bytes = dict.fromkeys(SPLITS, 0)

    def decide(self, plain: list[tuple[bytes, int]], others):
        """Draw, or stretches? Both give (sha256, bytes); `others` are read until it is clear."""
        if not self.wanted:
            return
        for document in plain:
            self._count(*document)
        for document in others:
            if self._is_fair():
                return
            self._count(*document)
        if not self._is_fair():
            self._lay_out()

    def _count(self, digest: bytes, length: int):
        if digest not in self.held_out and digest not in self.documents:
            self.documents[digest] = length
            self.drawn[_drawn_split(digest)] += 1
            self.drawn_bytes[_drawn_split(digest)] += length

    def _is_fair(self) -> bool:
        """Would a draw give enough documents, and about the share of the text?"""
        share = HELD_OUT_SHARE * sum(self.drawn_bytes.values())
        return all(
            self.drawn[split] >= MIN_DRAWN and share / 2 <= self.drawn_bytes[split] <= 2 * share
            for split in self.wanted
        )

    def _lay_out(self):
        total = sum(self.documents.values())
        share = int(HELD_OUT_SHARE * total)
        train_start, train_end = 0, total
        line = []  # (start, end, split) of all text
        if "val" in self.wanted:
            line.append((0, share, "val"))
            train_start = share + self.gap
        if "test" in self.wanted:
            line.append((total - share, total, "test"))
            train_end = total - share - self.gap
        line.append((train_start, train_end, "train"))
        self.stretches = {}
        position = 0
        for digest, size in self.documents.items():
            clipped = [
                (max(a - position, 0), min(b - position, size), split) for a, b, split in line
            ]
            self.stretches[digest] = [part for part in clipped if part[0] < part[1]]
            position += size

    def parts(self, digest: bytes, text, split: str | None) -> list[tuple[int, int, str]]:
        """(start, end, split) of a document's bytes `text` in a file that is named for `split`."""
        if digest in self.held_out or split:
            own = split is not None and self.held_out.get(digest, split) == split
            return [(0, len(text), split)] if own else []
        if self.stretches is not None:
            parts = self.stretches[digest]
            return [(cut_place(text, start), cut_place(text, end), s) for start, end, s in parts]
        split = _drawn_split(digest)
        return [(0, len(text), split if split in self.wanted else "train")]

    def __str__(self):
        share = f"{HELD_OUT_SHARE:.0%}"
        if not self.wanted:
            return "split by name"
        if self.stretches is None:
            return f"split by the sha256 of each document: {share} for {' and '.join(self.wanted)}"
        ends = {"val": "the first", "test": "the last"}
        stretches = [f"{split} {ends[split]} {share}" for split in self.wanted]
        files = "1 document" if len(self.documents) == 1 else f"{len(self.documents):,} documents"
        return (
            f"split in stretches, for {files} cannot be drawn from evenly: {', '.join(stretches)} "
            f"of the text in order of names, {self.gap / 1e3:.0f} kB left out at each border"
        )


def _drawn_split(digest: bytes) -> str:
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < HELD_OUT_SHARE:
        return "val"
    if share < 2 * HELD_OUT_SHARE:
        return "test"
    return "train"


def text_files(data: Path) -> dict[str, Path]:
    """{name: path} of every file of SUFFIXES below `data`, or `data` itself, which may be one."""
    top = data.parent if data.is_file() else data
    files = {}
    for path in _files_below(data):
        if kind_of(path) in SUFFIXES:
            files[path.relative_to(top).as_posix()] = path
    if not files:
        *names, last = [f"*{suffix}" for suffix in SUFFIXES]
        names = f"{', '.join(names)} or {last}"
        raise Fail(f"{data} is no {names}" if data.is_file() else f"no {names} below {data}")
    wrong = [path for path in files.values() if kind_of(path) not in READERS and not is_text(path)]
    if wrong:
        raise not_utf8(wrong)
    return files


def _files_below(data: Path) -> list[Path]:
    """Without what is hidden, and what lies behind links to folders."""
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise Fail(f"--data {data}: there is no such directory")
    found = []
    for root, folders, names in os.walk(data):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _left_out(data: Path) -> str:
    """A line that counts the files below `data` that are not read, by their kind; or nothing."""
    kinds = Counter()
    for path in _files_below(data):
        if kind_of(path) not in SUFFIXES:
            kinds[kind_of(path) or "without a suffix"] += 1
        elif not path.stat().st_size:
            kinds["empty"] += 1
    most_first = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
    counted = some(f"{count:,} {kind}" for kind, count in most_first)
    return f"not read: {counted}\n" if counted else ""


def named_split(name: str) -> str | None:
    """The split that a file is named for: val.*, val_*, val-*, val/*; also valid, validation, test."""
    *folders, file = name.split("/")
    for word in (*folders, re.split("[._-]", file)[0]):
        if word in ("val", "valid", "validation"):
            return "val"
        if word == "test":
            return "test"
    return None


def demo_files() -> dict[str, Path]:
    """{name: path} of the .py files of DEMO_PACKAGES: the same text wherever their versions are.

    Without the files that a build writes, and those that are empty or not UTF-8.
    """
    files = {}
    for package in DEMO_PACKAGES:
        found = importlib.util.find_spec(package)
        if found is None or not found.origin:
            raise Fail(f"the demo's text is the source of {package}, which is missing: uv sync")
        directory = Path(found.origin).parent
        for path in sorted(directory.rglob("*.py")):
            if not BUILT.fullmatch(path.name) and path.stat().st_size and is_text(path):
                files[path.relative_to(directory.parent).as_posix()] = path
    return files


def text_sources(
    files: dict[str, Path], named: dict[str, str], row_length: int
) -> tuple[list[Source], Splits]:
    """The sources of own text, and how it is split; files: by name; named: those for a split."""
    sources = []
    plain = {}  # name: sha256
    for name, path in files.items():
        if kind_of(path) in READERS:
            sources.append(Source(name, path, named.get(name)))
        else:
            plain[name] = bytes.fromhex(sha256_of(path))
    held_out = {}
    for name, split in named.items():
        if name in plain and split != "train":
            held_out[plain[name]] = split
    for source in sources:
        if source.split in ("val", "test"):
            for _, digest, _ in read(source):
                held_out[digest] = source.split

    wanted = [split for split in ("val", "test") if split not in named.values()]
    splits = Splits(held_out, wanted, row_length)
    unnamed = [name for name in plain if name not in named]
    others = ((digest, len(raw)) for s in sources if not s.split for _, digest, raw in read(s))
    splits.decide([(plain[name], files[name].stat().st_size) for name in unnamed], others)
    for source in sources:
        source.splits = splits

    pieces = {split: [] for split in SPLITS}
    for name, digest in plain.items():
        for split, piece in _pieces(files[name], digest, named.get(name), splits):
            # By the hash of their names, so that every bundle is a fair sample.
            key = hashlib.sha256(os.fsencode(name) + b"/%d" % piece.start).digest()
            pieces[split].append((key, name, piece))
    for split in SPLITS:
        for bundle in _bundles(sorted(pieces[split], key=lambda entry: entry[0])):
            names = sorted({name for _, name, _ in bundle})
            label = names[0] if len(names) == 1 else f"{len(names)} text files"
            sources.append(Source(label, None, split, splits, tuple(p for _, _, p in bundle)))
    return sources, splits


def _pieces(path: Path, digest: bytes, named: str | None, splits: Splits):
    """Yields (split, piece) of a plain text file, in order."""
    if path.stat().st_size == 0:
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        for start, end, split in splits.parts(digest, text, named):
            while start < end:
                stop = min(cut_place(text, start + PIECE_BYTES), end)
                yield split, Piece(path, digest, start, stop)
                start = stop


def _bundles(pieces: list):
    """Yields lists of the (key, name, piece), in order, each ended by what fills BUNDLE_BYTES."""
    bundle = []
    size = 0
    for entry in pieces:
        bundle.append(entry)
        size += entry[2].end - entry[2].start
        if size >= BUNDLE_BYTES:
            yield bundle
            bundle = []
            size = 0
    if bundle:
        yield bundle


def read(source: Source):
    """Yields (row group, sha256, bytes) of a parquet or jsonl file's documents, in its order."""
    for group, text in READERS[kind_of(source.path)](source.path):
        raw = text.encode()
        yield group, hashlib.sha256(raw).digest(), raw


def documents(source: Source):
    """Yields (split, row group, text) in order; pieces of text where the source is cut.

    Raises Fail, naming file and place, on anything that is not text.
    """
    if source.path is None:
        for piece in source.pieces:
            yield source.split, 0, piece.text()
    elif source.splits is None:
        for group, text in READERS[kind_of(source.path)](source.path):
            yield source.split, group, text
    else:
        for group, digest, raw in read(source):
            for start, end, split in source.splits.parts(digest, raw, source.split):
                if start < end:
                    yield split, group, raw[start:end].decode()


def own_text(data: Path, row_length: int) -> tuple[list[Source], str]:
    """(the sources of own text, how they are split in words)."""
    files = text_files(data)
    named = {name: named_split(name) for name in files if named_split(name)}
    if {"val", "test"} <= set(named.values()):
        named = {name: named.get(name, "train") for name in files}
    sources, splits = text_sources(files, named, row_length)
    return sources, f"{_left_out(data)}{_held_out(sources, files, named)}{splits}"


def demo(row_length: int) -> tuple[list[Source], str]:
    sources, splits = text_sources(demo_files(), {}, row_length)
    return sources, str(splits)


def _held_out(sources: list[Source], files: dict[str, Path], named: dict[str, str]) -> str:
    """A line for each split that files are named for, or that plain files were drawn for."""
    lines = ""
    for split in ("val", "test"):
        pieces = [piece for source in sources if source.split == split for piece in source.pieces]
        if split in named.values():
            names = [name for name in named if named[name] == split]
            lines += f"{split} is what is named so: {some(names)}\n"
        elif pieces and sources[0].splits.stretches is None:
            paths = {piece.path for piece in pieces}
            lines += f"{split} is {some(name for name in files if files[name] in paths)}\n"
    return lines


def enough_text(size: int, row_length: int) -> str:
    """What to do about too little text (bytes): how much is enough, or for which rows this is."""

    def enough(row_length: int) -> float:
        row = GAP_BYTES * row_length
        gaps = 2 * (row + CUT_BYTES)
        return max(row / HELD_OUT_SHARE, (row + gaps) / (1 - 2 * HELD_OUT_SHARE))

    if enough(row_length) <= size:  # and yet it was not: it is hardly text
        return "Add other text, or lower --seq-len"
    advice = f"Add text until there are {enough(row_length) / 1e3:,.0f} kB"
    lengths = [2**power for power in range(4, 20) if enough(2**power + 1) <= size]
    return f"{advice}, or prepare with --seq-len {lengths[-1]}" if lengths else advice
