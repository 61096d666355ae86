"""The command line's help, and its complaints."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest

from kvbelt.cli import COMMANDS, build_parser, main


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Every command that has no commands of its own."""
    own = [action for action in parser._actions if isinstance(action.choices, dict)]
    if not own:
        yield parser
    for action in own:
        for command in action.choices.values():
            yield from leaves(command)


every_command = pytest.mark.parametrize("parser", list(leaves(build_parser())), ids=lambda parser: parser.prog)


def valued(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Its options that take a value; older names are not shown."""
    shown = (action for action in parser._actions if action.help != argparse.SUPPRESS)
    return [action for action in shown if action.option_strings and action.nargs != 0]


@every_command
def test_help_has_examples_that_parse(parser: argparse.ArgumentParser) -> None:
    """Each stands under a line that says what it does."""
    examples = [line.strip() for line in (parser.epilog or "").splitlines() if line.startswith("  kvbelt ")]
    assert examples
    for line in examples:
        words = shlex.split(line.partition(" > ")[0])
        args, unknown = build_parser().parse_known_args(words[1:])
        assert unknown == []
        assert args.parser.prog == parser.prog


@every_command
def test_every_option_says_what_it_does_and_its_default(parser: argparse.ArgumentParser) -> None:
    """Repeatable ones start empty."""
    assert [action.dest for action in parser._actions if not action.help] == []
    shown = parser._get_formatter()
    given = [one for one in valued(parser) if not one.required and not isinstance(one, argparse._AppendAction)]
    assert [one.dest for one in given if "default" not in shown._expand_help(one)] == []
    assert [one.dest for one in given if "=<" in shown._expand_help(one)] == []  # an object of ours, not words


@every_command
def test_no_option_repeats_its_name_as_its_value(parser: argparse.ArgumentParser) -> None:
    """--kv-gb takes GB, not KV_GB."""
    assert [one.dest for one in valued(parser) if "_" in (one.metavar or one.dest) and not one.choices] == []


def test_kvbelt_alone_lists_its_commands_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    """Each stands once, and the first group is where to start."""
    with pytest.raises(SystemExit) as exited:
        main([])
    assert exited.value.code == 0
    said = capsys.readouterr().out
    assert re.findall(r"^  ([a-z]+)  ", said, re.MULTILINE) == [command.name for command in COMMANDS]
    assert said.index("start here:") < said.index("  up ") < said.index("look at what runs:")


def test_commands_with_commands_of_their_own_list_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["workers"])
    assert exited.value.code == 0
    assert "drain" in capsys.readouterr().out


def test_what_may_be_left_out_is_not_demanded(capsys: pytest.CaptureFixture[str]) -> None:
    """A topology, and the names of keys."""
    assert build_parser().parse_args(["up"]).topology == "1p1d"
    with pytest.raises(SystemExit):
        main(["keys", "new", "--help"])
    assert "kvbelt keys new [options] DIR [NAME …]" in capsys.readouterr().out


def test_help_loads_no_command() -> None:
    """That is what makes it quick."""
    heavy = "{'asyncio', 'kvbelt.ops.up', 'kvbelt.routing', 'kvbelt.settings'} & sys.modules.keys()"
    code = f"import sys, kvbelt.cli\ntry: kvbelt.cli.main(['--help'])\nexcept SystemExit: print({heavy} or None)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.endswith("None\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dotcor"], "there is no command 'dotcor' (did you mean 'doctor'?); kvbelt --help lists the commands"),
        (["workers", "lst"], "there is no command 'lst' (did you mean 'list'?); kvbelt workers --help lists"),
        (["worker", "--rol", "prefill"], "unknown argument --rol (did you mean '--role'?)"),
        (["up", "--device", "cud"], "'cud' is not one of auto, cpu, cuda (did you mean 'cuda'?)"),
    ],
)  # fmt: skip
def test_a_misspelt_word_is_answered_with_the_right_one(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An abbreviated option is misspelt, too."""
    with pytest.raises(SystemExit) as exited:
        main(words)
    assert exited.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["chaos", "--list"]], ids=" ".join)
def test_a_reader_that_leaves_causes_no_traceback(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "kvbelt", *words], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert done.stderr == b""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "tcsh"])
def test_completion_scripts_name_commands_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    said = capsys.readouterr().out
    assert "doctor" in said
    assert "slo-ttft-ms" in said
