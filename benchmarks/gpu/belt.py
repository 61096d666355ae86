"""The belt between two GPUs, or two processes of one, without vLLM: every byte compared, and the handover timed.

    python benchmarks/gpu/belt.py                     # two GPUs, the KV of Llama-3.1-8B, 7,504 tokens
    python benchmarks/gpu/belt.py --gpus 0,0          # both processes on one GPU: the bytes count, the times do not
    python benchmarks/gpu/belt.py --device cpu --tokens 500 --layers 4 --rounds 3 --buffer-gb 0.25 --compute-ms 0

Two processes act as vLLM's model runners. One computes (matrix products that take as long as a layer), and hands each
layer's blocks over as the connector does; the other loads them into its blocks. Every block's bytes are a function of
layer, block and round, so the receiver recognises every wrong block.

First come the timed cases, then every combination of block size, chunk size and prompts at a time, which only compare
the bytes. The last case is a control: the sender spoils one block in each round, and the run fails if the
receiver does not find it.

Times are of one clock (both processes run on one machine): **handover** is from the end of the computation on the
device to the KV usable in the receiver's blocks. Of it, **exposed** is what the sender waits for the receiver's word
that the KV is there, digests included (a mean, the first round's connection included), and **fill** the receiver's copy
into its blocks.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from kvbelt.belt_setup import channel_for, make_belt
from kvbelt.transfer.ports import ReceivedKV
from kvbelt.transfer.settings import BeltIdentity
from kvbelt.vllm.compute import CpuCompute, CudaCompute
from kvbelt.vllm.pages import Pages, pages_of
from kvbelt.vllm.settings import load_settings
from kvbelt.vllm.step_messages import Claim, Load, Send, StepCommands, Written
from kvbelt.vllm.worker_side import WorkerSide
from kvbelt.wire.handoff import DecodeHandoff, PrefillHandoff, ReceiverAddress
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.layout import KVLayout

#: Odd, so that different words stay different.
_MIXER = 0x9E3779B97F4A7C15 - (1 << 64)


@dataclass(frozen=True, slots=True)
class Case:
    """One series of transfers."""

    block_size: int
    chunk_tokens: int  #: of a step; the whole prompt if larger
    concurrent: int
    compute_ms: float  #: of one prompt, all layers
    rounds: int
    spoiled: bool = False  #: a control: one block of each round is sent wrong


@dataclass(frozen=True, slots=True)
class Shape:
    """The model's."""

    device: str
    layers: int
    token_bytes: int  #: of one layer: K and V, all heads
    tokens: int
    buffer_bytes: int


def content(pages: Pages, layer: int, block_ids: torch.Tensor, salt: int) -> torch.Tensor:
    """The contents of these blocks: ``int64 [blocks, words]``."""
    words = pages.rows[0].shape[1] // 8
    inside = torch.arange(words, device=block_ids.device, dtype=torch.int64)
    return (block_ids[:, None] * words + inside + layer * 1_000_003 + salt * 7_919) * _MIXER


