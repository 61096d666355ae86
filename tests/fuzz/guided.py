"""``scripts/fuzz TARGET --seconds N``: inputs that are led by which lines of ours they reach (atheris, libFuzzer).

It finds what chance alone takes long for: each input that reaches something new is kept in ``.fuzz`` and changed
further. An input that breaks its parser is kept in the corpus, where it is tested from then on.
"""

import argparse
import logging
import sys
from pathlib import Path

import atheris

from tests.fuzz.mutation import CORPUS

with atheris.instrument_imports(include=["kvbelt"]):
    from tests.fuzz.targets import TARGETS

#: Inputs that reached something new; the next run begins with them.
REACHED = Path(".fuzz")


def main() -> None:
    """Run one target. libFuzzer ends the process: 0 when nothing was found."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("target", choices=[*TARGETS])
    parser.add_argument("--seconds", type=int, default=60)
    asked = parser.parse_args()
    logging.disable(logging.CRITICAL)
    seeds = CORPUS / asked.target
    reached = REACHED / asked.target
    reached.mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_total_time={asked.seconds}",
        f"-artifact_prefix={seeds}/found-",
        "-max_len=8192",
        "-timeout=10",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(reached), str(seeds)], TARGETS[asked.target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
