"""The worker's side, with real belts over memory in one process: every byte that arrives is compared."""

from collections.abc import Iterator

import msgspec
import pytest
import torch
import zmq

from kvbelt.vllm.identity import Rank, together
from kvbelt.vllm.step_messages import HostCopy, Load, Send, StepCommands, Written
from kvbelt.wire import notification
from kvbelt.wire.handoff import DecodeOutcome, PrefillHandoff
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.notification import OutcomeReport, StepsReport
from tests.channels.memory import MemoryNetwork
from tests.vllm.belts import BLOCKS, BeltServer, claim, loaded, send, until
from tests.wire.messages import STEPS


@pytest.mark.parametrize("hooks", [True, False], ids=["hooks", "one-graph"])
def test_chunks_arrive_whole(prefill: BeltServer, decode: BeltServer, hooks: bool) -> None:
    """A prompt sent in two chunks lies in the decode worker's blocks byte for byte, and everything is given back."""
    prefill.step(StepCommands(sends=(send(decode, "a", 40),), written=(Written("a", 0, (7,), False),)), hooks=hooks)
    prefill.step(StepCommands(written=(Written("a", 1, (2, 11), True),)), hooks=hooks)
    decode.step(StepCommands(claims=(claim("a"),), loads=(Load("a", 0, (4, 3, 9), 40),)))
    assert loaded(decode) == {"a"}
    assert decode.side.take_bad_blocks() == set()
    for name, ours in decode.kv.items():
        assert torch.equal(ours[[4, 3, 9]], prefill.kv[name][[7, 2, 11]])
    assert decode.side.take_report().received == {"a": ""}
    assert prefill.side.finished({"a"})[0] or until(lambda: prefill.side.finished(set())[0]) == {"a"}


def test_the_proxy_is_told_of_steps_and_outcomes() -> None:
    """In the server's name, with the step that brings the report."""
    with zmq.Context() as context, context.socket(zmq.PULL) as proxy:
        proxy.rcvtimeo = 20_000
        port = proxy.bind_to_random_port("tcp://127.0.0.1")
        server = BeltServer("decode", MemoryNetwork(), notification_endpoint=f"tcp://127.0.0.1:{port}")
        try:
            engine, outcome = server.identity.engine_id, DecodeOutcome(TransferId("t"), "received")
            server.step(StepCommands(steps=STEPS))
            assert notification.decode(proxy.recv()) == StepsReport(engine=engine, steps=STEPS)
            server.step(StepCommands(outcomes=(outcome,)))
            assert notification.decode(proxy.recv()) == OutcomeReport(engine=engine, outcome=outcome)
        finally:
            server.close()


def test_only_what_is_lacking_is_filled(prefill: BeltServer, decode: BeltServer) -> None:
    """Blocks that the decode worker has cached are not touched."""
    before = {name: kv.clone() for name, kv in decode.kv.items()}
    prefill.step(StepCommands(sends=(send(decode, "a", 40),), written=(Written("a", 0, (7, 2, 11), True),)))
    decode.step(StepCommands(claims=(claim("a"),), loads=(Load("a", 2, (9,), 39),)))
    loaded(decode)
    for name, ours in decode.kv.items():
        assert torch.equal(ours[9], prefill.kv[name][11])
        untouched = [block for block in range(BLOCKS) if block != 9]
        assert torch.equal(ours[untouched], before[name][untouched])


def test_kv_of_another_length_is_not_used(prefill: BeltServer, decode: BeltServer) -> None:
    """KV of another prompt length is refused, and the blocks are computed."""
    prefill.step(StepCommands(sends=(send(decode, "a", 40),), written=(Written("a", 0, (7, 2, 11), True),)))
    decode.step(StepCommands(claims=(claim("a"),), loads=(Load("a", 0, (4, 5), 20),)))
    assert loaded(decode) == {"a"}
    assert decode.side.take_bad_blocks() == {4, 5}
    assert decode.side.take_report().received == {"a": "wrong_length"}


