"""The command line: ``kvbelt COMMAND …``.

A wrong argument or settings file is reported in one line on standard error, with exit status 2.
"""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple

from kvbelt import __version__
from kvbelt.errors import KVBeltError
from kvbelt.ops.parser import GroupedParser, Parser

_START, _WATCH, _PARTS, _TRY = "start here", "look at what runs", "start the parts by themselves", "try and plan"


class Command(NamedTuple):
    """A command, and the module that has its ``add_arguments(parser)`` and ``run(args)``, which gives the status.

    The module is loaded only if its command is given, so that ``--help`` is quick. A command with commands of its own
    sets ``run`` for each of them.
    """

    name: str
    group: str
    about: str
    module: str


COMMANDS = (
    Command("demo", _START, "start a prefill and a decode worker, ask one question, show where its time went", "demo"),
    Command("up", _START, "start a whole deployment: workers, belt and proxy", "up"),
    Command("doctor", _START, "find what is wrong, causes first: before a start, or while it runs", "doctor.command"),
    Command("top", _WATCH, "watch workers, rates and times in the terminal", "top"),
    Command("why", _WATCH, "show where one request's time went, and why it took its path", "why"),
    Command("workers", _WATCH, "list, add, drain, remove, restart and replace workers", "workers"),
    Command("proxy", _PARTS, "the OpenAI API in front of prefill and decode workers", "proxy_command"),
    Command("worker", _PARTS, "one prefill or decode worker with the embedded engine", "worker_command"),
    Command("keys", _PARTS, "make keys for the control sockets", "keys_command"),
    Command("deploy", _PARTS, "write manifests for Kubernetes", "deploy.command"),
    Command("simulate", _TRY, "compare placements under a load, on a virtual clock instead of GPUs", "simulate"),
    Command("chaos", _TRY, "put load and faults on a deployment and check its guarantees", "chaos.command"),
    Command("verify", _TRY, "compare a deployment's answers with one server's, field by field", "verify.command"),
    Command("completion", _TRY, "print the script that completes kvbelt in a shell", "completion_command"),
)


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """Build the command line. Parsed arguments carry ``run``, a function, and ``parser``, of their command.

    Args:
        only: the one command to load; None: all.
    """
    groups: dict[str, list[str]] = {}
    for command in COMMANDS:
        groups.setdefault(command.group, []).append(command.name)
    parser = GroupedParser(
        prog="kvbelt",
        description="Serves a language model on prefill workers and decode workers, behind one OpenAI API.",
        epilog="kvbelt COMMAND --help has examples. Documentation: https://github.com/kvbelt/kvbelt/tree/main/docs",
        usage="kvbelt COMMAND …",
        groups=groups,
    )
    parser.set_defaults(build_parser=build_parser)
    parser.add_argument("--version", action="version", version=f"kvbelt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        made = commands.add_parser(
            command.name, help=command.about, description=f"{command.about[0].upper()}{command.about[1:]}."
        )
        if only in (None, command.name):
            module = importlib.import_module(f"kvbelt.ops.{command.module}")
            module.add_arguments(made)
            made.set_defaults(run=getattr(module, "run", None), parser=made)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        try:
            return _run(words)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as head, has what it wanted. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(words: list[str]) -> int:
    given = next((word for word in words if not word.startswith("-")), "")
    args, unknown = build_parser(given).parse_known_args(words)
    if unknown:
        args.parser.unknown(unknown[0])
    try:
        status: int = args.run(args)
    except KVBeltError as error:
        sys.stderr.write(f"kvbelt: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
