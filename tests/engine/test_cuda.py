"""The same engine on a CUDA device."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvbelt.engine.api import BlockHold
from kvbelt.engine.engine import Engine
from kvbelt.engine.settings import EngineSettings
from tests.engine.support import GREEDY, Client, reference_greedy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]

PROMPTS = [list(b"hello"), list(b"a much longer prompt than the others, over several chunks"), [1], list(b"xyz" * 9)]


@pytest.fixture(scope="module")
def engine(tiny_llama: Path):
    """Small chunks, so that prompts and decodes mix."""
    engine = Engine(
        EngineSettings(tiny_llama, device="cuda", dtype="float32", kv_bytes=1 << 20, max_batch_tokens=16, max_running=8)
    )
    engine.start()
    yield engine
    engine.close()
    engine.validate()


def test_greedy_tokens_are_transformers_own(engine: Engine, tiny_llama: Path) -> None:
    """Several requests at once answer as transformers does on the CPU."""
    clients = [Client(engine, prompt) for prompt in PROMPTS]
    assert [client.token_ids for client in clients] == [reference_greedy(tiny_llama, prompt, 24) for prompt in PROMPTS]


def test_seeded_draws_are_the_cpus(engine: Engine, tiny_llama: Path) -> None:
    """A seed draws the same tokens on both devices."""
    params = replace(GREEDY, temperature=0.8, top_p=0.9, seed=7, logprobs=2)
    on_cuda = [Client(engine, prompt, params) for prompt in PROMPTS]
    cpu = Engine(EngineSettings(tiny_llama, device="cpu", kv_bytes=1 << 20))
    cpu.start()
    try:
        on_cpu = [Client(cpu, prompt, params) for prompt in PROMPTS]
        assert [client.token_ids for client in on_cuda] == [client.token_ids for client in on_cpu]
    finally:
        cpu.close()


def test_blocks_are_final_after_their_event(engine: Engine) -> None:
    """A carrier that waits for each event on its own stream copies the final bytes."""

    class Carrier:
        def __init__(self) -> None:
            self.stream = torch.cuda.Stream()
            self.copies: list[tuple[int, int, torch.Tensor]] = []
            self.hold: BlockHold | None = None

        def blocks_written(self, layer: int, first: int, block_ids: Sequence[int], ready: torch.cuda.Event) -> None:
            """Wait for the event, then copy on a stream of its own."""
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(ready)
                self.copies.extend((layer, block, engine.pool.layers[layer][block].clone()) for block in block_ids)

        def finished(self, hold: BlockHold, *, complete: bool) -> None:
            """Keep the hold."""
            assert complete
            self.hold = hold

    carrier = Carrier()
    Client(engine, PROMPTS[1], replace(GREEDY, max_tokens=1), outgoing=carrier).wait()
    torch.cuda.synchronize()
    filled, tail = divmod(len(PROMPTS[1]), engine.layout.block_size)
    assert len(carrier.copies) == 3 * (filled + (tail > 0))
    whole = set(carrier.hold.block_ids[:filled])
    for layer, block, copy in carrier.copies:
        used = engine.layout.block_size if block in whole else tail
        assert torch.equal(copy[:used], engine.pool.layers[layer][block][:used])
    carrier.hold.release()
