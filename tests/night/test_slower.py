"""What a night that is slower than it could be says, and where its compilers work."""

import pytest

from autoresearch import compiler
from autoresearch.night import slower

FLASH = "FlashAttention 3 is not usable: no network"
BF16 = "model name\t: Xeon 6\nflags\t\t: fpu amx_bf16\n"


# fmt: off
@pytest.mark.parametrize(
    "conditions, says",
    [
        ({}, []),
        ({"compiled": True, "dtype": "float32", "device": "an old one", "fell_back": []}, []),
        ({"compiled": False, "fell_back": ["g++: not found"]},
         ["not compiled (g++: not found): uv run night.py show 1 has the error; then another tag"]),
        ({"compiled": False}, ["not compiled (torch.compile is off): "]),
        ({"compiled": True, "attention": "flex", "fell_back": [FLASH]},
         ["flex attention: FlashAttention 3 is not usable: no network: `uv run train.py` once"]),
        ({"dtype": "bfloat16", "device": "Xeon 6"}, []),
        ({"dtype": "float32", "device": "Xeon 6"}, ["float32, though this device is faster with bf16"]),
        ({"compiled": False, "dtype": "float32", "device": "Xeon 6"}, ["not compiled", "float32"]),
    ],
)
# fmt: on
def test_what_the_baseline_did_without_is_one_line_each(monkeypatch, tmp_path, conditions, says):
    (tmp_path / "cpuinfo").write_text(BF16)
    monkeypatch.setattr(slower, "CPU_INFO", tmp_path / "cpuinfo")
    slower.bf16_is_fast.cache_clear()
    lines = slower.baseline_lines(conditions)
    assert len(lines) == len(says)
    for line, words in zip(lines, says):
        assert line.startswith(f"slower than it could be: {words}")
    slower.bf16_is_fast.cache_clear()


def test_without_a_compiler_begin_and_status_name_the_command(fresh, tmp_path):
    lab = fresh.copy(tmp_path / "it")
    lab.env |= {"CXX": "/no/such", "TORCH_COMPILE_DISABLE": "1"}
    for words in (["begin"], []):
        said = lab.say(*words)
        assert "CXX=/no/such is not there, so no run is compiled: unset CXX\n" in said
        assert "TORCH_COMPILE_DISABLE=1, so no run is compiled: unset TORCH_COMPILE_DISABLE\n" in said
    lab.until_ended(3)


def test_compilers_work_where_no_blank_splits_their_command(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".cache").mkdir()
    assert compiler.place(tmp_path / "night") == tmp_path / "night"
    places = [compiler.place(tmp_path / name) for name in ("my night", "nächte", "my night")]
    assert places[0] == places[2] != places[1]
    assert all(place.parent == tmp_path / ".cache" for place in places)
    (tmp_path / "blank s").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "blank s"))  # then not there
    elsewhere = compiler.place(tmp_path / "my night")
    assert elsewhere.parent.name == "tmp" and " " not in str(elsewhere)
    elsewhere.rmdir()
