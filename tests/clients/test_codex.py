"""Codex, the real one, with the preset of `night.py agent codex` and a scripted model."""

import subprocess

import pytest
from client_lab import ClientLab, check_night
from scripted_model import ScriptedModel

CONFIG = """
model_provider = "scripted"
model = "scripted"
[model_providers.scripted]
name = "scripted"
base_url = "{url}/v1"
wire_api = "responses"
"""


def shell(command: str) -> tuple:
    return "exec_command", {"cmd": command, "yield_time_ms": 30_000}


def test_a_night_in_a_fresh_clone_that_nobody_has_trusted(tmp_path):
    lab = ClientLab.cloned(tmp_path, "codex")
    sandbox = subprocess.run(["codex", "sandbox", "true"], env=lab.env, capture_output=True)
    if sandbox.returncode:
        pytest.skip("Codex's sandbox does not work here: no user namespaces")

    def edit():
        width = lab.width()
        lines = f"@@\n-WIDTH = {width}\n+WIDTH = {width + 1}\n"
        patch = f"*** Begin Patch\n*** Update File: train.py\n{lines}*** End Patch\n"
        return shell(f"apply_patch <<'EOF'\n{patch}EOF")[1]

    edited = ("exec_command", edit)
    ugly = "'wider, `x` costs $5; \"quoted\" & more\n# a second line'"
    allowed = [
        shell("uv run night.py"),
        shell("uv run night.py begin"),
        shell("uv run night.py wait 25"),
        shell("cat train.py"),
        edited,
        shell(f"uv run night.py try {ugly} --expect -1e-2"),
        shell("uv run night.py wait 25 | tail -20"),
        shell("uv run night.py show 4"),
        edited,
        shell(f"cd {lab.root} && uv run night.py try 'wider still'; echo said"),
        shell("uv run night.py wait 25"),
        shell("uv run night.py bring best && uv run night.py runs"),
    ]
    denied = {
        "uv run night.py stop": "rejected: this command is the human's",
        "uv run night.py confirm --seeds 2": "rejected: this command is the human's",
        "echo no; uv run night.py agent codex": "rejected: this command is the human's",
        "git commit -qam mine": "Read-only file system",
        "uv run night.py try - <<'EOF'\nx\nEOF": "type the night's command alone",
        "uv run night.py wait 25 2>&1": "type the night's command alone",
    }
    two = [edited, shell("uv run night.py try wider"), shell("uv run night.py wait 25")]
    with ScriptedModel([[*allowed, *map(shell, denied)], two * 2]) as model:
        (lab.home / ".codex").mkdir(exist_ok=True)
        (lab.home / ".codex/config.toml").write_text(CONFIG.format(url=model.url))
        said = lab.run("codex", "--experiments", 8)
    answers = model.answers[0]
    for (_, arguments), answer in zip(allowed, answers):
        assert "exited with code 0" in answer or "Exit code: 0" in answer, (arguments, answer)
    assert "4: keep  val_bpb 0.990000" in answers[6] and "got -0.009900" in answers[6]
    message = lab.records()[3]["message"]
    assert message == 'wider, `x` costs $5; "quoted" & more # a second line'
    for (command, says), answer in zip(denied.items(), answers[len(allowed) :]):
        assert says in answer, (command, answer)
    check_night(lab, model, said)
