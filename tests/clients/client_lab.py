"""A fresh clone with a fresh home for one of the real clients, which `night.py agent` starts there."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lab import Lab
from miniature import ROOT
from scripted_model import ScriptedModel

PACKAGES = {"claude": "@anthropic-ai/claude-code", "codex": "@openai/codex"}
SHORT_PAUSES = (
    "import sys; sys.path.insert(0, '.'); import night; from autoresearch.night import agent; "
    "agent.FIRST_PAUSE = 0.2; night.main(sys.argv[1:])"
)


class ClientLab(Lab):
    """The clone; `model` answers the client. Nothing beyond loopback can be reached through it."""

    @classmethod
    def cloned(cls, folder: Path, client: str):
        """Skips where the client or uv is missing, or the client's sandbox does not work here."""
        own = os.environ.get("AUTORESEARCH_CLIENTS", "")
        path = f"{own}/node_modules/.bin:{os.environ['PATH']}"
        if not shutil.which(client, path=path):
            npm = f"npm install --prefix DIR {PACKAGES[client]}"
            pytest.skip(f"{client} is missing: {npm}, AUTORESEARCH_CLIENTS=DIR")
        if not shutil.which("uv", path=path):
            pytest.skip("uv is not on PATH")
        made = Lab.made(folder / "made")
        for name in (".claude", ".codex"):
            shutil.copytree(ROOT / name, made.root / name)
        shutil.copy(ROOT / "pyproject.toml", made.root)
        made.git("add", "-A")
        made.git("commit", "-qm", "with the settings of the clients")
        lab = cls(folder)
        subprocess.run(["git", "clone", "-q", made.root, lab.root], check=True)
        shutil.copytree(made.cache, lab.cache)
        lab.home = folder / "home"
        lab.home.mkdir()
        (folder / "tmp").mkdir()  # Codex writes none of its helpers below the temporary folder
        node = os.path.dirname(shutil.which("node", path=path))
        uv = os.path.dirname(shutil.which("uv", path=path))
        bins = [f"{own}/node_modules/.bin", os.path.dirname(shutil.which(client, path=path))]
        lab.env = {
            "PATH": ":".join(
                [os.path.dirname(sys.executable), uv, *bins, node, "/usr/bin", "/bin"]
            ),
            **{"HOME": str(lab.home), "TMPDIR": str(folder / "tmp"), "LANG": "C.UTF-8"},
            **{"AUTORESEARCH_CACHE": str(lab.cache), "CUDA_VISIBLE_DEVICES": ""},
            **{"UV_OFFLINE": "1", "UV_NO_SYNC": "1", "UV_PROJECT_ENVIRONMENT": sys.prefix},
            **{
                "HTTPS_PROXY": "http://127.0.0.1:9",
                "NO_PROXY": "127.0.0.1",
            },  # nothing else answers
        }
        return lab

    def run(self, client: str, *words, until=None) -> str:
        """`night.py agent CLIENT WORDS`: what it printed. until: a condition, then Ctrl-C."""
        process = subprocess.Popen(
            [sys.executable, "-c", SHORT_PAUSES, "agent", client, *map(str, words)],
            cwd=self.root,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            if until:
                self.until(lambda: until() or process.poll() is not None, 120)
                process.send_signal(signal.SIGINT)
            return process.communicate(timeout=180)[0]
        finally:
            process.kill()

    def width(self) -> int:
        return int(re.search("^WIDTH = (.*)$", (self.root / "train.py").read_text(), re.M)[1])

    def log(self) -> str:
        return (self.state_dir / "nov21/agent.log").read_text()


def check_night(lab: ClientLab, model: ScriptedModel, said: str):
    """What holds after a night of eight experiments, each a gain."""
    assert "the agent ended: 8 experiments are queued or have ended" in said, said + lab.log()
    lab.until(lambda: len(lab.records()) == 3 + 8)
    lab.until_idle()
    Lab.say(lab)
    lab.check()
    assert [record["status"] for record in lab.records()[3:]] == ["keep"] * 8
    sessions = [line for line in lab.journal() if line["kind"] == "session"]
    assert sum(session["experiments"] for session in sessions) == 8
    assert len(sessions) == len(model.answers) > 2
    assert all(session["tokens"] for session in sessions[:-1])  # of one that is ended nobody says
