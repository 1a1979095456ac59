"""
What this machine does, as plain figures with their spread. Nothing here is a test, nothing is
timed against a limit.

    uv run bench/bench.py                 the table, on the prepared set
    uv run bench/bench.py --experiment    where the seconds of one experiment go, compiler cache
                                          cold and warm (a few minutes)
    uv run bench/bench.py --edits         what ten typical edits of train.py cost before the first
                                          step (ten minutes)
    uv run bench/bench.py --scale DIR     preparing 10 shards of 250 million characters made from
                                          DIR/*.parquet: time and memory
    uv run bench/bench.py --night [N]     what a night of N (10,000) experiments costs beside the runs
    uv run bench/bench.py --slots [SECONDS]  how far one supervisor goes: 1 to 256 slots, 60 s each
    uv run bench/bench.py --rules [NIGHTS]   simulated: what to do with wins on a best that has moved
    ... --json                            the same for programs

Two ways of doing one thing are always measured in the same run, in turn, and compared as a ratio:
machines are noisy.
"""

# ruff: noqa: E402  (the repository goes on the path first)
from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import prepare
import train


def times(functions: dict, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each function, called in turn, `rounds` times after two unmeasured ones."""

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds = {name: [] for name in functions}
    for turn in range(rounds + 2):
        for name, function in functions.items():
            wait()
            began = time.perf_counter()
            function()
            wait()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
    return seconds


class Table:
    def __init__(self):
        self.rows = []

    def add(
        self, what: str, amount: float, seconds: list[float], unit: str, note: str = ""
    ) -> float:
        """`amount` of work done in each of `seconds`: the median rate, and the range of the rates."""
        rates = sorted(amount / s for s in seconds)
        value, low, high = statistics.median(rates), rates[0], rates[-1]
        self.rows.append(dict(what=what, value=value, low=low, high=high, unit=unit, note=note))
        line = f"{what:44} {value:12,.2f} {unit:10} {low:12,.2f} to {high:<12,.2f} {note}"
        print(line, file=sys.stderr, flush=True)
        return value

    def add_figure(self, what: str, value: float, unit: str, note: str = "") -> float:
        """One figure, without a spread."""
        return self.add(what, value, [1], unit, note)


def ceiling(table: Table, device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of large matrix products: what a training step is measured against."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    best = min(times({"mm": lambda: a @ b}, 20, device)["mm"])
    what = f"matrix product {size}^3, {train.short(dtype)}"
    return table.add(what, 2 * size**3 / 1e12, [best], "TFLOP/s", "the best of 20")


def encoding(table: Table, tokenizer: prepare.Tokenizer):
    texts = []
    sources, _ = prepare.text_sources(prepare.demo_files(), {}, prepare.MAX_SEQ_LEN + 1)
    for source in sources:
        if source.split != "train":  # a tenth of the text
            texts += [text for _, _, text in prepare.documents(source)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    cores = os.cpu_count()
    shares = [texts[i::cores] for i in range(cores)]
    bpe = tokenizer.encoding

    def encode(texts):
        for text in texts:
            bpe.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    with ThreadPoolExecutor(cores) as pool:
        functions = {
            "one": lambda: encode(texts),
            "threads": lambda: list(pool.map(encode, shares)),
            "batch": lambda: bpe.encode_ordinary_batch(texts, num_threads=cores),
        }
        seconds = times(functions, 5, torch.device("cpu"))
    table.add("encode, one core", megabytes, seconds["one"], "MB/s")
    what = f"encode, {cores} threads as prepare.py does"
    threads = table.add(what, megabytes, seconds["threads"], "MB/s")
    batch = table.add("encode, tiktoken's own batch call", megabytes, seconds["batch"], "MB/s")
    table.add_figure("  ratio", threads / batch, "x")


def loading(table: Table, tokenizer: prepare.Tokenizer):
    B, T, count = 128, 2048, 40
    cpu = torch.device("cpu")

    def batches():
        entries = prepare.manifest()["tokens"]
        packer = prepare.Packer(prepare.set_dir(), entries, "train", T + 1, repeat=True)
        return prepare.pack_batches(packer, B, T, tokenizer.get_vocab_size(), pinned=False)

    def take(source):
        for _ in range(count):
            next(source)

    plain = batches()
    ahead = prepare.prefetch(batches())
    functions = {"plain": lambda: take(plain), "ahead": lambda: take(ahead)}
    seconds = times(functions, 5, cpu)
    tokens = B * T * count / 1e6
    table.add(f"loader, B {B}, T {T}, no prefetch", tokens, seconds["plain"], "Mtokens/s")
    table.add(f"loader, B {B}, T {T}, prefetch", tokens, seconds["ahead"], "Mtokens/s")
    began = time.perf_counter()
    next(prepare.prefetch(batches()))
    table.add_figure("first batch after the call", time.perf_counter() - began, "s")


def build(device: torch.device, dtype: torch.dtype, vocab_size: int, seq_len: int, **changes):
    """(hyperparameters, model, optimizer, compiled model) as train.py makes them."""
    corpus = "demo" if device.type == "cpu" else ""
    hp = train.hyperparameters(train.pick_size(device, corpus), **changes)
    model, *_ = train.build_model(hp, vocab_size, seq_len, device, dtype)
    optimizer = train.Optimizer(train.parameter_groups(model))
    return hp, model, optimizer, torch.compile(model, dynamic=False)


def training_step(
    table: Table, what: str, device, dtype, peak: float, vocab_size: int, seq_len: int, **changes
):
    hp, model, optimizer, compiled = build(device, dtype, vocab_size, seq_len, **changes)
    rows = hp.TOKENS_PER_STEP // seq_len
    batch = min(hp.DEVICE_BATCH_SIZE, rows)
    inputs = torch.randint(vocab_size, (batch, seq_len), device=device)
    targets = torch.randint(vocab_size, (batch, seq_len), device=device)

    def step():
        for _ in range(rows // batch):
            compiled(inputs, targets).backward()
        optimizer.step(1e-4, 0.9, 1.0)

    seconds = times({"step": step}, 15, device)["step"]
    rate = table.add(f"training step, {what}", hp.TOKENS_PER_STEP / 1e3, seconds, "ktokens/s")
    _, flops_per_token = model.counts()
    share = rate * 1e3 * flops_per_token / (peak * 1e12)
    table.add_figure("  share of the matrix-product ceiling", 100 * share, "%")


def evaluating(table: Table, tokenizer: prepare.Tokenizer, device, dtype):
    T = prepare.manifest()["seq_len"]
    rows = prepare.manifest()["eval_rows"]["val"]
    vocab_size = tokenizer.get_vocab_size()
    hp, _, _, compiled = build(device, dtype, vocab_size, T)
    batch = max(1, hp.EVAL_BATCH_TOKENS // T)
    batches = []
    for _ in range(rows // batch):
        batches.append(torch.randint(vocab_size, (batch, T), device=device))
    compiled.eval()

    @torch.no_grad()
    def forward():
        for inputs in batches:
            compiled(inputs)

    scored_rows = prepare._scored_rows("val")

    def score():
        examined = prepare.Examined(compiled, vocab_size)
        prepare.bits_per_byte(examined, scored_rows, tokenizer.token_bytes, batch)

    seconds = times({"forward": forward, "score": score}, 3, device)
    tokens = rows * T / 1e3
    table.add("forward pass alone", tokens, seconds["forward"], "ktokens/s")
    table.add("evaluation, leak check included", tokens, seconds["score"], "ktokens/s")
    ratio = min(seconds["score"]) / min(seconds["forward"])
    table.add_figure("  seconds an evaluation / a forward pass", ratio, "x")


def short_run(folder: str, cwd: Path = ROOT) -> dict[str, float]:
    """The seconds of one run of train.py that are not training, by part.

    The train.py of `cwd`, from the shell, on a demo with a budget of 5 s in `folder`.
    """
    env = {
        **os.environ,
        "AUTORESEARCH_CACHE": f"{folder}/cache",
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled",
    }
    if not Path(folder, "cache").exists():
        command = [sys.executable, "prepare.py", "--demo", "--time-budget", "5"]
        subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    began = time.perf_counter()
    command = [sys.executable, "train.py"]
    done = subprocess.run(command, cwd=cwd, env=env, check=True, capture_output=True, text=True)
    wall = time.perf_counter() - began

    log = done.stdout
    summary = dict(re.findall(r"^(\w+_seconds): ([\d.]+)$", log, re.M))
    start_up = re.search(r"^start-up.*$", log, re.M)[0]
    parts = {}
    for name, value in re.findall(r"(\w[\w -]*) ([\d.]+) s", start_up):
        parts[name] = float(value)
    parts["evaluation"] = float(re.search(r"^scored in ([\d.]+) s", log, re.M)[1])
    parts["interpreter and exit"] = wall - float(summary["total_seconds"])
    parts["everything that is not training"] = wall - float(summary["training_seconds"])
    return parts


def experiment(table: Table):
    """One short run of the demo from the shell: an empty compiler cache, then a warm one twice."""
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("cold", "warm", "warm again"):
            for name, value in short_run(folder).items():
                table.add_figure(f"{cache}: {name}", value, "s")
    if shutil.which("uv"):
        uv = ["uv", "run", "--project", ROOT, "python", "-c", ""]
        python = [sys.executable, "-c", ""]
        functions = {
            "uv": lambda: subprocess.run(uv, check=True),
            "python": lambda: subprocess.run(python, check=True),
        }
        seconds = times(functions, 5, torch.device("cpu"))
        added = statistics.median(seconds["uv"]) - statistics.median(seconds["python"])
        table.add_figure("`uv run` itself", added, "s")


def row(name: str, value: str) -> tuple[str, str]:
    """An edit of one row of the table of hyperparameters: a pattern in train.py, its replacement."""
    return rf"^(    {name} +=) [^#\n]*", rf"\1 {value},  "


EDITS = {  # what an agent tries first, each from the file as it is
    "another rate": row("MUON_LR", "0.05"),
    "another warm-down": row("WARMDOWN", "0.5"),
    "another decay": row("MUON_WEIGHT_DECAY", "0.1"),
    "one layer more": row("N_LAYER", "4"),
    "wider": row("N_EMBD", "256"),
    "smaller heads": row("HEAD_DIM", "32"),
    "other windows": row("WINDOW_PATTERN", '"SL"'),
    "half the batch": row("TOKENS_PER_STEP", "2**12"),
    "other softcap": row("SOFTCAP", "30"),
    "another activation": (r"F\.relu\(self\.up\(x\)\)\.square\(\)", r"F.silu(self.up(x))"),
}


def edits(table: Table):
    """The seconds that are not training after each edit, the compiler's cache filled by the file
    as it is."""
    original = (ROOT / "train.py").read_text()
    nothing = ("", "")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder, "work")
        work.mkdir()
        shutil.copy(ROOT / "prepare.py", work)
        of_the_edits = []
        for name, (pattern, replacement) in {"cold": nothing, "no edit": nothing, **EDITS}.items():
            edited, count = re.subn(pattern, replacement, original, count=1, flags=re.M)
            assert count == 1, f"{name}: train.py has nothing like {pattern}"
            (work / "train.py").write_text(edited)
            parts = short_run(folder, work)
            seconds = parts["compiling and warm-up"]
            note = f"all but training {parts['everything that is not training']:.1f} s"
            table.add_figure(f"compiling and warm-up: {name}", seconds, "s", note)
            if name in EDITS:
                of_the_edits.append(seconds)
        table.add_figure("  median of the ten edits", statistics.median(of_the_edits), "s")


def write_shard(path: Path, texts: list[str], characters: float):
    """A parquet file of at least so many characters: the texts again and again, each time cut
    differently."""
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
        written = 0
        turn = 0
        while written < characters:
            cut = [text[turn % 7 :] for text in texts]
            for i in range(0, len(cut), 1024):
                if written < characters:
                    writer.write_table(pa.table({"text": cut[i : i + 1024]}))
                    written += sum(map(len, cut[i : i + 1024]))
            turn += 1


def scale(table: Table, directory: Path):
    """Ten shards of 250 million characters, then prepare.py on them in a process whose peak memory
    is read."""
    texts = []
    for path in sorted(directory.glob("*.parquet")):
        if not path.name.startswith(("val", "test")):
            texts += pq.read_table(path, columns=["text"]).column(0).to_pylist()
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_TMP")) as folder:
        data = Path(folder) / "data"
        data.mkdir()
        for number in range(10):
            rotated = [text[number % 7 :] for text in texts]  # no two shards are alike
            write_shard(data / f"shard_{number:05d}.parquet", rotated, 250e6)
        for name in ("val", "test"):
            shutil.copy(directory / f"{name}.parquet", data)
        env = {**os.environ, "AUTORESEARCH_CACHE": f"{folder}/cache"}
        began = time.perf_counter()
        command = [sys.executable, "prepare.py", "--data", str(data)]
        subprocess.run(command, cwd=ROOT, env=env, check=True)
        seconds = time.perf_counter() - began
        table.add_figure("prepare 10 shards of 250 M characters", seconds, "s")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        table.add_figure("  peak memory", peak, "GiB")


def whole_table(table: Table, device: torch.device, dtype: torch.dtype):
    tokenizer = prepare.Tokenizer.from_directory()
    manifest = prepare.manifest()
    vocab_size, seq_len = manifest["vocab_size"], manifest["seq_len"]
    peak = ceiling(table, device, dtype)
    encoding(table, tokenizer)
    loading(table, tokenizer)
    training_step(table, "defaults", device, dtype, peak, vocab_size, seq_len)
    if device.type == "cuda":
        what = "reference start's shape"
        shape = dict(N_LAYER=8, N_EMBD=512, WINDOW_PATTERN="SSSL", SHORT_WINDOW=0.5)
        training_step(table, what, device, dtype, peak, 8192, 2048, **shape, TOKENS_PER_STEP=2**19)
    else:
        what = "4 x 256, T 512, vocabulary 8192"
        shape = dict(N_LAYER=4, N_EMBD=256, HEAD_DIM=128)
        batch = dict(TOKENS_PER_STEP=8192, DEVICE_BATCH_SIZE=16)
        training_step(table, what, device, dtype, peak, 8192, 512, **shape, **batch)
    evaluating(table, tokenizer, device, dtype)


def main():
    parser = argparse.ArgumentParser(description="Measures this machine.")
    add = parser.add_argument
    add("--experiment", action="store_true", help="where the seconds of one experiment go")
    add("--edits", action="store_true", help="what ten typical edits cost before the first step")
    add("--scale", type=Path, metavar="DIR", help="prepare 2.5 billion characters of DIR/*.parquet")
    add("--night", type=int, nargs="?", const=10_000, metavar="N", help="what N experiments cost")
    add("--confirm", type=int, nargs="?", const=20_000, metavar="N", help="chance in N nights")
    add("--slots", type=float, nargs="?", const=60, metavar="SECONDS", help="1 to 256 slots")
    add("--rules", type=int, nargs="?", const=200, metavar="NIGHTS", help="when the best has moved")
    add("--json", action="store_true", help="the rows as JSON on stdout")
    args = parser.parse_args()
    if args.night:
        import night_bench

        return night_bench.measure(args.night)
    if args.confirm:
        import confirm_bench

        return confirm_bench.measure(args.confirm)
    if args.slots:
        import slots_bench

        return slots_bench.measure(args.slots)
    if args.rules:
        import rules_bench

        return rules_bench.measure(args.rules)
    prepare._append_to_ledger = lambda record: None  # what is measured here is no run
    device = prepare.training_device()
    if device.type == "cpu":
        train.use_one_heap()
    dtype = train.compute_dtype(device)
    name = prepare.device_name(device)
    print(
        f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, {dtype}\n"
        f"{'':44} {'median':>12} {'':10} {'range':>12}",
        file=sys.stderr,
    )
    table = Table()
    if args.experiment:
        experiment(table)
    elif args.edits:
        edits(table)
    elif args.scale:
        scale(table, args.scale)
    else:
        whole_table(table, device, dtype)
    if args.json:
        date = time.strftime("%Y-%m-%d")
        print(json.dumps(dict(device=name, torch=torch.__version__, date=date, rows=table.rows)))
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
