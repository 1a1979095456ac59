"""results.tsv, written and read: the night's own table, and logs as they are found in the wild."""

import pytest

from autoresearch.night.results import read_results, row_of, write_row

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
GOOD = "aaaaaaa\t1.0\t44.0\tkeep\tbaseline\nbbbbbbb\t0.99\t44.5\tdiscard\tone\nccccccc\t0\t0\tcrash\ttwo\n"


def read(tmp_path, text: str | bytes):
    path = tmp_path / "results.tsv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_results(path)


def record(**more) -> dict:
    plain = {"commit": "0123456789", "score": 0.9, "memory_gb": 44.04, "status": "keep", "seed": 42}
    words = {"kind": "try", "message": "wider", "why": "better", "simpler": False, "again": []}
    return {**plain, **words, **more}


KEPT = "0123456\t0.900000\t44.0\tkeep\t"
REJECTED = {"status": "discard", "why": "rejected (conflict): as abc1234"}


@pytest.mark.parametrize(
    "more, row",
    # fmt: off
    [
        ({}, KEPT + "wider"),
        (
            {"score": None, "status": "crash", "why": "no room"},
            "0123456\t0.000000\t0.0\tcrash\twider [no room]",
        ),
        (REJECTED, "0123456\t0.900000\t44.0\tdiscard\twider [rejected (conflict): as abc1234]"),
        ({"simpler": True}, KEPT + "simpler: wider"),
        ({"kind": "baseline", "seed": 43}, KEPT + "baseline, seed 43"),
        ({"displaced": "fedcba9876"}, KEPT + "wider [displaces fedcba9]"),
        (
            {"again": ["cut off", "cut off: its node was lost"]},
            KEPT + "wider [ran again, cut off: its node was lost]",
        ),
        ({"message": 'a\t"b"\n\x1bc'}, KEPT + "a 'b'  c"),
    ],
    # fmt: on
)
def test_a_row_of_the_table_has_five_columns_whatever_was_said(more, row):
    assert row_of(record(**more)) == row


def test_a_row_is_written_once_and_the_rest_of_the_table_stays_as_it_is(tmp_path):
    path = tmp_path / "results.tsv"
    one, two = record(), record(commit="b" * 40, message="deeper")
    write_row(path, one, [one])
    assert path.read_text() == HEADER + row_of(one) + "\n"
    for _ in range(2):  # a command that was cut off is typed again
        write_row(path, two, [one, two])
        assert path.read_text() == HEADER + row_of(one) + "\n" + row_of(two) + "\n"
    path.unlink()
    write_row(path, two, [one, two])
    assert path.read_text() == HEADER + row_of(one) + "\n" + row_of(two) + "\n"


WAYS = {
    "plain": HEADER + GOOD,
    "crlf": (HEADER + GOOD).replace("\n", "\r\n"),
    "blank lines, bom": "\ufeff" + (HEADER + GOOD).replace("\n", "\n\n"),
    "a remark": "# metric_direction: lower\n# by hand\tyes\n#" + HEADER + GOOD,
    "case": HEADER.upper() + GOOD.replace("keep", " KEEP ").replace("crash", "Crash"),
    "a column more": "".join("x\t" + line for line in (HEADER + GOOD).splitlines(True)),
}


@pytest.mark.parametrize("text", WAYS.values(), ids=WAYS)
def test_the_same_rows_however_they_are_written(tmp_path, text):
    rows, skipped = read(tmp_path, text)
    assert not skipped
    assert [(r.commit, r.score, r.memory_gb, r.status, r.what) for r in rows] == [
        ("aaaaaaa", 1.0, 44.0, "keep", "baseline"),
        ("bbbbbbb", 0.99, 44.5, "discard", "one"),
        ("ccccccc", None, None, "crash", "two"),
    ]


def test_what_is_no_row_is_skipped_in_one_sentence(tmp_path):
    ids = ["001", "none", "", "ABCDEF0"]  # are any text
    good = "".join(f"{i}\t0.9\tmuch\tkeep\twhat\n" for i in ids)
    broken = ["hello", "x\t0.9\t1\tmaybe", "x\tnan\t1\tkeep", "x\t0.000000\t1\tkeep"]
    text = HEADER + good + "\n".join(broken) + "\n\x0b \u2028\n"
    rows, skipped = read(tmp_path, text.encode() + b"\xff\xfe\n")
    assert [row.commit for row in rows] == ids and rows[0].memory_gb is None
    assert [row.hash for row in rows] == [None, None, None, "abcdef0"]
    assert skipped == [
        "5 rows were skipped, a row needs a status such as keep, discard, crash and a number as val_bpb: "
        "line 6: hello, line 7: x 0.9 1 maybe, line 8: x nan 1 keep and 2 more"
    ]
    rows, skipped = read(tmp_path, "id\tval_rmse\tgain\n" + "1\t3.5\tkeep\n" * 500)
    words = "all 500 rows were skipped: no column is called status, only id, val_rmse, gain; "
    assert rows == [] and skipped[0].startswith(words)
