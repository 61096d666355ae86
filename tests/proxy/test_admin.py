"""Workers join and leave at run time, on request of an operator with the admin key."""

import asyncio
import json

import pytest

from tests.proxy.standin import Standin
from tests.proxy.support import Deployment, async_test, eventually, free_port

KEY = "k" * 32
BODY = {"prompt": "hello", "max_tokens": 12, "temperature": 0}
STREAM = BODY | {"stream": True}
FAST_HEALTH = {"health_interval_seconds": 0.02, "health_timeout_seconds": 0.3}
BEARER = ((b"authorization", b"Bearer " + KEY.encode()),)


def administered(prefill=1, decode=1, **settings):
    """A deployment with an admin key."""
    return Deployment(prefill, decode, admin_key=KEY, **FAST_HEALTH, **settings)


def name_of(standin):
    """The worker's name at the proxy."""
    return f"127.0.0.1:{standin.port}"


async def add(deployment, standin, role=None, changes=()):
    """Add a stand-in to the proxy's workers."""
    asked = {"role": role or standin.role, "host": "127.0.0.1", "port": standin.port} | dict(changes)
    return await deployment.get("/kvbelt/workers", "POST", headers=BEARER, body=json.dumps(asked).encode())


async def change(deployment, standin, verb):
    """Drain, undrain or (empty) remove a worker."""
    path = f"/kvbelt/workers/{name_of(standin)}" + (f"/{verb}" if verb else "")
    return await deployment.get(path, "POST" if verb else "DELETE", headers=BEARER)


async def names(deployment):
    """The names of all workers."""
    return [worker["worker"] for worker in (await deployment.get("/kvbelt/workers")).json["workers"]]


@async_test
async def test_a_worker_that_joins_gets_requests_and_is_connected():
    """A prefill and a decode worker join while every process runs on."""
    async with administered() as deployment:
        decode, prefill = Standin("decode", engine_id="d-new"), Standin("prefill", engine_id="p-new")
        for standin in (await decode.start(), await prefill.start()):
            got = await add(deployment, standin)
            assert (got.status, got.json["worker"], got.json["standing"]) == (201, name_of(standin), "active")
        await eventually(lambda: "d-new" in deployment.prefill[0].told and set(prefill.told) == {"d0", "d-new"})
        await deployment.proxy.context.warmer.settled()
        for _ in range(4):
            assert (await deployment.ask(BODY)).path == "first-token"
        assert len(decode.requests) == len(prefill.requests) == 2
        await decode.stop()
        await prefill.stop()


@pytest.mark.parametrize("verb", ["drain", ""], ids=["drain", "remove"])
@pytest.mark.parametrize("where", ["prefill", "decode head", "decode stream"])
@async_test
async def test_a_worker_that_leaves_finishes_what_it_has(where, verb):
    """It gets no new request and completes those in flight. Only then a removed worker is forgotten."""
    async with administered(prefill=2, decode=2) as deployment:
        role = deployment.prefill if where == "prefill" else deployment.decode
        leaving = role[0]
        held = asyncio.Event()
        if where == "decode stream":
            leaving.script.stop_after_tokens = (4, held)
        else:
            leaving.script.before_head = held
        asking = asyncio.create_task(deployment.ask(STREAM))
        await leaving.arrived.wait()
        got = await change(deployment, leaving, verb)
        assert got.status == (200 if verb else 202)
        assert got.json["in_flight"] == 1
        for _ in range(3):
            assert (await deployment.ask(BODY, request_id="r2")).path == "first-token"
        assert len(leaving.requests) == 1
        assert name_of(leaving) in await names(deployment)
        held.set()
        reply = await asking
        assert reply.path == "first-token"
        assert await deployment.right(reply, STREAM)
        if verb:
            assert name_of(leaving) in await names(deployment)
        else:
            await eventually(lambda: leaving.port not in {w.address.port for w in deployment.proxy.context.fleet})


@async_test
async def test_a_prefill_worker_is_needed_until_its_kv_is_there():
    """A removed prefill worker stays until its KV has reached the decode worker."""
    async with administered(prefill=2) as deployment:
        decode, leaving = deployment.decode[0], deployment.prefill[0]
        decode.script.kv_arrives = asyncio.Event()
        asking = asyncio.create_task(deployment.ask(STREAM))
        await decode.arrived.wait()
        assert (await change(deployment, leaving, "")).json["in_flight"] == 1
        assert name_of(leaving) in await names(deployment)
        decode.script.kv_arrives.set()
        assert (await asking).path == "first-token"
        await eventually(lambda: deployment.proxy.context.fleet.pairs.get("p0", "d0") is None)
        assert name_of(leaving) not in await names(deployment)


