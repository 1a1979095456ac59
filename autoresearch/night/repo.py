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

Contents = dict[str, bytes]  # of each file that experiments change, by its path in the repository


@functools.lru_cache(maxsize=64)  # the best's files are asked for again and again
def _file_at(root: Path, commit: str, file: str) -> bytes | None:
    return common.git_bytes("cat-file", "blob", f"{commit}:{file}", at=root, check=False)


@dataclass(frozen=True)
class Repository:
    """The git repository at `root`, in which experiments change `files`, paths from its top."""

    root: Path
    files: tuple[str, ...]

    def git(self, *words: str, give: bytes = b"", check: bool = True) -> str | None:
        """git's answer, stripped. Where git fails: Fail; with check=False None."""
        return common.git(*words, at=self.root, give=give, check=check)

    def contents_at(self, commit: str) -> Contents:
        """The files as a commit has them. commit: its full id, for names may move.

        Raises Fail where one of them is not in the commit.
        """
        found = {file: _file_at(self.root, commit, file) for file in self.files}
        missing = [file for file, content in found.items() if content is None]
        if missing:
            raise common.Fail(f"{missing[0]} is not in commit {commit[:7]}: git add it, and commit")
        return found

    def in_tree(self) -> Contents:
        """The files as they stand in the working tree, without those that are not there."""
        paths = {file: self.root / file for file in self.files}
        return {file: path.read_bytes() for file, path in paths.items() if path.is_file()}

    def are_of(self, contents: Contents, commits: Iterable[str]) -> bool:
        """Whether the files have these contents in one of the commits. A few processes, however many."""
        commits = [*commits]
        left = set(range(len(commits)))
        for file, content in contents.items():
            asked = "".join(f"{commit}:{file}\n" for commit in commits).encode()
            known = self.git("cat-file", "--batch-check=%(objectname)", give=asked).split("\n")
            own = self.git("hash-object", "--stdin", "--path", file, give=content)
            left &= {i for i, blob in enumerate(known) if blob == own}
        return bool(left)

    def as_committed(self, contents: Contents) -> Contents:
        """What git commits of the files' bytes: its filters turn CRLF into LF, for example."""
        found = {}
        for file, content in contents.items():
            blob = self.git("hash-object", "-w", "--stdin", "--path", file, give=content)
            found[file] = common.git_bytes("cat-file", "blob", blob, at=self.root)
        return found

    def check_out(self, commit: str, tree: Path):
        """A worktree of a commit at `tree`, with the files as they are committed, byte for byte."""
        add = ("worktree", "add", "-q", "--force", "--force", "--detach")
        self.git(*common.AS_COMMITTED, *add, str(tree), commit)
        for file, content in self.contents_at(commit).items():
            if (tree / file).read_bytes() != content:  # a filter of git's attributes changed it
                (tree / file).write_bytes(content)

    def commit(self, contents: Contents, parent: str, message: str) -> str:
        """A new commit on `parent` in which only the files differ; no branch moves."""
        lines = []
        for file, content in contents.items():
            mode = self.git("ls-tree", parent, "--", file).split(" ", 1)[0] or "100644"
            blob = self.git("hash-object", "-w", "--stdin", give=content)
            lines.append(f"{mode} {blob}\t{file}\0")
        with tempfile.TemporaryDirectory() as folder:
            index = dict(at=self.root, index=Path(folder, "index"))
            common.git_bytes("read-tree", parent, **index)
            common.git_bytes(
                "update-index", "-z", "--index-info", give="".join(lines).encode(), **index
            )
            tree = common.git_bytes("write-tree", **index).decode().strip()
        words = ["commit-tree", tree, "-p", parent, "-F", "-"]
        commit = self.git(*words, give=message.encode(), check=False)
        if commit is None:  # git does not know who commits
            identity = ["-c", "user.name=night", "-c", "user.email=night@localhost"]
            commit = self.git(*identity, *words, give=message.encode())
        return commit

    def diff(self, before: str, after: str) -> str:
        """What changed in the files, without context."""
        options = ("-p", "-U0", "--no-ext-diff", "--no-textconv")
        return self.git("diff-tree", *options, before, after, "--", *self.files)

    def change_id(self, before: str, after: str) -> str:
        """The same 12 digits for the same change, whatever it was made on."""
        options = ("-p", "-U0", "--no-ext-diff", "--no-textconv")
        words = ("diff-tree", *options, before, after, "--", *self.files)
        diff = common.git_bytes(*words, at=self.root)
        # Without the hunks' line numbers, but with the function that each of them stands in.
        _, *hunks = re.split(rb"^@@ .*? @@", diff, flags=re.M)
        return hashlib.sha256(b"@@".join(hunks)).hexdigest()[:12]


def merged(ours: Contents, base: Contents, theirs: Contents) -> Contents | None:
    """`ours` with the change from `base` to `theirs`; None where the two conflict."""
    found = {file: merged_file(ours[file], base[file], theirs[file]) for file in ours}
    return None if None in found.values() else found


def merged_file(ours: bytes, base: bytes, theirs: bytes) -> bytes | None:
    """`ours` with the change from `base` to `theirs`; None where the two conflict.

    Two values of one setting are no conflict: theirs is taken, as the cells of a grid need it. git takes
    changes of neighbouring lines for a conflict, and settings in a table are neighbours. So a line that
    all three share is put between any two lines, and taken out again.
    """
    between = b"\n\x01\n"
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("ours", "base", "theirs")]
        for path, content in zip(paths, (ours, base, theirs)):
            path.write_bytes(content.replace(b"\n", between))
        # Where nothing conflicts, it is the same whose side git is to take.
        by_side = [
            common.git_bytes("merge-file", "-p", side, *map(str, paths), at=folder, check=False)
            for side in ("--ours", "--theirs")
        ]
    if None in by_side:  # not text
        return None
    mine, other = (content.replace(between, b"\n") for content in by_side)
    only_values = [*map(_without_values, mine.split(b"\n"))] == [
        *map(_without_values, other.split(b"\n"))
    ]
    return other if only_values else None


VALUE = (
    rb"""(?<![\w.])-?(?:\d[\w.]*(?:(?<=[eE])[-+]\d+)?|True|False|None|true|false|"[^"]*"|'[^']*')"""
)
VALUES = re.compile(VALUE + rb"(?:\s*(?:\*\*|[-+*/])\s*" + VALUE + rb")*")  # 2**13, 1 / 8
COMMENT = re.compile(rb"(?:\s+#|;\s*//|\s{2,}(?://|--)).*")  # `a // b` is none


def _without_values(line: bytes) -> bytes:
    return VALUES.sub(b"?", COMMENT.sub(b"", line))
