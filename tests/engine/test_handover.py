"""KV carried by hand from one engine to another."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from kvbelt.engine.api import FinishReason
from tests.engine.support import (
    GREEDY,
    PROMPT,
    Carrier,
    Client,
    Delivery,
    abort_while_computed,
    between_steps,
    engine_of,
)


@pytest.mark.parametrize("max_batch_tokens", [6, 512])
def test_decode_goes_on_from_carried_kv(tiny_llama: Path, max_batch_tokens: int) -> None:
    """An engine that is given a prompt's KV produces the tokens of the first engine."""
    with (
        engine_of(tiny_llama, max_batch_tokens=max_batch_tokens, max_running=4) as prefill,
        engine_of(tiny_llama) as decode,
    ):
        expected = Client(prefill, PROMPT).token_ids
        carrier = Carrier(prefill)
        first = Client(prefill, PROMPT, replace(GREEDY, max_tokens=1), outgoing=carrier).token_ids
        assert carrier.ends == [True]
        carrier.hold.release()

        # Re-deriving the first token, from KV of the whole prompt.
        delivery = Delivery(decode, carrier, len(PROMPT))
        client = Client(decode, PROMPT, incoming=delivery)
        assert client.token_ids == expected
        assert client.last.timing.loaded_tokens == len(PROMPT) - 1
        assert client.last.timing.computed_tokens == 1
        assert (delivery.loads, delivery.releases) == (1, 1)

        # Going on after the first token.
        delivery = Delivery(decode, carrier, len(PROMPT))
        client = Client(decode, PROMPT + first, replace(GREEDY, max_tokens=23), incoming=delivery)
        assert first + client.token_ids == expected
        assert decode.load().prompt_tokens_total == 2


def test_each_block_of_each_layer_is_announced_once_in_order(tiny_llama: Path) -> None:
    """Blocks come layer by layer and chunk by chunk, ascending, the partly filled one last."""
    with engine_of(tiny_llama, max_batch_tokens=10, max_running=4) as engine:
        carrier = Carrier(engine)
        client = Client(engine, PROMPT, replace(GREEDY, max_tokens=3), outgoing=carrier).wait()
        blocks = engine.layout.blocks(len(PROMPT))
        for layer in range(3):
            calls = [(first, len(ids)) for at, first, ids in carrier.calls if at == layer]
            assert calls == [(0, 2), (2, 3), (5, 2), (7, 2)]
        assert [layer for layer, *_ in carrier.calls] == [0, 1, 2] * 4
        assert len(carrier.copied) == 3 * blocks
        assert carrier.hold.block_ids == tuple(b for layer, _, ids in carrier.calls if layer == 0 for b in ids)
        assert len(client.token_ids) == 3
        carrier.hold.release()


def test_held_blocks_stay_until_released(tiny_llama: Path) -> None:
    """A new request that needs held blocks waits for their release, and then runs."""
    with engine_of(tiny_llama, num_blocks=12) as engine:
        carrier = Carrier(engine)
        Client(engine, PROMPT, replace(GREEDY, max_tokens=1), outgoing=carrier).wait()
        assert engine.load().blocks_free == 12 - 9
        waiting = Client(engine, PROMPT, replace(GREEDY, max_tokens=4))
        small = threading.Thread(target=carrier.hold.release)
        assert not waiting.outputs
        small.start()
        assert len(waiting.token_ids) == 4
        small.join()
        carrier.hold.release()


def test_lost_kv_is_computed(tiny_llama: Path) -> None:
    """Lost KV costs time, but changes no token."""
    with engine_of(tiny_llama) as engine:
        expected = Client(engine, PROMPT).token_ids
        delivery = Delivery(engine, Carrier(engine), len(PROMPT), lost=True)
        client = Client(engine, PROMPT, incoming=delivery)
        assert client.token_ids == expected
        assert client.last.timing.loaded_tokens == 0
        assert (delivery.loads, delivery.releases) == (1, 1)


