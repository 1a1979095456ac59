"""
What this machine does, as plain figures with their spread. Nothing here is a test, nothing is timed against a limit.

    uv run bench/bench.py                 the table, on the prepared set
    uv run bench/bench.py --experiment    where the seconds of one experiment go, compiler cache cold and warm (a few minutes)
    uv run bench/bench.py --edits         what ten typical edits of train.py cost before the first step (ten minutes)
    uv run bench/bench.py --scale DIR     preparing 10 shards of 250 million characters made from DIR/*.parquet: time and memory
    ... --json                            the same for programs

Two ways of doing one thing are always measured in the same run, in turn, and compared as a ratio: machines are noisy.
"""
from __future__ import annotations

import argparse, json, math, os, re, shutil, statistics, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np
import torch
import torch.nn.functional as F

import prepare, train

def times(functions: dict, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each function, called in turn, `rounds` times after two unmeasured ones."""
    seconds = {name: [] for name in functions}
    for turn in range(rounds + 2):
        for name, function in functions.items():
            torch.cuda.synchronize() if device.type == "cuda" else None
            began = time.perf_counter()
            function()
            torch.cuda.synchronize() if device.type == "cuda" else None
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
    return seconds

class Table:
    def __init__(self):
        self.rows = []

    def add(self, what: str, amount: float, seconds: list[float], unit: str, note: str = ""):
        """`amount` of work done in each of `seconds`: the median rate, and the range of the rates."""
        rates = sorted(amount / s for s in seconds)
        self.rows.append(dict(what=what, value=statistics.median(rates), low=rates[0], high=rates[-1], unit=unit, note=note))
        row = self.rows[-1]
        print(f"{what:44} {row['value']:12,.2f} {unit:10} {row['low']:12,.2f} to {row['high']:<12,.2f} {note}", file=sys.stderr, flush=True)
        return row["value"]

def ceiling(table: Table, device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of large matrix products: what a training step is measured against."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = min(times({"mm": lambda: a @ b}, 20, device)["mm"])
    return table.add(f"matrix product {size}^3, {str(dtype)[6:]}", 2 * size**3 / 1e12, [best], "TFLOP/s", "the best of 20")

def encoding(table: Table, tokenizer: prepare.Tokenizer):
    texts = [text for source in prepare.demo_sources()[:1] for _, _, text in prepare.documents(source, 6144)]
    megabytes, cores, encoding = sum(len(text.encode()) for text in texts) / 1e6, os.cpu_count(), tokenizer.encoding
    ours = lambda some: [encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16) for text in some]
    with ThreadPoolExecutor(cores) as pool:
        seconds = times({"one": lambda: ours(texts), "all": lambda: list(pool.map(ours, [texts[i::cores] for i in range(cores)])),
                         "batch": lambda: encoding.encode_ordinary_batch(texts, num_threads=cores)}, 5, torch.device("cpu"))
    table.add("encode, one core", megabytes, seconds["one"], "MB/s")
    mine = table.add(f"encode, {cores} threads as prepare.py does", megabytes, seconds["all"], "MB/s")
    batch = table.add("encode, tiktoken's own batch call", megabytes, seconds["batch"], "MB/s")
    table.add("  ratio", mine / batch, [1], "x")

def loading(table: Table, tokenizer: prepare.Tokenizer):
    B, T, count = 128, 2048, 40
    def packer():
        return prepare.Packer(prepare.set_dir(), prepare.manifest()["tokens"], "train", T + 1, repeat=True)
    plain = prepare.pack_batches(packer(), B, T, tokenizer.get_vocab_size(), pinned=False)
    loader = lambda: prepare.DataLoader(prepare.pack_batches(packer(), B, T, tokenizer.get_vocab_size(), pinned=False), torch.device("cpu"), False)
    ahead = loader()
    take = lambda source: [next(source) for _ in range(count)] and None
    seconds = times({"plain": lambda: take(plain), "ahead": lambda: take(ahead)}, 5, torch.device("cpu"))
    table.add(f"loader, B {B}, T {T}, no prefetch", B * T * count / 1e6, seconds["plain"], "Mtokens/s")
    table.add(f"loader, B {B}, T {T}, prefetch", B * T * count / 1e6, seconds["ahead"], "Mtokens/s")
    began = time.perf_counter()
    next(loader())
    table.add("first batch after the call", time.perf_counter() - began, [1], "s")

def build(device: torch.device, dtype: torch.dtype, vocab_size: int, seq_len: int, **changes):
    hp = train.hyperparameters(train.pick_size(device, "demo" if device.type == "cpu" else ""), **changes)
    model = train.GPT(hp, vocab_size, seq_len, dtype).initialize().to(device)
    _, model.attend = train.choose_attention(device, dtype, seq_len, {block.attention.window for block in model.blocks})
    return hp, model, train.Optimizer(train.parameter_groups(model)), torch.compile(model, dynamic=False)

def training_step(table: Table, what: str, device, dtype, peak: float, vocab_size: int, seq_len: int, **changes):
    hp, model, optimizer, compiled = build(device, dtype, vocab_size, seq_len, **changes)
    batch = min(hp.DEVICE_BATCH_SIZE, hp.TOKENS_PER_STEP // seq_len)
    inputs, targets = (torch.randint(vocab_size, (batch, seq_len), device=device) for _ in range(2))
    def step():
        for _ in range(hp.TOKENS_PER_STEP // seq_len // batch):
            compiled(inputs, targets).backward()
        optimizer.step(1e-4, 0.9, 1.0)
    rate = table.add(f"training step, {what}", hp.TOKENS_PER_STEP / 1e3, times({"step": step}, 15, device)["step"], "ktokens/s")
    table.add("  share of the matrix-product ceiling", 100 * rate * 1e3 * model.counts()[1] / peak / 1e12, [1], "%")
    return compiled

def evaluating(table: Table, tokenizer, device, dtype):
    T = prepare.manifest()["seq_len"]
    hp, model, _, compiled = build(device, dtype, tokenizer.get_vocab_size(), T)
    batch = max(1, hp.EVAL_TOKENS_AT_A_TIME // T)
    tokens = prepare.manifest()["eval_rows"]["val"] * T
    batches = [torch.randint(tokenizer.get_vocab_size(), (batch, T), device=device) for _ in range(tokens // T // batch)]
    compiled.eval()
    @torch.no_grad()
    def forward():
        for inputs in batches:
            compiled(inputs)
    seconds = times({"forward": forward, "score": lambda: prepare.evaluate_bpb(compiled, tokenizer, batch)}, 3, device)
    table.add("forward pass alone", tokens / 1e3, seconds["forward"], "ktokens/s")
    table.add("evaluation, leak check included", tokens / 1e3, seconds["score"], "ktokens/s")
    table.add("  seconds an evaluation / a forward pass", min(seconds["score"]) / min(seconds["forward"]), [1], "x")

def short_run(folder: str, cwd: Path = ROOT) -> dict[str, float]:
    """train.py of `cwd` from the shell, on a demo with a budget of 5 s in `folder`: its seconds that are not training, by part."""
    env = {**os.environ, "AUTORESEARCH_CACHE": f"{folder}/cache", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled"}
    if not Path(folder, "cache").exists():
        subprocess.run([sys.executable, "prepare.py", "--demo", "--time-budget", "5"], cwd=ROOT, env=env, check=True, capture_output=True)
    began = time.perf_counter()
    log = subprocess.run([sys.executable, "train.py"], cwd=cwd, env=env, check=True, capture_output=True, text=True).stdout
    wall = time.perf_counter() - began
    found = dict(re.findall(r"^(\w+_seconds): ([\d.]+)$", log, re.M))
    parts = {name: float(value) for name, value in re.findall(r"(\w[\w -]*) ([\d.]+) s", re.search(r"^start-up.*$", log, re.M)[0])}
    parts["evaluation"] = float(re.search(r"^scored in ([\d.]+) s", log, re.M)[1])
    parts["interpreter and exit"] = wall - float(found["total_seconds"])
    parts["everything that is not training"] = wall - float(found["training_seconds"])
    return parts

def experiment(table: Table):
    """One short run of the demo from the shell: an empty compiler cache, then a warm one twice."""
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("cold", "warm", "warm again"):
            for name, value in short_run(folder).items():
                table.add(f"{cache}: {name}", value, [1], "s")
    if shutil.which("uv"):
        seconds = times({"uv": lambda: subprocess.run(["uv", "run", "--project", ROOT, "python", "-c", ""], check=True),
                         "python": lambda: subprocess.run([sys.executable, "-c", ""], check=True)}, 5, torch.device("cpu"))
        table.add("`uv run` itself", statistics.median(seconds["uv"]) - statistics.median(seconds["python"]), [1], "s")

EDITS = {  # what an agent tries first, each from the file as it is: pattern in train.py, replacement
    "another rate": (r"(MUON_RATE +=) [^#\n]*", r"\1 0.05,  "), "another warm-down": (r"(WARM_DOWN +=) [^#\n]*", r"\1 0.5,"),
    "another decay": (r"(MUON_DECAY +=) [^#\n]*", r"\1 0.1,  "), "one layer more": (r"(DEPTH +=) [^#\n]*", r"\1 6,  "),
    "wider": (r"(WIDTH +=) [^#\n]*", r"\1 256,  "), "smaller heads": (r"(HEAD_DIM +=) [^#\n]*", r"\1 32,  "),
    "other windows": (r"(WINDOW_PATTERN +=) [^#\n]*", r'\1 "SL",  '), "half the batch": (r"(TOKENS_PER_STEP +=) [^#\n]*", r"\1 2**12,"),
    "other softcap": (r"(SOFTCAP +=) [^#\n]*", r"\1 30,  "), "another activation": (r"F\.relu\(self\.up\(x\)\)\.square\(\)", r"F.silu(self.up(x))"),
}

def edits(table: Table):
    """The seconds that are not training after each edit, the compiler's cache filled by the file as it is."""
    with tempfile.TemporaryDirectory() as folder:
        original, work = (ROOT / "train.py").read_text(), Path(folder, "work")
        work.mkdir()
        shutil.copy(ROOT / "prepare.py", work)
        seconds = []
        for name, (pattern, replacement) in {"cold": ("", ""), "no edit": ("", ""), **EDITS}.items():
            edited, count = re.subn(pattern, replacement, original, count=1)
            assert count == 1, f"{name}: train.py has nothing like {pattern}"
            (work / "train.py").write_text(edited)
            parts = short_run(folder, work)
            table.add(f"compiling and warm-up: {name}", parts["compiling and warm-up"], [1], "s", f"all but training {parts['everything that is not training']:.1f} s")
            seconds += [parts["compiling and warm-up"]] * (name in EDITS)
        table.add("  median of the ten edits", statistics.median(seconds), [1], "s")

def scale(table: Table, directory: Path):
    """Ten shards of 250 million characters, then prepare.py on them in a process whose peak memory is read."""
    import pyarrow.parquet as pq, pyarrow as pa, resource
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_TMP")) as folder:
        (data := Path(folder) / "data").mkdir()
        texts = [text for path in sorted(directory.glob("*.parquet")) if not path.name.startswith(("val", "test"))
                 for text in pq.read_table(path, columns=["text"]).column(0).to_pylist()]
        total = sum(map(len, texts))
        for number in range(10):  # rotated, so that no two shards are alike
            with pq.ParquetWriter(data / f"shard_{number:05d}.parquet", pa.schema([("text", pa.string())])) as writer:
                written = 0
                for turn in range(math.ceil(250e6 / total)):
                    some = [text[(number + turn) % 7:] for text in texts]
                    for i in range(0, len(some), 1024):
                        if written < 250e6:
                            writer.write_table(pa.table({"text": some[i : i + 1024]}))
                            written += sum(map(len, some[i : i + 1024]))
        for name in ("val", "test"):
            shutil.copy(directory / f"{name}.parquet", data)
        env = {**os.environ, "AUTORESEARCH_CACHE": f"{folder}/cache"}
        began = time.perf_counter()
        subprocess.run([sys.executable, "prepare.py", "--data", str(data)], cwd=ROOT, env=env, check=True)
        table.add("prepare 10 shards of 250 M characters", time.perf_counter() - began, [1], "s")
        table.add("  peak memory", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, [1], "GiB")

def main():
    parser = argparse.ArgumentParser(description="Measures this machine.")
    parser.add_argument("--experiment", action="store_true", help="where the seconds of one experiment go")
    parser.add_argument("--edits", action="store_true", help="what ten typical edits cost before the first step")
    parser.add_argument("--scale", type=Path, metavar="DIR", help="prepare 2.5 billion characters made from DIR/*.parquet")
    parser.add_argument("--json", action="store_true", help="the rows as JSON on stdout")
    args = parser.parse_args()
    device, table = prepare.training_device(), Table()
    prepare._append_to_ledger = lambda record: None  # what is measured here is no run
    if device.type == "cpu":
        train.use_one_heap()
    dtype = train.compute_dtype(device)
    print(f"{prepare.device_name(device)}, {os.cpu_count()} cores, torch {torch.__version__}, {dtype}\n"
          f"{'':44} {'median':>12} {'':10} {'range':>12}", file=sys.stderr)
    if args.experiment:
        experiment(table)
    elif args.edits:
        edits(table)
    elif args.scale:
        scale(table, args.scale)
    else:
        tokenizer = prepare.Tokenizer.from_directory()
        manifest = prepare.manifest()
        peak = ceiling(table, device, dtype)
        encoding(table, tokenizer)
        loading(table, tokenizer)
        training_step(table, "defaults", device, dtype, peak, manifest["vocab_size"], manifest["seq_len"])
        if device.type == "cuda":
            training_step(table, "reference start's shape", device, dtype, peak, 8192, 2048, DEPTH=8, WIDTH=512, WINDOW_PATTERN="SSSL",
                          SHORT_WINDOW=0.5, TOKENS_PER_STEP=2**19)
        else:
            training_step(table, "4 x 256, T 512, vocabulary 8192", device, dtype, peak, 8192, 512, DEPTH=4, WIDTH=256, HEAD_DIM=128,
                          TOKENS_PER_STEP=8192, DEVICE_BATCH_SIZE=16)
        evaluating(table, tokenizer, device, dtype)
    if args.json:
        print(json.dumps(dict(device=prepare.device_name(device), torch=torch.__version__, date=time.strftime("%Y-%m-%d"), rows=table.rows)))
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(0)

if __name__ == "__main__":
    main()
