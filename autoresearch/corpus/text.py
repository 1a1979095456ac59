"""
Own text and the demo: which files are read, and which split a text belongs to.

Files named val.* or test.* (or so) are those splits. The other texts are split by their sha256: a
document of a parquet or jsonl file, a plain text file, or 64 kB of a longer one. Equal texts have
one sha256, so train, val and test never share a text.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
from collections import Counter
from pathlib import Path

from autoresearch.common import Fail, cache_dir, file_name, some
from autoresearch.corpus.cache import unpacked_dir
from autoresearch.corpus.documents import (
    PLAIN_TEXT,
    READERS,
    SAVE_AS_UTF8,
    Passage,
    Source,
    is_utf8,
    kind_of,
    passages_of,
    stamp,
    unpack,
)
from autoresearch.referee.manifest import SPLITS

# ------------------------------------------------------------------------------------- which files


# What helps with a file that is not read, by how its name ends.
CONVERT = {
    ".zst": "unpack by `zstd -d`",
    ".xz": "unpack by `unxz`",
    ".bz2": "unpack by `bunzip2`",
    ".gz": "unpack by `gunzip`",
    ".zip": "unpack by `unzip`",
    ".tar": "unpack by `tar -xf`",
    ".tgz": "unpack by `tar -xf`",
    ".json": "rename to .jsonl, if each line is an object with `text`",
    ".json.gz": "rename to .jsonl.gz, if each line is an object with `text`",
}


def not_read(skipped: Counter) -> str:
    """`3 .json (rename ...), 1 hidden`; skipped: files by kind."""

    def words(kind: str, count: int) -> str:
        ending = kind if kind in CONVERT else "." + kind.rpartition(".")[2]
        return f"{count:,} {kind}" + (f" ({CONVERT[ending]})" if ending in CONVERT else "")

    return some([words(*found) for found in skipped.most_common()], 4)


def all_below(folder: Path) -> list[Path]:
    """What is below a folder, in order. Links to folders are not followed.

    Raises OSError for a folder that may not be read.
    """

    def refuse(error: OSError):
        raise error

    found = []
    for place, folders, files in os.walk(folder, onerror=refuse):
        found += [Path(place, name) for name in (*folders, *files)]
    return sorted(found)


def text_files(data: Path) -> tuple[dict[str, Path], Counter]:
    """({name: path} of the text files below `data`, or of `data` itself; what is skipped by kind).

    A packed plain text has the path to which it was unpacked.
    """
    if not data.exists():
        raise Fail(f"--data {file_name(data)}: there is no such file or directory")
    if not (data.is_file() or data.is_dir()):
        raise Fail(f"--data {file_name(data)}: it is neither a file nor a folder")
    top = data.parent if data.is_file() else data
    files = {}
    skipped = Counter()
    for path in [data] if data.is_file() else all_below(data):
        name = path.relative_to(top)
        if not path.is_file():
            continue
        if path.absolute().is_relative_to(cache_dir()) and not data.is_file():
            skipped["of the cache"] += 1
        elif any(part.startswith(".") for part in name.parts):
            skipped["hidden"] += 1
        elif kind_of(path) in READERS or kind_of(path) in PLAIN_TEXT:
            files[name.as_posix()] = path
        else:
            skipped[file_name(kind_of(path)) or "without a suffix"] += 1
    if not files:
        wanted = "*.parquet, *.jsonl, *.txt or *.md (the last three also with .gz)"
        lies = f"; there is {not_read(skipped)}" if skipped else ""
        raise Fail(f"{file_name(data)}: there is no {wanted} that is not hidden{lies}")
    for number, (name, path) in enumerate(files.items()):
        if path.suffix.lower() == ".gz" and is_plain(path):
            unpacked_dir().mkdir(exist_ok=True)
            files[name] = unpacked_dir() / f"{number}.txt"
            unpack(path, files[name])
    wrong = [name for name, path in files.items() if is_plain(path) and not is_utf8(path)]
    if wrong:
        names = some([file_name(name, 100) for name in wrong])
        raise Fail(f"{file_name(data)}: not UTF-8: {names}: {SAVE_AS_UTF8}")
    return files, skipped


def is_plain(path: Path) -> bool:
    return kind_of(path) not in READERS


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
    """{name: path} of the .py files of DEMO_PACKAGES: the same text wherever their versions are."""
    files = {}
    for package in DEMO_PACKAGES:
        found = importlib.util.find_spec(package)
        if found is None:
            raise Fail(f"the demo's text is the source of {package}, which is missing: uv sync")
        directory = Path(found.origin).parent
        for path in sorted(directory.rglob("*.py")):
            if not BUILT.fullmatch(path.name) and is_utf8(path):
                files[path.relative_to(directory.parent).as_posix()] = path
    return files


# ------------------------------------------------------------------------------------- which split

SHARE = 0.05  # of the text for val, as much for test, where no file is named so


def draw(sizes: dict[bytes, int], wanted: list[str]) -> dict[bytes, str]:
    """{sha256: split} of the texts that are held out, of {sha256: bytes} of all.

    In the order of the hashes, the first SHARE of the bytes is the first split wanted, the next
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
    """The sources of files, both by name; named: the split of the files that have one.

    Says how many texts are copies of others.
    """
    stamps = {path: stamp(path) for path in files.values()}
    passages = {name: passages_of(path) for name, path in files.items() if is_plain(path)}
    sources = [
        Source(name, named.get(name), path, stamps={path: stamps[path]})
        for name, path in files.items()
        if not is_plain(path)
    ]
    named_texts = {}  # {sha256: split} of the texts in files that are named for val or test
    sizes = {}  # {sha256: bytes} of the texts in files that are named for no split
    seen = 0

    def see(file_split: str | None, digest: bytes, size: int):
        nonlocal seen
        seen += 1
        if file_split:
            named_texts[digest] = file_split
        else:
            sizes[digest] = size

    for name in passages:
        if named.get(name) != "train":
            for passage in passages[name]:
                see(named.get(name), passage.digest, passage.end - passage.start)
    for source in sources:
        if source.split != "train":
            for _, text in source.read():
                raw = text.encode()
                see(source.split, hashlib.sha256(raw).digest(), len(raw))

    wanted = [split for split in ("val", "test") if split not in named.values()]
    free = {digest: sizes[digest] for digest in sizes if digest not in named_texts}
    drawn = draw(free, wanted)
    different = len(named_texts | sizes)
    if different < 0.95 * seen:
        copies = (
            f"{seen - different:,} of {seen:,} texts are copies of others; copies share a split"
        )
        if "val" in wanted and "val" not in drawn.values():
            raise Fail(f"{copies}, and none is left for val: add other text")
        print(copies)

    def split_of(digest: bytes, file_split: str | None) -> str | None:
        """None leaves the text out here: it is in a file that is named for another split."""
        if digest in named_texts:
            return file_split if file_split == named_texts[digest] else None
        return file_split or drawn.get(digest, "train")

    for source in sources:
        source.split_of = functools.partial(split_of, file_split=source.split)
    for split in SPLITS:
        of_split = []
        for name in passages:
            for passage in passages[name]:
                if split_of(passage.digest, named.get(name)) == split:
                    of_split.append(passage)
        sources += bundles(joined(of_split), split, stamps)
    return sources


