"""``kvbelt keys new``: makes the keys of the control sockets."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    words = parser.add_subparsers(required=True, metavar="COMMAND")
    new = words.add_parser("new", help="make keys: DIR/NAME.key_secret for each process, DIR/trusted for all")
    new.add_argument("dir", type=Path, metavar="DIR")
    about = "one per process (default: proxy prefill decode); the proxy's name must be proxy"
    new.add_argument("names", nargs="*", metavar="NAME", help=about)
    new.set_defaults(run=_new, parser=new)


def _new(args: argparse.Namespace) -> int:
    from kvbelt.security.keys import PROXY, write_new_keys

    for file in write_new_keys(args.dir, args.names or [PROXY, "prefill", "decode"]):
        print(file)
    return 0
