"""Servers that must not start, from vLLM's settings."""

from types import SimpleNamespace

import pytest

from kvbelt.vllm.groups import ONE_GROUP, Groups
from kvbelt.vllm.refusals import drafts_problem, engines_problem, is_alone, policy_problem, stages_problem


def parallel(*, size: int = 1, index: int = 0, external: bool = False) -> SimpleNamespace:
    """What is read of a ``ParallelConfig``."""
    return SimpleNamespace(data_parallel_size=size, data_parallel_index=index, data_parallel_external_lb=external)


@pytest.mark.parametrize(
    ("settings", "engine_id"),
    [
        (parallel(size=2), "e_dp0"),  # a model with experts
        (parallel(), "e_dp0"),  # any other one: vLLM resets the size before the connector is made
        (parallel(index=1), "e_dp1"),
    ],
)
def test_several_engines_behind_one_port_are_refused(settings: SimpleNamespace, engine_id: str) -> None:
    """The proxy's two calls would reach different ones."""
    problem = engines_problem(settings, engine_id)
    assert problem is not None
    assert "start each engine as a server of its own" in problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("settings", "engine_id"),
    [(parallel(), "e"), (parallel(), None), (parallel(size=2, index=1, external=True), "e_dp1")],
)
def test_one_engine_behind_each_port_is_fine(settings: SimpleNamespace, engine_id: str | None) -> None:
    """Data parallelism with a balancer outside has one, too."""
    assert engines_problem(settings, engine_id) is None


def transfer(connector: str, policy: str = "fail") -> SimpleNamespace:
    """What is read of a ``KVTransferConfig``; vLLM's default policy is ``fail``."""
    return SimpleNamespace(kv_connector=connector, kv_load_failure_policy=policy)


@pytest.mark.parametrize(("outer", "alone"), [("KVBeltConnector", True), ("MultiConnector", False), (None, True)])
def test_a_multi_connector_is_seen(outer: str | None, alone: bool) -> None:
    """What is loaded before a step would be stored by the others before its failure is known."""
    assert is_alone(transfer("KVBeltConnector"), transfer(outer) if outer else None) is alone


def test_inside_a_multi_connector_the_outer_policy_must_recompute() -> None:
    """The setting to add, and where."""
    problem = policy_problem(transfer("KVBeltConnector"), transfer("MultiConnector"))
    assert problem is not None
    assert 'add "kv_load_failure_policy": "recompute"' in problem
    assert 'beside "kv_connector": "MultiConnector"' in problem
    assert policy_problem(transfer("KVBeltConnector"), transfer("MultiConnector", "recompute")) is None


def test_alone_the_connector_sets_the_policy_itself() -> None:
    own = transfer("KVBeltConnector")
    assert policy_problem(own, own) is None
    assert policy_problem(own, None) is None


def test_a_pipeline_of_several_kinds_of_kv_is_refused() -> None:
    """A stage has layers of some kinds only. With one kind any number of stages is fine."""
    problem = stages_problem(2, Groups((0, 1), (64,)))
    assert problem is not None
    assert "pipeline_parallel_size is 2" in problem
    assert stages_problem(1, Groups((0, 1), (64,))) is None
    assert stages_problem(4, ONE_GROUP) is None


def test_other_ways_of_drafting_are_refused() -> None:
    """The error names the method, and those that would do."""
    assert drafts_problem(None) is None
    for method in ("ngram", "draft_model", "eagle3", "mtp"):
        assert drafts_problem(SimpleNamespace(method=method)) is None
    problem = drafts_problem(SimpleNamespace(method="extract_hidden_states"))
    assert problem is not None
    assert "method extract_hidden_states" in problem
    assert "eagle3, medusa, mtp, ngram" in problem
