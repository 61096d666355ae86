"""Settings around the connector that would make answers wrong or late without a sign, and so end the start. Pure."""

import re
from typing import Any

from kvbelt.vllm import drafter
from kvbelt.vllm.groups import Groups

#: What vLLM adds to the engine id of each data-parallel rank. For models without experts it forgets all else.
_RANK_OF_SEVERAL = re.compile(r"_dp\d+$")


def engines_problem(parallel_config: Any, engine_id: str | None) -> str | None:
    """Why a server with these settings has several engines behind one port; None: it has one.

    Args:
        parallel_config: vLLM's.
        engine_id: of vLLM's ``KVTransferConfig``.
    """
    size = parallel_config.data_parallel_size
    several = size > 1 or parallel_config.data_parallel_index > 0 or _RANK_OF_SEVERAL.search(engine_id or "")
    if not several or parallel_config.data_parallel_external_lb:
        return None
    told = f"data_parallel_size is {size}" if size > 1 else "--data-parallel-size is more than 1"
    return (
        f"{told}, so one server has several engines, and a request may reach another one than its KV; start each "
        "engine as a server of its own (without --data-parallel-size, or with --data-parallel-rank) and give all of "
        "them to the proxy"
    )


def is_alone(transfer: Any, kv_transfer_config: Any | None) -> bool:
    """Whether the connector is the server's only one; else it stands in a ``MultiConnector``.

    Args:
        transfer: the connector's ``KVTransferConfig``.
        kv_transfer_config: the server's; None: not known.
    """
    return kv_transfer_config is None or kv_transfer_config.kv_connector == transfer.kv_connector


def policy_problem(transfer: Any, kv_transfer_config: Any | None) -> str | None:
    """Why KV that does not come would fail its request; None: the prompt is computed instead.

    vLLM reads the policy of the outer configuration, which a connector inside ``MultiConnector`` cannot set.

    The arguments are those of ``is_alone``.
    """
    if kv_transfer_config is None or is_alone(transfer, kv_transfer_config):
        return None
    name, policy = kv_transfer_config.kv_connector, kv_transfer_config.kv_load_failure_policy
    if policy == "recompute":
        return None
    return (
        f"kv_load_failure_policy is {policy!r} for {name}, so that KV which does "
        'not come would fail its request; add "kv_load_failure_policy": "recompute" to the outer --kv-transfer-config, '
        f'beside "kv_connector": "{name}"'
    )


def stages_problem(stages: int, groups: Groups) -> str | None:
    """Why a pipeline of so many stages cannot be served: each must have the same kinds of layers."""
    if stages == 1 or not (groups.several or groups.problem):
        return None
    return (
        f"pipeline_parallel_size is {stages}, and this model has more than one kind of KV cache, which stages cannot "
        "send: leave out --pipeline-parallel-size, or add --disable-hybrid-kv-cache-manager, which may make one kind"
    )


def store_problem(groups: Groups, host_bytes: int) -> str | None:
    """Host memory keeps blocks of which each holds all layers."""
    if not host_bytes or not (groups.several or groups.problem):
        return None
    return (
        "local_cpu is on, and this model has more than one kind of KV cache, which host memory cannot keep: leave "
        "local_cpu out, or add --disable-hybrid-kv-cache-manager, which may make one of them"
    )


def drafts_problem(speculative: Any) -> str | None:
    """Of vLLM's ``SpeculativeConfig``, if there is one: other methods may keep what is no KV in the KV cache."""
    known = drafter.WITH_KV | drafter.WITHOUT_KV
    if speculative is None or speculative.method in known:
        return None
    return (
        f"speculative_config has the method {speculative.method}, which the connector does not know: use one of "
        f"{', '.join(sorted(known))}, or leave it out"
    )
