"""
night.py: the night's command line. Nobody edits it; its mechanics are in autoresearch/night/.

    uv run night.py                    where the night stands, and what comes next
    uv run night.py begin              the branch, the table of results, the baseline with three seeds
    uv run night.py try "..."          takes the edits of train.py as one experiment and queues it
    uv run night.py wait [SECONDS]     until something ended, 45 s at most
    uv run night.py show N             diff, losses beside the best's, end of the log
    uv run night.py bring N|best       N's change back into train.py; or train.py as the best has it
    uv run night.py drop N             gives up what waits or runs
    uv run night.py stop               ends what runs, for `begin` to run again; nothing starts
    uv run night.py runs [COUNT]       the ledger as a table
    uv run night.py audit              what speaks against the results
    uv run night.py confirm            baseline and best on the test split: is the gain real?

A command changes files and git, and starts the supervisor (`night.py supervise`), a detached process
that runs what is queued. Standard library only, Ray apart. Linux and macOS.
"""

from __future__ import annotations

import argparse
import math

from autoresearch.common import ROOT, Fail, Parser
from autoresearch.night import audit, commands, confirm, status, supervisor
from autoresearch.night.ray_engine import RayEngine
from autoresearch.night.settings import cluster_address
from autoresearch.night.store import Night
from autoresearch.night.worker import LocalEngine

WAIT = 45  # seconds; agents' tools allow a command a minute or two


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="night.py", description="The mechanics of the night.", allow_abbrev=False)
    adding = parser.add_subparsers(dest="command")

    def add(name: str, words: str | None = None) -> argparse.ArgumentParser:
        shown = {} if words is None else {"help": words}
        return adding.add_parser(name, allow_abbrev=False, **shown)

    add("begin", "the branch, the table, the baseline with three seeds; or goes on")
    option = add("try", "the edits of train.py as one experiment").add_argument
    option("message", help="what changes; what is expected")
    option("--simpler", action="store_true", help="less code: an equal score is kept")
    option("--expect", type=finite, metavar="CHANGE", help="of the score, such as -0.003")
    option = add("wait", "until something ended").add_argument
    option("seconds", type=finite, nargs="?", default=WAIT)
    add("show", "diff, losses, end of the log").add_argument("n", type=int)
    add("bring", "N's change back into train.py, or `best`").add_argument("what")
    add("drop", "gives up what waits or runs").add_argument("n", type=int)
    add("stop", "ends what runs; nothing starts before you say begin")
    add("runs", "the ledger as a table").add_argument("count", type=int, nargs="?", default=30)
    add("audit", "what speaks against the results")
    option = add("confirm", "baseline and best on the test split: is the gain real?").add_argument
    option("--seeds", type=int, metavar="N", help="of each; 3 if not said")
    add("supervise")  # by the other commands
    return parser.parse_args(argv)


def make_engine(night: Night):
    address = cluster_address()
    return RayEngine(night, address) if address else LocalEngine(night)


def main(argv: list[str] | None = None):
    args = parse(argv)
    if args.command == "supervise":
        return supervisor.supervise(make_engine)
    if args.command == "runs":
        return commands.list_runs(args.count)
    if args.command == "audit":
        return audit.say_audit()
    night = Night()
    if args.command not in (None, "begin") and not night.begun():
        raise Fail("no night has begun: uv run night.py begin")
    if args.command == "wait":
        return commands.wait(night, args.seconds)
    if args.command == "confirm":
        return confirm.confirm(night, args.seeds)
    with night.command():
        if night.begun():
            supervisor.wake(night)  # whatever the command says then, the night goes on
        if args.command is None:
            status.print_status(night)
        elif args.command == "begin":
            commands.begin(night)
        elif args.command == "try":
            commands.try_(night, args.message, args.simpler, args.expect)
        elif args.command == "show":
            commands.show(night, args.n)
        elif args.command == "bring":
            commands.bring(night, args.what)
        elif args.command == "drop":
            commands.drop(night, args.n)
        elif args.command == "stop":
            commands.stop(night)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise Fail("interrupted; what runs goes on: uv run night.py") from None
    except OSError as error:
        place, problem = error.filename or ROOT, error.strerror or error
        raise Fail(
            f"{place}: {problem}; nothing is lost: mend that, then run the same again"
        ) from None
