"""Own text at its edges and bad input, through the command line as a user types it."""

import contextlib
import hashlib
import json
import os
import random
import resource
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
from conftest import ROOT, WORDS, run, write_texts

import prepare as module

SMALL = ("--seq-len", 32, "--vocab-size", 280, "--eval-tokens", 512)


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def prepare(data, cache, *arguments, small=SMALL, **more):
    return run("prepare.py", "--data", data, *small, *arguments, cache=cache, timeout=100, **more)


def fails(done: subprocess.CompletedProcess, *words: str, code=1):
    """One line starting with FAIL: on stderr, the last; the exit code; nothing like a traceback."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code, done.stdout + done.stderr
    assert lines[-1].startswith("FAIL: ") and sum(line.startswith("FAIL") for line in lines) == 1, (
        done.stderr
    )
    assert "Traceback" not in done.stderr and "panicked" not in done.stderr
    for word in words:
        assert word in lines[-1], done.stderr


def read_manifest(cache) -> dict:
    return json.loads((cache / "manifest.json").read_bytes())


def documents_in(cache) -> dict[str, list[str]]:
    """The prepared documents' texts by split, decoded from the token cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_CACHE", str(cache))
        tokenizer, bos = (
            module.Tokenizer.from_directory(),
            module.Tokenizer.from_directory().get_bos_token_id(),
        )
        found = {"train": [], "val": [], "test": []}
        for entry in module.manifest()["tokens"]:
            path = module.set_dir() / entry["name"]
            tokens = np.fromfile(path.with_suffix(".bin"), dtype=np.uint16)
            index = np.fromfile(path.with_suffix(".idx"), dtype=np.int32).reshape(-1, 3)
            assert (tokens[np.cumsum(index[:, 2]) - index[:, 2]] == bos).all() and (
                tokens == bos
            ).sum() == len(index)
            for document, (split, _, _) in zip(
                np.split(tokens, np.flatnonzero(tokens == bos)[1:]), index
            ):
                found[("train", "val", "test")[split]].append(
                    tokenizer.decode(document[1:].tolist())
                )
    return found


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data") / "texts")


# ---- the same again, another, by force


def test_same_again_another_and_by_force(texts, tmp_path):
    cache = tmp_path / "cache"
    first = prepare(texts, cache)
    assert (
        first.returncode == 0
        and "prepared text" in first.stdout
        and "uv run train.py" in first.stdout
    )
    before = {
        path: (path.stat().st_mtime_ns, path.stat().st_ino)
        for path in cache.rglob("*")
        if path.is_file() and path.name != "lock"
    }
    again = prepare(texts, cache)
    assert again.returncode == 0 and "nothing to do" in again.stdout and not again.stderr
    fails(prepare(texts, cache, "--seq-len", 64), "AUTORESEARCH_CACHE", "--force")
    fails(run("prepare.py", "--demo", cache=cache), "AUTORESEARCH_CACHE", "--force")
    other = write_texts(tmp_path / "other", seed=1)
    fails(prepare(other, cache), "AUTORESEARCH_CACHE", "--force")
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in before}
    old = read_manifest(cache)
    (cache / "autoresearch.jsonl").write_text("the ledger\n")
    forced = prepare(other, cache, "--force")
    assert forced.returncode == 0 and read_manifest(cache)["key"] != old["key"]
    assert (cache / "autoresearch.jsonl").read_text() == "the ledger\n"
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [read_manifest(cache)["key"]]


def test_an_edit_of_any_text_file_makes_another_set(tmp_path, monkeypatch, capsys):
    """Also one that keeps its length: the bundle is described by all the bytes of all its files."""
    data = write_texts(tmp_path / "data", files=60)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    command = ["--data", str(data), *map(str, SMALL)]
    module.main(command)
    assert len(read_manifest(tmp_path / "cache")["files"]) == 1
    for path in sorted(data.iterdir())[::20]:
        text = path.read_text()
        path.write_text(text.swapcase())
        with pytest.raises(module.Stop, match="another prepared set"):
            module.main(command)
        path.write_text(text)
    module.main(command)
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["format", "cut", "edited", "not JSON", "binary"])
def test_a_manifest_that_cannot_be_read(texts, tmp_path, miniature, damage):
    cache = tmp_path / "cache"
    shutil.copytree(miniature, cache)
    raw = (cache / "manifest.json").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FORMAT", 99)
        record = {**module.parse_signed(raw), "format": 99}
    (cache / "manifest.json").write_bytes(
        {
            "format": module.signed(record),
            "cut": raw[:99],
            "edited": raw.replace(b'"seq_len": 64', b'"seq_len": 65'),
            "not JSON": b"[]\n",
            "binary": bytes(range(256)),
        }[damage]
    )
    fails(prepare(texts, cache), "manifest.json", "--force")
    if damage == "format":
        fails(run("train.py", cache=cache), "manifest.json", "--force", "99")
        assert prepare(texts, cache, "--force").returncode == 0


