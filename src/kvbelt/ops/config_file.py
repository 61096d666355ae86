"""``kvbelt up --config FILE``: a command's options from a YAML file, by their names without the dashes."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kvbelt.errors import SettingsError, resembling

#: Options that a file cannot have.
_NOT_IN_FILES = {"help", "config", "print-config"}


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="options from a YAML file; the command line wins (default: none)"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print all options as such a file, and start nothing"
    )


def with_config(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """A command's arguments with those of its ``--config`` file before them, so that later ones win.

    Args:
        argv: what follows the command's name.
        parser: of the command.

    Raises:
        SettingsError: the file cannot be read, or has an unknown option.
    """
    given = list(argv)
    named = _value_of(given, "--config")
    if named is None:
        return given
    options = _options(parser)
    before: list[str] = []
    positional: list[str] = []
    for key, value in _read(named).items():
        name = str(key).replace("_", "-")
        action = options.get(name)
        if action is None:
            raise SettingsError(f"{named}: unknown option {key!r}{resembling(name, list(options))}")
        if not action.option_strings:
            positional = [str(value)]
        elif action.nargs == 0:
            if not isinstance(value, bool):
                raise SettingsError(f"{named}: {key} is {value!r}; it is true or false")
            before += [f"--{name}"] if value else []
        elif value is not None:
            before += [f"--{name}={one}" for one in (value if isinstance(value, list) else [value])]
    return [*before, *given] if _has_positional(given, options) else [*positional, *before, *given]


def as_config(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """All options as a file that ``--config`` reads."""
    content = {}
    for name, action in _options(parser).items():
        value = getattr(args, action.dest)
        content[name] = str(value) if isinstance(value, Path) else value
    return str(yaml.safe_dump(content, sort_keys=False))


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """By the name that a file has for them, without hidden ones."""
    found = {}
    for action in parser._actions:  # noqa: SLF001 -- argparse has no public list of them
        name = action.option_strings[-1].lstrip("-") if action.option_strings else action.dest
        if name not in _NOT_IN_FILES and action.help is not argparse.SUPPRESS:
            found[name] = action
    return found


def _read(file: str) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"--config {file} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"--config {file} is not a YAML mapping of options; --print-config shows one")
    return content


def _value_of(argv: Sequence[str], option: str) -> str | None:
    for place, word in enumerate(argv):
        if word == option and place + 1 < len(argv):
            return argv[place + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def _has_positional(argv: Sequence[str], options: Mapping[str, argparse.Action]) -> bool:
    takes = {f"--{name}" for name, action in options.items() if action.option_strings and action.nargs != 0}
    takes.add("--config")
    before = ""
    for word in argv:
        if not word.startswith("-") and before not in takes:
            return True
        before = word
    return False
