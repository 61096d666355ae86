"""``kvbelt keys new``: makes the keys of the control sockets."""

import argparse
from pathlib import Path

from kvbelt.ops.parser import add_examples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    words = parser.add_subparsers(required=True, metavar="COMMAND")
    new = words.add_parser("new", help="make keys: DIR/NAME.key_secret for each process, DIR/trusted for all")
    new.add_argument("dir", type=Path, metavar="DIR", help="the folder to write to")
    about = "a name for each process; the proxy's must be proxy (default: proxy prefill decode)"
    new.add_argument("names", nargs="*", metavar="NAME", help=about)
    new.usage = "%(prog)s [options] DIR [NAME …]"  # Python before 3.13 writes that one name is needed
    add_examples(
        new,
        ("kvbelt keys new keys", "for one proxy, prefill worker and decode worker"),
        ("kvbelt keys new keys proxy prefill-0 prefill-1 decode-0", "a key for each process"),
    )
    new.set_defaults(run=_new, parser=new)


def _new(args: argparse.Namespace) -> int:
    from kvbelt.security.keys import PROXY, write_new_keys

    for file in write_new_keys(args.dir, args.names or [PROXY, "prefill", "decode"]):
        print(file)
    return 0
