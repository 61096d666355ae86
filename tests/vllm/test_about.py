"""What a server says of itself to whoever looks for a fault: of real belts, and of several ranks together."""

import pytest

from kvbelt.channels.nixl import NixlChannel
from kvbelt.vllm.about import BeltLook, Looks, about_rank, about_server, look_at
from kvbelt.vllm.identity import RankIdentity, together
from kvbelt.vllm.orders import News, Orders, Written
from kvbelt.vllm.settings import load_settings
from kvbelt.wire.about import About, Link, Road
from kvbelt.wire.ids import EngineId
from tests.vllm.test_worker_side import Server, decode, network, prefill, send, until  # noqa: F401 -- fixtures

HERE, THERE = Road("intra-node", "write", "host", "cma/memory"), Road("inter-node", "write", "host", "tcp/eth0")


def looked(server: Server) -> BeltLook:
    """Ask it with a step, and take what a later step brings."""
    server.step(Orders(look=True))
    return until(lambda: server.side.take_news().looks.get(0))


def test_a_belt_is_looked_at_when_somebody_asks(prefill: Server, decode: Server) -> None:  # noqa: F811
    """What has moved to each receiver comes with a step's output; without a question nothing does."""
    assert looked(prefill).links == ()
    prefill.step(Orders(sends=(send(decode, "a", 40),), written=(Written("a", 0, (7, 2, 11), True),)))
    until(lambda: prefill.side.take_news().sent)
    assert prefill.side.take_news() == News()
    (link,) = looked(prefill).links
    assert link.engine_id == decode.belt.identity.engine_id
    assert link.num_bytes > 0
    assert link.writes > 0
    assert prefill.side.take_news() == News()


def test_questions_that_come_together_are_one_look() -> None:
    """It is asked again only once the first has been answered."""
    asked: list[None] = []

    def look() -> BeltLook:
        asked.append(None)
        return BeltLook((HERE,))

    looks = Looks(look)
    try:
        assert looks.take() is None
        for _ in range(3):
            looks.begin()
        assert until(looks.take) == BeltLook((HERE,))
        assert len(asked) == 1
        looks.begin()
        assert until(looks.take)
        assert len(asked) == 2
    finally:
        looks.close()


def test_a_look_that_fails_ends_no_step(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and the next one is as good as any."""
    found = iter([None, BeltLook((HERE,))])

    def look() -> BeltLook:
        one = next(found)
        if one is None:
            raise OSError("UCX's report cannot be read")
        return one

    looks = Looks(look)
    try:
        looks.begin()
        until(lambda: looks.take() is None and "cannot be read" in caplog.text)
        looks.begin()
        assert until(looks.take) == BeltLook((HERE,))
    finally:
        looks.close()


def test_a_rank_says_what_the_handshake_compares(decode: Server, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """And how large KV and its buffer are, what moves it, and what UCX was told."""
    monkeypatch.setenv("UCX_TLS", "sm,tcp")
    settings = load_settings("kv_consumer", {"pd_buffer_size": 1 << 20}, "cpu", {})
    carrier = NixlChannel("nobody")
    carrier.backends, carrier.plugins = ("UCX",), ("GDS", "UCX")
    said = about_rank(settings, decode.belt, carrier, "cpu")
    assert (said.role, said.engine, said.device, said.buffer_device) == ("decode", "vllm", "cpu", "cpu")
    assert said.buffer_bytes == 1 << 20
    assert said.bytes_per_token == decode.belt.identity.layout.slot_bytes(10) // 160
    assert said.compatibility == decode.belt.identity.compatibility("nixl")
    assert (said.backends, said.plugins) == (["UCX"], ["GDS", "UCX"])
    assert said.env["UCX_TLS"] == "sm,tcp"
    assert said.machine.pid
    assert look_at(decode.belt, carrier).links == ()


def test_a_server_is_its_first_rank_with_what_all_have_seen() -> None:
    """A road is named once; each rank has links of its own."""
    ranks = [RankIdentity(EngineId(name), None, 0, About(role="prefill", device=name)) for name in ("a", "b")]
    links = [Link(name, 1, 10, 0.1) for name in ("x", "y")]
    looks = {1: BeltLook((HERE, THERE), (links[1],), ("w",)), 0: BeltLook((HERE,), (links[0],), ("v",))}
    said = about_server(together(ranks).about, News(looks=looks).plus(News()).looks, 2048, 5.0)
    assert (said.device, said.max_model_len, said.unix_time) == ("a", 2048, 5.0)
    assert said.roads == [HERE, THERE]
    assert said.links == links
    assert said.complaints == ["v", "w"]
