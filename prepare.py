"""
prepare.py: text -> tokenizer -> tokens -> rows -> bits per byte. Two scores have this in common,
so nobody edits it during research.

    uv run prepare.py               climbmix, for a real GPU
    uv run prepare.py --data DIR    your own text
    uv run prepare.py --demo        offline, for any machine

In this order:
- tokenizer: byte-pair encoding (rustbpe trains, tiktoken encodes), stored as data
- tokens: every document is encoded once, into flat uint16 files read through a memory map
- rows: best-fit packing. No padding, every row starts with BOS, rows do not depend on the batch size
- batches: the loader that hands out training rows and starts the clock
- the score: bits per byte from the model's logits
- prepare(): the steps of a preparation, and the command line

The rest is in autoresearch/: corpus (downloads, text files, splits) runs once, before any run;
referee (manifest, clock, ledger, leak check) runs in every run and is locked like this file. The
fingerprint covers the manifest, this file, common.py and the referee: same fingerprint, comparable
scores.

`train.py` needs MAX_SEQ_LEN, TIME_BUDGET (both from the manifest), Tokenizer, make_dataloader,
evaluate_bpb and clock from here. Importing this file starts nothing.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import itertools
import math
import os
import shutil
import signal
import sys
import time
from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from autoresearch.common import (
    Fail,
    Parser,
    cache_dir,
    canonical,
    cores,
    file_name,
    file_problem,
    open_ours,
    prepare_output,
    seed,  # noqa: F401  (train.py imports it from here)
    sha256_of,
    split_name,
    write_atomically,
)
from autoresearch.corpus.cache import (
    another_set,
    lock_cache,
    prepared_before,
    put_in_place,
    remove_others,
    unfinished_set,
    unpacked_dir,
)
from autoresearch.corpus.climbmix import TEST_SHARD, climbmix
from autoresearch.corpus.documents import Passage, Source, cut_to_rows, well_formed
from autoresearch.corpus.report import (
    Progress,
    in_parallel,
    print_nulls,
    print_table,
    require_rows,
    total,
)
from autoresearch.corpus.text import demo, own_text
from autoresearch.referee.clock import clock, fail
from autoresearch.referee.heldout import hidden, read_rows
from autoresearch.referee.leakcheck import EvalModel, LeakCheck, on_device
from autoresearch.referee.manifest import (
    FORMAT,
    HELD_OUT,
    SPLITS,
    damaged,
    fingerprint,
    manifest,
    open_prepared,
    read_checked,
    set_dir,
)
from autoresearch.referee.provenance import training_device

# What makes two scores comparable, beside the text. The command line overrides it, the manifest
# records it, and nothing changes it later.
# fmt: off
SETTINGS = {
    #             smallest   largest  meaning
    "seq_len":     (16,  1 << 20, "tokens that the model sees at once"),
    "vocab_size":  (260, 1 << 16, "different tokens"),
    "eval_tokens": (1,   1 << 40, "tokens that are scored"),
    "time_budget": (1,   1 << 20, "seconds of training"),
}
PRESETS = {
    "climbmix": dict(seq_len=2048, vocab_size=8192, eval_tokens=40 * 524_288, time_budget=300),
    "text":     dict(seq_len=2048, vocab_size=8192, eval_tokens=40 * 524_288, time_budget=300),
    "demo":     dict(seq_len=256,  vocab_size=2048, eval_tokens=262_144,      time_budget=300),
}
# fmt: on


def __getattr__(name: str):
    """`from prepare import MAX_SEQ_LEN` reads the manifest, and only then."""
    if name == "MAX_SEQ_LEN":
        return manifest()["seq_len"]
    if name == "TIME_BUDGET":
        return manifest()["time_budget"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---------------------------------------------------------------------------------------- tokenizer

SPECIAL_TOKENS = tuple(f"<|reserved_{i}|>" for i in range(4))  # the last four ids; the first is BOS
# GPT-4's split pattern, but digits in groups of one or two: a small vocabulary has no room for all
# three-digit numbers.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
ENCODE_CHARS = 1 << 18  # at a time: the splitter's regex overflows its stack on a million blanks


class Tokenizer:
    """Byte-pair encoding, stored as data: nothing in its file can run.

    The file has a line `base64 rank` for each token (tiktoken's format).
    token_bytes: int64 (vocabulary size,), the bytes a token stands for; 0 for the special ones.
    """

    def __init__(self, ranks: list[bytes]):
        import tiktoken

        self.ranks = ranks
        specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding(
            "autoresearch",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
            special_tokens=specials,
        )
        lengths = [len(token) for token in ranks] + [0] * len(specials)
        self.token_bytes = np.array(lengths, dtype=np.int64)

    @classmethod
    def train(cls, texts, vocab_size: int) -> Tokenizer:
        """Trains on an iterable of strings.

        vocab_size counts the special tokens; very little text gives fewer.
        """
        import rustbpe

        trainer = rustbpe.Tokenizer()
        merges = vocab_size - len(SPECIAL_TOKENS)
        trainer.train_from_iterator(texts, merges, pattern=SPLIT_PATTERN)
        by_rank = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        return cls([bytes(token) for token, _ in by_rank])

    def to_bytes(self) -> bytes:
        lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(self.ranks)]
        return b"".join(lines)

    @classmethod
    def from_directory(cls) -> Tokenizer:
        """The prepared tokenizer. Raises Fail where it is damaged or missing."""
        path = set_dir() / "tokenizer.tiktoken"
        lines = read_checked(path, manifest()["tokenizer_sha256"]).splitlines()
        return cls([base64.b64decode(line.split()[0]) for line in lines])

    def encode(self, text: str | list[str], prepend: int | str | None = None) -> list:
        """Ids of a text, or a list of them for a list of texts.

        prepend: an id, or a special token's name, to put in front. The names of special tokens in a
        text are plain text. A lone surrogate is encoded as U+FFFD.
        """
        if not isinstance(text, str):
            return [self.encode(one, prepend) for one in text]
        ids = self.encode_array(well_formed(text)).tolist()
        if prepend is None:
            return ids
        if isinstance(prepend, str):
            prepend = self.encoding.encode_single_token(prepend)
        return [prepend, *ids]

    def encode_array(self, text: str) -> np.ndarray:
        starts = range(0, len(text), ENCODE_CHARS) or [0]
        pieces = [text[start : start + ENCODE_CHARS] for start in starts]
        encode = self.encoding.encode_to_numpy
        return np.concatenate([encode(piece, disallowed_special=()) for piece in pieces])

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)

    def get_vocab_size(self) -> int:
        return len(self.token_bytes)

    def get_bos_token_id(self) -> int:
        return len(self.ranks)


def train_tokenizer(sources: list[Source], vocab_size: int) -> Tokenizer:
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:  # so that Ctrl-C is heard meanwhile
        tokenizer = pool.submit(Tokenizer.train, tokenizer_text(sources), vocab_size).result()
    size, seconds = tokenizer.get_vocab_size(), time.monotonic() - began
    print(f"trained a tokenizer of {size} tokens in {seconds:.1f} s", file=sys.stderr)
    return tokenizer


TOKENIZER_CHARS = 1_000_000_000  # of training text is what the tokenizer learns from
TOKENIZER_DOC_CHARS = 10_000  # of one document at most; plain text has no documents of its own


def tokenizer_text(sources: list[Source]):
    """Yields training text, up to TOKENIZER_CHARS in all."""
    left = TOKENIZER_CHARS
    for source in sources:
        if source.split not in (None, "train"):
            continue
        for split, _, text in source.documents():
            if split != "train":
                continue
            end = TOKENIZER_DOC_CHARS if source.path else len(text)
            for start in range(0, min(len(text), end), TOKENIZER_DOC_CHARS):
                part = text[start : start + min(TOKENIZER_DOC_CHARS, left)]
                if not part:
                    return
                left -= len(part)
                yield part


# ------------------------------------------------------------------------------------------- tokens


def encode_source(source: Source, tokenizer: Tokenizer, row_length: int, pool, progress: Progress):
    """Yields (split, row group, tokens) of its documents. Plain text is cut to passages of a row.

    pool: threads for plain text.
    """
    if source.path:
        for split, group, text in source.documents():
            yield split, group, tokenizer.encode_array(text)
            progress.add(len(text.encode()))
        return

    def encode_passage(passage: Passage) -> list[np.ndarray]:
        text = passage.text()
        progress.add(len(text.encode()))
        return cut_to_rows(tokenizer, text, row_length - 1)

    cut = [ids for rows in pool.map(encode_passage, source.passages) for ids in rows]
    # Neighbours in a text are alike. The order of their sha256 separates them.
    for ids in sorted(cut, key=lambda ids: hashlib.sha256(ids.tobytes()).digest()):
        yield source.split, 0, ids


def write_tokens(
    directory: Path, name: str, split: str | None, encoded, tokenizer: Tokenizer
) -> list[dict]:
    """Writes a source's tokens; returns its entries in the manifest's `tokens`.

    encoded: its (split, row group, tokens); split: that of all of them, if they have one. Training text
    is an entry NAME, held-out text another in its own folder. Of each:
    NAME.bin: uint16, all documents one after another, each with BOS in front.
    NAME.idx: int32 (documents, 3): place of its split in SPLITS, its row group, its tokens.
    """
    bos = [tokenizer.get_bos_token_id()]
    held_out = f"{HELD_OUT}/{name}"
    place_of = {"train": name, "val": held_out, "test": held_out}
    places = [place_of[split]] if split else [name, held_out]
    index = {place: [] for place in places}
    counted = ("documents", "bytes", "tokens")
    count = {place: {what: dict.fromkeys(SPLITS, 0) for what in counted} for place in places}
    with contextlib.ExitStack() as stack:
        files = {
            place: stack.enter_context(open_ours(directory / f"{place}.bin", "wb"))
            for place in places
        }
        for split, group, ids in encoded:
            place = place_of[split]
            files[place].write(np.concatenate([bos, ids]).astype(np.uint16).data)
            index[place].append((SPLITS.index(split), group, len(ids) + 1))
            count[place]["documents"][split] += 1
            count[place]["bytes"][split] += int(tokenizer.token_bytes[ids].sum())  # of text
            count[place]["tokens"][split] += len(ids) + 1
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    entries = []
    for place in places:
        path = directory / f"{place}.idx"
        write_atomically(path, np.array(index[place], dtype=np.int32).tobytes())
        digests = {"sha256": sha256_of(path.with_suffix(".bin")), "index_sha256": sha256_of(path)}
        entries.append({"name": place, **digests, **count[place]})
    return entries


def encode_all(
    directory: Path, sources: list[Source], tokenizer: Tokenizer, row_length: int
) -> list[dict]:
    """Encodes every source once, in threads; returns the manifest's `tokens`."""
    workers = cores()
    pool = ThreadPoolExecutor(workers)
    names = {source: f"{number:05d}" for number, source in enumerate(sources)}
    (directory / HELD_OUT).mkdir()

    def one(source: Source, progress: Progress) -> list[dict]:
        encoded = encode_source(source, tokenizer, row_length, pool, progress)
        return write_tokens(directory, names[source], source.split, encoded, tokenizer)

    return list(itertools.chain(*in_parallel(one, sources, workers, "encoded")))


def open_tokens(directory: Path, entry: dict) -> tuple[np.ndarray, np.ndarray]:
    """(uint16 tokens as a memory map, int64 index) of a manifest entry; see write_tokens.

    Raises Fail where the index is damaged, or the tokens are missing or of another size.
    """
    path = directory / (entry["name"] + ".bin")
    raw = read_checked(path.with_suffix(".idx"), entry["index_sha256"])
    index = np.frombuffer(raw, dtype=np.int32).reshape(-1, 3).astype(np.int64)
    count = sum(entry["tokens"].values())
    with open_prepared(path) as file:
        if os.fstat(file.fileno()).st_size != 2 * count:
            raise damaged(path)
        if not count:  # an empty file cannot be mapped
            return np.empty(0, dtype=np.uint16), index
        # slicing np.memmap is slow
        return np.asarray(np.memmap(file, dtype=np.uint16, mode="r")), index


def check_prepared(split: str):
    """Raises Fail where a file is damaged or missing, or the split is too small for a row.

    A run calls it first: otherwise it would notice only after minutes.
    """
    prepared = manifest()
    if not prepared["eval_rows"][split]:
        raise Fail(
            f"the {split} split is smaller than one row of {prepared['seq_len'] + 1} tokens: it "
            "cannot be scored. Add text and prepare again"
        )
    for entry in prepared["tokens"]:
        if entry["tokens"]["train"]:
            open_tokens(set_dir(), entry)
    if not hidden():
        read_rows(split)


# --------------------------------------------------------------------------------------------- rows

BATCH_DOCS = 128  # packing, part of the metric: documents come in batches of so many
POOL_DOCS = 1000  # and are chosen from a pool of at least so many


class Packer:
    """Best-fit packing of documents into rows. It is part of the metric, so the rule is exact.

    Whole batches of documents are added until the pool holds POOL_DOCS. Then the longest document
    that fits the space left goes in, the earliest added on a tie; if none fits, the shortest
    (earliest on a tie) is cut to fill the row, its rest dropped.
    """

    def __init__(self, directory: Path, entries, split: str, row_length: int, repeat: bool):
        self.row_length = row_length
        self.epoch = 1
        self.added = 0
        # Sorted (length, -number added, its first tokens: what a row can hold). A bisection finds
        # the next document; of equal lengths the earliest added is last. Copies, for a map keeps a
        # file open, and the documents may be of a thousand files.
        self.pool = []
        holding = [entry for entry in entries if entry["tokens"][split]]
        self.batches = self._batches(directory, holding, split, repeat)

    def _batches(self, directory: Path, entries, split: str, repeat: bool):
        """Yields (epoch, [(length, first tokens)]) of up to BATCH_DOCS documents of a row group."""
        for epoch in itertools.count(1) if repeat else [1]:
            for entry in entries:
                tokens, index = open_tokens(directory, entry)
                ends = np.cumsum(index[:, 2])
                of_split = index[:, 0] == SPLITS.index(split)
                groups, lengths = index[of_split, 1], index[of_split, 2]
                firsts = ends[of_split] - lengths
                group_starts = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(groups)]
                for start, end in itertools.pairwise(group_starts):
                    for i in range(start, end, BATCH_DOCS):
                        batch = slice(i, min(i + BATCH_DOCS, end))
                        documents = zip(firsts[batch].tolist(), lengths[batch].tolist())
                        most = self.row_length
                        yield (
                            epoch,
                            [(n, tokens[f : f + min(n, most)].copy()) for f, n in documents],
                        )

    def _fill_pool(self):
        while len(self.pool) < POOL_DOCS:
            batch = next(self.batches, None)
            if batch is None:
                return
            self.epoch, documents = batch
            for length, tokens in documents:
                self.added += 1
                self.pool.append((length, -self.added, tokens))
            self.pool.sort()

    def fill(self, rows: np.ndarray) -> int:
        """Fills rows, uint16 (n, row_length); returns how many: fewer at the end of a single pass."""
        pool = self.pool
        for number, row in enumerate(rows):
            filled = 0
            while filled < self.row_length:
                if len(pool) < POOL_DOCS:
                    self._fill_pool()
                    if not pool:
                        return number
                space = self.row_length - filled
                shortest = pool[0][0]
                most = max(space, shortest)  # if none fits, the shortest is taken
                place = bisect_left(pool, (most + 1,)) - 1  # the last one of at most that length
                length, _, tokens = pool.pop(place)
                length = min(length, space)
                row[filled : filled + length] = tokens[:length]
                filled += length
        return len(rows)


