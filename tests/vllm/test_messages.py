"""What the connector inside a vLLM server answers is what the proxy decodes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest

from kvbelt.about import of_this_process
from kvbelt.belt_facts import BeltView
from kvbelt.proxy.workers.vllm_dialect import describe_question, description_of, peer_states_of, warm_question
from kvbelt.vllm.identity import RankIdentity, ServerFacts, describe
from kvbelt.vllm.scheduler_side import SchedulerSide
from kvbelt.vllm.step_messages import ScheduledPrompt, StepReport
from kvbelt.wire.about import LinkTotals, TransportChoice
from kvbelt.wire.handoff import DecodeOutcome, HandoffState, RankAddress, ReceiverAddress
from kvbelt.wire.health import Role
from kvbelt.wire.ids import EngineId
from tests.vllm.belts import BLOCK, TO_LOAD, TO_SEND, Clock, pacing

RECEIVER = ReceiverAddress(EngineId("X"), "10.0.0.7", 7300, 7400, "k", (RankAddress(EngineId("X1"), 7301, 7401),))
VIEW = BeltView(
    (TransportChoice("intra-node", "write", "host", "cma/memory"),),
    (LinkTotals("d", writes=2, num_bytes=3, busy_seconds=0.5, bytes_in_flight=1),),
    ("a complaint",),
)


@pytest.fixture
def side() -> SchedulerSide:
    """The scheduler's side of a server whose belts run."""
    side = SchedulerSide(BLOCK, partial(describe, ServerFacts(Role.BOTH, "m", 2048)), pacing(), Clock())
    side.on_workers_ready(RankIdentity(EngineId("X"), RECEIVER, 0, of_this_process("both", "vllm")))
    return side


def asked(side: SchedulerSide, body: bytes) -> None:
    """The server gets this body of the proxy's."""
    question = msgspec.json.decode(body)
    side.on_new_request("a", question["kv_transfer_params"], len(question["prompt"]))


def answer_of(side: SchedulerSide) -> bytes:
    """The body of a completion, with the answer as the connector hands it to vLLM."""
    _, answer = side.on_finished("a")
    return msgspec.json.encode({"id": "cmpl-a", "kv_transfer_params": msgspec.to_builtins(answer)})


def same(decoded: Any, body: bytes) -> bool:
    """Whether a decoded answer has every key of its body, with the same value."""
    again = msgspec.json.decode(msgspec.json.encode(decoded))
    return bool(again == msgspec.json.decode(body)["kv_transfer_params"])


@pytest.mark.parametrize("runs", [True, False])
def test_the_proxy_reads_all_of_a_servers_description(side: SchedulerSide, runs: bool) -> None:
    """With its receiver's ranks and the facts about its belts, and also before its belts run."""
    if runs:
        side.on_report(StepReport(views={0: VIEW}), ())
    else:
        side = SchedulerSide(BLOCK, partial(describe, ServerFacts(Role.DECODE, "m", 2048)), pacing(), Clock())
    asked(side, describe_question(0.05))
    body = answer_of(side)
    description = description_of(200, body, "s")
    assert description is not None
    assert same(description, body)
    assert (description.receiver, description.about is not None) == ((RECEIVER, True) if runs else (None, False))


def test_the_proxy_reads_the_state_of_every_peer(side: SchedulerSide) -> None:
    """Connected, refused, and still under way."""
    asked(side, warm_question([msgspec.structs.replace(RECEIVER, engine_id=EngineId(name)) for name in "def"]))
    side.on_report(StepReport(peers={EngineId("d"): "", EngineId("e"): "refused_model"}), ())
    body = answer_of(side)
    states = peer_states_of(body, "s")
    assert states is not None
    assert same(states, body)
    assert [(peer.engine_id, peer.reason) for peer in states.peers] == [
        ("d", ""), ("e", "refused_model"), ("f", "not_yet"),
    ]  # fmt: skip


def sent(side: SchedulerSide) -> None:
    """A prompt whose transfer is under way."""
    side.on_new_request("a", TO_SEND, 16)
    side.take_step([ScheduledPrompt("a", [1], 0, 16)], ())


def failed(side: SchedulerSide) -> None:
    """A prompt whose transfer has failed."""
    sent(side)
    side.on_report(StepReport(sent={"a": "peer_lost"}), ())


def unknown(side: SchedulerSide) -> None:
    """A decode request of which the worker has said nothing."""
    side.on_new_request("a", TO_LOAD, 33)


def received(side: SchedulerSide) -> None:
    """A decode request whose KV was in the prefix cache."""
    unknown(side)
    side.take_step([], ())
    side.on_allocated("a", [1, 2, 3], 0)


def recomputed(side: SchedulerSide) -> None:
    """A decode request whose KV was lost."""
    unknown(side)
    side.on_report(StepReport(received={"a": "lease"}), ())


@pytest.mark.parametrize(
    ("request_of", "shape", "result"),
    [
        (sent, HandoffState, ("open", None)), (failed, HandoffState, ("failed", "peer_lost")),
        (received, DecodeOutcome, ("received", "cached")), (recomputed, DecodeOutcome, ("recomputed", "lease")),
        (unknown, DecodeOutcome, (None, None)),
    ],
)  # fmt: skip
def test_the_parameters_of_an_answer_decode_without_loss(
    side: SchedulerSide, request_of: Callable[[SchedulerSide], None], shape: Any, result: tuple[Any, Any]
) -> None:
    """What became of a transfer, on the side that sends and on the side that loads."""
    request_of(side)
    body = answer_of(side)
    decoded = msgspec.convert(msgspec.json.decode(body)["kv_transfer_params"], shape)
    assert same(decoded, body)
    assert (decoded.state if shape is HandoffState else decoded.kv, decoded.reason) == result
