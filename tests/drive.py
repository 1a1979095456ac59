"""train.py with a small model, with parts of it replaced, and with edits as an agent makes them."""

import dataclasses
import hashlib
import re

import torch
from forks import Forks, Ran
from miniature import ROOT

import prepare
import train
from autoresearch.kit import attention, report, warmup

SMALL = dict(
    N_LAYER=2,
    N_EMBD=32,
    HEAD_DIM=16,
    N_KV_HEAD=1,
    WINDOW_PATTERN="SL",
    SHORT_WINDOW=1 / 4,
    TOKENS_PER_STEP=512,
    DEVICE_BATCH_SIZE=8,
    EVAL_BATCH_TOKENS=256,
)


def settings(**changes) -> type[train.Settings]:
    """The size `cpu` with changes."""
    assert all(hasattr(train.CPU, name) for name in changes), changes
    return type("Changed", (train.CPU,), changes)


def run(patches=(), **changes):
    """A run, and the end of the process. patches: names of functions below, called in that order."""
    train.SIZES["cpu"] = settings(**{**SMALL, **changes})
    for patch in patches:
        globals()[patch]()
    report.guard(train.main)


def by_steps():
    """A clock that counts rows handed out, so that two runs make the same six steps.

    Before the score it prints hashes of the data and of all weights.
    """
    torch.use_deterministic_algorithms(True)
    train.compute_dtype = lambda device: torch.float32
    served = hashlib.sha256()

    class Clock:
        rows = 0
        end = 6 * train.SIZES["cpu"].TOKENS_PER_STEP // prepare.MAX_SEQ_LEN
        describe = prepare.clock.describe

        @property
        def progress(self):
            return self.rows / self.end

        @property
        def elapsed(self):
            return 0.0 if self.rows < self.end else 1e9

    real_loader = train.make_dataloader
    real_score = train.evaluate_bpb

    def loader(*arguments):
        for inputs, targets, epoch in real_loader(*arguments):
            train.clock.rows += len(inputs)
            served.update(inputs.numpy().tobytes())
            yield inputs, targets, epoch

    def score(model, *arguments):
        state = hashlib.sha256()
        for tensor in model.parameters():
            state.update(tensor.detach().numpy().tobytes())
        print(f"data: {served.hexdigest()}\nstate: {state.hexdigest()}")
        return real_score(model, *arguments)

    train.clock = Clock()
    train.make_dataloader = loader
    train.evaluate_bpb = score


def noisy():
    """A model that draws random numbers in training."""
    real = train.forward_backward

    def forward_backward(model, inputs, *arguments):
        with torch.no_grad():
            model.smear_scale += 0.01 * torch.randn(())
        return real(model, inputs, *arguments)

    train.forward_backward = forward_backward


def fallen_back():
    """FlashAttention 3 that does not load, and a compiler that fails."""

    def load():
        raise RuntimeError("no build for this torch\n(a long trace)")

    attention.why_not_flash_attention_3 = lambda *_: None
    attention.load_flash_attention_3 = load
    real = warmup.fit

    def fit(*steps, **arguments):
        return dataclasses.replace(real(*steps, **arguments), fell_back="no compiler")

    warmup.fit = fit


def three_rows_fit():
    """A device with room for three rows in training."""
    real = train.GPT.forward

    def forward(self, inputs, targets=None):
        if len(inputs) > 3 and targets is not None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(self, inputs, targets)

    train.GPT.forward = forward


# ---------------------------------------------------------------------------- edits of the text

SOURCE = (ROOT / "train.py").read_text()


def edited(replacements) -> str:
    """train.py's text; replacements: [(a text that stands once in it, what stands there then)]."""
    text = SOURCE
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def run_small(processes: Forks, folder, text: str) -> Ran:
    """Runs the text as train.py with the settings SMALL; processes: have imported this module."""
    values = "".join(f"    {name} = {value!r}\n" for name, value in SMALL.items())
    text = text.replace("SIZES = {", f"class Small(CPU):\n{values}\n\nSIZES = {{")
    script = folder / "train.py"
    script.write_text(text.replace('"cpu": CPU', '"cpu": Small'))
    return processes.run(
        f"import runpy, sys; sys.argv = [{str(script)!r}]\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )


def score(ran: Ran) -> float:
    return float(re.search(r"^val_bpb: (\d\.\d{6})$", ran.log, re.M)[1])
