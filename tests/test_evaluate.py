"""The score against a float64 computation by hand, and what gets no score."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
from autoresearch.referee.ledger import read_ledger


class Table(nn.Module):
    """Logits by a function of the inputs alone, so causal row by row: logits[b, t] = table[inputs[b, t]]."""

    def __init__(self, table):
        super().__init__()
        self.table, self.seen = nn.Parameter(table), []

    def forward(self, inputs):
        self.seen.append(inputs)
        return self.table[inputs]


def table(V=300, scale=2.0):
    return torch.randn(V, V, generator=torch.Generator().manual_seed(0)) * scale


def by_hand(rows, logits_of, token_bytes):
    """Bits per byte, one token at a time in float64."""
    nats = count = 0
    for row in rows:
        for token, target in zip(row[:-1], row[1:]):
            if token_bytes[target]:
                z = logits_of[token].astype(np.float64)
                top = z.max()
                nats += top + math.log(np.exp(z - top).sum()) - z[target]
                count += token_bytes[target]
    return nats / math.log(2) / count


@pytest.fixture
def score(prepared):
    """score(model, batch_size): what a run gets that drew one training batch and then asks for its score."""

    def one_run(model, batch_size=8, tokenizer=None):
        own = prepared.Tokenizer.from_directory()
        prepared.clock.__init__()
        next(prepared.make_dataloader(own, 4, 64, "train", torch.device("cpu")))
        return prepared.evaluate_bpb(model, tokenizer or own, batch_size)

    return one_run


def end_of_the_ledger(prepared):
    return read_ledger()[0][-1]


# What is scored.


def test_tokens_count_their_raw_bytes():
    """A lone byte >= 0x80 is one byte, not the three of U+FFFD; special tokens have none."""
    ranks = [bytes([b]) for b in range(256)] + [b"\xe2\x82\xac", b"\x80\xfe"]
    tokenizer = prepare.Tokenizer(ranks)
    assert tokenizer.token_bytes.tolist() == [1] * 256 + [3, 2] + [0] * 4


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_logits_score_as_by_hand(data):
    V, T = 5, data.draw(st.integers(4, 9))
    token_bytes = np.array([1, 3, 2, 0, 0])
    row = st.lists(st.integers(0, V - 1), min_size=T + 1, max_size=T + 1)
    rows = np.array(data.draw(st.lists(row, min_size=1, max_size=7)), dtype=np.uint16)
    rows[0, 1] = 0  # one target at least has bytes
    values = data.draw(st.lists(st.floats(-80, 80, width=32), min_size=V * V, max_size=V * V))
    model = Table(torch.tensor(values).view(V, V))
    expected = by_hand(rows, model.table.detach().numpy(), token_bytes)
    batch_size = data.draw(st.integers(1, 9))
    bits = prepare.bits_per_byte(prepare.EvalModel(model, V), rows, token_bytes, batch_size)
    assert bits == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_prepared_rows_score_as_by_hand(prepared, score, monkeypatch, split):
    monkeypatch.setenv("AUTORESEARCH_SPLIT", split)
    model = Table(table())
    token_bytes = prepared.Tokenizer.from_directory().token_bytes
    expected = by_hand(prepared.scored_rows(split), model.table.detach().numpy(), token_bytes)
    scores = [score(model, size) for size in (1, 3, 8, 32, 1000)]
    assert scores == pytest.approx([expected] * 5, rel=1e-6)
    assert end_of_the_ledger(prepared)["split"] == split


def test_the_model_gets_inputs_of_one_shape_and_nothing_of_the_targets(prepared, score):
    model, rows = Table(table()), prepared.scored_rows("val")
    size = next(n for n in (4, 5, 7) if len(rows) % n)  # the last batch would be a short one
    score(model, size)
    assert {tuple(x.shape) for x in model.seen} == {(size, 64)}
    for x in model.seen:  # no way from the inputs to the targets
        assert x._base is None
        assert x.untyped_storage().nbytes() == x.numel() * 8
    served = {tuple(row) for x in model.seen for row in x.tolist()}
    assert {tuple(row) for row in rows[:, :-1].tolist()} <= served


def test_writing_into_the_inputs_changes_nothing(score):
    class Writes(Table):
        def forward(self, inputs):
            logits = self.table[inputs]
            inputs.fill_(0)
            return logits

    assert score(Writes(table())) == score(Table(table()))


def test_the_mode_is_put_back_and_the_generator_too(score):
    model = Table(table())
    state = torch.get_rng_state()
    for mode in (True, False):
        score(model.train(mode))
        assert model.training is mode
    assert torch.equal(state, torch.get_rng_state())


def test_a_low_precision_model_is_scored_in_float32(score):
    z = table().bfloat16()
    assert score(Table(z)) == score(Table(z.float()))


# What does not change the score, or gets none.


class Altered(Table):
    def __init__(self, change):
        super().__init__(table())
        self.change = change

    def forward(self, inputs):
        return self.change(super().forward(inputs), inputs)


def special(value):
    """A value only where one token stands, and only for the last special token, which is never a target."""

    def change(logits, inputs):
        logits = logits.clone()
        logits[..., 299] = torch.where(inputs == inputs[0, 5], value, logits[..., 299])
        return logits

    return change


class Flattering(torch.Tensor):
    """A tensor whose loss is what its maker likes."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return 0.1 * result if "softmax" in getattr(function, "__name__", "") else result


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda z, x: z[:, :-1], "not logits of shape"),
        (lambda z, x: (z, 0.5), "not logits of shape"),
        (lambda z, x: z.as_subclass(Flattering), "returned Flattering .* in a plain Tensor"),
        (special(-math.inf), "not finite"),
        (special(math.nan), "not finite"),
        (lambda z, x: z.masked_fill(torch.arange(300) < 200, -math.inf), "not finite"),
    ],
)
def test_what_gets_no_score(prepared, score, change, word):
    with pytest.raises(prepared.Fail, match=word):
        score(Altered(change), 3)
    assert word.split()[-1] in end_of_the_ledger(prepared)["failure"]


def test_another_vocabulary_gets_no_score(prepared, score):
    other = SimpleNamespace(token_bytes=np.ones(5), get_vocab_size=lambda: 5)
    with pytest.raises(prepared.Fail, match="a vocabulary of 5 and the prepared set of 300"):
        score(Table(table(5)), tokenizer=other)


def test_weights_that_change_meanwhile_get_no_score(prepared, score):
    class Trains(Table):
        def forward(self, inputs):
            self.table.data[0, 0] += 1e-4  # as a thread would: past the version counter
            return super().forward(inputs)

    with pytest.raises(prepared.Fail, match="weights changed"):
        score(Trains(table()))
