"""The floor plan, held by a walk over all imports: downwards only, no circle, light where promised."""

import ast
import subprocess
import sys

import pytest
from miniature import ROOT

# What each room may import besides the standard library and itself. A room is a folder of
# autoresearch/, or a file at the top.
ROOMS = {
    "common": set(),
    "compiler": set(),
    "referee": {"common"},
    "corpus": {"common", "referee"},
    "kit": {"common", "compiler", "referee"},
    "night": {"common", "compiler", "referee.manifest", "referee.ledger"},
    "prepare": {"common", "referee", "corpus"},
    "train": {"common", "referee", "kit", "prepare"},
    "night.py": {"common", "night"},
}
PACKAGES = {  # that a room may import at its top
    "corpus": {"requests", "pyarrow", "numpy"},
    "kit": {"torch"},
    "prepare": {"numpy"},
    "referee": {"numpy"},
    "train": {"torch"},
}


def files():
    found = [*ROOT.glob("autoresearch/**/*.py"), *(ROOT / f"{n}.py" for n in SCRIPTS)]
    return sorted(path for path in found if path.name != "__init__.py")


SCRIPTS = ("prepare", "train", "night")


def module_of(path) -> str:
    """`referee.clock`, `common`; `night.py` for the script beside the folder of that name."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return "night.py" if name == "night" else name.removeprefix("autoresearch.")


def room_of(module: str) -> str:
    return module if module == "night.py" else module.split(".")[0]


def imports(path):
    """Yields (imported name, at the top of the file?) of every import statement."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        at_top = id(node) not in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, at_top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f"{node.module}.{alias.name}", at_top


def project_module(name: str) -> str | None:
    """The project's module that an imported name comes from, or None."""
    if name.split(".")[0] in ("prepare", "train"):
        return name.split(".")[0]
    if name.split(".")[0] != "autoresearch":
        return None
    name = name.removeprefix("autoresearch.")
    while name:
        if (ROOT / "autoresearch" / name.replace(".", "/")).with_suffix(".py").is_file():
            return name
        name = name.rpartition(".")[0]
    raise AssertionError(f"import of something that is no module: {name}")


def is_heavy(module: str) -> bool:
    """Whether importing it takes the seconds of importing torch."""
    path = (ROOT / "autoresearch" / module.replace(".", "/")).with_suffix(".py")
    return any(name == "torch" and at_top for name, at_top in imports(path))


@pytest.mark.parametrize("path", files(), ids=module_of)
def test_a_file_imports_downwards_only(path):
    room = room_of(module_of(path))
    for name, at_top in imports(path):
        module = project_module(name)
        if module is None:
            continue
        allowed = ROOMS[room] | {room}
        assert {module, room_of(module)} & allowed, f"{path.name} imports {name}"
        assert at_top or is_heavy(module), f"{path.name} imports {name} inside a function"


@pytest.mark.parametrize("path", files(), ids=module_of)
def test_a_file_imports_at_its_top_only_packages_that_its_room_stands_on(path):
    allowed = PACKAGES.get(room_of(module_of(path)), set()) | {"autoresearch", "prepare", "train"}
    for name, at_top in imports(path):
        package = name.split(".")[0]
        if at_top and package not in sys.stdlib_module_names:
            assert package in allowed, f"{path.name} imports {name}"


def test_there_is_no_circle():
    needs = {}
    for path in files():
        found = {project_module(name) for name, _ in imports(path)}
        needs[module_of(path)] = found - {None, module_of(path)}
    while needs:
        free = {module for module, others in needs.items() if not others & needs.keys()}
        assert free, f"a circle among {sorted(needs)}"
        needs = {module: others for module, others in needs.items() if module not in free}


def test_the_night_starts_without_installed_packages():
    """-S: Python without site-packages, as on a machine on which nothing was installed."""
    done = subprocess.run(
        [sys.executable, "-S", "night.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "begin" in done.stdout


@pytest.mark.parametrize("script", ["prepare", "train"])
def test_importing_a_script_starts_nothing(script):
    """No thread, no request, no GPU; and prepare.py does not load torch."""
    code = (
        f"import sys, threading, {script}\n"
        "assert threading.active_count() == 1\n"
        "torch = sys.modules.get('torch')\n"
        f"assert (torch is None) == ({script!r} == 'prepare')\n"
        "assert torch is None or not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
