"""The HTTP server: which requests it accepts and refuses, and what it notices."""

import asyncio
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbelt.http import Request, ServerLimits
from tests.http.support import SECONDS, Raw, Running, async_test, echo, eventually

GET = b"GET /a?b=c HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = (
    b"POST /c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2;x=1\r\nhe\r\n3\r\nllo\r\n0\r\nT: v\r\n\r\n"
)


def closing(request):
    """The same request, after which the connection ends."""
    return request.replace(b"Host: x\r\n", b"Host: x\r\nConnection: close\r\n", 1)


async def answers_to(data, *, step=None, **kwargs):
    """What an echo server sends until it closes."""
    async with Running(echo, **kwargs) as running, Raw(running.port) as raw:
        if step is None:
            raw.send(data)
        else:
            for at in range(0, len(data), step):
                raw.send(data[at : at + step])
                await raw.writer.drain()
                await asyncio.sleep(0)
        return await raw.until_closed()


@async_test
async def test_a_body_with_a_length_reaches_the_handler():
    """A request with a content-length is answered from its body."""
    answer = await answers_to(closing(POST))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\n\r\nPOST /p hello")


@async_test
async def test_a_chunked_body_reaches_the_handler():
    """Chunks are joined; extensions and trailers are dropped."""
    assert (await answers_to(closing(CHUNKED))).endswith(b"POST /c hello")


@pytest.mark.parametrize("request_bytes", [GET, POST, CHUNKED], ids=["get", "post", "chunked"])
@async_test
async def test_one_byte_at_a_time_is_the_same_request(request_bytes):
    """How bytes are cut into packets does not matter."""
    data = closing(request_bytes)
    one, other = [re.sub(rb"date: .*\r\n", b"", await answers_to(data, step=step)) for step in (1, None)]
    assert one == other


@async_test
async def test_a_connection_is_kept_between_requests():
    """Two requests on one connection get two answers."""
    async with Running(echo) as running, Raw(running.port) as raw:
        for _ in range(2):
            raw.send(POST)
            assert b"200 OK" in await raw.until(b"POST /p hello")


