"""The belt alone: from paged blocks of one process to paged blocks of another, through NIXL, against memcpy.

Two processes, each with a belt, a pool of blocks and a staging buffer. A transfer begins when the first block is handed
to the sender and ends when the last byte is in the receiver's own blocks: gather, write, commit, scatter. memcpy is the
C library's, of as many bytes, between two pools of this process. "NIXL alone" is one write of as many contiguous bytes
from pool to pool, the best that the transport can do. Repetitions of all three alternate, so that other load on the
machine affects them alike; ratios are taken within a repetition.

A second measurement is the handover: layers are handed over one by one, with a pause between them as in a prompt's
computation, and time runs from the last one. Target: 0.6 of memcpy for 46 MB and more, paged to paged.

    python -m benchmarks.transfer [--rounds 15] [--piece-kib N] [--json FILE]
"""

import ctypes
import itertools
import multiprocessing
import random
import threading
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from benchmarks._run import figure, finish, note, parser, summarise, table, verdict

from kvbelt.channels.nixl import NixlChannel
from kvbelt.paged_copy import TorchPagedCopy
from kvbelt.transfer.belt import Belt
from kvbelt.transfer.ports import Lost, ReceivedKV, Region, TransferOutcome
from kvbelt.transfer.send.handle import Sending
from kvbelt.transfer.settings import BeltIdentity, BeltSettings
from kvbelt.wire.handoff import PrefillHandoff, ReceiverAddress
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.layout import KVLayout

TARGET_RATIO = 0.6
WARM_UP_ROUNDS = 3
LAYER_SECONDS = 0.005  # a layer of 1,000 tokens takes longer than this on any CPU
TIMEOUT_SECONDS = 60.0

#: SmolLM2-135M in fp32: 24 KiB a block of one layer.
SMOLLM2 = KVLayout(
    num_layers=30, num_kv_heads=3, head_dim=64, block_size=16, dtype="float32", order="T2HD", block_bytes=24576
)
#: One block of 4 KiB, for latency.
TINY = KVLayout(
    num_layers=1, num_kv_heads=1, head_dim=32, block_size=16, dtype="float32", order="T2HD", block_bytes=4096
)


@dataclass(frozen=True, slots=True)
class Case:
    """One size and order of blocks."""

    name: str
    layout: KVLayout
    num_tokens: int
    shuffled: bool

    @property
    def num_blocks(self) -> int:
        """Blocks of each layer."""
        return self.layout.blocks(self.num_tokens)

    @property
    def num_bytes(self) -> int:
        return self.layout.slot_bytes(self.num_blocks)


CASES = [
    Case("4 KiB, one block", TINY, 16, shuffled=False),
    Case("46 MB, 1,000 tokens, shuffled blocks", SMOLLM2, 1000, shuffled=True),
    Case("46 MB, 1,000 tokens, contiguous blocks", SMOLLM2, 1000, shuffled=False),
    Case("256 MiB, 5,824 tokens, shuffled blocks", SMOLLM2, 364 * 16, shuffled=True),
]


def region_of(memory: torch.Tensor) -> Region:
    return Region(memory.data_ptr(), memory.nbytes, "cpu")


class Side:
    """One process's belt, pool and staging."""

    def __init__(self, case: Case, role: str, piece_bytes: int) -> None:
        layout = case.layout
        self.num_blocks = case.num_blocks + case.num_blocks // 4
        # Written once: pages that were never touched would be measured otherwise.
        self.pool = torch.ones((layout.num_layers, self.num_blocks, layout.block_bytes), dtype=torch.uint8)
        sends = role == "prefill"
        staging = torch.ones(max(64 << 20, 1) if sends else case.num_bytes + 4096, dtype=torch.uint8)
        region = region_of(staging)
        engine_id = EngineId(f"{role}-{random.getrandbits(48):012x}")
        self.belt = Belt(
            BeltIdentity(engine_id, role, model="benchmark", fingerprint="benchmark", layout=layout),
            BeltSettings(piece_bytes=piece_bytes),
            NixlChannel(engine_id),
            TorchPagedCopy(
                list(self.pool),
                send_staging=staging if sends else None,
                receive_staging=None if sends else staging,
            ),
            send_buffer=region if sends else None,
            receive_buffer=None if sends else region,
        )
        self.belt.start()

    def pick(self, case: Case) -> list[int]:
        """Block ids for one transfer."""
        ids = random.sample(range(self.num_blocks), case.num_blocks)
        return ids if case.shuffled else list(range(case.num_blocks))