def test_partial_kv_is_completed(tiny_llama: Path) -> None:
    """KV of the first part of a prompt is used, the rest computed."""
    with engine_of(tiny_llama) as engine:
        carrier = Carrier(engine)
        expected = Client(engine, PROMPT, outgoing=carrier).token_ids
        carrier.hold.release()
        client = Client(engine, PROMPT, incoming=Delivery(engine, carrier, 13))
        assert client.token_ids == expected
        assert client.last.timing.loaded_tokens == 13


def test_received_kv_can_be_handed_on(tiny_llama: Path) -> None:
    """A request with incoming and outgoing KV announces loaded blocks as well as computed ones."""
    with engine_of(tiny_llama) as engine:
        first, second = Carrier(engine), Carrier(engine)
        expected = Client(engine, PROMPT, outgoing=first).token_ids
        first.hold.release()
        client = Client(engine, PROMPT, incoming=Delivery(engine, first, 13), outgoing=second)
        assert client.token_ids == expected
        second.hold.release()
        assert second.ends == [True]
        assert Client(engine, PROMPT, incoming=Delivery(engine, second, len(PROMPT))).token_ids == expected


def test_preempted_after_loading_is_computed(tiny_llama: Path) -> None:
    """KV is loaded once; after a preemption the request is computed, with the same tokens."""
    with engine_of(tiny_llama, num_blocks=64) as engine:
        carrier = Carrier(engine)
        expected = Client(engine, PROMPT, outgoing=carrier).token_ids
        carrier.hold.release()
    with engine_of(tiny_llama, num_blocks=21) as engine:
        deliveries = [Delivery(engine, carrier, len(PROMPT)) for _ in range(2)]
        with between_steps(engine):
            clients = [Client(engine, PROMPT, incoming=delivery) for delivery in deliveries]
        assert [client.token_ids for client in clients] == [expected] * 2
        assert engine.load().preemptions_total > 0
        assert [(d.loads, d.releases) for d in deliveries] == [(1, 1)] * 2


def test_a_request_with_outgoing_is_never_preempted(tiny_llama: Path) -> None:
    """When memory is short, only requests without a carrier are preempted."""
    with engine_of(tiny_llama, num_blocks=24) as engine:
        carriers = [Carrier(engine), None, Carrier(engine), None]
        with between_steps(engine):
            clients = [Client(engine, PROMPT[:20], outgoing=carrier) for carrier in carriers]
        preemptions = [client.last.timing.preemptions for client in clients]
        assert preemptions[::2] == [0, 0]
        assert sum(preemptions) == engine.load().preemptions_total > 0
        for client, carrier in zip(clients, carriers, strict=True):
            assert client.finish is FinishReason.LENGTH
            if carrier is not None:
                assert carrier.ends == [True]
                carrier.hold.release()


@pytest.mark.parametrize("phase", ["waiting", "prefill", "decoding"])
def test_abort_tells_outgoing_once(tiny_llama: Path, phase: str) -> None:
    """The carrier's ``finished`` is called once, and its hold gives the blocks back."""
    with engine_of(tiny_llama, num_blocks=40, max_batch_tokens=4, max_running=1) as engine:
        carrier = Carrier(engine)
        delivery = Delivery(engine, carrier, 0)
        if phase == "prefill":
            abort_while_computed(engine, "victim")
        with between_steps(engine):
            if phase == "waiting":
                Client(engine, [1])
            victim = Client(
                engine, PROMPT, replace(GREEDY, max_tokens=100), name="victim", outgoing=carrier, incoming=delivery,
                abort_at=1 if phase == "decoding" else None,
            )  # fmt: skip
            if phase == "waiting":
                engine.abort("victim")
        assert victim.finish is FinishReason.ABORT
        assert carrier.ends == [phase == "decoding"]
        assert delivery.releases == 1
        carrier.hold.release()


def test_a_torn_belt_does_not_stop_the_request(tiny_llama: Path) -> None:
    """A carrier that raises gets ``finished`` with an incomplete prompt, and the client gets its tokens."""
    with engine_of(tiny_llama) as engine:
        expected = Client(engine, PROMPT).token_ids
        carrier = Carrier(engine, fail_in_layer=1)
        assert Client(engine, PROMPT, outgoing=carrier).token_ids == expected
        assert carrier.ends == [False]
        carrier.hold.release()