@async_test
async def test_an_idle_worker_that_is_removed_is_gone_at_once_and_may_come_back():
    async with administered(decode=2) as deployment:
        leaving = deployment.decode[0]
        await change(deployment, leaving, "")
        assert name_of(leaving) not in await names(deployment)
        assert (await add(deployment, leaving)).status == 201
        assert name_of(leaving) in await names(deployment)


@async_test
async def test_a_drained_worker_is_used_again_when_it_is_undrained():
    async with administered() as deployment:
        decode = deployment.decode[0]
        await change(deployment, decode, "drain")
        got = await deployment.ask(BODY)
        assert (got.status, got.json["error"]["reason"]) == (503, "no_decode_worker")
        assert "draining" in got.json["error"]["message"]
        assert (await change(deployment, decode, "undrain")).json["standing"] == "active"
        assert (await deployment.ask(BODY)).path == "first-token"


@async_test
async def test_a_leaving_worker_that_fails_is_replaced_like_any_other():
    """The request of a leaving worker is repeated at another one."""
    async with administered(decode=2) as deployment:
        leaving = deployment.decode[0]
        leaving.script.before_head = asyncio.Event()
        asking = asyncio.create_task(deployment.ask(BODY))
        await leaving.arrived.wait()
        await change(deployment, leaving, "")
        await leaving.stop()
        assert (await asking).path == "first-token; after=decode_lost"
        await eventually(lambda: len(deployment.proxy.context.fleet.of("decode")) == 1)


# What is refused.


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"role": "both"}, 400, "both"),
        ({"role": "decoder"}, 400, "decoder"),
        ({"port": 0}, 400, "0"),
        ({"port": "x"}, 400, "int"),
        ({"host": "a b"}, 400, "a b"),
        ({"host": ""}, 400, "worker's address"),
    ],
)
@async_test
async def test_a_wrong_description_of_a_worker_is_refused(changes, status, said):
    """The error names the wrong value, and no worker joins."""
    async with administered() as deployment:
        before = await names(deployment)
        got = await add(deployment, deployment.alone, "decode", changes)
        assert got.status == status
        assert said in got.json["error"]["message"]
        assert await names(deployment) == before


@async_test
async def test_a_worker_in_the_wrong_role_is_refused():
    """The worker's own role counts."""
    async with administered() as deployment:
        standin = await Standin("prefill").start()
        got = await add(deployment, standin, "decode")
        assert got.status == 409
        assert "its role is prefill" in got.json["error"]["message"]
        assert name_of(standin) not in await names(deployment)
        await standin.stop()


@async_test
async def test_a_worker_with_another_model_is_refused_with_both_names():
    async with administered() as deployment:
        standin = await Standin("decode").start()
        standin.health = lambda health=standin.health: health() | {"model": "other"}
        got = await add(deployment, standin)
        assert got.status == 409
        assert "'other'" in got.json["error"]["message"]
        assert "'toy'" in got.json["error"]["message"]
        assert not standin.requests
        await standin.stop()


@pytest.mark.parametrize("there", ["no process", "something else", "a silent process"])
@async_test
async def test_an_address_without_a_worker_is_refused(there):
    """A mistyped port is found at once, before a request fails."""
    async with administered() as deployment:
        standin = Standin("decode")
        if there == "no process":
            standin.port = free_port()
        else:
            await standin.start()
            standin.health = lambda: "hello"
            standin.script.health_hangs = there == "a silent process"
        got = await add(deployment, standin)
        assert got.status == 409
        assert name_of(standin) in got.json["error"]["message"]
        assert name_of(standin) not in await names(deployment)
        await standin.stop()


@async_test
async def test_a_worker_that_is_loading_may_join():
    """It gets requests when it is ready."""
    async with administered() as deployment:
        standin = await Standin("decode", engine_id="d-new").start()
        standin.script.health_status = 503
        assert (await add(deployment, standin)).json["state"] == "unready"
        standin.script.health_status = 200
        await eventually(lambda: deployment.worker(standin).ready)
        await standin.stop()


