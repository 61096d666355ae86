"""Which vLLM the connector runs in, and what that vLLM has. Where releases differ, this module asks vLLM.

A vLLM is judged by its hooks, here, and by its KV memory, in ``proof``. A newer release than those that were tried
only adds a warning.
"""

import inspect
import logging
from collections.abc import Mapping
from enum import Enum
from importlib.util import find_spec
from typing import Any

from packaging.version import InvalidVersion, Version

from kvbelt.errors import StartError

log = logging.getLogger("kvbelt.vllm")

#: The connector is tried with these releases and with all between them (docs/vllm.md).
OLDEST, NEWEST = "0.26", "0.33"

#: Hooks that vLLM calls only if it has them.
OPTIONAL_HOOKS = frozenset({"get_required_kvcache_layout", "get_transfer_results", "request_finished_all_groups"})


class Age(Enum):
    """A vLLM beside the tried ones."""

    OLDER = "older"
    TRIED = "tried"
    NEWER = "newer"


def age_of(version: str) -> Age:
    """A version that is no number, as of vLLM built from a checkout without tags, counts as newer."""
    try:
        release = Version(version).release[:2]
    except InvalidVersion:
        return Age.NEWER
    if release < Version(OLDEST).release:
        return Age.OLDER
    return Age.TRIED if release <= Version(NEWEST).release else Age.NEWER


def load_connector() -> Any:
    """The connector's class, in a process of vLLM.

    Raises:
        StartError: this vLLM is too old, or has other hooks than those that the connector answers.
    """
    import vllm  # noqa: PLC0415 -- takes seconds, and is not installed everywhere

    version = str(vllm.__version__)
    if age_of(version) is Age.OLDER:
        raise StartError(f"vLLM is {version}; kvbelt runs with {OLDEST} and newer: pip install 'vllm=={NEWEST}.*'")
    try:
        from kvbelt.vllm.connector import KVBeltConnector  # noqa: PLC0415 -- imports what an old vLLM lacks
    except ImportError as error:
        raise StartError(f"vLLM {version} has not what kvbelt uses of it: {error}; {_TAKE_A_TRIED_ONE}") from error
    problems = hook_problems(hooks_of(KVBeltConnector), hooks_of(KVBeltConnector.__base__, inherited=True))
    if missing := sorted(KVBeltConnector.__abstractmethods__):
        problems.append(f"{', '.join(missing)} must be answered, and kvbelt does not know how")
    if problems:
        raise StartError(
            f"vLLM {version} calls its connectors in another way: {'; '.join(problems)}. {_TAKE_A_TRIED_ONE}"
        )
    if age_of(version) is Age.NEWER:
        log.warning("vLLM %s has not been tried with this kvbelt, which knows %s to %s", version, OLDEST, NEWEST)
    allow_groups(KVBeltConnector)
    return KVBeltConnector


_TAKE_A_TRIED_ONE = f"use a newer kvbelt, or vLLM {OLDEST} to {NEWEST}"


def hooks_of(connector: type, *, inherited: bool = False) -> dict[str, tuple[str, ...]]:
    """The public methods of a class, each with the names of its parameters; ``*`` is any number of them."""
    found = {}
    for name in dir(connector) if inherited else vars(connector):
        method = getattr(connector, name)
        if inspect.isroutine(method) and (name == "__init__" or not name.startswith("_")):
            taken = inspect.signature(method).parameters.values()
            names = ["*" if one.kind is one.VAR_POSITIONAL else one.name for one in taken]
            found[name] = tuple(each for each in names if each != "self")
    return found


def hook_problems(ours: Mapping[str, tuple[str, ...]], theirs: Mapping[str, tuple[str, ...]]) -> list[str]:
    """What keeps a connector with our hooks from a vLLM with theirs; each is a hook that was renamed or changed."""
    problems = []
    for name, takes in ours.items():
        if name not in theirs:
            if name not in OPTIONAL_HOOKS:
                problems.append(f"it has no {name}")
        elif takes not in (theirs[name], ("*",)):
            problems.append(f"{name} is given {', '.join(theirs[name])}, not {', '.join(takes)}")
    return problems


def wanted_layout(device: str) -> str | None:
    """The KV layout to ask vLLM for; None: leave it to vLLM.

    The belt moves a block of one layer as one run of bytes. Before its layouts had names vLLM had no other, and on a
    CPU it has only one.
    """
    return None if device == "cpu" or find_spec("vllm.v1.kv_cache_layout") is None else "LBNHC"


def layout_problem(kv_cache_config: Any) -> str:
    """Why blocks cannot be moved in the layout that vLLM has chosen; empty if they can, or if it has no name.

    A name has the dimensions from the outermost in: layers, blocks, heads, tokens and content.
    """
    layout = getattr(kv_cache_config, "kv_cache_layout", None)
    if layout is None or layout.startswith("LB"):
        return ""
    return (
        f"vLLM's KV cache layout is {layout}, in which a block of one layer is not one run of bytes: "
        "unset VLLM_KV_CACHE_LAYOUT, or set it to LBNHC or LBHNC"
    )


def allow_groups(connector: type) -> bool:
    """Tell vLLM that the connector takes several groups of layers.

    Not before 0.30: it could not take back a request with several groups whose KV did not come. Without our word such a
    vLLM makes one group of all layers, or refuses the model.
    """
    try:
        from vllm.distributed.kv_transfer.kv_connector.v1 import base  # noqa: PLC0415 -- takes seconds, as above

        results, mark = base.KVConnectorTransferResults, base.SupportsHMA
    except (ImportError, AttributeError):
        return False
    if "failed_recving" not in results.__annotations__:
        return False
    mark.register(connector)
    return True


def transfer_results(sent: set[str], loaded: set[str], failed: set[str]) -> Any:
    """What a worker's loads and sends came to, as vLLM asks for it since 0.30."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults  # noqa: PLC0415 -- likewise

    return KVConnectorTransferResults(finished_sending=sent, finished_recving=loaded, failed_recving=failed)


def hit_source(*, receives: bool, keeps: bool) -> Any:
    """What vLLM's metrics call the source of loaded tokens; None in a vLLM that does not ask.

    ``receives``: over the belt. ``keeps``: in host memory.
    """
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource  # noqa: PLC0415 -- since 0.32
    except ImportError:
        return None
    if receives and keeps:
        return CacheHitSource.EXTERNAL_UNSPECIFIED
    return CacheHitSource.P2P if receives else CacheHitSource.HOST