def pack_batches(packer: Packer, B: int, T: int, vocab_size: int, pinned: bool):
    """Yields (int64 (2, B, T): inputs and targets, epoch) for ever, fresh memory each time."""
    import torch

    rows = np.empty((B, T + 1), dtype=np.uint16)
    while True:
        packer.fill(rows)
        if rows.max() >= vocab_size:
            raise damaged(set_dir())  # training tokens are not verified by their sha256
        batch = torch.empty((2, B, T), dtype=torch.int64, pin_memory=pinned)
        view = batch.numpy()
        view[0] = rows[:, :-1]
        view[1] = rows[:, 1:]
        yield batch, packer.epoch


# ------------------------------------------------------------------------------------------ batches


def make_dataloader(tokenizer: Tokenizer, B: int, T: int, split: str, device=None):
    """Yields (inputs, targets, epoch) of the train split for ever.

    Both are int64 (B, T) on `device` (default: training_device()); targets are the inputs shifted
    by one; every row starts with BOS. The first batch starts the clock.

    Raises Fail on a damaged cache, and for another split: only evaluate_bpb reads those.
    """
    if split != "train":
        fail(f"make_dataloader gives out only `train`, not `{split}`: that is for evaluate_bpb")
    prepared = manifest()
    vocab_size = tokenizer.get_vocab_size()
    if vocab_size != prepared["vocab_size"]:
        fail(f"a vocabulary of {vocab_size}: the prepared set has {prepared['vocab_size']}")
    device = device or training_device()
    packer = Packer(set_dir(), prepared["tokens"], "train", T + 1, repeat=True)
    batches = pack_batches(packer, B, T, vocab_size, pinned=device.type == "cuda")
    clock.expect(device)
    clock.describe(device_batch=B)
    return on_the_clock(prefetch(batches), device)


