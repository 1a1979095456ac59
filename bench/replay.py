"""
Forty real edits of train.py under the keep rules: `uv run bench/replay.py --rule rule`.

    uv run prepare.py --demo --time-budget 30 --eval-tokens 65536
    uv run bench/replay.py --rule rule     a night: the edits in their order, each on the best so far
    uv run bench/replay.py --confirm       the start and the tips with eight new seeds; the table
    uv run bench/replay.py --racing        what a loss curve at a quarter or half says of the score

The other rule is floor (see rules.py here). The model is small and not compiled, and a run's
clock goes by its tokens, so that other programs change no score. Runs are kept in replay/ of the cache
folder, by code and seed; said again, a command goes on with what is missing.
"""

# ruff: noqa: E402  (the repository goes on the path first)
from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import re
import runpy
import sys
import tempfile
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}

import torch  # noqa: F401  (before the processes of the runs are forked)

from autoresearch.common import Fail, cache_dir, read_json, write_json
from autoresearch.night import settings
from autoresearch.referee import clock
from autoresearch.referee.manifest import manifest
from bench.rules import Night

TOKENS = 150 * 2**11  # of a run
SMALL = {"N_LAYER": "2", "N_EMBD": "96", "HEAD_DIM": "32", "TOKENS_PER_STEP": "2**11"}
NEW_SEEDS = range(1001, 1009)
RULES = {"rule": "rule", "floor": "floor of 3"}  # of rules.py


def value(name: str, new: str) -> tuple[str, str, str]:
    """An edit that gives a setting another value, of size CPU where it is one of a size's."""
    return (f"{name} = {new}", rf"(?s)(.*\n    {name} = ).*?(?=  #|\n)", rf"\g<1>{new}")


def text(name: str, old: str, new: str) -> tuple[str, str, str]:
    """An edit that replaces a text."""
    return (name, re.escape(old), new.replace("\\", r"\\"))


Q = "q = norm(rotate(q, cos, sin))"
K = "k = norm(rotate(k, cos, sin))"
EDITS = [
    value("MUON_LR", "0.08"),
    text("GELU", "F.relu(self.up(x)).square()", "F.gelu(self.up(x))"),
    value("WARMDOWN", "1.0"),
    value("EMBEDDING_LR", "1.2"),
    text("no norm of queries", Q, Q.replace("norm(rotate(q, cos, sin))", "rotate(q, cos, sin)")),
    value("MUON_MOMENTUM_WARMUP", "50"),
    value("SHORT_WINDOW", "1 / 4"),
    text("no smear", "        x = x + self.smear(x)\n", "        x = x + 0 * self.smear(x)\n"),
    value("HEAD_LR", "0.008"),
    value("TOKENS_PER_STEP", "2**10"),
    text(
        "up-projections at 0.4",
        "uniform(block.mlp.up.weight)",
        "uniform(block.mlp.up.weight)\n            block.mlp.up.weight.data.mul_(0.4)",
    ),
    value("WARMUP", "0.05"),
    text("queries x 1.2", Q, f"{Q} * 1.2"),
    value("MUON_LR", "0.02"),
    text("value embeddings in all layers", "(hp.N_LAYER - 1 - i) % 2 == 0", "True"),
    value("ADAM_BETA2", "0.99"),
    value("FINAL_LR_FRAC", "0.0"),
    text("plain ReLU", "F.relu(self.up(x)).square()", "F.relu(self.up(x))"),
    value("INIT_SCALE", "0.4"),
    value("MUON_MOMENTUM_END", "0.9"),
    text("wider MLP", "4 * hp.N_EMBD", "6 * hp.N_EMBD"),
    value("SCALAR_LR", "1.0"),
    value("ROPE_BASE", "1_000"),
    text(
        "attention and MLP side by side",
        "        x = x + self.attention(norm(x), values, cos, sin)\n        return x + self.mlp(norm(x))",
        "        y = norm(x)\n        return x + self.attention(y, values, cos, sin) + self.mlp(y)",
    ),
    value("EMBEDDING_LR", "0.3"),
    text("larger head at the start", "std=0.001", "std=0.02"),
    value("X0_INIT", "0.2"),
    value("MUON_WEIGHT_DECAY", "0.0"),
    value("SOFTCAP", "30"),
    text(
        "no value embeddings but the last", "(hp.N_LAYER - 1 - i) % 2 == 0", "i == hp.N_LAYER - 1"
    ),
    value("HEAD_DIM", "16"),
    text("three steps of Polar Express", "in POLAR_EXPRESS:", "in POLAR_EXPRESS[:3]:"),
    value("ADAM_BETA1", "0.9"),
    value("TOKENS_PER_STEP", "2**12"),
    value("MUON_LR", "0.06"),
    text(
        "no norm before the head",
        "        return norm(x)\n\n    def logits",
        "        return x\n\n    def logits",
    ),
    value("WARMDOWN", "0.5"),
    value("HEAD_LR", "0.016"),
    text(
        "residual scales at 0.9",
        "ones_(block.residual_scale)",
        "constant_(block.residual_scale, 0.9)",
    ),
    value("EMBEDDING_LR", "2.0"),
]