def test_nothing_prepared(tmp_path):
    fails(run("train.py", cache=tmp_path / "cache"), "uv run prepare.py")


# ---- what cannot be read


def parquet(path: Path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def put(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def cut_parquet(path):
    parquet(path, text=[words(random.Random(i), 50) for i in range(500)])
    path.write_bytes(path.read_bytes()[:-200])


def spoiled_parquet(path):
    draw = random.Random(0)
    pq.write_table(
        pa.table({"text": ["".join(draw.choices("abcdefgh", k=500)) for _ in range(400)]}),
        path,
        use_dictionary=False,
        compression="zstd",
    )
    raw = bytearray(path.read_bytes())
    raw[5000:9000] = bytes(4000)
    path.write_bytes(raw)


GOOD = b'{"text": "the cat sat on a mat"}\n'
BROKEN = {
    "cut.parquet": (cut_parquet, "parquet"),
    "spoiled.parquet": (spoiled_parquet, "parquet"),
    "no.parquet": (lambda path: put(path, "PAR1 not really"), "parquet"),
    "column.parquet": (
        lambda path: parquet(path, content=["a"], body=["b"]),
        "no column `text`, only: content, body",
    ),
    "bytes.parquet": (lambda path: parquet(path, text=[b"\xff\xfe\xfd"]), "parquet"),
    "lists.parquet": (lambda path: parquet(path, text=[["a"], ["b"]]), "parquet"),
    "line.jsonl": (lambda path: put(path, GOOD * 6 + b'{"text": "the d\n' + GOOD), "line 7"),
    "field.jsonl": (lambda path: put(path, GOOD * 2 + b"\n" + b'{"content": "a"}\n'), "line 4"),
    "number.jsonl": (lambda path: put(path, b'{"text": 5}\n' + GOOD), "line 1"),
    "list.jsonl": (lambda path: put(path, GOOD + b'["text"]\n'), "line 2"),
    "deep.jsonl": (lambda path: put(path, GOOD + b"[" * 100_000), "line 2"),
    "latin.jsonl": (lambda path: put(path, GOOD + b'{"text": "caf\xe9"}\n'), "line 2"),
    "latin.txt": (lambda path: put(path, b"good\n" * 5000 + b"caf\xe9\n"), "UTF-8"),
    "utf16.md": (lambda path: put(path, "a story".encode("utf-16")), "UTF-8"),
    "val_latin.txt": (lambda path: put(path, b"caf\xe9\n"), "UTF-8"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(tmp_path, monkeypatch, name):
    """In this process, which is faster; the command line is the same."""
    write_texts(tmp_path / "data", files=30)
    make, reason = BROKEN[name]
    make(tmp_path / "data" / name)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(module.Stop) as stop:
        module.main(["--data", str(tmp_path / "data"), *map(str, SMALL)])
    assert str(stop.value).startswith("FAIL: ") and "\n" not in str(stop.value)
    assert name in str(stop.value) and reason in str(stop.value)
    assert not (tmp_path / "cache" / "manifest.json").exists()


@pytest.mark.parametrize("name", ["spoiled.parquet", "line.jsonl", "latin.txt"])
def test_a_broken_file_as_a_user_sees_it(tmp_path, name):
    write_texts(tmp_path / "data", files=60)
    BROKEN[name][0](tmp_path / "data" / name)
    fails(prepare(tmp_path / "data", tmp_path / "cache"), name, BROKEN[name][1])
    (tmp_path / "data" / name).unlink()
    assert prepare(tmp_path / "data", tmp_path / "cache").returncode == 0


def test_no_text(tmp_path):
    fails(prepare(tmp_path / "nowhere", tmp_path / "cache"), "no such directory")
    put(tmp_path / "data" / "picture.png", b"\x89PNG")
    fails(prepare(tmp_path / "data", tmp_path / "cache"), "no *.parquet, *.jsonl, *.txt or *.md")
    put(tmp_path / "data" / "empty.txt", b"")
    fails(prepare(tmp_path / "data", tmp_path / "cache"), "33 are missing")


def test_too_small_says_how_much_is_missing(tmp_path):
    put(tmp_path / "data" / "train.txt", words(random.Random(0), 3000))
    put(
        tmp_path / "data" / "val.txt", "zq" * 5
    )  # ten letters that nothing else has, and BOS: 11 tokens
    fails(
        prepare(tmp_path / "data", tmp_path / "cache"),
        "the val split has 11 tokens",
        "one row needs 33",
        "22 are missing",
    )
    put(tmp_path / "data" / "val.txt", "zq" * 16)  # 32 and BOS: exactly one row
    assert prepare(tmp_path / "data", tmp_path / "cache").returncode == 0
    assert read_manifest(tmp_path / "cache")["eval_rows"]["val"] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("--seq-len", 8),
        ("--vocab-size", 259),
        ("--vocab-size", 1 << 17),
        ("--eval-tokens", 0),
        ("--num-shards", 0),
    ],
)
def test_settings_out_of_range(tmp_path, monkeypatch, arguments):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    with pytest.raises(module.Stop, match=arguments[0]):
        module.main([*map(str, arguments)])


# ---- where it cannot write


@contextlib.contextmanager
def mounted(at: Path, options: str):
    at.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", at], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", at], check=True)


