"""``scripts/fuzz TARGET --seconds N``: inputs that are led by which lines of ours they reach (atheris, libFuzzer).

It finds what chance alone takes long for: each input that reaches something new is kept in ``.fuzz`` and changed
further. An input that breaks its parser is kept in the corpus, where it is tested from then on.

The target ``proxy`` is a whole proxy, before workers that run already (``--prefill HOST:PORT --decode HOST:PORT``).
"""

import argparse
import logging
import sys
from pathlib import Path

import atheris

from tests.fuzz.mutation import CORPUS

with atheris.instrument_imports(include=["kvbelt"]):
    from kvbelt.proxy import Address
    from kvbelt.wire.fields import FIELDS
    from tests.fuzz.real_proxy import ANSWER_SECONDS, LENGTH, RealProxy
    from tests.fuzz.targets import TARGETS

#: Inputs that reached something new; the next run begins with them.
REACHED = Path(".fuzz")
#: What chance does not find: names of headers, and the proxy's own.
_WORDS = (
    "content-length: " + LENGTH.decode(), "transfer-encoding: chunked", "content-type: application/json", "expect: ",
    "x-request-id: ", "authorization: Bearer ", "x-kvbelt-deadline-seconds: ", "x-kvbelt-slo-ttft-ms: ",
    "traceparent: ", "origin: ", "access-control-request-method: ", "connection: close", "POST ", "GET ",
    "OPTIONS ", "DELETE ",
    "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/embeddings", "/kvbelt/workers", "/console",
    "HTTP/1.1", "true", "false", "null",
)  # fmt: skip


def _word(word: str) -> str:
    return f'"{word}"\n'


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    return Address(host, int(port))


def main() -> None:
    """Run one target. libFuzzer ends the process: 0 when nothing was found."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("target", choices=[*TARGETS, "proxy"])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--prefill", type=_address, action="append", default=[])
    parser.add_argument("--decode", type=_address, action="append", default=[])
    asked = parser.parse_args()
    logging.disable(logging.CRITICAL)
    seeds = CORPUS / asked.target
    reached = REACHED / asked.target
    reached.mkdir(parents=True, exist_ok=True)
    words = REACHED / "words"
    words.write_text("".join(f'"\\"{name}\\":"\n' for name in FIELDS if name) + "".join(map(_word, _WORDS)))
    target = RealProxy(asked.prefill, asked.decode) if asked.target == "proxy" else TARGETS[asked.target]
    options = [
        f"-dict={words}",
        f"-max_total_time={asked.seconds}",
        f"-artifact_prefix={seeds}/found-",
        "-max_len=8192",
        f"-timeout={ANSWER_SECONDS + 10:.0f}",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(reached), str(seeds)], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
