"""Edits of the real train.py that would lower the score: refused with one FAIL line, or without effect.

test_leaks.py has many more models that see the future or learn while they are scored.
"""

import pytest
from drive import edited, run_small, score
from forks import assert_failed

WHILE = "    while clock.elapsed + step_seconds < budget:\n"
TRAIN = "    train(model, optimizer, hp, loader, warm.parts, budget, progress)\n"
SCORE = "    bpb = evaluate_bpb(model, tokenizer, warm.eval_batch)\n"
ATTEND = "        y = self.attend(q, k, v, self.window)  # (B, T, n_head, D)\n"
THREE_STEPS = (WHILE, "    while step < 3:\n")  # no case needs more, and they take no time

# name: (the edits, words of the FAIL line)
REFUSED = {
    "trains into the tolerance": (
        [(WHILE, "    while clock.elapsed < budget + 1:\n")],
        ["trained ", " s on a 2 s budget"],
    ),
    "trains on the validation split": (
        [(TRAIN, '    loader = make_dataloader(tokenizer, 4, T, "val", device)\n' + TRAIN)],
        ["make_dataloader gives out only `train`"],
    ),
    "never draws a batch": ([(TRAIN, "")], ["no training batch was drawn"]),
    "scores twice": ([THREE_STEPS, (SCORE, SCORE + SCORE)], ["scored already"]),
    "edits the manifest": (
        [(TRAIN, '    manifest()["time_budget"] = 600\n' + TRAIN)],
        ["TypeError: 'mappingproxy'"],
    ),
    "moves the clock": (
        [THREE_STEPS, (SCORE, "    clock.began = clock.elapsed\n" + SCORE)],
        ["AttributeError: 'Clock' object"],
    ),
    "reads one token ahead": (
        [THREE_STEPS, (ATTEND, ATTEND + "        y = y + y.roll(-1, 1)\n")],
        ["sees the future"],
    ),
    "reads the mean of the row": (
        [THREE_STEPS, (ATTEND, ATTEND + "        y = y + v.mean(1, keepdim=True)\n")],
        ["sees the future"],
    ),
    "reads ahead only while it is scored": (
        [THREE_STEPS, (ATTEND, ATTEND + "        y = y if self.training else y.roll(-1, 1)\n")],
        ["sees the future"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_cheat_is_one_fail_line_and_no_score(processes, tmp_path, name):
    edits, words = REFUSED[name]
    assert_failed(run_small(processes, tmp_path, edited(edits)), *words)


def test_more_bytes_a_token_and_a_cheaper_loss_change_nothing(processes, tmp_path):
    """Four times the bytes would be a quarter of the score, a loss of zero a score of zero."""
    cheaper = (
        "    tokenizer.token_bytes *= 4\n"
        "    F.cross_entropy = F.log_softmax = lambda *a, **k: torch.zeros(())\n"
    )
    honest = run_small(processes, tmp_path, edited([THREE_STEPS]))
    cheating = run_small(processes, tmp_path, edited([THREE_STEPS, (SCORE, cheaper + SCORE)]))
    assert score(cheating) == pytest.approx(score(honest), rel=0.1)
