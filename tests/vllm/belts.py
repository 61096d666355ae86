"""A belt as in a vLLM worker process, and a clock set by hand."""

import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from kvbelt.about import of_this_process
from kvbelt.belt_facts import view_of
from kvbelt.channels.nixl import NixlChannel
from kvbelt.paged_copy import TorchPagedCopy
from kvbelt.transfer.belt import Belt
from kvbelt.transfer.ports import Region
from kvbelt.transfer.settings import BeltIdentity, BeltSettings
from kvbelt.vllm.background import Background
from kvbelt.vllm.compute import CpuCompute
from kvbelt.vllm.held_prefixes import HeldPrefixes
from kvbelt.vllm.host_memory import host_memory
from kvbelt.vllm.host_worker import HostWorker
from kvbelt.vllm.identity import Rank, RankIdentity
from kvbelt.vllm.pacing import Pacing, StepLimits
from kvbelt.vllm.pages import pages_of, with_drafter
from kvbelt.vllm.step_messages import Claim, Send, StepCommands
from kvbelt.vllm.worker_side import WorkerSide
from kvbelt.wire.handoff import DecodeHandoff, PrefillHandoff
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.layout import KVLayout
from kvbelt.wire.shards import Ranks, heads_of
from tests.channels.memory import MemoryChannel, MemoryNetwork

LAYERS, BLOCKS, BLOCK, WIDTH = 3, 20, 16, 8
DRAFT_LAYERS = 2


def pacing() -> Pacing:
    """Of a server that nothing is asked of in time."""
    return Pacing(StepLimits(BLOCK, 512, 64, 100 * BLOCK), lambda: 0.0)


class BeltServer:
    """What one vLLM worker process has: KV, a belt, the worker's side."""

    def __init__(
        self,
        role: str,
        network: MemoryNetwork,
        rank: Rank = Rank(),  # noqa: B008
        windows: tuple[int, ...] = (),
        *,
        kv_heads: int | None = None,
        tokens_first: bool = False,
        block: int = BLOCK,
        backend: str = "test",
        drafter: str = "",
        **settings: Any,
    ) -> None:
        kv_heads = 2 * rank.size if kv_heads is None else kv_heads
        self.heads = heads_of(rank.number, rank.size, kv_heads)
        heads = len(self.heads)
        self.layers = Ranks(rank.size, rank.stages).layers_of(rank.stage, LAYERS)

        def layer() -> torch.Tensor:
            if tokens_first:
                return torch.randn(BLOCKS, block, heads, WIDTH).permute(0, 2, 1, 3)
            return torch.randn(BLOCKS, heads, block, WIDTH)

        self.kv = {f"model.layers.{i}.attn": layer() for i in self.layers}
        block_bytes = heads * block * WIDTH * 4
        pages = pages_of(self.kv, BLOCKS, block_bytes, backend, heads)
        if drafter:
            drafts = {f"draft_model.layers.{i}.attn": layer() for i in range(DRAFT_LAYERS)}
            pages = with_drafter(pages, drafts, BLOCKS, backend, heads)
            self.kv |= drafts
        cuts = pages.head_runs, pages.tokens_outside, pages.draft_layers, drafter
        shape = len(pages.rows), heads, WIDTH // 2, block, "float32", pages.order, block_bytes, windows
        layout = KVLayout(*shape, *cuts)
        self.layout, self._groups = layout, 1 + len(windows)
        staging = torch.zeros(len(pages.rows) * BLOCKS * block_bytes, dtype=torch.uint8)
        region = Region(staging.data_ptr(), staging.numel(), "cpu")
        sends = role == "prefill"
        copy = TorchPagedCopy(pages.rows, staging if sends else None, None if sends else staging)
        engine_id = EngineId(uuid.uuid4().hex)
        identity = BeltIdentity(
            engine_id,
            role,
            "m",
            "f",
            layout,
            rank.number,
            rank.size,
            kv_heads,
            model_layers=rank.model_layers,
            stages=rank.stages,
            stage=rank.stage,
        )
        channel = MemoryChannel(identity.engine_id, network)
        held = HeldPrefixes()
        send, receive = (region, None) if sends else (None, region)
        self.belt = Belt(identity, BeltSettings(**settings), channel, copy, send, receive, prefix=held)
        self.belt.start()
        self.host = HostWorker(host_memory(pages.rows, len(pages.rows) * block_bytes * 10)) if sends else None
        views = Background(partial(view_of, self.belt, NixlChannel(engine_id)))
        self.side = WorkerSide(self.belt, CpuCompute(), self.host, held, views, [self._groups] * len(pages.rows))
        self.identity = RankIdentity(engine_id, self.belt.receiver_address(), 0, of_this_process(role))

    def step(self, commands: StepCommands, *, hooks: bool = True) -> None:
        """One step of the model runner."""
        self.side.begin_step(commands)
        if hooks:
            for group in range(self._groups):
                for layer in range(self.layout.num_layers):
                    self.side.layer_written(layer, group)
        self.side.end_step()

    def close(self) -> None:
        self.belt.close()
        self.side.close()


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Poll until the condition is true."""
    give_up = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < give_up, "it never came"
        threading.Event().wait(0.002)
    return found


def send(decode: BeltServer, name: str, num_tokens: int, seconds: float = 10.0) -> Send:
    """The command to send to a decode worker."""
    receiver = decode.belt.receiver_address()
    assert receiver is not None
    return Send(name, PrefillHandoff(TransferId(name), receiver, seconds), num_tokens)


def claim(name: str, seconds: float = 10.0) -> Claim:
    """The command to wait for KV."""
    return Claim(name, DecodeHandoff(TransferId(name), seconds))


def loaded(server: BeltServer) -> set[str]:
    """Poll for ended loads, as vLLM does with each step."""
    return until(lambda: server.side.finished(set())[1])


RECEIVER = {"engine_id": "d", "host": "127.0.0.1", "init_port": 7300, "alloc_port": 7400}


TO_SEND = {"transfer_id": "t", "receiver": RECEIVER, "deadline_seconds": 30.0}


TO_LOAD = {"transfer_id": "t", "deadline_seconds": 30.0}


class Clock:
    """A clock set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now
