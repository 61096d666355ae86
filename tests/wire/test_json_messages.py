"""The JSON messages between processes: what a reader does with another version's."""

from copy import deepcopy

import msgspec
import pytest

from kvbelt.wire.health import WORKER_HEALTH
from kvbelt.wire.json_body import MessageError
from tests.wire.messages import MESSAGES


def _objects(content, path=()):
    """Every nested object with its path, except counters by name."""
    if isinstance(content, list | tuple):
        for number, item in enumerate(content):
            yield from _objects(item, (*path, number))
    elif isinstance(content, dict):
        yield path, content
        for name, item in content.items():
            yield from _objects(item, (*path, name))


def _at(content, path):
    for step in path:
        content = content[step]
    return content


#: Objects whose keys are data: counts by state or reason, versions by package.
FREE = {
    "arrivals", "sends", "received_total", "sent_total", "refused_total", "init", "packages", "env", "prefill",
    "decode",
}  # fmt: skip
#: Parts of the binary handshake, where both sides must know every field to compare it.
STRICT = {"compatibility", "layout"}
#: May be missing: an older process, another kind of server, or one that is still loading does not say it.
OPTIONAL = {
    "hash_seed", "belt", "about", "detail", "public_key", "ranks", "transport", "channel", "write", "read", "num_bytes",
    "reason", "device", "buffer_device", "buffer_bytes", "bytes_per_token", "max_model_len", "compatibility",
    "backends", "plugins", "roads", "links", "complaints", "bytes_in_flight", "count", "total",
    "operations", "steps", "sigma", "samples", "most_kv_tokens", "host_kv_tokens", "placing", "placement",
    "transfer_exposed_ms", "alarms", "doctor", "open_requests", "p90", "defaults", "unless_asked", "most", "penalties",
    "layers", "stages", "stage",
}  # fmt: skip


@pytest.mark.parametrize(("message", "example"), MESSAGES, ids=[message.name for message, _ in MESSAGES])
def test_a_message_comes_back_as_it_was_sent(message, example):
    assert message.parse(msgspec.json.encode(example), "p") == example


@pytest.mark.parametrize(("message", "example"), MESSAGES, ids=[message.name for message, _ in MESSAGES])
def test_a_field_of_a_newer_version_is_ignored(message, example):
    """This holds at every level, except where fields are compared."""
    content = msgspec.to_builtins(example)
    for path, found in list(_objects(content)):
        if not path or path[-1] not in FREE | STRICT:
            found["newer"] = {"than": "this"}
    assert message.convert(content, "p") == example


@pytest.mark.parametrize(("message", "example"), MESSAGES, ids=[message.name for message, _ in MESSAGES])
def test_a_missing_field_is_named_with_its_sender(message, example):
    """This holds for each field, at every level of the message."""
    content = msgspec.json.decode(msgspec.json.encode(example))
    tried = 0
    for path, found in _objects(content):
        if path and path[-1] in FREE:
            continue
        for name in found.keys() - OPTIONAL:
            broken = deepcopy(content)
            del _at(broken, path)[name]
            with pytest.raises(MessageError, match=f"`{name}`") as error:
                message.parse(msgspec.json.encode(broken), "10.0.0.7:7100")
            assert str(error.value).startswith(f"{message.name} of 10.0.0.7:7100: ")
            tried += 1
    assert tried


@pytest.mark.parametrize("body", [b"", b"[", b"[" * 100_000, b"\xff", b"null", b'"x"'])
def test_a_body_that_is_not_the_message_is_an_error_of_the_same_kind(body):
    for message, _ in MESSAGES:
        with pytest.raises(MessageError, match=r"^" + message.name + " of p: "):
            message.parse(body, "p")


@pytest.mark.parametrize("name", ["max_model_len", "load"])
def test_a_ready_worker_must_say_what_a_loading_one_cannot(name):
    """A loading worker may leave out the field; for a ready one that is an error."""
    health = msgspec.to_builtins(dict(MESSAGES)[WORKER_HEALTH])
    del health[name]
    with pytest.raises(MessageError, match=f"/health of p: .*`{name}`"):
        WORKER_HEALTH.convert(health, "p")
    assert getattr(WORKER_HEALTH.convert(health | {"state": "loading"}, "p"), name) is None
