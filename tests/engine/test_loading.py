"""Incoming KV is loaded beside the running batch, and no end of a load disturbs another request."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kvbelt.engine import loading
from kvbelt.engine.api import FinishReason, IncomingKVLostError
from kvbelt.engine.engine import Engine
from tests.engine.support import DEADLINE, GREEDY, PROMPT, Carrier, Client, Delivery, engine_of, eventually, prefix_of

OTHER = list(b"somebody else's prompt")


class Gate(Delivery):
    """A delivery that waits for the test."""

    def __init__(self, engine: Engine, carrier: Carrier, *, lost: bool = False) -> None:
        super().__init__(engine, carrier, len(PROMPT), lost=lost)
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.threads: list[str] = []
        self.waits = True

    def load(self, block_ids: Sequence[int], first: int) -> None:
        """Wait, then copy; after a release the KV is lost."""
        self.threads.append(threading.current_thread().name)
        self.begun.set()
        if self.waits:
            assert self.go_on.wait(DEADLINE)
        if self.releases:
            raise IncomingKVLostError("released", reason="gone")
        super().load(block_ids, first)

    def release(self) -> None:
        """Count, and open the gate."""
        super().release()
        self.go_on.set()


@pytest.fixture
def carrier(tiny_llama: Path) -> Carrier:
    """The prompt's KV, computed by another engine."""
    with engine_of(tiny_llama) as engine:
        carrier = Carrier(engine)
        carrier.expected = Client(engine, PROMPT, outgoing=carrier).token_ids
        carrier.hold.release()
    return carrier


def test_others_go_on_while_one_loads(tiny_llama: Path, carrier: Carrier) -> None:
    """Other requests are admitted and answered beside a long load."""
    with engine_of(tiny_llama) as engine:
        expected = Client(engine, OTHER).token_ids
        gate = Gate(engine, carrier)
        client = Client(engine, PROMPT, incoming=gate)
        assert gate.begun.wait(DEADLINE)
        assert Client(engine, OTHER).token_ids == expected
        load = engine.load()
        assert (load.running, load.loading, load.waiting) == (0, 1, 1)
        gate.go_on.set()
        assert client.token_ids == carrier.expected
        assert client.last.timing.load > 0
        assert gate.threads[0].startswith("kvbelt-load")


def test_lost_while_loading_is_computed(tiny_llama: Path, carrier: Carrier) -> None:
    """The timing has the reason of a failed load, and the answer is the same."""
    with engine_of(tiny_llama) as engine:
        gate = Gate(engine, carrier, lost=True)
        client = Client(engine, PROMPT, incoming=gate)
        gate.go_on.set()
        assert client.token_ids == carrier.expected
        assert client.last.timing.lost == "expired_before_load"
        assert client.last.timing.computed_tokens == len(PROMPT)


