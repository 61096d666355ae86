"""XpYd on one machine with a stand-in engine: how transfers a second grow with pairs, until memory is the limit.

N prefill and N decode processes have a belt, a pool and staging memory each, and no model. Every prefill process sends
to every decode process in turn, a few transfers at a time. A decode process scatters received KV into its pool, and
compares the digests that a worker compares (``pd_verify: sample``). Transfers committed within the time are counted.

Beside each N stands the rate of memcpy when as many processes copy at once. A transfer copies every byte three times
(gather, write, scatter), so three times its rate over memcpy's is the share of the machine's memory bandwidth. All
sizes and N alternate, so that other load on the machine affects them alike.

    python -m benchmarks.scaling [--pairs 1 2 3 4] [--rounds 5] [--seconds 2] [--json FILE] [--plot FILE.svg]
"""

import ctypes
import itertools
import multiprocessing
import queue
import random
import threading
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import torch
from benchmarks._run import figure, finish, note, parser, summarise, table
from benchmarks.transfer import SMOLLM2

from kvbelt.channels.nixl import NixlChannel
from kvbelt.paged_copy import TorchPagedCopy, region_of
from kvbelt.transfer.belt import Belt
from kvbelt.transfer.ports import Lost, ReceivedKV, TransferOutcome
from kvbelt.transfer.settings import BeltIdentity, BeltSettings
from kvbelt.wire.handoff import PrefillHandoff, ReceiverAddress
from kvbelt.wire.ids import EngineId, TransferId

#: Tokens of a prompt: 1.4 MB and 46 MB of KV.
SIZES = (30, 1000)
#: Transfers that one prefill process has under way.
DEPTH = 2
DEADLINE_SECONDS = 60.0
LAYOUT = SMOLLM2


@dataclass(frozen=True, slots=True)
class Job:
    """What both kinds of process get at the start."""

    num_pairs: int
    number: int  #: of this process among its kind
    num_tokens: int

    @property
    def num_blocks(self) -> int:
        """Of a prompt, in each layer."""
        return LAYOUT.blocks(self.num_tokens)


def make_belt(role: str, pool: torch.Tensor, staging_bytes: int) -> Belt:
    """A started belt over a pool."""
    staging = torch.ones(staging_bytes, dtype=torch.uint8)
    sends = role == "prefill"
    engine_id = EngineId(f"{role}-{random.getrandbits(48):012x}")
    belt = Belt(
        BeltIdentity(engine_id, role, model="benchmark", fingerprint="benchmark", layout=LAYOUT),
        BeltSettings(),
        NixlChannel(engine_id),
        TorchPagedCopy(list(pool), staging if sends else None, None if sends else staging),
        send_buffer=region_of(staging) if sends else None,
        receive_buffer=None if sends else region_of(staging),
    )
    belt.start()
    return belt


def make_pool(num_blocks: int) -> torch.Tensor:
    """Blocks of every layer, with each byte written once."""
    pool = torch.empty((LAYOUT.num_layers, num_blocks, LAYOUT.block_bytes), dtype=torch.uint8)
    return pool.random_(0, 256)


def transfer_id(run: int, prefill: int, count: int) -> TransferId:
    """The name of a transfer, on both sides."""
    return TransferId(f"{run}.{prefill}.{count}")


def prefill(connection: Connection, job: Job) -> None:
    """One prefill process: sends as fast as it can."""
    torch.set_num_threads(1)
    pool = make_pool(job.num_blocks)
    belt = make_belt("prefill", pool, 64 << 20)
    blocks = list(range(job.num_blocks))
    receivers: list[ReceiverAddress] = connection.recv()
    connection.send("ready")
    while (order := connection.recv()) is not None:
        run, seconds = order
        ends: queue.SimpleQueue[TransferOutcome] = queue.SimpleQueue()
        stop_at = time.monotonic() + seconds
        done = under_way = 0
        for count in itertools.count():
            while under_way == DEPTH or (under_way and time.monotonic() >= stop_at):
                outcome = ends.get(timeout=DEADLINE_SECONDS)
                under_way -= 1
                if not outcome.ok:
                    raise SystemExit(f"a transfer failed: {outcome.reason}: {outcome.detail}")
                done += time.monotonic() < stop_at
            if time.monotonic() >= stop_at:
                break
            handoff = PrefillHandoff(
                transfer_id(run, job.number, count), receivers[count % job.num_pairs], DEADLINE_SECONDS
            )
            sending = belt.send(handoff, job.num_tokens, lambda: None, ends.put)
            for layer in range(LAYOUT.num_layers):
                sending.blocks_written(layer, 0, blocks, None)
            sending.computed()
            under_way += 1
        connection.send(done)
    belt.close()


