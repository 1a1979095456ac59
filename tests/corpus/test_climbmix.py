"""Downloads against a real HTTP server on loopback that misbehaves on command."""

import hashlib
import io
import os
import random
import shutil
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from miniature import WORDS, start_forked

import prepare
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
    TRIES=4,
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
    """Serves FILES with ranges and X-Linked-ETag, unless `hub.misbehave(self, nth)` answers.

    nth: how often this file has been asked for before.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub = self.server.hub
        self.name = self.path.partition("?")[0].rpartition("/")[2]
        self.body = FILES.get(self.name)
        with hub.lock:
            nth = hub.asked_for(self.name)
            asked = (self.headers.get("Range"), self.headers.get("Authorization"))
            hub.requests.append((self.server.server_port, self.name, *asked))
        hub.asked.set()
        try:
            if not hub.misbehave(self, nth):
                self.honest()
        except OSError:  # the client has gone
            self.close_connection = True

    def honest(self, **how):
        wanted = self.headers.get("Range")
        if not wanted:
            return self.reply(200, self.body, **how)
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(self.body):
            return self.reply(416, b"")
        of = f"bytes {start}-{len(self.body) - 1}/{len(self.body)}"
        self.reply(206, self.body[start:], {"Content-Range": of}, **how)

    def reply(self, status, body, headers=None, cut=None, pause=0.0, piece=1 << 20, hang=0.0):
        """Sends the body in pieces with pauses; or its first `cut` bytes, and then hangs up."""
        self.send_response(status)
        etag = {"X-Linked-ETag": f'"{hashlib.sha256(self.body).hexdigest()}"'}
        for key, value in {"Content-Length": len(body), **etag, **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        sent = body[:cut]
        for i in range(0, len(sent), piece):
            self.wfile.write(sent[i : i + piece])
            time.sleep(pause)
        time.sleep(hang)
        self.wfile.flush()
        self.close_connection = cut is not None

    def log_message(self, *_):
        pass


class Hub:
    """Two servers, as the hub has: one that is asked, one that it may redirect to."""

    def __init__(self):
        self.misbehave = lambda request, nth: False
        self.requests = []  # (port, name, range, authorization)
        self.lock = threading.Lock()
        self.asked = threading.Event()
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        for server in self.servers:
            server.hub = self
            server.daemon_threads = True
            server.handle_error = lambda *_: None
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.ports = [server.server_port for server in self.servers]
        self.url = f"http://127.0.0.1:{self.ports[0]}"

    def close(self):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def asked_for(self, name: str) -> int:
        return sum(requested == name for _, requested, _, _ in self.requests)

    def redirect(self, request, query: str = "") -> bool:
        """From the first server to the second."""
        if request.server.server_port != self.ports[0]:
            return False
        path = request.path.partition("?")[0] + query
        location = f"http://127.0.0.1:{self.ports[1]}{path}"
        request.reply(302, b"", {"Location": location})
        return True


SETTINGS = ("HF_ENDPOINT", "AUTORESEARCH_CACHE", "NO_PROXY")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    for name, value in CONSTANTS.items():
        monkeypatch.setattr(room, name, value)
    before = set(threading.enumerate())
    hub = Hub()
    (tmp_path / "cache").mkdir()
    for name, value in zip(SETTINGS, (hub.url, str(tmp_path / "cache"), "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    hub.close()
    for thread in set(threading.enumerate()) - before:  # of failed calls: else they end with us
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(10)


def shards():
    return cache_dir() / "shards"


def assert_whole(numbers=(0, 1, 3, 4)):
    for number in numbers:
        assert (shards() / NAMES[number]).read_bytes() == FILES[NAMES[number]]
    assert not list(shards().glob("*.part"))


def first(times, act):
    """Misbehaviour in the first `times` replies for shard 0."""

    def misbehave(request, nth):
        if request.name != NAMES[0] or nth >= times:
            return False
        act(request)
        return True

    return misbehave


def wrong(request):
    request.reply(200, bytes(len(request.body)))


def cut_then(act):
    """A first reply cut in the middle; then, as long as a range is asked for, `act`."""

    def answer(request):
        if "Range" in request.headers:
            act(request)
        else:
            cut = len(request.body) // 2 if request.server.hub.asked_for(NAMES[0]) == 1 else None
            request.honest(cut=cut)

    return first(3, answer)


RECOVERS = {
    "drops mid-file": first(2, lambda r: r.honest(cut=20_000)),
    "sends wrong bytes once": first(1, wrong),
    "ignores a range": cut_then(lambda r: r.reply(200, r.body)),
    "answers 416 to a range": cut_then(lambda r: r.reply(416, b"")),
    "continues at another byte": cut_then(
        lambda r: r.reply(206, r.body[9:], {"Content-Range": f"bytes 9-{len(r.body)}/*"})
    ),
    "answers 500 three times": first(3, lambda r: r.reply(500, b"oops")),
    "stalls mid-file": first(1, lambda r: r.honest(cut=20_000, hang=20)),
}


@pytest.mark.parametrize("name", RECOVERS)
def test_right_bytes_in_spite_of_a_server_that(hub, name):
    hub.misbehave = RECOVERS[name]
    began = time.monotonic()
    sources = climbmix(2)
    assert time.monotonic() - began < 10  # well before a stalled server hangs up
    expected = {0: "train", 1: "train", 4: "val", 3: "test"}
    assert [(source.name, source.split) for source in sources] == [
        (NAMES[number], split) for number, split in expected.items()
    ]
    assert_whole()
    assert all(hub.asked_for(NAMES[number]) == 1 for number in (1, 3, 4))
    ranges = [wanted for _, name, wanted, _ in hub.requests if wanted]
    if name == "drops mid-file":  # each goes on where the one before ended, up to a block
        first, second = (int(wanted[6:-1]) for wanted in ranges)
        assert 0 < first < second and second >= 2 * (20_000 - (1 << 14))
    hub.requests.clear()
    hub.misbehave = lambda request, nth: False
    climbmix(3)  # one more: what is complete is not fetched again
    assert {requested for _, requested, _, _ in hub.requests} == {NAMES[2]}


def test_all_shards(hub):
    sources = climbmix(-1)
    expected = {0: "train", 1: "train", 2: "train", 4: "val", 3: "test"}
    assert [(source.name, source.split) for source in sources] == [
        (NAMES[number], split) for number, split in expected.items()
    ]
    assert_whole(range(5))


FAILS = {
    "sends wrong bytes always": (wrong, "its sha256 is wrong, after 4 tries; what has arrived"),
    "sends a login page always": (
        lambda r: r.reply(200, b"<html>" * 99, {"X-Linked-ETag": ""}),
        "no readable parquet file with a column `text`",
    ),
    "answers 500 always": (lambda r: r.reply(500, b""), "answered 500, after 4 tries"),
    "has no such file": (lambda r: r.reply(404, b""), "answered 404: check HF_TOKEN"),
}


@pytest.mark.parametrize("name", FAILS)
def test_a_clear_word_about_a_server_that(hub, name, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    act, reason = FAILS[name]
    hub.misbehave = first(10**6, act)
    with pytest.raises(Fail) as failure:
        climbmix(2)
    assert NAMES[0] in str(failure.value) and reason in str(failure.value)
    assert "\n" not in str(failure.value) and TOKEN not in str(failure.value)
    assert hub.asked_for(NAMES[0]) == (1 if "404" in reason else 4)
    assert not (shards() / NAMES[0]).exists()
    hub.misbehave = lambda request, nth: False
    time.sleep(0.3)  # threads of the failed call end with the process; here they share it
    kept = {path.name for path in shards().glob("*.parquet")}
    hub.requests.clear()
    climbmix(2)
    assert_whole()
    assert not kept & {requested for _, requested, _, _ in hub.requests}


def test_the_sha256_of_a_redirect_counts(hub):
    """The hub's own reply has it; the store that it redirects to says nothing."""

    def misbehave(request, nth):
        if not hub.redirect(request):  # at first another shard, as whole as this one
            is_first = request.name == NAMES[0] and nth == 1
            body = FILES[NAMES[1]] if is_first else request.body
            request.reply(200, body, {"X-Linked-ETag": ""})
        return True

    hub.misbehave = misbehave
    climbmix(1)
    assert_whole((0, 3, 4))