def applied(edit: tuple[str, str, str], code: str) -> str | None:
    """The code with an edit; None where it changes nothing (what it replaces is gone)."""
    _, old, new = edit
    edited = re.sub(old, new, code)
    return edited if edited != code else None


def small_start() -> str:
    """train.py with the small model."""
    code = (ROOT / "train.py").read_text()
    for name, new in SMALL.items():
        code = applied(value(name, new), code)
    return code


def run_of(code: str, seed: int, tokens: int = TOKENS) -> dict:
    """{score, curve} of a run: the kept one, or a new one. Score None where it failed."""
    name = hashlib.sha256(code.encode()).hexdigest()[:16]
    kept = cache_dir() / "replay" / str(tokens) / f"{name}-{seed}.json"
    if known := read_json(kept):
        return known
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        script, log = Path(folder) / "train.py", Path(folder) / "run.log"
        script.write_text(code)
        child = os.fork()  # torch is imported once
        if child == 0:
            train_in_this_process(script, seed, tokens, log)
        os.waitpid(child, 0)
        said = log.read_text()
    found = dict(re.findall(r"^(val_bpb|loss_curve): (.+)$", said, re.M))
    result = {"score": None, "said": (said.strip().splitlines() or [""])[-1]}
    if "val_bpb" in found:
        curve = [float(loss) for loss in found["loss_curve"].split()]
        result = {"score": float(found["val_bpb"]), "curve": curve}
    write_json(kept, result)
    return result


