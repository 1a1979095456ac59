"""
A card's figures in one command: `uv run bench/speed.py --card`, see speed.py.

Each part is kept as soon as it is measured, in card-NAME.json in the cache folder, and the page
docs/cards/NAME.md is written anew. Said again, the command goes on with what is missing or failed.

The runs are compared with what is published for an H100: val_bpb 0.9979 for the reference start,
0.9697 for the best settings (0.9771 when another user ran those).
"""

# ruff: noqa: E402  (the repository goes on the path first)
from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "cards"
sys.path.insert(0, str(ROOT))

import torch

import prepare
import train
from autoresearch.common import Fail, cache_dir, git, read_json, utc, write_json
from autoresearch.kit import attention
from autoresearch.kit.device import compute_dtype, peak_tflops, pick_size, short
from autoresearch.referee import leakcheck
from autoresearch.referee.provenance import device_name, training_device

SEEDS = (42, 43, 44)
HONEST_MODELS = 200
TRAINED_STEPS = 30  # of each: then it has learnt something

# Published settings as edits of train.py: (its text, the replacement). The first place counts, which
# for a value of a size is class H100.
NO_SMEAR = [("x = x + self.smear(x)", "x = x + 0 * self.smear(x)")]
AS_H100 = [("SIZE = None", 'SIZE = "h100"')]
BEST_PUBLISHED = [*AS_H100, *NO_SMEAR]
REFERENCE_START = [
    *BEST_PUBLISHED,
    ("N_LAYER = 9", "N_LAYER = 8"),
    ("N_EMBD = 640", "N_EMBD = 512"),
    ('WINDOW_PATTERN = "SSSSL"', 'WINDOW_PATTERN = "SSSL"'),
    ("SHORT_WINDOW = 1 / 8", "SHORT_WINDOW = 1 / 2"),
    ("TOKENS_PER_STEP = 2**18", "TOKENS_PER_STEP = 2**19"),
    ("ROPE_BASE = 200_000", "ROPE_BASE = 10_000"),
    ("X0_INIT = 0.05", "X0_INIT = 0.1"),
    ("INIT_SCALE = 0.68", "INIT_SCALE = 1.0"),
    ("EMBEDDING_LR = 0.9", "EMBEDDING_LR = 0.6"),
    ("HEAD_LR = 0.005", "HEAD_LR = 0.004"),
    ("HEAD_WEIGHT_DECAY = 0.01", "HEAD_WEIGHT_DECAY = 0.0"),
    ("EMBEDDING_WEIGHT_DECAY = 0.001", "EMBEDDING_WEIGHT_DECAY = 0.0"),
    ("VALUE_EMBEDDING_WEIGHT_DECAY = 0.003", "VALUE_EMBEDDING_WEIGHT_DECAY = 0.0"),
    ("WARMDOWN = 0.75", "WARMDOWN = 0.5"),
    ("FINAL_LR_FRAC = 0.05", "FINAL_LR_FRAC = 0.0"),
    ("MUON_MOMENTUM_WARMUP = 200", "MUON_MOMENTUM_WARMUP = 300"),
]
RUNS = {
    "defaults": [],
    "best published settings": BEST_PUBLISHED,
    "reference start": REFERENCE_START,
}

# Which part of a step a kernel belongs to, by its name; the first that matches.
KERNELS = [
    ("attention", r"flex_attention|flash"),
    ("matrix products", r"nvjet|gemm|cutlass|splitK|xmma|^aten::(mm|bmm|addmm|baddbmm)"),
    ("loss", r"_exp_"),
    ("norms and rotation", r"rms_norm"),
    ("activation", r"relu|pow"),
]


def edited(changes: list[tuple[str, str]]) -> str:
    """train.py with these changes. Raises Fail where it no longer has one of the texts."""
    text = (ROOT / "train.py").read_text()
    for old, new in changes:
        if not re.search(rf"\b{re.escape(old)}", text):
            raise Fail(f"bench/card.py: train.py has no `{old}` any more")
        text = re.sub(rf"\b{re.escape(old)}", new, text, count=1)
    return text


# ------------------------------------------------------------------------------------- the parts


