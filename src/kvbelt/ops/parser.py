"""The command line's parser: help with examples and defaults, and errors of one line that say what was meant."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from rich_argparse import RawDescriptionRichHelpFormatter

from kvbelt.errors import SettingsError, resembling


class HelpFormatter(RawDescriptionRichHelpFormatter):
    """Shows each default, and colours on a terminal."""

    group_name_formatter = str
    help_markup = False  # "PORT[,PORT]" is meant as it stands
    text_markup = False
    # Colours of the terminal's own palette, so that light and dark ones stay readable.
    styles: ClassVar[dict[str, Any]] = {
        "argparse.args": "cyan",
        "argparse.groups": "bold",
        "argparse.help": "default",
        "argparse.metavar": "green",
        "argparse.syntax": "bold",
        "argparse.text": "default",
        "argparse.prog": "bold",
        "argparse.default": "default",
    }

    def add_usage(self, usage: Any, actions: Iterable[argparse.Action], *rest: Any) -> None:
        """Name what must be given. The options stand below, with what they mean."""
        options = argparse.Action([], "options", metavar="[options]")
        needed = [action for action in actions if action.required or not action.option_strings]
        super().add_usage(usage, [options, *needed], *rest)

    def _get_help_string(self, action: argparse.Action) -> str:
        about = action.help or ""
        shown = _shown(action.default)
        if not action.option_strings or action.nargs == 0 or not shown or "default" in about:
            return about
        return f"{about} (default: {shown})".lstrip().replace("%(default)", "%%(default)")


def _shown(default: object) -> str:
    if default is None or default is argparse.SUPPRESS or default in ("", [], ()):
        return ""
    if isinstance(default, float):
        return f"{default:g}"
    if isinstance(default, list | tuple):
        return ",".join(map(str, default))
    return str(default).replace("%", "%%")


class Parser(argparse.ArgumentParser):
    """Takes whole option names only: an abbreviation may mean another option in the next version."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, **kwargs)

    def add_subparsers(self, **kwargs: Any) -> Any:
        kwargs.setdefault("prog", self.prog)  # argparse's own would repeat the usage
        return super().add_subparsers(**kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if args is not None:
            args = self.expand(args)
            if self._subparsers is None:
                self._refuse_unknown(args)
            elif not args:
                self.print_help()
                self.exit()
        return super().parse_known_args(args, namespace)

    def expand(self, args: Sequence[str]) -> Sequence[str]:
        """The arguments with those of the file that they name, if this command takes files (``config_file.py``)."""
        if "--config" not in self._option_string_actions or "--print-config" not in self._option_string_actions:
            return args
        from kvbelt.ops.config_file import with_config  # noqa: PLC0415 -- it loads YAML

        try:
            return with_config(args, self)
        except SettingsError as error:
            self.error(str(error))

    def _refuse_unknown(self, args: Sequence[str]) -> None:
        """Before argparse complains about what is missing: the misspelt option may be what was missing."""
        for word in args:
            if word == "--":
                return
            if word.startswith("--") and " " not in word and word.partition("=")[0] not in self._option_string_actions:
                self.unknown(word)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        guess = resembling(str(value), known)
        if isinstance(action, argparse._SubParsersAction):
            self.error(f"there is no command {value!r}{guess}; {self.prog} --help lists the commands")
        raise argparse.ArgumentError(action, f"{value!r} is not one of {', '.join(known)}{guess}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def unknown(self, argument: str) -> NoReturn:
        known = [flag for action in self._actions for flag in action.option_strings]
        self.error(f"unknown argument {argument}{resembling(argument.partition('=')[0], known)}")


class GroupedParser(Parser):
    """Lists its commands in groups."""

    def __init__(self, *args: Any, groups: Mapping[str, Iterable[str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._groups = {title: frozenset(names) for title, names in groups.items()}

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        listed = next(action for action in self._actions if isinstance(action, argparse._SubParsersAction))
        rows = listed._choices_actions
        for title, names in self._groups.items():
            formatter.start_section(title)
            formatter.add_arguments([row for row in rows if row.dest in names])
            formatter.end_section()
        formatter.start_section("options")
        formatter.add_arguments([action for action in self._actions if action.option_strings])
        formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()


def add_examples(parser: argparse.ArgumentParser, *examples: tuple[str, str]) -> None:
    """Show command lines under the help, each with what it does."""
    parser.epilog = "examples:" + "".join(f"\n  # {about}\n  {line}" for line, about in examples)


def complete_files(parser: argparse.ArgumentParser) -> None:
    """Have shells complete the names of files for each argument that takes a path."""
    import shtab  # noqa: PLC0415 -- only where a completion script is written

    for action in parser._actions:
        if isinstance(action.choices, dict):
            for command in action.choices.values():
                complete_files(command)
        elif action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
