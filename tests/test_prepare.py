"""prepare.py's command line: the same again, another set, by force, interrupted, and bad input."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from miniature import (
    MINIATURE,
    ROOT,
    draw_a_batch,
    put,
    put_jsonl,
    put_parquet,
    run,
    words,
    write_texts,
)

import prepare
from autoresearch.common import Fail, lock, parse_signed, signed
from autoresearch.corpus import cache as cache_room
from autoresearch.corpus import documents
from autoresearch.referee.manifest import read_manifest

SMALL = "--seq-len 32 --vocab-size 280 --eval-tokens 512".split()


def as_typed(data, cache, *arguments) -> subprocess.CompletedProcess:
    return run("prepare.py", "--data", data, *SMALL, *arguments, cache=cache, timeout=100)


def fails(done: subprocess.CompletedProcess, *words: str, code=1):
    """One line that starts with FAIL: on stderr, the last; the code; nothing like a traceback."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code, done.stdout + done.stderr
    assert lines[-1].startswith("FAIL: ") and done.stderr.count("FAIL") == 1, done.stderr
    assert "Traceback" not in done.stderr and "panicked" not in done.stderr
    for word in words:
        assert word in lines[-1], done.stderr


def manifest_in(cache) -> dict:
    return json.loads((cache / "manifest.json").read_bytes())


def sets_in(cache) -> list[str]:
    return [path.name for path in cache.iterdir() if path.is_dir()]


def files_in(cache) -> dict:
    """{path: (content's time, number)} of every file but the lock."""
    return {
        path: (path.stat().st_mtime_ns, path.stat().st_ino)
        for path in cache.rglob("*")
        if path.is_file() and path.name != "lock"
    }


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data") / "texts")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, for prepare.main in this process."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---- the same again, another, by force


def test_same_again_another_and_by_force(texts, tmp_path):
    cache = tmp_path / "cache"
    first = as_typed(texts, cache)
    assert first.returncode == 0
    assert "prepared text" in first.stdout and "next: uv run train.py" in first.stdout
    before = files_in(cache)
    again = as_typed(texts, cache)
    assert again.returncode == 0 and "nothing to do" in again.stdout and not again.stderr
    fails(as_typed(texts, cache, "--seq-len", 64), "AUTORESEARCH_CACHE", "--force")
    fails(run("prepare.py", "--demo", cache=cache), "AUTORESEARCH_CACHE", "--force")
    other = write_texts(tmp_path / "other", seed=1)
    fails(as_typed(other, cache), "AUTORESEARCH_CACHE", "--force")
    assert files_in(cache) == before
    old = manifest_in(cache)
    put(cache / "autoresearch.jsonl", "the ledger\n")
    put(cache / "shards" / "shard_00000.parquet", "a download")
    forced = as_typed(other, cache, "--force")
    assert forced.returncode == 0 and manifest_in(cache)["key"] != old["key"]
    assert (cache / "autoresearch.jsonl").read_text() == "the ledger\n"
    assert (cache / "shards" / "shard_00000.parquet").read_text() == "a download"
    assert sorted(sets_in(cache)) == sorted([manifest_in(cache)["key"], "shards"])


@pytest.mark.parametrize("name", ["tokenizer.tiktoken", "held-out/val.rows", "00000.idx"])
def test_damage_is_named_and_force_makes_the_same_set_anew(prepared_copy, miniature, capsys, name):
    command = ["--data", str(miniature.parent / "texts"), *MINIATURE]
    before = prepare.fingerprint()
    directory = prepare.set_dir()
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[:-2] + b"\1\0")
    damaged = f"{name} is damaged.* with --force"
    with pytest.raises(Fail, match=damaged):
        prepare.main(command)
    if name == "held-out/val.rows":  # also where it was damaged after the run began
        with pytest.raises(Fail, match=damaged):
            prepare.scored_rows("val")
    prepare.main([*command, "--force"])
    assert prepare.fingerprint() == before
    assert (directory / name).read_bytes() == content
    prepare.main(command)
    assert "nothing to do" in capsys.readouterr().out


def test_held_out_text_stands_in_a_folder_of_its_own(prepared_copy, tmp_path):
    """Also of a file whose documents go to all splits. What hides the folder hides all of it."""
    put_jsonl(tmp_path / "data" / "mixed.jsonl", [words(random.Random(i), 40) for i in range(400)])
    prepare.main(["--data", str(tmp_path / "data"), *SMALL, "--force"])
    entries = prepare.manifest()["tokens"]
    assert sorted(entry["name"] for entry in entries) == ["00000", "held-out/00000"]
    for entry in entries:
        held_out = [entry["tokens"]["val"], entry["tokens"]["test"]]
        assert all(held_out) == (not entry["tokens"]["train"]) == (entry["name"] != "00000")
    names = {path.name for path in (prepare.set_dir() / "held-out").iterdir()}
    assert names == {"00000.bin", "00000.idx", "val.rows", "test.rows"}


