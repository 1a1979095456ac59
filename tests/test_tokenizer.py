"""The tokenizer: round trips on hostile text, the vocabulary rule, files that are data and nothing else."""

import base64
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miniature import WORDS

import prepare
from prepare import SPECIAL_TOKENS, Tokenizer


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
    "\x00" * 70,
    "🙂👩‍👩‍👧‍👦🇩🇪",
    "\ud800",
    "a\udfffb",
    "\ud83d\ude00",
    "é" * 999,
    "x" * 200_000,
    " " * 50_000,
    "\n\r\n\t" * 500,
    "\u202e\u200b\u0301",
    "<|reserved_0|><|reserved_3|>",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_round_trip_hostile(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == mended(text)
    bos = tokenizer.get_bos_token_id()
    assert all(0 <= token < bos for token in ids)  # no special token by spelling


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=60))
def test_round_trip_anything(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == mended(text)


def test_interface(tokenizer):
    bos = tokenizer.get_bos_token_id()
    ids = tokenizer.encode("the cat")
    assert tokenizer.encode("the cat", prepend=bos) == [bos, *ids]
    assert tokenizer.encode("the cat", prepend="<|reserved_0|>") == [bos, *ids]
    assert tokenizer.encode(["the cat", "a"], prepend=bos)[0] == [bos, *ids]
    assert tokenizer.encode([]) == []


def test_vocabulary_rule(tokenizer):
    assert tokenizer.get_vocab_size() == 500 and len(tokenizer.ranks) == 496
    specials = [tokenizer.encoding.encode_single_token(name) for name in SPECIAL_TOKENS]
    assert specials == [496, 497, 498, 499]
    assert tokenizer.get_bos_token_id() == 496 and tokenizer.decode([496]) == "<|reserved_0|>"
    assert sorted(tokenizer.ranks[:256]) == [bytes([b]) for b in range(256)]
    for i, token in enumerate(tokenizer.ranks):
        assert tokenizer.encoding.decode_single_token_bytes(i) == token
        assert tokenizer.token_bytes[i] == len(token)
    assert tokenizer.token_bytes[496:].tolist() == [0] * 4
    assert Tokenizer.train(["aaa"], 500).get_vocab_size() < 500  # nothing left to merge


def test_digits_are_in_groups_of_one_or_two():
    ranks = Tokenizer.train([f"{i} " for i in range(1000, 3000)], 400).ranks
    assert max(len(token) for token in ranks if re.search(rb"\d", token)) == 2


def test_file_round_trip(prepared):
    lines = (prepare.set_dir() / "tokenizer.tiktoken").read_text().splitlines()
    tokenizer = Tokenizer.from_directory()
    assert [base64.b64decode(line.split()[0]) for line in lines] == tokenizer.ranks
    assert [int(line.split()[1]) for line in lines] == list(range(296))
    assert tokenizer.to_bytes().decode().splitlines() == lines
