"""Readers: a file in, its documents out, or one line that names the file and the place."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path

from autoresearch.common import Fail, some

PIECE_BYTES = 1 << 20  # of plain text, read and encoded at a time
CUT_BYTES = 1 << 12  # so much further on, a blank line to cut a file at is still looked for


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
            yield 0, text


READERS = {".parquet": read_parquet, ".jsonl": read_jsonl}
SUFFIXES = (*READERS, ".txt", ".md")  # what no reader knows is plain text


def kind_of(path: Path) -> str:
    return path.suffix.lower()


BLANK_LINE = re.compile(rb"\n\s*\n")
LINE_END = re.compile(rb"\n")


def cut_place(text, place: int) -> int:
    """Where a blank line ends, the first from byte `place` on; else a line; else a character."""
    if not 0 < place < len(text):
        return place
    for end in (BLANK_LINE, LINE_END):
        found = end.search(text, place, place + CUT_BYTES)
        if found:
            return found.end()
    while place < len(text) and text[place] & 0xC0 == 0x80:
        place += 1
    return place


def is_text(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        try:
            while block := file.read(PIECE_BYTES):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def not_utf8(paths: list[Path]) -> Fail:
    with open(paths[0], "rb") as file:
        is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return Fail(
        f"not UTF-8: {some(paths)}. Save as UTF-8, by an editor or `iconv -f "
        f"{'UTF-16' if is_utf16 else 'LATIN1'} -t UTF-8 OLD > NEW`, or move away"
    )
