"""The tokenizer: round trips on hostile text, the vocabulary rule, files that are data and nothing else."""

import base64
import pickle
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miniature import WORDS

import prepare
from autoresearch.referee.manifest import read_manifest
from prepare import SPECIAL_TOKENS, Fail, Tokenizer


def texts(seed=0, count=300):
    draw = random.Random(seed)
    words = (
        WORDS
        + ["naïve", "12345", "日本語", "🙂"]
        + ["".join(draw.choices("abcdefgh", k=6)) for _ in range(200)]
    )
    return [" ".join(draw.choices(words, k=40)) + ".\r\n" for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(texts(), 500)


def mended(text: str) -> str:
    """Lone surrogates as U+FFFD, character by character; a pair of them is the character they spell."""
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    return "".join("\ufffd" if 0xD800 <= ord(c) < 0xE000 else c for c in whole)


HOSTILE = [
    "",
    " ",
    "\x00",
    "\x00" * 70,
    "🙂👩‍👩‍👧‍👦🇩🇪",
    "\ud800",
    "a\udfffb",
    "\ud83d\ude00",
    "é" * 999,
    "x" * 200_000,
    "\ufeff",
    " " * 50_000,
    "\n\r\n\t" * 500,
    "\u202e\u200b\u0301",
    "<|reserved_0|>",
    "<|reserved_0|><|reserved_3|>",
    "<|endoftext|>",
    "1234567",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_round_trip_hostile(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == mended(text)
    assert all(
        0 <= token < tokenizer.get_bos_token_id() for token in ids
    )  # no special token by spelling


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=60))
def test_round_trip_anything(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == mended(text)


@pytest.mark.parametrize("unit", [" ", "\t", "a", "1", "!", "\n", " \n", "\u3000", "ab ", "🙂"])
def test_a_million_characters(tokenizer, unit):
    text = unit * (1_000_000 // len(unit))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert sum(tokenizer.token_bytes[ids]) == len(text.encode())


def test_interface(tokenizer):
    bos = tokenizer.get_bos_token_id()
    assert (
        tokenizer.encode("the cat", prepend=bos)
        == tokenizer.encode("the cat", prepend="<|reserved_0|>")
        == [bos, *tokenizer.encode("the cat")]
    )
    assert tokenizer.encode(["a", "b c"], prepend=bos) == [
        [bos, *tokenizer.encode("a")],
        [bos, *tokenizer.encode("b c")],
    ]
    assert tokenizer.encode([]) == []


def test_vocabulary_rule(tokenizer):
    assert tokenizer.get_vocab_size() == 500 and len(tokenizer.ranks) == 496
    assert [tokenizer.encoding.encode_single_token(name) for name in SPECIAL_TOKENS] == [
        496,
        497,
        498,
        499,
    ]
    assert tokenizer.get_bos_token_id() == 496 and tokenizer.decode([496]) == "<|reserved_0|>"
    assert sorted(tokenizer.ranks[:256]) == [bytes([b]) for b in range(256)]
    assert tokenizer.token_bytes.tolist() == [len(token) for token in tokenizer.ranks] + [
        0,
        0,
        0,
        0,
    ]
    assert all(
        tokenizer.encoding.decode_single_token_bytes(i) == token
        for i, token in enumerate(tokenizer.ranks)
    )
    numbers = Tokenizer.train([f"{i} " for i in range(1000, 3000)], 400).ranks
    assert (
        max(len(token) for token in numbers if any(48 <= byte < 58 for byte in token)) == 2
    )  # digits in groups of one or two
    assert Tokenizer.train(["aaa"], 500).get_vocab_size() < 500  # nothing left to merge


def test_training_is_reproducible(tokenizer):
    assert (
        Tokenizer.train(iter(texts()), 500).to_bytes()
        == tokenizer.to_bytes()
        != Tokenizer.train(texts(1, 30), 500).to_bytes()
    )


def test_training_merges_the_most_frequent_pair():
    """Byte-pair encoding by its definition, on one word: count pairs, merge the most frequent, again."""
    text = "aaabdaaabac" * 3 + "abd"
    word, merges = [bytes([b]) for b in text.encode()], []
    for _ in range(3):
        pairs = list(zip(word, word[1:]))
        best = max(set(pairs), key=lambda pair: (pairs.count(pair), [-b for b in b"".join(pair)]))
        merges.append(b"".join(best))
        merged, i = [], 0
        while i < len(word):
            step = 2 if tuple(word[i : i + 2]) == best else 1
            merged.append(b"".join(word[i : i + step]))
            i += step
        word = merged
    assert Tokenizer.train([text], 256 + 3 + 4).ranks[256:] == merges


def test_file_round_trip(tokenizer, tmp_path):
    (tmp_path / "tokenizer.tiktoken").write_bytes(tokenizer.to_bytes())
    again = Tokenizer.from_directory(tmp_path)
    assert again.ranks == tokenizer.ranks and np.array_equal(
        again.token_bytes, tokenizer.token_bytes
    )
    for line, token in zip(
        (tmp_path / "tokenizer.tiktoken").read_text().splitlines(), tokenizer.ranks
    ):
        assert base64.b64decode(line.split()[0]) == token


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.mark.parametrize(
    "place", ["tokenizer.tiktoken", "tokenizer.pkl", "00000.idx", "00000.bin", "manifest.json"]
)
def test_nothing_in_the_cache_runs_code(prepared_copy, tmp_path, place):
    mark, directory = tmp_path / "it ran", prepare.set_dir()
    target = tmp_path / "cache" / place if place == "manifest.json" else directory / place
    target.write_bytes(pickle.dumps(Payload(mark)))
    pickle.loads(target.read_bytes()).close()
    assert mark.exists()  # the payload works; now without it
    mark.unlink()
    read_manifest.cache_clear()
    try:
        next(prepare.make_dataloader(Tokenizer.from_directory(), 2, 64, "train"))
    except Fail as stop:
        assert (
            place != "tokenizer.pkl"
            and str(stop).startswith("FAIL: ")
            and "\n" not in str(stop)
            and "uv run prepare.py" in str(stop)
        )
    else:
        assert place == "tokenizer.pkl"
    assert not mark.exists()


DAMAGE = {
    "gone": None,
    "empty": lambda raw: b"",
    "cut": lambda raw: raw[: len(raw) // 2],
    "bit": lambda raw: raw[:999] + bytes([raw[999] ^ 1]) + raw[1000:],
    "not base64": lambda raw: b"$$$ 0\n" + raw,
    "no rank": lambda raw: raw.replace(b" 7\n", b"\n"),
    "rank": lambda raw: raw.replace(b" 7\n", b" x\n"),
    "order": lambda raw: b"".join(reversed(raw.splitlines(True))),
    "doubled": lambda raw: raw + raw.splitlines()[-1].split()[0] + b" 496\n",
    "byte replaced": lambda raw: base64.b64encode(b"zqzqzq") + raw[raw.index(b" ") :],
    "byte missing": lambda raw: b"".join(raw.split(b"\n", 1)[1:]),
    "binary": lambda raw: bytes(range(256)) * 9,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_gives_one_clear_line(tokenizer, tmp_path, prepared_copy, name):
    raw = tokenizer.to_bytes()
    path = tmp_path / "tokenizer.tiktoken"
    if name != "gone":
        path.write_bytes(DAMAGE[name](raw))
    if name not in ("bit", "cut"):  # those are found by the checksum
        with pytest.raises(Fail) as stop:
            Tokenizer.from_directory(tmp_path)
        assert (
            str(stop.value).startswith("FAIL: ")
            and "\n" not in str(stop.value)
            and "uv run prepare.py" in str(stop.value)
        )
    prepared = prepared_copy.set_dir() / "tokenizer.tiktoken"
    if name == "gone":
        prepared.unlink()
    else:
        prepared.write_bytes(DAMAGE[name](prepared.read_bytes()))
    with pytest.raises(Fail, match="tokenizer.tiktoken is damaged or missing"):
        Tokenizer.from_directory()