PIECE_BYTES = 1 << 20  # of plain text, cut into rows as one: only its end does not fill a row
BUNDLE_BYTES = 1 << 26  # of plain text, encoded and mixed as one


def joined(passages: list[Passage]) -> list[Passage]:
    """The passages, neighbours in a file joined to pieces of up to PIECE_BYTES."""
    pieces = []
    for passage in passages:
        last = pieces[-1] if pieces else None
        if (
            last
            and (last.path, last.end) == (passage.path, passage.start)
            and passage.end - last.start <= PIECE_BYTES
        ):
            digest = hashlib.sha256(last.digest + passage.digest).digest()
            pieces[-1] = Passage(passage.path, last.start, passage.end, digest)
        else:
            pieces.append(passage)
    return pieces


def bundles(pieces: list[Passage], split: str, stamps: dict[Path, tuple]) -> list[Source]:
    """Sources of about BUNDLE_BYTES. In the order of the hashes each is a fair sample.

    stamps: of the files.
    """
    cut = []
    size = BUNDLE_BYTES
    for piece in sorted(pieces, key=lambda piece: piece.digest):
        if size >= BUNDLE_BYTES:
            cut.append([])
            size = 0
        cut[-1].append(piece)
        size += piece.end - piece.start
    return [
        Source(
            f"plain text, {split} {number}",
            split,
            passages=tuple(bundle),
            stamps={piece.path: stamps[piece.path] for piece in bundle},
        )
        for number, bundle in enumerate(cut, 1)
    ]


# ------------------------------------------------------------------------------ the two corpora


def demo() -> tuple[list[Source], str]:
    """(its sources, how they are split in words)."""
    return split_files(demo_files(), {}), drawn_in_words(["val", "test"])


def own_text(data: Path) -> tuple[list[Source], str]:
    """(its sources; what is not read and how it is split, in words, for a person to check)."""
    files, skipped = text_files(data)
    named = {name: named_split(name) for name in files if named_split(name)}
    lines = []
    if skipped:
        lines.append(f"not read: {not_read(skipped)}")
    wanted = []
    for split in ("val", "test"):
        names = [name for name in named if named[name] == split]
        if names:
            lines.append(f"{split} by name: {some(map(file_name, names), 4)}")
        else:
            wanted.append(split)
    if wanted:
        lines.append(drawn_in_words(wanted))
    else:
        named = {name: named.get(name, "train") for name in files}
    return split_files(files, named), "\n".join(lines)


def drawn_in_words(wanted: list[str]) -> str:
    return f"split by the sha256 of each text: {SHARE:.0%} of the bytes for {' and '.join(wanted)}"
