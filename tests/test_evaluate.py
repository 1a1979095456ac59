"""The score against a float64 computation by hand, and what gets no score."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings, strategies as st


class Table(nn.Module):
    """Logits by a function of the inputs alone, so causal row by row: logits[b, t] = table[inputs[b, t]]."""
    def __init__(self, table):
        super().__init__()
        self.table, self.seen = nn.Parameter(table), []

    def forward(self, inputs):
        self.seen.append(inputs)
        return self.table[inputs]


def table(V, seed=0, scale=2.0):
    return torch.randn(V, V, generator=torch.Generator().manual_seed(seed)) * scale


def packed_rows(prepared, split="val"):
    rows = np.empty((prepared.manifest()["eval_rows"][split], prepared.manifest()["seq_len"] + 1), dtype=np.uint16)
    packer = prepared.Packer(prepared.set_dir(), prepared.manifest()["tokens"], split, rows.shape[1], repeat=False)
    assert packer.fill(rows) == len(rows)
    return rows.astype(np.int64)


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


class TinyTokenizer:
    token_bytes = np.array([1, 3, 2, 0, 0], dtype=np.int64)  # b"\xff", b"\xe2\x82\xac", b"\x80\xfe", two special tokens

    def get_vocab_size(self):
        return len(self.token_bytes)




def test_tokens_count_their_raw_bytes(prepared):
    """A lone byte >= 0x80 is one byte, not the three of a decoded replacement character; special tokens are none."""
    ranks = [bytes([b]) for b in range(256)] + [b"\xe2\x82\xac", b"\x80\xfe"]
    tokenizer = prepared.Tokenizer(ranks)
    assert tokenizer.token_bytes.tolist() == [1] * 256 + [3, 2] + [0] * 4


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_logits_score_as_by_hand(data):
    import prepare
    V, T = 5, data.draw(st.integers(4, 9))
    rows = np.array(data.draw(st.lists(st.lists(st.integers(0, V - 1), min_size=T + 1, max_size=T + 1), min_size=1, max_size=7)))
    rows[0, 1] = 0  # one target at least has bytes
    values = data.draw(st.lists(st.floats(-80, 80, width=32), min_size=V * V, max_size=V * V))
    model, batch_size = Table(torch.tensor(values).view(V, V)), data.draw(st.integers(1, 9))
    expected = by_hand(rows, model.table.detach().numpy(), TinyTokenizer.token_bytes)
    record = {"seq_len": T, "eval_rows": {"val": len(rows)}}
    loader = lambda _, B, T, split, device: ((torch.from_numpy(rows[i : i + B, :-1]), torch.from_numpy(rows[i : i + B, 1:]), 1)
                                             for i in range(0, len(rows), B))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "manifest", lambda: record)
        patch.setattr(prepare, "make_dataloader", loader)
        assert prepare._score(model, TinyTokenizer(), batch_size, torch.device("cpu")) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_prepared_rows_score_as_by_hand(prepared, monkeypatch, split):
    monkeypatch.setenv("AUTORESEARCH_SPLIT", split)
    tokenizer = prepared.Tokenizer.from_directory()
    model = Table(table(300))
    expected = by_hand(packed_rows(prepared, split), model.table.detach().numpy(), tokenizer.token_bytes)
    scores = {size: prepared.evaluate_bpb(model, tokenizer, size) for size in (1, 3, 8, 32, 1000)}
    assert list(scores.values()) == pytest.approx([expected] * 5, rel=1e-6)
    assert json.loads(prepared.signed(prepared.read_ledger()[0][-1]))["split"] == split


def test_the_splits_differ(prepared):
    assert not np.array_equal(packed_rows(prepared, "val")[:5], packed_rows(prepared, "test")[:5])


def test_the_model_gets_inputs_of_one_shape_and_nothing_of_the_targets(prepared):
    tokenizer, model = prepared.Tokenizer.from_directory(), Table(table(300))
    rows = packed_rows(prepared)
    size = next(n for n in (4, 5, 7) if len(rows) % n)  # the last batch is a short one
    prepared.evaluate_bpb(model, tokenizer, size)
    batches = math.ceil(len(rows) / size)
    assert {tuple(x.shape) for x in model.seen} == {(size, 64)}
    for x in model.seen:
        assert x._base is None and x.untyped_storage().nbytes() == x.numel() * 8  # no way from the inputs to the targets
    served = {tuple(row) for x in model.seen for row in x.tolist()}
    assert {tuple(row[:-1]) for row in rows.tolist()} <= served
    assert len(model.seen) >= batches


def test_writing_into_the_inputs_changes_nothing(prepared):
    class Writes(Table):
        def forward(self, inputs):
            logits = self.table[inputs]
            inputs.fill_(0)
            return logits
    tokenizer = prepared.Tokenizer.from_directory()
    assert prepared.evaluate_bpb(Writes(table(300)), tokenizer, 8) == prepared.evaluate_bpb(Table(table(300)), tokenizer, 8)


class Altered(Table):
    def __init__(self, change):
        super().__init__(table(300))
        self.change = change

    def forward(self, inputs):
        return self.change(super().forward(inputs), inputs)


def one(value, token=7, column=299):
    """Only where one token stands, only in one column: the last special token, which is never a target."""
    def change(logits, inputs):
        logits = logits.clone()
        logits[..., column] = torch.where(inputs == token, value, logits[..., column])
        return logits
    return change


@pytest.mark.parametrize("change, word", [
    (lambda z, x: z[:, :-1], "not logits of shape"), (lambda z, x: z[..., :-1], "not logits of shape"),
    (lambda z, x: z[:1], "not logits of shape"), (lambda z, x: z.flatten(0, 1), "not logits of shape"),
    (lambda z, x: (z, 0.5), "not logits of shape"), (lambda z, x: None, "not logits of shape"),
    (lambda z, x: z * math.nan, "not finite"), (lambda z, x: z + math.inf, "not finite"),
    (lambda z, x: one(-math.inf, token=int(x[0, 5]))(z, x), "not finite"), (lambda z, x: one(math.nan, token=int(x[-1, 9]))(z, x), "not finite"),
    (lambda z, x: z.masked_fill(torch.arange(300) < 200, -math.inf), "not finite")])
def test_what_gets_no_score(prepared, change, word):
    with pytest.raises(prepared.Stop, match=word):
        prepared.evaluate_bpb(Altered(change), prepared.Tokenizer.from_directory(), 3)
    assert word in prepared.read_ledger()[0][-1]["failure"]


def test_another_vocabulary_gets_no_score(prepared):
    with pytest.raises((prepared.Stop, ValueError), match="vocabulary"):
        prepared.evaluate_bpb(Table(table(5)), TinyTokenizer(), 3)


def test_weights_that_change_meanwhile_get_no_score(prepared):
    class Trains(Table):
        def forward(self, inputs):
            self.table.data[0, 0] += 1e-4  # as a thread would: past the version counter
            return super().forward(inputs)
    with pytest.raises(prepared.Stop, match="weights changed"):
        prepared.evaluate_bpb(Trains(table(300)), prepared.Tokenizer.from_directory(), 8)


def test_the_mode_is_put_back_and_the_generator_too(prepared):
    tokenizer, model = prepared.Tokenizer.from_directory(), Table(table(300))
    state = torch.get_rng_state()
    for mode in (True, False):
        prepared.evaluate_bpb(model.train(mode), tokenizer, 8)
        assert model.training is mode
    assert torch.equal(state, torch.get_rng_state())


def test_a_low_precision_model_is_scored_in_float32(prepared):
    tokenizer, z = prepared.Tokenizer.from_directory(), table(300).bfloat16()
    expected = prepared.evaluate_bpb(Table(z.float()), tokenizer, 8)
    assert prepared.evaluate_bpb(Table(z), tokenizer, 8) == expected


def test_half_precision_logits_may_have_a_large_sum(prepared):
    """The check for infinities must not make its own: 300 logits of 600 are beyond float16."""
    tokenizer, z = prepared.Tokenizer.from_directory(), (table(300) + 600).half()
    assert prepared.evaluate_bpb(Table(z), tokenizer, 8) == pytest.approx(prepared.evaluate_bpb(Table(z.float()), tokenizer, 8), rel=1e-6)
