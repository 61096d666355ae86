"""Every release of vLLM has the names that the connector uses, and calls its hooks as it answers them.

``releases.json`` has what each release's source says (tools/vllm_releases.py). vLLM itself is not imported.
"""

import ast
import importlib.metadata
import importlib.util
import json
from pathlib import Path

import pytest
from packaging.version import Version
from tools.vllm_names import parameters_of, relied_on
from tools.vllm_releases import FACTS, PACKAGES, Facts, as_history, from_history, in_folder, read_all

from kvbelt.vllm.versions import NEWEST, OLDEST, OPTIONAL_HOOKS, hook_problems

KNOWN = json.loads(FACTS.read_text())
RELEASES = from_history(KNOWN["facts"], KNOWN["releases"])


def problems(facts: Facts) -> list[str]:
    """What the connector uses of vLLM and this release has not, or has in another form."""
    relied = relied_on()
    found = [f"{name} has gone" for name in sorted(relied.names - facts.keys())]
    ours = {name: parameters_of(function) for name, function in relied.hooks.items()}
    theirs = {
        name.removeprefix("KVConnectorBase_V1."): tuple(filter(None, takes.split(", ")))
        for name, takes in facts.items()
        if name.startswith("KVConnectorBase_V1.")
    }
    found += hook_problems(ours, theirs)
    found += [f"{name} is abstract" for name in theirs if f"abstract {name}" in facts and name not in ours]
    for name, function in relied.hooks.items():
        if name == "__init__" or name in OPTIONAL_HOOKS - theirs.keys():
            continue
        callers = callers_of(name, facts)
        if not callers:
            found.append(f"nobody calls {name}")
        if "runner" in callers and "runner-v2" not in callers:
            found.append(f"Model Runner V2 does not call {name}")
        found += [
            f"{name} is called as {call}"
            for call in facts.get(f"calls {name}", "").split("; ")
            if call and not takes(function, call.split()[1:])
        ]
    return found


def callers_of(hook: str, facts: Facts) -> set[str]:
    """Who calls a hook: itself, or by another one that the base class answers with it."""
    found = set()
    for call in filter(None, facts.get(f"calls {hook}", "").split("; ")):
        who, _, through = call.split()[0].partition(".")
        found |= callers_of(through, facts) if through else {who}
    return found


def takes(function: ast.FunctionDef, call: list[str]) -> bool:
    """Whether a call with ``1 name=``, one argument by position and one by name, fits."""
    given, names = call[0], [each.removesuffix("=") for each in call[1:]]
    arguments = function.args
    known = [each.arg for each in arguments.args][1:]
    by_name = arguments.kwarg is not None or all(each in known for each in names)
    if arguments.vararg is not None or given == "*":
        return by_name
    needed = len(known) - len(arguments.defaults)
    return by_name and needed <= int(given) + sum(each in known for each in names) and int(given) <= len(known)


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_keeps_the_contract(release: str) -> None:
    """It has every name, hook and caller."""
    assert problems(RELEASES[release]) == []


def test_every_release_that_is_taken_is_known() -> None:
    """From the oldest to the newest, each minor one."""
    first, last = (Version(each).minor for each in (OLDEST, NEWEST))
    assert {Version(each).minor for each in RELEASES} == set(range(first, last + 1))
    assert list(PACKAGES) == KNOWN["releases"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("Request.cache_salt", None, "Request.cache_salt has gone"),
        ("KVConnectorBase_V1.get_finished", None, "it has no get_finished"),
        ("KVConnectorBase_V1.on_new_request", "request, more", "on_new_request is given request, more, not request"),
        ("abstract take_events", "", "take_events is abstract"),
        ("calls on_new_request", None, "nobody calls on_new_request"),
        ("calls bind_kv_cache_manager", None, "nobody calls bind_gpu_block_pool"),
        ("calls wait_for_save", "runner 0", "Model Runner V2 does not call wait_for_save"),
        ("calls request_finished", "scheduler 3", "request_finished is called as scheduler 3"),
        ("calls reset_cache", "scheduler 0 hard=", "reset_cache is called as scheduler 0 hard="),
    ],
)
def test_a_change_is_found(name: str, value: str | None, said: str) -> None:
    """A field, a hook, a signature or a call that is not as the connector has it."""
    changed = {key: kept for key, kept in RELEASES[KNOWN["releases"][-1]].items() if key != name}
    assert problems(changed | ({} if value is None else {name: value})) == [said]


def test_the_installed_vllm_keeps_the_contract() -> None:
    """Whichever release it is; a known one is as it is known."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed (scripts/test-vllm installs it)")
    facts = in_folder(Path(found.origin).parent)
    assert problems(facts) == []
    version = Version(importlib.metadata.version("vllm")).base_version
    assert facts == RELEASES.get(version, facts)


@pytest.mark.long
def test_the_wheels_are_as_they_are_known() -> None:
    """Every release, downloaded anew (1.5 GB, a minute or two)."""
    assert as_history(read_all(None)) == KNOWN["facts"]
