"""Web pages of other origins, and OPTIONS."""

import pytest

from kvbelt.cli import build_parser
from kvbelt.limits import Limits
from tests.http.support import Raw
from tests.proxy.support import Deployment, async_test

PAGE = (b"origin", b"http://localhost:3000")
PREFLIGHT = (
    PAGE,
    (b"access-control-request-method", b"POST"),
    (b"access-control-request-headers", b"authorization,content-type"),
)
BODY = {"prompt": "x", "max_tokens": 3}


def allowed(reply):
    """The origin that may read an answer."""
    return reply.headers.get(b"access-control-allow-origin")


@async_test
async def test_a_browser_is_told_that_it_may_ask():
    """Every origin, unless the operator names some; never with a browser's own credentials."""
    async with Deployment() as deployment:
        got = await deployment.get("/v1/chat/completions", "OPTIONS", headers=PREFLIGHT)
        assert (got.status, allowed(got)) == (200, b"*")
        assert got.headers[b"access-control-allow-headers"] == b"authorization,content-type"
        assert b"POST" in got.headers[b"access-control-allow-methods"]
        assert b"access-control-allow-credentials" not in got.headers


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"prompt": ""}, {"max_tokens": "many"}])
@async_test
async def test_every_answer_to_a_page_may_be_read(more):
    """Whole ones, streams, and errors."""
    async with Deployment() as deployment:
        assert allowed(await deployment.ask(BODY | more, headers=(PAGE,))) == b"*"
        assert allowed(await deployment.ask(BODY | more)) is None


@async_test
async def test_a_refusal_before_routing_may_be_read_too():
    async with Deployment(limits=Limits(body_bytes=10)) as deployment, Raw(deployment.proxy.port) as raw:
        raw.send(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nOrigin: http://a\r\nContent-Length: 11\r\n\r\n")
        answer = await raw.until_closed()
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"access-control-allow-origin: *\r\n" in answer


@async_test
async def test_only_the_named_origins_may_read():
    """The answer depends on the origin then, which caches are told."""
    async with Deployment(allowed_origins=("http://localhost:3000",)) as deployment:
        got = await deployment.get("/v1/models", headers=(PAGE,))
        assert (allowed(got), got.headers[b"vary"]) == (b"http://localhost:3000", b"Origin")
        other = (b"origin", b"http://evil.example")
        assert allowed(await deployment.get("/v1/models", headers=(other,))) is None
        got = await deployment.get("/v1/models", "OPTIONS", headers=(other, *PREFLIGHT[1:]))
        assert got.status == 400
        assert "http://evil.example" in got.json["error"]["message"]


@pytest.mark.parametrize("path", ["/kvbelt/requests", "/console", "/kvbelt/workers", "/metrics"])
@async_test
async def test_what_is_the_operators_is_for_no_page(path):
    """A page that an operator visits must not read his console."""
    async with Deployment() as deployment:
        assert allowed(await deployment.get(path, headers=(PAGE,))) is None
        assert allowed(await deployment.get(path, "OPTIONS", headers=PREFLIGHT)) is None


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/completions", b"POST, OPTIONS"),
        ("/v1/models", b"GET, HEAD, OPTIONS"),
        ("/v1/models/toy", b"GET, HEAD, OPTIONS"),
        ("/tokenize", b"POST, OPTIONS"),
        ("*", b"GET, HEAD, POST, DELETE, OPTIONS"),
    ],
)
@async_test
async def test_options_says_which_methods_there_are(path, methods):
    async with Deployment() as deployment:
        got = await deployment.get(path, "OPTIONS")
        assert (got.status, got.headers[b"allow"], got.body) == (204, methods, b"")
        assert (await deployment.get("/nowhere", "OPTIONS")).status == 404


@pytest.mark.parametrize(
    ("said", "origins"),
    [
        ([], ("*",)),
        (["--allowed-origins", ""], ()),
        (["--allowed-origins", "https://a,http://b:80"], ("https://a", "http://b:80")),
        (["--allowed-origins", '["https://a"]'], ("https://a",)),
    ],
)
def test_the_operator_names_origins(said, origins):
    """Also as vLLM takes them."""
    assert build_parser().parse_args(["proxy", *said]).allowed_origins == origins


def test_what_is_no_origin_is_an_error(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["proxy", "--allowed-origins", "a.example"])
    assert "'a.example' is not an origin" in capsys.readouterr().err
