"""10,000 damaged caches: the right answer or one clear line, never another exception, never a wrong score, nothing runs."""
import contextlib
import io
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch

CASES = 2500  # of each kind of file


class Bomb:
    def __reduce__(self):
        return (os._exit, (99,))  # were it ever unpickled, the tests would end here


PLANTS = [pickle.dumps(Bomb()), b"[" * 3000, b"{}", b"null", b"\x00" * 64, b"\xff\xfe\xfd", b'{"__reduce__": "os.system"}', b"9" * 5000, b"1e999", b"-1", b"\n", b" "]


def damaged(data: bytes, draw: random.Random) -> bytes:
    """The bytes with a flip, a cut, a piece doubled or swapped, or something hostile in them."""
    at, kind = draw.randrange(len(data)), draw.randrange(6)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[at + draw.randrange(1, 40) :]
    if kind == 3:
        return data[:at] + draw.choice(PLANTS) + data[at:]
    if kind == 4:
        return draw.choice(PLANTS)
    return data[:at] + data[max(0, at - 20) :]


class Table(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(300, 300, generator=torch.Generator().manual_seed(0)))

    def forward(self, inputs):
        return self.table[inputs]


@pytest.fixture
def copy(miniature, tmp_path, monkeypatch):
    """The prepare module on a copy of the miniature set that may be broken."""
    import prepare

    shutil.copytree(miniature, tmp_path / "cache")
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    prepare._read_manifest.cache_clear()
    yield prepare
    prepare._read_manifest.cache_clear()


def cases(path, seed):
    """Writes the damaged file again and again; last it is whole again."""
    whole, draw = path.read_bytes(), random.Random(seed)
    with open(path, "r+b", buffering=0) as file:
        for _ in range(CASES):
            data = damaged(whole, draw)
            file.seek(0), file.write(data), file.truncate(len(data))
            yield data == whole
        file.seek(0), file.write(whole), file.truncate(len(whole))


def clear(stop):
    text = str(stop.value if hasattr(stop, "value") else stop)
    return text.startswith("FAIL: ") and "\n" not in text and "prepare.py" in text


def test_manifest(copy):
    right, path = dict(copy.manifest()), copy.cache_dir() / "manifest.json"
    for _ in cases(path, 1):
        copy._read_manifest.cache_clear()
        try:
            assert copy.manifest() == right
        except copy.Stop as stop:
            assert clear(stop)


def test_a_manifest_signed_anew_with_something_missing_or_odd(copy):
    """A checksum that fits is no proof of sense: one line, or nothing that is read was touched."""
    right, path = dict(copy.manifest()), copy.cache_dir() / "manifest.json"
    odd = [None, -1, 0, 1 << 70, 1.5, "", "x", [], [{}], {}, True]
    for name in right:
        for value in ["absent", *odd]:
            record = {**right, name: value}
            if value == "absent":
                del record[name]
            path.write_bytes(copy.signed(record))
            copy._read_manifest.cache_clear()
            try:
                copy.manifest(), copy.set_dir(), copy.fingerprint()
                tokenizer = copy.Tokenizer.from_directory()
                next(copy.make_dataloader(tokenizer, 1, record["seq_len"], "val"), None)
            except copy.Stop as stop:
                assert clear(stop), (name, value)
            except ValueError as error:
                assert name == "vocab_size" and "vocabulary" in str(error)
    rows = {split: 10**6 for split in ("val", "test")}
    path.write_bytes(copy.signed({**right, "eval_rows": rows}))
    copy._read_manifest.cache_clear()
    with pytest.raises(copy.Stop, match="fewer rows than its manifest says"):
        copy.evaluate_bpb(Table(), copy.Tokenizer.from_directory(), 8)


def test_tokenizer(copy):
    right, path = copy.Tokenizer.from_directory().ranks, copy.set_dir() / "tokenizer.tiktoken"
    for _ in cases(path, 2):
        try:
            assert copy.Tokenizer.from_directory().ranks == right
        except copy.Stop as stop:
            assert clear(stop)


def test_tokenizer_without_its_checksum(copy):
    """The parser alone, as while preparing: whatever it accepts is a whole tokenizer."""
    path = copy.set_dir() / "tokenizer.tiktoken"
    for _, _ in zip(range(300), cases(path, 5)):
        try:
            tokenizer = copy.Tokenizer.from_directory(path.parent)
            assert tokenizer.decode(tokenizer.encode("any text \u20ac")) == "any text \u20ac"
        except copy.Stop as stop:
            assert clear(stop)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_token_cache(copy, suffix):
    entry = next(e for e in copy.manifest()["tokens"] if e["tokens"]["val"])
    path = (copy.set_dir() / entry["name"]).with_suffix(suffix)
    right = [array.copy() for array in copy.open_tokens(copy.set_dir(), entry, verify=True)]
    for n, _ in enumerate(cases(path, 3)):
        if n >= CASES // 2:
            continue
        try:
            tokens, index = copy.open_tokens(copy.set_dir(), entry, verify=True)
            assert np.array_equal(tokens, right[0]) and np.array_equal(index, right[1])
        except copy.Stop as stop:
            assert clear(stop)


def test_ledger(copy):
    """A line is as it was written, or it is skipped and counted."""
    path = copy.cache_dir() / "autoresearch.jsonl"
    lines = [{"event": "end", "run": str(n), "time": "2026-01-01T00:00:00Z", "pid": 2**22 + 1, "commit": "a" * 40, "changed": False,
              "split": "val", "seed": 42, "score": n / 7, "training_seconds": 300.0} for n in range(4)]
    path.write_bytes(b"".join(map(copy.signed, lines)))
    for _ in cases(path, 4):
        records, skipped = copy.read_ledger()
        assert all(record in lines for record in records) and skipped >= 0
        with contextlib.redirect_stdout(io.StringIO()) as out:
            copy.show_runs()
        assert out.getvalue().isascii()


def test_a_score_on_a_damaged_cache_is_the_right_one_or_none(copy):
    """Through the evaluation itself, with checksums made to fit where a checksum can be made."""
    model, tokenizer = Table(), copy.Tokenizer.from_directory()
    right, draw = copy.evaluate_bpb(model, tokenizer, 8), random.Random(6)
    for entry in copy.manifest()["tokens"]:
        for path in ((copy.set_dir() / entry["name"]).with_suffix(suffix) for suffix in (".bin", ".idx")):
            whole = path.read_bytes()
            for _ in range(20):
                path.write_bytes(damaged(whole, draw))
                try:
                    assert copy.evaluate_bpb(model, tokenizer, 8) == right
                except copy.Stop as stop:
                    assert clear(stop)
            path.write_bytes(whole)
    assert copy.evaluate_bpb(model, tokenizer, 8) == right
