"""``kvbelt workers`` against a real proxy with stand-in workers."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from kvbelt.cli import main
from kvbelt.errors import SettingsError
from kvbelt.ops.proxy_client import ProxyClient, proxy_url
from kvbelt.proxy import Address, ProxySettings
from kvbelt.security.admin_key import load_admin_key, write_admin_key
from tests.ops.served import serving
from tests.proxy.standin import Standin


def workers(served, key_file, *words):
    """One command. Returns its exit status."""
    return main(["workers", "--proxy", served.url, "--admin-key-file", str(key_file), *words])


@pytest.fixture
def served(key_file):
    """A proxy with two decode workers."""
    with serving(decode=2, health_interval_seconds=0.05, admin_key=load_admin_key(key_file)) as made:
        yield made


@pytest.fixture
def key_file(tmp_path):
    """A new key."""
    return write_admin_key(tmp_path / "admin.key")


def test_the_life_of_a_worker(served, key_file, capsys):
    """A worker is added, drained, undrained and removed; the list shows each state."""
    standin = served.call(Standin("decode", engine_id="new").start())
    name = f"127.0.0.1:{standin.port}"
    assert workers(served, key_file, "add", "decode", name) == 0
    assert workers(served, key_file, "drain", name) == 0
    assert workers(served, key_file, "list") == 0
    said = capsys.readouterr().out
    assert f"{name} is drained" in said
    (line,) = [line for line in said.splitlines() if line.startswith(f"{name}  ")]
    assert line.split()[:5] == [name, "decode", "drained", "0", "toy"]
    assert workers(served, key_file, "undrain", name) == 0
    assert workers(served, key_file, "remove", name) == 0
    assert f"{name} is gone" in capsys.readouterr().out
    assert workers(served, key_file, "list", "--json") == 0
    assert name not in [worker["worker"] for worker in json.loads(capsys.readouterr().out)["workers"]]
    served.call(standin.stop())


def test_the_last_worker_of_a_role_is_drained_only_by_force(served, key_file, capsys):
    """Without --force it stays, and the message says what would happen."""
    first, last = (f"127.0.0.1:{standin.port}" for standin in served.deployment.decode)
    assert workers(served, key_file, "drain", first) == 0
    for verb in ("drain", "remove"):
        assert workers(served, key_file, verb, last) == 2
        assert "the last ready decode worker: until it is back prefill workers answer alone" in capsys.readouterr().err
    assert workers(served, key_file, "drain", "--force", last) == 0
    assert f"kvbelt workers undrain {last}" in capsys.readouterr().out


def test_remove_waits_for_what_needs_the_worker(served, key_file, capsys):
    """Remove and drain return when no request needs the worker, or after --wait, or at once with --no-wait."""
    leaving = served.deployment.decode[0]
    name = f"127.0.0.1:{leaving.port}"
    held = leaving.script.before_head = asyncio.Event()
    asking = served.begin(served.deployment.ask({"prompt": "hello", "max_tokens": 6}))
    served.call(leaving.arrived.wait())
    assert workers(served, key_file, "drain", "--no-wait", name) == 0
    assert workers(served, key_file, "drain", "--wait", "0.01", name) == 2
    assert f"1 requests need {name}" in capsys.readouterr().err

    async def answer():
        held.set()

    served.begin(answer())
    assert workers(served, key_file, "remove", name) == 0
    assert asking.result(60).status == 200


def test_a_pair_that_does_not_fit_is_listed(served, key_file, capsys):
    """The list shows the refusal with both values."""
    prefill = served.deployment.prefill[0]
    refusal = {"state": "failed", "reason": "refused_dtype", "detail": "dtype is float32 here and bfloat16 there"}
    prefill.script.peers_refusal = refusal
    standin = served.call(Standin("decode", engine_id="new").start())
    assert workers(served, key_file, "add", "decode", f"127.0.0.1:{standin.port}") == 0
    served.call(served.deployment.proxy.context.warmer.settled())
    assert workers(served, key_file, "list") == 0
    line = f"127.0.0.1:{prefill.port} cannot send to 127.0.0.1:{standin.port}: refused_dtype: {refusal['detail']}"
    assert line in capsys.readouterr().out.splitlines()
    served.call(standin.stop())


def test_a_refusal_is_the_proxys_own_words(served, key_file, capsys):
    """The error is the proxy's message on one line, with exit status 2."""
    assert workers(served, key_file, "drain", "127.0.0.1:1") == 2
    assert "there is no worker '127.0.0.1:1'" in capsys.readouterr().err


