"""``python -m tests.fuzz TARGET --seconds N``: the same mutations as in the tests, for as long as wanted.

An input that breaks its parser is printed and kept in the corpus, where it is tested from then on.
"""

import argparse
import hashlib
import itertools
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from random import Random

from tests.fuzz.mutation import CORPUS, inputs
from tests.fuzz.targets import TARGETS, Target


def first_that_breaks(target: Target, tried: Iterable[bytes]) -> tuple[bytes, Exception] | None:
    """The first input on which a target raises, and what."""
    for data in tried:
        try:
            target(data)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
            return data, error
    return None


def keep(name: str, data: bytes, corpus: Path = CORPUS) -> Path:
    """Put an input into the corpus; the same one twice is one file."""
    path = corpus / name / f"found-{hashlib.sha256(data).hexdigest()[:12]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def main() -> int:
    """Run one target, or all of them one after another."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    broken = 0
    for name in TARGETS if asked.target == "all" else [asked.target]:
        count = itertools.count()
        end = time.monotonic() + asked.seconds
        tried = itertools.takewhile(
            lambda data: time.monotonic() < end and next(count) >= 0,  # noqa: B023 - used up in this turn
            inputs(name, Random(asked.seed)),
        )
        found = first_that_breaks(TARGETS[name], tried)
        print(f"{name}: {next(count)} inputs, {'one breaks it' if found else 'none breaks it'}", flush=True)  # noqa: T201
        if found is not None:
            broken += 1
            data, error = found
            traceback.print_exception(error)
            print(f"{data[:2000]!r}\nkept as {keep(name, data)}")  # noqa: T201
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
