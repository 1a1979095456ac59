"""git in a folder of a test, with an author of its own."""

import subprocess
from pathlib import Path


def git(folder: Path, *words) -> str:
    who = ["-c", "user.name=x", "-c", "user.email=x@localhost", "-c", "commit.gpgsign=false"]
    command = ["git", *who, *words]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def make_repository(folder: Path, branch: str = "main"):
    """With one commit of all that is in the folder."""
    git(folder, "init", "-qb", branch)
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--allow-empty", "-m", "lab")
