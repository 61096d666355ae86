"""The proxy's own routes: errors, health, models, metrics, records."""

import asyncio

import pytest

from kvbelt.errors import SettingsError, StartError
from kvbelt.limits import Limits
from kvbelt.proxy import Address, Proxy, ProxySettings
from kvbelt.proxy.observe.spans import parse_server_timing
from tests.http.support import Raw
from tests.proxy.support import Deployment, async_test, eventually


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/nowhere", "GET", 404),
        ("/v1/completions", "GET", 405),
        ("/health", "POST", 405),
        ("/kvbelt/requests/x", "GET", 404),
    ],
)
@async_test
async def test_unknown_routes_and_methods_are_openai_errors(path, method, status):
    """404 and 405 in OpenAI's shape."""
    async with Deployment() as deployment:
        got = await deployment.get(path, method)
        assert got.status == status
        assert set(got.json["error"]) == {"message", "type", "param", "code"}
        if status == 405:
            assert got.headers[b"allow"] in (b"GET, HEAD, OPTIONS", b"POST, OPTIONS")


@async_test
async def test_a_malformed_http_request_gets_an_openai_error():
    """The parser's refusals have the same shape."""
    async with Deployment() as deployment, Raw(deployment.proxy.port) as raw:
        raw.send(b"nonsense\r\n\r\n")
        assert b'{"error":{"message"' in await raw.until_closed()


@pytest.mark.parametrize("body", [b"", b"{", b'{"prompt":"\xff"}', b'{"prompt":"x","max_tokens":"y"}'])
@async_test
async def test_a_wrong_body_is_400_and_the_next_request_is_unharmed(body):
    """A malformed body reaches no worker."""
    async with Deployment() as deployment:
        got = await deployment.ask(body)
        assert (got.status, got.json["error"]["type"]) == (400, "invalid_request_error")
        assert not deployment.prefill[0].requests
        assert (await deployment.ask({"prompt": "x", "max_tokens": 3})).status == 200


@async_test
async def test_too_large_a_body_is_413():
    """A body above the limit gets 413."""
    async with Deployment(limits=Limits(body_bytes=100)) as deployment:
        assert (await deployment.ask({"prompt": "x" * 200})).status == 413


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (b"application/json", 200),
        (b"Application/JSON; charset=utf-8", 200),
        (None, 200),
        (b"text/plain", 415),
        (b"application/x-www-form-urlencoded", 415),
        (b"", 415),
    ],
)
@async_test
async def test_a_body_of_another_type_is_refused(kind, status):
    """A client that says no type is believed to send JSON."""
    async with Deployment() as deployment:
        headers = () if kind is None else ((b"content-type", kind),)
        got = await deployment.ask({"prompt": "x", "max_tokens": 3}, headers=headers)
        assert got.status == status
        assert status == 200 or "application/json" in got.json["error"]["message"]


@async_test
async def test_a_body_of_too_many_parts_is_refused():
    """Before it is parsed, whatever the parts are."""
    async with Deployment(limits=Limits(json_parts=100)) as deployment:
        wrong = {"tools": [{}] * 101}, {f"a{i}": 0 for i in range(101)}, {"x": [[]] * 101}, {"x": [1] * 2500}
        for more in wrong:
            got = await deployment.ask({"prompt": "x", "max_tokens": 3} | more)
            assert (got.status, "--limit json_parts=N" in got.json["error"]["message"]) == (400, True)
        assert not deployment.decode[0].requests
        for prompt in ([5] * 350, 'say "this": ' * 300):
            assert (await deployment.ask({"prompt": prompt, "max_tokens": 3})).status == 200


@pytest.mark.parametrize("prompt", ["x", [5, 6]])
@async_test
async def test_a_body_of_too_many_fields_is_refused(prompt):
    """Whatever they are."""
    async with Deployment(limits=Limits(fields=9)) as deployment:
        got = await deployment.ask({"prompt": prompt} | {f"a{i}": 0 for i in range(9)})
        assert (got.status, "10 fields, and 9 are allowed" in got.json["error"]["message"]) == (400, True)
        assert not deployment.decode[0].requests


@pytest.mark.parametrize("where", ["prompt", "messages", "tools", "response_format", "metadata"])
@async_test
async def test_json_that_is_nested_too_deeply_is_refused(where):
    """In any field; no worker sees it."""
    deep = b"[" * 5000 + b"]" * 5000
    async with Deployment() as deployment:
        got = await deployment.ask(b'{"prompt":"x","%b":%b}' % (where.encode(), deep))
        assert got.status == 400
        assert not deployment.prefill[0].requests
        assert not deployment.decode[0].requests


@async_test
async def test_models_come_from_a_decode_worker():
    """The list of models is a decode worker's own, or a prefill worker's where there is no other one."""
    async with Deployment() as deployment:
        assert (await deployment.get("/v1/models")).json["data"][0]["id"] == "toy"
        await deployment.decode[0].stop()
        assert (await deployment.get("/v1/models")).status == 200
        await deployment.prefill[0].stop()
        assert (await deployment.get("/v1/models")).status == 503


@async_test
async def test_health_lists_the_workers():
    """200 while a decode worker is ready."""
    async with Deployment() as deployment:
        got = await deployment.get("/health")
        assert got.status == 200
        assert [(w["role"], w["state"]) for w in got.json["workers"]] == [("prefill", "ready"), ("decode", "ready")]


@async_test
async def test_a_worker_in_the_wrong_role_is_not_used():
    """A prefill worker that is configured as a decode worker is unready."""
    async with Deployment() as deployment:
        deployment.decode[0].role = "prefill"
        worker = deployment.worker(deployment.decode[0])
        await worker.check()
        got = await deployment.get("/health")
        assert got.status == 503
        assert "its role is prefill" in got.json["workers"][1]["detail"]