def train_in_this_process(script: Path, seed: int, tokens: int, log: Path):
    """Trains and scores, with a clock that goes by tokens, and ends the process."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["AUTORESEARCH_SEED"] = str(seed)
    per_token = 0.999 * manifest()["time_budget"] / tokens
    clock.Clock._seconds = lambda self: self._tokens * per_token
    sys.argv = [str(script)]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.stdout.flush()
        os._exit(1)


class Replay(Night):
    """A night of EDITS with real scores, under one rule."""

    def __init__(self, rule: str):
        self.code = {"0": small_start()}
        self.pairs = []  # (code of a base, code of what was tried on it)
        super().__init__(rule, [], seed=0, slots=1, seeds=3, noise="steady")

    def run(self, commit: str, base: str, number: int, lost: float = 0.0) -> dict:
        self.runs += 1
        seed = settings.RUN_SEEDS[number]
        run = run_of(self.code[commit], seed)
        if run["score"] is None:
            raise Fail(f"{commit}, seed {seed}: {run['said']}")
        known = dict(id=str(self.runs), commit=commit, base=base, code=0, score=run["score"])
        return {**known, "seed": seed}

    def work(self) -> list[str]:
        """The names of what was kept, after all edits."""
        kept = []
        for number, edit in enumerate(EDITS, 1):
            base, commit = self.best()["commit"], str(number)
            code = applied(edit, self.code[base])
            if code is None:
                print(f"{number:3}  {edit[0]}: conflict", flush=True)
                continue
            self.code[commit] = code
            self.pairs.append((self.code[base], code))
            runs = [self.run(commit, base, 0)]
            while not self.decided("try", commit, base, runs):
                runs.append(self.run(commit, base, len(runs)))
            record = self.records[-1]
            scores = " ".join(f"{run['score']:.4f}" for run in runs)
            print(f"{number:3}  {edit[0]}: {record['status']} {scores}", flush=True)
            if record["status"] == "keep":
                kept.append(edit[0])
        return kept


def worked(rule: str) -> tuple[Replay, list[str]]:
    """(the night under a rule after all edits, the names of what was kept)."""
    with contextlib.redirect_stdout(io.StringIO()):
        night = Replay(rule)
        return night, night.work()


def confirm():
    """The start and the tips with new seeds: mean, and gain over the start with its 95% interval."""
    start = None
    print("| rule | runs | kept | mean of eight new seeds | gain over the start |")
    print("| --- | --- | --- | --- | --- |")
    for rule in (None, *RULES.values()):  # None: the start
        night, kept = worked(rule) if rule else (Replay("rule"), [])
        code = night.code[night.best()["commit"]]
        scores = [run_of(code, seed)["score"] for seed in NEW_SEEDS]
        start = start or scores
        gains = [a - b for a, b in zip(start, scores)]
        # 2.365: Student's t for seven degrees of freedom; the same seed draws the same text
        error = 2.365 * stdev(gains) / len(gains) ** 0.5
        gained = f"{fmean(gains):.4f} +- {error:.4f}" if rule else ""
        print(
            f"| {rule or 'start'} | {night.runs} | {len(kept)} | {fmean(scores):.4f} | {gained} |"
        )


def racing():
    """What ending runs early would save and lose: a run is cut where its loss is so far above its base's.

    Winners are the runs that score better than their base's run of the same seed.
    """
    pairs = {pair for rule in RULES.values() for pair in worked(rule)[0].pairs}
    runs = []
    for base, code in sorted(pairs):
        seed = settings.RUN_SEEDS[0]
        beside, run = run_of(base, seed), run_of(code, seed)
        if run["score"] is not None:
            above = [a - b for a, b in zip(run["curve"], beside["curve"])]
            runs.append((above, beside["score"] - run["score"]))
    winners = sum(gain > 0 for _, gain in runs)
    print(f"{len(runs)} runs, {winners} of them better than their base\n")
    print("| cut at | nats above its base | runs cut | time saved | winners lost |")
    print("| --- | --- | --- | --- | --- |")
    for place, share in ((2, 0.25), (4, 0.5)):
        for limit in (0.0, 0.01, 0.02, 0.05, 0.1, 0.2):
            cut = [gain for above, gain in runs if above[place] > limit]
            lost = sum(gain > 0 for gain in cut)
            print(
                f"| {share:.0%} | {limit} | {len(cut)} | {len(cut) / len(runs) * (1 - share):.0%} "
                f"| {lost} of {winners} |"
            )


def main():
    parser = argparse.ArgumentParser(description="Forty real edits under the keep rules.")
    parser.add_argument("--rule", choices=RULES)
    parser.add_argument("--confirm", action="store_true")
    parser.add_argument("--racing", action="store_true")
    args = parser.parse_args()
    if args.rule:
        kept = Replay(RULES[args.rule]).work()
        print(f"kept: {', '.join(kept)}")
    if args.confirm:
        confirm()
    if args.racing:
        racing()


if __name__ == "__main__":
    main()