def decode(connection: Connection, job: Job) -> None:
    """One decode process: takes what comes, from every prefill process in turn."""
    torch.set_num_threads(1)
    pool = make_pool(job.num_blocks)
    belt = make_belt("decode", pool, LAYOUT.slot_bytes(job.num_blocks) * (DEPTH * job.num_pairs + 1))
    arrivals: queue.SimpleQueue[tuple[int, int, int, ReceivedKV | Lost] | None] = queue.SimpleQueue()

    def expect(run: int, sender: int, count: int) -> None:
        def on_arrival(arrival: ReceivedKV | Lost) -> None:
            arrivals.put((run, sender, count, arrival))

        belt.receive(transfer_id(run, sender, count), DEADLINE_SECONDS, on_arrival)

    def take() -> None:
        blocks = list(range(job.num_blocks))
        while (arrived := arrivals.get()) is not None:
            run, sender, count, kv = arrived
            if isinstance(kv, Lost):
                continue  # the last one of a run, which was never sent
            kv.scatter(blocks)
            kv.release()
            expect(run, sender, count + job.num_pairs)

    taker = threading.Thread(target=take)
    taker.start()
    connection.send(belt.receiver_address())
    while (run := connection.recv()) is not None:
        for sender in range(job.num_pairs):
            expect(run, sender, job.number)
        connection.send("waiting")
    arrivals.put(None)
    taker.join()
    belt.close()


def copy(connection: Connection, num_bytes: int) -> None:
    """One process that copies memory; returns its bytes."""
    here, there = torch.ones(num_bytes, dtype=torch.uint8), torch.ones(num_bytes, dtype=torch.uint8)
    while (seconds := connection.recv()) is not None:
        stop_at = time.monotonic() + seconds
        copied = 0
        while time.monotonic() < stop_at:
            ctypes.memmove(there.data_ptr(), here.data_ptr(), num_bytes)
            copied += num_bytes
        connection.send(copied)


