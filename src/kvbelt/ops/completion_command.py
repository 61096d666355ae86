"""``kvbelt completion``: prints a shell's script, which completes commands, options and files."""

import argparse

from kvbelt.ops.parser import add_examples, complete_files

_SHELLS = ("bash", "zsh", "fish", "tcsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=_SHELLS, help="the shell to write for")
    add_examples(
        parser,
        ("kvbelt completion bash > ~/.local/share/bash-completion/completions/kvbelt", "for every new bash"),
        ('kvbelt completion zsh > "${fpath[1]}/_kvbelt"', "for every new zsh"),
    )


def run(args: argparse.Namespace) -> int:
    import shtab

    parser = args.build_parser()
    complete_files(parser)
    print(shtab.complete(parser, shell=args.shell))
    return 0