@async_test
async def test_adding_twice_and_unknown_names_are_errors():
    """The status is 409 or 404, and the error has the worker's name."""
    async with administered() as deployment:
        got = await add(deployment, deployment.decode[0])
        assert got.status == 409
        assert "there already" in got.json["error"]["message"]
        for verb in ("drain", "undrain", ""):
            got = await change(deployment, Standin("decode"), verb)
            assert got.status == 404
            assert name_of(deployment.decode[0]) in got.json["error"]["message"]


@async_test
async def test_a_worker_of_both_roles_is_named_with_its_role():
    """One address may be a prefill and a decode worker, so a change must name the role."""
    async with administered() as deployment:
        both = await Standin("both", engine_id="b").start()
        assert (await add(deployment, both, "prefill")).status == 201
        assert (await add(deployment, both, "decode")).status == 201
        got = await change(deployment, both, "drain")
        assert (got.status, got.json["error"]["param"]) == (409, "role")
        path = f"/kvbelt/workers/{name_of(both)}"
        got = await deployment.get(f"{path}/drain?role=decode", "POST", headers=BEARER)
        assert (got.json["role"], got.json["standing"]) == ("decode", "draining")
        got = await deployment.get(f"{path}?role=cook", "DELETE", headers=BEARER)
        assert got.status == 400
        await both.stop()


@pytest.mark.parametrize("given", [(), ((b"authorization", b"Bearer wrong"),), ((b"authorization", KEY.encode()),)])
@async_test
async def test_without_the_key_nothing_is_changed(given):
    """Each change gets 401. The list of workers needs no key."""
    async with administered() as deployment:
        name = name_of(deployment.decode[0])
        asks = [("", "POST"), (f"/{name}", "DELETE"), (f"/{name}/drain", "POST"), (f"/{name}/undrain", "POST")]
        for path, method in asks:
            got = await deployment.get(f"/kvbelt/workers{path}", method, headers=given, body=b"{}")
            assert got.status == 401
            assert got.headers[b"www-authenticate"] == b"Bearer"
        got = await deployment.get("/kvbelt/workers")
        assert {worker["standing"] for worker in got.json["workers"]} == {"active"}


@async_test
async def test_a_proxy_without_a_key_says_how_to_have_one():
    """A change gets 403, and the error names the flag."""
    async with Deployment() as deployment:
        got = await add(deployment, deployment.alone, "decode")
        assert got.status == 403
        assert "--admin-key-file" in got.json["error"]["message"]
        got = await deployment.get("/kvbelt/workers")
        assert (got.status, got.json["admin"]) == (200, False)


@pytest.mark.parametrize(
    ("path", "method", "status", "allow"),
    [
        ("/kvbelt/workers", "PUT", 405, b"GET, POST"),
        ("/kvbelt/workers/a:1", "POST", 405, b"GET, DELETE"),
        ("/kvbelt/workers/a:1/drain", "GET", 405, b"POST"),
        ("/kvbelt/workers/a:1/eat", "POST", 404, None),
        ("/kvbelt/workersx", "GET", 404, None),
    ],
)
@async_test
async def test_other_routes_and_methods_are_openai_errors(path, method, status, allow):
    async with administered() as deployment:
        got = await deployment.get(path, method, headers=BEARER)
        assert (got.status, got.headers.get(b"allow")) == (status, allow)
        assert got.json["error"]["message"]


@async_test
async def test_one_worker_is_shown_by_its_name():
    """The colon in the name may be escaped."""
    async with administered() as deployment:
        name = name_of(deployment.decode[0])
        for path in (name, name.replace(":", "%3A")):
            got = await deployment.get(f"/kvbelt/workers/{path}")
            assert (got.json["worker"], got.json["role"], got.json["engine_id"]) == (name, "decode", "d0")


@async_test
async def test_a_proxy_that_drains_takes_no_request_and_ends_the_open_ones():
    """After POST /kvbelt/drain /health tells the open requests, new ones get 503, and the open stream ends whole."""
    async with administered() as deployment:
        gate = deployment.decode[0].script.before_head = asyncio.Event()
        asking = asyncio.create_task(deployment.ask(STREAM))
        await eventually(lambda: deployment.proxy.context.metrics.in_flight == 1)
        assert (await deployment.get("/kvbelt/drain", "POST")).status == 401
        said = await deployment.get("/kvbelt/drain", "POST", headers=BEARER)
        assert (said.json["state"], said.json["open_requests"]) == ("draining", 1)
        refused = await deployment.ask(BODY, request_id="r2")
        assert (refused.status, refused.headers[b"retry-after"]) == (503, b"1")
        gate.set()
        assert (await asking).text
        assert (await deployment.get("/health")).json["open_requests"] == 0
