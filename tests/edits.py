"""Edits of train.py as an agent makes them, run by a fork server (forks.py) that has imported drive."""

import re

from forks import Forks, Ran
from miniature import ROOT

SOURCE = (ROOT / "train.py").read_text()
SMALL = dict(N_LAYER=2, N_EMBD=32, HEAD_DIM=16, TOKENS_PER_STEP=512, DEVICE_BATCH_SIZE=4)


def edited(replacements) -> str:
    """train.py's text; replacements: [(a text that stands once in it, what stands there then)]."""
    text = SOURCE
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def run_small(processes: Forks, folder, text: str) -> Ran:
    """Runs the text as train.py, with a size that makes some steps within the miniature's budget."""
    values = "".join(f"    {name} = {value!r}\n" for name, value in SMALL.items())
    text = text.replace("SIZES = {", f"class Small(CPU):\n{values}\n\nSIZES = {{")
    script = folder / "train.py"
    script.write_text(text.replace('"cpu": CPU', '"cpu": Small'))
    return processes.run(
        f"import runpy, sys; sys.argv = [{str(script)!r}]\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )


def score(ran: Ran) -> float:
    return float(re.search(r"^val_bpb: (\d\.\d{6})$", ran.log, re.M)[1])
