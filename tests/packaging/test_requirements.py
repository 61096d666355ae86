"""What the extras of pyproject.toml ask for."""

import tomllib

import pytest
from packaging.requirements import Requirement

from tests.deploy.rendering import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BASE = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}

#: Packages that vLLM 0.26 or 0.32 pins, or bounds from above.
VLLM_BOUNDS = {
    "torch",
    "torchaudio",
    "torchvision",
    "transformers",
    "fastapi",
    "setuptools",
    "protobuf",
    "numba",
    "numpy",
}


def test_vllms_environment_gets_nothing_that_could_move_its_pins() -> None:
    """The extra asks for no package that vLLM bounds, and sets an upper bound for nixl only."""
    asked = {one.name: one for one in (*BASE, *EXTRAS["vllm"])}
    assert not asked.keys() & VLLM_BOUNDS
    assert [name for name, one in asked.items() if "<" in str(one.specifier)] == ["nixl"]


@pytest.mark.parametrize(
    ("extra", "parts"), [("demo", {"embedded", "demo-model"}), ("test", {"demo", "mooncake", "traces"})]
)
def test_an_extra_takes_others_by_name(extra: str, parts: set[str]) -> None:
    """So each package has one range."""
    assert set().union(*(one.extras for one in EXTRAS[extra] if one.name == "kvbelt")) == parts


def test_both_engines_take_the_same_nixl() -> None:
    """A worker with either engine can send to the other's host."""
    (ours,), (theirs,) = ([one for one in EXTRAS[name] if one.name == "nixl"] for name in ("embedded", "vllm"))
    assert ours == theirs


def test_the_pins_are_within_the_ranges() -> None:
    """Each version of constraints.txt is one that an extra takes."""
    asked = {one.name: one.specifier for lines in EXTRAS.values() for one in lines}
    pins = [
        Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    ]
    assert {pin.name for pin in pins} == {"torch", "nixl", "mooncake-transfer-engine-non-cuda"}
    for pin in pins:
        assert asked[pin.name].contains(str(pin.specifier).removeprefix("=="))