def test_lost_kv_is_reported_with_its_blocks(decode: BeltServer) -> None:
    """If KV misses its deadline, the load ends and its blocks are reported."""
    decode.step(StepCommands(claims=(claim("a", 0.2),), loads=(Load("a", 0, (4, 5), 20),)))
    assert loaded(decode) == {"a"}
    assert decode.side.take_bad_blocks() == {4, 5}
    assert decode.side.take_bad_blocks() == set()
    assert decode.side.take_report().received["a"]


def test_a_dropped_load_ends_without_bad_blocks(decode: BeltServer) -> None:
    """An aborted request's load is reported, so that vLLM frees its blocks; none is to be recomputed."""
    decode.step(StepCommands(claims=(claim("a", 60.0),), loads=(Load("a", 0, (4, 5), 20),)))
    assert decode.side.finished(set()) == (set(), set())
    decode.step(StepCommands(drops=("a",)))
    assert loaded(decode) == {"a"}
    assert decode.side.take_bad_blocks() == set()


def test_a_dropped_claim_frees_its_slot(prefill: BeltServer, decode: BeltServer) -> None:
    """KV that has arrived and is not needed frees its slot, and nothing is reported."""
    prefill.step(StepCommands(sends=(send(decode, "a", 16),), written=(Written("a", 0, (1,), True),)))
    until(lambda: decode.belt.snapshot().bytes_committed)
    decode.step(StepCommands(claims=(claim("a"),)))
    decode.step(StepCommands(drops=("a",)))
    until(lambda: decode.belt.snapshot().bytes_committed == 0)
    assert decode.side.finished(set()) == (set(), set())


def test_an_aborted_prompt_gives_its_blocks_back(prefill: BeltServer, decode: BeltServer) -> None:
    """When a request ends before its prompt is complete, the decode worker loses the KV and the blocks are free."""
    prefill.step(StepCommands(sends=(send(decode, "a", 40),), written=(Written("a", 0, (7,), False),)))
    decode.step(StepCommands(claims=(claim("a"),), loads=(Load("a", 0, (4, 5, 6), 40),)))
    sent, _ = prefill.side.finished({"a"})
    assert sent == {"a"} or until(lambda: prefill.side.finished(set())[0]) == {"a"}
    assert loaded(decode) == {"a"}
    assert decode.side.take_bad_blocks() == {4, 5, 6}


def test_a_preempted_prompt_is_read_no_more(prefill: BeltServer, decode: BeltServer) -> None:
    """The belt has stopped reading when the step that preempts begins, and nothing is reported twice."""
    prefill.step(StepCommands(sends=(send(decode, "a", 40),), written=(Written("a", 0, (7,), False),)))
    prefill.step(StepCommands(preempted=("a",)))
    assert prefill.belt.snapshot().staging_bytes_used == 0
    decode.step(StepCommands(claims=(claim("a"),), loads=(Load("a", 0, (4, 5, 6), 40),)))
    assert loaded(decode) == {"a"}
    assert decode.side.take_bad_blocks() == {4, 5, 6}
    assert prefill.side.finished({"a"}) == (set(), set())


def test_a_mismatch_is_refused_and_recomputed(prefill: BeltServer, decode: BeltServer) -> None:
    """A decode worker of another incarnation refuses, and both sides learn the reason."""
    order = send(decode, "a", 16)
    stale = msgspec.structs.replace(order.handoff.receiver, engine_id=EngineId("another"))
    order = Send("a", msgspec.structs.replace(order.handoff, receiver=stale), 16)
    prefill.step(StepCommands(sends=(order,), written=(Written("a", 0, (1,), True),)))
    until(lambda: prefill.side.finished({"a"})[0])
    assert until(lambda: prefill.side.take_report().sent)["a"]


