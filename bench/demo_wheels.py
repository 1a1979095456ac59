"""Is the demo the same everywhere? Its fingerprint from the wheels of other platforms and Pythons.

    uv run bench/demo_wheels.py [PYTHON/PLATFORM ...]

For each, uv resolves pyproject.toml as it does there, unpacks the wheels of the packages that the
demo is made of side by side, and prepare.py prepares the demo from them. Downloads 40 MB for each;
nothing is installed.
"""

# ruff: noqa: E402  (prepare.py is found by its path)
from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import prepare

DEFAULT = (
    "3.11/x86_64-unknown-linux-gnu",
    "3.11/aarch64-apple-darwin",
    "3.12/x86_64-unknown-linux-gnu",
    "3.13/aarch64-apple-darwin",
    "3.14/aarch64-unknown-linux-gnu",
    "3.10/x86_64-unknown-linux-gnu",
)


def resolved(where: list[str]) -> list[str]:
    """`package==version` of the demo's packages, as pyproject.toml resolves there."""
    command = ["uv", "pip", "compile", "-q", "--no-header", *where, "pyproject.toml"]
    pins = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    names = "|".join(prepare.DEMO_PACKAGES)
    return re.findall(rf"^(?:{names})==\S+", pins, re.M)


def unpack(pins: list[str], where: list[str], folder: Path):
    command = ["uv", "pip", "install", "-q", "--target", folder, "--no-deps", *where]
    subprocess.run([*command, "--only-binary", ":all:", *pins], cwd=ROOT, check=True)


def fingerprint_of(packages: Path, cache: Path) -> str:
    """prepare.py --demo with the packages of that folder."""
    real = importlib.util.find_spec

    def find_spec(name):
        return SimpleNamespace(origin=str(packages / name / "__init__.py"))

    os.environ["AUTORESEARCH_CACHE"] = str(cache)
    importlib.util.find_spec = find_spec
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            prepare.main(["--demo"])
    finally:
        importlib.util.find_spec = real
    return prepare.fingerprint()


def main():
    for place in sys.argv[1:] or DEFAULT:
        version, platform = place.split("/")
        where = ["--python-version", version, "--python-platform", platform]
        with tempfile.TemporaryDirectory() as folder:
            pins = resolved(where)
            unpack(pins, where, Path(folder) / "packages")
            found = fingerprint_of(Path(folder) / "packages", Path(folder) / "cache")
        print(f"{found}  Python {version:5} {platform:27} {' '.join(pins)}", flush=True)


if __name__ == "__main__":
    main()
