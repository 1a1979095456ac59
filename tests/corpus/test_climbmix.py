"""Downloads against a real HTTP server on loopback that misbehaves on command."""

import hashlib
import io
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from miniature import ROOT, WORDS, start_forked

from autoresearch.common import Fail, cache_dir
from autoresearch.corpus import climbmix as room
from autoresearch.corpus.climbmix import climbmix

TOKEN = "hf_verysecret"
CONSTANTS = dict(
    TEST_SHARD=3,
    VAL_SHARD=4,
    FIRST_PAUSE=0.01,
    CONNECT_TIMEOUT=2,
    READ_TIMEOUT=1.0,  # a busy machine needs so much
    MAX_TRIES=4,
    SHARD_TOKEN_BYTES=1000,
)
NAMES = [f"shard_{number:05d}.parquet" for number in range(5)]


def shard(number: int, documents: int = 400) -> bytes:
    draw = random.Random(number)
    texts = [
        f"{number}-{i} " + " ".join(draw.choices(WORDS, k=draw.randrange(5, 80)))
        for i in range(documents)
    ]
    pq.write_table(
        pa.table({"text": texts}), buffer := io.BytesIO(), row_group_size=150, compression="none"
    )
    return buffer.getvalue()


FILES = {name: shard(number) for number, name in enumerate(NAMES)}


class Handler(BaseHTTPRequestHandler):
    """Serves FILES with ranges and X-Linked-ETag, unless the hub misbehaves.

    That is, unless `server.hub.misbehave(self, nth request of the file)` answers.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub = self.server.hub
        self.name = self.path.rpartition("/")[2]
        self.body, self.start = FILES.get(self.name), 0
        with hub.lock:
            nth = sum(name == self.name for _, name, _, _ in hub.requests)
            hub.requests.append(
                (
                    self.server.server_port,
                    self.name,
                    self.headers.get("Range"),
                    self.headers.get("Authorization"),
                )
            )
        hub.asked.set()
        try:
            if not hub.misbehave(self, nth):
                self.honest()
        except OSError:  # the client has gone
            self.close_connection = True

    def honest(self, **how):
        if self.body is None:
            return self.reply(404, b"")
        if wanted := self.headers.get("Range"):
            self.start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if self.start >= len(self.body):
                return self.reply(416, b"", {"Content-Range": f"bytes */{len(self.body)}"})
            of = f"bytes {self.start}-{len(self.body) - 1}/{len(self.body)}"
            return self.reply(206, self.body[self.start :], {"Content-Range": of}, **how)
        self.reply(200, self.body, **how)

    def reply(
        self,
        status,
        body,
        headers=MappingProxyType({}),
        cut=None,
        reset=False,
        pause=0.0,
        piece=1 << 20,
        hang=0.0,
        length=None,
    ):
        """Sends the body, or its first `cut` bytes, in pieces with pauses, and then hangs up."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        if self.body is not None and "X-Linked-ETag" not in headers:
            self.send_header("X-Linked-ETag", '"' + hashlib.sha256(self.body).hexdigest() + '"')
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        sent = body[: len(body) if cut is None else cut]
        for i in range(0, len(sent), piece):
            self.wfile.write(sent[i : i + piece])
            self.server.hub.sent += len(sent[i : i + piece])
            time.sleep(pause)
        time.sleep(hang)
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if reset or cut is not None:
            self.wfile.flush()
            self.close_connection = True

    def log_message(self, *_):
        pass


class Hub:
    """Two servers, as the hub has: one that is asked, one that it may redirect to."""

    def __init__(self):
        self.misbehave, self.requests, self.sent = lambda request, nth: False, [], 0
        self.lock, self.asked = threading.Lock(), threading.Event()
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        for server in self.servers:
            server.hub, server.daemon_threads = self, True
            server.handle_error = lambda *_: None
            threading.Thread(
                target=server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True
            ).start()
        self.ports = [server.server_port for server in self.servers]
        self.url = f"http://127.0.0.1:{self.ports[0]}"

    def close(self):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def asked_for(self, name: str) -> int:
        return sum(requested == name for _, requested, _, _ in self.requests)


