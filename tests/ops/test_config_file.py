"""Options of ``kvbelt up`` in a file."""

import pytest
import yaml

from kvbelt.cli import main


def printed(capsys, *words):
    """What ``kvbelt up --print-config`` prints."""
    assert main(["up", "--print-config", *words]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_a_printed_file_is_read_again(capsys, tmp_path):
    """Every option comes back, lists and flags too, and those on the command line win."""
    given = ["2p2d", "--logs", "--proxy-arg=--log-requests=0", "--worker-arg=a", "--worker-arg=b", "--kv-gb", "0.5"]
    first = printed(capsys, *given)
    assert (first["topology"], first["logs"], first["worker-arg"]) == ("2p2d", True, ["a", "b"])
    file = tmp_path / "up.yaml"
    file.write_text(yaml.safe_dump(first))
    assert printed(capsys, "--config", str(file)) == first
    changed = printed(capsys, "1p2d", f"--config={file}", "--kv-gb", "0.25", "--dtype", "float32")
    assert changed == first | {"topology": "1p2d", "kv-gb": 0.25}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("modle: demo", "unknown option 'modle' (did you mean 'model'?)"),
        ("logs: 3", "logs is 3; it is true or false"),
        ("- 1", "is not a YAML mapping"),
        ("port: 99999", "'99999' is not a port"),
    ],
)
def test_a_wrong_file_is_one_line(content, problem, tmp_path, capsys):
    """The file and the option are named."""
    file = tmp_path / "up.yaml"
    file.write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["up", "--config", str(file)])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert problem in said
    assert len(said.splitlines()) == 1