def test_force_that_fails_leaves_what_was_there(prepared_copy, tmp_path):
    before = files_in(prepare.cache_dir())
    put(tmp_path / "data" / "note.txt", "the cat")
    with pytest.raises(Fail, match="one row needs 33"):
        prepare.main(["--data", str(tmp_path / "data"), *SMALL, "--force"])
    after = files_in(prepare.cache_dir())
    assert {path: after[path] for path in before} == before
    draw_a_batch(prepared_copy)


@pytest.mark.parametrize("done", range(5))
def test_killed_while_the_new_set_takes_the_place_of_the_old(
    prepared_copy, miniature, monkeypatch, done
):
    """After so many steps: the old set or none, never half of one. The command then ends it."""
    command = ["--data", str(miniature.parent / "texts"), *MINIATURE, "--vocab-size", "290"]
    before = prepare.fingerprint()
    steps = []

    def one_more(step):
        def act(*arguments, **options):
            if len(steps) == done:
                raise KeyboardInterrupt
            steps.append(step)
            step(*arguments, **options)

        return act

    def cut_off(*arguments):
        with monkeypatch.context() as patch:
            for room, name in (
                (os, "rename"),
                (Path, "unlink"),
                (shutil, "rmtree"),
                (cache_room, "write_atomically"),
            ):
                patch.setattr(room, name, one_more(getattr(room, name)))
            put_in_place(*arguments)

    put_in_place = prepare.put_in_place
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "put_in_place", cut_off)
        with contextlib.suppress(KeyboardInterrupt):
            prepare.main([*command, "--force"])
    read_manifest.cache_clear()
    if (prepare.cache_dir() / "manifest.json").exists():
        prepare.check_prepared("val")
        prepare.Tokenizer.from_directory()
        assert (prepare.fingerprint() == before) == (done < 2)
    prepare.main([*command, "--force"] if done < 2 else command)
    prepare.check_prepared("val")
    assert prepare.manifest()["vocab_size"] == 290
    assert sets_in(prepare.cache_dir()) == [prepare.manifest()["key"]]


def test_a_set_is_not_replaced_while_a_run_reads_it(prepared_copy, tmp_path):
    put(tmp_path / "data" / "note.txt", words(random.Random(6), 60_000))
    command = ["--data", str(tmp_path / "data"), *SMALL]
    before = (prepare.cache_dir() / "manifest.json").read_bytes()
    locks = [lock(prepare.set_dir(), shared=True, wait=False) for _ in range(2)]
    for held in locks:
        with pytest.raises(Fail, match="a run is using the set in .* wait until it has"):
            prepare.main([*command, "--force"])
        assert (prepare.cache_dir() / "manifest.json").read_bytes() == before
        held.close()
    prepare.main([*command, "--force"])
    prepare.main(command)


@pytest.mark.parametrize("damage, reason", [("older", "of another version"), ("edit", "damaged")])
def test_a_manifest_that_cannot_be_read(prepared_copy, miniature, damage, reason):
    path = prepare.cache_dir() / "manifest.json"
    raw = path.read_bytes()
    contents = {
        "older": signed({**parse_signed(raw), "format": 0}),
        "edit": raw.replace(b'"time_budget": 2', b'"time_budget": 3'),
    }
    path.write_bytes(contents[damage])
    read_manifest.cache_clear()
    command = ["--data", str(miniature.parent / "texts"), *MINIATURE]
    for use in (lambda: prepare.main(command), lambda: prepare.check_prepared("val")):
        with pytest.raises(Fail, match=f"manifest.json is {reason}.* with --force"):
            use()
    prepare.main([*command, "--force"])
    prepare.check_prepared("val")


# ---- what is checked before a run


def test_nothing_prepared_says_what_to_type(cache):
    for use in (lambda: prepare.check_prepared("val"), lambda: prepare.MAX_SEQ_LEN):
        with pytest.raises(Fail, match=r"nothing is prepared in .*`uv run prepare.py --demo`"):
            use()


# ---- what cannot be read