def gpu_tests() -> dict:
    """The tests that only a card can answer."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-rs"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"exit": done.returncode, "said": lines[-1] if lines else done.stderr, "failing": failed}


def honest_models(count: int) -> Iterator[dict]:
    """What the leak check says of `count` models that only read the past, each trained a little.

    How many it refused, and the largest of each figure beside its limit; after every tenth model, so
    that an end before the last loses none.
    """
    device = training_device()
    dtype = compute_dtype(device)
    T, vocab_size = prepare.MAX_SEQ_LEN, prepare.Tokenizer.from_directory().get_vocab_size()
    size = train.SIZES[pick_size(device, prepare.manifest()["corpus"])]
    hp = type("Small", (size,), {"N_LAYER": 2, "N_EMBD": 2 * size.HEAD_DIM})
    model, _ = train.build_model(hp, vocab_size, T, device, dtype)
    model.compile_parts()
    rows = prepare.scored_rows("val")
    half = min(64, len(rows) // 2)
    scored, trained = rows[:half], rows[half : half + 32]
    token_bytes = prepare.Tokenizer.from_directory().token_bytes
    rows = torch.from_numpy(trained.astype("int64")).to(device)

    found = {"moved": [], "gained": [], "lost": [], "near": [], "refused": []}
    judge_state, judge_leak = leakcheck.LeakCheck._judge_state, leakcheck.LeakCheck._judge_leak
    exact = leakcheck.ExactCheck.__call__

    def state(moved):
        found["moved"].append(abs(moved).mean())
        found["gained"].append(-moved.mean())
        judge_state(moved)

    def leak(hidden, shown, everywhere):
        found["lost"].append((hidden - shown).mean())
        judge_leak(hidden, shown, everywhere)

    def probe(check, *given):
        exact(check, *given)
        found["near"].append(sum(amount for amount, _ in check.near) / len(check.near))

    leakcheck.LeakCheck._judge_state = staticmethod(state)
    leakcheck.LeakCheck._judge_leak = staticmethod(leak)
    leakcheck.ExactCheck.__call__ = probe
    for number in range(count):
        model.init_weights(torch.Generator(device).manual_seed(number))
        optimizer = train.MuonAdamW(train.param_groups(model), compiled=False)
        model.train()
        for step in range(TRAINED_STEPS):
            batch = rows[torch.arange(step, step + 8) % len(rows)]
            train.forward_backward(model, batch[:, :-1], batch[:, 1:], 1)
            optimizer.step(1.0, 0.9, 1.0)
        try:
            eval_model = leakcheck.EvalModel(model, vocab_size)
            prepare.bits_per_byte(eval_model, scored, token_bytes, 16)
        except SystemExit as refusal:
            found["refused"].append(str(refusal))
        if (number + 1) % 10 == 0 or number + 1 == count:
            largest = {
                name: float(max(values)) for name, values in found.items() if name != "refused"
            }
            yield {"models": number + 1, **largest, "refused": found["refused"]}


def one_step(batch: int, backend: str) -> Iterator[dict]:
    """Figures of a training step with this many rows at a time; then once more, with its parts.

    A profiler that may not look at the card ends the process: what was measured before is kept.
    """
    from speed import matrix_product, seconds_in_turn

    device = training_device()
    dtype = compute_dtype(device)
    if backend != "flash3":
        attention.why_not_flash_attention_3 = lambda *_: "it is compared with another"
    T, vocab_size = prepare.MAX_SEQ_LEN, prepare.Tokenizer.from_directory().get_vocab_size()
    hp = train.SIZES[pick_size(device, prepare.manifest()["corpus"])]
    ceiling = matrix_product(device, dtype)
    model, attend = train.build_model(hp, vocab_size, T, device, dtype)
    model.compile_parts()
    optimizer = train.MuonAdamW(train.param_groups(model))
    rows = hp.TOKENS_PER_STEP // T
    inputs, targets = torch.randint(vocab_size, (2, batch, T), device=device)

    def step():
        for _ in range(rows // batch):
            train.forward_backward(model, inputs, targets, rows // batch)
        optimizer.step(1e-6, 0.9, 1.0)

    began = time.perf_counter()
    step()
    compiling = time.perf_counter() - began
    seconds = sorted(seconds_in_turn({"step": step}, 10, device)["step"])[5]
    _, flops = model.counts()
    rate = hp.TOKENS_PER_STEP / seconds
    peak = peak_tflops(device_name(device))
    memory = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0
    figures = {
        "batch": batch,
        "attention": attention.describe(attend)[0],
        "ms": 1e3 * seconds,
        "tokens_per_second": rate,
        "mfu_percent": 100 * rate * flops / (peak * 1e12) if peak else 0.0,
        "of_matrix_product": rate * flops / (ceiling * 1e12),
        "matrix_product_tflops": ceiling,
        "memory_mib": memory,
        "first_step_s": compiling,
    }
    yield figures
    yield {**figures, "parts_ms": step_by_part(step, device)}


def step_by_part(step: Callable, device: torch.device) -> dict[str, float]:
    """Milliseconds of a step by what its kernels do, from torch's profiler; "gaps" on a card."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_card = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU
    began = time.perf_counter()
    with profile(activities=[activity]) as measured:
        for _ in range(3):
            step()
        if on_card:
            torch.cuda.synchronize()
    wall = 1e3 * (time.perf_counter() - began) / 3
    parts: dict[str, float] = {}
    for event in measured.key_averages():
        if on_card and event.device_type != DeviceType.CUDA:
            continue
        own = event.self_device_time_total if on_card else event.self_cpu_time_total
        named = [part for part, pattern in KERNELS if re.search(pattern, event.key)]
        part = named[0] if named else "all other"
        parts[part] = parts.get(part, 0.0) + own / 3e3
    if on_card:
        parts["gaps, with the profiler's own"] = max(0.0, wall - sum(parts.values()))
    return dict(sorted(parts.items(), key=lambda pair: -pair[1]))


