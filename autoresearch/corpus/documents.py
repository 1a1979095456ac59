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

import numpy as np

from autoresearch.common import Fail, sha256_of

# ------------------------------------------------------------------------------- parquet and jsonl


def well_formed(text: str) -> str:
    """A lone surrogate, which JSON and Python can carry and UTF-8 cannot, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_parquet(path: Path):
    """Yields (row group, text). Raises Fail, naming the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            for rows in file.iter_batches(row_groups=[group], columns=["text"], batch_size=1024):
                for text in rows.column("text").cast(pa.string()).to_pylist():
                    if text:
                        yield group, text
    except (pa.ArrowException, KeyError, OSError, UnicodeError) as error:
        raise Fail(f"{path} is no readable parquet file with a column `text` ({error})") from None


def read_jsonl(path: Path):
    """Yields (0, text): the whole file is one row group. Raises Fail, naming the line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = well_formed(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                kind = type(error).__name__
                raise Fail(
                    f"{path}, line {number}: not a JSON object with a string `text` ({kind})"
                ) from None
            if text:
                yield 0, text


READERS = {".parquet": read_parquet, ".jsonl": read_jsonl}
PLAIN_TEXT = (".txt", ".md")


# ------------------------------------------------------------------------------------- plain text

PASSAGE_BYTES = 1 << 16  # a longer plain text is cut into passages of about this length
LOOK_AHEAD = 1 << 12  # bytes beyond, in which a blank line to cut at is looked for

BLANK_LINE = re.compile(rb"\n\s*\n")
LINE_END = re.compile(rb"\n")


@dataclass(frozen=True)
class Passage:
    """Bytes start to end of a plain text file."""

    path: Path
    start: int
    end: int
    digest: bytes  # sha256 of the text, or of the digests of the passages that were joined

    def text(self) -> str:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(self.end - self.start).decode()


def passages_of(path: Path) -> list[Passage]:
    """The whole file, or pieces of about PASSAGE_BYTES where it is longer. No byte order mark."""
    if path.stat().st_size == 0:  # mmap refuses an empty file
        return []
    passages = []
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        start = len(codecs.BOM_UTF8) if text[:3] == codecs.BOM_UTF8 else 0
        while start < len(text):
            end = cut_place(text, start + PASSAGE_BYTES)
            passages.append(Passage(path, start, end, hashlib.sha256(text[start:end]).digest()))
            start = end
    return passages


def cut_place(text, place: int) -> int:
    """The end of the first blank line from byte `place` on, else of a line, else of a character."""
    for end in (BLANK_LINE, LINE_END):
        found = end.search(text, place, place + LOOK_AHEAD)
        if found:
            return found.end()
    while place < len(text) and text[place] & 0xC0 == 0x80:  # inside a character of UTF-8
        place += 1
    return min(place, len(text))


def is_utf8(path: Path) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            while file.read(1 << 20):
                pass
    except UnicodeDecodeError:
        return False
    return True


PASSAGE_SLACK = 0.05  # a passage is a row, or so much more up to a blank line


def cut_to_rows(tokenizer, text: str, size: int) -> list[np.ndarray]:
    """A text's tokens, cut into passages of `size` or a little more, so that packed rows are full.

    It is cut in tokens, so the length is exact and the text is encoded once. A passage ends with a
    blank line if there is one within PASSAGE_SLACK, else with a line, else anywhere.
    """
    ids = tokenizer.encode_array(text)
    raw = text.encode()
    ends = np.cumsum(tokenizer.token_bytes[ids])  # (tokens,) bytes up to the end of each
    blank_lines = np.array([match.end() for match in BLANK_LINE.finditer(raw)], dtype=np.int64)
    lines = np.flatnonzero(np.frombuffer(raw, dtype=np.uint8) == ord("\n")) + 1
    places = []  # for each kind of end: how many tokens stand before, rising
    for found in (blank_lines, lines):
        last = ends.searchsorted(found)
        places.append((last + 1)[ends[last] == found])  # most ends are a token's end
    slack = int(PASSAGE_SLACK * size)
    cut = []
    start = 0
    while len(ids) - start > size + slack:
        end = least = start + size
        for candidates in places:
            i = candidates.searchsorted(least)
            if i < len(candidates) and candidates[i] <= least + slack:
                end = int(candidates[i])
                break
        cut.append(ids[start:end])
        start = end
    cut.append(ids[start:])
    return cut


# ----------------------------------------------------------------------------------------- sources


@dataclass(eq=False)
class Source:
    """Documents that are encoded together: a parquet or jsonl file, or a bundle of plain text."""

    name: str
    split: str | None  # None: `split_of` decides for each document
    path: Path | None = None  # None for a bundle
    passages: tuple[Passage, ...] = ()  # of a bundle
    # The split of a document, by the sha256 of its text; None leaves it out.
    split_of: Callable[[bytes], str | None] | None = None

    def read(self):
        """Yields (row group, text) of a parquet or jsonl file, in its order."""
        return READERS[self.path.suffix.lower()](self.path)

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

    def describe(self) -> dict:
        """Its entry in the manifest's `files`."""
        if self.path:
            size, sha256 = self.path.stat().st_size, sha256_of(self.path)
        else:
            size = sum(passage.end - passage.start for passage in self.passages)
            digests = b"".join(passage.digest for passage in self.passages)
            sha256 = hashlib.sha256(digests).hexdigest()
        return {"name": self.name, "split": self.split, "size": size, "sha256": sha256}