def spoiled_parquet(path):
    column = [random.Random(i).randbytes(250).hex() for i in range(400)]
    pq.write_table(pa.table({"text": column}), path, use_dictionary=False, compression="zstd")
    raw = bytearray(path.read_bytes())
    raw[5000:9000] = bytes(4000)
    path.write_bytes(raw)


GOOD = b'{"text": "the cat sat on a mat"}\n'
PARQUET = "no readable parquet file with a column `text`"
BROKEN = {
    "spoiled.parquet": (spoiled_parquet, PARQUET),
    "line.jsonl": (GOOD * 6 + b'{"text": "the d\n' + GOOD, "line 7"),
    "field.jsonl": (GOOD * 2 + b"\n" + b'{"content": "a"}\n', "line 4: not a JSON object with"),
    "utf16.md": ("a story".encode("utf-16"), "UTF-8"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(cache, tmp_path, name):
    write_texts(tmp_path / "data", files=5)
    content, reason = BROKEN[name]
    path = tmp_path / "data" / name
    put(path, content) if isinstance(content, bytes) else content(path)
    with pytest.raises(Fail) as failure:
        prepare.main(["--data", str(tmp_path / "data"), *SMALL])
    assert name in str(failure.value) and reason in str(failure.value)
    assert not (cache / "manifest.json").exists()


# ---- what is said


def test_a_split_needs_a_row(cache, tmp_path):
    data = tmp_path / "data"
    put(data / "train.txt", words(random.Random(0), 3000))
    put(data / "val.txt", "zq" * 5)  # ten letters that nothing else has, and BOS: 11 tokens
    with pytest.raises(Fail, match="the val split has 11 tokens and one row needs 33. Add text"):
        prepare.main(["--data", str(data), *SMALL])
    put(data / "val.txt", "zq" * 16)  # 32 and BOS: exactly one row
    prepare.main(["--data", str(data), *SMALL])
    assert prepare.manifest()["eval_rows"]["val"] == 1


@pytest.mark.parametrize(
    "arguments, words",
    {
        "--seq-len 8": "--seq-len: 8 is not from 16",
        "--vocab-size 65537": "to 65536",
        "--num-shards ten": "invalid whole number value: 'ten'",
        "--demo --data notes": "not allowed with",
    }.items(),
)
def test_a_mistake_on_the_command_line_is_one_line(cache, arguments, words):
    with pytest.raises(Fail) as failure:
        prepare.main(arguments.split())
    assert words in str(failure.value) and str(failure.value).endswith("--help` shows all")
    assert not cache.exists()


@pytest.mark.parametrize(
    "typed, corpus, settings",
    [
        ("", "climbmix", (2048, 8192, 20_971_520, 300, 10)),
        ("--data notes", "text", (2048, 8192, 20_971_520, 300)),
        ("--demo --vocab-size 999 --force", "demo", (256, 999, 262_144, 300)),
    ],
)
def test_what_is_fixed_for_each_corpus(cache, monkeypatch, typed, corpus, settings):
    asked = []
    monkeypatch.setattr(prepare, "prepare", lambda *arguments: asked.append(arguments))
    prepare.main(typed.split())
    names = ("seq_len", "vocab_size", "eval_tokens", "time_budget", "num_shards")
    data = Path("notes") if corpus == "text" else None
    assert asked == [(corpus, data, dict(zip(names, settings)), "--force" in typed)]


# ---- where it cannot write


def test_a_cache_that_cannot_be(tmp_path, monkeypatch):
    put(tmp_path / "file", "in the way")
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(Fail, match=f"{tmp_path}/file.*AUTORESEARCH_CACHE to another folder"):
        prepare.main(["--demo"])


# ---- interrupted

LARGER = "--seq-len 128 --vocab-size 1000 --eval-tokens 4096".split()


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> tuple[Path, dict]:
    """A folder of eight parquet files, a second or so of work, and its manifest undisturbed."""
    base, draw = tmp_path_factory.mktemp("larger"), random.Random(5)
    letters = "abcdefghijklmnop"
    vocabulary = ["".join(draw.choices(letters, k=draw.randrange(2, 12))) for _ in range(3000)]
    for number in range(8):
        column = [" ".join(draw.choices(vocabulary, k=300)) for _ in range(250)]
        put_parquet(base / "data" / f"{number:02d}.parquet", column)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_CACHE", str(base / "cache"))
        prepare.main(["--data", str(base / "data"), *LARGER])
    return base / "data", manifest_in(base / "cache")


def start(data, cache) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "prepare.py", "--data", data, *LARGER],
        cwd=ROOT,
        env={**os.environ, "AUTORESEARCH_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(process, (cache / "lock").exists)
    return process


def wait_for(process, condition):
    while not condition() and process.poll() is None:
        time.sleep(0.002)


def test_killed_in_the_middle_it_starts_over(larger, cache):
    data, undisturbed = larger
    process = start(data, cache)
    wait_for(process, lambda: len(list(cache.glob("unfinished/*.idx"))) >= 3)
    process.kill()
    process.communicate()
    assert sets_in(cache) == ["unfinished"] and not (cache / "manifest.json").exists()
    with pytest.raises(Fail, match="nothing is prepared .*uv run prepare.py"):
        prepare.check_prepared("val")
    put(cache / "unfinished" / "00009.bin", "of an earlier try")
    prepare.main(["--data", str(data), *LARGER])
    assert manifest_in(cache) == undisturbed and sets_in(cache) == [undisturbed["key"]]
    assert not (cache / undisturbed["key"] / "00009.bin").exists()


def test_ctrl_c(larger, cache):
    data, undisturbed = larger
    process = start(data, cache)
    wait_for(process, lambda: any(cache.glob("unfinished/*.idx")))
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=20)
    done = subprocess.CompletedProcess([], process.returncode, out, error)
    fails(done, "interrupted", "run the same command again", code=130)
    assert not (cache / "manifest.json").exists()
    prepare.main(["--data", str(data), *LARGER])
    assert manifest_in(cache) == undisturbed


def test_a_second_one_waits_for_the_first(larger, cache):
    data, undisturbed = larger
    processes = [start(data, cache) for _ in range(2)]
    ended = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("nothing to do" in out for out, _ in ended) == 1
    assert sum("another prepare.py is working in" in error for _, error in ended) == 1
    assert manifest_in(cache) == undisturbed


# ---- what the tokenizer learns from, and how much is scored


def test_the_tokenizer_learns_from_the_start_of_each_document_and_all_of_a_plain_text(
    tmp_path, monkeypatch
):
    held_out = hashlib.sha256(b"held out").digest()
    long = ["held out", "a" * 25_000, "b" * 10_000, "c" * 9]
    put_jsonl(tmp_path / "long.jsonl", long)
    passages = tuple(documents.passages_of(put(tmp_path / "plain.txt", "d" * 25_000)))
    sources = [
        documents.Source(
            "long.jsonl",
            None,
            tmp_path / "long.jsonl",
            split_of=lambda digest: "val" if digest == held_out else "train",
        ),
        documents.Source("val.jsonl", "val", tmp_path / "long.jsonl"),
        documents.Source("plain.txt", "train", passages=passages),
    ]
    whole = [("a", 10_000), ("b", 10_000), ("c", 9), ("d", 10_000), ("d", 10_000), ("d", 5000)]
    for most, expected in ((10**9, whole), (30_000, [*whole[:3], ("d", 9991)])):
        monkeypatch.setattr(prepare, "TOKENIZER_CHARS", most)
        learned = list(prepare.tokenizer_text(sources))
        assert [(part[0], len(part)) for part in learned] == expected


def test_as_many_rows_are_scored_as_the_evaluation_tokens_fill(prepared):
    """2,048 tokens in rows of 64."""
    manifest = prepared.manifest()
    assert manifest["eval_rows"]["val"] == 32
    assert sum(entry["tokens"]["val"] for entry in manifest["tokens"]) > 40 * 65


def test_of_a_long_plain_text_nearly_all_tokens_are_in_rows(cache, tmp_path):
    """Cut at any other length, a tenth and more would be lost."""
    draw = random.Random(3)
    text = "".join(words(draw, 9) + draw.choice(["\n", ".\n\n"]) for _ in range(20_000))
    put(tmp_path / "data" / "book.txt", text)
    prepare.main(["--data", str(tmp_path / "data"), "--seq-len", "256", "--vocab-size", "300"])
    entries = prepare.manifest()["tokens"]
    tokens = sum(entry["tokens"]["train"] for entry in entries)
    packer = prepare.Packer(prepare.set_dir(), entries, "train", 257, repeat=False)
    rows = packer.fill(np.empty((tokens // 257 + 1, 257), dtype=np.uint16))
    assert 0.97 < rows * 257 / tokens <= 1
    lengths = [np.fromfile(path, dtype=np.int32)[2::3] for path in prepare.set_dir().glob("*.idx")]
    assert min(map(len, lengths)) and (np.concatenate(lengths) == 257).sum() > 99
