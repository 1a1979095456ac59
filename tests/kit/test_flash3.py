"""How FlashAttention 3 is loaded: from the cache, from the hub, offline."""

import json
import os
import socket
import time

import pytest
from forks import Forks

FOLDER = "build/torch-universal"  # a variant for any device and torch


def snapshot(cache, answer: str, version=1, age=0):
    """A stand-in kernel in the layout of kernel-builder, as a download leaves it in the hub's cache."""
    metadata = {
        "name": "flash-attn3",
        "id": f"flash_attn3_{answer}",
        "version": version,
        "license": "MIT",
        "backend": {"type": "cpu"},
        "python-depends": [],
    }
    files = {
        "metadata.json": json.dumps(metadata),
        "__init__.py": "from .interface import flash_attn_func\n",
        "interface.py": "def flash_attn_func(q, k, v, causal, window_size):\n"
        f"    return '{answer}', window_size\n",
    }
    snapshots = cache / "kernels--kernels-community--flash-attn3" / "snapshots"
    folder = snapshots / (str(age) * 40)
    (folder / FOLDER).mkdir(parents=True)
    for name, content in files.items():
        (folder / FOLDER / name).write_text(content)
    os.utime(folder, (1e9 - age, 1e9 - age))
    return folder / FOLDER


IMPORTS = "import torch\nfrom autoresearch.kit import attention\n"
LOAD = """\
torch.cuda.get_device_capability = lambda device: (9, 0)
attention.FlexAttention = lambda *_: lambda q, k, v, window: "flex"
attend = attention.choose(torch.device("cuda"), torch.bfloat16, 64, {64})
print(attend(1, 2, 3, 7))
"""
# A hub that answers.
HUB = """\
import kernels, requests, types
requests.head = lambda url, timeout: types.SimpleNamespace(close=lambda: None)
kernels.get_kernel = lambda name, version: types.SimpleNamespace(
    flash_attn_func=lambda *_, **window: (name, version)
)
"""


@pytest.fixture(scope="module")
def processes():
    forks = Forks(IMPORTS)
    yield forks
    forks.close()


@pytest.fixture
def load(processes, tmp_path):
    def load(endpoint="http://127.0.0.1:9", before="", **environment) -> list[str]:
        """A process chooses its attention, as on a Hopper card: all that it prints."""
        unset = [name for name in os.environ if name.lower().endswith("_proxy")]
        unset += ["KERNELS_CACHE", "HF_HUB_OFFLINE", "HF_HOME"]
        own = {"HF_HUB_CACHE": str(tmp_path), "HF_ENDPOINT": endpoint, **environment}
        ran = processes.run(IMPORTS + before + LOAD, **dict.fromkeys(unset) | own)
        assert ran.code == 0, ran.log
        return [line for line in ran.lines if "No CUDA runtime is found" not in line]

    return load


def test_the_newest_snapshot_of_version_1_is_loaded_without_the_network(load, tmp_path):
    for age, (answer, version) in enumerate([("other", 2), ("newer", 1), ("older", 1)]):
        snapshot(tmp_path, answer, version, age)
    assert load() == ["('newer', (7, 0))"]


@pytest.mark.parametrize("cut_off", [False, True])
def test_what_is_not_there_or_not_whole_is_downloaded(load, tmp_path, cut_off):
    if cut_off:
        (snapshot(tmp_path, "half") / "interface.py").unlink()
    said, chosen = load(before=HUB)
    assert said.startswith("attention: downloading FlashAttention 3 (")
    assert ("interface" in said) == cut_off  # what was wrong with the cached one
    assert chosen == "('kernels-community/flash-attn3', 1)"


def test_offline_and_not_cached(load):
    said, chosen = load(before=HUB, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in said and "not in the local cache" in said
    assert chosen == "flex"


def test_a_silent_hub_costs_a_few_seconds_and_one_line(load):
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        said, chosen = load(f"http://127.0.0.1:{server.getsockname()[1]}")
        assert time.monotonic() - began < 8
    assert said.startswith("attention: flex, because FlashAttention 3 is not usable: ")
    assert chosen == "flex"
