"""
The figures that README and docs/measurements.md quote, on the prepared set.

    uv run bench/speed.py            matrix product, encoding, loader, training step, evaluation
    uv run bench/speed.py --edits    seconds before the first step, after each of ten edits of train.py
    uv run bench/speed.py --card     all that a new card has to answer, in at most 40 minutes at a time

Nothing here is a test. Two ways of doing one thing run in turn, in one process, and are compared as
a ratio: machines are noisy.
"""

# ruff: noqa: E402  (the repository goes on the path first)
from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import prepare
import train
from autoresearch.corpus.text import demo_files
from autoresearch.kit.device import compute_dtype, pick_size, short, use_one_heap
from autoresearch.referee.leakcheck import EvalModel
from autoresearch.referee.provenance import device_name, training_device


def seconds_in_turn(functions: dict, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each function, called in turn, `rounds` times after two that are not measured."""
    seconds = {name: [] for name in functions}
    for turn in range(rounds + 2):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def say(what: str, amount: float, seconds: list[float], unit: str) -> float:
    """One line of the table: amount / seconds, the median and the range. Returns the median."""
    rates = [amount / s for s in seconds]
    median = statistics.median(rates)
    print(f"| {what} | {median:,.2f} {unit} | {min(rates):,.2f} to {max(rates):,.2f} |", flush=True)
    return median


def matrix_product(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of large matrix products: what a training step is compared with."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    seconds = seconds_in_turn({"product": lambda: a @ b}, 20, device)["product"]
    what = f"matrix product {size}^3, {short(dtype)}, the best of 20"
    return say(what, 2 * size**3 / 1e12, [min(seconds)], "TFLOP/s")


def encoding(tokenizer: prepare.Tokenizer):
    paths = list(demo_files().values())[::10]
    texts = [path.read_text() for path in paths]
    megabytes = sum(path.stat().st_size for path in paths) / 1e6

    def encode():
        for text in texts:
            tokenizer.encode_array(text)

    seconds = seconds_in_turn({"encode": encode}, 5, torch.device("cpu"))["encode"]
    say("encoding, one core", megabytes, seconds, "MB/s")


def loading(tokenizer: prepare.Tokenizer):
    B, T, count = 128, 2048, 40

    def batches():
        entries = prepare.manifest()["tokens"]
        packer = prepare.Packer(prepare.set_dir(), entries, "train", T + 1, repeat=True)
        return prepare.pack_batches(packer, B, T, tokenizer.get_vocab_size(), pinned=False)

    def take(source):
        for _ in range(count):
            next(source)

    plain, ahead = batches(), prepare.prefetch(batches())
    functions = {"without": lambda: take(plain), "with": lambda: take(ahead)}
    for name, seconds in seconds_in_turn(functions, 5, torch.device("cpu")).items():
        say(f"loader, {B} rows of {T}, {name} prefetch", B * T * count / 1e6, seconds, "M tokens/s")


def build(device: torch.device, dtype: torch.dtype, vocab_size: int, T: int):
    """(settings, compiled model, optimizer) as train.py makes them for the prepared set."""
    hp = train.SIZES[pick_size(device, prepare.manifest()["corpus"])]
    model, _ = train.build_model(hp, vocab_size, T, device, dtype)
    model.compile_parts()
    return hp, model, train.MuonAdamW(train.param_groups(model))


def training_and_scoring(tokenizer: prepare.Tokenizer, device, dtype, ceiling: float):
    T, vocab_size = prepare.manifest()["seq_len"], tokenizer.get_vocab_size()
    hp, model, optimizer = build(device, dtype, vocab_size, T)
    rows = hp.TOKENS_PER_STEP // T
    batch = min(hp.DEVICE_BATCH_SIZE, rows)
    inputs = torch.randint(vocab_size, (batch, T), device=device)

    def step():
        for _ in range(rows // batch):
            train.forward_backward(model, inputs, inputs, rows // batch)
        optimizer.step(1e-4, 0.9, 1.0)

    seconds = seconds_in_turn({"step": step}, 15, device)["step"]
    rate = say("training step, defaults", hp.TOKENS_PER_STEP / 1e3, seconds, "k tokens/s")
    _, flops_per_token = model.counts()
    share = rate * 1e3 * flops_per_token / (ceiling * 1e12)
    print(f"| of the matrix product | {share:.1%} | |")

    scored = prepare.scored_rows("val")
    eval_batch = max(1, hp.EVAL_BATCH_TOKENS // T)
    inputs = torch.randint(vocab_size, (eval_batch, T), device=device)

    @torch.no_grad()
    def forward():
        for _ in range(len(scored) // eval_batch):
            model(inputs)

    def score():
        eval_model = EvalModel(model, vocab_size)
        prepare.bits_per_byte(eval_model, scored, tokenizer.token_bytes, eval_batch)

    model.eval()
    seconds = seconds_in_turn({"forward": forward, "score": score}, 3, device)
    say("forward pass alone", len(scored) * T / 1e3, seconds["forward"], "k tokens/s")
    say("evaluation with its leak check", len(scored) * T / 1e3, seconds["score"], "k tokens/s")
    ratio = min(seconds["score"]) / min(seconds["forward"])
    print(f"| seconds of an evaluation / a forward pass | {ratio:.2f} | |")


# What an agent tries first: (what, the text in train.py, its replacement in the CPU's settings).
EDITS = [
    ("another rate", "MUON_LR = 0.04", "MUON_LR = 0.05"),
    ("another decay", "MUON_WEIGHT_DECAY = 0.2", "MUON_WEIGHT_DECAY = 0.1"),
    ("another softcap", "SOFTCAP = 15", "SOFTCAP = 30"),
    ("one layer more", "N_LAYER = 3", "N_LAYER = 4"),
    ("wider", "N_EMBD = 192", "N_EMBD = 256"),
    ("smaller heads", "HEAD_DIM = 64", "HEAD_DIM = 32"),
    ("other windows", 'WINDOW_PATTERN = "SSSL"', 'WINDOW_PATTERN = "SL"'),
    ("half the batch", "TOKENS_PER_STEP = 2**13", "TOKENS_PER_STEP = 2**12"),
    ("another activation", "F.relu(self.up(x)).square()", "F.silu(self.up(x))"),
    ("another rotary base", "ROPE_BASE = 10_000", "ROPE_BASE = 50_000"),
]


def edits():
    """Runs a copy of train.py on a demo with a budget of 5 s: cold, warm, then after each edit."""
    original = (ROOT / "train.py").read_text()
    print("| edit | start-up, s | all that is not training, s |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder, "work")
        shutil.copytree(ROOT / "autoresearch", work / "autoresearch")
        shutil.copy(ROOT / "prepare.py", work)
        own = {"AUTORESEARCH_CACHE": f"{folder}/cache", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/c"}
        env = {**os.environ, **own}
        command = [sys.executable, "prepare.py", "--demo", "--time-budget", "5"]
        subprocess.run(command, cwd=work, env=env, check=True, capture_output=True)
        for what, old, new in [("cold", "", ""), ("no edit", "", ""), *EDITS]:
            assert old in original, f"train.py has no {old}"
            (work / "train.py").write_text(original.replace(old, new, 1))
            began = time.perf_counter()
            command = [sys.executable, "train.py"]
            done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True)
            wall = time.perf_counter() - began
            summary = dict(re.findall(r"^(\w+): ([\d.]+)$", done.stdout, re.M))
            start_up = re.search(r"compiling and warm-up took ([\d.]+) s", done.stdout)[1]
            print(f"| {what} | {start_up} | {wall - float(summary['training_seconds']):.1f} |")


def main():
    parser = argparse.ArgumentParser(description="Measures this machine.")
    parser.add_argument("--edits", action="store_true", help="start-up after ten edits of train.py")
    parser.add_argument(
        "--card", nargs="*", metavar="PART", help="a card's page, see bench/card.py"
    )
    parser.add_argument(
        "--minutes", type=float, default=40, help="for --card, at most (default 40)"
    )
    args = parser.parse_args()
    if args.card is not None:
        import card

        card.measure(args.card, args.minutes)
        return
    device = training_device()
    dtype = compute_dtype(device)
    print(
        f"{device_name(device)}, {os.cpu_count()} cores, torch {torch.__version__}, {short(dtype)}"
    )
    if args.edits:
        edits()
        return
    if device.type == "cpu":
        use_one_heap()
    tokenizer = prepare.Tokenizer.from_directory()
    print("| what | median | range |\n| --- | --- | --- |")
    ceiling = matrix_product(device, dtype)
    encoding(tokenizer)
    loading(tokenizer)
    training_and_scoring(tokenizer, device, dtype, ceiling)
    sys.stdout.flush()
    os._exit(0)  # the prefetching thread would be waited for


if __name__ == "__main__":
    main()
