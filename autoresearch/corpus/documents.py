"""
Readers: a file in, its documents out, or one line that names the file and the place.

parquet (column `text`), jsonl (field `text`), and plain text, whose documents are passages of it.
Jsonl and plain text may be packed by gzip.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from autoresearch.common import Fail, file_name, one_line, sha256_of, some

# ------------------------------------------------------------------------------- parquet and jsonl

SAVE_AS_UTF8 = (
    "save it as UTF-8, by an editor or `iconv -f LATIN1 -t UTF-8 OLD > NEW` (or -f UTF-16), or "
    "move it away"
)


def well_formed(text: str) -> str:
    """A lone surrogate, which JSON and Python can carry and UTF-8 cannot, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_parquet(path: Path):
    """Yields (row group, text; None for a null). Raises Fail or OSError, naming the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            require_text_column(file.schema_arrow, path)
            for group in range(file.num_row_groups):
                for rows in file.iter_batches(
                    row_groups=[group], columns=["text"], batch_size=1024
                ):
                    for text in rows.column("text").cast(pa.string()).to_pylist():
                        yield group, text
    except (pa.ArrowException, KeyError, OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno:  # of the system: the file may be whole
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
        name, reason = file_name(path), one_line(error, 300)
        raise Fail(f"{name} is no readable parquet file with a column `text` ({reason})") from None


def require_text_column(schema, path: Path):
    """schema: pyarrow's. Raises Fail unless one column `text` holds text (or only nulls)."""
    import pyarrow.types as of

    if "text" not in schema.names:
        columns = some(map(file_name, schema.names))
        raise Fail(
            f"{file_name(path)} has no column `text`, but {columns}: rename the one with text"
        )
    if schema.names.count("text") > 1:
        raise Fail(f"{file_name(path)} has {schema.names.count('text')} columns `text`: rename one")
    kind = schema.field("text").type
    inner = kind.value_type if of.is_dictionary(kind) else kind
    kinds = "string large_string string_view binary large_binary binary_view fixed_size_binary null"
    if not any(getattr(of, "is_" + name)(inner) for name in kinds.split()):
        raise Fail(
            f"{file_name(path)}: its column `text` holds {one_line(kind, 60)}, not text: give the "
            "column with the text that name"
        )


def read_jsonl(path: Path):
    """Yields (0, text; None for a null): the whole file is one row group. Raises Fail, naming the line."""
    packed = path.suffix.lower() == ".gz"
    with gzip.open(path) if packed else open(path, "rb") as file, whole_gzip(path):
        for number, line in enumerate(file, 1):
            if line.strip():
                yield 0, text_in(line, path, number)


def text_in(line: bytes, path: Path, number: int) -> str | None:
    """The field `text` of a JSON object; None for null. Raises Fail, naming file and line."""
    try:
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            raise
        except ValueError:
            record = json.loads(line, parse_int=float)  # an integer of over 4,300 digits
        if record["text"] is None:
            return None
        return well_formed(record["text"])
    except KeyError:
        reason = f"no `text`, but {some(map(file_name, record))}" if record else "it is empty"
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError) or b"\0" in line:
            raise Fail(f"{file_name(path)}, line {number}: not UTF-8: {SAVE_AS_UTF8}") from None
        reason = f"{type(error).__name__}: {one_line(error)}"
    place = f"{file_name(path)}, line {number}"
    raise Fail(f"{place}: not a JSON object with a string `text` ({reason})")


# ------------------------------------------------------------------------------------ kinds of file

READERS = {".parquet": read_parquet, ".jsonl": read_jsonl, ".jsonl.gz": read_jsonl}
PLAIN_TEXT = (".txt", ".md", ".txt.gz", ".md.gz")
PACKERS = (".gz", ".zst", ".xz", ".bz2")


def kind_of(path: Path) -> str:
    """The suffix in small letters, with that of a packer: `.txt`, `.jsonl.gz`."""
    suffixes = path.suffixes[-2:] if path.suffix.lower() in PACKERS else path.suffixes[-1:]
    return "".join(suffixes).lower()


@contextlib.contextmanager
def whole_gzip(path: Path):
    """While a packed file is read: Fail where it is cut short or no gzip file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Fail(f"{file_name(path)} is no whole gzip file ({error}): fetch it again") from None


def unpack(path: Path, unpacked: Path):
    """Plain text is read in any order, so it is unpacked to a file."""
    with gzip.open(path) as file, whole_gzip(path), open(unpacked, "wb") as out:
        shutil.copyfileobj(file, out, 1 << 20)


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
            content = file.read(self.end - self.start)
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise changed([self.path]) from None


def changed(paths: list[Path]) -> Fail:
    names = some(map(file_name, paths), 4)
    return Fail(f"changed while it was read: {names}. Wait until it rests, then run the same again")


def passages_of(path: Path) -> list[Passage]:
    """The whole file, or pieces of about PASSAGE_BYTES where it is longer. No byte order mark."""
    passages = []
    with open(path, "rb") as file:
        mark = file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
        start = len(codecs.BOM_UTF8) if mark else 0
        while True:
            file.seek(start)
            text = file.read(PASSAGE_BYTES + LOOK_AHEAD)
            if not text:
                return passages
            size = cut_place(text, PASSAGE_BYTES)
            digest = hashlib.sha256(text[:size]).digest()
            passages.append(Passage(path, start, start + size, digest))
            start += size


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


def stamp(path: Path) -> tuple | None:
    """Changes when the file does; None where it is gone."""
    with contextlib.suppress(FileNotFoundError):
        found = path.stat()
        return found.st_size, found.st_mtime_ns, found.st_ino
    return None


@dataclass(eq=False)
class Source:
    """Documents that are encoded together: a parquet or jsonl file, or a bundle of plain text."""

    name: str
    split: str | None  # None: `split_of` decides for each document
    path: Path | None = None  # None for a bundle
    passages: tuple[Passage, ...] = ()  # of a bundle
    # The split of a document, by the sha256 of its text; None leaves it out.
    split_of: Callable[[bytes], str | None] | None = None
    stamps: dict[Path, tuple] = field(default_factory=dict)  # of its files, before they were read
    nulls: int = 0  # documents without text, when it was read last

    def read(self):
        """Yields (row group, text) of a parquet or jsonl file, in its order."""
        self.nulls = 0
        for group, text in READERS[kind_of(self.path)](self.path):
            if text:
                yield group, text
            elif text is None:
                self.nulls += 1

    def require_unchanged(self):
        """Raises Fail where a file is no longer the one that was read."""
        wrong = [path for path in self.stamps if stamp(path) != self.stamps[path]]
        if wrong:
            raise changed(wrong)

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
