"""What a vLLM is taken or refused for, without one: its version, its hooks, its KV layout."""

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
from packaging.version import Version

import kvbelt.vllm
from kvbelt.errors import StartError
from kvbelt.vllm.versions import Age, age_of, allow_groups, hook_problems, hooks_of, layout_problem, wanted_layout


@pytest.mark.parametrize(
    ("version", "age"),
    [
        ("0.25.1", Age.OLDER),
        ("0.26.0", Age.TRIED),
        ("0.27.1rc1", Age.TRIED),
        ("0.32.1+cpu", Age.TRIED),
        ("0.33.9", Age.TRIED),
        ("0.34.0", Age.NEWER),
        ("0.260.0", Age.NEWER),
        ("1.0", Age.NEWER),
        ("dev", Age.NEWER),
    ],
)
def test_a_version_is_older_tried_or_newer(version: str, age: Age) -> None:
    """Only major and minor count; a build without a number is new."""
    assert age_of(version) is age


@pytest.mark.parametrize(
    ("version", "said"),
    [("0.25.1", r"vLLM is 0\.25\.1; .* 0\.26 and newer"), ("0.99.0", r"vLLM 0\.99\.0 has not what kvbelt uses")],
)
def test_a_vllm_that_does_not_fit_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, version: str, said: str
) -> None:
    """One is too old; of the other a module has gone."""
    other = ModuleType("vllm")
    other.__version__ = version
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm" or name == "kvbelt.vllm.connector"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", other)
    with pytest.raises(StartError, match=said) as refused:
        _ = kvbelt.vllm.KVBeltConnector
    assert "\n" not in str(refused.value)
    assert "pip install" in str(refused.value) or "0.26 to 0.33" in str(refused.value)


class Theirs:
    def __init__(self, config: object) -> None: ...
    def get_finished(self, ids: set[str]) -> None: ...
    def reset_cache(self) -> None: ...
    @classmethod
    def build(cls, one: int, two: int) -> None: ...


class Same(Theirs):
    def __init__(self, config: object) -> None: ...
    def get_finished(self, ids: set[str]) -> None: ...
    @classmethod
    def build(cls, *arguments: int) -> None: ...
    @classmethod
    def get_required_kvcache_layout(cls, config: object) -> None: ...
    def _own(self, anything: object) -> None: ...


class Other(Theirs):
    def get_finished(self, ids: set[str], more: int) -> None: ...
    def bind_pool(self) -> None: ...


def test_hooks_fit_if_vllm_has_them_with_the_same_parameters() -> None:
    """A hook that takes anything fits, and one that vLLM calls only if it has it may be missing."""
    assert hook_problems(hooks_of(Same), hooks_of(Theirs, inherited=True)) == []


def test_a_renamed_hook_and_a_changed_one_are_found() -> None:
    """Each is named, with what vLLM has instead."""
    assert hook_problems(hooks_of(Other), hooks_of(Theirs, inherited=True)) == [
        "get_finished is given ids, not ids, more",
        "it has no bind_pool",
    ]


@pytest.mark.parametrize(("layout", "fits"), [(None, True), ("LBNHC", True), ("LBHNC", True), ("BLNHC", False)])
def test_a_layout_fits_if_a_block_of_a_layer_is_one_run(layout: str | None, *, fits: bool) -> None:
    """Another is refused by its name, with the variable that sets it."""
    problem = layout_problem(SimpleNamespace(kv_cache_layout=layout))
    assert (problem == "") == fits
    assert fits or (layout in problem and "VLLM_KV_CACHE_LAYOUT" in problem)


def test_a_vllm_without_named_layouts_has_one_that_fits() -> None:
    """So nothing is asked of it; nor on a CPU, where vLLM has one."""
    assert layout_problem(SimpleNamespace()) == ""
    assert wanted_layout("cpu") is None


class Mark(ABC):
    """As vLLM's ``SupportsHMA``."""

    @abstractmethod
    def request_finished_all_groups(self) -> None: ...


@dataclass
class Results:
    finished_sending: set[str]


@dataclass
class ResultsWithFailures(Results):
    failed_recving: set[str]


@pytest.mark.parametrize(
    ("base", "allowed"),
    [
        ({"SupportsHMA": Mark}, False),
        ({"SupportsHMA": Mark, "KVConnectorTransferResults": Results}, False),
        ({"SupportsHMA": Mark, "KVConnectorTransferResults": ResultsWithFailures}, True),
    ],
)
def test_groups_are_allowed_where_vllm_takes_a_request_back(
    monkeypatch: pytest.MonkeyPatch, base: dict[str, type], allowed: bool
) -> None:
    """Elsewhere vLLM goes on to make one group of all layers."""
    path = "vllm.distributed.kv_transfer.kv_connector.v1"
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    sys.modules[path].base = SimpleNamespace(**base)
    connector = type("Connector", (), {})
    assert allow_groups(connector) == allowed
    assert issubclass(connector, Mark) == allowed


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (scripts/test-vllm installs it)")
def test_vllm_knows_that_the_connector_takes_groups() -> None:
    """By the class that it asks for."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import supports_hma  # noqa: PLC0415 -- not installed everywhere

    assert supports_hma(kvbelt.vllm.KVBeltConnector) == (Version(version("vllm")).release >= (0, 30))