# ---- how long it tries


@pytest.mark.parametrize("asked, paused", {"3": 3, "86400": 300, "soon": 2}.items())
def test_retry_after(hub, monkeypatch, asked, paused):
    pauses = []
    monkeypatch.setattr(room, "FIRST_PAUSE", 2)
    monkeypatch.setattr(room.time, "sleep", lambda seconds: seconds >= 2 and pauses.append(seconds))
    hub.misbehave = first(1, lambda r: r.reply(429, b"", {"Retry-After": asked}))
    climbmix(1)
    assert pauses == [paused]
    assert_whole((0, 3, 4))


def test_a_dead_line_gets_a_minute_with_growing_pauses(tmp_path, monkeypatch, capsys):
    """With the real constants, by a sleep that does not sleep."""
    pauses = []
    monkeypatch.setattr(room.time, "sleep", pauses.append)

    def fetch(name, part, progress):
        raise room.Broken("silence")

    monkeypatch.setattr(room, "fetch", fetch)
    with pytest.raises(Fail, match="a: silence, after 6 tries"):
        room.download(tmp_path / "a", room.Progress("downloaded", 1))
    assert pauses == [2, 4, 8, 16, 32]
    assert capsys.readouterr().err.count("a: silence; trying again in ") == 5


def test_nobody_there_ends_at_once(hub, monkeypatch, capsys):
    hub.close()
    with pytest.raises(Fail, match=r"cannot be reached \(ConnectionError\).*HF_ENDPOINT.*--demo"):
        climbmix(1)
    assert "trying again" not in capsys.readouterr().err