def test_blocks_from_host_memory_are_sent(prefill: BeltServer, decode: BeltServer) -> None:
    """A prompt with a restored head arrives whole, and its blocks come back once they are read."""
    prefill.step(StepCommands(keeps=(HostCopy("old", (7, 2), (0, 1), to_host=True),)))
    until(lambda: prefill.side.finished({"old"})[0] or prefill.side.finished(set())[0])
    kept = {name: kv[[7, 2]].clone() for name, kv in prefill.kv.items()}
    for kv in prefill.kv.values():
        kv[[7, 2]] = 0
    prefill.step(StepCommands(copies=(HostCopy("a", (10, 12), (0, 1)),)))
    assert loaded(prefill) == {"a"}
    orders = StepCommands(
        sends=(send(decode, "a", 40),),
        written=(Written("a", 0, (10, 12, 3), True),),
        keeps=(HostCopy("a", (3,), (2,), to_host=True),),
    )
    prefill.step(orders)
    decode.step(StepCommands(claims=(claim("a"),), loads=(Load("a", 0, (4, 5, 9), 40),)))
    assert loaded(decode) == {"a"}
    for name, ours in decode.kv.items():
        assert torch.equal(ours[[4, 5]], kept[name])
        assert torch.equal(ours[9], prefill.kv[name][3])
    assert prefill.side.finished({"a"})[0] or until(lambda: prefill.side.finished(set())[0]) == {"a"}


def test_blocks_of_a_request_that_has_ended_are_kept(prefill: BeltServer) -> None:
    """They are copied with the step that ends it, and given back after that."""
    kept = {name: kv[[7, 2]].clone() for name, kv in prefill.kv.items()}
    prefill.step(StepCommands(copies=(HostCopy("old", (7, 2), (0, 1), to_host=True),)))
    assert prefill.side.finished({"old"})[0] or until(lambda: prefill.side.finished(set())[0]) == {"old"}
    prefill.step(StepCommands(copies=(HostCopy("a", (10, 12), (0, 1)),)))
    assert loaded(prefill) == {"a"}
    for name, kv in prefill.kv.items():
        assert torch.equal(kv[[10, 12]], kept[name])


def test_a_decode_server_is_connected_to_before_a_prompt_comes(prefill: BeltServer, decode: BeltServer) -> None:
    """The handshake is over when the first transfer begins."""
    receiver = decode.belt.receiver_address()
    assert receiver is not None
    prefill.step(StepCommands(warms=(receiver,)))
    assert until(lambda: prefill.side.take_report().peers) == {receiver.engine_id: ""}
    assert prefill.belt.snapshot().peers == 1


@pytest.fixture
def ranks(network: MemoryNetwork) -> Iterator[dict[str, list[BeltServer]]]:
    """Two tensor-parallel ranks on either side."""
    servers = {
        role: [BeltServer(role, network, Rank(number, 2)) for number in range(2)] for role in ("prefill", "decode")
    }
    yield servers
    for side in servers.values():
        for server in side:
            server.close()


def send_to(ranks: list[BeltServer], name: str, num_tokens: int) -> Send:
    """The command that every rank of the prefill worker gets."""
    receiver = together([rank.identity for rank in ranks]).receiver
    assert receiver is not None
    return Send(name, PrefillHandoff(TransferId(name), receiver, 10.0), num_tokens)


def test_each_rank_sends_to_its_own(ranks: dict[str, list[BeltServer]]) -> None:
    """Rank i's part of every block arrives at rank i, byte for byte."""
    order = send_to(ranks["decode"], "a", 40)
    for rank in ranks["prefill"]:
        rank.step(StepCommands(sends=(order,), written=(Written("a", 0, (7, 2, 11), True),)))
    for ours, theirs in zip(ranks["decode"], ranks["prefill"], strict=True):
        ours.step(StepCommands(claims=(claim("a"),), loads=(Load("a", 0, (4, 3, 9), 40),)))
        assert loaded(ours) == {"a"}
        assert ours.side.take_bad_blocks() == set()
        for name, kv in ours.kv.items():
            assert torch.equal(kv[[4, 3, 9]], theirs.kv[name][[7, 2, 11]])