def test_a_broken_load_is_computed(tiny_llama: Path, carrier: Carrier, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception of any kind ends the load, not the request."""
    with engine_of(tiny_llama) as engine:
        delivery = Delivery(engine, carrier, len(PROMPT))
        monkeypatch.setattr(delivery, "load", lambda *_: 1 / 0)
        client = Client(engine, PROMPT, incoming=delivery)
        assert client.token_ids == carrier.expected
        assert client.last.timing.lost == "copy_failed"
        assert delivery.releases == 1


def test_an_aborted_load_gives_its_blocks_back_at_its_end(tiny_llama: Path, carrier: Carrier) -> None:
    """The client's request ends at once. The blocks stay with the load until it ends."""
    with engine_of(tiny_llama, num_blocks=20) as engine:
        gate = Gate(engine, carrier)
        stays = threading.Event()
        gate.release = lambda: (setattr(gate, "releases", gate.releases + 1), stays.wait(DEADLINE))  # type: ignore[method-assign]
        client = Client(engine, PROMPT, name="victim", incoming=gate)
        assert gate.begun.wait(DEADLINE)
        engine.abort("victim")
        assert client.finish is FinishReason.ABORT
        assert engine.load().blocks_free == 20 - engine.layout.blocks(len(PROMPT) - 1)
        # The rest of the pool serves on, and a request of the same name is another request.
        again = Client(engine, list(b"short"), replace(GREEDY, max_tokens=4), name="victim")
        assert again.finish is FinishReason.LENGTH
        stays.set()
        gate.go_on.set()
        eventually(lambda: engine.load().blocks_free == 20)
        assert gate.releases == 1


def test_close_ends_loads(tiny_llama: Path, carrier: Carrier) -> None:
    """Closing releases all incoming KV, waits for the ends of the loads, and leaves no thread."""
    with engine_of(tiny_llama) as engine:
        gates = [Gate(engine, carrier) for _ in range(loading.LOADERS + 2)]
        clients = [Client(engine, PROMPT, incoming=gate, name=str(i)) for i, gate in enumerate(gates)]
        for gate in gates[: loading.LOADERS]:
            assert gate.begun.wait(DEADLINE)
        engine.close()
        assert {client.finish for client in clients} == {FinishReason.ABORT}
        assert [gate.releases for gate in gates] == [1] * len(gates)
    assert not [
        thread.name for thread in threading.enumerate() if thread.name.startswith(("kvbelt-load", "kvbelt-rel"))
    ]


def test_more_loads_than_loaders_take_turns(tiny_llama: Path, carrier: Carrier) -> None:
    """Loads beyond the number of loaders wait, and all of them end."""
    with engine_of(tiny_llama, num_blocks=200, max_running=16) as engine:
        gates = [Gate(engine, carrier) for _ in range(loading.LOADERS * 2)]
        clients = [Client(engine, PROMPT, incoming=gate, name=str(i)) for i, gate in enumerate(gates)]
        for gate in gates[: loading.LOADERS]:
            assert gate.begun.wait(DEADLINE)
        assert not gates[loading.LOADERS].begun.is_set()
        for gate in gates:
            gate.go_on.set()
        assert [client.token_ids for client in clients] == [carrier.expected] * len(gates)


def test_choices_load_once_and_share(tiny_llama: Path, carrier: Carrier) -> None:
    """Several sequences with one delivery: the first loads, the others share its blocks and load the rest."""
    with engine_of(tiny_llama) as engine:
        calls: list[tuple[int, int]] = []

        class Noted(Delivery):
            def load(self, block_ids: Sequence[int], first: int) -> None:
                calls.append((first, len(block_ids)))
                super().load(block_ids, first)

        delivery = Noted(engine, carrier, len(PROMPT))
        prompt = PROMPT[:-1]  # its last block is not full
        names = prefix_of(prompt, 4)
        clients = [Client(engine, prompt, incoming=delivery, prefix=names, name=str(i)) for i in range(3)]
        first, *others = (client.token_ids for client in clients)
        assert others == [first] * 2
        assert calls == [(0, 8)] + [(7, 1)] * 2
        assert delivery.releases == 3


def test_what_is_loaded_is_found_by_others(tiny_llama: Path, carrier: Carrier) -> None:
    """Loaded blocks are shared like computed ones, once they are loaded."""
    with engine_of(tiny_llama) as engine:
        gate = Gate(engine, carrier)
        loading_client = Client(engine, PROMPT, incoming=gate, prefix=prefix_of(PROMPT, 4))
        assert gate.begun.wait(DEADLINE)
        early = Client(engine, PROMPT, prefix=prefix_of(PROMPT, 4)).wait()
        assert early.last.timing.cached_tokens == 0
        gate.go_on.set()
        assert loading_client.token_ids == early.token_ids == carrier.expected
    with engine_of(tiny_llama) as engine:
        Client(engine, PROMPT, incoming=Delivery(engine, carrier, len(PROMPT)), prefix=prefix_of(PROMPT, 4)).wait()
        late = Client(engine, PROMPT, prefix=prefix_of(PROMPT, 4))
        assert late.token_ids == carrier.expected
        assert late.last.timing.cached_tokens == 32


def test_only_the_tail_is_loaded_behind_a_cached_prefix(tiny_llama: Path, carrier: Carrier) -> None:
    """Cached blocks need not be sent; if they are evicted, the KV is lost and the reason reported."""
    with engine_of(tiny_llama, num_blocks=24) as engine:
        names = prefix_of(PROMPT, 4)
        Client(engine, PROMPT[:17], replace(GREEDY, max_tokens=1), prefix=prefix_of(PROMPT[:17], 4)).wait()
        assert engine.held(names.hashes) == 4
        tail = Delivery(engine, carrier, len(PROMPT))
        tail.first_block = 3
        client = Client(engine, PROMPT, incoming=tail, prefix=names)
        assert client.token_ids == carrier.expected
        timing = client.last.timing
        assert (timing.cached_tokens, timing.loaded_tokens, timing.computed_tokens) == (16, 16, 1)

        # Another request needs all the memory before the blocks are used.
        assert engine.held(names.hashes) == 8
        Client(engine, [7] * 90, replace(GREEDY, max_tokens=6)).wait()
        late = Delivery(engine, carrier, len(PROMPT))
        late.first_block = 8
        client = Client(engine, PROMPT, incoming=late, prefix=names)
        assert client.token_ids == carrier.expected
        assert (client.last.timing.lost, late.loads, late.releases) == ("prefix_evicted", 0, 1)
