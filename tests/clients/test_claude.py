"""Claude Code, the real one, with the preset of `night.py agent claude` and a scripted model."""

from client_lab import ClientLab, check_night
from scripted_model import ScriptedModel


def bash(command: str) -> tuple:
    return "Bash", {"command": command, "description": "a command of the night"}


def test_a_night_in_a_fresh_clone_that_nobody_has_trusted(tmp_path):
    lab = ClientLab.cloned(tmp_path, "claude")
    train = str(lab.root / "train.py")
    read = ("Read", {"file_path": train})

    def edit():
        width = lab.width()
        lines = {"old_string": f"WIDTH = {width}\n", "new_string": f"WIDTH = {width + 1}\n"}
        return {"file_path": train, **lines}

    ugly = "'wider, `x` costs $5; \"quoted\" & more\na second line'"
    allowed = [
        bash("uv run night.py"),
        bash("uv run night.py begin"),
        bash("uv run night.py wait 60"),
        read,
        ("Edit", edit),
        bash(f"uv run night.py try {ugly} --expect -1e-2"),
        bash("uv run night.py wait 60 2>&1 | tail -20"),
        bash("uv run night.py show 4"),
        read,
        ("Edit", edit),
        bash("uv run night.py try - <<'EOF'\nit's `wider` still\n# $5\nEOF"),
        bash(f"cd {lab.root} && uv run night.py wait 60"),
        bash("uv run night.py bring best && uv run night.py runs"),
    ]
    denied = [
        bash("uv run night.py stop"),
        bash("uv run night.py confirm --seeds 2"),
        bash("echo no; uv run night.py agent claude"),
        bash("rm -rf .night"),
        bash("cat /etc/hostname"),
        ("Read", {"file_path": "/etc/hostname"}),
        ("Read", {"file_path": str(lab.root / "prepare.py")}),  # allowed, for the next one
        ("Edit", {"file_path": str(lab.root / "prepare.py"), "old_string": "l", "new_string": "L"}),
        ("Write", {"file_path": str(lab.root / "helper.py"), "content": "x = 1"}),
        ("Agent", {"prompt": "x", "description": "x"}),
        ("EnterWorktree", {}),
    ]
    two = [read, ("Edit", edit), bash("uv run night.py try wider"), bash("uv run night.py wait 60")]
    with ScriptedModel([[*allowed, *denied], two * 2]) as model:
        lab.env |= {"ANTHROPIC_BASE_URL": model.url, "ANTHROPIC_API_KEY": "none"}
        lab.env |= {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}
        said = lab.run("claude", "--experiments", 8)
    answers = model.answers[0]
    for (tool, arguments), answer in zip(allowed, answers):
        assert not answer.startswith("ERROR"), (tool, arguments, answer)
    assert "4: keep  val_bpb 0.990000" in answers[6] and "got -0.009900" in answers[6]
    assert [record["message"] for record in lab.records()[3:5]] == [
        'wider, `x` costs $5; "quoted" & more a second line',
        "it's `wider` still # $5",
    ]
    for (tool, arguments), answer in zip(denied, answers[len(allowed) :]):
        assert answer.startswith("ERROR") == ("prepare" not in str(arguments) or tool == "Edit"), (
            answer
        )
    check_night(lab, model, said)
    sessions = [line for line in lab.journal() if line["kind"] == "session"]
    assert all(session["dollars"] > 0 for session in sessions[:-1])
    assert "a kept change" in lab.say()
