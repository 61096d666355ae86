"""The HTTP client: reuse, safe retries, streams, and malformed answers."""

import asyncio
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbelt.http import (
    ClientLimits,
    ConnectError,
    HttpError,
    PeerClosedError,
    Pool,
    ProtocolViolationError,
    TooLargeError,
)
from tests.http.support import SECONDS, Running, async_test, echo, eventually, free_port

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Scripted:
    """A server that answers each connection's first bytes as scripted, without parsing."""

    def __init__(self, *answers, close=True, step=None):
        self._answers = list(answers)
        self._close = close
        self._step = step
        self.connections = 0
        self.closed = asyncio.Event()

    async def __aenter__(self):
        """Begin."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.pool = Pool("127.0.0.1", self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *exc):
        """End."""
        self.pool.close()
        self._server.close()

    async def _serve(self, reader, writer):
        self.connections += 1
        answer = self._answers.pop(0)
        try:
            await reader.read(65536)
            for at in range(0, len(answer), self._step or len(answer) or 1):
                writer.write(answer[at : at + (self._step or len(answer))])
                await writer.drain()
                await asyncio.sleep(0)
            if not self._close:
                await reader.read(65536)
        except ConnectionError:
            pass
        self.closed.set()
        writer.close()


@async_test
async def test_a_connection_serves_one_request_after_the_other():
    """Kept connections are used again."""
    async with Running(echo) as running:
        pool = Pool("127.0.0.1", running.port)
        for _ in range(3):
            response = await pool.request("POST", "/x", ((b"a", b"b"),), b"body")
            assert (response.status, await response.read(100)) == (200, b"POST /x body")
        assert len(running.server._connections) == 1
        pool.close()


@async_test
async def test_requests_at_once_get_connections_of_their_own():
    """No request waits for another's connection."""
    async with Running(echo) as running:
        pool = Pool("127.0.0.1", running.port)
        responses = await asyncio.gather(*(pool.request("POST", f"/{i}", (), b"") for i in range(20)))
        assert [await r.read(100) for r in responses] == [b"POST /%d " % i for i in range(20)]
        pool.close()


@async_test
async def test_body_bytes_come_as_they_arrive():
    """A piece can be read before the next one is sent."""
    go = asyncio.Event()

    async def stream(exchange):
        exchange.start(200, ())
        exchange.write(b"one")
        await go.wait()
        exchange.write(b"two")
        exchange.end()

    async with Running(stream) as running:
        pool = Pool("127.0.0.1", running.port)
        response = await pool.request("GET", "/")
        assert await response.chunk() == b"one"
        go.set()
        assert await response.chunk() == b"two"
        assert await response.chunk() == b""
        pool.close()


@async_test
async def test_a_cancelled_call_closes_its_connection():
    """The server notices at once that the caller has left."""
    entered, left = asyncio.Event(), asyncio.Event()

    async def wait(exchange):
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    async with Running(wait) as running:
        pool = Pool("127.0.0.1", running.port)
        call = asyncio.create_task(pool.request("GET", "/"))
        await entered.wait()
        call.cancel()
        await asyncio.wait_for(left.wait(), SECONDS)
        assert not pool._idle
        pool.close()


@async_test
async def test_an_unread_response_pauses_its_peer():
    """Unread bytes are held up to a limit, and none is lost."""
    written, total = 0, 8 * 1024 * 1024

    async def flood(exchange):
        nonlocal written
        exchange.start(200, ())
        while written < total:
            exchange.write(b"x" * 65536)
            written += 65536
            if exchange.paused:
                await exchange.drain()
        exchange.end()

    async with Running(flood) as running:
        pool = Pool("127.0.0.1", running.port, limits=ClientLimits(read_high_bytes=65536))
        response = await pool.request("GET", "/")
        await eventually(lambda: response.buffered > 65536)
        held = -1
        while held != written:  # until the flood has stopped by itself
            held = written
            await asyncio.sleep(0.02)
        assert written < total
        received = 0
        while data := await response.chunk():
            received += len(data)
        assert received == total
        pool.close()


@async_test
async def test_a_whole_body_larger_than_the_limit_is_refused():
    """TooLargeError, and the connection is closed; below the limit a body may exceed the pause mark."""

    async def big(exchange):
        exchange.respond(200, (), b"x" * 300_000)

    async with Running(big) as running:
        pool = Pool("127.0.0.1", running.port, limits=ClientLimits(read_high_bytes=1000))
        assert len(await (await pool.request("GET", "/")).read(300_000)) == 300_000
        with pytest.raises(TooLargeError):
            await (await pool.request("GET", "/")).read(100_000)
        pool.close()


@async_test
async def test_a_closed_port_is_a_connect_error():
    """It names the address."""
    port = free_port()
    with pytest.raises(ConnectError, match=str(port)):
        await Pool("127.0.0.1", port).request("GET", "/")


