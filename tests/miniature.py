"""A miniature prepared set, and the scripts run as a user types them."""

import json
import multiprocessing
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
MINIATURE = "--seq-len 64 --vocab-size 300 --eval-tokens 2048 --time-budget 2".split()
WORDS = "the cat sat on a mat while dogs ran over hills and rivers under the old blue moon".split()


def write_texts(directory: Path, files: int = 120, seed: int = 0) -> Path:
    """A folder of small text files of random words: something to learn, enough for every split."""
    draw = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        paragraphs = []
        for _ in range(draw.randrange(1, 20)):
            paragraphs.append(" ".join(draw.choices(WORDS, k=draw.randrange(5, 60))) + ".\n")
        (directory / f"text{number:04d}.txt").write_text("\n".join(paragraphs))
    return directory


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def put_jsonl(path: Path, texts: list[str]):
    put(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def put_parquet(path: Path, texts: list, column: str = "text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: texts}), path, row_group_size=100)


def run(
    script: str, *arguments, cache: Path, cwd: Path = ROOT, timeout: float = 300, **environment
) -> subprocess.CompletedProcess:
    """`python SCRIPT ARGUMENTS` as a subprocess on the given cache; its output captured."""
    own = {"AUTORESEARCH_CACHE": str(cache), "PYTHONUNBUFFERED": "1"}
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **own, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def start_forked(script: Path, **environment):
    """`python SCRIPT >SCRIPT.log 2>&1`, forked from a process that has imported what takes seconds.

    Returns the process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "tiktoken", "requests", "pyarrow.parquet"])
    process = context.Process(target=_as_main, args=(script, environment))
    process.start()
    return process


def _as_main(script: Path, environment: dict):
    os.environ.update(environment)
    sys.path.insert(0, str(ROOT))
    output = os.open(script.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    runpy.run_path(str(script), run_name="__main__")


def draw_a_batch(prepare):
    """What a run must have done before it may ask for a score. Returns the loader."""
    loader = prepare.make_dataloader(prepare.Tokenizer.from_directory(), 2, 64, "train")
    next(loader)
    return loader
