"""``kvbelt top``: workers, rates, times and requests of a deployment, live in a terminal.

Without a terminal, and with ``--once``, it prints one frame; with ``--json`` the proxy's JSON.
"""

import argparse
import shutil
import sys
from dataclasses import replace

from kvbelt.ops import proxy_client
from kvbelt.ops.arguments import positive_int, positive_number
from kvbelt.ops.parser import add_examples
from kvbelt.ops.top_frame import frame
from kvbelt.wire.console import CONSOLE_STATE

#: A proxy that takes longer is shown as gone.
_ANSWER_SECONDS = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    proxy_client.add_arguments(parser)
    parser.add_argument("--once", action="store_true", help="print one frame and exit")
    parser.add_argument("--json", action="store_true", help="print the proxy's JSON and exit")
    parser.add_argument("--window", type=positive_int, default=10, metavar="SECONDS", help="of rates and percentiles")
    parser.add_argument("--interval", type=positive_number, default=1.0, metavar="SECONDS", help="between two looks")
    add_examples(
        parser,
        ("kvbelt top", "watch the deployment on this host"),
        ("kvbelt top --url http://10.0.0.5:9100 --window 60", "watch another one, with rates of the last minute"),
        ("kvbelt top --once", "print it once, as for a report"),
    )


def run(args: argparse.Namespace) -> int:
    proxy = replace(proxy_client.ProxyClient.of(args), answer_seconds=_ANSWER_SECONDS)
    place = f"/kvbelt/console.json?window={args.window}"
    if args.json:
        print(proxy.pretty(place))
    elif args.once or not (sys.stdin.isatty() and sys.stdout.isatty()):
        width = shutil.get_terminal_size((120, 40)).columns
        print("\n".join(frame(proxy.get(place, CONSOLE_STATE), url=proxy.url, width=width)))
    else:
        from kvbelt.ops.top_app import TopApp, light_terminal  # noqa: PLC0415 -- Textual is only for this

        app = TopApp(proxy, window=args.window, interval=args.interval, light=light_terminal())
        app.run()
        if app.failed is not None:
            raise app.failed
    return 0