class Children:
    """Processes with a pipe each."""

    def __init__(self, target: Any, arguments: list[Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self._processes: list[Any] = []
        for argument in arguments:
            here, there = context.Pipe()
            process = context.Process(target=target, args=(there, argument))
            process.start()
            there.close()
            self.pipes.append(here)
            self._processes.append(process)

    def tell(self, message: Any) -> None:
        """Send the same to all."""
        for pipe in self.pipes:
            pipe.send(message)

    def hear(self) -> list[Any]:
        """One answer of each."""
        return [pipe.recv() for pipe in self.pipes]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for pipe, process in zip(self.pipes, self._processes, strict=True):
            if process.is_alive() and exc[0] is None:
                pipe.send(None)
            elif process.is_alive():
                process.terminate()
        for process in self._processes:
            process.join(20)


class Deployment:
    """N prefill and N decode processes, connected."""

    def __init__(self, stack: ExitStack, num_pairs: int, num_tokens: int) -> None:
        jobs = [Job(num_pairs, number, num_tokens) for number in range(num_pairs)]
        self._decode = stack.enter_context(Children(decode, jobs))
        self._prefill = stack.enter_context(Children(prefill, jobs))
        self._prefill.tell(self._decode.hear())
        self._prefill.hear()
        self._runs = itertools.count()
        self.run(0.2)  # handshakes and connections

    def run(self, seconds: float) -> float:
        """Transfers a second, of all together."""
        number = next(self._runs)
        self._decode.tell(number)
        self._decode.hear()
        self._prefill.tell((number, seconds))
        done: list[int] = self._prefill.hear()
        return sum(done) / seconds


def measure(pairs: list[int], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Measure every size with every N, in turn."""
    transfers: dict[tuple[int, int], list[float]] = {}
    copied: dict[int, list[float]] = {}
    order = deque(pairs)
    for turn in range(rounds):
        note(f"round {turn + 1} of {rounds}")
        for num_pairs in order:
            for num_tokens in SIZES:
                with ExitStack() as stack:
                    deployment = Deployment(stack, num_pairs, num_tokens)
                    transfers.setdefault((num_tokens, num_pairs), []).append(deployment.run(seconds))
            with Children(copy, [46_000_000] * num_pairs) as children:
                children.tell(seconds / 2)
                copied.setdefault(num_pairs, []).append(sum(children.hear()) / (seconds / 2) / 1e9)
        order.rotate()
    results = []
    for (num_tokens, num_pairs), rates in sorted(transfers.items()):
        num_bytes = LAYOUT.slot_bytes(LAYOUT.blocks(num_tokens))
        base = transfers[num_tokens, pairs[0]]
        results.append(
            {
                "pairs": num_pairs,
                "tokens": num_tokens,
                "bytes": num_bytes,
                "transfers_per_s": summarise(rates),
                "of_the_first": summarise(rate / first for rate, first in zip(rates, base, strict=True)),
                "gb_per_s": summarise(rate * num_bytes / 1e9 for rate in rates),
                "memcpy_gb_per_s": summarise(copied[num_pairs]),
                "of_memory": summarise(
                    3 * rate * num_bytes / 1e9 / copy_rate
                    for rate, copy_rate in zip(rates, copied[num_pairs], strict=True)
                ),
            }
        )
    return results


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Two panels, one a size: transfers a second over pairs, and the limit of the memory."""
    import matplotlib as mpl  # noqa: PLC0415 -- wanted by this alone

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "kvbelt"
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure_, panels = plt.subplots(1, len(SIZES), figsize=(9, 3.4), layout="constrained")
    for panel, tokens in zip(panels, SIZES, strict=True):
        rows = [row for row in results if row["tokens"] == tokens]
        pairs = [row["pairs"] for row in rows]
        rates = [row["transfers_per_s"] for row in rows]
        panel.fill_between(pairs, [rate.low for rate in rates], [rate.high for rate in rates], alpha=0.2, linewidth=0)
        panel.plot(pairs, [rate.median for rate in rates], marker="o", label="kvbelt")
        limit = [row["memcpy_gb_per_s"].median * 1e9 / 3 / row["bytes"] for row in rows]
        panel.plot(pairs, limit, linestyle="--", color="gray", label="memcpy in as many processes, a third of it")
        panel.set(xlabel="pairs (NpNd)", title=f"{tokens:,} tokens, {rows[0]['bytes'] / 1e6:.1f} MB", xticks=pairs)
        panel.set_ylim(bottom=0)
        panel.grid(visible=True, alpha=0.3)
    panels[0].set_ylabel("transfers a second")
    panels[-1].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure_.savefig(path, metadata={"Date": None})


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--pairs", type=int, nargs="+", default=[1, 2, 3, 4])
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--seconds", type=float, default=2.0)
    arguments.add_argument("--plot", type=Path, metavar="FILE.svg")
    options = arguments.parse_args()
    results = measure(options.pairs, options.rounds, options.seconds)
    head = ["tokens", "shape", "transfers/s", "of the first", "GB/s", "memcpy GB/s", "3 copies of memcpy"]
    rows = [
        [
            f"{row['tokens']:,}",
            f"{row['pairs']}p{row['pairs']}d",
            str(row["transfers_per_s"]),
            str(row["of_the_first"]),
            str(row["gb_per_s"]),
            str(row["memcpy_gb_per_s"]),
            figure(row["of_memory"].median),
        ]
        for row in results
    ]
    if options.plot is not None:
        plot(results, options.plot)
    plain = [
        {key: asdict(value) if hasattr(value, "median") else value for key, value in row.items()} for row in results
    ]
    finish("scaling", table(head, rows), plain, options.json)


if __name__ == "__main__":
    main()