SETTINGS = ("HF_ENDPOINT", "AUTORESEARCH_CACHE", "NO_PROXY")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    for name, value in CONSTANTS.items():
        monkeypatch.setattr(room, name, value)
    hub = Hub()
    (tmp_path / "cache").mkdir()
    for name, value in zip(SETTINGS, (hub.url, str(tmp_path / "cache"), "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    hub.close()
    for thread in threading.enumerate():  # of failed calls: in life they end with the process
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(10)


def shards():
    return cache_dir() / "shards"


def assert_whole(numbers=(0, 1, 3, 4)):
    for number in numbers:
        assert (shards() / NAMES[number]).read_bytes() == FILES[NAMES[number]]
    assert not list(shards().glob("*.part"))


def first(times, act):
    """Misbehaviour of the first `times` replies for shard 0."""
    return lambda request, nth: request.name == NAMES[0] and nth < times and (act(request), True)[1]


def wrong(request):
    request.reply(200, bytes(len(request.body)))


def range_only(act):
    """A first reply cut in the middle; then, as long as a range is asked for, `act`."""

    def misbehave(request, nth):
        if request.name != NAMES[0]:
            return False
        if nth == 0:
            request.honest(cut=len(request.body) // 2)
        elif "Range" in request.headers:
            act(request)
        else:
            return False
        return True

    return misbehave


def from_another_byte(request):
    place = f"bytes 9-{len(request.body) - 1}/{len(request.body)}"
    request.reply(206, request.body[9:], {"Content-Range": place})


RECOVERS = {
    "drops mid-file": first(1, lambda r: r.honest(cut=len(r.body) // 2, reset=True)),
    "drops at once": first(2, lambda r: r.honest(cut=0)),
    "drops again and again, but moves on": first(6, lambda r: r.honest(cut=20_000)),
    "sends too few bytes": first(2, lambda r: r.honest(cut=-7)),
    "sends too many bytes": first(1, lambda r: r.reply(200, r.body + b"more")),
    "sends wrong bytes once": first(1, wrong),
    "sends a page instead": first(1, lambda r: r.reply(200, b"<html>please log in</html>")),
    "ignores a range": range_only(lambda r: r.reply(200, r.body)),
    "ignores a range and drops": range_only(
        lambda r: r.reply(
            200, r.body, cut=len(r.body) // 4 if r.server.hub.asked_for(r.name) < 4 else None
        )
    ),
    "answers 416 to a range": range_only(lambda r: r.reply(416, b"")),
    "answers 416 with another size": range_only(
        lambda r: r.reply(416, b"", {"Content-Range": "bytes */5"})
    ),
    "continues at another byte": range_only(from_another_byte),
    "answers 206 without a place": range_only(lambda r: r.reply(206, r.body[9:])),
    "answers 500 three times": first(3, lambda r: r.reply(500, b"oops")),
    "stalls before the reply": first(1, lambda r: time.sleep(20)),
    "stalls mid-file": first(1, lambda r: r.honest(cut=5000, hang=20)),
    "is slow": first(1, lambda r: r.honest(piece=10_000, pause=0.05)),
}


@pytest.mark.parametrize("name", RECOVERS)
def test_right_bytes_in_spite_of_a_server_that(hub, name):
    hub.misbehave = RECOVERS[name]
    began = time.monotonic()
    sources = climbmix(2)
    assert time.monotonic() - began < 10  # well before a stalled server hangs up
    assert [(source.name, source.split) for source in sources] == [
        (NAMES[0], "train"),
        (NAMES[1], "train"),
        (NAMES[4], "val"),
        (NAMES[3], "test"),
    ]
    assert_whole()
    assert all(hub.asked_for(NAMES[number]) == 1 for number in (1, 3, 4))
    if name == "is slow":
        assert hub.asked_for(NAMES[0]) == 1
    if name == "ignores a range":  # what it sends instead is the whole file
        assert hub.asked_for(NAMES[0]) == 2
    if name == "drops again and again, but moves on":  # what had arrived was not sent again
        whole = sum(len(FILES[NAMES[number]]) for number in (0, 1, 3, 4))
        assert hub.sent < whole + 6 * 20_000 - 3 * (1 << 14)
        assert max(int(range[6:-1]) for _, _, range, _ in hub.requests if range) >= 3 * (1 << 14)
    hub.requests.clear()
    hub.misbehave = lambda request, nth: False
    climbmix(3)  # one more: what is whole is not fetched again
    assert {requested for _, requested, _, _ in hub.requests} == {NAMES[2]}


@pytest.mark.parametrize("wanted", [-1, 3, 99])
def test_all_shards(hub, wanted):
    splits = {NAMES[0]: "train", NAMES[1]: "train", NAMES[2]: "train"}
    splits.update({NAMES[4]: "val", NAMES[3]: "test"})
    sources = climbmix(wanted)
    assert [(source.name, source.split) for source in sources] == list(splits.items())
    assert_whole(range(5))


PAGE = b"\n<!DOCTYPE html><html>" * 99
FAILS = {
    "sends wrong bytes always": (first(99, wrong), "its sha256 is wrong, after 4 tries"),
    "sends a login page always": (
        first(99, lambda r: r.reply(200, PAGE, {"X-Linked-ETag": ""})),
        "no parquet file with a column `text` (a login page?), after 4 tries",
    ),
    "answers 500 always": (first(99, lambda r: r.reply(500, b"")), "answered 500, after 4 tries"),
    "has no such file": (first(99, lambda r: r.reply(404, b"")), "answered 404: check"),
    "wants another token": (first(99, lambda r: r.reply(401, b"")), "check HF_TOKEN"),
    "stalls always": (first(99, lambda r: r.honest(cut=0, hang=20)), "127.0.0.1 broke"),
    "drops always": (first(99, lambda r: r.honest(cut=0)), "127.0.0.1 broke"),
    "ignores a range and drops always": (
        first(99, lambda r: r.reply(200, r.body, cut=r.body and random.randrange(9000))),
        "after 4 tries; what has arrived is kept: run the same command again",
    ),
    "redirects in a circle": (
        first(9999, lambda r: r.reply(302, b"", {"Location": r.path})),
        "TooManyRedirects",
    ),
}


@pytest.mark.parametrize("name", FAILS)
def test_a_clear_word_about_a_server_that(hub, name, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.misbehave, reason = FAILS[name]
    with pytest.raises(Fail) as failure:
        climbmix(2)
    assert NAMES[0] in str(failure.value) and reason in str(failure.value)
    assert "\n" not in str(failure.value) and TOKEN not in str(failure.value)
    assert not (shards() / NAMES[0]).exists()
    if "tries" in reason and "page" in name:
        assert hub.asked_for(NAMES[0]) == 4
    if reason.startswith(("answered 404", "check")):
        assert hub.asked_for(NAMES[0]) == 1
    hub.misbehave = lambda request, nth: False
    time.sleep(0.3)  # threads of the failed call end with the process; here they share it
    kept = {path.name for path in shards().glob("*.parquet")}
    hub.requests.clear()
    climbmix(2)
    assert_whole()
    assert not kept & {requested for _, requested, _, _ in hub.requests}


def test_a_failure_does_not_wait_for_slow_neighbours(hub):
    def misbehave(request, nth):
        if request.name == NAMES[1]:
            request.reply(404, b"")
        else:
            request.honest(piece=25_000, pause=0.7)
        return True

    hub.misbehave = misbehave
    began = time.monotonic()
    with pytest.raises(Fail, match=NAMES[1]):
        climbmix(2)
    assert time.monotonic() - began < 1


def test_a_complete_part_only_lacked_its_name(hub):
    shards().mkdir()
    (shards() / (NAMES[0] + ".part")).write_bytes(FILES[NAMES[0]])
    climbmix(1)
    assert_whole((0, 3, 4))
    asked = {wanted for _, name, wanted, _ in hub.requests if name == NAMES[0]}
    assert asked == {f"bytes={len(FILES[NAMES[0]])}-"}  # for what lies behind its end: nothing


def test_a_complete_part_of_another_file_is_fetched_again(hub):
    shards().mkdir()
    (shards() / (NAMES[0] + ".part")).write_bytes(bytes(len(FILES[NAMES[0]])))
    climbmix(1)
    assert_whole((0, 3, 4))


def test_the_sha256_of_a_redirect_counts(hub):
    """The hub's own reply has it; the store that it redirects to says nothing."""

    def misbehave(request, nth):
        if request.server.server_port == hub.ports[0]:
            location = f"http://127.0.0.1:{hub.ports[1]}{request.path}"
            request.reply(302, b"", {"Location": location})
        else:  # at first another shard, as whole as this one
            first = request.name == NAMES[0] and hub.asked_for(NAMES[0]) == 2
            body = FILES[NAMES[1]] if first else request.body
            request.reply(200, body, {"X-Linked-ETag": ""})
        return True

    hub.misbehave = misbehave
    climbmix(1)
    assert_whole((0, 3, 4))


# ---- how long it tries


@pytest.mark.parametrize(
    "asked, least", [("1", 0.9), ("Sat, 21 Nov 2026 00:00:00 GMT", 0), ("soon", 0)]
)
def test_retry_after(hub, asked, least):
    hub.misbehave = first(1, lambda r: r.reply(429, b"", {"Retry-After": asked}))
    began = time.monotonic()
    climbmix(1)
    assert least < time.monotonic() - began < 5
    assert_whole((0, 3, 4))


def test_the_longest_wait_a_server_may_ask(hub, monkeypatch):
    monkeypatch.setattr(room, "MAX_RETRY_AFTER", 0.05)
    hub.misbehave = first(2, lambda r: r.reply(503, b"", {"Retry-After": "86400"}))
    climbmix(1)
    assert_whole((0, 3, 4))


def test_a_dead_line_gets_a_minute_with_growing_pauses(tmp_path, monkeypatch, capsys):
    """With the real constants, by a sleep that does not sleep."""
    pauses = []
    monkeypatch.setattr(room.time, "sleep", pauses.append)

    def fetch(name, part, progress):
        raise room.DownloadError("silence")

    monkeypatch.setattr(room, "fetch", fetch)
    with pytest.raises(Fail, match="a: silence, after 6 tries"):
        room.download(tmp_path / "a", room.Progress("downloaded", 1))
    assert len(pauses) == 5 and 25 < sum(pauses) < 70
    assert all(2 <= later / before <= 8 for before, later in zip(pauses, pauses[2:]))
    assert capsys.readouterr().err.count("a: silence; trying again in ") == 5


def unused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("reason", ["Connection refused", "Name or service not known"])
def test_nobody_there_ends_at_once(hub, monkeypatch, capsys, reason):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused_port()}")
    host = "127.0.0.1"
    if "Name" in reason:
        host = "no.such.host"
        monkeypatch.setenv("HF_ENDPOINT", f"http://{host}")

        def getaddrinfo(*_, **__):
            raise socket.gaierror(socket.EAI_NONAME, reason)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    words = rf"shard_0000.*{host} cannot be reached \({reason}\).*HF_ENDPOINT.*--demo"
    with pytest.raises(Fail, match=words):
        climbmix(2)
    assert not capsys.readouterr().err  # no try is announced


def test_a_host_that_was_there_is_tried_again(hub, monkeypatch, tmp_path):
    """A router that starts again refuses connections for a while."""
    progress = room.Progress("downloaded", 1)
    progress.add(1)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused_port()}")
    with pytest.raises(Fail, match="cannot be reached.* after 4 tries; what has arrived is kept"):
        room.download(tmp_path / "shard", progress)


# ---- what a person sees


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_one_line_is_rewritten(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    progress = room.Progress("downloaded", 2)
    for name in ("a", "b"):
        progress.drawn -= 1  # it is drawn five times a second at most
        progress.add(3_000_000)
        progress.drawn -= 1
        progress.finish(name)
    lines = screen.getvalue().split("\r\033[K")
    assert [line.partition(" at ")[0] for line in lines[1:4]] == [
        "downloaded 0/2, 3 MB",
        "downloaded 1/2, 3 MB",
        "downloaded 1/2, 6 MB",
    ]
    assert "left" not in lines[1] and "s left" in lines[2]
    assert lines[4].startswith("downloaded b (2/2, ") and screen.getvalue().count("\n") == 1


def test_in_a_file_each_download_is_a_line(hub, capsys):
    climbmix(2)
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.split()[1] for line in lines) == sorted(NAMES[n] for n in (0, 1, 3, 4))
    assert [line.split()[2] for line in lines] == [f"({n}/4," for n in (1, 2, 3, 4)]


# ---- disk and settings


def test_space_is_looked_at_before_the_first_byte(hub, monkeypatch):
    size = max(len(FILES[name]) for name in NAMES)
    monkeypatch.setattr(room, "SHARD_TOKEN_BYTES", 125_000_000)
    usage = shutil.disk_usage(cache_dir())
    room_for_three = usage._replace(free=3 * (size + 125_000_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room_for_three)
    with pytest.raises(Fail, match="4 shards of .* need 0.5 GB, and 0.4 GB are free"):
        climbmix(2)
    assert not sum(path.stat().st_size for path in shards().iterdir())
    climbmix(1)


def test_what_has_arrived_needs_no_more_space(hub, monkeypatch):
    usage = shutil.disk_usage(cache_dir())
    total = sum(len(FILES[NAMES[number]]) for number in (0, 3, 4))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=total))
    shards().mkdir()
    (shards() / (NAMES[0] + ".part")).write_bytes(FILES[NAMES[0]][:20_000])
    climbmix(1)
    assert_whole((0, 3, 4))


@pytest.mark.parametrize(
    "setting",
    [
        dict(HF_ENDPOINT="localhost:80"),
        dict(HF_ENDPOINT="http://[::1"),
        dict(HF_TOKEN="hf_verysecret\nü€"),
    ],
)
def test_settings_that_cannot_work_fail_at_once(hub, monkeypatch, setting):
    monkeypatch.setattr(room, "FIRST_PAUSE", 60)
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Fail, match="HF_ENDPOINT") as failure:
        climbmix(1)
    assert TOKEN not in str(failure.value) and not hub.requests


# ---- as a user types it

CALL = """
import sys, prepare
from autoresearch.corpus import climbmix
vars(climbmix).update({constants!r})
prepare.main(sys.argv[1:])
"""


def as_typed(*arguments, cache, **environment) -> subprocess.CompletedProcess:
    """prepare.py's command line in a process of its own, with short pauses."""
    return subprocess.run(
        [sys.executable, "-c", CALL.format(constants=CONSTANTS), *arguments],
        cwd=ROOT,
        env={**os.environ, "AUTORESEARCH_CACHE": str(cache), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_token_goes_to_its_host_only(hub, tmp_path):
    def redirect(request, nth):
        if request.server.server_port == hub.ports[0]:
            location = f"http://127.0.0.1:{hub.ports[1]}{request.path}?signature=alsosecret"
            request.reply(302, b"", {"Location": location})
            return True
        request.name = request.name.partition("?")[0]
        request.body = FILES[request.name]
        broken = request.name == NAMES[0] and "Range" not in request.headers
        request.honest(cut=20_000 if broken else None)
        return True

    hub.misbehave = redirect
    small = ["--num-shards", "2", "--seq-len", "64", "--vocab-size", "300", "--eval-tokens", "1024"]
    done = as_typed(*small, cache=tmp_path / "cache", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert_whole()
    for port, expected in zip(hub.ports, (f"Bearer {TOKEN}", None)):
        assert {sent for asked, _, _, sent in hub.requests if asked == port} == {expected}
    prepared = json.loads((tmp_path / "cache" / "manifest.json").read_bytes())
    assert [(entry["name"], entry["sha256"]) for entry in prepared["files"]] == [
        (NAMES[number], hashlib.sha256(FILES[NAMES[number]]).hexdigest()) for number in (0, 1, 4, 3)
    ]
    assert [
        [split for split, count in entry["tokens"].items() if count] for entry in prepared["tokens"]
    ] == [["train"], ["train"], ["val"], ["test"]]
    assert [range for _, name, range, _ in hub.requests if name == NAMES[0] and range]
    hub.requests.clear()
    again = as_typed(*small, cache=tmp_path / "cache", HF_TOKEN=TOKEN)
    assert again.returncode == 0 and "nothing to do" in again.stdout and not hub.requests
    hub.misbehave = lambda r, nth: (r.reply(401, TOKEN.encode()), True)[1]
    refused = as_typed("--num-shards", "3", "--force", cache=tmp_path / "cache", HF_TOKEN=TOKEN)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("FAIL: shard_00002.parquet: ")
    for run in (done, again, refused):
        assert TOKEN not in run.stdout + run.stderr and "alsosecret" not in run.stdout + run.stderr


DOWNLOAD = """
from autoresearch.corpus import climbmix
vars(climbmix).update({constants!r})
climbmix.climbmix(3)
"""


def test_killed_fifteen_times(hub, tmp_path):
    """In the middle of its transfers; then nothing is fetched twice, and all of it is right."""
    draw = random.Random(1)
    hub.misbehave = lambda r, nth: (r.honest(piece=700, pause=0.005), True)[1]
    script = tmp_path / "download.py"
    script.write_text(DOWNLOAD.format(constants=CONSTANTS))
    killed = 0
    for _ in range(15):
        hub.asked.clear()
        process = start_forked(script, **{name: os.environ[name] for name in SETTINGS})
        assert hub.asked.wait(20), script.with_suffix(".log").read_text()
        time.sleep(draw.uniform(0, 0.08))
        process.kill()
        process.join()
        killed += process.exitcode == -9
        if process.exitcode == 0:  # all there: take one away, so that there is something to kill
            (shards() / draw.choice(NAMES)).unlink()
    assert killed >= 12
    time.sleep(0.1)
    kept = {path.name for path in shards().glob("*.parquet")}
    for name in kept:
        assert (shards() / name).read_bytes() == FILES[name]
    hub.misbehave = lambda request, nth: False
    hub.requests.clear()
    climbmix(3)
    assert_whole(range(5))
    assert {name for _, name, _, _ in hub.requests} == set(NAMES) - kept
