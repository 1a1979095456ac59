"""Packing against a packer that scans a list, and the loader's thread at work, in failure and at exit."""

import itertools
import os
import random
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from miniature import ROOT, WORDS, run

import prepare as module

CPU = torch.device("cpu")


def brute_force(groups: list[list[list[int]]], row_length, repeat):
    """Yields (row, epoch) by the rule as it is written down, from groups of documents of tokens."""
    batches = []
    for group in groups:
        batches += [group[i : i + 128] for i in range(0, len(group), 128)]
    epochs = itertools.count(1) if repeat else [1]
    stream = ((epoch, batch) for epoch in epochs for batch in batches)
    pool, epoch = [], 1  # in the order they were added: index() takes the earliest on a tie
    while True:
        row = []
        while len(row) < row_length:
            while len(pool) < 1000 and (more := next(stream, None)):
                epoch = more[0]
                pool += more[1]
            if not pool:
                return
            space = row_length - len(row)
            lengths = [len(document) for document in pool]
            fitting = [length for length in lengths if length <= space]
            chosen = max(fitting) if fitting else min(lengths)
            row += pool.pop(lengths.index(chosen))[:space]
        yield row, epoch


@pytest.fixture(scope="module")
def parquet_cache(tmp_path_factory):
    """(cache, tokens of every document by split and row group, encoded here and not by the cache)."""
    base, draw = tmp_path_factory.mktemp("packing"), random.Random(3)
    (base / "data").mkdir()
    texts = {}
    for name, documents, group in (
        ("a", 1500, 301),
        ("b", 700, 128),
        ("val", 600, 100),
        ("test", 90, 1000),
    ):
        flat = []
        for i in range(documents):
            flat.append(f"{name}{i} " + " ".join(draw.choices(WORDS, k=draw.randrange(60))))
        texts[name] = [flat[i : i + group] for i in range(0, documents, group)]
        table = pa.table({"text": flat})
        pq.write_table(table, base / "data" / f"{name}.parquet", row_group_size=group)
    small = ("--seq-len", 32, "--vocab-size", 280, "--eval-tokens", 1 << 20)
    done = run("prepare.py", "--data", base / "data", *small, cache=base / "cache")
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_CACHE", str(base / "cache"))
        tokenizer = module.Tokenizer.from_directory()
        bos = tokenizer.get_bos_token_id()

        def encoded(*names):
            groups = [group for name in names for group in texts[name]]
            return [[tokenizer.encode(text, prepend=bos) for text in group] for group in groups]

        train = encoded("a", "b")
        yield base / "cache", {"train": train, "val": encoded("val"), "test": encoded("test")}


@pytest.fixture
def on_parquet(parquet_cache, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(parquet_cache[0]))
    return parquet_cache[1]


def load(B: int, count: int) -> list[tuple[list[int], int]]:
    """The first `count` rows of the training loader, each with its epoch."""
    loader = module.make_dataloader(module.Tokenizer.from_directory(), B, 32, "train", CPU)
    rows = []
    while len(rows) < count:
        inputs, targets, epoch = next(loader)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape == targets.shape == (B, 32)
        assert (inputs[:, 1:] == targets[:, :-1]).all()
        whole = torch.cat([inputs, targets[:, -1:]], dim=1)
        rows += [(row, epoch) for row in whole.tolist()]
    return rows[:count]


@pytest.mark.parametrize("B", [1, 5, 64])
def test_loader_from_parquet_to_rows(on_parquet, B):
    total = sum(len(document) for group in on_parquet["train"] for document in group)
    rule = brute_force(on_parquet["train"], 33, repeat=True)
    wanted = list(itertools.islice(rule, 2 * total // 33))
    found = load(B, len(wanted))
    assert [row for row, _ in found] == [row for row, _ in wanted]
    if B == 1:
        assert found == wanted and found[-1][1] >= 2
    assert {epoch for _, epoch in found} == {epoch for _, epoch in wanted}
    assert len({row[0] for row, _ in found}) == 1  # BOS


@pytest.mark.parametrize("split", ["val", "test"])
def test_held_out_splits_are_one_pass(on_parquet, split):
    wanted = [row for row, _ in brute_force(on_parquet[split], 33, repeat=False)]
    assert module.scored_rows(split).tolist() == wanted


def test_batches_are_not_overwritten(on_parquet):
    loader = module.make_dataloader(module.Tokenizer.from_directory(), 4, 32, "train", CPU)
    batches = [next(loader) for _ in range(40)]
    copies = [inputs.clone() for inputs, _, _ in batches]
    for _ in range(100):
        next(loader)
    assert all((batch[0] == copy).all() for batch, copy in zip(batches, copies))


def test_the_next_is_made_while_the_one_before_is_used():
    made = [threading.Event() for _ in range(3)]

    def batches():
        for number, event in enumerate(made):
            event.set()
            yield number

    ahead = module.prefetch(batches())
    assert made[0].wait(10)  # before anybody asks
    assert next(ahead) == 0
    assert made[1].wait(10)
    assert list(ahead) == [1, 2]


def test_an_id_beyond_the_vocabulary_is_found(parquet_cache, tmp_path, monkeypatch):
    """One id in one place of the training tokens, which no checksum verifies."""
    shutil.copytree(parquet_cache[0], tmp_path / "cache")
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    with open(module.set_dir() / "00000.bin", "r+b") as file:
        file.seek(2)
        file.write(module.manifest()["vocab_size"].to_bytes(2, "little"))
    with pytest.raises(module.Fail, match="damaged: .*prepare.py ...` with --force"):
        load(8, 2000)


def test_another_vocabulary_is_refused(prepared_copy):
    other = SimpleNamespace(get_vocab_size=lambda: 5)
    with pytest.raises(module.Fail, match="a vocabulary of 5: the prepared set has 300"):
        module.make_dataloader(other, 2, 64, "train")


ALIVE = """
import prepare, torch
tokenizer = prepare.Tokenizer.from_directory()
def loader(B):
    return prepare.make_dataloader(tokenizer, B, 32, "train", torch.device("cpu"))
loaders = [loader(4), loader(20_000)]
next(loaders[0]), next(loaders[0])
print("alive", flush=True)
def f(held):
    next(held)
    raise RuntimeError("as it should")
f(loaders[0])
"""


def test_no_hang_at_the_end_of_the_process(parquet_cache):
    """Two loaders alive, one of them in the middle of a large batch and in a traceback."""
    own = {"AUTORESEARCH_CACHE": str(parquet_cache[0]), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", ALIVE],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "alive\n" and "as it should" in done.stderr, done.stderr
    assert done.returncode == 1
