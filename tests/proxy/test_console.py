"""The console's files and its JSON, without a browser."""

import re
from time import monotonic

import msgspec
import pytest

from kvbelt.about import of_this_process
from kvbelt.proxy.admin.console import _FOLDER
from tests.proxy.support import Deployment, async_test, done
from tests.wire.messages import belt_snapshot

BODY = {"prompt": "x", "max_tokens": 3, "stream": True}


@async_test
async def test_every_file_that_the_page_names_is_served():
    """Each file has the right content type, and none comes from another origin."""
    async with Deployment() as deployment:
        page = (await deployment.get("/console")).body.decode()
        named = set(re.findall(r'(?:src|href)="(console/[^"]+)"', page))
        scripts = {f"console/{file.name}" for file in _FOLDER.glob("*.js")}
        imported = {f"console/{name}" for file in _FOLDER.glob("*.js")
                    for name in re.findall(r'from "\./([^"]+)"', file.read_text(encoding="utf-8"))}  # fmt: skip
        assert named | imported == scripts | {"console/console.css", "console/icon.svg"}
        for name in named | imported:
            got = await deployment.get(f"/{name}")
            assert (got.status, b"nosniff") == (200, got.headers[b"x-content-type-options"])
        assert not re.search(r"https?://(?!www\.w3\.org)", page)


@async_test
async def test_a_file_is_sent_again_only_if_it_has_changed():
    """The browser asks each time, and gets 304 for an unchanged file."""
    async with Deployment() as deployment:
        first = await deployment.get("/console")
        assert first.headers[b"cache-control"] == b"no-cache"
        tag = first.headers[b"etag"]
        for said in (tag, b"W/" + tag, b'"other", ' + tag, b"*"):
            again = await deployment.get("/console", headers=((b"if-none-match", said),))
            assert (again.status, again.body, again.headers[b"etag"]) == (304, b"", tag)
        changed = await deployment.get("/console", headers=((b"if-none-match", b'"other"'),))
        assert changed.status == 200


@async_test
async def test_the_policy_allows_nothing_from_elsewhere():
    """It forbids inline scripts and styles, frames, and forms."""
    async with Deployment() as deployment:
        policy = (await deployment.get("/console")).headers[b"content-security-policy"].decode()
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy


@async_test
async def test_the_root_leads_browsers_to_the_page_and_tells_programs_the_routes():
    """A browser names HTML among what it takes."""
    async with Deployment() as deployment:
        browser = await deployment.get("/", headers=((b"accept", b"text/html,application/xhtml+xml,*/*;q=0.8"),))
        assert (browser.status, browser.headers[b"location"], browser.body) == (307, b"console", b"")
        for accept in (b"*/*", b"application/json"):
            program = await deployment.get("/", headers=((b"accept", accept),))
            assert program.status == 404
            assert "/v1/completions" in program.json["error"]["message"]
        assert (await deployment.get("/nothing", headers=((b"accept", b"text/html"),))).status == 404


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/console/", "GET", 308),
        ("/console/nothing.js", "GET", 404),
        ("/console/../console.py", "GET", 404),
        ("/console", "POST", 405),
        ("/kvbelt/console.json", "POST", 405),
        ("/kvbelt/console.json?window=0", "GET", 400),
        ("/kvbelt/console.json?after=x", "GET", 400),
    ],
)
@async_test
async def test_other_paths_methods_and_queries_are_errors(path, method, status):
    """Each error has a message. /console/ is redirected."""
    async with Deployment() as deployment:
        got = await deployment.get(path, method)
        assert got.status == status
        assert status == 308 or got.json["error"]["message"]


def tell_of(deployment, request_id):
    """Notify the proxy that the transfer of a request has succeeded."""
    records = deployment.proxy.context.records
    records.on_notification(done(transfer_id=records.get(request_id).attempts[0].transfer_id))


@async_test
async def test_what_was_seen_is_not_sent_again():
    """A page gets the requests that have ended since its last question. Requests under way come each time."""
    async with Deployment() as deployment:
        records = deployment.proxy.context.records
        records.clock = lambda: monotonic() - 10.0
        for name in "ab":
            await deployment.ask(BODY, request_id=name)
        first = (await deployment.get("/kvbelt/console.json")).json
        assert [row["request_id"] for row in first["requests"]] == ["b", "a"]
        records.clock = monotonic
        await deployment.ask(BODY, request_id="c")
        then = (await deployment.get(f"/kvbelt/console.json?after={first['after']}")).json
        assert [row["request_id"] for row in then["requests"]] == ["c"]
        assert then["after"] == first["after"] + 1


@async_test
async def test_a_page_of_an_earlier_proxy_gets_every_request():
    """Its number is higher than any number of the new proxy."""
    async with Deployment() as deployment:
        await deployment.ask(BODY, request_id="a")
        got = (await deployment.get("/kvbelt/console.json?after=999")).json
        assert [row["request_id"] for row in got["requests"]] == ["a"]


@async_test
async def test_the_answer_has_a_bound():
    """An answer has no more requests than the limit, however many have ended."""
    async with Deployment() as deployment:
        for number in range(230):
            await deployment.ask(BODY, request_id=f"r{number}")
        got = (await deployment.get("/kvbelt/console.json")).json
        assert len(got["requests"]) == 200
        assert got["requests"][0]["request_id"] == "r229"


@async_test
async def test_a_workers_memory_is_shown():
    """The page shows the blocks and buffers that the worker's health reports."""
    async with Deployment() as deployment:
        standin = deployment.decode[0]
        health = standin.health()
        health["load"]["blocks_cached"] = 4
        health["belt"] = msgspec.to_builtins(belt_snapshot(receive_bytes=1000, bytes_reserved=250))
        standin.health = lambda: health
        worker = deployment.worker(standin)
        await worker.check()
        shown = (await deployment.get("/kvbelt/console.json")).json["workers"][1]
        assert shown["load"]["blocks_cached"] == 4
        assert (shown["buffers"]["receive_bytes"], shown["buffers"]["bytes_reserved"]) == (1000, 250)


@pytest.mark.parametrize(
    ("roads", "transport"),
    [
        (None, None),
        ([], None),
        ([("intra-node", "write", "cma/memory"), ("intra-node", "read", "tcp/lo")], "cma/memory"),
        (
            [("intra-node", "write", "cma/memory"), ("inter-node", "write", "tcp/eth0")],
            "cma/memory (intra-node), tcp/eth0 (inter-node)",
        ),
    ],
    ids=["a server that says nothing", "nothing yet", "one", "two"],
)
@async_test
async def test_a_transfer_is_shown_with_its_transport(roads, transport):
    """The prefill worker reports the transport. Without a report there is none."""
    async with Deployment() as deployment:
        await deployment.ask(BODY, request_id="a")
        tell_of(deployment, "a")
        if roads is not None:
            said = [{"scope": s, "operation": o, "memory": "host", "transport": t} for s, o, t in roads]
            deployment.prefill[0].script.about = msgspec.to_builtins(of_this_process("prefill")) | {"roads": said}
        assert (await deployment.record("a"))["transfer"]["transport"] == transport


@async_test
async def test_a_worker_that_is_gone_does_not_hide_its_requests():
    """Its requests are shown without the transport."""
    async with Deployment() as deployment:
        await deployment.ask(BODY, request_id="a")
        tell_of(deployment, "a")
        await deployment.prefill[0].stop()
        assert (await deployment.record("a"))["transfer"]["transport"] is None