class Side:
    """One process: KV, belt, and the connector's worker side."""

    def __init__(self, shape: Shape, case: Case, role: str) -> None:
        self.shape, self.case = shape, case
        self.device = torch.device("cuda:0" if shape.device == "cuda" else "cpu")
        per_prompt = -(-shape.tokens // case.block_size)
        self.num_blocks = per_prompt * case.concurrent + 64
        block_bytes = case.block_size * shape.token_bytes
        kv = {
            f"layers.{layer}": torch.zeros((self.num_blocks, block_bytes), dtype=torch.uint8, device=self.device)
            for layer in range(shape.layers)
        }
        self.pages = pages_of(kv, self.num_blocks, block_bytes, "bench")
        self.layout = KVLayout(shape.layers, 8, 128, case.block_size, "bfloat16", self.pages.order, block_bytes)
        settings = load_settings(role, {"pd_buffer_size": shape.buffer_bytes}, shape.device, {})
        engine_id = EngineId(uuid.uuid4().hex)
        channel = channel_for(settings, engine_id, self.device)
        identity = BeltIdentity(engine_id, settings.role, "bench", "bench", self.layout)
        self.belt = make_belt(settings, identity, channel, self.pages.rows)
        self.belt.start()
        self.compute = CudaCompute(self.device) if shape.device == "cuda" else CpuCompute()
        self.side = WorkerSide(self.belt, self.compute)

    def close(self) -> None:
        self.belt.close()
        self.side.close()
        self.compute.close()


def say(**message: Any) -> None:
    """Write to the parent."""
    print(json.dumps(message), flush=True)


def hear() -> dict[str, Any]:
    """Read from the parent."""
    return dict(json.loads(sys.stdin.readline()))


class Work:
    """Work of a known duration for the device."""

    def __init__(self, device: torch.device, milliseconds: float) -> None:
        self._times = 0
        if device.type != "cuda" or milliseconds <= 0:
            return
        self._matrix = torch.randn((4096, 4096), device=device, dtype=torch.bfloat16)
        self._out = torch.empty_like(self._matrix)
        for count in (20, 200):  # the first warms up
            torch.cuda.synchronize()
            began = time.monotonic()
            for _ in range(count):
                torch.mm(self._matrix, self._matrix, out=self._out)
            torch.cuda.synchronize()
            one = (time.monotonic() - began) * 1000 / count
        self._times = max(1, round(milliseconds / one))

    def do(self) -> None:
        """Queue the work."""
        for _ in range(self._times):
            torch.mm(self._matrix, self._matrix, out=self._out)


def prefill(shape: Shape, case: Case) -> None:
    """The sending process, through one case."""
    me = Side(shape, case, "kv_producer")
    work = Work(me.device, case.compute_ms / shape.layers)
    receiver = msgspec.convert(hear()["receiver"], ReceiverAddress)
    while (order := hear()).get("round") is not None:
        salt, tables = int(order["round"]), order["tables"]
        everything = torch.arange(me.num_blocks, device=me.device)
        first_step = True
        at = 0
        while at < shape.tokens:
            end = min(at + case.chunk_tokens, shape.tokens)
            last = end == shape.tokens
            done = at // case.block_size
            ready = -(-end // case.block_size) if last else end // case.block_size
            sends = [
                Send(name, PrefillHandoff(TransferId(name), receiver, 60.0), shape.tokens)
                for name in tables
                if first_step
            ]
            written = [Written(name, done, tuple(ids[done:ready]), last) for name, ids in tables.items()]
            me.side.begin_step(StepCommands(sends=tuple(sends), written=tuple(written)))
            for layer in range(shape.layers):
                work.do()
                # Only what this step computes; blocks computed before must still hold what they held.
                blocks = (
                    everything
                    if first_step
                    else torch.tensor([block for ids in tables.values() for block in ids[done:ready]], device=me.device)
                )
                me.pages.rows[layer].view(torch.int64)[blocks] = content(me.pages, layer, blocks, salt)
                if case.spoiled and last and layer == shape.layers - 1:
                    # The last byte of the last whole block that this step hands over.
                    me.pages.rows[layer][next(iter(tables.values()))[ready - 1], -1] += 1
                me.side.layer_written(layer)
            me.side.end_step()
            first_step = False
            at = end
        if shape.device == "cuda":
            torch.cuda.synchronize()
        computed = time.monotonic()
        held = set(tables)
        asked = set(tables)
        while held:
            sent, _ = me.side.finished(asked)
            asked = set()
            held -= sent
            time.sleep(0.0005)
        failed = {name: reason for name, reason in me.side.take_report().sent.items() if reason}
        exposed = me.belt.snapshot().exposed_seconds
        say(computed=computed, failed=failed, exposed=[exposed.total * 1000, exposed.count])
    me.close()


def decode(shape: Shape, case: Case) -> None:
    """The receiving process, through one case."""
    me = Side(shape, case, "kv_consumer")
    fills = watch_fills(me)
    say(receiver=msgspec.to_builtins(me.belt.receiver_address()))
    while (order := hear()).get("round") is not None:
        salt, theirs, ours = int(order["round"]), order["theirs"], order["ours"]
        claims = tuple(Claim(name, DecodeHandoff(TransferId(name), 60.0)) for name in ours)
        loads = tuple(Load(name, 0, tuple(ids), shape.tokens) for name, ids in ours.items())
        me.side.begin_step(StepCommands(claims=claims, loads=loads))
        me.side.end_step()
        times: dict[str, float] = {}
        while len(times) < len(ours):
            _, loaded = me.side.finished(set())
            times |= dict.fromkeys(loaded, time.monotonic())
            time.sleep(0.0002)
        wrong = 0
        for name, ids in ours.items():
            here = torch.tensor(ids, device=me.device)
            there = torch.tensor(theirs[name], device=me.device)
            for layer, row in enumerate(me.pages.rows):
                same = (row.view(torch.int64)[here] == content(me.pages, layer, there, salt)).all(dim=1)
                wrong += int((~same).sum())
        for row in me.pages.rows:
            row.zero_()
        if shape.device == "cuda":
            torch.cuda.synchronize()
        news = me.side.take_report().received
        say(loaded=times, wrong=wrong, lost={name: reason for name, reason in news.items() if reason}, fills=fills)
        fills.clear()
    me.close()


def watch_fills(me: Side) -> list[float]:
    """Milliseconds of each copy into blocks."""
    fills: list[float] = []
    loading = me.side.loading
    plain = loading._fill  # noqa: SLF001

    def fill(request_id: str, received: ReceivedKV, load: Load) -> str:
        began = time.monotonic()
        reason = plain(request_id, received, load)
        fills.append((time.monotonic() - began) * 1000)
        return reason

    loading._fill = fill  # type: ignore[method-assign] # noqa: SLF001
    return fills


def tell(process: subprocess.Popen[str], message: dict[str, Any]) -> None:
    """Write to a child."""
    assert process.stdin is not None
    process.stdin.write(json.dumps(message) + "\n")
    process.stdin.flush()


def told(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Read from a child."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return dict(json.loads(line))
        print(line, end="", file=sys.stderr)  # UCX logs to standard output
    raise SystemExit(f"a process of the benchmark ended with status {process.wait()}")


def child(side: str, shape: Shape) -> None:
    """One of the two processes: runs the cases that the parent sends."""
    while (given := hear()).get("case") is not None:
        (prefill if side == "prefill" else decode)(shape, Case(**given["case"]))
        gc.collect()
        if shape.device == "cuda":
            torch.cuda.empty_cache()


def start(shape: Shape, gpus: list[int]) -> list[subprocess.Popen[str]]:
    """The sender on the first of these GPUs, the receiver on the second."""
    processes = []
    for gpu, side in zip(gpus, ("prefill", "decode"), strict=True):
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
        if shape.device == "cuda":
            environment.setdefault("UCX_TLS", "cuda_ipc,cuda_copy,tcp")
        command = [sys.executable, str(Path(__file__).resolve())]
        command += ["--child", json.dumps([side, msgspec.to_builtins(shape)])]
        processes.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        )
    return processes


def end(processes: list[subprocess.Popen[str]]) -> None:
    """End both, by signal if need be."""
    for process in processes:
        if process.poll() is None and process.stdin is not None:
            with contextlib.suppress(OSError):
                tell(process, {"case": None})
    for process in processes:
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_case(shape: Shape, case: Case, processes: list[subprocess.Popen[str]]) -> dict[str, Any]:
    """Run all rounds of a case."""
    sender, receiver = processes
    for process in processes:
        tell(process, {"case": msgspec.to_builtins(case)})
    handovers: list[float] = []
    fills: list[float] = []
    exposed = [0.0, 0]  # of the whole case
    wrong = blocks = 0
    failures: list[str] = []
    per_prompt = -(-shape.tokens // case.block_size)
    num_blocks = per_prompt * case.concurrent + 64
    tell(sender, told(receiver))
    for number in range(case.rounds):
        generator = torch.Generator().manual_seed(number)
        names = [f"{number}-{place}" for place in range(case.concurrent)]
        tables = []
        for _ in range(2):
            order = torch.randperm(num_blocks, generator=generator).tolist()
            tables.append({name: order[i * per_prompt : (i + 1) * per_prompt] for i, name in enumerate(names)})
        tell(receiver, {"round": number, "theirs": tables[0], "ours": tables[1]})
        tell(sender, {"round": number, "tables": tables[0]})
        sent, got = told(sender), told(receiver)
        wrong += got["wrong"]
        blocks += per_prompt * shape.layers * case.concurrent
        failures += [*sent["failed"].values(), *got["lost"].values()]
        exposed = sent["exposed"]
        if number > 0 or case.rounds == 1:  # the first round connects
            fills += got["fills"]
            handovers += [(at - sent["computed"]) * 1000 for at in got["loaded"].values()]
    for process in processes:
        tell(process, {"round": None})
    handovers.sort()
    return {
        "case": msgspec.to_builtins(case),
        "megabytes": shape.layers * per_prompt * case.block_size * shape.token_bytes / (1 << 20),
        "blocks": blocks,
        "wrong": wrong,
        "failures": failures,
        "handover_p50_ms": statistics.median(handovers),
        "handover_max_ms": handovers[-1],
        "exposed_mean_ms": exposed[0] / max(exposed[1], 1),
        "fill_p50_ms": statistics.median(fills) if fills else None,
        "right": not failures and wrong == (case.rounds if case.spoiled else 0),
    }


def cases_of(tokens: int, compute_ms: float, rounds: int, *, brief: bool = False) -> list[Case]:
    """The timed cases, then every combination (or a few), then the control."""
    timed = [
        Case(16, tokens, 1, compute_ms, rounds),
        Case(16, tokens, 1, 0.0, rounds),
        Case(16, 2048, 1, compute_ms, rounds),
        Case(128, tokens, 1, compute_ms, rounds),
        Case(16, 1000, 3, compute_ms, rounds),
    ]
    few = min(rounds, 3)
    combined = [
        Case(block, chunk, concurrent, 0.0, few)
        for block, chunk, concurrent in itertools.product((16, 32, 128), (tokens, 2048, 1000, 333), (1, 2, 4))
        if not brief or (block, chunk, concurrent) in {(16, 333, 4), (32, 1000, 2), (128, 2048, 4)}
    ]
    return [*timed, *combined, Case(32, 1000, 2, 0.0, few, spoiled=True)]


_HEADER = (
    "| block | chunk | at a time | compute ms | MiB | blocks compared | wrong | failures | handover p50 ms | max ms | "
    "exposed mean ms | fill p50 ms |"
)


def row_of(case: Case, result: dict[str, Any]) -> str:
    wrong = f"{result['wrong']} of {case.rounds} spoiled" if case.spoiled else result["wrong"]
    cells = (
        *(case.block_size, case.chunk_tokens, case.concurrent, f"{case.compute_ms:.0f}", f"{result['megabytes']:.0f}"),
        *(result["blocks"], wrong, ", ".join(result["failures"]) or 0),
        *(f"{result['handover_p50_ms']:.2f}", f"{result['handover_max_ms']:.2f}", f"{result['exposed_mean_ms']:.2f}"),
        "-" if result["fill_p50_ms"] is None else f"{result['fill_p50_ms']:.2f}",
    )
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gpus", default="0,1", help="of the sender and of the receiver; 0,0: both on one")
    parser.add_argument("--tokens", type=int, default=7504)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--brief", action="store_true", help="three of the combinations")
    parser.add_argument("--compute-ms", type=float, default=216.0)
    parser.add_argument("--buffer-gb", type=float, default=4.0)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    args = parser.parse_args()
    if args.child:
        side, shape = json.loads(args.child)
        child(side, Shape(**shape))
        return
    gpus = [int(gpu) for gpu in args.gpus.split(",")]
    if len(gpus) != 2:
        parser.error(f"--gpus is {args.gpus}; it names two, for example 0,1")
    # 8 heads of 128, K and V, two bytes each.
    shape = Shape(args.device, args.layers, 2 * 8 * 128 * 2, args.tokens, int(args.buffer_gb * (1 << 30)))
    results = []
    processes = start(shape, gpus)
    print(_HEADER + "\n|" + "---|" * 12, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        for case in cases_of(args.tokens, args.compute_ms, args.rounds, brief=args.brief):
            result = run_case(shape, case, processes)
            results.append(result)
            print(row_of(case, result), flush=True)
            # After each, so that a machine that is taken away leaves what it has measured.
            (args.out / "belt.json").write_text(
                json.dumps({"shape": msgspec.to_builtins(shape), "gpus": gpus, "results": results}, indent=1)
            )
    finally:
        end(processes)
    compared = sum(result["blocks"] for result in results if not result["case"]["spoiled"])
    wrong = [result["case"] for result in results if not result["right"]]
    print(f"{compared} blocks compared, byte for byte; cases that were not as they must be: {wrong or 'none'}")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