def test_one_lost_rank_reports_its_own_loss(ranks: dict[str, list[BeltServer]]) -> None:
    """If rank 1 never sends, rank 0 has its part, rank 1 reports its blocks, and the request has lost its KV."""
    order = send_to(ranks["decode"], "a", 40)
    ranks["prefill"][0].step(StepCommands(sends=(order,), written=(Written("a", 0, (7, 2, 11), True),)))
    for ours in ranks["decode"]:
        ours.step(StepCommands(claims=(claim("a", 1.0),), loads=(Load("a", 0, (4, 3, 9), 40),)))
        assert loaded(ours) == {"a"}
    bad = [rank.side.take_bad_blocks() for rank in ranks["decode"]]
    assert bad == [set(), {4, 3, 9}]
    first, second = (rank.side.take_report() for rank in ranks["decode"])
    assert first.plus(second).received["a"] == second.received["a"] != ""


def test_heads_that_cannot_be_dealt_are_not_sent(decode: BeltServer, ranks: dict[str, list[BeltServer]]) -> None:
    """Every rank refuses a receiver of three ranks for its four heads, and no block is held."""
    receiver = together([decode.identity] * 3).receiver
    assert receiver is not None
    order = Send("a", PrefillHandoff(TransferId("a"), receiver, 10.0), 16)
    for rank in ranks["prefill"]:
        rank.step(StepCommands(sends=(order,), written=(Written("a", 0, (1,), True),)))
        assert rank.side.finished({"a"})[0] or until(lambda rank=rank: rank.side.finished(set())[0]) == {"a"}
        assert until(lambda rank=rank: rank.side.take_report().sent) == {"a": "refused_tp_size"}


def test_arrived_kv_is_in_place_when_the_step_begins(prefill: BeltServer, decode: BeltServer) -> None:
    """Loaded now, KV can be used in the same step; its slot is free, and no load is reported."""
    prefill.step(StepCommands(sends=(send(decode, "a", 40),), written=(Written("a", 0, (7, 2, 11), True),)))
    until(lambda: decode.belt.snapshot().bytes_committed)
    decode.side.loading.obey(StepCommands(claims=(claim("a"),)))
    kv = decode.side.loading.arrived("a", 10.0)
    assert kv is not None
    assert (kv.num_tokens, kv.first_block) == (40, 0)
    decode.side.begin_step(StepCommands(loads=(Load("a", 0, (4, 3, 9), 40, now=True),)))
    for name, ours in decode.kv.items():
        assert torch.equal(ours[[4, 3, 9]], prefill.kv[name][[7, 2, 11]])
    decode.side.end_step()
    assert decode.side.finished(set()) == (set(), set())
    assert decode.side.take_bad_blocks() == set()
    assert decode.side.take_report().received == {"a": ""}
    until(lambda: decode.belt.snapshot().bytes_committed == 0)


def test_kv_that_is_still_to_come_has_not_arrived(prefill: BeltServer, decode: BeltServer) -> None:
    """The belt has looked, and nothing waits: the KV is loaded beside the batch."""
    decode.side.loading.obey(StepCommands(claims=(claim("a"),)))
    assert decode.side.loading.arrived("a", 10.0) is None
    assert decode.side.loading.arrived("another", 10.0) is None
    prefill.step(StepCommands(sends=(send(decode, "a", 40),), written=(Written("a", 0, (7, 2, 11), True),)))
    decode.step(StepCommands(loads=(Load("a", 0, (4, 3, 9), 40),)))
    assert loaded(decode) == {"a"}
    for name, ours in decode.kv.items():
        assert torch.equal(ours[[4, 3, 9]], prefill.kv[name][[7, 2, 11]])


def test_arrived_kv_that_is_dropped_frees_its_slot(prefill: BeltServer, decode: BeltServer) -> None:
    """A request aborted before its first step leaves nothing, also if the server takes no more steps."""
    prefill.step(StepCommands(sends=(send(decode, "a", 16),), written=(Written("a", 0, (1,), True),)))
    decode.side.loading.obey(StepCommands(claims=(claim("a"),)))
    until(lambda: decode.side.loading.arrived("a", 0.1))
    decode.side.loading.obey(StepCommands(drops=("a",)))
    until(lambda: decode.belt.snapshot().bytes_committed == 0)
    assert decode.side.loading.arrived("a", 0.0) is None
