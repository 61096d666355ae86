"""``kvbelt workers`` against a real proxy with stand-in workers."""

import asyncio
import json

import pytest

from kvbelt.cli import main
from kvbelt.errors import SettingsError
from kvbelt.ops.admin_client import AdminClient
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
    """It joins, is drained and used again, and leaves; the list shows it all."""
    standin = served.call(Standin("decode", engine_id="new").start())
    name = f"127.0.0.1:{standin.port}"
    assert workers(served, key_file, "add", "decode", name) == 0
    assert workers(served, key_file, "drain", name) == 0
    assert workers(served, key_file, "list") == 0
    said = capsys.readouterr().out
    assert f"{name} is drained" in said
    (line,) = [line for line in said.splitlines() if line.startswith(f"{name}  ")]
    assert line.split()[:5] == [name, "decode", "draining", "0", "toy"]
    assert workers(served, key_file, "undrain", name) == 0
    assert workers(served, key_file, "remove", name) == 0
    assert f"{name} is gone" in capsys.readouterr().out
    assert workers(served, key_file, "list", "--json") == 0
    assert name not in [worker["worker"] for worker in json.loads(capsys.readouterr().out)["workers"]]
    served.call(standin.stop())


def test_remove_waits_for_what_needs_the_worker(served, key_file, capsys):
    """Whoever stops it then stops nothing; with a limit, and not at all where that is asked for."""
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
    """With the two values."""
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
    """On one line, with exit status 2."""
    assert workers(served, key_file, "drain", "127.0.0.1:1") == 2
    assert "there is no worker '127.0.0.1:1'" in capsys.readouterr().err


def test_a_wrong_address_is_refused_before_anybody_is_asked(key_file, capsys):
    """As is a wrong URL."""
    assert main(["workers", "--admin-key-file", str(key_file), "add", "decode", "nowhere"]) == 2
    assert "HOST:PORT" in capsys.readouterr().err
    assert main(["workers", "--proxy", "nowhere", "list"]) == 2
    assert "not a URL of a proxy" in capsys.readouterr().err


def test_nobody_there_is_told(capsys):
    """Which proxy was asked."""
    assert main(["workers", "--proxy", "http://127.0.0.1:1", "list"]) == 2
    assert "no answer from the proxy at http://127.0.0.1:1" in capsys.readouterr().err


def test_the_key_file_may_be_named_by_the_environment(served, key_file, monkeypatch):
    """So that it need not be typed."""
    monkeypatch.setenv("KVBELT_ADMIN_KEY_FILE", str(key_file))
    name = f"127.0.0.1:{served.deployment.decode[0].port}"
    assert main(["workers", "--proxy", served.url, "drain", name]) == 0
    assert AdminClient(served.url).worker(name)["standing"] == "draining"


@pytest.mark.parametrize("text", ["", "short", "with space" * 3, "ä" * 20, "x" * 300])
def test_a_key_that_is_none_is_refused(tmp_path, text):
    """With how to make one."""
    file = tmp_path / "admin.key"
    file.write_text(text, encoding="utf-8")
    file.chmod(0o600)
    with pytest.raises(SettingsError, match="openssl rand"):
        load_admin_key(file)


def test_a_key_that_others_may_read_is_refused(key_file):
    """With the chmod to run; and a key is never written over."""
    key_file.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        load_admin_key(key_file)
    with pytest.raises(SettingsError, match="cannot write"):
        write_admin_key(key_file)


def test_the_key_is_not_shown():
    """Settings may be logged."""
    assert "k" * 20 not in repr(ProxySettings(decode=(Address("a", 1),), admin_key="k" * 20))