def test_a_wrong_address_is_refused_before_a_request_is_sent(key_file, capsys):
    """A wrong address or URL is refused without a request."""
    assert main(["workers", "--admin-key-file", str(key_file), "add", "decode", "nowhere"]) == 2
    assert "HOST:PORT" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["workers", "--url", "ftp://nowhere", "list"])
    assert "not the address of a proxy" in capsys.readouterr().err


def test_the_proxy_is_named_before_or_after_the_verb_or_by_the_environment(served, capsys, monkeypatch):
    """Each command takes an address in each form; --proxy is the older name of --url."""
    place = served.url.removeprefix("http://")
    ways = (["--url", place, "list"], ["list", "--url", f"{place}/v1"], ["--proxy", served.url, "list"], ["list"])
    for words in ways:
        if words == ["list"]:
            monkeypatch.setenv("KVBELT_URL", place)
        assert main(["workers", *words]) == 0
    assert main(["top", "--once"]) == 0
    assert main(["why", "--list"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("WORKER") == len(ways) + 1


@pytest.mark.parametrize(
    ("written", "url"),
    [
        ("127.0.0.1:9100", "http://127.0.0.1:9100"),
        ("node-1", "http://node-1:9100"),
        ("http://127.0.0.1:9100/v1", "http://127.0.0.1:9100"),
        ("127.0.0.1:9200/v1/", "http://127.0.0.1:9200"),
        ("https://serving.example/kvbelt", "https://serving.example:443/kvbelt"),
        ("[::1]:9100", "http://[::1]:9100"),
    ],
)
def test_all_forms_of_an_address_are_one(written, url):
    """The API's own URL is as good as the proxy's."""
    assert proxy_url(written) == url


@pytest.mark.parametrize("written", ["", "http://", "ftp://x", "x:99999", "x:y", "a b", "http://x?y"])
def test_what_is_no_address_is_refused(written):
    with pytest.raises(ValueError):
        proxy_url(written)


def test_a_variable_that_is_no_address_is_named(monkeypatch, capsys):
    """The error has the variable and its value."""
    monkeypatch.setenv("KVBELT_URL", "ftp://x")
    assert main(["workers", "list"]) == 2
    assert "KVBELT_URL=ftp://x is not the address of a proxy" in capsys.readouterr().err


def test_a_missing_proxy_is_reported(capsys):
    """The error names the proxy's URL."""
    assert main(["workers", "--proxy", "http://127.0.0.1:1", "list"]) == 2
    assert "no answer from the proxy at http://127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_another_server_is_an_error(capsys, flags):
    """A web page instead of JSON is one line, with exit status 2."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        serving = threading.Thread(target=server.handle_request)
        serving.start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert main(["workers", "--proxy", url, "list", *flags]) == 2
        serving.join()
    assert url in capsys.readouterr().err.splitlines()[-1]


def test_without_the_key_the_answer_says_how_it_is_given(served, capsys):
    """Not in HTTP's words."""
    name = f"127.0.0.1:{served.deployment.decode[0].port}"
    assert main(["workers", "--url", served.url, "drain", name]) == 2
    said = capsys.readouterr().err
    assert f"the proxy at {served.url} wants its admin key: --admin-key-file FILE, or $KVBELT_ADMIN_KEY_FILE" in said


def test_the_key_file_may_be_named_by_the_environment(served, key_file, monkeypatch):
    """The variable replaces the flag."""
    monkeypatch.setenv("KVBELT_ADMIN_KEY_FILE", str(key_file))
    name = f"127.0.0.1:{served.deployment.decode[0].port}"
    assert main(["workers", "--proxy", served.url, "drain", name]) == 0
    assert ProxyClient(served.url).worker(name).standing == "draining"


@pytest.mark.parametrize("text", ["", "short", "with space" * 3, "ä" * 20, "x" * 300])
def test_a_file_without_a_key_is_refused(tmp_path, text):
    """The error says how to make a key."""
    file = tmp_path / "admin.key"
    file.write_text(text, encoding="utf-8")
    file.chmod(0o600)
    with pytest.raises(SettingsError, match="openssl rand"):
        load_admin_key(file)


def test_a_key_that_others_may_read_is_refused(key_file):
    """The error has the chmod command; and a key is never overwritten."""
    key_file.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        load_admin_key(key_file)
    with pytest.raises(SettingsError, match="cannot write"):
        write_admin_key(key_file)


def test_the_key_is_not_shown():
    """The settings' repr does not contain the key."""
    assert "k" * 20 not in repr(ProxySettings(decode=(Address("a", 1),), admin_key="k" * 20))
