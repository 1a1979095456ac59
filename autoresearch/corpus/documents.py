"""
Readers: a file in, its documents out, or one line that names the file and the place.

parquet (column `text`), jsonl (field `text`), and plain text, whose documents are passages of it.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import mmap
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from autoresearch.common import Fail, sha256_of

# ------------------------------------------------------------------------------- parquet and jsonl


def well_formed(text: str) -> str:
    """A lone surrogate, which JSON and Python can carry and UTF-8 cannot, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_parquet(path: Path):
    """Yields (row group, text)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if "text" not in names:
            raise Fail(f"{path} has no column `text`, only: {', '.join(names)[:200]}")
        for group in range(file.num_row_groups):
            for rows in file.iter_batches(row_groups=[group], columns=["text"], batch_size=1024):
                for text in rows.column(0).cast(pa.string()).to_pylist():
                    if text:
                        yield group, text
    except (pa.ArrowException, OSError, UnicodeError) as error:
        reason = str(error)[:200]
        raise Fail(
            f"{path} is not readable as parquet ({reason}): replace it or remove it"
        ) from None


def read_jsonl(path: Path):
    """Yields (0, text): the whole file is one group."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                record = json.loads(line)
                text = well_formed(record["text"])
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                if isinstance(error, KeyError):
                    raise Fail(f"{place} has no `text`, only: {', '.join(record)[:200]}") from None
                kind = type(error).__name__
                raise Fail(f"{place}: not a JSON object with a string `text` ({kind})") from None
            if text:
                yield 0, text


READERS = {".parquet": read_parquet, ".jsonl": read_jsonl}
SUFFIXES = (*READERS, ".txt", ".md")  # the last two are plain text


def kind_of(path: Path) -> str:
    return path.suffix.lower()


# ------------------------------------------------------------------------------------- plain text

PASSAGE_BYTES = 1 << 16  # a longer plain text is cut into passages of so much
LOOK_AHEAD = 1 << 12  # bytes further on, in which a blank line to cut at is looked for

BLANK_LINE = re.compile(rb"\n\s*\n")
LINE_END = re.compile(rb"\n")


@dataclass(frozen=True)
class Passage:
    """Bytes start to end of a plain text file."""

    path: Path
    start: int
    end: int
    digest: bytes  # sha256 of the text, without a byte order mark; or of the digests of its parts

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


def passages_of(path: Path) -> list[Passage]:
    """The whole file, or where it is longer than PASSAGE_BYTES pieces of about that length."""
    if path.stat().st_size == 0:
        return []
    found = []
    start = 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        while start < len(text):
            end = cut_place(text, start + PASSAGE_BYTES)
            raw = text[start:end]
            if start == 0:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            found.append(Passage(path, start, end, hashlib.sha256(raw).digest()))
            start = end
    return found


def cut_place(text, place: int) -> int:
    """Where a blank line ends, the first from byte `place` on; else a line; else a character."""
    if place >= len(text):
        return len(text)
    for end in (BLANK_LINE, LINE_END):
        found = end.search(text, place, place + LOOK_AHEAD)
        if found:
            return found.end()
    while place < len(text) and text[place] & 0xC0 == 0x80:  # inside a character of UTF-8
        place += 1
    return place


def is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        try:
            while block := file.read(1 << 20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


# ----------------------------------------------------------------------------------------- sources


@dataclass(eq=False)
class Source:
    """What is encoded as one: a parquet or jsonl file, or a bundle of plain text."""

    name: str
    split: str | None  # None: split_of says it of each document
    path: Path | None = None  # None for a bundle
    passages: tuple[Passage, ...] = ()  # of a bundle
    # The split of a document, by the sha256 of its text; None leaves it out.
    split_of: Callable[[bytes], str | None] | None = None

    def read(self):
        """Yields (row group, text) of a parquet or jsonl file, in its order."""
        return READERS[kind_of(self.path)](self.path)

    def documents(self):
        """Yields (split, row group, text), in order. Raises Fail, naming file and place."""
        if self.path is None:
            for passage in self.passages:
                yield self.split, 0, passage.text()
            return
        for group, text in self.read():
            split = self.split
            if self.split_of:
                split = self.split_of(hashlib.sha256(text.encode()).digest())
            if split:
                yield split, group, text

    def files(self) -> set[Path]:
        return {self.path} if self.path else {passage.path for passage in self.passages}

    def describe(self) -> dict:
        """What the manifest says of it."""
        record = {"name": self.name, "split": self.split}
        if self.path:
            return {**record, "size": self.path.stat().st_size, "sha256": sha256_of(self.path)}
        size = sum(passage.end - passage.start for passage in self.passages)
        digest = hashlib.sha256(b"".join(passage.digest for passage in self.passages))
        return {**record, "size": size, "sha256": digest.hexdigest()}
