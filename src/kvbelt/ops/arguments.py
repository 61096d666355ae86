"""Types of command-line values, whose errors contain the value; and arguments that commands have in common."""

import argparse
import re
from pathlib import Path
from typing import Any, TypeAlias

from kvbelt.limits import OPTION, limits_of
from kvbelt.routing.placement import Mode
from kvbelt.security.worker_api_key import load_worker_api_key

#: A parser, or a group of its options.
_Options: TypeAlias = argparse._ActionsContainer  # noqa: SLF001 -- argparse has no public name for both


def port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; give a number between 1 and 65535")
    return int(text)


def ports(text: str) -> list[int]:
    return [port(item) for item in text.split(",")]


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def hosts(text: str) -> list[str]:
    names = [host.strip() for host in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a host or a list of hosts")
    return names


def origins(text: str) -> tuple[str, ...]:
    """Of web pages. A list may also be written as vLLM takes it: ``["https://a", "https://b"]``."""
    names = tuple(name for item in text.strip("[]").split(",") if (name := item.strip(" \"'")))
    for name in names:
        if name != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", name):
            raise argparse.ArgumentTypeError(f"{name!r} is not an origin; give https://HOST[:PORT], or *")
    return names


def count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def level(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of milliseconds; 0 means no level")
    return value


def add_worker_key(parser: _Options) -> None:
    parser.add_argument(
        "--worker-api-key-file", type=Path, metavar="FILE",
        help="the --api-key of vLLM servers, for kvbelt's own questions to them (default: none)",
    )  # fmt: skip


def worker_key_of(args: argparse.Namespace) -> str | None:
    """The key that the arguments name; None without one. Raises SettingsError: the file holds no usable key."""
    file: Path | None = args.worker_api_key_file
    return load_worker_api_key(file) if file is not None else None


def add_limits(parser: _Options) -> None:
    parser.add_argument(
        OPTION, action="append", default=[], metavar="NAME=N",
        help="what one request may ask for, e.g. --limit sequences=4096; repeatable (docs/limits.md has the names)",
    )  # fmt: skip


def limit_arguments(args: argparse.Namespace) -> tuple[str, ...]:
    """The command line of what ``add_limits`` has read. Raises SettingsError: a limit is wrong."""
    limits_of(args.limit)
    return tuple(word for given in args.limit for word in (OPTION, given))


_LEVELS: dict[str, dict[str, Any]] = {
    "ttft": {"type": positive_number, "default": 500.0, "help": "service level: time to the first token"},
    "itl": {
        "type": level,
        "help": "service level: time between two tokens, for 99 of 100; prompts are computed in pieces so that "
        "requests beside them keep it (default: 50; none with --placement whole or without prefill workers; 0: none)",
    },
    "tpot": {"type": level, "default": 0.0, "help": "service level: mean time between tokens (default: none)"},
}  # fmt: skip


def add_placement(parser: _Options) -> None:
    """How requests are placed: the arguments of ``kvbelt proxy`` that ``kvbelt up`` hands on."""
    add = parser.add_argument
    add(
        "--placement", choices=[str(mode) for mode in Mode], default=str(Mode.ELASTIC),
        help="elastic: whole or split, by load; split: whole only where it must be; whole: never split",
    )  # fmt: skip
    for name, given in _LEVELS.items():
        add(f"--slo-{name}-ms", metavar="MS", **given)
    add("--min-prompt-tokens", type=count, default=0, metavar="N", help="shorter prompts are never split")


def placement_arguments(args: argparse.Namespace) -> tuple[str, ...]:
    """The command line of what ``add_placement`` has read."""
    given = {name: getattr(args, f"slo_{name}_ms") for name in _LEVELS}
    levels = [word for name, ms in given.items() if ms is not None for word in (f"--slo-{name}-ms", f"{ms:g}")]
    return ("--placement", args.placement, *levels, "--min-prompt-tokens", str(args.min_prompt_tokens))
