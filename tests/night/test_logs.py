"""Logs of experiments as others write them: shapes, made up here."""

import json
import subprocess
import sys

import pytest

from autoresearch.night.logs import read_log

H = "commit\tmetric\tmemory_gb\tstatus\tdescription\n"


def read(tmp_path, text: str, name: str = "results.tsv"):
    path = tmp_path / name
    path.write_text(text)
    return read_log(path, "val_bpb", True)


def row(first: str, *cells) -> str:
    return "\t".join([first, *map(str, cells)]) + "\n"


SHAPES = {
    # name: (text, metric, lower is better, statuses, scores)
    "another metric, rising": (
        row("commit", "tflops", "memory_gb", "status", "description")
        + row("a1b2c3d", 100.5, 1, "keep", "baseline")
        + row("b1b2c3d", 120.5, 1, "KEPT", "tiles")
        + row("c1b2c3d", 90.0, 1, "reverted", "no")
        + row("d1b2c3d", 0, 1, "reverted", "it failed"),
        *("tflops", False, "keep keep discard crash", [100.5, 120.5, 90.0, None]),
    ),
    "ids, no commit, time first": (
        row("exp", "seconds", "val_rmse", "status", "notes")
        + row("exp001", 12, 3.5, "baseline", "start")
        + row("exp002", 11, 3.1, "improved", "wider")
        + row("exp003", 11, 999, "no improvement", "diverged"),
        *("val_rmse", True, "keep keep crash", [3.5, 3.1, None]),
    ),
    "a remark says the direction": (
        "# metric_direction: higher\n# by hand\n"
        + row("commit", "quality", "status", "description")
        + row("x", 0.9, "keep", "first")
        + row("y", 0.9, "checks_failed", "second"),
        *("quality", False, "keep crash", [0.9, None]),
    ),
    "tabs in the description, units, crlf": (
        (
            row("commit", "pass_rate", "status", "description")
            + row("x", "45.2%", "keep", "one", "two", "three")
            + row("y", "1,045.0", "discard", "far")
        ).replace("\n", "\r\n"),
        *("pass_rate", False, "keep discard", [45.2, 1045.0]),
    ),
    "commas": (
        'run,latency_ms,status,description\n1,12.5,keep,first\n2,11.0,keep,"b, c"\n3,,crash,no\n',
        *("latency_ms", True, "keep keep crash", [12.5, 11.0, None]),
    ),
    "negative scores": (
        row("commit", "sharpe", "status", "description")
        + row("x", -0.5, "keep", "first")
        + row("y", 0.1, "keep", "second"),
        *("sharpe", False, "keep keep", [-0.5, 0.1]),
    ),
    "only a time": (
        row("commit", "time_s", "status", "description") + row("x", 9.5, "keep", "first"),
        *("time_s", True, "keep", [9.5]),
    ),
    "100 is a score where others are near": (
        row("commit", "accuracy", "status", "description")
        + row("x", 97, "keep", "first")
        + row("y", 100, "discard", "too good")
        + row("z", 0, "discard", "broken"),
        *("accuracy", False, "keep discard crash", [97.0, 100.0, None]),
    ),
    "the wanted metric in another place": (
        row("id", "steps", "val_bpb", "decision") + row("baseline", 50, 0.99, "Accepted"),
        *("val_bpb", True, "keep", [0.99]),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_log_of_others_is_read(tmp_path, name):
    text, metric, lower, statuses, scores = SHAPES[name]
    log = read(tmp_path, text)
    assert (log.metric, log.lower_is_better, log.bad, log.problem) == (metric, lower, [], "")
    assert [row["status"] for row in log.rows] == statuses.split()
    assert [row["score"] for row in log.rows] == scores


def test_an_object_a_line_with_a_line_of_settings(tmp_path):
    lines = [
        {"type": "config", "name": "sort", "metricName": "total_µs", "bestDirection": "lower"},
        {
            "run": 1,
            "commit": "abc1234",
            "metric": 15200,
            "status": "keep",
            "description": "baseline",
        },
        {"run": 2, "commit": "bbc1234", "metric": 16000, "status": "discard", "description": "no"},
        {"run": 3, "commit": "cbc1234", "metric": 0, "status": "crash", "description": "exit 1"},
    ]
    log = read(tmp_path, "".join(json.dumps(line) + "\n" for line in lines), "results.jsonl")
    assert (log.metric, log.lower_is_better, log.why) == ("total_µs", True, "as the log says")
    assert [(r["commit"], r["score"]) for r in log.rows] == [
        ("abc1234", 15200.0),
        ("bbc1234", 16000.0),
        ("cbc1234", None),
    ]


def test_what_cannot_be_read_says_which_column_is_missing(tmp_path):
    log = read(tmp_path, row("commit", "loss", "description") + row("x", 1.0, "first"))
    assert log.problem.startswith(
        "all 1 rows were skipped: no column is called status, only commit"
    )
    log = read(tmp_path, row("commit", "status", "description") + row("x", "keep", "first"))
    assert "no column is called a metric, only commit, status, description" in log.problem
    log = read(
        tmp_path, row("commit", "loss", "status") + row("x", 1.0, "keep") + row("y", "?", "keep")
    )
    assert log.bad == ["line 3: y ? keep"] and len(log.rows) == 1


def test_the_night_reads_a_log_of_others_by_its_metric_and_direction(fresh, tmp_path):
    lab = fresh.copy(tmp_path / "it")
    (lab.root / "results.tsv").write_text(SHAPES["another metric, rising"][0])
    said = lab.say("audit", "--json")
    assert json.loads(said)["summary"]
    page = ["-c", "from autoresearch.night import report; print(report.metric_line())"]

    told = subprocess.run([sys.executable, *page], cwd=lab.root, env=lab.env, capture_output=True)
    assert told.stdout == b"metric: tflops, higher is better (as the kept scores rise)\n"