def receive(connection: Connection, case: Case, piece_bytes: int) -> None:
    """The decode worker's process: scatters the expected transfers, and answers with the times."""
    torch.set_num_threads(1)
    side = Side(case, "decode", piece_bytes)
    raw = NixlChannel(f"raw-{random.getrandbits(48):012x}")
    raw.register(region_of(side.pool))
    connection.send((side.belt.receiver_address(), raw.local_metadata(), side.pool.data_ptr()))
    while not connection.poll(0.001):
        raw.progress()  # until the other side has connected
    while (order := connection.recv()) is not None:
        transfer_id, check = order
        ids = side.pick(case)
        arrived = threading.Event()
        arrivals: list[ReceivedKV | Lost] = []

        def on_arrival(arrival: ReceivedKV | Lost, into: Any = arrivals, event: Any = arrived) -> None:
            into.append(arrival)
            event.set()

        side.belt.receive(transfer_id, TIMEOUT_SECONDS, on_arrival)
        connection.send("waiting")
        arrived.wait(TIMEOUT_SECONDS)
        (kv,) = arrivals
        if isinstance(kv, Lost):
            raise SystemExit(f"the transfer was lost: {kv.reason}: {kv.detail}")
        committed = time.monotonic()
        kv.scatter(ids)
        scattered = time.monotonic()
        kv.release()
        # One clock for both processes: CLOCK_MONOTONIC is the machine's.
        connection.send((committed, scattered, side.pool[:, ids].numpy().tobytes() if check else b""))
    side.belt.close()
    raw.close()


@dataclass(frozen=True, slots=True)
class Moved:
    """One transfer, in seconds."""

    paged_to_paged: float
    write: float
    after_last_layer: float
    scatter: float
    num_writes: int


class Pair:
    """Both processes."""

    def __init__(self, case: Case, piece_bytes: int) -> None:
        self.case = case
        self._ids = itertools.count()
        context = multiprocessing.get_context("spawn")
        self._connection, far_end = context.Pipe()
        self._process = context.Process(target=receive, args=(far_end, case, piece_bytes))
        self._process.start()
        self.side = Side(case, "prefill", piece_bytes)
        self.side.pool.random_(0, 256)
        self._address: ReceiverAddress
        self._address, metadata, self._there = self._connection.recv()
        self._raw = NixlChannel(f"raw-{random.getrandbits(48):012x}")
        self._raw.register(region_of(self.side.pool))
        self._raw_peer = self._raw.add_peer(metadata)
        self.nixl(4096)

    def close(self) -> None:
        self._connection.send(None)
        self._process.join()
        self.side.belt.close()
        self._raw.close()

    def move(self, *, pause: float = 0.0, check: bool = False) -> Moved:
        """One transfer; ``pause`` between layers; ``check`` compares every byte."""
        case, layout = self.case, self.case.layout
        transfer_id = TransferId(f"transfer-{next(self._ids)}")
        ids = self.side.pick(case)
        self._connection.send((transfer_id, check))
        self._connection.recv()
        outcomes: list[TransferOutcome] = []
        ended = threading.Event()

        def on_end(outcome: TransferOutcome) -> None:
            outcomes.append(outcome)
            ended.set()

        handoff = PrefillHandoff(transfer_id, self._address, TIMEOUT_SECONDS)
        sending = self.side.belt.send(handoff, case.num_tokens, lambda: None, on_end)
        self._granted()
        begin, last = self._hand_over(sending, ids, pause, layout.num_layers)
        ended.wait(TIMEOUT_SECONDS)
        outcome = outcomes[0]
        if not outcome.ok:
            raise SystemExit(f"the transfer failed: {outcome.reason}: {outcome.detail}")
        committed, scattered, there = self._connection.recv()
        if check and there != self.side.pool[:, ids].numpy().tobytes():
            raise SystemExit("bytes differ")
        return Moved(scattered - begin, outcome.seconds, scattered - last, scattered - committed, outcome.num_writes)

    def _granted(self) -> None:
        """Wait for the slot, which a real worker requests long before the first write."""
        while not self.side.belt.snapshot().sends.get("writing"):
            time.sleep(0.001)

    def _hand_over(self, sending: Sending, ids: list[int], pause: float, num_layers: int) -> tuple[float, float]:
        begin = time.monotonic()
        for layer in range(num_layers):
            if pause:
                time.sleep(pause)
            last = time.monotonic()
            sending.blocks_written(layer, 0, ids, None)
        sending.computed()
        return begin, last

    def nixl(self, num_bytes: int) -> float:
        """Seconds of one write from pool to pool, without a belt."""
        begin = time.perf_counter()
        write = self._raw.write(self._raw_peer, [(self.side.pool.data_ptr(), self._there, num_bytes)], "cpu", "cpu")
        while not write.done():
            pass
        write.release()
        return time.perf_counter() - begin

    def memcpy(self, to: torch.Tensor) -> float:
        """Seconds to copy as many bytes."""
        begin = time.perf_counter()
        ctypes.memmove(to.data_ptr(), self.side.pool.data_ptr(), self.case.num_bytes)
        return time.perf_counter() - begin


