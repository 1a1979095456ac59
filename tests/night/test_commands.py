"""The commands as an agent types them: what they say, what they refuse, what they leave alone."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest


def test_wait_tells_the_phase_and_returns_when_something_ended(lab):
    message = "wider\tin\nevery\x1b[31m way " + "x" * 10_000
    n = lab.attempt(message, "--expect", "-0.01", HOLD="a", WIDTH=1)
    lab.until_held(n)
    said = lab.say("wait", 0)
    assert f"{n}: training 40%, loss 2.6 (best at 40%: 2.6), 40 tokens/s  (wider in every" in said
    waiting = lab.start("wait", 50)
    (lab.cache / "go-a").touch()
    progress = lab.state_dir / f"nov21/queue/{n}/progress-1.jsonl"
    lab.until(lambda: "scoring" in progress.read_text())
    assert f"{n}: scoring" in lab.say("wait", 0)
    (lab.cache / "score-a").touch()
    said, err = waiting.communicate(timeout=20)  # long before its 50 s are over
    better = "0.009900 better than its base at 0.999900 (1 run, over 10 standard errors)"
    assert f"{n}: keep  val_bpb 0.990000: {better}" in said and not err
    assert "expected -0.010000, got -0.009900" in said
    assert lab.say("wait", 0).count("keep") == 0  # told once
    assert len(lab.rows()[-1]) == 5 and lab.rows()[-1][4].startswith("wider in every")
    # a crash shows the end of its traceback
    lab.until_ended(lab.attempt("a crash", EVENT=None))
    assert "   | NameError: name 'nonsense' is not defined" in lab.say("wait", 0)
    lab.check()


def test_the_queue_is_bounded_and_edits_beside_a_full_one_are_kept(lab):
    first = lab.attempt("one runs", WIDTH=1, HOLD="a")
    lab.until_held(first)
    two = [lab.attempt(f"two wait, {number}", DEPTH=number) for number in (1, 2)]
    lab.edit(COMMENT=1)
    said = lab.say()
    next_words = (
        "next: the queue is full: uv run night.py wait; train.py keeps its edits until then\n"
    )
    assert said.endswith(next_words)
    assert "2 experiments wait already" in lab.refused("try", "a fourth")
    lab.say("drop", two[0])
    assert lab.until_ended(two[0])["why"] == "dropped while it waited"
    lab.say("drop", first)
    assert lab.until_ended(first)["why"] == "dropped"
    lab.until_ended(two[1])
    assert "saved: uv run night.py bring edits-1 puts them back" in lab.say("bring", "best")
    assert b"COMMENT = 100" in (lab.root / "train.py").read_bytes()
    lab.say("bring", "edits-1")
    # a change of before, on top of these edits
    assert f"{two[0]}'s change is in train.py, on top of your edits" in lab.say("bring", two[0])
    assert b"DEPTH = 1\n" in (lab.root / "train.py").read_bytes()
    assert b"COMMENT = 1\n" in (lab.root / "train.py").read_bytes()
    lab.say("bring", "best")
    lab.check()


def test_many_commands_at_once_queue_nothing_twice_and_lose_nothing(lab):
    lab.edit(WIDTH=1)
    agents = [lab.start("try", f"agent {i}") for i in range(3)]
    agents += [lab.start(*words) for words in (["wait", 20], [], ["supervise"], ["supervise"])]
    answers = [agent.communicate(timeout=60) for agent in agents]
    assert sum(agent.returncode == 0 for agent in agents[:3]) == 1
    for agent, (_, err) in zip(agents, answers):
        no_edits = re.fullmatch(r"FAIL: train.py has no edits[^\n]*\n", err)
        assert agent.returncode == 0 or no_edits, err
    lab.until_ended(4)
    assert [record["n"] for record in lab.records()] == [1, 2, 3, 4]
    lab.say()
    lab.until_idle()
    lab.check()


def test_wait_returns_once_the_next_run_has_started_and_says_only_what_changed(lab):
    first = lab.attempt("wider", WIDTH=1, HOLD="a")
    second = lab.attempt("deeper", DEPTH=1, EVENT="hang")
    lab.until_held(first)
    said = lab.say("wait", 0)
    assert "best 1.000000" not in said and f"{second}: waiting" in said
    waiting = lab.start("wait", 50)
    lab.go("a")
    said, _ = waiting.communicate(timeout=20)
    assert f"{first}: keep" in said and "best 0.990000" in said
    assert re.search(rf"^{second}: (starting|compiling|training)", said, re.M), said
    lab.until_held(second)
    assert re.match(rf"{second}: training \d+%.*\nnext: edit train.py", lab.say("wait", 0))
    lab.say("drop", second)
    lab.until_ended(second)
    queued, ran = lab.git("rev-parse", "refs/autoresearch/nov21/5"), lab.record(5)["commit"]
    explained = f"queued as {queued[:7]}, ran as {ran[:7]}: the same change on the new best"
    assert explained in lab.say("show", second)


def test_a_message_may_hold_anything_and_the_last_line_of_every_command_says_what_comes_next(lab):
    message = "two lines:\n# `touch wrong` $5 \"quotes\" and 'quotes'; -1e-3 < 0"
    lab.edit(WIDTH=1, HOLD="a")
    command = [sys.executable, "night.py", "try", "-", "--expect", "-1e-3"]
    done = subprocess.run(
        command, cwd=lab.root, env=lab.env, input=message, text=True, capture_output=True
    )
    assert done.stdout.splitlines()[-1].startswith("next: edit train.py"), done.stderr
    lab.until_held(4)
    lab.edit(NOTE=2)
    said = [lab.say(*words) for words in (["bring", "best"], ["bring", "edits-1"], ["show", "4"])]
    assert "+WIDTH = 1" in said[-1]
    said += [lab.say("show", "4", "--diff"), lab.say("audit"), lab.say("stop")]
    status = lab.say()
    assert "training" not in status  # it ended, or is being ended
    said += [status, lab.say("begin"), lab.say("bring", "best")]
    record = lab.until_ended(4, go="a")
    assert record["message"] == message.replace("\n", " ") and record["expect"] == -0.001
    shown = lab.say("show", "4")
    assert "   | val_bpb: 0.990000" in shown and "loss (its base's): 10% 2.900 (2.900)" in shown
    runs = lab.say("runs")
    assert re.search(rf"{record['commit'][:7]} .* 0.990000 .* 0.100 +20,000 .* two lines", runs)
    for text in [*said, shown, runs, lab.say("wait", 0)]:
        assert text.splitlines()[-1].startswith("next: "), text


def test_edits_made_before_the_night_began_are_put_aside_and_brought_back(fresh, tmp_path):
    lab = fresh.copy(tmp_path / "it")
    before = (lab.root / "train.py").read_text()
    lab.edit(WIDTH=1)
    edited = (lab.root / "train.py").read_text()
    assert lab.say("bring", "best").endswith("next: uv run night.py begin\n")
    assert (lab.root / "train.py").read_text() == before
    lab.say("begin")
    lab.say("bring", "edits-1")
    assert (lab.root / "train.py").read_text() == edited
    lab.until_idle()


def test_what_is_no_python_is_not_queued(lab):
    (lab.root / "train.py").write_text("WIDTH = = 0\n")
    said = lab.refused("try", "a slip of the finger")
    assert "train.py is not Python (invalid syntax (train.py, line 1)): fix it" in said
    assert lab.queue() == [] and "= = 0" in (lab.root / "train.py").read_text()


def test_an_experiment_without_a_git_identity_is_committed_under_the_nights_own(lab):
    for name in ("user.name", "user.email"):
        lab.git("config", "--unset", name)
    lab.git("config", "user.useConfigOnly", "true")
    commit = lab.until_ended(lab.attempt("quotes \" and ' and `$(x)`", WIDTH=1))["commit"]
    said = lab.git("log", "-1", "--format=%an %ae|%s", commit)
    assert said == "night night@localhost|quotes \" and ' and `$(x)`"


def test_a_commit_that_somebody_made_on_the_branch_is_not_lost(lab):
    lab.edit(NOTE=5)
    lab.git("commit", "-qam", "by hand")
    theirs = lab.git("rev-parse", "HEAD")
    lab.say()
    assert lab.git("rev-parse", "HEAD") == lab.record(1)["commit"]
    assert lab.git("rev-parse", f"refs/autoresearch/nov21/not-of-the-night-{theirs[:7]}") == theirs
    lab.check()


def test_commands_load_neither_torch_nor_numpy_nor_ray_and_need_no_installed_package(fresh):
    code = (
        "import sys, night; night.main([]);"
        "assert not {'torch', 'numpy', 'ray', 'prepare'} & set(sys.modules);"
        "assert 'autoresearch.kit' not in sys.modules and 'autoresearch.corpus' not in sys.modules"
    )
    command = [sys.executable, "-S", "-c", code]  # -S: without site-packages
    done = subprocess.run(command, cwd=fresh.root, env=fresh.env, capture_output=True, text=True)
    assert done.returncode == 0 and "next: uv run night.py begin" in done.stdout, done.stderr


def test_each_command_is_quick_with_ten_thousand_experiments(lab):
    records = lab.records()
    with open(lab.state_dir / "nov21/journal.jsonl", "a") as journal:
        for n in range(4, 10_004):
            more = dict(n=n, kind="try", status="discard", message=f"idea {n}", change=f"c{n}")
            journal.write(json.dumps({**records[2], **more}) + "\n")

    def spent(*words, times=3):
        """Seconds of a core, the least of three tries: other work can only add to it."""
        least = math.inf
        for _ in range(times):
            before = os.times()
            lab.say(*words)
            least = min(least, os.times().children_user - before.children_user)
        return least

    repeatable = ([], ["wait", "0"], ["show", "1"], ["bring", "best"])
    assert max(spent(*words) for words in repeatable) < 0.5
    lab.edit(WIDTH=1)
    assert spent("try", "one more", times=1) < 0.75  # it cannot be said twice
    assert lab.until_ended(10_004)["status"] == "keep"
    assert len(lab.rows()) == 1 + 4  # the table was not made anew


def no_repository(lab):
    shutil.rmtree(lab.root / ".git")


def detached(lab):
    lab.git("checkout", "-q", "--detach")


def page(line, name="tag"):
    def change(lab):
        text = (lab.root / "program.md").read_text()
        (lab.root / "program.md").write_text(re.sub(rf"^- {name}: .*\n", line, text, flags=re.M))

    return change


def put(name, text):
    return lambda lab: (lab.root / name).write_text(text)


def constants(**values):
    return lambda lab: lab.edit(**values)


def unprepared(lab):
    (lab.cache / "manifest.json").unlink()


def same_as_before(lab):
    lab.until_ended(lab.attempt("a tie", NOTE=1))
    lab.say()
    lab.edit(NOTE=1)


ROW = "0123456\t1.000000\t0.0\tkeep\tbaseline\n"
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"


# fmt: off
@pytest.mark.parametrize(
    "template, before, words, says",
    [
        ("fresh", no_repository, ["begin"], "is no git repository.*: git init"),
        ("fresh", unprepared, ["begin"], "nothing is prepared in .*: run `uv run prepare.py`"),
        ("fresh", put("prepare.py", "#"), ["begin"], "not committed: prepare.py: commit it"),
        ("fresh", constants(WIDTH=1), ["begin"], "put them aside with `uv run night.py bring best`"),
        ("fresh", put("results.tsv", "experiment,loss\n1,2\n"), ["begin"], "other columns.*: mv results.tsv"),
        ("fresh", put("results.tsv", HEADER + ROW), ["begin"], "of another night: mv results.tsv"),
        ("fresh", page("- tag: ../../x\n"), [], "setting `tag: ../../x`: it cannot name a branch"),
        ("fresh", page(""), [], "program.md has no line `- tag: ...`: add it"),
        ("fresh", page("- limit: 20 minutes\n", "limit"), ["begin"], "setting `limit: 20 minutes`: it must"),
        ("begun", page("- tag: nov21\n- cluster: ray://x\n"), [], "must be HOST:PORT as `ray start --head`"),
        ("fresh", None, ["try", "x"], "no night has begun: uv run night.py begin"),
        ("begun", detached, [], "on autoresearch/nov21, this is a detached head: uv run night.py begin"),
        ("begun", None, ["try", "x"], "train.py has no edits: change it first"),
        ("begun", same_as_before, ["try", "x"], r"the change of experiment 4 \(discard, 1.000000\)"),
        ("begun", constants(NOTE=1), ["try", " \t\n"], "say what changes"),
        ("begun", constants(NOTE=200), ["try", "x", "--simpler"], "train.py has not become shorter"),
        ("begun", None, ["bring", "9"], "no experiment 9: they go from 1 to 3"),
        ("begun", None, ["bring", "what"], "it takes an experiment's number, best, on-N, or"),
        ("begun", None, ["bring", "edits-3"], "there are no edits-3: none"),
        ("begun", None, ["bring", "2"], r"2 \(baseline\) has no change: uv run night.py bring best"),
        ("begun", None, ["drop", "3"], r"3 has ended \(discard\)"),
    ],
)
# fmt: on
def test_what_cannot_be_done_is_one_line_and_changes_nothing(
    request, tmp_path, template, before, words, says
):
    lab = request.getfixturevalue(template).copy(tmp_path / "it")
    if before:
        before(lab)

    def state():
        names = ["train.py", "results.tsv", "program.md", ".night/nov21/journal.jsonl"]
        files = [(lab.root / name).read_bytes() for name in names if (lab.root / name).is_file()]
        refs = subprocess.run(["git", "show-ref", "--head"], cwd=lab.root, capture_output=True)
        return files, refs.stdout

    was = state()
    assert re.search(says, lab.refused(*words))
    assert state() == was
    if (lab.state_dir / "nov21/queue").is_dir():
        assert lab.queue() == []


def test_try_says_where_the_noise_hides_what_is_expected(lab):
    # seeds 42 to 44 score 1, 0.9999 and 0.9998: a noise of 0.0001
    lab.edit(COMMENT=1)
    assert "too small" not in lab.say("try", "all of the noise", "--expect", "-0.0001")
    lab.edit(COMMENT=2)
    said = lab.say("try", "a fifth of it", "--expect", "-0.00002")
    assert "   -2e-05 is too small to be seen: the noise of a run is 0.0001" in said
    lab.edit(COMMENT=3)
    assert "too small" not in lab.say("try", "nothing changes", "--expect", "0")
