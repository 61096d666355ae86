"""Key files: made safely, read strictly."""

import stat
import subprocess
import sys

import pytest
import zmq.auth

from kvbelt.cli import main
from kvbelt.errors import SettingsError, StartError
from kvbelt.security import keys as k


@pytest.fixture
def folder(tmp_path):
    """Keys of a proxy and a prefill worker."""
    k.write_new_keys(tmp_path / "keys", ["proxy", "prefill"])
    return tmp_path / "keys"


def load(folder, name="prefill"):
    """Load the keys as a worker does."""
    return k.load_keys(k.secret_file(folder, name), k.trusted_folder(folder))


def test_what_is_made_is_what_is_read(folder):
    """Each process has its own pair, and trusts all others by name."""
    prefill, proxy = load(folder), load(folder, "proxy")
    assert prefill.trusted == proxy.trusted == {prefill.own.public: "prefill", proxy.own.public: "proxy"}
    assert prefill.public_key_of("proxy") == proxy.own.public
    assert prefill.public_key_of("decode") is None


def test_secret_keys_are_for_their_owner_only(folder):
    """The file has mode 0600, and its folder 0700."""
    assert stat.S_IMODE((folder / "prefill.key_secret").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_files_are_zeromqs_certificates(folder):
    """Pyzmq reads our files, and we read pyzmq's."""
    ours = load(folder).own
    loaded = zmq.auth.load_certificate(folder / "prefill.key_secret")
    assert loaded == (ours.public.encode(), ours.secret.encode())
    public, secret = zmq.auth.create_certificates(folder / "trusted", "decode")
    (folder / "trusted" / "decode.key_secret").chmod(0o600)
    theirs = k.load_keys(secret, folder / "trusted")
    assert theirs.own.public.encode() == zmq.auth.load_certificate(public)[0]
    assert theirs.trusted[theirs.own.public] == "decode"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_secret_key_that_others_may_read_is_refused(folder, mode):
    """The error has the chmod command."""
    file = folder / "prefill.key_secret"
    file.chmod(mode)
    with pytest.raises(SettingsError, match=f"chmod 600 {file}"):
        load(folder)
    file.chmod(0o600)
    load(folder)


def test_public_keys_that_others_may_change_are_refused(folder):
    """A user who may write to the folder could add a trusted key."""
    file = folder / "trusted" / "proxy.key"
    file.chmod(0o666)
    with pytest.raises(SettingsError, match=f"chmod go-w {file}"):
        load(folder)
    file.chmod(0o644)
    (folder / "trusted").chmod(0o777)
    with pytest.raises(SettingsError, match="chmod o-w"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "does not hold"),
        ("curve\n  public-key = 'short'\n", "40 characters of Z85"),
        ('curve\n  public-key = "' + "a" * 40 + '"\n', "does not hold a secret key"),
        ('curve\n public-key = "' + "a" * 40 + '"\n secret-key = "' + "0" * 40 + '"\n', "does not belong"),
        ("\xff\xfe", "not text"),
    ],
)
def test_a_file_without_a_key_is_refused(folder, content, words):
    """The error names the file and the missing part."""
    file = folder / "prefill.key_secret"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(SettingsError, match=words) as raised:
        load(folder)
    assert str(file) in str(raised.value)


def test_a_missing_file_is_named(folder, tmp_path):
    """A missing key file and a folder without keys are errors."""
    with pytest.raises(SettingsError, match=r"decode\.key_secret.*No such file"):
        load(folder, "decode")
    with pytest.raises(SettingsError, match=r"no NAME\.key in .*empty"):
        k.load_keys(folder / "prefill.key_secret", tmp_path / "empty")


def test_a_key_is_never_overwritten(folder):
    """This holds for the secret and the public key."""
    before = load(folder)
    with pytest.raises(SettingsError, match="exists already"):
        k.write_new_keys(folder, ["decode", "prefill"])
    assert load(folder) == before
    assert not (folder / "decode.key_secret").exists()


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "ü"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path, name):
    """Nothing is written."""
    with pytest.raises(SettingsError, match="not a name of a key"):
        k.write_new_keys(tmp_path, [name])
    assert list(tmp_path.iterdir()) == []


def test_secret_keys_are_not_shown(folder):
    """Logs and tracebacks show reprs."""
    keys = load(folder)
    assert keys.own.secret not in repr(keys)
    assert keys.own.public in repr(keys)


def test_an_engine_id_is_proved_by_its_key(folder):
    """No other key proves it."""
    prefill, proxy = load(folder), load(folder, "proxy")
    name = k.new_engine_id(prefill)
    assert k.speaks_for(prefill.own.public, name)
    assert not k.speaks_for(proxy.own.public, name)
    assert name != k.new_engine_id(prefill)
    assert not k.speaks_for(prefill.own.public, k.fingerprint(prefill.own.public))


def test_the_command_makes_keys(tmp_path, capsys):
    """``kvbelt keys new DIR`` lists what it has written, and refuses a second time."""
    assert main(["keys", "new", str(tmp_path / "k")]) == 0
    written = capsys.readouterr().out.split()
    assert len(written) == 6
    assert load(tmp_path / "k", "decode").public_key_of("proxy")
    assert main(["keys", "new", str(tmp_path / "k"), "decode-1"]) == 0
    assert main(["keys", "new", str(tmp_path / "k"), "decode-1"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_libzmq_without_curve_is_refused(monkeypatch):
    """The error names the library and says what to install."""
    monkeypatch.setattr(zmq, "has", lambda feature: False)
    with pytest.raises(StartError, match="built without CURVE"):
        k.new_key_pair()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--notify-host", "0.0.0.0"], ("--notify-host is 0.0.0.0", "--key-file", "--insecure")),
        (["--key-file", "k"], ("--trusted-keys-dir", "missing")),
        (["--key-file", "k", "--trusted-keys-dir", "d", "--insecure"], ("--insecure", "contradict")),
        (["--key-file", "nowhere", "--trusted-keys-dir", "d"], ("nowhere", "No such file")),
    ],
)
def test_the_proxys_command_line_refuses_what_is_not_safe(arguments, words, capsys):
    """The error is one line with status 2, before the proxy listens."""
    assert main(["proxy", *arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert all(word in error for word in words)


def test_a_workers_command_line_refuses_to_listen_beyond_loopback_without_keys(tmp_path):
    """The error is one line with status 2, before the model is loaded."""
    file = tmp_path / "decode.yaml"
    file.write_text(
        "enable_pd: True\ntransfer_channel: nixl\npd_role: receiver\npd_buffer_size: 1000000\n"
        "pd_peer_host: 0.0.0.0\npd_peer_init_port: 7300\npd_peer_alloc_port: 7400\n"
    )
    # In a process of its own, which a worker ends by itself.
    command = [
        sys.executable,
        "-m",
        "kvbelt",
        "worker",
        "--role",
        "decode",
        "--config",
        str(file),
        "--model",
        "/nowhere",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    error = done.stderr
    assert len(error.splitlines()) == 1
    assert all(word in error for word in ("pd_peer_host is 0.0.0.0", "pd_key_file", "pd_insecure"))