def test_disk_full(texts, tmp_path):
    with mounted(tmp_path / "disk", "size=100k"):
        cache = tmp_path / "disk" / "cache"
        fails(prepare(texts, cache), "No space left", "AUTORESEARCH_CACHE")
        assert not (cache / "manifest.json").exists()
        tokenizer = next(cache.glob("*/tokenizer.tiktoken"))
        made = tokenizer.stat().st_mtime_ns
        subprocess.run(["mount", "-o", "remount,size=10m", tmp_path / "disk"], check=True)
        done = prepare(texts, cache)
        assert done.returncode == 0, done.stderr
        assert tokenizer.stat().st_mtime_ns == made


def test_no_file_may_grow(texts, tmp_path):
    """The same without the right to mount: writing fails when a file reaches 40 kB."""
    env = {**os.environ, "AUTORESEARCH_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "prepare.py", "--data", texts, *map(str, SMALL)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)),
    )
    fails(done, "File too large", "AUTORESEARCH_CACHE")
    assert prepare(texts, tmp_path / "cache").returncode == 0


def test_unwritable_cache(texts, tmp_path):
    put(tmp_path / "file", "in the way")
    fails(prepare(texts, tmp_path / "file" / "cache"), str(tmp_path / "file"), "AUTORESEARCH_CACHE")
    fails(prepare(texts, tmp_path / "file"), str(tmp_path / "file"), "AUTORESEARCH_CACHE")
    with mounted(tmp_path / "disk", "ro"):
        fails(prepare(texts, tmp_path / "disk"), "Read-only", "AUTORESEARCH_CACHE")


# ---- interrupted


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> tuple[Path, dict]:
    """A folder of twelve parquet files, a second or more of work, and its manifest undisturbed."""
    base, draw = tmp_path_factory.mktemp("larger"), random.Random(5)
    vocabulary = [
        "".join(draw.choices("abcdefghijklmnop", k=draw.randrange(2, 12))) for _ in range(3000)
    ]
    for number in range(12):
        parquet(
            base / "data" / f"{number:02d}.parquet",
            text=[" ".join(draw.choices(vocabulary, k=300)) for _ in range(250)],
        )
    done = prepare(base / "data", base / "cache", small=LARGER)
    assert done.returncode == 0, done.stderr
    return base / "data", read_manifest(base / "cache")


LARGER = ("--seq-len", 128, "--vocab-size", 1000, "--eval-tokens", 4096)


