"""The facts that a vLLM server gives ``kvbelt doctor``, from real belts and from several ranks together."""

import pytest
from msgspec.structs import replace

from kvbelt.about import of_this_process
from kvbelt.belt_facts import BeltView, view_of, with_belt
from kvbelt.channels.nixl import NixlChannel
from kvbelt.vllm.background import Background
from kvbelt.vllm.identity import RankIdentity, ServerFacts, describe, together
from kvbelt.vllm.settings import load_settings
from kvbelt.vllm.step_messages import StepCommands, StepReport, Written
from kvbelt.wire.about import LinkTotals, TransportChoice
from kvbelt.wire.health import Role
from kvbelt.wire.ids import EngineId
from tests.vllm.belts import BeltServer, send, until
from tests.wire.messages import STEPS

HERE, THERE = (
    TransportChoice("intra-node", "write", "host", "cma/memory"),
    TransportChoice("inter-node", "write", "host", "tcp/eth0"),
)


def viewed(server: BeltServer) -> BeltView:
    """Command a view with one step, and take it from the report of a later one."""
    server.step(StepCommands(view=True))
    return until(lambda: server.side.take_report().views.get(0))


def test_a_belt_is_viewed_on_command(prefill: BeltServer, decode: BeltServer) -> None:
    """The bytes moved to each receiver are in the report after a command, and in no other."""
    assert viewed(prefill).links == ()
    prefill.step(StepCommands(sends=(send(decode, "a", 40),), written=(Written("a", 0, (7, 2, 11), True),)))
    until(lambda: prefill.side.take_report().sent)
    assert prefill.side.take_report() == StepReport()
    (link,) = viewed(prefill).links
    assert link.engine_id == decode.belt.identity.engine_id
    assert link.num_bytes > 0
    assert link.writes > 0
    assert prefill.side.take_report() == StepReport()


def test_calls_that_come_together_are_one() -> None:
    """A second call begins only once the result of the first has been taken."""
    calls: list[None] = []

    def call() -> str:
        calls.append(None)
        return "result"

    background = Background(call)
    try:
        assert background.take() is None
        for _ in range(3):
            background.begin()
        assert until(background.take) == "result"
        assert len(calls) == 1
        background.begin()
        assert until(background.take)
        assert len(calls) == 2
    finally:
        background.close()


def test_a_call_that_fails_ends_no_step(caplog: pytest.LogCaptureFixture) -> None:
    """The failure is logged, and the next call is made as usual."""
    found = iter(["", "result"])

    def call() -> str:
        if not (one := next(found)):
            raise OSError("UCX's report cannot be read")
        return one

    background = Background(call)
    try:
        background.begin()
        until(lambda: background.take() is None and "cannot be read" in caplog.text)
        background.begin()
        assert until(background.take) == "result"
    finally:
        background.close()


def test_a_rank_says_what_the_handshake_compares(decode: BeltServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank reports what the handshake compares, sizes, backends and the UCX environment."""
    monkeypatch.setenv("UCX_TLS", "sm,tcp")
    settings = load_settings("kv_consumer", {"pd_buffer_size": 1 << 20}, "cpu", {})
    carrier = NixlChannel("nobody")
    carrier.backends, carrier.plugins = ("UCX",), ("GDS", "UCX")
    process = of_this_process(settings.role, "vllm", device="cpu")
    said = with_belt(process, decode.belt, carrier, settings.buffer_device, settings.buffer_bytes)
    assert (said.role, said.engine, said.device, said.buffer_device) == ("decode", "vllm", "cpu", "cpu")
    assert said.buffer_bytes == 1 << 20
    assert said.bytes_per_token == decode.belt.identity.layout.slot_bytes(10) // 160
    assert said.compatibility == decode.belt.identity.compatibility("nixl")
    assert (said.backends, said.plugins) == (["UCX"], ["GDS", "UCX"])
    assert said.env["UCX_TLS"] == "sm,tcp"
    assert said.machine.pid
    assert view_of(decode.belt, carrier).links == ()


def test_a_server_is_its_first_rank_with_what_all_have_seen() -> None:
    """A server reports its first rank, each transport once, and every rank's links."""
    ranks = [
        RankIdentity(EngineId(name), None, 0, replace(of_this_process("prefill", device=name), unix_time=0.0))
        for name in ("a", "b")
    ]
    links = [LinkTotals(name, 1, 10, 0.1) for name in ("x", "y")]
    views = {1: BeltView((HERE, THERE), (links[1],), ("w",)), 0: BeltView((HERE,), (links[0],), ("v",))}
    reported = StepReport(views=views).plus(StepReport()).views
    said = describe(ServerFacts(Role.PREFILL, "m", 2048), together(ranks), reported, STEPS).about
    assert said is not None
    assert (said.device, said.max_model_len) == ("a", 2048)
    assert said.unix_time > 0.0
    assert said.transports == [HERE, THERE]
    assert said.links == links
    assert said.complaints == ["v", "w"]
