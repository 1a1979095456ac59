"""Files as people have them: packed, in other encodings, with nulls, of other types, changing."""

import gzip
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from miniature import put, put_jsonl, put_parquet, words, write_texts

import prepare
from autoresearch.common import Fail
from autoresearch.corpus import text
from autoresearch.corpus.climbmix import check_shard
from autoresearch.corpus.documents import Source

SMALL = "--seq-len 32 --vocab-size 280 --eval-tokens 512".split()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def texts_in(path) -> list[str]:
    return [text for _, text in Source(path.name, "train", path).read()]


# ---- packed


def test_a_packed_folder_gives_the_rows_of_the_unpacked_one(tmp_path, cache):
    draw = random.Random(3)
    put_jsonl(tmp_path / "a" / "more.jsonl", [words(draw, 30) for _ in range(200)])
    put(tmp_path / "a" / "story.txt", "\n\n".join(words(draw, 40) for _ in range(900)))
    for path in (tmp_path / "a").iterdir():
        put(tmp_path / "b" / f"{path.name}.gz", gzip.compress(path.read_bytes()))
    tokens = []
    for folder in "ab":
        prepare.main(["--data", str(tmp_path / folder), *SMALL, "--force"])
        tokens.append([entry["sha256"] for entry in prepare.manifest()["tokens"]])
    assert tokens[0] == tokens[1] and not (cache / "unpacked").exists()


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz"])
@pytest.mark.parametrize("cut", [0, 9])
def test_a_packed_file_that_is_cut_short_is_named(tmp_path, name, cut):
    content = gzip.compress(b'{"text": "cut"}\n' * 99)
    put(tmp_path / "data" / name, content[:-cut] if cut else b"no gzip")
    with pytest.raises(Fail, match=rf"{name} is no whole gzip file .*: fetch it again"):
        text.own_text(tmp_path / "data")


def test_what_lies_there_instead_is_said_with_what_to_do(tmp_path):
    for name in ("a.jsonl.zst", "b.jsonl.zst", "c.json", "d.tar.gz", "e.pdf"):
        put(tmp_path / "data" / name, "x")
    with pytest.raises(Fail) as failure:
        text.own_text(tmp_path / "data")
    for said in ("2 .jsonl.zst (unpack by `zstd -d`)", "1 .json (rename to .jsonl", "1 .pdf"):
        assert said in str(failure.value)


# ---- what a text may be


def test_nulls_are_skipped_and_counted(tmp_path, capsys):
    many = [words(random.Random(i), 30) for i in range(200)]
    put_parquet(tmp_path / "data" / "a.parquet", [None, *many[:100], "", None])
    put_jsonl(tmp_path / "data" / "b.jsonl", [None, "", *many[100:]])
    prepare.main(["--data", str(tmp_path / "data"), *SMALL])
    said = "skipped 3 documents whose text is null: a.parquet (2), b.jsonl (1)"
    assert said in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "a", "id": ' + b"9" * 5000 + b"}",
        b'{"id": NaN, "text": "b", "text": "a", "far": Infinity}',
        b'\xef\xbb\xbf{"text": "a"}\r',
    ],
)
def test_odd_json_is_read(tmp_path, line):
    assert texts_in(put(tmp_path / "a.jsonl", line + b"\n")) == ["a"]


UTF8 = "not UTF-8: save it as UTF-8.*iconv"


@pytest.mark.parametrize(
    "content, reason",
    [
        ('{"text": "déjà"}'.encode("latin-1"), UTF8),
        ('{"text": "a"}\n{"text": "b"}\n'.encode("utf-16"), UTF8),
        ('{"text": "a"}\n{"text": "b"}\n'.encode("utf-16-le"), UTF8),
        (b'{"content": "a", "id": 1}', "no `text`, but content, id"),
        (b'{"text": 5}', "not a JSON object with a string `text`"),
        (b'["text"]', "not a JSON object"),
        (b"[" * 100_000, "RecursionError"),
    ],
)
def test_a_line_that_holds_no_text_is_named_with_the_reason(tmp_path, content, reason):
    with pytest.raises(Fail, match=f"a.jsonl, line [12]: .*{reason}"):
        texts_in(put(tmp_path / "a.jsonl", content + b"\n"))