@async_test
async def test_a_process_that_stood_still_while_it_connected_has_its_connection():
    """An ordinary timer would end the attempt before the connection is seen."""
    async with Running(echo) as running:
        pool = Pool("127.0.0.1", running.port, limits=ClientLimits(connect_seconds=0.1))
        asking = asyncio.ensure_future(pool.request("GET", "/"))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(time.sleep, 0.3)  # the loop of both stands still
        assert (await asking).status == 200
        pool.close()


@async_test
async def test_a_connection_cut_in_mid_body_is_an_error_after_the_bytes_that_came():
    """A short body never looks complete."""
    async with Scripted(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf") as peer:
        response = await peer.pool.request("GET", "/")
        assert await response.chunk() == b"half"
        with pytest.raises(PeerClosedError) as caught:
            await response.chunk()
        assert caught.value.started


@async_test
async def test_a_body_without_a_length_ends_with_its_connection():
    """A body that ends with the connection is read, and the connection is not kept."""
    async with Scripted(b"HTTP/1.0 200 OK\r\n\r\nall of it") as peer:
        response = await peer.pool.request("GET", "/")
        assert await response.read(100) == b"all of it"
        assert not peer.pool._idle


@async_test
async def test_interim_answers_are_skipped():
    """100 and 103 are not the answer."""
    early = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    async with Scripted(b"HTTP/1.1 100 Continue\r\n\r\n" + early + OK, close=False) as peer:
        response = await peer.pool.request("POST", "/", (), b"x")
        assert (response.status, await response.read(10)) == (200, b"ok")
        assert b"link" not in response.headers


@async_test
async def test_an_answer_one_byte_at_a_time_is_the_same_answer():
    """How bytes are cut into packets does not matter."""
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    async with Scripted(chunked, step=1, close=False) as peer:
        response = await peer.pool.request("GET", "/")
        assert await response.read(100) == b"abcde"


@async_test
async def test_an_unasked_answer_closes_the_connection():
    """Bytes after a complete answer are not taken for the next answer."""
    async with Scripted(OK + OK, OK, close=False) as peer:
        for _ in range(2):
            assert await (await peer.pool.request("GET", "/")).read(10) == b"ok"
        assert peer.connections == 2


@pytest.mark.parametrize("answer", [b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000])
@async_test
async def test_an_answer_that_is_not_http_is_a_violation(answer):
    """Neither garbage nor an endless head is waited for."""
    async with Scripted(answer, close=False) as peer:
        with pytest.raises(ProtocolViolationError):
            await peer.pool.request("GET", "/")


@async_test
async def test_a_request_that_was_read_is_never_sent_twice():
    """A first connection that ends without an answer is an error, not a retry."""
    async with Scripted(b"", OK) as peer:
        with pytest.raises(PeerClosedError) as caught:
            await peer.pool.request("POST", "/", (), b"x")
        assert not caught.value.started
        assert peer.connections == 1


@async_test
async def test_a_kept_connection_that_is_reset_unread_is_replaced():
    """A reset before any answer, on a kept connection, means that the request was never read."""
    async with Running(echo) as running:
        pool = Pool("127.0.0.1", running.port)
        await (await pool.request("GET", "/")).read(100)
        (connection,) = pool._idle
        call = asyncio.create_task(pool.request("GET", "/again"))
        await asyncio.sleep(0)  # sent on the kept connection
        connection.connection_lost(ConnectionResetError())
        assert await (await call).read(100) == b"GET /again "
        pool.close()


@async_test
async def test_a_connection_idle_for_too_long_is_not_used():
    """A connection that was idle for long is not used again."""
    async with Running(echo) as running:
        pool = Pool("127.0.0.1", running.port, limits=ClientLimits(idle_seconds=0.0))
        for _ in range(2):
            await (await pool.request("GET", "/")).read(100)
            await asyncio.sleep(0.002)
        assert len(pool._open) <= 1
        pool.close()


@async_test
async def test_losing_an_endpoint_fails_every_open_call_with_the_reason():
    """abort_all reaches calls that wait for a head or a body."""
    async with Scripted(b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx", close=False) as peer:
        waiting = asyncio.create_task(peer.pool.request("GET", "/"))
        await eventually(lambda: peer.connections == 1)
        response = await peer.pool.request("GET", "/")
        reading = asyncio.create_task(response.read(100))
        await asyncio.sleep(0)
        peer.pool.abort_all(PeerClosedError("lost: no health"))
        for task in (waiting, reading):
            with pytest.raises(PeerClosedError, match="no health"):
                await task


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(
        st.one_of(
            st.sampled_from([
                b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"Content-Length: 3\r\n", b"\r\n", b"abc",
                b"Transfer-Encoding: chunked\r\n", b"3\r\nabc\r\n", b"0\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n",
            ]),
            st.binary(max_size=10),
        ),
        max_size=8,
    )
)  # fmt: skip
@async_test
async def test_nothing_that_a_server_sends_breaks_the_client(parts):
    """Any bytes are an answer or an HttpError."""
    async with Scripted(b"".join(parts)) as peer:
        try:
            response = await peer.pool.request("GET", "/")
            await response.read(1000)
        except HttpError:
            pass
        await eventually(lambda: all(not c.closed for c in peer.pool._open))
