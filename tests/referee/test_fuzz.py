"""Damaged caches: the right answer or one clear line, never another exception, nothing runs."""

import os
import pickle
import random

import torch
from miniature import draw_a_batch

from autoresearch.referee.manifest import read_manifest

CASES = 10  # of each file


class Bomb:
    def __reduce__(self):
        return (os._exit, (99,))  # were it ever unpickled, the tests would end here


PLANTS = [
    pickle.dumps(Bomb()),
    b"[" * 3000,
    b"null",
    b"\x00" * 64,
    b"\xff\xfe\xfd",
    b"9" * 5000,
    b"\n",
]


def damaged(data: bytes, draw: random.Random) -> bytes:
    """The bytes with a flip, a cut, a piece lost or doubled, or something hostile in them."""
    at = draw.randrange(len(data))
    flipped = bytes([data[at] ^ 1 << draw.randrange(8)])
    return draw.choice(
        [
            data[:at] + flipped + data[at + 1 :],
            data[:at],
            data[:at] + data[at + draw.randrange(1, 40) :],
            data[:at] + draw.choice(PLANTS) + data[at:],
            draw.choice(PLANTS),
            data[:at] + data[max(0, at - 20) :],
        ]
    )


def damages(path, seed: int, count: int = CASES):
    """Writes the damaged file again and again; last it is whole again."""
    whole = path.read_bytes()
    draw = random.Random(seed)
    for number in range(count):
        path.write_bytes(damaged(whole, draw))
        yield number
    path.write_bytes(whole)


def is_clear(stop) -> bool:
    text = str(stop)
    return text.startswith("FAIL: ") and "\n" not in text and "prepare.py" in text


def test_a_score_on_a_damaged_cache_is_the_right_one_or_none(prepared_copy):
    prepare = prepared_copy
    model = torch.nn.Embedding(300, 300)  # a bigram model

    def score() -> float:
        prepare.clock.__init__()
        draw_a_batch(prepare)
        return prepare.evaluate_bpb(model, prepare.Tokenizer.from_directory(), 8)

    right = score()
    files = sorted(path for path in prepare.set_dir().rglob("*") if path.is_file())
    for path in [prepare.cache_dir() / "manifest.json", *files]:
        for _ in damages(path, seed=6):
            read_manifest.cache_clear()
            try:
                assert score() == right
            except prepare.Fail as stop:
                assert is_clear(stop)
        read_manifest.cache_clear()
    assert score() == right
