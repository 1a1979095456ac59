"""
The repository: commits by git's plumbing, which touch neither the index nor the files of the tree.
"""

from __future__ import annotations

import functools
import hashlib
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from autoresearch import common


@functools.lru_cache(maxsize=16)  # the best's file is asked for again and again
def _file_at(root: Path, commit: str, file: str) -> bytes:
    return common.git_bytes("cat-file", "blob", f"{commit}:{file}", at=root)


@dataclass(frozen=True)
class Repository:
    """The git repository at `root`, in which experiments change `file`, at its top."""

    root: Path
    file: str

    def git(self, *words: str, give: bytes = b"", check: bool = True) -> str | None:
        """git's answer, stripped. Where git fails: Fail; with check=False None."""
        return common.git(*words, at=self.root, give=give, check=check)

    def file_at(self, commit: str) -> bytes:
        """The file as a commit has it. commit: its full id, for names may move."""
        return _file_at(self.root, commit, self.file)

    def is_file_of(self, content: bytes, commits: Iterable[str]) -> bool:
        """Whether the file has this content in any of the commits. Two processes, however many."""
        asked = "".join(f"{commit}:{self.file}\n" for commit in commits).encode()
        known = self.git("cat-file", "--batch-check=%(objectname)", give=asked).split("\n")
        return self.git("hash-object", "--stdin", "--path", self.file, give=content) in known

    def as_committed(self, content: bytes) -> bytes:
        """What git commits of the file's bytes: its filters turn CRLF into LF, for example."""
        blob = self.git("hash-object", "-w", "--stdin", "--path", self.file, give=content)
        return common.git_bytes("cat-file", "blob", blob, at=self.root)

    def check_out(self, commit: str, tree: Path):
        """A worktree of a commit at `tree`, with the file as it is committed, byte for byte."""
        add = ("worktree", "add", "-q", "--force", "--force", "--detach")
        self.git(*common.AS_COMMITTED, *add, str(tree), commit)
        content = self.file_at(commit)
        if (tree / self.file).read_bytes() != content:  # a filter of git's attributes changed it
            (tree / self.file).write_bytes(content)

    def commit_file(self, content: bytes, parent: str, message: str) -> str:
        """A new commit on `parent` in which only the file differs; no branch moves."""
        blob = self.git("hash-object", "-w", "--stdin", give=content)
        lines = common.git_bytes("ls-tree", "-z", parent, at=self.root).split(b"\0")
        for i, line in enumerate(lines):
            mode_and_type, _, name = line.partition(b"\t")
            if name == self.file.encode():
                lines[i] = b" ".join([*mode_and_type.split()[:2], blob.encode()]) + b"\t" + name
        tree = self.git("mktree", "-z", give=b"\0".join(lines))
        words = ["commit-tree", tree, "-p", parent, "-F", "-"]
        commit = self.git(*words, give=message.encode(), check=False)
        if commit is None:  # git does not know who commits
            identity = ["-c", "user.name=night", "-c", "user.email=night@localhost"]
            commit = self.git(*identity, *words, give=message.encode())
        return commit

    def change_id(self, before: str, after: str) -> str:
        """The same 12 digits for the same change, whatever it was made on."""
        options = ("-p", "-U0", "--no-ext-diff", "--no-textconv")
        words = ("diff-tree", *options, before, after, "--", self.file)
        diff = common.git_bytes(*words, at=self.root)
        # Without the hunks' line numbers, but with the function that each of them stands in.
        _, *hunks = re.split(rb"^@@ .*? @@", diff, flags=re.M)
        return hashlib.sha256(b"@@".join(hunks)).hexdigest()[:12]


def merged(ours: bytes, base: bytes, theirs: bytes) -> bytes | None:
    """`ours` with the change from `base` to `theirs`; None where the two conflict.

    git takes changes of neighbouring lines for a conflict, and settings in a table are neighbours.
    So a line that all three share is put between any two lines, and taken out again.
    """
    between = b"\n\x01\n"
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("ours", "base", "theirs")]
        for path, content in zip(paths, (ours, base, theirs)):
            path.write_bytes(content.replace(b"\n", between))
        content = common.git_bytes("merge-file", "-p", *map(str, paths), at=folder, check=False)
    return None if content is None else content.replace(between, b"\n")