def start(data, cache) -> subprocess.Popen:
    env = {**os.environ, "AUTORESEARCH_CACHE": str(cache)}
    process = subprocess.Popen(
        [sys.executable, "prepare.py", "--data", data, *map(str, LARGER)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(
        process,
        lambda: (cache / "lock").exists() and (cache / "lock").read_text() == str(process.pid),
    )
    return process


def wait_for(process, condition):
    while not condition() and process.poll() is None:
        time.sleep(0.002)


def test_killed_in_the_middle(larger, tmp_path):
    data, undisturbed = larger
    cache = tmp_path / "cache"
    process = start(data, cache)
    wait_for(process, lambda: len(list(cache.glob("*/*.idx"))) >= 3)
    process.kill()
    process.wait()
    kept = {
        path: path.stat().st_mtime_ns
        for path in [*cache.glob("*/*.idx"), *cache.glob("*/tokenizer.tiktoken")]
    }
    kept.update(
        {
            path.with_suffix(".bin"): path.with_suffix(".bin").stat().st_mtime_ns
            for path in cache.glob("*/*.idx")
        }
    )
    assert 4 <= len(kept) < 25 and not (cache / "manifest.json").exists()
    fails(run("train.py", cache=cache), "uv run prepare.py")
    done = prepare(data, cache, small=LARGER)
    assert done.returncode == 0 and "trained a tokenizer" not in done.stderr
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert read_manifest(cache) == undisturbed


def test_ctrl_c_at_random_moments(larger, tmp_path):
    data, undisturbed = larger
    cache, draw, interrupted = tmp_path / "cache", random.Random(2), 0
    for moment in (0, 0.05, 0.2, 0.4, *(draw.uniform(0, 1) for _ in range(4))):
        process = start(data, cache)
        time.sleep(moment)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=20)
        if process.returncode == 0:  # it was faster
            shutil.rmtree(cache)
            continue
        fails(
            subprocess.CompletedProcess([], process.returncode, out, error),
            "interrupted",
            "again",
            code=130,
        )
        interrupted += 1
    assert interrupted >= 4
    done = prepare(data, cache, small=LARGER)
    assert done.returncode == 0 and read_manifest(cache) == undisturbed


def test_a_second_one_at_the_same_time(larger, tmp_path):
    data, undisturbed = larger
    process = start(data, tmp_path / "cache")
    process.send_signal(signal.SIGSTOP)  # so that it holds the lock for as long as it takes
    second = prepare(data, tmp_path / "cache", small=LARGER)
    process.send_signal(signal.SIGCONT)
    fails(second, f"process {process.pid}", "AUTORESEARCH_CACHE")
    process.communicate(timeout=60)
    assert process.returncode == 0 and read_manifest(tmp_path / "cache") == undisturbed


# ---- own text at its edges


def share_of(data: bytes) -> str:
    share = int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64
    return "val" if share < 0.05 else "test" if share < 0.1 else "train"


def test_every_document_on_its_side(tmp_path):
    """Two thousand small files in nested folders, empty ones, duplicates across formats, links that loop."""
    draw, data = random.Random(7), tmp_path / "data"
    pieces = [f"{i} {words(draw, 8)}" for i in range(2000)]
    for i, piece in enumerate(pieces):
        put(data / f"{i % 10}" / f"{i % 7}" / "deep" / f"{i}.{'md' if i % 3 else 'txt'}", piece)
    twice = draw.sample(pieces, 600)
    put(
        data / "copies.jsonl",
        "".join(json.dumps({"text": text}) + "\n" for text in ["", *twice[:300]]),
    )
    parquet(data / "copies.parquet", text=["", None, *twice[200:]])
    put(data / "empty.txt", "")
    put(data / "picture.jpeg", b"\xff\xd8")
    put(data / os.fsdecode(b"caf\xe9.txt"), "an odd name")
    (data / "loop").symlink_to(data)
    (data / "self.txt").symlink_to(data / "self.txt")
    (data / "gone.txt").symlink_to(data / "nothing")
    done = prepare(data, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    expected = {"train": [], "val": [], "test": []}
    for piece in [*pieces, *twice[:300], *twice[200:], "an odd name"]:
        expected[share_of(piece.encode())].append(piece)
    assert {split: sorted(found) for split, found in documents_in(tmp_path / "cache").items()} == {
        s: sorted(of) for s, of in expected.items()
    }


@pytest.mark.parametrize("named", [("val",), ("test",), ("val", "test")])
def test_named_files_and_duplicates(tmp_path, named):
    draw = random.Random(8)
    texts = [f"{i} {words(draw, 9)}" for i in range(900)]
    for number, split in enumerate(named):  # both hold documents of the rest, and of each other
        put(
            tmp_path / "data" / "sub" / f"{split}-a.jsonl",
            "".join(
                json.dumps({"text": t}) + "\n" for t in texts[100 * number : 100 * number + 150]
            ),
        )
    put(tmp_path / "data" / "rest.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts))
    assert prepare(tmp_path / "data", tmp_path / "cache").returncode == 0
    found = {split: set(texts) for split, texts in documents_in(tmp_path / "cache").items()}
    assert set().union(*found.values()) == set(texts) and sum(map(len, found.values())) == len(
        texts
    )
    held = {
        split: set(texts[100 * number : 100 * number + 150]) for number, split in enumerate(named)
    }
    for split in held:
        assert found[split] <= held[split] and len(found[split]) >= 100
    if len(named) == 1:
        other = {"val": "test", "test": "val"}[named[0]]
        drawn = {text for text in texts if share_of(text.encode()) == other}
        assert found[named[0]] == held[named[0]] and found[other] == drawn - held[named[0]]


@pytest.mark.parametrize("named", [False, True], ids=["drawn", "named"])
def test_the_tokenizer_learns_nothing_from_what_is_held_out(tmp_path, monkeypatch, named):
    """`zq` stands in no training document, but often in those drawn for another split, or in a file
    named val and copies of its documents elsewhere: no token may know it."""
    draw = random.Random(11)
    foreign = [f"{i} " + "zq" * 40 for i in range(600)]
    if named:
        held_out = foreign[:50]
        put(
            tmp_path / "data" / "val.jsonl",
            "".join(json.dumps({"text": text}) + "\n" for text in held_out),
        )
    else:
        held_out = [text for text in foreign if share_of(text.encode()) != "train"]
    texts = [f"{i} {words(draw, 9)}" for i in range(300)] + held_out
    put(
        tmp_path / "data" / "rest.jsonl",
        "".join(json.dumps({"text": text}) + "\n" for text in texts),
    )
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    module.main(["--data", str(tmp_path / "data"), *map(str, SMALL)])
    learned = module.Tokenizer.from_directory().ranks[256:]
    assert len(learned) == 20
    assert not [token for token in learned if b"z" in token or b"q" in token]


def test_neighbours_in_a_text_file_do_not_stay_neighbours(tmp_path, monkeypatch):
    """Passages go by their sha256, within a window of so many characters."""
    monkeypatch.setattr(module, "BUNDLE_BYTES", 5000)
    draw = random.Random(10)
    story = "".join(f"line {i}: {words(draw, 9)}\n" for i in range(400))
    put(tmp_path / "story.txt", story)
    (source,) = module.text_sources(tmp_path)
    passages = [text for _, _, text in module.read(source, size=100)]
    in_order = sorted(passages, key=story.index)
    assert "".join(in_order) == story
    windows = [[]]
    for passage in in_order:
        windows[-1].append(passage)
        if sum(map(len, windows[-1])) >= 5000:
            windows.append([])
    mixed = []
    for window in windows:
        mixed += sorted(window, key=lambda text: hashlib.sha256(text.encode()).digest())
    assert len(windows) > 3
    assert passages == mixed != in_order


def test_long_documents(tmp_path):
    """A million characters: without a line end, of blanks only, or cut at blank lines."""
    draw, data = random.Random(9), tmp_path / "data"
    ends = [".\n\n", ".\n", ".\n"]  # a blank line after every third
    story = "".join(words(draw, 20) + ends[i % 3] for i in range(8000))
    long = {
        "line.txt": words(draw, 230_000)[:1_000_000],
        "story.md": story,
        "val.txt": words(draw, 2000),
        "test.txt": words(draw, 999),
    }
    for name, text in long.items():
        put(data / name, text)
    parquet(data / "one.parquet", text=["x" * 1_000_000, " " * 1_000_000 + "\n"])
    done = prepare(data, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    found = documents_in(tmp_path / "cache")["train"]
    assert found[:2] == ["x" * 1_000_000, " " * 1_000_000 + "\n"]
    passages = found[2:]
    assert sum(map(len, passages)) == len(story) + len(long["line.txt"]) and len(passages) > 1000
    assert all(text in story or text in long["line.txt"] for text in passages)
    assert max(map(len, passages)) < 1000  # about a row of 33 tokens


def test_own_text_with_a_byte_order_mark_and_surrogates(tmp_path):
    write_texts(tmp_path / "data")
    put(tmp_path / "data" / "val.txt", b"\xef\xbb\xbfthe first " + b"word has no mark " * 20)
    put(tmp_path / "data" / "lone.jsonl", r'{"text": "a\ud800b \ud83d\ude00 ' + "c" * 50 + '"}\n')
    assert prepare(tmp_path / "data", tmp_path / "cache").returncode == 0
    found = documents_in(tmp_path / "cache")
    assert found["val"][0].startswith("the first word")
    assert "a\ufffdb 😀 " + "c" * 50 in found["train"] + found["test"]