@async_test
async def test_metrics_have_the_seeds_names_and_ours():
    """lmcache_ttft counts in milliseconds."""
    async with Deployment() as deployment:
        await deployment.ask({"prompt": "x", "max_tokens": 3})
        await deployment.ask({"prompt": "x", "max_tokens": 3, "seed": 1, "stream": True})
        text = (await deployment.get("/metrics")).body.decode()
    for line in (
        'kvbelt_proxy_requests_total{path="first-token",reason=""} 1.0',
        'kvbelt_proxy_requests_total{path="re-derive",reason="seed"} 1.0',
        "lmcache_ttft_count 2.0", 'lmcache_ttft_bucket{le="60000.0"} 2.0', "kvbelt_ttft_seconds_count 2.0",
        "lmcache_nixl_transfer_failures_total 0.0", "lmcache_prefill_queue_size 0.0", "nixl_transfer_bytes_total 0.0",
        "kvbelt_proxy_requests_in_flight 0.0",
    ):  # fmt: skip
        assert line in text.splitlines()


@async_test
async def test_a_record_has_timings_and_no_text():
    """Decision, workers and timings, by request id or by the answer's id."""
    async with Deployment() as deployment:
        await deployment.ask({"prompt": "secret words", "max_tokens": 3, "stream": True})
        got = await deployment.get("/kvbelt/requests/cmpl-r1")
        record = got.json
        assert b"secret" not in got.body
        assert record["decision"] == {"path": "first-token", "reason": None, "meaning": None}
        assert record["workers"]["prefill"] == f"127.0.0.1:{deployment.prefill[0].port}"
        assert record["kv"] == "received"
        spent = record["timings_ms"]
        assert (spent["queue"], spent["prefill"], spent["kv_wait"], spent["load"]) == (1.5, 20, 3, 0.5)
        assert 0 < spent["proxy"] < spent["first_token"] <= spent["total"]
        recent = await deployment.get("/kvbelt/requests")
        assert [r["request_id"] for r in recent.json["requests"]] == ["r1"]


@async_test
async def test_only_the_last_records_are_kept():
    """The oldest record is dropped first."""
    async with Deployment(records_kept=2) as deployment:
        for name in "abc":
            await deployment.ask({"prompt": "x", "max_tokens": 3}, request_id=name)
        assert (await deployment.get("/kvbelt/requests/a")).status == 404
        assert (await deployment.get("/kvbelt/requests/c")).status == 200
        records = deployment.proxy.context.records
        assert (len(records), len(records.open)) == (2, 0)


@async_test
async def test_an_id_in_use_or_unfit_is_replaced():
    """Two requests at once never share an id, since engines tell them apart by it."""
    async with Deployment() as deployment:
        deployment.prefill[0].script.before_head = asyncio.Event()
        asking = [asyncio.create_task(deployment.ask({"prompt": "x", "max_tokens": 3})) for _ in range(2)]
        await eventually(lambda: len(deployment.prefill[0].requests) == 2)
        deployment.prefill[0].script.before_head.set()
        ids = [(await task).headers[b"x-request-id"] for task in asking]
        assert len(set(ids)) == 2
        assert all(name.startswith(b"r1") for name in ids)
        got = await deployment.ask({"prompt": "x", "max_tokens": 3}, request_id="no spaces; please")
        assert b" " not in got.headers[b"x-request-id"]


@async_test
async def test_closing_ends_open_streams_and_frees_the_ports():
    """Open streams end within the drain time, and both ports are free."""
    async with Deployment() as deployment:
        deployment.decode[0].script.stop_after_tokens = (3, asyncio.Event())
        asking = asyncio.create_task(deployment.ask({"prompt": "x", "max_tokens": 9, "stream": True}))
        await deployment.decode[0].arrived.wait()
        await deployment.proxy.close()
        with pytest.raises(Exception, match="closed the connection"):
            await asking
        again = Proxy(
            ProxySettings(
                decode=(Address("127.0.0.1", deployment.decode[0].port),),
                port=deployment.proxy.port,
                notification_port=deployment.proxy.notification_port,
            )
        )
        await again.start()
        await again.close()


@async_test
async def test_a_taken_port_is_a_start_error():
    """The error names the port, and nothing stays open."""
    async with Deployment() as deployment:
        decode = deployment.proxy.settings.decode
        taken = deployment.proxy.port
        with pytest.raises(StartError, match=str(taken)):
            await Proxy(ProxySettings(decode=decode, port=taken, notification_port=0)).start()
        taken = deployment.proxy.notification_port
        with pytest.raises(StartError, match=str(taken)):
            await Proxy(ProxySettings(decode=decode, port=0, notification_port=taken)).start()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"decode": ()}, "no decode worker"),
        ({"decode": (Address("a", 1), Address("a", 1))}, "twice"),
        ({"deadline_seconds": 0}, "deadline_seconds is 0"),
        ({"records_kept": -1}, "records_kept is -1"),
    ],
)
def test_wrong_settings_are_refused(wrong, said):
    """The error names the setting and its value."""
    with pytest.raises(SettingsError, match=said):
        ProxySettings(**({"decode": (Address("a", 1),)} | wrong))
    with pytest.raises(SettingsError, match="70000"):
        Address("a", 70000)


def test_server_timing_is_read_leniently():
    """What does not parse is left out."""
    assert parse_server_timing(b'queue;dur=1.5, prefill;desc="x";dur="20", bad;dur=x, none') == {
        "queue": 1.5,
        "prefill": 20.0,
    }
