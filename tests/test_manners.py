"""Failures that come at once, as one line that says what to type next."""

import subprocess
import sys

import pytest
from miniature import ROOT, run

import prepare as module
import train
from autoresearch.common import parse_signed, signed
from autoresearch.corpus import text as text_room


@pytest.fixture
def no_model(monkeypatch):
    """Building a model is a failure of the test: what is checked comes before."""

    def build_model(*_):
        pytest.fail("a model was built")

    monkeypatch.setattr(train, "build_model", build_model)


def largest(entries, split: str) -> str:
    return max(entries, key=lambda entry: entry["tokens"][split])["name"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_token_file_is_found_before_a_model_is_built(prepared_copy, no_model, split):
    name = largest(module.manifest()["tokens"], split) + ".bin"
    with open(module.set_dir() / name, "r+b") as file:
        if split == "train":
            file.truncate(100)
        else:  # what is scored is looked at closely
            file.seek(50)
            file.write(b"zz")
    with pytest.raises(module.Fail, match=f"{name} is damaged .*uv run prepare.py"):
        train.main()


def test_a_split_without_a_row_is_found_before_a_model_is_built(
    prepared_copy, no_model, monkeypatch
):
    path = module.cache_dir() / "manifest.json"
    record = parse_signed(path.read_bytes())
    record["eval_rows"]["test"] = 0
    path.write_bytes(signed(record))
    module.read_manifest.cache_clear()
    monkeypatch.setenv("AUTORESEARCH_SPLIT", "test")
    with pytest.raises(module.Fail, match="the test split is smaller than one row of 65 tokens"):
        train.main()


def test_a_step_that_does_not_divide_is_found_before_a_model_is_built(
    prepared, no_model, monkeypatch
):
    monkeypatch.setitem(train.TABLE, "TOKENS_PER_STEP", 1000)
    with pytest.raises(module.Fail, match="TOKENS_PER_STEP 1000 must be .* such as 960 or 1024"):
        train.main()


# ---- options


@pytest.mark.parametrize(
    "arguments, words",
    {
        ("--xyzzy",): "unrecognized arguments: --xyzzy",
        ("--dat", "notes"): "unrecognized arguments: --dat notes",
        ("--demo", "--data", "notes"): "not allowed with",
        ("--num-shards", "ten"): "invalid int value: 'ten'",
        ("--data",): "expected one argument",
    }.items(),
    ids=str,
)
def test_a_mistyped_option_is_one_line(arguments, words):
    with pytest.raises(module.Fail) as failure:
        module.main(list(arguments))
    assert words in str(failure.value) and str(failure.value).endswith("--help` shows all")


# ---- files that cannot be used


@pytest.mark.parametrize("place", ["file/cache", "file"])
def test_a_cache_that_cannot_be(tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / place))
    words = f"the cache {tmp_path / place} cannot be used .*set AUTORESEARCH_CACHE to a folder"
    with pytest.raises(module.Fail, match=words):
        module.main(["--demo"])


def test_text_that_may_not_be_read_is_not_the_caches_fault(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("secret")

    def sha256_of(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(text_room, "sha256_of", sha256_of)
    with pytest.raises(module.Fail, match="a.txt: Permission denied. Make it readable") as stop:
        module.main(["--data", str(tmp_path / "data")])
    assert "AUTORESEARCH_CACHE" not in str(stop.value)


# ---- every failure of train.py is one line


@pytest.mark.parametrize(
    "line, words",
    {
        "import nosuchmodule": "FAIL: ModuleNotFoundError: No module named 'nosuchmodule': no score",
        "DEPTH = WIDTH": "FAIL: NameError: name 'WIDTH' is not defined: no score",
        "sys.exit(0)": "FAIL: train.py ended before run(): no score",
    }.items(),
    ids=str,
)
def test_a_mistake_while_it_is_read(tmp_path, line, words):
    """Before torch is imported, which takes seconds; later it is the same."""
    source = (ROOT / "train.py").read_text()
    assert source.count("\nimport torch\n") == 1
    (tmp_path / "train.py").write_text(source.replace("\nimport torch\n", f"\n{line}\n"))
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == words and done.stderr.count("FAIL: ") == 1


@pytest.mark.parametrize("option", ["--help", "--time-budget=60", "demo"])
def test_train_takes_no_options(tmp_path, option):
    done = run("train.py", option, cache=tmp_path, timeout=10)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("FAIL: train.py takes no options")


def failure(capsys) -> str:
    """What train.run() says last, as it fails."""
    assert train.run() == 1
    printed = capsys.readouterr()
    lines = (printed.out + printed.err).strip().splitlines()
    assert sum(line.startswith("FAIL: ") for line in lines) == 1
    return lines[-1]


@pytest.mark.parametrize("code", [0, None, 3, "goodbye"])
def test_an_exit_without_a_score(monkeypatch, capsys, code):
    monkeypatch.setattr(train, "main", lambda: sys.exit(code))
    assert failure(capsys) == (
        f"FAIL: exit({code!r}) was called before the end of main(): no score"
    )


def test_an_end_without_a_score(monkeypatch, capsys):
    monkeypatch.setattr(train, "main", lambda: None)
    assert failure(capsys) == "FAIL: main() returned without a score"


def test_a_model_that_does_not_fit_while_it_is_built(prepared_copy, monkeypatch, capsys):
    monkeypatch.setitem(train.TABLE, "N_EMBD", 2**40)
    monkeypatch.setitem(train.TABLE, "N_LAYER", 1)
    words = "FAIL: out of memory building the model: lower N_EMBD or N_LAYER"
    assert failure(capsys) == words


def test_a_step_longer_than_the_budget_is_said_before_training(prepared_copy, monkeypatch, capsys):
    for name, value in dict(N_EMBD=64, N_LAYER=1, TOKENS_PER_STEP=512).items():
        monkeypatch.setitem(train.TABLE, name, value)
    monkeypatch.setattr(train.torch, "compile", lambda function, **_: function)
    path = module.cache_dir() / "manifest.json"
    record = {**parse_signed(path.read_bytes()), "time_budget": 1e-5}
    path.write_bytes(signed(record))
    module.read_manifest.cache_clear()
    said = failure(capsys)
    assert said.startswith(
        "FAIL: a step takes 0 s and the budget is 1e-05 s: lower TOKENS_PER_STEP"
    )
    assert [line["event"] for line in module.read_ledger()[0]] == ["end"]
