"""Own text at its edges and bad input, through the command line as a user types it."""

import contextlib
import json
import os
import random
import re
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
from miniature import MINIATURE, ROOT, WORDS, draw_a_batch, run, write_texts

import prepare as module
from autoresearch.common import parse_signed, signed

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


def with_cache(cache, function, *arguments):
    """function(*arguments) in this process, on that cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_CACHE", str(cache))
        return function(*arguments)


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


DAMAGE = {
    "gone": lambda path: path.unlink(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "changed": lambda path: path.write_bytes(path.read_bytes()[:-2] + b"zz"),
}


@pytest.mark.parametrize("name", ["tokenizer.tiktoken", "00001.bin", "00001.idx", ""])
@pytest.mark.parametrize("damage", DAMAGE)
def test_said_again_it_repairs_what_is_damaged(
    prepared_copy, miniature, tmp_path, capsys, name, damage
):
    """Of all files only the damaged source's are made again, and the fingerprint is the same."""
    cache = tmp_path / "cache"
    before = module.fingerprint()
    directory = module.set_dir()
    made = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    if name:
        DAMAGE[damage](directory / name)
    else:
        shutil.rmtree(directory)
    module.main(["--data", str(miniature.parent / "texts"), *MINIATURE])
    printed = capsys.readouterr()
    assert f"{name.partition('.')[0]} is damaged or missing: making it again" in printed.err
    assert module.fingerprint() == before and "nothing to do" not in printed.out
    for path in directory.iterdir():
        assert path.read_bytes() == (miniature / directory.name / path.name).read_bytes()
        if name and path.stem != name.partition(".")[0]:
            assert path.stat().st_mtime_ns == made[path.name]
    module.main(["--data", str(miniature.parent / "texts"), *MINIATURE])
    assert "nothing to do" in capsys.readouterr().out
    assert sorted(path.name for path in cache.iterdir() if path.is_dir()) == [directory.name]


def test_force_that_fails_leaves_what_was_there(prepared_copy, tmp_path):
    """A broken file, too little text, a kill: the set before is whole, and is used."""
    before = {path: path.read_bytes() for path in module.cache_dir().rglob("*") if path.is_file()}
    write_texts(tmp_path / "data", files=30)
    put(tmp_path / "data" / "broken.jsonl", "{")
    put(tmp_path / "small" / "note.txt", "the cat")
    for data, reason in ((tmp_path / "data", "broken.jsonl"), (tmp_path / "small", "are missing")):
        with pytest.raises(module.Fail, match=reason):
            module.main(["--data", str(data), *map(str, SMALL), "--force"])
    for path, content in before.items():
        assert path.name == "lock" or path.read_bytes() == content
    draw_a_batch(prepared_copy)
    prepared_copy.clock.end(score=1.0)
    (tmp_path / "data" / "broken.jsonl").unlink()
    module.main(["--data", str(tmp_path / "data"), *map(str, SMALL), "--force"])
    directories = [path.name for path in module.cache_dir().iterdir() if path.is_dir()]
    assert directories == [module.manifest()["key"]]


def test_force_on_the_same_text_makes_the_same_set_anew(prepared_copy, miniature):
    before = {path: path.stat().st_ino for path in module.set_dir().iterdir()}
    fingerprint = module.fingerprint()
    module.main(["--data", str(miniature.parent / "texts"), *MINIATURE, "--force"])
    assert module.fingerprint() == fingerprint
    assert all(path.stat().st_ino != number for path, number in before.items())
    assert not list(module.cache_dir().glob("*.*d*"))


@pytest.mark.parametrize("done", range(4))
def test_killed_while_the_new_set_takes_the_place_of_the_old(
    prepared_copy, miniature, monkeypatch, done
):
    """After so many of its four steps; the same command then makes it whole."""
    before = module.fingerprint()
    steps = []

    def one_more(step):
        def act(*arguments):
            if len(steps) == done:
                raise InterruptedError
            steps.append(step)
            step(*arguments)

        return act

    with monkeypatch.context() as patch:
        put_in_place = module._put_in_place

        def cut_off(*arguments):
            patch.setattr(os, "rename", one_more(os.rename))
            patch.setattr(module, "write_atomically", one_more(module.write_atomically))
            patch.setattr(shutil, "rmtree", one_more(shutil.rmtree))
            put_in_place(*arguments)

        patch.setattr(module, "_put_in_place", cut_off)
        with pytest.raises(module.Fail):
            module.main(["--data", str(miniature.parent / "texts"), *MINIATURE, "--force"])
    module.main(["--data", str(miniature.parent / "texts"), *MINIATURE])
    assert module.fingerprint() == before
    module.check_prepared("val")