# ---- what a person sees


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_line_is_rewritten(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = room.Progress("downloaded", 2)
    for name in ("a", "b"):
        progress.drawn -= 1  # it is drawn five times a second at most
        progress.add(3_000_000)
        progress.finish(name)
    lines = sys.stderr.getvalue().split("\r\033[K")[1:]
    assert lines[2].startswith("downloaded 1/2, 6 MB at ") and lines[2].endswith("s left")
    assert lines[3].startswith("downloaded b (2/2, ") and lines[3].endswith("\n")


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


# ---- the token, and kills


def test_the_token_goes_to_its_host_only(hub, monkeypatch, capfd):
    def misbehave(request, nth):
        if not hub.redirect(request, "?signature=alsosecret"):
            request.honest(cut=20_000 if nth == 1 else None)
        return True

    hub.misbehave = misbehave
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    small = "--num-shards 2 --seq-len 64 --vocab-size 300 --eval-tokens 1024".split()
    prepare.main(small)
    assert_whole()
    for port, expected in zip(hub.ports, (f"Bearer {TOKEN}", None)):
        assert {sent for asked, _, _, sent in hub.requests if asked == port} == {expected}
    assert any(wanted for _, _, wanted, _ in hub.requests)
    for entry, number in zip(prepare.manifest()["files"], (0, 1, 4, 3)):
        assert entry["name"] == NAMES[number]
        assert entry["sha256"] == hashlib.sha256(FILES[NAMES[number]]).hexdigest()
    hub.requests.clear()
    prepare.main(small)
    assert not hub.requests
    hub.misbehave = lambda request, nth: request.reply(401, TOKEN.encode()) or True
    with pytest.raises(Fail, match="shard_00002.parquet: ") as refused:
        prepare.main(["--num-shards", "3", "--force"])
    said = "".join(capfd.readouterr()) + str(refused.value)
    assert "nothing to do" in said and TOKEN not in said and "alsosecret" not in said


DOWNLOAD = """
from autoresearch.corpus import climbmix
vars(climbmix).update({constants!r})
climbmix.climbmix(3)
"""


def test_killed_eight_times(hub, tmp_path):
    """In the middle of its transfers; then nothing is fetched twice, and all of it is right."""
    draw = random.Random(1)
    hub.misbehave = lambda request, nth: request.honest(piece=700, pause=0.005) or True
    script = tmp_path / "download.py"
    script.write_text(DOWNLOAD.format(constants=CONSTANTS))
    killed = 0
    for _ in range(8):
        hub.asked.clear()
        process = start_forked(script, **{name: os.environ[name] for name in SETTINGS})
        assert hub.asked.wait(20), script.with_suffix(".log").read_text()
        time.sleep(draw.uniform(0, 0.08))
        process.kill()
        process.join()
        killed += process.exitcode == -9
        if process.exitcode == 0:  # all there: take one away, so that there is something to kill
            (shards() / draw.choice(NAMES)).unlink()
    assert killed >= 6
    time.sleep(0.1)
    kept = {path.name for path in shards().glob("*.parquet")}
    for name in kept:
        assert (shards() / name).read_bytes() == FILES[name]
    hub.misbehave = lambda request, nth: False
    hub.requests.clear()
    climbmix(3)
    assert_whole(range(5))
    assert {name for _, name, _, _ in hub.requests} == set(NAMES) - kept
