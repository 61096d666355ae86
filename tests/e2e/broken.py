"""``kvbelt``, broken on purpose in three ways, for ``kvbelt chaos`` to find.

Received blocks are put into a worker's KV in the wrong order; the proxy never answers every ninth request, and drops
the last piece of every fifth stream.
"""

import asyncio
import itertools
import sys

from kvbelt.cli import main
from kvbelt.http import Exchange
from kvbelt.paged_copy import CpuPagedCopy
from kvbelt.proxy.request.handler import RequestHandler

scatter, run, end = CpuPagedCopy.scatter, RequestHandler.run, Exchange.end
requests, streams = itertools.count(1), itertools.count(1)


def scatter_backwards(self, block_ids, *args, **kwargs):
    """Put the right bytes in the wrong places."""
    return scatter(self, list(reversed(block_ids)), *args, **kwargs)


async def run_or_forget(self):
    """Leave a request without an answer."""
    if next(requests) % 9 == 0:
        await asyncio.Event().wait()
    await run(self)


def end_early(self, last=b""):
    """End a body well-formed, but too early."""
    end(self, b"" if next(streams) % 5 == 0 else last)


CpuPagedCopy.scatter, RequestHandler.run, Exchange.end = scatter_backwards, run_or_forget, end_early

if __name__ == "__main__":
    sys.exit(main())