@pytest.mark.parametrize(
    "column, texts",
    [
        (pa.array(["a", None, "b"], pa.large_string()), ["a", "b"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([b"a", b"b"]), ["a", "b"]),
        (pa.array([None, None], pa.null()), []),
        (pa.array([], pa.string()), []),
        (pa.array([1, 2]), "holds int64, not text"),
        (pa.array([1.5]), "holds double, not text"),
        (pa.array([["a"]]), "holds list<.*>, not text"),
        (pa.array([{"en": "a"}]), "holds struct<en: string>, not text"),
    ],
)
def test_a_parquet_column_of_text_is_read_and_another_is_named(tmp_path, column, texts):
    pq.write_table(pa.table({"id": range(len(column)), "text": column}), tmp_path / "a.parquet")
    if isinstance(texts, list):
        assert texts_in(tmp_path / "a.parquet") == texts
    else:
        with pytest.raises(Fail, match=f"a.parquet: its column `text` {texts}"):
            texts_in(tmp_path / "a.parquet")


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path):
    put_parquet(tmp_path / "a.parquet", ["x"], column="content")
    with pytest.raises(Fail, match="a.parquet has no column `text`, but content: rename"):
        texts_in(tmp_path / "a.parquet")


def test_what_the_system_refuses_is_not_blamed_on_the_file(tmp_path, monkeypatch):
    def too_many(path):
        raise OSError(24, "Failed to open local file. Detail: [errno 24] Too many open files")

    put_parquet(tmp_path / "shard.parquet.part", ["a text"])
    whole = (tmp_path / "shard.parquet.part").read_bytes()
    monkeypatch.setattr(pq, "ParquetFile", too_many)
    with pytest.raises(OSError, match="Too many open files: '.*shard.parquet.part'"):
        check_shard(tmp_path / "shard.parquet.part", None)
    assert (tmp_path / "shard.parquet.part").read_bytes() == whole


# ---- copies, folders, changes, names


def test_copies_of_one_text_are_called_copies(tmp_path):
    for number in range(500):
        put(tmp_path / "data" / f"{number}.txt", "the same story, again and again")
    with pytest.raises(Fail, match="499 of 500 texts are copies.*none is left for val"):
        text.own_text(tmp_path / "data")


def test_a_folder_that_may_not_be_read_is_not_left_out_in_silence(tmp_path, monkeypatch):
    put(tmp_path / "data" / "a.txt", "some text")
    put(tmp_path / "data" / "secret" / "b.txt", "more text")
    real = os.scandir

    def scandir(path):  # root may read everything
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(Fail, match="secret: your own rights"):
        prepare.main(["--data", str(tmp_path / "data"), *SMALL])


@pytest.mark.parametrize("name, new", [("a.txt", "é" * 999), ("b.jsonl", '{"text": "new"}\n')])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, cache, monkeypatch, name, new):
    write_texts(tmp_path / "data", files=20)
    put(tmp_path / "data" / "a.txt", "x" * 999)
    put_jsonl(tmp_path / "data" / "b.jsonl", ["a b c"] * 9)
    real = prepare.train_tokenizer

    def train_tokenizer(*arguments):
        put(tmp_path / "data" / name, new)
        return real(*arguments)

    monkeypatch.setattr(prepare, "train_tokenizer", train_tokenizer)
    with pytest.raises(Fail, match=f"changed while it was read: .*{name}"):
        prepare.main(["--data", str(tmp_path / "data"), *SMALL])
    assert not (cache / "manifest.json").exists()


def test_a_name_cannot_forge_a_line(tmp_path, capfd):
    for number, name in enumerate(
        [b"val_\xe9.jsonl", b"val_\nFAIL: forged.jsonl", b"test_\x1b.jsonl"]
    ):
        rows = [words(random.Random(f"{number} {i}"), 40) for i in range(9)]
        put_jsonl(tmp_path / "data" / os.fsdecode(name), rows)
    put_jsonl(tmp_path / "data" / "a.jsonl", [words(random.Random(i), 40) for i in range(100)])
    prepare.main(["--data", str(tmp_path / "data"), *SMALL])
    out, err = capfd.readouterr()
    assert r"val by name: val_\nFAIL: forged.jsonl, val_\xe9.jsonl" in out
    assert not any(line.startswith("FAIL") for line in (out + err).splitlines())
    assert (out + err).encode().isascii()
