"""Routes of a worker's engine that the proxy passes on."""

import json

import pytest

from tests.http.support import Raw
from tests.proxy.support import Deployment, async_test, eventually

JSON = "application/json"
STREAM = "text/event-stream; charset=utf-8"
ASKED = b'{"model": "toy", "input": "Hello", "prompt": "Hello"}'
HEADERS = ((b"content-type", b"application/json"), (b"authorization", b"Bearer k"), (b"connection", b"x-own"))


def of_vllm(others, **numbers):
    """A deployment whose workers say that they are vLLM servers and have these routes."""
    deployment = Deployment(**numbers)
    for standin in (*deployment.prefill, *deployment.decode):
        standin.more_health = {"engine": "vllm"}
        standin.script.others = others
    return deployment


def asked(deployment):
    """What the workers were asked, besides completions."""
    workers = (*deployment.prefill, *deployment.decode)
    return [request for one in workers for request in one.requests if request[0] != "/v1/completions"]


@pytest.mark.parametrize(
    "path", ["/v1/responses", "/v1/messages", "/v1/embeddings", "/tokenize", "/v1/messages/count_tokens"]
)
@async_test
async def test_a_request_and_its_answer_are_passed_on(path):
    """Method, query, headers and body reach one worker; status, type and body the client."""
    async with of_vllm({path: (200, JSON, [b'{"tokens": ', b"[1, 2]}"])}) as deployment:
        got = await deployment.get(f"{path}?beta=true", "POST", headers=HEADERS, body=ASKED)
        assert (got.status, got.path, got.body) == (200, "passed-on", b'{"tokens": [1, 2]}')
        ((target, headers, body),) = asked(deployment)
        assert (target, body) == (f"{path}?beta=true", ASKED)
        assert headers[b"authorization"] == b"Bearer k"
        assert b"connection" not in headers
        record = await deployment.record(got.headers[b"x-request-id"].decode())
        assert (record["route"], record["decision"]["path"], record["status"]) == (path, "passed-on", 200)
        assert b'kvbelt_proxy_requests_total{path="passed-on"' in (await deployment.get("/metrics")).body


@async_test
async def test_a_refusal_of_the_engine_is_passed_on():
    """Also one that says that there is no such model."""
    refusal = b'{"error": {"message": "The model `x` does not exist.", "code": 404}}'
    async with of_vllm({"/v1/responses": (404, JSON, [refusal])}) as deployment:
        got = await deployment.get("/v1/responses", "POST", body=ASKED)
        assert (got.status, got.body) == (404, refusal)


@async_test
async def test_a_stream_is_passed_on():
    """Event by event."""
    events = [b"event: response.created\ndata: {}\n\n", b"event: response.completed\ndata: {}\n\n"]
    async with of_vllm({"/v1/responses": (200, STREAM, events)}) as deployment:
        got = await deployment.get("/v1/responses", "POST", body=ASKED)
        assert (got.status, got.path, got.body) == (200, "passed-on", b"".join(events))
        assert got.headers[b"content-type"] == STREAM.encode()


@async_test
async def test_a_stream_that_is_cut_ends_with_an_error():
    """The events until then are passed on."""
    events = [b"event: response.created\ndata: {}\n\n", None]
    async with of_vllm({"/v1/responses": (200, STREAM, events)}) as deployment:
        got = await deployment.get("/v1/responses", "POST", body=ASKED)
        first, error = got.body.split(b"\n\n")[:2]
        assert first == b"event: response.created\ndata: {}"
        assert json.loads(error.removeprefix(b"data: "))["error"]["reason"] == "decode_lost"


@pytest.mark.parametrize("path", ["/v1/messages", "/detokenize"])
@async_test
async def test_another_worker_answers_for_a_lost_one(path):
    """The client gets no error."""
    async with of_vllm({path: (200, JSON, [b"{}"])}, prefill=0, decode=2) as deployment:
        deployment.decode[0].script.die_before_head = True
        for _ in range(2):
            got = await deployment.get(path, "POST", body=ASKED)
            assert (got.status, got.body) == (200, b"{}")
        assert deployment.decode[0].requests


@pytest.mark.parametrize("path", ["/v1/messages", "/detokenize"])
@async_test
async def test_without_a_worker_the_client_may_come_back(path):
    """The error names the reason."""
    async with of_vllm({path: (200, JSON, [b"{}"])}, prefill=0) as deployment:
        deployment.decode[0].script.die_before_head = True
        got = await deployment.get(path, "POST", body=ASKED)
        assert (got.status, got.headers[b"retry-after"], got.json["error"]["reason"]) == (503, b"1", "decode_lost")
        deployment.decode[0].script.health_status = 503
        await deployment.worker(deployment.decode[0]).check()
        got = await deployment.get(path, "POST", body=ASKED)
        assert (got.status, got.json["error"]["reason"]) == (503, "no_decode_worker")


@async_test
async def test_a_route_that_the_engine_lacks_is_one_clear_error():
    """Whether it is a vLLM server without the route, or an embedded engine."""
    async with of_vllm({"/tokenize": (200, JSON, [b"{}"])}) as deployment:
        got = await deployment.get("/v1/audio/transcriptions", "POST", body=ASKED)
        assert got.status == 404
        assert got.json["error"]["message"] == "there is no /v1/audio/transcriptions in the workers' engine"
    async with Deployment() as deployment:
        got = await deployment.get("/tokenize", "POST", body=ASKED)
        assert got.status == 404
        assert got.json["error"]["message"] == "there is no /tokenize in the embedded engine"
        assert not asked(deployment)


@pytest.mark.parametrize("path", ["/sleep", "/v1/load_lora_adapter", "/collective_rpc", "/tokenize/../sleep", "/pause"])
@async_test
async def test_what_changes_a_server_is_not_passed_on(path):
    """One client could stop everybody's answers."""
    async with of_vllm({path: (200, JSON, [b"{}"])}) as deployment:
        got = await deployment.get(path, "POST", body=b"{}")
        assert got.status == 404
        assert not asked(deployment)


@async_test
async def test_a_wrong_method_is_refused():
    """With the methods that the route takes."""
    async with of_vllm({"/tokenize": (200, JSON, [b"{}"])}) as deployment:
        got = await deployment.get("/tokenize", "GET")
        assert (got.status, got.headers[b"allow"]) == (405, b"POST, OPTIONS")
        assert not asked(deployment)


@async_test
async def test_a_client_that_leaves_frees_its_place():
    """Nothing stays booked, which the deployment looks for at its end."""
    async with of_vllm({"/v1/responses": (200, STREAM, [b"data: {}\n\n", None])}) as deployment:
        deployment.decode[0].die = lambda _: None  # the stream goes on for ever
        response = await deployment.pool.request("POST", "/v1/responses", (), ASKED)
        assert await response.chunk()
        response.close()
        await eventually(lambda: not deployment.proxy.context.records.open)


@async_test
async def test_head_of_a_passed_on_route_is_its_get_without_the_body():
    async with of_vllm({"/version": (200, JSON, [b'{"v": 1}'])}) as deployment, Raw(deployment.proxy.port) as raw:
        raw.send(b"HEAD /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = await raw.until_closed()
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"content-length: 8\r\n" in answer
        assert answer.endswith(b"\r\n\r\n")
