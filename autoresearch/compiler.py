"""
Where the compilers of a run may write: a folder of plain letters, whose files may be executed.
Standard library only: the night uses it, and the kit.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from pathlib import Path


def place(wanted: Path) -> Path:
    """`wanted`, or where compiling there would fail, a folder of this user's elsewhere; it is made.

    torch's compiler splits its command at blanks, so a night below `my folder` would run uncompiled;
    and a file system may be mounted noexec. The same answer for the same `wanted`. Raises OSError.
    """
    wanted.mkdir(parents=True, exist_ok=True)
    if _can_compile(wanted):
        return wanted
    name = f"autoresearch-{os.geteuid()}-{hashlib.sha256(os.fsencode(wanted)).hexdigest()[:8]}"
    for base in (Path(os.path.expanduser("~/.cache")), Path("/var/tmp"), Path("/tmp")):
        folder = base / name
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            own = folder.lstat().st_uid == os.geteuid() and not folder.is_symlink()
        except OSError:  # not there, or read-only
            continue
        if own and _can_compile(folder):
            return folder
    return wanted


def _can_compile(folder: Path) -> bool:
    no_exec = getattr(os, "ST_NOEXEC", 0)  # macOS does not tell
    return shlex.quote(str(folder)) == str(folder) and not os.statvfs(folder).f_flag & no_exec
