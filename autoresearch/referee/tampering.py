"""
What a run does beside training: locked code that it replaces, and files that its script opens.

Both are looked for in the run's own process. Code that takes the place of this file, too, is not found,
nor what is opened by C or before prepare.py is imported. The ledger holds what is found; the audit says it.
"""

from __future__ import annotations

import functools
import os
import runpy
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import BuiltinFunctionType, FrameType, FunctionType, ModuleType

from autoresearch.common import ROOT
from autoresearch.referee.manifest import measuring_sources

# ------------------------------------------------------------------------------------ replaced code

FRESH = "autoresearch_fresh"  # the name under which locked files are run again
PLAIN = (int, float, str, bytes, tuple)


def replaced() -> list[str]:
    """The names in locked code that are no longer what its files say, and torch's functions for the loss."""
    try:
        return sorted(set(_replaced()))
    except (Exception, SystemExit) as error:  # a score is not lost for it
        return [f"not looked for: {type(error).__name__}: {error}"]


def _replaced() -> list[str]:
    found = []
    modules = [m for m in list(sys.modules.values()) if type(m) is ModuleType]
    loaded = {os.path.realpath(vars(m).get("__file__") or ""): m for m in modules}
    for path in measuring_sources():
        module = loaded.get(os.path.realpath(path))
        if module is None or module.__name__ in ("__main__", __name__):
            continue
        for name, value in runpy.run_path(str(path), run_name=FRESH).items():
            mine = vars(module).get(name)
            if name.startswith("__") and not _code(value):
                continue
            found += [f"{module.__name__}.{name}{rest}" for rest in _differences(mine, value)]
            if isinstance(mine, ModuleType):
                found += [f"{name}.{of}" for of, it in vars(mine).items() if _is_of_the_run(it)]
    torch = sys.modules.get("torch")
    # Nothing replaces the functions below this name, but something may take the name itself.
    if torch and type(torch._C._VariableFunctions).__name__ != "_VariableFunctionsClass":
        found.append("torch._C._VariableFunctions")
    return found


def _differences(mine, fresh) -> Iterator[str]:
    """For each difference its path below the name: "" for the name itself, ".method" of a class."""
    if isinstance(fresh, type) and fresh.__module__ == FRESH:
        methods = vars(mine) if isinstance(mine, type) else {}
        for name, value in vars(fresh).items():
            if _code(value) or not name.startswith("__"):
                yield from (f".{name}{rest}" for rest in _differences(methods.get(name), value))
    elif isinstance(fresh, (type, BuiltinFunctionType)):
        if mine is not fresh:
            yield ""
    elif _code(fresh):
        if _code(mine) != _code(fresh):
            yield ""
    elif type(fresh) in PLAIN and fresh != mine and fresh != FRESH:
        yield ""


def _code(value):
    """The code of a function, also below a decorator; None of anything else."""
    for inner in ("__func__", "fget", "__wrapped__"):
        value = getattr(value, inner, None) or value
    return getattr(value, "__code__", None)


def _is_of_the_run(value) -> bool:
    return isinstance(value, FunctionType) and _place(value.__code__.co_filename) == "run"


# ------------------------------------------------------------------------------------- opened files

MOST = 20  # names that are kept
COMPILERS = {"_inductor", "_dynamo", "_functorch", "triton", "cpp_extension"}
_opened: dict[str, None] = {}


def opened() -> list[str]:
    """What the script itself has opened outside its folders, or started. The first MOST of them."""
    return list(_opened)


@functools.cache
def _place(file: str) -> str:
    """Whose code a file is: "library", "compiler", "locked" or "run"."""
    if file.startswith("<"):
        return "compiler" if file.startswith("<frozen importlib") else "library"
    if COMPILERS & {*Path(file).parts, Path(file).stem}:
        return "compiler"
    known = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    known += [*site.getsitepackages(), site.getusersitepackages()]
    known += map(os.path.realpath, [*known])  # the environment may be a link
    if file.startswith(tuple(known)):
        return "library"
    file = os.path.realpath(file)
    if file == str(ROOT / "prepare.py") or file.startswith(str(ROOT / "autoresearch") + os.sep):
        return "locked"
    return "run"


def _script(frame: FrameType | None) -> str | None:
    """The run's own file that asks for this, through libraries or at once; None where another does.

    Locked code may open what it likes, but training tokens only for a loader, in a thread of its own,
    or to look whether they are whole.
    """
    locked = for_tokens = False
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        place = _place(file)
        if place == "run":
            return file if not locked or for_tokens else None
        if place == "compiler" or name == "check_prepared":
            return None
        if place == "locked":
            locked, for_tokens = True, for_tokens or name == "open_tokens"
        frame = frame.f_back
    return None


def _note(event: str, arguments: tuple):
    """An audit hook of Python: of every file that is opened, and every process that is started."""
    if event not in ("open", "subprocess.Popen", "os.system", "os.posix_spawn", "os.exec"):
        return
    if len(_opened) >= MOST:
        return
    script = _script(sys._getframe(1))
    what = arguments[0]
    if script is None or isinstance(what, int):
        return
    what = os.fsdecode(what) if isinstance(what, (str, bytes, os.PathLike)) else str(what)
    if event == "open":
        what = os.path.realpath(what)
        own = [os.path.dirname(os.path.realpath(script)), "/dev"]
        if "AUTORESEARCH_RUN" in os.environ:
            own += [os.path.realpath(os.environ.get(name) or "/dev") for name in ("HOME", "TMPDIR")]
        of_a_warning = what.endswith(".py") and _place(what) != "run"  # the line that it names
        if of_a_warning or what.startswith(tuple(folder + os.sep for folder in own)):
            return
    _opened[what] = None


if __name__ != FRESH:
    sys.addaudithook(_note)
