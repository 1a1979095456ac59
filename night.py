"""
night.py: the night's command line. Nobody edits it; its mechanics are in autoresearch/night/.

    uv run night.py                    prints the state of the night and what to type next
    uv run night.py begin              makes the branch and results.tsv, queues the baseline
    uv run night.py try '...'          queues the edits of train.py as one experiment
    uv run night.py wait [SECONDS]     returns when an experiment has ended, after 45 s at most
    uv run night.py show N             prints the diff, the losses and the end of the log of N
    uv run night.py bring N|best       puts the change of N, or the best train.py, into train.py
    uv run night.py again N            runs an experiment that has no score once more
    uv run night.py drop N             gives up an experiment that waits or runs
    uv run night.py stop               ends all runs; `begin` continues and runs them again
    uv run night.py runs [COUNT]       prints the ledger as a table
    uv run night.py audit              checks results.tsv against the ledger and git
    uv run night.py confirm            compares baseline and best on the test split
    uv run night.py page               writes night.html; --serve PORT offers it on 127.0.0.1
    uv run night.py agent claude       starts a coding agent again and again, all night

Status, runs, audit and page take --json (docs/night-json.md). A command changes files and git, and
starts the supervisor (`night.py supervise`), a detached process that runs what is queued. Standard
library only, Ray apart. Linux and macOS.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from autoresearch.common import Fail, Parser, file_problem, prepare_output
from autoresearch.night import (
    agent,
    audit,
    begin,
    bring,
    commands,
    confirm,
    memory,
    new,
    objects,
    page,
    runs,
    show,
    status,
    supervisor,
    sweep,
)
from autoresearch.night.clients import CLIENTS
from autoresearch.night.ray_engine import RayEngine
from autoresearch.night.settings import NIGHT, cluster_address
from autoresearch.night.store import Night
from autoresearch.night.worker import LocalEngine

WAIT = 45  # seconds


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="night.py",
        description="Runs a night of experiments.",
        allow_abbrev=False,
    )
    as_object = {"action": "store_true", "help": "print one JSON object"}
    parser.add_argument("--json", **as_object)
    as_object["default"] = argparse.SUPPRESS  # a command's own default would hide the one above
    adding = parser.add_subparsers(dest="command")

    def add(name: str, **more) -> argparse.ArgumentParser:
        return adding.add_parser(name, allow_abbrev=False, **more)

    add("begin", help="make the branch and results.tsv, queue the baseline; or continue the night")
    option = add("try", help="queue the edits of train.py as one experiment").add_argument
    option("message", help="what changes; what is expected; - reads it from standard input")
    option("--simpler", action="store_true", help="less code: an equal score is kept")
    option("--on", type=int, metavar="N", help="on experiment N's line instead of the best")
    option("--expect", type=finite, metavar="CHANGE", help="of the score, such as -0.003")
    option = add("wait", help="return when an experiment has ended").add_argument
    longest = commands.LONGEST_WAIT
    option("seconds", type=finite, nargs="?", default=WAIT, help=f"{longest} at most")
    option = add("show", help="print the diff, the losses and the end of the log").add_argument
    option("n", type=int)
    option("--diff", action="store_true", help="the whole diff and nothing else")
    option = add("bring", help="put a change back into train.py").add_argument
    option("what", metavar="N|best|on-N|edits-N", help="a change, a whole file, saved edits")
    add("again", help="run an experiment that has no score once more").add_argument("n", type=int)
    add("drop", help="give up an experiment that waits or runs").add_argument("n", type=int)
    add("stop", help="end all runs; begin continues")
    option = add("runs", help="print the ledger as a table").add_argument
    option("count", type=int, nargs="?", default=30)
    option("--search", metavar="WORDS", help="experiments of all nights that have these words")
    option("--json", **as_object)
    option = add("note", help="append a lesson to lessons.md").add_argument
    option("message", help="what was learnt; - reads it from standard input")
    option = add("audit", help="check results.tsv against the ledger and git").add_argument
    option("--json", **as_object)
    option = add("confirm", help="compare baseline and best on the test split").add_argument
    option("--seeds", type=int, metavar="N", help="runs of each (default 3)")
    option = add("page", help="write night.html, the night to look at").add_argument
    option("--serve", type=int, metavar="PORT", help="offer it on 127.0.0.1 until Ctrl-C")
    option("--json", **as_object)
    option = add("sweep", help="propose values of the dimensions while a slot is free").add_argument
    option("--dims", default="", metavar="NAMES", help="these alone, by comma")
    option("--experiments", type=int, metavar="N")
    option("--hours", type=finite, metavar="H")
    option("--patience", type=int, default=20, metavar="N", help="end when N brought nothing")
    option = add("agent", help="start a coding agent again and again").add_argument
    option("client", nargs="?", choices=CLIENTS, help="or any other: agent -- COMMAND...")
    option("--until", metavar="HH:MM", help="local time at which it ends")
    option("--hours", type=finite, metavar="H")
    option("--experiments", type=int, metavar="N", help="of the whole night, without the baseline")
    option("--usd", type=finite, metavar="X", help="of the whole night, where the client tells")
    option = add("new", help="make a repository from one of examples/").add_argument
    option("example")
    option("folder")
    add("supervise")  # started by the other commands
    words = joined_numbers(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if words[:1] == ["agent"] and "--" in words else len(words)
    args = parser.parse_args(words[:cut])
    args.words = words[cut + 1 :]
    return args


def joined_numbers(argv: list[str]) -> list[str]:
    """`--expect -1e-3` as `--expect=-1e-3`: argparse takes the number for an option."""
    found: list[str] = []
    for word in argv:
        if found and found[-1] == "--expect":
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def make_engine(night: Night):
    address = cluster_address()
    return RayEngine(night, address) if address else LocalEngine(night)


class Renamed:
    """A stream on which `uv run night.py` reads as this night is really called: NIGHT."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(text.replace("uv run night.py", NIGHT))

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def main(argv: list[str] | None = None):
    args = parse(argv)
    if args.command == "supervise":
        return supervisor.supervise(make_engine, page.Refresher)
    if args.command == "runs" and args.search:
        return memory.say_search(Night(), args.search)
    if args.command == "runs":
        return objects.say_runs(args.count) if args.json else runs.list_runs(args.count)
    if args.command == "audit":
        return objects.say_audit() if args.json else audit.say_audit()
    if args.command == "new":
        return new.new(args.example, args.folder)
    night = Night()
    if args.command == "agent":
        return agent.agent(night, args.client, args.words, args)
    before_begin = args.command in (None, "begin") or vars(args).get("what") == "best"
    if not before_begin and not night.begun():
        raise Fail("no night has begun: uv run night.py begin")
    if args.command == "sweep":
        names = [name.strip() for name in args.dims.split(",") if name.strip()]
        return sweep.sweep(night, names, args.experiments, args.hours, args.patience)
    if args.command == "wait":
        return commands.wait(night, args.seconds)
    if args.command == "confirm":
        return confirm.confirm(night, args.seeds)
    if args.command == "page":
        return page.say_page(night, args.serve, args.json)
    if args.command in ("try", "note") and args.message == "-":
        args.message = sys.stdin.read()
    with night.command():
        if night.begun():
            supervisor.wake(night)  # even if the command then fails
        if args.command is None:
            objects.say_status(night) if args.json else status.print_status(night)
        elif args.command == "begin":
            begin.begin(night)
        elif args.command == "try":
            commands.try_(night, args.message, args.simpler, args.expect, args.on)
        elif args.command == "note":
            memory.note(night, args.message)
            print("next:", status.what_next(night))
        elif args.command == "show":
            show.show(night, args.n, args.diff)
        elif args.command == "bring":
            bring.bring(night, args.what)
        elif args.command == "again":
            commands.again(night, args.n)
        elif args.command == "drop":
            commands.drop(night, args.n)
        elif args.command == "stop":
            begin.stop(night)
            page.write_page(night)


if __name__ == "__main__":
    try:
        prepare_output()
        if NIGHT != "uv run night.py":
            sys.stdout, sys.stderr = Renamed(sys.stdout), Renamed(sys.stderr)
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head -1` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        raise Fail("interrupted; what runs continues: uv run night.py") from None
    except OSError as error:
        problem = file_problem(error)
        raise Fail(f"{problem}; nothing is lost: fix that, then run it again") from None