@async_test
async def test_pipelined_requests_are_answered_in_order_one_at_a_time():
    """Requests sent ahead wait for the one before them."""
    running_now, most = 0, 0

    async def slow_first(exchange):
        nonlocal running_now, most
        running_now += 1
        most = max(most, running_now)
        for _ in range(10 if exchange.request.target == "/0" else 1):
            await asyncio.sleep(0)
        running_now -= 1
        exchange.respond(200, (), exchange.request.target.encode())

    requests = [b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % i for i in range(20)]
    requests.append(b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    async with Running(slow_first) as running, Raw(running.port) as raw:
        raw.send(b"".join(requests))
        answer = await raw.until_closed()
    targets = [part.rpartition(b"\r\n\r\n")[2] for part in answer.split(b"HTTP/1.1 200 OK")[1:]]
    assert targets == [*(b"/%d" % i for i in range(20)), b"/last"]
    assert most == 1


@async_test
async def test_a_malformed_request_behind_a_good_one_is_refused_after_its_answer():
    """A refusal keeps its place in the order of answers."""
    answer = await answers_to(POST + b"\x00garbage\r\n\r\n")
    assert answer.index(b"200 OK") < answer.index(b"400 Bad Request")


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n",
        b"GET * HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http:///p HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET ftp://x/p HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\nHost: x\n\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n folded: y\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
@async_test
async def test_a_malformed_request_gets_400_and_the_connection_ends(data):
    """Malformed and ambiguous requests are refused."""
    answer = await answers_to(data)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in answer


@async_test
async def test_a_body_announced_too_large_is_refused_before_it_is_read():
    """413 comes on the head alone, and no 100."""
    head = b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 101\r\n\r\n"
    answer = await answers_to(head, limits=ServerLimits(body_bytes=100))
    assert answer.startswith(b"HTTP/1.1 413 ")


@async_test
async def test_a_chunked_body_that_grows_too_large_is_refused():
    """The limit holds without a content-length, and the client can read the refusal while it still sends."""
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = await answers_to(head + b"400\r\n" + b"x" * 1024 + b"\r\n" * 3, limits=ServerLimits(body_bytes=100))
    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("step", [None, 100])
@async_test
async def test_a_head_that_grows_too_large_is_refused(step):
    """431, whether it comes at once or bit by bit."""
    head = b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-Y: " + b"z" * 3000
    answer = await answers_to(
        head + b"\r\n\r\n" if step is None else head, step=step, limits=ServerLimits(head_bytes=2000)
    )
    assert answer.startswith(b"HTTP/1.1 431 ")


@async_test
async def test_a_client_that_expects_100_is_asked_for_its_body():
    """The interim answer comes before the body does."""
    async with Running(echo) as running, Raw(running.port) as raw:
        raw.send(b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        assert await raw.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        raw.send(b"ok")
        assert (await raw.until(b"POST / ok")).startswith(b"HTTP/1.1 200")


@async_test
async def test_an_unknown_expectation_is_refused():
    """Other expectations get 417."""
    answer = await answers_to(b"GET / HTTP/1.1\r\nHost: x\r\nExpect: wonders\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 417 ")


@pytest.mark.parametrize(
    ("sent", "reached"),
    [
        (b"GET /p?q=1", b"GET /p?q=1 "),
        (b"GET http://x:80/p?q=1", b"GET /p?q=1 "),
        (b"GET HTTPS://other?q=1", b"GET /?q=1 "),
        (b"GET http://x", b"GET / "),
        (b"OPTIONS *", b"OPTIONS * "),
        (b"OPTIONS http://x", b"OPTIONS * "),
        (b"OPTIONS http://x/", b"OPTIONS / "),
    ],
)
@async_test
async def test_every_form_of_a_target_names_the_same_thing(sent, reached):
    """RFC 9112, 3.2: a path, a whole URL, and an asterisk for the server itself."""
    answer = await answers_to(sent + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.endswith(b"\r\n\r\n" + reached)


def test_a_path_is_known_without_its_escapes():
    request = Request("GET", "/v1/%6Dodels?a=%2F", "1.1", {}, b"", keep_alive=True, arrived=0.0)
    assert (request.path, request.target) == ("/v1/models", "/v1/%6Dodels?a=%2F")


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"Content-Encoding: gzip", b"415"),
        (b"Content-Encoding: identity", b"200"),
        (b"Transfer-Encoding: gzip, chunked", b"501"),
    ],
)
@async_test
async def test_a_body_in_a_coding_that_is_not_read_is_refused(header, status):
    """Before it is taken for what it is not. The answer says what is read."""
    framing = b"" if header.startswith(b"Transfer") else b"Content-Length: 0\r\n"
    answer = await answers_to(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + framing + header + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert (b"accept-encoding: identity" in answer) == (status == b"415")


@async_test
async def test_every_answer_is_dated():
    """RFC 9110, 6.6.1; in the form that all recipients read."""
    for data in (closing(GET), b"nonsense\r\n\r\n"):
        assert re.search(rb"\r\ndate: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT\r\n", await answers_to(data))


@async_test
async def test_an_offer_to_upgrade_is_declined_by_answering():
    """A client that prefers HTTP/2 gets its answer in HTTP/1.1."""
    upgrade = POST.replace(b"Host: x\r\n", b"Host: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n")
    assert (await answers_to(upgrade)).endswith(b"POST /p hello")


@async_test
async def test_head_gets_the_head_only():
    """The length is told, the body is not sent."""
    answer = await answers_to(b"HEAD /h HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert b"content-length: 8\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


@async_test
async def test_http_1_0_gets_an_unframed_stream():
    """A client that knows no chunks gets the bytes and a closed connection."""

    async def stream(exchange):
        exchange.start(200, ())
        exchange.write(b"a")
        exchange.write(b"b")
        exchange.end()

    async with Running(stream) as running, Raw(running.port) as raw:
        raw.send(b"GET / HTTP/1.0\r\n\r\n")
        answer = await raw.until_closed()
    assert answer.endswith(b"\r\n\r\nab")
    assert b"chunked" not in answer


@async_test
async def test_a_silent_connection_is_closed_and_a_slow_head_gets_408():
    """Slow heads and slow bodies end the connection."""
    assert await answers_to(b"", limits=ServerLimits(head_seconds=0.01, idle_seconds=0.01)) == b""
    # Patient before the first byte: what a busy machine brings late is not silence.
    limits = ServerLimits(head_seconds=0.01, idle_seconds=SECONDS)
    assert (await answers_to(b"GET / HT", limits=limits)).startswith(b"HTTP/1.1 408 ")
    late = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhel"
    assert (await answers_to(late, limits=ServerLimits(body_seconds=0.01))).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("how", ["reset", "half-closed"])
@async_test
async def test_a_client_that_leaves_cancels_its_handler(how):
    """Closing counts as leaving, and so does closing one direction."""
    entered, left = asyncio.Event(), asyncio.Event()

    async def wait(exchange):
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    async with Running(wait) as running, Raw(running.port) as raw:
        raw.send(GET)
        await entered.wait()
        if how == "reset":
            raw.writer.transport.abort()
        else:
            raw.writer.write_eof()
        await asyncio.wait_for(left.wait(), SECONDS)


@async_test
async def test_a_slow_reader_pauses_the_handler():
    """A handler that writes more than the client reads waits, and goes on when the client does."""
    written, paused, total = 0, asyncio.Event(), 8 * 1024 * 1024

    async def flood(exchange):
        nonlocal written
        exchange.start(200, ())
        while written < total:
            exchange.write(b"x" * 65536)
            written += 65536
            if exchange.paused:
                paused.set()
                await exchange.drain()
        exchange.end()

    async with Running(flood, limits=ServerLimits(write_high_bytes=65536)) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port, limit=1024)
        writer.write(closing(GET))
        await paused.wait()
        assert written < total
        received = 0
        while data := await reader.read(1 << 20):
            received += len(data)
        assert received > total
        assert written == total
        writer.close()


@async_test
async def test_a_handler_that_fails_gives_500_and_the_next_request_is_unharmed(caplog):
    """An exception is an answer and a line in the log."""

    async def fail(exchange):
        if exchange.request.target == "/bad":
            raise ZeroDivisionError
        await echo(exchange)

    async with Running(fail) as running:
        async with Raw(running.port) as raw:
            raw.send(b"GET /bad HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await raw.until_closed()).startswith(b"HTTP/1.1 500 ")
        async with Raw(running.port) as raw:
            raw.send(GET)
            await raw.until(b"GET /a?b=c ")
    assert "ZeroDivisionError" in caplog.text


@async_test
async def test_a_handler_that_fails_in_mid_stream_cuts_the_stream(caplog):
    """A cut body must not look complete."""

    async def fail(exchange):
        exchange.start(200, ())
        exchange.write(b"part")
        await asyncio.sleep(0)
        raise ZeroDivisionError

    async with Running(fail) as running, Raw(running.port) as raw:
        raw.send(GET)
        answer = await raw.until_closed()
    assert not answer.endswith(b"0\r\n\r\n")


@async_test
async def test_a_header_with_a_line_break_is_never_sent(caplog):
    """A value cannot start a new header."""

    async def inject(exchange):
        exchange.respond(200, ((b"x-id", b"a\r\nset-cookie: b"),), b"")

    async with Running(inject) as running, Raw(running.port) as raw:
        raw.send(GET)
        answer = await raw.until_closed()
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"set-cookie" not in answer


@async_test
async def test_closing_lets_open_requests_end():
    """Drain: the open request is answered, with connection: close; an idle connection ends at once."""
    entered, go = asyncio.Event(), asyncio.Event()

    async def wait(exchange):
        entered.set()
        await go.wait()
        exchange.respond(200, (), b"done")

    async with Running(wait) as running, Raw(running.port) as idle, Raw(running.port) as raw:
        raw.send(GET)
        await entered.wait()
        closing_task = asyncio.create_task(running.server.close(SECONDS))
        assert await idle.until_closed() == b""
        go.set()
        assert (await raw.until_closed()).endswith(b"done")
        await closing_task
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", running.port)


@async_test
async def test_closing_cuts_what_does_not_end():
    """Open requests are cut after the grace."""
    cancelled = asyncio.Event()

    async def wait(exchange):
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with Running(wait) as running, Raw(running.port) as raw:
        raw.send(GET)
        await eventually(lambda: any(c.busy for c in running.server._connections))
        await running.server.close(0.01)
        assert cancelled.is_set()


_PIECES = st.sampled_from(
    [
        b"GET / HTTP/1.1\r\n", b"POST /x HTTP/1.1\r\n", b"Host: x\r\n", b"Content-Length: 5\r\n", b"\r\n", b"hello",
        b"Transfer-Encoding: chunked\r\n", b"5\r\nhello\r\n", b"0\r\n\r\n", b"Connection: close\r\n", b"HTTP/1.0",
        b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\nConnection: upgrade\r\n", b"Content-Length: 99999999999999\r\n",
        b"\n", b"\x00", b"\xff\xfe", b"Content-Length: +5\r\n", b"CONNECT a:1 HTTP/1.1\r\n",
    ]
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(parts=st.lists(st.one_of(_PIECES, st.binary(max_size=20)), max_size=12), cut=st.integers(1, 40))
@async_test
async def test_nothing_that_a_client_sends_breaks_the_server(parts, cut):
    """For any bytes, answers are HTTP, no handler fails, and the next client is served."""
    data = b"".join(parts)
    limits = ServerLimits(head_bytes=500, body_bytes=50)
    async with Running(echo, limits=limits) as running:
        async with Raw(running.port) as raw:
            for at in range(0, len(data), cut):
                raw.send(data[at : at + cut])
            raw.writer.write_eof()
            try:
                answer = await raw.until_closed()
            except ConnectionResetError:
                answer = b""
            assert not answer or answer.startswith(b"HTTP/1.1 ")
            assert b"HTTP/1.1 500" not in answer
        async with Raw(running.port) as raw:
            raw.send(GET)
            await raw.until(b"GET /a?b=c ")
    assert not running.server._connections
