"""``kvbelt why`` against a real proxy with stand-in workers."""

import json

import pytest

from kvbelt.cli import main
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.notification import TransferDone, encode
from tests.ops.served import serving
from tests.proxy.support import eventually

BODY = {"prompt": "secret words", "max_tokens": 6, "stream": True}


@pytest.fixture(scope="module")
def served():
    """A proxy with a prefill worker that always fails, one that works, and the records of some requests."""
    with serving(prefill=2, record_prompts=8) as made:
        deployment = made.deployment
        deployment.prefill[1].script.status = 500
        made.call(deployment.ask(BODY, request_id="good"))
        records = deployment.proxy.context.records
        record = records.get("good")
        told = TransferDone(
            transfer_id=TransferId(next(a.transfer_id for a in record.attempts if a.transfer_id)),
            sender=EngineId("p0"), receiver=EngineId("d0"), num_bytes=46_080_000, seconds=0.02,
            channel="nixl", num_tokens=1000, num_writes=30, exposed_seconds=0.004,
        )  # fmt: skip
        made.call(deployment.notify(encode(told)))
        made.call(eventually(lambda: records.get("good").attempts[0].transfer is not None))
        made.call(deployment.ask(BODY, request_id="retried"))
        yield made


def why(served, *words):
    """One command. Returns its exit status."""
    return main(["why", "--url", served.url, *words])


def test_a_request_is_shown_with_its_waterfall(served, capsys):
    """It shows path, workers, transfer with bytes, rate and channel, times, and time per token."""
    assert why(served, "good") == 0
    said = capsys.readouterr().out
    names = [f"127.0.0.1:{one.port}" for one in (served.deployment.prefill[0], served.deployment.decode[0])]
    assert said.startswith(f"request good: first-token, {names[0]} → {names[1]}\n")
    assert "/v1/completions, status 200, " in said
    assert "first-token: the client got the prefill worker's first token" in said
    words = " ".join(said.split())
    assert "4.00 ms exposed, 16.0 ms beside the prefill; 46.1 MB in 30 writes over nixl" in words
    for part in ("queue", "prefill", "transfer", "KV wait", "KV load", "first decode step"):
        assert f"\n  {part} " in said
    assert " tokens, " in words
    assert words.endswith("ms per token")


def test_the_answers_own_id_is_as_good(served, capsys):
    """The id in the client's answer finds the request, too."""
    assert why(served, "cmpl-good") == 0
    assert capsys.readouterr().out.startswith("request good:")


def test_failed_attempts_are_shown_in_order(served, capsys):
    """Each failed attempt is listed with worker, duration and reason."""
    assert why(served, "retried") == 0
    said = capsys.readouterr().out
    name = f"127.0.0.1:{served.deployment.prefill[1].port}"
    assert f"attempt 1, prefill on {name}: prefill_5xx after " in said
    assert "prefill leg failed" in said
    assert f"prefill_5xx, {name}" in said


def test_without_an_id_it_is_the_last_request(served, capsys):
    """Without an id it shows the last request, with --list all of them, newest first."""
    assert why(served) == 0
    assert capsys.readouterr().out.startswith("request retried:")
    assert why(served, "--list") == 0
    head, _, first, second = capsys.readouterr().out.splitlines()
    assert [column.strip() for column in head.split("|")[1:5]] == ["UTC", "request", "status", "path"]
    assert ("retried" in first, "good" in second) == (True, True)
    assert why(served, "--list", "--limit", "1") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_json_is_the_proxys_own(served, capsys):
    """--json prints the proxy's record."""
    assert why(served, "good", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["request_id"], record["transfer"]["channel"], record["tokens"]) == ("good", "nixl", 6)
    assert record["timings_ms"]["between_tokens"] > 0


def test_a_prompts_beginning_is_there_where_it_was_asked_for(served, capsys):
    """The prompt's start is shown if the proxy records it, and no more of it."""
    assert why(served, "good") == 0
    said = capsys.readouterr().out
    assert 'prompt: "secret ' in said
    assert "words" not in said


def test_an_unknown_id_is_an_error_that_says_how_many_are_kept(served, capsys):
    """The error is one line, with exit status 2."""
    assert why(served, "nobody") == 2
    said = capsys.readouterr().err
    assert said == (
        "kvbelt: no request 'nobody' is kept; this proxy keeps the last 1000 (--keep-requests) and has 2 now\n"
    )


def test_without_a_request_there_is_an_error(capsys):
    """Before the first request an error says so."""
    with serving() as fresh:
        assert why(fresh) == 2
        assert "has no request yet" in capsys.readouterr().err
        assert why(fresh, "--list") == 0
        assert capsys.readouterr().out == "no request yet\n"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_it_fits_its_terminal(served, monkeypatch, capsys, width):
    """Lines wrap at words."""
    monkeypatch.setenv("COLUMNS", str(width))
    assert why(served, "good") == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= width
