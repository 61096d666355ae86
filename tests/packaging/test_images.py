"""The pip lines of the Dockerfile, planned by pip for an empty environment. No container engine is needed."""

import json
import re
from pathlib import Path

import pytest

from tests.deploy.rendering import ROOT
from tests.packaging.test_requirements import BASE, EXTRAS
from tests.packaging.test_vllm_environment import planned

DOCKERFILE = (ROOT / "deploy/docker/Dockerfile").read_text()


def test_each_image_asks_for_an_extra_that_there_is() -> None:
    """The base, the connector beside vLLM (test_vllm_environment.py plans it) and the embedded engine."""
    asked = re.findall(r"pip install .*?/source(?:\[(\w+)\])?\"?(?:\s|$)", DOCKERFILE, re.MULTILINE)
    assert asked == ["", "vllm", "embedded"]
    assert {name for name in asked if name} <= EXTRAS.keys()


@pytest.mark.long
@pytest.mark.parametrize("extra", ["proxy", "embedded"])
def test_pip_finds_the_packages_of_an_image(extra: str, tmp_path: Path) -> None:
    """With the constraints that the line names. Only the embedded engine brings torch."""
    wanted = [*BASE, *EXTRAS.get(extra, [])]
    ran = planned(ROOT / "constraints.txt", tmp_path / "report", *map(str, wanted))
    assert ran.returncode == 0, ran.stderr
    installed = {one["metadata"]["name"] for one in json.loads((tmp_path / "report").read_text())["install"]}
    assert ("torch" in installed) is (extra == "embedded")
