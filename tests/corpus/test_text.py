"""Own text and the demo: every text on the side where a brute-force reading of the rule puts it."""

import hashlib
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from miniature import put, put_jsonl, put_parquet, words, write_texts

import prepare
from autoresearch.common import Fail
from autoresearch.corpus import documents, text

SMALL = "--seq-len 32 --vocab-size 280 --eval-tokens 512".split()
SPLITS = ("train", "val", "test")


def sha256(content: str) -> bytes:
    return hashlib.sha256(content.encode()).digest()


def by_the_rule(texts, wanted=("val", "test")) -> dict[str, str]:
    """{text: split}, step by step as SPEC.md has it, for texts that are smaller than a share."""
    line = sorted(set(texts), key=sha256)
    share = sum(len(text.encode()) for text in line) / 20
    found = dict.fromkeys(line, "train")
    for split in wanted:
        seen = 0
        while seen < share:
            first = line.pop(0)
            found[first] = split
            seen += len(first.encode())
    return found


@pytest.fixture
def prepared_documents(tmp_path, monkeypatch):
    """prepared_documents(data): the texts of each split, decoded from the token cache."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))

    def of(data: Path) -> dict[str, list[str]]:
        prepare.main(["--data", str(data), *SMALL])
        tokenizer = prepare.Tokenizer.from_directory()
        bos = tokenizer.get_bos_token_id()
        found = {split: [] for split in SPLITS}
        for entry in prepare.manifest()["tokens"]:
            path = prepare.set_dir() / entry["name"]
            tokens = np.fromfile(path.with_suffix(".bin"), dtype=np.uint16)
            index = np.fromfile(path.with_suffix(".idx"), dtype=np.int32).reshape(-1, 3)
            ends = np.cumsum(index[:, 2])
            assert (tokens == bos).sum() == len(index)
            for (split, _, length), end in zip(index, ends):
                assert tokens[end - length] == bos
                ids = tokens[end - length + 1 : end].tolist()
                found[SPLITS[split]].append(tokenizer.decode(ids))
        return found

    return of


def sides(data: Path) -> dict[str, str]:
    """The text of each split below `data`, from the sources alone."""
    sources, _ = text.own_text(data)
    found = dict.fromkeys(SPLITS, "")
    for source in sources:
        for split, _, content in source.documents():
            found[split] += content
    return found


# ---- the draw


@given(
    st.dictionaries(st.binary(min_size=2, max_size=2), st.integers(1, 400), max_size=60),
    st.sampled_from([["val", "test"], ["val"], ["test"]]),
)
@example({b"0": 1, b"1": 1, b"2": 19}, ["val", "test"])
@example({b"%02d" % number: 100 for number in range(20)}, ["val", "test"])
def test_a_share_is_never_missed(sizes, wanted):
    drawn = text.draw(sizes, wanted)
    share = sum(sizes.values()) / 20
    assert set(drawn) <= set(sizes)
    assert not sizes or len(drawn) < len(sizes)  # something is left to train on
    for number, split in enumerate(wanted):
        of_split = [digest for digest in drawn if drawn[digest] == split]
        assert of_split or len(sizes) <= len(wanted)  # at least one where there are enough
        total = sum(sizes[digest] for digest in of_split)
        so_far = sum(of in wanted[: number + 1] for of in drawn.values())
        assert total >= share or len(sizes) - so_far <= len(wanted) - number
        last = max(of_split, key=lambda d: (sizes[d] > share, d), default=None)
        assert last is None or total - sizes[last] < share  # and no text too many
    assert text.draw(dict(reversed(sizes.items())), wanted) == drawn  # whatever the files' order


def test_every_document_on_its_side(tmp_path, prepared_documents):
    """Two thousand small files in nested folders, empty ones, copies in other formats, odd links."""
    draw = random.Random(7)
    data = tmp_path / "data"
    pieces = [f"{i} {words(draw, 5)}" for i in range(2000)]  # shorter than a row, so not cut
    for i, piece in enumerate(pieces):
        put(data / f"{i % 10}" / f"{i % 7}" / "deep" / f"{i}.{'md' if i % 3 else 'txt'}", piece)
    twice = draw.sample(pieces, 600)
    put_jsonl(data / "copies.jsonl", ["", *twice[:300]])
    put_parquet(data / "copies.parquet", ["", None, *twice[200:]])
    put(data / "empty.txt", "")
    put(data / "picture.jpeg", b"\xff\xd8")
    put(data / os.fsdecode(b"caf\xe9.txt"), "an odd name")
    (data / "loop").symlink_to(data)
    (data / "self.txt").symlink_to(data / "self.txt")
    (data / "gone.txt").symlink_to(data / "nothing")
    everything = [*pieces, *twice[:300], *twice[200:], "an odd name"]
    rule = by_the_rule(everything)
    found = prepared_documents(data)
    for split in SPLITS:
        assert sorted(found[split]) == sorted(one for one in everything if rule[one] == split)


@pytest.mark.parametrize("named", [("val",), ("test",), ("val", "test")])
def test_what_a_named_file_holds_is_left_out_of_the_others(tmp_path, prepared_documents, named):
    draw = random.Random(8)
    texts = [f"{i} {words(draw, 9)}" for i in range(900)]
    held = {}
    for number, split in enumerate(named):  # the second holds documents of the first, too
        held[split] = texts[100 * number : 100 * number + 150]
        put_jsonl(tmp_path / "data" / "sub" / f"{split}-a.jsonl", held[split])
    put_jsonl(tmp_path / "data" / "zz.jsonl", texts)
    found = prepared_documents(tmp_path / "data")
    assert sorted(sum(found.values(), [])) == sorted(texts)  # each once
    for split in held:
        assert set(found[split]) <= set(held[split]) and len(found[split]) >= 100
    if len(named) == 1:
        assert found[named[0]] == held[named[0]]
        other = {"val": "test", "test": "val"}[named[0]]
        rest = by_the_rule(texts[150:], [other])
        assert sorted(found[other]) == sorted(one for one in rest if rest[one] == other)


# ---- plain text


def long_text(draw: random.Random, lines: int) -> str:
    """Lines with their numbers, a blank line after every fifth."""
    return "".join(f"<{i}> {words(draw, 9)}\n" + ("\n" if i % 5 == 4 else "") for i in range(lines))


def test_a_long_text_is_cut_at_blank_lines_near_64_kb(tmp_path):
    story = long_text(random.Random(1), 12_000)
    passages = documents.passages_of(put(tmp_path / "story.txt", story))
    cut = [passage.text() for passage in passages]
    assert "".join(cut) == story and len(cut) > 8
    for one in cut[:-1]:
        assert one.endswith("\n\n") and 0 <= len(one) - (1 << 16) < 1000
    assert len(cut[-1]) < (1 << 16) + 1000
    just = put(tmp_path / "just.txt", "x" * (1 << 16))
    assert len(documents.passages_of(just)) == 1
    assert documents.passages_of(put(tmp_path / "empty.txt", "")) == []


@pytest.mark.parametrize("unit, end", [("words and \n", "\n"), ("🙂", "")])
def test_a_text_without_blank_lines_is_cut_at_a_line_or_between_characters(tmp_path, unit, end):
    content = "x" + unit * (200_000 // len(unit.encode()))
    passages = documents.passages_of(put(tmp_path / "a.txt", content))
    assert "".join(passage.text() for passage in passages) == content
    assert len(passages) == 4 and all(p.text().endswith(end) for p in passages[:-1])


def test_neighbours_in_a_text_do_not_stay_neighbours(tmp_path, prepared_documents):
    story = long_text(random.Random(10), 12_000)
    put(tmp_path / "data" / "train.txt", story)
    for split in ("val", "test"):
        put(tmp_path / "data" / f"{split}.txt", f"{split} is a short text for the score " * 9)
    found = prepared_documents(tmp_path / "data")["train"]
    places = [story.index(one) for one in found]
    steps = [after - before for before, after in zip(places, places[1:])]
    assert sum(0 < step < 500 for step in steps) < len(steps) / 20
    assert sorted("".join(found)) == sorted(story)


def test_a_byte_order_mark_and_lone_surrogates(tmp_path, prepared_documents):
    write_texts(tmp_path / "data")
    put(tmp_path / "data" / "val.txt", b"\xef\xbb\xbfthe first " + b"word has no mark " * 20)
    lone = r'{"text": "a\ud800b \ud83d\ude00 ' + "c" * 50 + '"}\n'
    put(tmp_path / "data" / "lone.jsonl", lone)
    found = prepared_documents(tmp_path / "data")
    assert any(one.startswith("the first word") for one in found["val"])
    assert any(one.startswith("a\ufffdb 😀 ccc") for one in found["train"] + found["test"])


# ---- which files


@pytest.mark.parametrize(
    "name, split",
    {
        "val.txt": "val",
        "validation-00000-of-00001.parquet": "val",
        "val_2.md": "val",
        "books/val/a.txt": "val",
        "test-1.md": "test",
        "testament.md": None,
        "my val.txt": None,
    }.items(),
)
def test_what_is_named_for_a_split(name, split):
    assert text.named_split(name) == split


def test_a_person_sees_what_is_not_read_and_what_is_named(tmp_path):
    write_texts(tmp_path, files=30)
    for name in (".trash/old.md", ".hidden.txt", "photo.png", "more/photo.PNG", "LICENSE"):
        put(tmp_path / name, b"\xff" * 9)
    for number in range(7):
        put(tmp_path / "test" / f"{number}.txt", f"{number}")
    _, how = text.own_text(tmp_path)
    assert how.splitlines() == [
        "not read: 2 hidden, 2 .png, 1 without a suffix",
        "test by name: test/0.txt, test/1.txt, test/2.txt, test/3.txt and 3 more",
        "split by the sha256 of each text: 5% of the bytes for val",
    ]


def test_one_file(tmp_path):
    story = long_text(random.Random(16), 8000)
    found = sides(put(tmp_path / "INPUT.TXT", story))
    assert all(found.values()) and sorted("".join(found.values())) == sorted(story)


def test_no_text(tmp_path):
    with pytest.raises(Fail, match="nowhere: there is no such file or directory"):
        text.own_text(tmp_path / "nowhere")
    put(tmp_path / "data" / "picture.png", b"\x89PNG")
    with pytest.raises(Fail, match="data: there is no .*.parquet"):
        text.own_text(tmp_path / "data")


def test_every_file_that_is_not_utf8_is_named(tmp_path):
    write_texts(tmp_path, files=3)
    put(tmp_path / "cut.md", "x" * ((1 << 20) - 1) + "é")  # not wrong: it spans two blocks
    text.own_text(tmp_path)
    for number in range(8):
        put(tmp_path / f"{number} latin.txt", "déjà vu".encode("latin-1"))
    with pytest.raises(Fail, match="not UTF-8: .*3 latin.txt.* and 2 more.*-f LATIN1"):
        text.own_text(tmp_path)


# ---- the demo


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    """A folder of two packages that the demo is made of, 900 files in all."""
    monkeypatch.setattr(text, "DEMO_PACKAGES", ("red", "green"))
    draw = random.Random(17)
    folder = tmp_path / "packages"
    for number in range(900):
        package = draw.choice(["red", "green"])
        put(folder / package / "test" / f"{number}.py", f"# {number} {words(draw, 40)}\n")
    for package in ("red", "green"):
        put(folder / package / "__init__.py", "")
        put(folder / package / "broken.py", b"caf\xe9")
        put(folder / package / "notes.txt", "no source")
        for built in ("version.py", "_version.py", "_version_meson.py", "__config__.py"):
            put(folder / package / "sub" / built, words(draw, 40))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    return folder


def test_the_demo_is_the_same_wherever_its_packages_are(packages, tmp_path, monkeypatch):
    """Elsewhere, made in another order, with what another build writes: the same fingerprint."""
    sources, _ = text.demo()
    found = "".join(one for source in sources for _, _, one in source.documents())
    assert all(f"# {i} " in found for i in range(900)) and found.count("\n") == 900
    prepare.main(["--demo", *SMALL])
    before = prepare.fingerprint()
    for path in sorted(packages.rglob("*"), reverse=True):
        if path.is_file():
            content = path.read_bytes()
            if "version" in path.name or "config" in path.name:
                content = b"another build"
            put(tmp_path / "elsewhere" / path.relative_to(packages), content)
    shutil.rmtree(packages)
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache2"))
    prepare.main(["--demo", *SMALL])
    assert prepare.fingerprint() == before


def test_a_package_of_the_demo_that_is_missing_is_named(packages, monkeypatch):
    monkeypatch.setattr(text, "DEMO_PACKAGES", ("red", "blueish"))
    with pytest.raises(Fail, match="the source of blueish, which is missing: uv sync"):
        prepare.main(["--demo", *SMALL])


def test_the_demos_packages_are_here():
    """Every name is a package that is installed, with sources."""
    files = text.demo_files()
    assert {name.split("/")[0] for name in files} == set(text.DEMO_PACKAGES)
    assert len(files) > 3000
