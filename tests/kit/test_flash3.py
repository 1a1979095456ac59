"""How FlashAttention 3 is loaded: from a hub that misbehaves, from the cache, offline."""

import hashlib
import json
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from forks import Forks

REPOSITORY = "kernels-community/flash-attn3"
FOLDER = "build/torch-universal"  # a variant for any device and torch


def kernel_files(answer: str, version: int = 1) -> dict[str, bytes]:
    """A stand-in kernel in the layout of kernel-builder: {path: content}."""
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
    return {f"{FOLDER}/{name}": text.encode() for name, text in files.items()}


class Hub:
    """A hub with one kernel, as far as huggingface_hub and kernels ask it.

    Its branch v1 resolves to a commit; files and tree listings are served by that commit.
    """

    def __init__(self):
        self.commit = "c" * 40
        self.files = kernel_files("from the hub") | {"README.md": b"not a part of any build\n"}
        self.requests = []  # "METHOD /path"
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                path = self.path.partition("?")[0]
                hub.requests.append(f"{self.command} {path}")
                status, headers, body = hub.answer(path)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": len(body)}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str) -> tuple[int, dict, bytes]:
        api = f"/api/kernels/{REPOSITORY}"
        resolve = f"/kernels/{REPOSITORY}/resolve/{self.commit}/"
        if path == "/":
            return 200, {}, b""
        if path == "/api/organizations/kernels-community/overview":
            organization = {"name": "kernels-community", "trustedKernelPublisher": True}
            return 200, {}, json.dumps(organization).encode()
        if path == f"{api}/refs":
            v1 = {"name": "v1", "ref": "refs/heads/v1", "targetCommit": self.commit}
            return 200, {}, json.dumps({"branches": [v1], "converts": [], "tags": []}).encode()
        if path == f"{api}/tree/{self.commit}/build":
            folder = {"type": "directory", "path": FOLDER, "oid": "d" * 40, "size": 0}
            return 200, {}, json.dumps([folder]).encode()
        if path == f"{api}/tree/{self.commit}":
            listing = []
            for name, content in self.files.items():
                oid = hashlib.sha1(content).hexdigest()
                listing.append({"type": "file", "path": name, "size": len(content), "oid": oid})
            return 200, {}, json.dumps(listing).encode()
        name = path.removeprefix(resolve)
        if path.startswith(resolve) and name in self.files:
            content = self.files[name]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return 200, {"X-Repo-Commit": self.commit, "ETag": etag}, content
        return 404, {"X-Error-Code": "EntryNotFound"}, b""


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


IMPORTS = "import torch\nfrom autoresearch.kit import attention\n"
LOAD = """\
torch.cuda.get_device_capability = lambda device: (9, 0)
attention.FlexAttention = lambda *_: lambda q, k, v, window: "flex"
attend = attention.choose(torch.device("cuda"), torch.bfloat16, 64, {64})
print(attend(1, 2, 3, 7))
"""


@pytest.fixture(scope="module")
def processes():
    forks = Forks(IMPORTS)
    yield forks
    forks.close()


@pytest.fixture
def load(processes):
    def load(cache, endpoint: str, **environment) -> list[str]:
        """A process chooses its attention, as on a Hopper card: all that it prints."""
        unset = [name for name in os.environ if name.lower().endswith("_proxy")]
        unset += ["KERNELS_CACHE", "HF_HUB_OFFLINE", "HF_HOME"]
        own = {"HF_HUB_CACHE": str(cache), "HF_ENDPOINT": endpoint, **environment}
        ran = processes.run(IMPORTS + LOAD, **dict.fromkeys(unset) | own)
        assert ran.code == 0, ran.log
        return [line for line in ran.lines if "No CUDA runtime is found" not in line]

    return load


FROM_THE_HUB = "('from the hub', (7, 0))"


def test_the_kernel_is_downloaded_once_and_never_asked_for_again(hub, load, tmp_path):
    first = load(tmp_path, hub.url)
    assert len(first) == 2 and first[0].startswith("attention: downloading FlashAttention 3 (")
    assert first[1] == FROM_THE_HUB
    assert f"GET /kernels/{REPOSITORY}/resolve/{hub.commit}/{FOLDER}/interface.py" in hub.requests
    assert not any("README" in request for request in hub.requests)

    hub.requests.clear()
    assert load(tmp_path, hub.url) == [FROM_THE_HUB]
    assert hub.requests == []


def test_a_download_that_was_cut_off_is_finished(hub, load, tmp_path):
    load(tmp_path, hub.url)
    (missing,) = tmp_path.glob(f"*/snapshots/*/{FOLDER}/interface.py")
    missing.unlink()
    lines = load(tmp_path, hub.url)
    assert lines[-1] == FROM_THE_HUB
    assert len(lines) == 2 and "interface" in lines[0]  # what was wrong with the cached one
    assert load(tmp_path, hub.url) == [FROM_THE_HUB]


def test_of_several_snapshots_the_newest_of_version_1_is_loaded(load, tmp_path):
    snapshots = tmp_path / "kernels--kernels-community--flash-attn3" / "snapshots"
    for age, (answer, version) in enumerate([("other", 2), ("newer", 1), ("older", 1)]):
        snapshot = snapshots / (str(age) * 40)
        (snapshot / FOLDER).mkdir(parents=True)
        for name, content in kernel_files(answer, version).items():
            (snapshot / name).write_bytes(content)
        os.utime(snapshot, (1e9 - age, 1e9 - age))
    nowhere = "http://127.0.0.1:9"
    assert load(tmp_path, nowhere, HF_HUB_OFFLINE="1") == ["('newer', (7, 0))"]


def test_offline_and_not_cached(hub, load, tmp_path):
    lines = load(tmp_path, hub.url, HF_HUB_OFFLINE="1")
    assert lines[1] == "flex" and len(lines) == 2
    assert "HF_HUB_OFFLINE is set" in lines[0] and "not in the local cache" in lines[0]
    assert hub.requests == []


def test_a_silent_hub_costs_a_few_seconds_and_one_line(load, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        said, chosen = load(tmp_path, f"http://127.0.0.1:{server.getsockname()[1]}")
        assert time.monotonic() - began < 8
    assert said.startswith("attention: flex, because FlashAttention 3 is not usable: ")
    assert chosen == "flex"
