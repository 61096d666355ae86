"""One version is named everywhere."""

import re
import tomllib
from pathlib import Path

import pytest

from kvbelt import __version__
from tests.docs.pages import DOCS, PAGES, ROOT

CHART = ROOT / "deploy" / "helm" / "kvbelt" / "Chart.yaml"
IMAGE = re.compile(r"\bkvbelt/kvbelt(?:-vllm|-proxy)?:(\d+\.\d+\.\d+)")
#: Every file that names one of our images.
IMAGED = sorted(
    file
    for folder in ("deploy", "docs", "src")
    for file in (ROOT / folder).rglob("*")
    if (file.suffix in {".yaml", ".md", ".py"} or file.name == "Dockerfile") and IMAGE.search(file.read_text("utf-8"))
)


def test_the_package_and_the_chart_have_the_version() -> None:
    """pyproject.toml and Chart.yaml name what kvbelt --version prints."""
    assert tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"] == __version__
    assert re.findall(r"^(?:version|appVersion): (\S+)$", CHART.read_text("utf-8"), re.MULTILINE) == [__version__] * 2


def test_the_changelog_has_the_version() -> None:
    """Its newest section, or the one below what is unreleased."""
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8").splitlines()


@pytest.mark.parametrize("file", IMAGED, ids=lambda file: str(file.relative_to(ROOT)))
def test_images_have_the_version(file: Path) -> None:
    """Manifests, charts, commands and pages name the images of this version."""
    assert set(IMAGE.findall(file.read_text("utf-8"))) == {__version__}


def test_images_are_looked_for_where_they_are() -> None:
    """The Dockerfile, the base, the chart and the pages are among the files."""
    assert {ROOT / "deploy" / "docker" / "Dockerfile", CHART.parent / "values.yaml", DOCS / "deployment.md"} <= set(
        IMAGED
    )
    assert set(IMAGED) & set(PAGES)
