"""
`night.py new EXAMPLE FOLDER`: a repository from one of examples/, ready for a night.

It gets the example's files, permissions for coding agents that name this night.py, and a first commit.
"""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

from autoresearch.common import ROOT, Fail, git
from autoresearch.night.settings import setting_in
from autoresearch.night.target import read_target

EXAMPLES = ROOT / "examples"
OF_THE_HUMAN = ("stop", "confirm", "agent", "sweep", "new")  # commands that an agent may not type
NOT_COPIED = shutil.ignore_patterns("README.md", "__pycache__", "*.pyc")


def new(example: str, folder: str):
    """Makes the repository and says what to type. Raises Fail where the folder is there already."""
    known = sorted(path.name for path in EXAMPLES.iterdir() if (path / "program.md").is_file())
    if example not in known:
        raise Fail(f"there is no example {example}: take {' or '.join(known)}")
    place = Path(folder).expanduser().absolute()
    if place.exists() or place.is_symlink():
        raise Fail(f"{place} is there already: name a folder that is not")
    command = ["python3", str(ROOT / "night.py")]
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(EXAMPLES / example, place, ignore=NOT_COPIED)
    program = place / "program.md"
    program.write_text(program.read_text().replace("NIGHT", shlex.join(command)))
    target = read_target(setting_in(program.read_text()))
    permit(place, command, target.files)
    git("init", "-q", at=place)
    git("add", "-A", at=place)
    words = ("commit", "-q", "-m", f"the example {example}")
    if git(*words, at=place, check=False) is None:  # git does not know who commits
        git("-c", "user.name=night", "-c", "user.email=night@localhost", *words, at=place)
    print(f"{place}: the example {example}; its settings are in program.md")
    print("next:")
    print(f"  cd {shlex.quote(str(place))}")
    print(
        f"  {shlex.join(command)} agent claude    # or: agent codex; or begin, and play the agent yourself"
    )


def permit(place: Path, command: list[str], files: tuple[str, ...]):
    """What Claude Code and Codex may do there: change the files, call the night's commands."""
    night = shlex.join(command)
    allowed = [*(f"Edit(/{file})" for file in files), f"Bash({night})", f"Bash({night} *)"]
    denied = [f"Bash({night} {word} *)" for word in OF_THE_HUMAN]
    denied += ["Agent", "EnterWorktree", "CronCreate"]
    claude = {"permissions": {"allow": allowed, "deny": denied}}
    rules = [
        "# The night's commands run outside Codex's sandbox: they write git's objects and start runs.",
        f'prefix_rule(pattern = {json.dumps(command)}, decision = "allow")',
        f'prefix_rule(pattern = {json.dumps([*command, [*OF_THE_HUMAN]])}, decision = "forbidden")',
    ]
    for path, text in (
        (".claude/settings.json", json.dumps(claude, indent=2)),
        (".codex/rules/night.rules", "\n".join(rules)),
    ):
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_text(text + "\n")