def test_a_source_without_a_document_is_no_damage(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    write_texts(tmp_path / "data", files=30)
    put(tmp_path / "data" / "blank.jsonl", "\n\n")
    for word in ("next: uv run train.py", "nothing to do"):
        module.main(["--data", str(tmp_path / "data"), *map(str, SMALL)])
        assert word in capsys.readouterr().out
    module.check_prepared("val")


@pytest.mark.parametrize("damage", ["format", "cut", "edited", "not JSON", "binary"])
def test_a_manifest_that_cannot_be_read(texts, tmp_path, miniature, damage):
    cache = tmp_path / "cache"
    shutil.copytree(miniature, cache)
    raw = (cache / "manifest.json").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FORMAT", 99)
        record = {**parse_signed(raw), "format": 99}
    (cache / "manifest.json").write_bytes(
        {
            "format": signed(record),
            "cut": raw[:99],
            "edited": raw.replace(b'"seq_len": 64', b'"seq_len": 65'),
            "not JSON": b"[]\n",
            "binary": bytes(range(256)),
        }[damage]
    )
    fails(prepare(texts, cache), "manifest.json", "--force")
    if damage == "format":
        with pytest.raises(module.Fail, match="manifest.json has format 99.*--force"):
            with_cache(cache, module.check_prepared, "val")
        assert prepare(texts, cache, "--force").returncode == 0


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
    "field.jsonl": (
        lambda path: put(path, GOOD * 2 + b"\n" + b'{"content": "a", "n": 1}\n'),
        "line 4 has no `text`, only: content, n",
    ),
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
    with pytest.raises(module.Fail) as stop:
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


def test_a_home_that_the_shell_did_not_expand(tmp_path):
    write_texts(tmp_path / "home" / "notes", files=30)
    assert prepare("~/notes", tmp_path / "cache", HOME=str(tmp_path / "home")).returncode == 0


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
    with pytest.raises(module.Fail, match=arguments[0]):
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
        (tokenizer,) = cache.glob("*.new/tokenizer.tiktoken")
        made = tokenizer.stat().st_mtime_ns
        subprocess.run(["mount", "-o", "remount,size=10m", tmp_path / "disk"], check=True)
        done = prepare(texts, cache)
        assert done.returncode == 0, done.stderr
        (tokenizer,) = cache.glob("*/tokenizer.tiktoken")
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
    wait_for(process, lambda: len(list(cache.glob("*/*.json"))) >= 3)
    process.kill()
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in cache.glob("*/tokenizer.tiktoken")}
    for sign in cache.glob("*/*.json"):
        for path in (sign, sign.with_suffix(".bin"), sign.with_suffix(".idx")):
            kept[path] = path.stat().st_mtime_ns
    assert 10 <= len(kept) < 37 and not (cache / "manifest.json").exists()
    with pytest.raises(module.Fail, match="nothing is prepared .*uv run prepare.py"):
        with_cache(cache, module.check_prepared, "val")
    done = prepare(data, cache, small=LARGER)
    assert done.returncode == 0 and "trained a tokenizer" not in done.stderr
    directory = cache / undisturbed["key"]
    for path, made in kept.items():
        assert (directory / path.name).stat().st_mtime_ns == made
    assert read_manifest(cache) == undisturbed


def test_ctrl_c_at_random_moments(larger, tmp_path):
    data, undisturbed = larger
    cache, draw, interrupted = tmp_path / "cache", random.Random(2), 0
    for moment in (0, 0.05, 0.2, 0.4, draw.uniform(0, 1), draw.uniform(0, 1)):
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
    assert interrupted >= 3
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


def test_a_set_is_not_replaced_while_a_run_reads_it(prepared_copy, tmp_path):
    put(tmp_path / "data" / "note.txt", words(random.Random(6), 20_000))
    command = ["--data", str(tmp_path / "data"), *map(str, SMALL)]
    before = (module.cache_dir() / "manifest.json").read_bytes()
    running = module.shared_lock(module.set_dir()), module.shared_lock(module.set_dir())
    for held in running:
        with pytest.raises(module.Fail, match="a run is using the set in .* wait until it has"):
            module.main([*command, "--force"])
        assert (module.cache_dir() / "manifest.json").read_bytes() == before
        os.close(held)
    module.main([*command, "--force"])
    module.main(command)


def test_what_is_prepared_is_shown_and_what_is_missing(tmp_path):
    write_texts(tmp_path / "data" / "train", files=130)
    put(tmp_path / "data" / "val.md", words(random.Random(0), 500))
    for number in range(7):
        put(tmp_path / "data" / "test" / f"{number}.txt", "zq")
    done = prepare(tmp_path / "data", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    val, test, header, *table = done.stdout.splitlines()[:6]
    assert val == "val is what is named so: val.md"
    names = ", ".join(f"test/{number}.txt" for number in range(4))
    assert test == f"test is what is named so: {names} and 3 more"
    assert header.split() == "split files documents MB tokens rows".split()
    found = documents_in(tmp_path / "cache")
    rows = read_manifest(tmp_path / "cache")["eval_rows"]
    for line, (split, files) in zip(table, dict(train=130, val=1, test=7).items()):
        words_of_line = line.replace(",", "").split()
        assert words_of_line[:3] == [split, str(files), str(len(found[split]))]
        assert float(words_of_line[3]) == round(len("".join(found[split])) / 1e6, 1)
        if split != "train":
            assert int(words_of_line[5]) == rows[split]
    assert re.search("the test split has .* are missing: AUTORESEARCH_SPLIT=test", done.stdout)
    assert "encoded 130 text files (" in done.stderr and "encoded val.md (" in done.stderr


def test_passages_are_a_row_or_a_little_more_and_end_where_a_paragraph_does():
    draw = random.Random(12)
    text = "".join(
        words(draw, 8) + draw.choice(["\n", "\n", "\n", ".\r\n \r\n"]) for _ in range(900)
    )
    text += words(draw, 400)  # no line end at all
    tokenizer = module.Tokenizer.train([text], 400)
    cut = module.cut_to_rows(tokenizer, text, 200)
    assert tokenizer.decode(np.concatenate(cut).tolist()) == text
    assert np.array_equal(np.concatenate(cut), tokenizer.encode_array(text))  # encoded once
    assert all(200 <= len(ids) <= 210 for ids in cut[:-1]) and len(cut[-1]) <= 210
    for ids, following in zip(cut[:-1], cut[1:]):
        further = tokenizer.decode(np.concatenate([ids, following])[200:210].tolist())
        end = tokenizer.decode(ids.tolist())
        if "\r\n \r\n" in further:
            assert end.endswith("\r\n \r\n")
        elif "\n" in further.rstrip("\n"):
            assert end.endswith("\n")


# ---- the demo