def prefetch(batches):
    """The same batches; a thread makes each while the one before is used. It starts at once.

    An exception in the thread is raised here.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="packer")  # ends with its last reference
    coming = thread.submit(next, batches, None)

    def one_ahead(coming):
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch

    return one_ahead(coming)


def on_the_clock(batches, device):
    for batch, epoch in batches:
        clock.hand_out(batch[0].numel())
        # From pinned memory the copy is asynchronous, and torch's host allocator gives that memory
        # out again only when the copies that read it are done, so no batch is overwritten early.
        inputs, targets = batch.to(device, non_blocking=True)
        yield inputs, targets, epoch


# ---------------------------------------------------------------------------------------- the score


def evaluate_bpb(model, tokenizer: Tokenizer, batch_size: int) -> float:
    """Bits per byte of `model` on the scored split. Ends the clock and writes the ledger.

    model(inputs), int64 (B, T), returns logits (B, T, vocabulary size); B is batch_size, but at
    most half the rows. The model never sees the targets, and the byte counts are those of the
    prepared tokenizer, not of the argument. The rows are the first evaluation tokens / T of the
    split's packing, each once, so the score does not depend on B.

    Raises Fail, with the reason in the ledger, for a run over its budget, another vocabulary,
    logits that are not a plain finite tensor of that shape, a model that learns, is random or
    keeps state, and one that sees the future (LeakCheck).
    """
    clock.ask_score(next(model.parameters()).device)
    began = time.monotonic()
    own, split = Tokenizer.from_directory(), split_name()
    if tokenizer.get_vocab_size() != own.get_vocab_size():
        fail(
            f"the tokenizer has a vocabulary of {tokenizer.get_vocab_size()} and the prepared set "
            f"of {own.get_vocab_size()}: no score"
        )
    eval_model = EvalModel(model, own.get_vocab_size())
    score = bits_per_byte(eval_model, scored_rows(split), own.token_bytes, batch_size)
    seconds = round(time.monotonic() - began, 1)
    clock.end(score=score, scoring_seconds=seconds, scoring_passes=eval_model.passes)
    return score


def scored_rows(split: str) -> np.ndarray:
    """The rows of the score, uint16 (n, T + 1). 42 MB for climbmix. A run of the night has them once."""
    prepared = manifest()
    T, count = prepared["seq_len"], prepared["eval_rows"][split]
    if not count:
        fail(f"the {split} split is too small for one row of {T + 1} tokens")
    clock.describe(held_out="hidden" if hidden() else "readable")
    return np.frombuffer(read_rows(split), dtype=np.uint16).reshape(count, T + 1)


def bits_per_byte(
    model: EvalModel, rows: np.ndarray, token_bytes: np.ndarray, batch_size: int
) -> float:
    """The metric: (sum of the targets' cross-entropy in nats) / (ln 2 x sum of their bytes).

    rows: (n, T + 1) tokens; inputs are a row without its last token, targets without its first.
    token_bytes: (V,). Targets of 0 bytes, the special tokens, are in neither sum.
    Memory: the losses about twice, 4 bytes a token (84 MB for climbmix); logits of one batch.
    """
    check = LeakCheck(rows, token_bytes, batch_size)
    losses = []
    with model.eval_mode():
        for call, inputs, targets in check.batches():  # every row once, and a few that only check
            logits = model(inputs)
            losses.append(cross_entropy(logits, targets))
            if call in check.exact_calls:
                check.exact(model, inputs, logits)
    losses = np.concatenate([batch.cpu().numpy() for batch in losses])
    if not np.isfinite(losses).all():
        fail("the model's logits are not finite: no score")
    losses = check.judge(losses)  # (n, T) nats, those of `rows`

    target_bytes = token_bytes[rows[:, 1:]]  # (n, T)
    nats = losses[target_bytes > 0].sum(dtype=np.float64)
    return float(nats / math.log(2) / target_bytes.sum())


def cross_entropy(logits, targets: np.ndarray):
    """Nats, float32 (B, T): logsumexp of the logits minus the target's; NaN if one is not finite.

    In pieces, so that memory stays small. It calls torch's C functions: train.py shares the process
    and could replace those of torch, torch.Tensor or torch.nn.functional. It could also replace
    names of torch._C or of this file, which nothing here prevents.
    """
    import torch

    C = torch._C._VariableFunctions
    targets = on_device(targets, logits.device).flatten()
    flat = C.flatten(logits, 0, 1)
    at_a_time = 1 << 18 if logits.device.type == "cpu" else 1 << 25  # a CPU's cache; 128 MB
    piece = max(1, at_a_time // logits.shape[-1])
    losses = []
    for i in range(0, len(targets), piece):
        size = min(piece, len(targets) - i)
        logp = C.log_softmax(C.narrow(flat, 0, i, size), -1, dtype=torch.float32)
        nats = C.neg(C.gather(logp, 1, targets[i : i + size, None]))[:, 0]
        losses.append(C.add(nats, C.mul(C.sum(logp, -1), 0)))  # NaN where any is -inf
    return C.reshape(C.cat(losses), logits.shape[:2])


# ------------------------------------------------------------------------- prepare(): all the steps


def prepare(corpus: str, data: Path | None, settings: dict, force: bool):
    """Fills the cache: text, tokenizer, tokens, and last the manifest that describes them.

    The same command again does nothing. With `force` a new set is made beside the old one and
    replaces it when it is complete. A killed preparation starts over; finished downloads are kept.
    """
    began = time.monotonic()
    request = {"corpus": corpus, **settings}
    old = None if force else prepared_before(request)
    if old and corpus == "climbmix":  # its text is fixed: the same request is the same set
        return say_it_is_there()

    # 1. Text: the files, downloaded where they are missing, and the split of each document.
    if corpus == "climbmix":
        sources = climbmix(settings["num_shards"])
        how_split = "split by shard: the last two are val and test"
    elif corpus == "demo":
        sources, how_split = demo()
    else:
        sources, how_split = own_text(data)
    described = {"format": FORMAT, "corpus": corpus, "request": request}
    described["files"] = [source.describe() for source in sources]
    described["key"] = hashlib.sha256(canonical(described)).hexdigest()[:12]
    if old:
        if old["key"] != described["key"]:
            raise another_set("of other files, or of these before they changed")
        return say_it_is_there()
    directory = unfinished_set()

    # 2. The tokenizer, from training text only.
    tokenizer = train_tokenizer(sources, settings["vocab_size"])
    content = tokenizer.to_bytes()
    write_atomically(directory / "tokenizer.tiktoken", content)

    # 3. Every document as tokens.
    row_length = settings["seq_len"] + 1
    entries = encode_all(directory, sources, tokenizer, row_length)
    for source in sources:
        source.require_unchanged()

    # 4. The rows of the score.
    eval_rows, digests = pack_rows(directory, entries, row_length, settings["eval_tokens"])
    print(how_split)
    print_nulls(sources)
    print_table(entries, eval_rows, row_length)
    require_rows(entries, eval_rows, row_length)

    # 5. The manifest. From now on the set is prepared.
    described |= {
        **settings,
        "vocab_size": tokenizer.get_vocab_size(),
        "tokenizer_sha256": hashlib.sha256(content).hexdigest(),
        "tokens": entries,
        "eval_rows": eval_rows,
        "rows_sha256": digests,
    }
    put_in_place(directory, described)
    print(
        f"prepared {corpus} in {file_name(cache_dir())} in {time.monotonic() - began:.1f} s: "
        f"{total(entries, 'tokens', 'train'):,} training tokens, {eval_rows['val']} rows of "
        f"{settings['seq_len']} to score, fingerprint {fingerprint()}\nnext: uv run train.py"
    )


def say_it_is_there():
    """Raises Fail where a file of the prepared set is damaged or missing."""
    Tokenizer.from_directory()
    check_prepared("val")
    remove_others(set_dir())
    place = file_name(cache_dir())
    print(f"already prepared in {place}: fingerprint {fingerprint()}; nothing to do")


def pack_rows(directory: Path, entries: list[dict], row_length: int, eval_tokens: int):
    """Packs and writes the rows of the score. Returns {split: how many} and {split: their sha256}."""
    wanted = max(1, eval_tokens // (row_length - 1))
    eval_rows, digests = {}, {}
    for split in ("val", "test"):
        packer = Packer(directory, entries, split, row_length, repeat=False)
        rows = np.empty((wanted, row_length), dtype=np.uint16)
        eval_rows[split] = packer.fill(rows)
        content = rows[: eval_rows[split]].tobytes()
        write_atomically(directory / HELD_OUT / f"{split}.rows", content)
        digests[split] = hashlib.sha256(content).hexdigest()
    return eval_rows, digests


# ------------------------------------------------------------------------------------- command line


def whole_number(smallest: int, largest: int):
    """A type for argparse."""

    def parse(text: str) -> int:
        number = int(text)
        if not smallest <= number <= largest:
            raise argparse.ArgumentTypeError(f"{text} is not from {smallest} to {largest}")
        return number

    parse.__name__ = "whole number"  # for argparse's own message where the text is no number
    return parse


def command_line() -> Parser:
    parser = Parser(
        prog="prepare.py", description="Prepares a corpus for train.py.", allow_abbrev=False
    )
    corpus = parser.add_mutually_exclusive_group()
    corpus.add_argument(
        "--demo",
        action="store_true",
        help="the source of installed packages: offline, no GPU needed",
    )
    corpus.add_argument(
        "--data",
        type=lambda text: Path(text).expanduser(),  # a shell leaves the ~ of --data=~/notes
        metavar="DIR",
        help="your own *.parquet (column text), *.jsonl (field text), *.txt, *.md below DIR, the "
        "last three also as .gz; or one such file",
    )
    corpus.add_argument(
        "--num-shards",
        type=whole_number(-1, TEST_SHARD),
        default=10,
        metavar="N",
        help="climbmix training shards (default 10; -1: all 6,541)",
    )
    for name, (smallest, largest, meaning) in SETTINGS.items():
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=whole_number(smallest, largest),
            metavar="N",
            help=f"{meaning} (default {PRESETS['climbmix'][name]}, demo {PRESETS['demo'][name]})",
        )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace the prepared set (downloads and the ledger are kept)",
    )
    return parser


def main(argv: list[str] | None = None):
    prepare_output()
    args = command_line().parse_args(argv)
    if args.num_shards == 0:
        raise Fail("--num-shards 0: give at least 1, or -1 for all")
    corpus = "climbmix"
    if args.demo:
        corpus = "demo"
    elif args.data:
        corpus = "text"
    settings = {name: getattr(args, name) or PRESETS[corpus][name] for name in SETTINGS}
    if corpus == "climbmix":
        settings["num_shards"] = args.num_shards
    try:
        with lock_cache(cache_dir()):
            try:
                prepare(corpus, args.data, settings, args.force)
            finally:
                for directory in (unpacked_dir(), cache_dir() / "unfinished"):
                    shutil.rmtree(directory, ignore_errors=True)
    except OSError as error:  # the disk is full, a folder may not be written to, ...
        problem = file_problem(error)
        if isinstance(error, BrokenPipeError):
            problem = "the program that reads the output has ended (`| head`?): leave it out"
        raise Fail(f"{problem}; downloads are kept: then run the same command again") from None


if __name__ == "__main__":

    def interrupted(*_):
        # At once, whatever the threads are doing: nothing unfinished has its final name.
        os.write(2, b"\nFAIL: interrupted; downloads are kept: run the same command again\n")
        os._exit(130)

    signal.signal(signal.SIGINT, interrupted)
    try:
        main()
    except Fail as failure:
        print(failure, file=sys.stderr, flush=True)
        os._exit(1)  # without waiting for threads