def whole_run(changes: list[tuple[str, str]], seed: int, log: Path) -> dict:
    """train.py with these changes, from its start to its score: its summary, and all its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shutil.copytree(ROOT / "autoresearch", work / "autoresearch")
        shutil.copy(ROOT / "prepare.py", work)
        (work / "train.py").write_text(edited(changes))
        environment = {**os.environ, "AUTORESEARCH_SEED": str(seed)}
        began = time.perf_counter()
        with open(log, "w") as file:
            command = [sys.executable, "train.py"]
            subprocess.run(command, cwd=work, env=environment, stdout=file, stderr=file)
        wall = time.perf_counter() - began
    summary = dict(re.findall(r"^(\w+): (\S+)$", log.read_text().split("\n---\n")[-1], re.M))
    if "val_bpb" not in summary:
        said = [line for line in log.read_text().splitlines() if line.startswith("FAIL: ")]
        return {"failed": f"{(said or ['it ended without a score'])[-1]}; its log is {log}"}
    trained = float(summary["training_seconds"])
    rate = 1e6 * float(summary["total_tokens_M"]) / trained
    return {**summary, "seconds": wall, "not_training": wall - trained, "tokens_per_second": rate}


# --------------------------------------------------------------------------------- in their order


def in_a_process(*words: str) -> dict:
    """A part in a process of its own: what it compiled and holds on the card goes with it."""
    command = [sys.executable, str(ROOT / "bench/card.py"), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    results = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if results:
        return json.loads(results[-1])
    said = [
        line for line in done.stderr.splitlines() if re.match(r"FAIL: |\w+(Error|Exception)", line)
    ]
    return {"failed": said[-1][:300] if said else f"it ended with code {done.returncode}"}


def parts_of(device: torch.device, kinds: list[str], folder: Path) -> dict[str, tuple]:
    """name: (expected seconds, function) of the wanted parts, in the order of their worth."""
    on_card = device.type == "cuda"
    hp = train.SIZES[pick_size(device, prepare.manifest()["corpus"])]
    rows = hp.TOKENS_PER_STEP // prepare.MAX_SEQ_LEN
    batch = min(hp.DEVICE_BATCH_SIZE, rows)
    best = "own"
    if on_card and attention.why_not_flash_attention_3(device, compute_dtype(device)) is None:
        best = "flash3"
    parts = {}

    def add(kind, name, expected, function, *given):
        if kind in kinds:
            parts[name] = (expected, lambda: function(*given))

    add("tests", "GPU tests", 300, gpu_tests)
    add("honest", "honest models", 300, in_a_process, "--honest", str(HONEST_MODELS))
    add("step", "step", 120, in_a_process, "--step", str(batch), best)
    budget = prepare.TIME_BUDGET
    for seed in SEEDS:
        for name, changes in RUNS.items():
            if name == "defaults" or on_card:  # the published settings are for a card
                log = folder / f"card-{name.replace(' ', '-')}-{seed}.log"
                add("runs", f"{name}, seed {seed}", budget + 120, whole_run, changes, seed, log)
    if on_card:
        add("attention", "step, flex", 120, in_a_process, "--step", str(batch), "flex")
    for other in (batch // 2, 2 * batch):
        if 1 <= other <= rows and rows % other == 0:
            add("batches", f"step, {other} rows", 120, in_a_process, "--step", str(other), best)
    return parts


PARTS = ("tests", "honest", "step", "runs", "attention", "batches")


def measure(kinds: list[str], minutes: float):
    """Measures the wanted parts that are missing, as far as `minutes` go, and writes the page."""
    unknown = [kind for kind in kinds if kind not in PARTS]
    if unknown:
        raise Fail(f"--card {unknown[0]}: the parts are {', '.join(PARTS)}")
    device = training_device()
    folder = cache_dir()
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    kept = folder / f"card-{slug}.json"
    known = read_json(kept) or {}
    began = time.monotonic()
    page = PAGES / f"{slug}.md"
    page.parent.mkdir(exist_ok=True)
    parts = parts_of(device, list(kinds) or list(PARTS), folder)
    for name, (expected, function) in parts.items():
        if name in known and "failed" not in known[name]:
            continue
        left = 60 * minutes - (time.monotonic() - began)
        if expected > left:
            print(f"not measured: {name}, about {expected} s; say the same again to go on")
            continue
        print(f"measuring: {name}, about {expected} s", flush=True)
        result = function()
        commit = git("rev-parse", "--short", "HEAD", at=ROOT, check=False)
        known[name] = {"date": utc(), "commit": commit, "torch": torch.__version__, **result}
        write_json(kept, known)
        page.write_text(as_page(device_name(device), known))
    page.write_text(as_page(device_name(device), known))
    print(f"\n{page.read_text()}\nThis is {page}; what was measured: {kept}")


# ---------------------------------------------------------------------------------------- the page


def as_page(device: str, known: dict) -> str:
    """The figures as Markdown."""
    manifest = prepare.manifest()
    dates = sorted(part["date"][:10] for part in known.values())
    torches = sorted({part["torch"] for part in known.values()})
    lines = [
        f"# {device}",
        "",
        f"`uv run bench/speed.py --card`, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, "
        f"torch {', '.join(torches)}, {short(compute_dtype(training_device()))}; "
        f"{manifest['corpus']}, budget {manifest['time_budget']} s, fingerprint "
        f"{prepare.fingerprint()}."
        if known
        else "Nothing was measured.",
        "",
    ]
    if tests := known.get("GPU tests"):
        lines += [f"GPU tests: {tests['said'].strip('= ')}.", *tests["failing"], ""]
    honest = known.get("honest models", {})
    if "models" in honest:
        lines += [*honest_lines(honest), ""]
    runs = {name: part for name, part in known.items() if "val_bpb" in part}
    if runs:
        lines += [
            "| run | val_bpb | steps | k tokens/s | MFU | peak MiB | not training |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name, run in runs.items():
            lines.append(
                f"| {name} | {run['val_bpb']} | {run['num_steps']} "
                f"| {run['tokens_per_second'] / 1e3:,.0f} | {run['mfu_percent']}% "
                f"| {float(run['peak_vram_mb']):,.0f} | {run['not_training']:.0f} s |"
            )
        lines += ["", "README's row: " + readme_row(device, runs), ""]
    steps = {name: part for name, part in known.items() if "ms" in part}
    if steps:
        lines += [
            "| a step | attention | rows | ms | k tokens/s | MFU | of the matrix product | MiB |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
    for name, step in steps.items():
        lines.append(
            f"| {name} | {step['attention']} | {step['batch']} | {step['ms']:.1f} "
            f"| {step['tokens_per_second'] / 1e3:,.0f} | {step['mfu_percent']:.1f}% "
            f"| {step['of_matrix_product']:.1%} of {step['matrix_product_tflops']:.0f} TFLOP/s "
            f"| {step['memory_mib']:,.0f} |"
        )
    if "parts_ms" in known.get("step", {}):
        total = sum(known["step"]["parts_ms"].values())
        lines += ["", "| of the step's kernels | ms | share |", "| --- | --- | --- |"]
        for part, ms in known["step"]["parts_ms"].items():
            lines.append(f"| {part} | {ms:.1f} | {ms / total:.0%} |")
    failed = [
        f"Not measured: {name}: {part['failed']}"
        for name, part in known.items()
        if "failed" in part
    ]
    lines += ["", *failed]
    return "\n".join(lines).rstrip() + "\n"


def honest_lines(honest: dict) -> list[str]:
    return [
        f"{honest['models']} honest models, {len(honest['refused'])} refused. The largest figures of "
        "the leak check beside its limits: "
        f"moved {honest['moved']:.5f} of {leakcheck.MOVED_NATS} nats, "
        f"gained {honest['gained']:.5f} of {leakcheck.GAINED_NATS}, "
        f"lost {honest['lost']:.5f} of {leakcheck.LOST_NATS}, "
        f"near {honest['near']:.6f} of {leakcheck.ExactCheck.NEAR}.",
        *honest["refused"],
    ]


def readme_row(device: str, runs: dict) -> str:
    own = [run for name, run in runs.items() if name.startswith("defaults")]
    if not own:
        return "(no run of the defaults)"
    scores = " / ".join(run["val_bpb"] for run in own)
    rate = max(run["tokens_per_second"] for run in own) / 1e3
    return f"| {device} | {own[0]['attention']} | {scores} | {rate:,.0f} k tokens/s |"


def main():
    parser = argparse.ArgumentParser(description="One part; `speed.py --card` calls it.")
    parser.add_argument("--honest", type=int)
    parser.add_argument("--step", nargs=2)
    args = parser.parse_args()
    if args.honest:
        results = honest_models(args.honest)
    else:
        results = one_step(int(args.step[0]), args.step[1])
    for result in results:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
