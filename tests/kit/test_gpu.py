"""What only a CUDA device can answer, in under five minutes: `uv run pytest -m gpu -s`.

Each test prints the figures that go with its answer.
"""

import json
import os
import random
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import requests
import torch
from miniature import run
from test_attention import plain_attention

import prepare
import train
from autoresearch.kit import attention
from autoresearch.kit.attention import FlexAttention
from autoresearch.kit.device import peak_tflops
from autoresearch.referee.clock import clock
from autoresearch.referee.leakcheck import EvalModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_left():
    """The card's memory and the compilers' state are as they were for the next test."""
    yield
    torch.compiler.reset()
    torch.compiler.set_stance("default")
    torch.cuda.empty_cache()


def draw(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(got: torch.Tensor, wanted: torch.Tensor, share: float):
    """Within so small a share of the wanted tensor's norm."""
    error = (got.cpu().double() - wanted).norm() / wanted.norm()
    assert error < share, f"off by {error:.4f} of the norm"


# ----------------------------------------------------------------------------------- attention


def flex(windows):
    return torch.compile(FlexAttention(512, windows, CUDA), dynamic=False)


def flex_in_small_blocks(windows):
    attend = FlexAttention(512, windows, CUDA)
    attend.kernel_options = FlexAttention.SMALL_BLOCKS
    return torch.compile(attend, dynamic=False)


def flash_3(windows):
    reason = attention.why_not_flash_attention_3(CUDA, torch.bfloat16)
    if reason:
        pytest.skip(f"FlashAttention 3 {reason}")
    try:
        kernel = attention.load_flash_attention_3()
    except requests.RequestException as error:
        pytest.skip(f"no copy of FlashAttention 3, and no hub: {error}")
    return attention.flash_attention_3(kernel)


@pytest.mark.parametrize("backend", [flex, flex_in_small_blocks, flash_3])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_and_its_gradients_are_those_of_a_float64_loop(backend, kv_heads):
    windows = {64, 512}
    attend = backend(windows)
    heads = [draw(2, 512, n, 128, seed=i) for i, n in enumerate((4, kv_heads, kv_heads, 4))]
    for window in windows:
        *exact, upstream = (x.bfloat16().double() for x in heads)
        exact = [x.requires_grad_() for x in exact]
        wanted = plain_attention(*exact, window)
        gradients = torch.autograd.grad(wanted, exact, upstream)
        inputs = [x.bfloat16().to(CUDA).requires_grad_() for x in heads[:3]]
        y = attend(*inputs, window)
        near(y, wanted, 0.01)
        ours = torch.autograd.grad(y, inputs, heads[3].bfloat16().to(CUDA))
        for got, gradient in zip(ours, gradients):
            near(got, gradient, 0.02)


# ---------------------------------------------------------------------------- model, optimizer


def small(seq_len=512, vocab_size=2048, shaken=True, **changes) -> train.GPT:
    """A model on the card as build_model makes it, with a few heads of 128 channels."""
    torch.manual_seed(0)
    hp = type("Small", (train.GPU,), {"N_LAYER": 3, "N_EMBD": 256, **changes})
    model, attend = train.build_model(hp, vocab_size, seq_len, CUDA, torch.bfloat16)
    if shaken:  # at its start a block adds nothing
        for p in model.parameters():
            p.data += (0.02 * draw(*p.shape)).to(p)
    print(f"attention {attention.describe(attend)[0]}", end=" ")
    return model


def step(compiled: bool) -> dict[str, torch.Tensor]:
    """All parameters after two steps on the same tokens."""
    model = small()
    optimizer = train.MuonAdamW(train.param_groups(model), compiled=compiled)
    if compiled:
        model.compile_parts()
    ids = torch.randint(2048, (8, 513), generator=torch.Generator().manual_seed(1)).to(CUDA)
    for _ in range(2):
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step(lr_multiplier=0.1, momentum=0.9, decay_multiplier=1.0)
    return {name: p.detach().float() for name, p in model.named_parameters()}


def test_two_compiled_steps_are_two_uncompiled_ones():
    start = {name: p.detach().float() for name, p in small().named_parameters()}
    plain, compiled = step(compiled=False), step(compiled=True)
    for name in start:
        moved = (plain[name] - start[name]).norm()
        apart = (plain[name] - compiled[name]).norm()
        assert moved > 0, name
        # Adam's first steps are signs, and bf16 turns some gradients near 0 around
        assert apart < 0.35 * moved, f"{name}: apart {apart:.4g}, moved {moved:.4g}"


@pytest.mark.parametrize("seed", range(5))
def test_an_honest_model_in_bf16_gets_its_score(seed):
    model = small(seq_len=2048).eval()
    model.compile_parts()
    rows = np.random.default_rng(seed).integers(0, 2048, (64, 2049))
    token_bytes = np.full(2048, 4)
    bpb = prepare.bits_per_byte(EvalModel(model, 2048), rows, token_bytes, 16)
    assert 2.0 < bpb < 16.0


# -------------------------------------------------------------------------------------- loader


def test_batches_on_the_card_are_those_of_the_cpu(prepared):
    tokenizer = prepared.Tokenizer.from_directory()
    given = prepared.make_dataloader(tokenizer, 4, 64, "train", CUDA)
    kept = [next(given)[:2] for _ in range(60)]  # nothing waits for the copies
    clock.__init__()
    plain = prepared.make_dataloader(tokenizer, 4, 64, "train", torch.device("cpu"))
    for inputs, targets in kept:
        wanted = next(plain)
        assert torch.equal(inputs.cpu(), wanted[0]) and torch.equal(targets.cpu(), wanted[1])


# ---------------------------------------------------------------------------- the whole program


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """A set with the sequence and the vocabulary of the real ones, of made-up words; a budget of 15 s."""
    folder = tmp_path_factory.mktemp("full")
    pick = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(pick.choices(letters, k=pick.randrange(2, 9))) for _ in range(20_000)]
    texts = folder / "texts"
    texts.mkdir()
    for n in range(40):
        lines = [" ".join(pick.choices(words, k=60)) for _ in range(500)]
        (texts / f"{n}.txt").write_text("\n\n".join(lines))
    options = ("--eval-tokens", 524_288, "--time-budget", 15)
    done = run("prepare.py", "--data", texts, *options, cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    return folder


def trained(full_size) -> tuple[dict[str, str], str]:
    compiled = {"TORCHINDUCTOR_CACHE_DIR": str(full_size / "compiled")}
    began = time.perf_counter()
    done = run("train.py", cache=full_size / "cache", **compiled)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    summary = dict(line.split(": ", 1) for line in log.split("---\n")[1].splitlines())
    not_training = time.perf_counter() - began - float(summary["training_seconds"])
    figures = ("attention", "mfu_percent", "peak_vram_mb", "total_tokens_M", "val_bpb")
    print({key: summary[key] for key in figures}, f"not training {not_training:.1f} s", end=" ")
    return summary, log


def test_train_as_it_is_compiles_fits_learns_and_starts_warm_the_second_time(full_size):
    first, log = trained(full_size)
    assert first["compiled"] == "yes" and first["attention"] in ("flash3", "flex"), log
    assert "compiling failed" not in log and "Warning" not in log, log
    card = torch.cuda.get_device_properties(CUDA).total_memory
    assert 0 < float(first["peak_vram_mb"]) < card / 2**20
    losses = [float(loss) for loss in first["loss_curve"].split()]
    assert losses[-1] < losses[0] < 9.2
    if peak_tflops(torch.cuda.get_device_name(CUDA)):
        assert 5 < float(first["mfu_percent"]) < 100
    second, warm = trained(full_size)
    cold, again = (
        float(re.search(r"compiling and warm-up took ([\d.]+) s", text)[1]) for text in (log, warm)
    )
    print(f"compiling {cold} s cold, {again} s warm")
    assert again < max(0.5 * cold, 15)
    ledger = (full_size / "cache" / "autoresearch.jsonl").read_text().splitlines()
    ended = [json.loads(line) for line in ledger if json.loads(line)["event"] == "end"]
    assert ended[-1]["driver"] and ended[-1]["device"] == torch.cuda.get_device_name(CUDA)
    assert ended[-1]["attention"] == second["attention"] and ended[-1]["compiled"] is True


def test_an_isolated_run_of_the_night_sees_its_card(tmp_path, monkeypatch):
    from autoresearch.night.settings import local_slots
    from autoresearch.night.worker import Isolation

    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    isolation = Isolation.here()
    code = "import torch; print(torch.ones(4, device='cuda').sum().item())"
    done = subprocess.run(
        [*isolation.prefix, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **local_slots()[0]},
    )
    assert done.stdout == "4.0\n", done.stderr
