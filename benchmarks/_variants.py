"""Deployments on this machine that are compared under load: each is a topology and arguments of the proxy.

Levels and rates are scaled to the machine: the first deployment is measured alone before the others start.
"""

import argparse
import functools
import shlex
import statistics
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks._run import model_folder, note, quiet_terminal
from benchmarks.gpu._load import Load, Question, Router, questions, send
from benchmarks.gpu._rows import Answer, Level
from tests.random_model import random_model_dir

from kvbelt.errors import SettingsError
from kvbelt.ops.deployment import SyncDeployment, running
from kvbelt.ops.processes import DeploymentSpec
from kvbelt.ops.topology import Topology

MAX_MODEL_LEN = 4096  #: of the random model
KV_GB = 0.3  #: sixty requests of a thousand tokens

#: Levels, as multiples of what a request takes that has a deployment to itself.
TTFT_FACTOR, TPOT_FACTOR = 3.0, 2.5

_WARM_UP = 8  # requests


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    topology: str
    proxy_args: tuple[str, ...] = ()  #: ``{ttft}`` and ``{tpot}`` stand for the levels, in milliseconds

    def told(self) -> list[str]:
        """What it is, for the results."""
        return [self.name, self.topology, *self.proxy_args]


ELASTIC = (
    "--placement", "elastic", "--slo-ttft-ms", "{ttft:.0f}", "--slo-itl-ms", "0", "--slo-tpot-ms", "{tpot:.1f}",
)  # fmt: skip


def parse_variant(text: str) -> Variant:
    """Read ``NAME=XpYd ARGUMENTS``."""
    name, _, rest = text.partition("=")
    topology, *proxy_args = shlex.split(rest) or [""]
    try:
        Topology.parse(topology)
    except SettingsError:
        raise argparse.ArgumentTypeError(f"{text!r} is no variant; example: split=1p1d --placement split") from None
    return Variant(name, topology, tuple(proxy_args))


def add_arguments(to: argparse.ArgumentParser, default: Sequence[Variant], *, prompt: int) -> None:
    """What the benchmarks of deployments have in common."""
    to.add_argument(
        "--variant", type=parse_variant, action="append", metavar="NAME=XpYd ARGUMENTS",
        help=f"instead of {' and '.join(one.name for one in default)}; all are compared with the first one",
    )  # fmt: skip
    to.add_argument("--threads", type=int, default=1, help="of each worker")
    to.add_argument("--prompt", type=int, default=prompt, help="tokens")
    to.add_argument("--answer", type=int, default=50, help="tokens")
    to.add_argument("--seconds", type=float, default=30.0, help="of arrivals, for each load and seed")
    to.add_argument("--seeds", type=int, default=5)
    to.add_argument("--alone", type=int, default=8, help="requests that measure unloaded times")
    to.add_argument("--at-once", type=int, default=32, help="requests that measure the capacity")


@functools.cache
def model() -> Path:
    """A small random model: a prompt of a thousand tokens takes a core some 0.1 to 0.2 s."""
    return random_model_dir(model_folder("demo"))


def answers_of(deployment: SyncDeployment, asked: Iterable[Question]) -> list[Answer]:
    """Send each request at its moment."""
    return send(asked, [deployment.ports.proxy], Router(1))[0]


@dataclass(frozen=True, slots=True)
class Measured:
    """The first deployment alone."""

    level: Level
    capacity: float  #: requests a second, of many that come at once

    def told(self) -> dict[str, float]:
        """For the results."""
        return {"ttft_ms": self.level.ttft, "tpot_ms": self.level.tpot, "requests_per_s": self.capacity}

    def __str__(self) -> str:
        return (
            f"levels: TTFT {self.level.ttft:.0f} ms ({TTFT_FACTOR:g} times the unloaded one), TPOT "
            f"{self.level.tpot:.1f} ms ({TPOT_FACTOR:g} times); capacity {self.capacity:.2f} requests/s"
        )


class Deployments:
    """The variants, all started; the first one has been measured."""

    def __init__(self, stack: ExitStack, variants: Sequence[Variant], args: argparse.Namespace) -> None:
        self._stack = stack
        self._threads: int = args.threads
        self._size = Load("even", 1.0, 1.0, args.prompt, args.answer)
        first = self._start(variants[0])
        self.measured = self._measure(first, args.alone, args.at_once)
        note(str(self.measured))
        level = self.measured.level
        others = [self._start(one, ttft=level.ttft, tpot=level.tpot) for one in variants[1:]]
        for other in others:
            self._served(other, _WARM_UP, together=False)
        self.all = list(zip(variants, [first, *others], strict=True))

    def in_turn(self, seed: int) -> list[tuple[Variant, SyncDeployment]]:
        """All of them, in another order every other time."""
        return self.all if seed % 2 else self.all[::-1]

    def _start(self, variant: Variant, **levels: float) -> SyncDeployment:
        note(f"starting {variant.name}")
        spec = DeploymentSpec(
            topology=Topology.parse(variant.topology),
            model=model(),
            auto_ports=True,
            threads=self._threads,
            kv_gb=KV_GB,
            max_model_len=MAX_MODEL_LEN,
            device="cpu",
            proxy_args=tuple(argument.format(**levels) for argument in variant.proxy_args),
        )
        return self._stack.enter_context(running(spec, quiet_terminal()))

    def _measure(self, deployment: SyncDeployment, alone: int, at_once: int) -> Measured:
        answers = self._served(deployment, _WARM_UP + alone, together=False)[_WARM_UP:]
        level = Level(
            "scaled",
            ttft=TTFT_FACTOR * statistics.median(answer.ttft for answer in answers),
            tpot=TPOT_FACTOR * statistics.median(answer.tpot for answer in answers),
        )
        together = self._served(deployment, at_once, together=True)
        return Measured(level, at_once * 1000 / max(answer.ttft + sum(answer.gaps) for answer in together))

    def _served(self, deployment: SyncDeployment, number: int, *, together: bool) -> list[Answer]:
        """So many requests, at once or one after the other.

        Raises:
            RuntimeError: one failed.
        """
        load = replace(self._size, seconds=float(number))
        asked = [replace(one, at=0.0) for one in questions(load, seed=number, model=model().name)]
        parts = [asked] if together else [[one] for one in asked]
        answers = [answer for part in parts for answer in answers_of(deployment, part)]
        if errors := [answer.error for answer in answers if answer.error]:
            raise RuntimeError(f"{len(errors)} of {number} requests failed: {errors[0]}")
        return answers