def measure(case: Case, rounds: int, piece_bytes: int) -> dict[str, Any]:
    pair = Pair(case, piece_bytes)
    try:
        to = torch.ones_like(pair.side.pool)
        moved: list[Moved] = []
        copied: list[float] = []
        nixl: list[float] = []
        pair.move(check=True)
        for _ in range(WARM_UP_ROUNDS + rounds):
            copied.append(pair.memcpy(to))
            nixl.append(pair.nixl(case.num_bytes))
            moved.append(pair.move())
        handed_over = [pair.move(pause=LAYER_SECONDS) for _ in range(rounds)]
        pair.move(check=True)
    finally:
        pair.close()
    moved, copied, nixl = moved[WARM_UP_ROUNDS:], copied[WARM_UP_ROUNDS:], nixl[WARM_UP_ROUNDS:]
    gigabytes = case.num_bytes / 1e9
    return {
        "case": case.name,
        "bytes": case.num_bytes,
        "writes": moved[-1].num_writes,
        "memcpy_gb_per_s": summarise(gigabytes / seconds for seconds in copied),
        "nixl_gb_per_s": summarise(gigabytes / seconds for seconds in nixl),
        "write_gb_per_s": summarise(gigabytes / max(m.write, 1e-9) for m in moved),
        "paged_to_paged_gb_per_s": summarise(gigabytes / m.paged_to_paged for m in moved),
        "paged_to_paged_ms": summarise(1e3 * m.paged_to_paged for m in moved),
        "nixl_to_memcpy": summarise(c / n for c, n in zip(copied, nixl, strict=True)),
        "ratio_to_memcpy": summarise(c / m.paged_to_paged for c, m in zip(copied, moved, strict=True)),
        "handover_ms": summarise(1e3 * m.after_last_layer for m in handed_over),
        "scatter_ms": summarise(1e3 * m.scatter for m in handed_over),
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--piece-kib", type=int, default=0, help="bytes gathered and written in one go; 0: default")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    results = []
    for case in CASES:
        note(f"measuring {case.name}")
        results.append(measure(case, options.rounds, options.piece_kib << 10))
    head = [
        "case",
        "memcpy GB/s",
        "NIXL alone GB/s",
        "paged to paged GB/s",
        "of memcpy",
        "ms",
        "handover ms",
        "of it scatter",
        "writes",
    ]
    rows = [
        [
            result["case"],
            str(result["memcpy_gb_per_s"]),
            str(result["nixl_gb_per_s"]),
            str(result["paged_to_paged_gb_per_s"]),
            str(result["ratio_to_memcpy"]),
            str(result["paged_to_paged_ms"]),
            str(result["handover_ms"]),
            figure(result["scatter_ms"].median),
            str(result["writes"]),
        ]
        for result in results
    ]
    large = [(result["case"], result["ratio_to_memcpy"].median) for result in results if result["bytes"] > 40_000_000]
    verdicts = [verdict(ratio >= TARGET_RATIO, f"{case}: {figure(ratio)} of memcpy") for case, ratio in large]
    plain = [
        {key: asdict(value) if hasattr(value, "median") else value for key, value in result.items()}
        for result in results
    ]
    finish("transfer", "\n".join([table(head, rows), "", *verdicts]), plain, options.json)


if __name__ == "__main__":
    main()
