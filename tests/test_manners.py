"""Failures that come at once, as one line that says what to type next."""

import pytest

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
