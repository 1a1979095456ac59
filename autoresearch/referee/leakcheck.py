"""
The leak check: a score must come from the model's weights and the tokens before each target.

A model gets no score if its logits depend on later tokens or on other rows of the batch, if it
learns or keeps state while it is scored, or if the same input gets different logits.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from dataclasses import dataclass

import numpy as np

from autoresearch.referee.clock import fail

# Rows that each check adds, as a share of the scored rows (exact: calls, of all calls), and the least.
CUT_SHARE, MIN_CUT_ROWS = 0.0125, 24
AGAIN_SHARE, MIN_AGAIN_ROWS = 0.004, 8
EXACT_SHARE, MIN_EXACT_CALLS, MIN_EXACT_PROBES = 0.008, 2, 8

# More than rounding, in nats a target. Honest models on a CPU: 0, FFT convolution under 1e-5.
MOVED_NATS = 0.05  # rows again, mean absolute change
GAINED_NATS = 0.005  # rows again, mean gain: a model that learns gains
LOST_NATS = 0.02  # cut rows, mean loss: a leak gains as much in whole rows
# Cut rows against all targets, in standard deviations of their mean. In 4 million draws from real
# losses: 6.3 at most with 16 rows, 5.5 with 32, 5.7 with 128. Fewer rows are no sample.
UNLIKE_SIGMAS, UNLIKE_ROWS = 7, 16

CONTINUATION_WINDOW = 1 << 20  # tokens, in which another continuation is looked for
_draw = random.SystemRandom()  # without a seed: a place that can be foreseen can be fitted


ONLY_EARLIER = "Every position may only read itself and earlier ones of its own row"


@dataclass(frozen=True)
class Entry:
    """A row of the stream that the model is scored on."""

    when: float  # entries are sorted by it; of a scored row, its number
    kind: str  # "scored", "cut" or "again"
    row: int
    cut: int = 0  # the position whose target is hidden from a cut row


class LeakCheck:
    """Finds models that read their targets, or learn from them, while they are scored.

    Among the scored rows it places a few that only check, at positions drawn anew for each run:
    - Cut rows: a row of a later call up to a random position, then other text that follows the same
      tokens elsewhere. The target at the cut is nowhere in the input. Its loss must not be higher
      than in the whole row, where a leaking model reads it, nor far above the mean of all targets,
      which catches a model that repeats its first answer.
    - Repeated rows: a row of an early call again in a late one, in another batch. If its losses
      moved, the model keeps state: it counts calls, remembers, or learns from what it is scored on.
    - Exact probes, in calls of their own: see ExactCheck. They find leaks too small to gain much.

    Not caught: a model that learns without autograd and repeats its answer for every row it has
    had before; a leak that avoids positions where a cut is likely, judged from the row alone; one
    that gains less than LOST_NATS and passes ExactCheck.
    """

    def __init__(self, rows: np.ndarray, token_bytes: np.ndarray, batch_size: int):
        """rows: (n, T + 1). A batch is at most half of them, so that there are early and late calls."""
        self.rows = rows
        self.has_bytes = token_bytes > 0
        self.batch_size = max(1, min(batch_size, len(rows) // 2))
        self.stream = sorted(self._entries(), key=lambda entry: entry.when)
        self.exact = ExactCheck(rows.shape[1] - 1)
        # The first, where a plain mistake is found at once, and some that nobody can foresee.
        calls = len(self.stream) // self.batch_size
        enough = math.ceil(MIN_EXACT_PROBES / self.batch_size)
        count = max(MIN_EXACT_CALLS, enough, int(EXACT_SHARE * calls))
        self.exact_calls = {0, *_draw.sample(range(1, calls), min(count, calls) - 1)}

    def _entries(self) -> list[Entry]:
        n, B = len(self.rows), self.batch_size
        entries = [Entry(row, "scored", row) for row in range(n)]

        late = range(B, n)  # a cut row comes at least B rows, so one call, before the whole one
        count = max(MIN_CUT_ROWS, int(CUT_SHARE * n))
        for row in _draw.sample(late, min(count, len(late))):
            positions = np.flatnonzero(self.has_bytes[self.rows[row, 1:-1]])
            if len(positions):
                when = _draw.uniform(-0.5, row - B)  # from before row 0 on
                entries.append(Entry(when, "cut", row, int(_draw.choice(positions))))

        early = range((n - B + 1) // 2)
        count = max(MIN_AGAIN_ROWS, int(AGAIN_SHARE * n))
        for row in _draw.sample(early, min(count, len(early))):
            when = _draw.uniform(max(row + B, n / 2), n)
            entries.append(Entry(when, "again", row))
        while len(entries) % B:  # all calls have one shape
            entries.append(Entry(n, "again", _draw.choice(early)))
        return entries

    def batches(self):
        """Yields (call, inputs, targets), both uint16 (B, T), each memory of its own."""
        B = self.batch_size
        for call in range(len(self.stream) // B):
            entries = self.stream[call * B : (call + 1) * B]
            rows = self.rows[[entry.row for entry in entries]]
            inputs, targets = rows[:, :-1].copy(), rows[:, 1:].copy()
            for row, entry in zip(inputs, entries):
                if entry.kind == "cut":
                    row[entry.cut + 1 :] = self._continuation(entry)
            yield call, inputs, targets

    def _continuation(self, entry: Entry) -> np.ndarray:
        """What replaces the text after the cut: another place's text after the same 4 tokens.

        Or after as many as are found. A token that does not fit would show the cut.
        """
        text = self.rows.ravel()
        cut = entry.row * self.rows.shape[1] + entry.cut
        start = _draw.randrange(max(1, len(text) - CONTINUATION_WINDOW))
        window = text[start : start + CONTINUATION_WINDOW]
        places = 3 + np.flatnonzero((window[3:-1] == text[cut]) & (window[4:] != text[cut + 1]))
        for back in (1, 2, 3):
            alike = places[window[places - back] == text[cut - back]]
            if not len(alike):
                break
            places = alike
        if not len(places):  # a token that stands nowhere else: any place that hides the target
            places = np.flatnonzero(window[1:] != text[cut + 1])
        place = start + int(_draw.choice(places)) if len(places) else _draw.randrange(len(text))
        length = self.rows.shape[1] - 2 - entry.cut
        return np.take(text, range(place + 1, place + 1 + length), mode="wrap")

    def judge(self, losses: np.ndarray) -> np.ndarray:
        """The losses (n, T) of `rows`, from those of the stream. Raises Fail if a check failed."""
        # The stream is sorted by `when`, so the scored rows are in their order.
        scored = losses[[entry.kind == "scored" for entry in self.stream]]
        moved, hidden, shown = [], [], []
        for entry, mine in zip(self.stream, losses):
            if entry.kind == "again":
                moved.append(mine - scored[entry.row])
            if entry.kind == "cut":
                hidden.append(mine[entry.cut])
                shown.append(scored[entry.row, entry.cut])
        if moved:
            self._judge_state(np.array(moved))
        if hidden:
            everywhere = scored[self.has_bytes[self.rows[:, 1:]]]
            self._judge_leak(np.array(hidden), np.array(shown), everywhere)
        return scored

    @staticmethod
    def _judge_state(moved: np.ndarray):
        """moved: losses of rows given again minus those of the first time."""
        distance, gain = np.abs(moved).mean(), -moved.mean()
        if distance > MOVED_NATS or gain > GAINED_NATS:
            fail(
                "the model keeps state while it is scored: rows of early calls, given again in late "
                f"ones, got other logits ({distance:.3f} nats a target): no score. The same input "
                "must get the same answer"
            )

    @staticmethod
    def _judge_leak(hidden: np.ndarray, shown: np.ndarray, everywhere: np.ndarray):
        """Losses of the same targets in cut rows and in whole ones; everywhere: of all targets."""
        lost = (hidden - shown).mean()
        sigma = everywhere.std() / math.sqrt(len(hidden))
        unlike = hidden.mean() - everywhere.mean() > UNLIKE_SIGMAS * sigma
        if lost > LOST_NATS or (unlike and len(hidden) >= UNLIKE_ROWS):
            fail(
                f"the model sees the future: {len(hidden)} targets cost {hidden.mean():.3f} nats each "
                f"where other text follows, {shown.mean():.3f} in their own text, and all targets "
                f"{everywhere.mean():.3f}. {ONLY_EARLIER}"
            )


class ExactCheck:
    """Logits up to a position must not change when later tokens do, nor when other rows do.

    Every row of a batch is changed after a position of its own: to text from elsewhere in the
    batch, or to one token repeated, which moves averages most. Positions are probed in pairs of
    neighbours: at most one of two lies at the end of a block. Cost: one forward pass.
    Not caught: a leak at few positions, between those probed; one far below 1/100 of the signal;
    a model that recognises the probe, by the break in its text or because it has had the row.
    """

    # The largest differences of logits that count as rounding: root mean square over the
    # vocabulary, in units of the logits' spread. Measured: FFT convolution in bf16 gives up to
    # 0.0007 (NEAR) and 0.012 (ANYWHERE); a leak of 1/100 of the signal 0.0027 and more (NEAR).
    NEAR = 0.002  # mean over the probes, right before a change or on average
    ANYWHERE = 0.05  # any one position

    def __init__(self, T: int):
        self.probes = self._probes(T)
        self.near = []  # (difference, position) of every probe so far

    @staticmethod
    def _probes(T: int):
        """Yields (position, repeat one token after it?): the first and last few, then anywhere."""
        yield from ((0, True), (T - 2, False), (1, True), (T - 3, False))
        place = _draw.random()
        while True:
            place = (place + 0.618034) % 1  # the golden ratio: it soon has been everywhere
            p = int(place * (T - 1))
            yield p, True
            yield p + 1, False

    def __call__(self, model, inputs: np.ndarray, logits):
        """Probes once; logits: what model(inputs) gave. Raises Fail."""
        logits = logits.clone()  # a compiled model may return the same memory again
        seen = self._seen(model, inputs, logits)
        if seen is None:
            return
        if (model(inputs) - logits).abs().max() > 0.1 * logits.float().std():
            fail(
                "the model gives other logits for the same input: is dropout on in eval mode, "
                "or a thread still training?"
            )
        fail(
            f"the model sees the future (position {seen}): its logits there change with later "
            f"tokens or with other rows of the batch. {ONLY_EARLIER}"
        )

    def _seen(self, model, inputs, logits) -> int | None:
        """A position whose logits change and must not."""
        (B, T), V = inputs.shape, logits.shape[-1]
        probes = list(itertools.islice(self.probes, B))
        changed_inputs = inputs.copy()
        elsewhere = np.roll(inputs.ravel(), _draw.randrange(1, B * T)).reshape(B, T)
        for row, (p, repeated) in enumerate(probes):
            another = (int(inputs[row, min(p + 1, T - 1)]) + _draw.randrange(1, V)) % V
            changed_inputs[row, p + 1 :] = another if repeated else elsewhere[row, p + 1 :]
        changed_logits = model(changed_inputs)
        seen = None
        for row, (p, _) in enumerate(probes):
            before = logits[row, : p + 1].float()
            difference = changed_logits[row, : p + 1].float() - before
            part = before[:, :: max(1, V // 512)]  # enough to read the spread from
            center = part.median(-1, keepdim=True).values
            spread = (part - center).abs().median(-1).values.clamp(1e-6, 10)  # ignores outliers
            amount = difference.square().mean(-1).sqrt() / spread
            if not amount.isfinite().all():
                fail("the model's logits are not finite: no score")
            # some leaks are strongest right there, others everywhere
            self.near.append((max(amount[-1], amount.mean()).item(), p))
            if amount.max() > self.ANYWHERE:
                seen = int(amount.argmax())
        if seen is None and len(self.near) >= MIN_EXACT_PROBES:
            if sum(amount for amount, _ in self.near) > self.NEAR * len(self.near):
                seen = max(self.near)[1]
        return seen


class EvalModel:
    """The model under evaluation: counts its forward passes, checks its output, forbids learning."""

    def __init__(self, model, vocab_size: int):
        self.model = model
        self.vocab_size = vocab_size
        self.device = next(model.parameters()).device
        self.passes = 0

    def __call__(self, inputs: np.ndarray):
        """Logits (B, T, V) of inputs (B, T), in memory that the next call may write over."""
        self.passes += 1
        given = on_device(inputs, self.device)  # a copy: writing into it changes nothing here
        logits = self.model(given)
        shape = (*inputs.shape, self.vocab_size)
        if type(logits) is not type(given) or logits.shape != shape:
            fail(
                f"model(inputs) returned {type(logits).__name__} "
                f"{tuple(getattr(logits, 'shape', ()))}, not logits of shape "
                f"(batch, sequence, vocabulary) = {shape} in a plain Tensor"
            )
        return logits

    @contextlib.contextmanager
    def eval_mode(self):
        """Eval mode without gradients; restores the mode and torch's random generators.

        Raises Fail if the weights changed, or if autograd prepares a backward pass.
        """
        import torch

        mode, before = self.model.training, self._weights()
        devices = [self.device] if self.device.type == "cuda" else []
        no_graph = torch.autograd.graph.saved_tensors_hooks(refuse_to_learn, lambda kept: kept)
        try:
            self.model.eval()
            with torch.no_grad(), torch.random.fork_rng(devices), no_graph:
                yield
        finally:
            self.model.train(mode)
        if not torch.equal(self._weights(), before):
            fail(
                "the model's weights changed while it was scored: end every thread that trains "
                "before asking for the score"
            )

    def _weights(self):
        import torch

        sums = [p.detach().flatten().view(torch.uint8).sum() for p in self.model.parameters()]
        return torch.stack(sums)


def refuse_to_learn(tensor):
    """Autograd calls it when it keeps a tensor for a backward pass, which scoring never needs."""
    fail(
        "the model prepares a backward pass while it is scored: all learning is on the clock, "
        "before the score is asked for"
    )


def on_device(array: np.ndarray, device):
    """A fresh int64 tensor; to CUDA from pinned memory, so that no copy waits for queued work."""
    import torch

    tensor = torch.from_numpy(array.astype(np.int64))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
