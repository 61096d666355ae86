"""The command line of ``kvbelt chaos``."""

import pytest

from kvbelt.cli import build_parser, main
from kvbelt.ops.chaos import command
from tests.ops.chaos.support import GOOD


def test_kinds_are_listed(capsys):
    """--list prints each kind with what it does and needs."""
    assert main(["chaos", "--list"]) == 0
    listed = capsys.readouterr().out
    assert "kill-decode" in listed
    assert "workers in network namespaces" in listed


@pytest.mark.parametrize("arguments", [[], ["2p2d", "--url", "http://127.0.0.1:9100"]])
def test_either_a_topology_or_a_url(arguments, capsys):
    """Neither and both are refused in one line."""
    assert main(["chaos", *arguments]) == 2
    assert "--url" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["2p2d", "--faults", "kill-decod"], "did you mean 'kill-decode'?"),
        (["--url", "https://127.0.0.1:9100"], "http://HOST:PORT"),
        (["2p2d", "--minutes", "0"], "positive"),
    ],
)
def test_wrong_values_are_named(arguments, part, capsys):
    """The error names the value and what is valid."""
    with pytest.raises(SystemExit):
        main(["chaos", *arguments])
    assert part in capsys.readouterr().err


def test_addresses_and_kinds_are_parsed():
    """Addresses and kinds are parsed by the command line."""
    args = build_parser().parse_args(
        ["chaos", "--url", "http://127.0.0.1:9100/v1", "--faults", "kill-decode,full-buffer"]
    )
    assert str(args.url) == "127.0.0.1:9100"
    assert [kind.name for kind in args.faults] == ["kill-decode", "full-buffer"]


def test_the_admin_key_is_taken_as_other_commands_take_it(tmp_path, monkeypatch):
    """The key comes from a named file or from the variable; with a topology none is needed."""
    file = tmp_path / "admin.key"
    file.write_text("k" * 32)
    file.chmod(0o600)
    url = ["chaos", "--url", "127.0.0.1:9100"]

    def config(*arguments):
        return command._config(build_parser().parse_args([*url, *arguments]), 1)

    assert config().admin_key is None
    assert config("--admin-key-file", str(file)).admin_key == "k" * 32
    monkeypatch.setenv("KVBELT_ADMIN_KEY_FILE", str(file))
    assert config().admin_key == "k" * 32


def test_a_missing_proxy_is_one_line(capsys):
    """The error is one line, with status 2."""
    assert main(["chaos", "--url", "127.0.0.1:1"]) == 2
    assert "http://127.0.0.1:1" in capsys.readouterr().err


def test_report_file_and_status(tmp_path, capsys):
    """The report goes to standard output and to the file; a good run has status 0; an unwritable file is an error."""
    assert command.print_report(GOOD, tmp_path / "found.json") == 0
    assert capsys.readouterr().out.endswith("Every invariant held.\n")
    assert (tmp_path / "found.json").read_bytes().startswith(b"{")
    assert command.print_report(GOOD, tmp_path / "no" / "found.json") == 2
