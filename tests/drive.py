"""train.py with a small model and parts of it replaced, as a process of its own.

    python tests/drive.py '{"changes": {"TOKENS_PER_STEP": 512}, "patches": ["no_warm_up"]}'

changes: rows of the table of hyperparameters; patches: functions below, called in that order.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import prepare
import train


def by_steps():
    """A clock that goes by rows handed out, so that two runs make the same six steps; before the
    score it prints the hashes of the data served and of all weights and optimizer state."""
    torch.use_deterministic_algorithms(True)
    train.compute_dtype = lambda device: torch.float32
    served = hashlib.sha256()
    optimizers = []

    class Clock:
        rows = 0
        end = 6 * train.TABLE["TOKENS_PER_STEP"] // prepare.MAX_SEQ_LEN

        @property
        def progress(self):
            return self.rows / self.end

        @property
        def elapsed(self):
            return 0.0 if self.rows < self.end else 1e9

    class Optimizer(train.Optimizer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            optimizers.append(self)

    real_loader = train.make_dataloader
    real_score = train.evaluate_bpb

    def loader(*arguments):
        for inputs, targets, epoch in real_loader(*arguments):
            train.clock.rows += len(inputs)
            served.update(inputs.numpy().tobytes())
            yield inputs, targets, epoch

    def score(model, *arguments):
        state = hashlib.sha256()
        for tensor in [*model.parameters(), *optimizers[0].state_tensors()]:
            state.update(tensor.detach().numpy().tobytes())
        print("data", served.hexdigest())
        print("state", state.hexdigest())
        return real_score(model, *arguments)

    train.clock = Clock()
    train.Optimizer = Optimizer
    train.make_dataloader = loader
    train.evaluate_bpb = score


def three_rows_fit():
    """A device with room for three rows in training."""
    real = train.GPT.forward

    def forward(self, inputs, targets=None):
        if len(inputs) > 3 and targets is not None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(self, inputs, targets)

    train.GPT.forward = forward


def no_warm_up():
    train.WarmUp.run = lambda self, rows, device_batch, eval_batch: (device_batch, eval_batch)


def exploding():
    real = train.GPT.forward
    train.GPT.forward = lambda self, *inputs: real(self, *inputs) * 1000


def fails_later(error: Exception):
    """The sixth batch raises instead."""
    real = train.make_dataloader

    def loader(*arguments):
        for count, batch in enumerate(real(*arguments)):
            if count == 5:
                raise error
            yield batch

    train.make_dataloader = loader


def out_of_memory_later():
    fails_later(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))


def device_gone():
    text = "CUDA error: unspecified launch failure\nCompile with TORCH_USE"
    fails_later(torch.AcceleratorError(text))


def mistake():
    fails_later(KeyError("wdith"))


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    if os.environ.get("TORCH_COMPILE_DISABLE"):
        # As the switch does, but without importing the compiler, which takes seconds.
        torch.compile = lambda function, **_: function
    train.TABLE.update(asked["changes"])
    for patch in asked["patches"]:
        globals()[patch]()
    code = train.run()
    sys.stdout.flush()
    os._exit(code)
