"""The names of vLLM that the connector uses, found in the connector's own source."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CONNECTOR = Path(__file__).parents[1] / "src/kvbelt/vllm"

#: The modules that see vLLM's objects.
MODULES = (
    "connector", "pipeline", "prompts", "rank", "chunk_limit", "prometheus", "plugin", "refusals", "groups",
    "answer_defaults",
)  # fmt: skip

BASE = "distributed/kv_transfer/kv_connector/v1/base.py"
_METRICS = "distributed/kv_transfer/kv_connector/v1/metrics.py"
_KV = "v1/kv_cache_interface.py"
_STEP = "v1/core/sched/output.py"

#: Where vLLM defines the classes of these objects.
FILES = {
    "KVConnectorBase_V1": BASE,
    "KVConnectorStats": _METRICS,
    "KVConnectorPromMetrics": _METRICS,
    "KVConnectorFactory": "distributed/kv_transfer/kv_connector/factory.py",
    "Request": "v1/request.py",
    "SamplingParams": "sampling_params.py",
    "SchedulerOutput": _STEP,
    "NewRequestData": _STEP,
    "CachedRequestData": _STEP,
    "KVConnectorOutput": "v1/outputs.py",
    "KVCacheBlocks": "v1/core/kv_cache_manager.py",
    "BlockPool": "v1/core/block_pool.py",
    "KVCacheBlock": "v1/core/kv_cache_utils.py",
    "KVCacheConfig": _KV,
    "KVCacheGroupSpec": _KV,
    "KVCacheSpec": _KV,
    "SlidingWindowSpec": _KV,
    "SupportsHMA": BASE,
    "VllmConfig": "config/vllm.py",
    "ModelConfig": "config/model.py",
    "ParallelConfig": "config/parallel.py",
    "SchedulerConfig": "config/scheduler.py",
    "CacheConfig": "config/cache.py",
    "DeviceConfig": "config/device.py",
    "LoadConfig": "config/load.py",
    "KVTransferConfig": "config/kv_transfer.py",
    "CompilationConfig": "config/compilation.py",
}

#: What the connector calls vLLM's objects: variables, and fields of other objects.
_CALLED = {
    "request": "Request",
    "sampling_params": "SamplingParams",
    "scheduler_output": "SchedulerOutput",
    "output": "SchedulerOutput",
    "new": "NewRequestData",
    "cached": "CachedRequestData",
    "connector_output": "KVConnectorOutput",
    "gpu_block_pool": "BlockPool",
    "kv_cache_config": "KVCacheConfig",
    "_kv_cache_config": "KVCacheConfig",
    "kv_cache_groups": "KVCacheGroupSpec",
    "group": "KVCacheGroupSpec",
    "kv_cache_spec": "KVCacheSpec",
    "spec": "KVCacheSpec",
    "sliding": "SlidingWindowSpec",
    "vllm_config": "VllmConfig",
    "_vllm_config": "VllmConfig",
    "model": "ModelConfig",
    "model_config": "ModelConfig",
    "parallel_config": "ParallelConfig",
    "config": "SchedulerConfig",
    "scheduler_config": "SchedulerConfig",
    "cache_config": "CacheConfig",
    "device_config": "DeviceConfig",
    "load_config": "LoadConfig",
    "transfer": "KVTransferConfig",
    "kv_transfer_config": "KVTransferConfig",
    "compilation_config": "CompilationConfig",
    "KVConnectorFactory": "KVConnectorFactory",
}


#: Of a class that the connector is registered with, and does not derive from.
_REGISTERED = ("SupportsHMA.request_finished_all_groups",)


@dataclass(frozen=True)
class Relied:
    """What the connector uses: ``Class.member`` and ``module/.name``, and where each class or module is."""

    names: frozenset[str]
    hooks: dict[str, ast.FunctionDef]  #: methods that it overrides, and ``__init__``
    files: dict[str, str]


@cache
def relied_on() -> Relied:
    names: set[str] = set(_REGISTERED)
    files = dict(FILES)
    hooks: dict[str, ast.FunctionDef] = {}
    for module in MODULES:
        tree = ast.parse((CONNECTOR / f"{module}.py").read_text())
        names |= {f"{owner}.{member}" for owner, member in _reads(tree)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                path = (node.module or "").removeprefix("vllm.").replace(".", "/")
                for each in node.names:
                    files[f"{path}/"] = f"{path}.py" if path != "distributed" else "distributed/parallel_state.py"
                    names.add(f"{path}/.{each.name}")
            elif isinstance(node, ast.ClassDef) and node.name == "KVBeltConnector":
                hooks = hooks_in(tree, node.name)
    return Relied(frozenset(names), hooks, files)


def hooks_in(tree: ast.Module, owner: str) -> dict[str, ast.FunctionDef]:
    """Its public methods and ``__init__``, without properties."""
    return {
        name: member
        for name, member in members_of(tree, owner).items()
        if isinstance(member, ast.FunctionDef)
        and (name == "__init__" or not name.startswith("_"))
        and "property" not in decorators_of(member)
    }


def decorators_of(function: ast.FunctionDef) -> set[str]:
    return {ast.unparse(each) for each in function.decorator_list}


def _reads(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (owner := _class_of(node.value)) is not None:
            yield owner, node.attr
        elif isinstance(node, ast.ClassDef):
            bases = [ast.unparse(each) for each in node.bases if ast.unparse(each) in FILES]
            own = members_of(tree, node.name)
            for read in ast.walk(node):
                if isinstance(read, ast.Attribute) and ast.unparse(read.value) == "self" and read.attr not in own:
                    yield from ((base, read.attr) for base in bases)


def _class_of(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return "KVCacheBlocks" if node.id == "blocks" else _CALLED.get(node.id)
    if isinstance(node, ast.Subscript):
        # The only list of vLLM's that is indexed by id is the pool's.
        return "KVCacheBlock" if ast.unparse(node.value).endswith("pool.blocks") else _class_of(node.value)
    if isinstance(node, ast.Attribute) and (_class_of(node.value) is not None or ast.unparse(node.value) == "self"):
        return _CALLED.get(node.attr)
    return None


def members_of(tree: ast.Module, owner: str) -> dict[str, ast.AST]:
    """Fields, methods and ``self.name = …`` of a class and its bases in the same file; without a class, a module's."""
    if not owner:
        return {name: node for node in tree.body for name in _defined(node)}
    found: dict[str, ast.AST] = {}
    for each in tree.body:
        if isinstance(each, ast.ClassDef) and each.name == owner:
            for base in each.bases:
                found |= members_of(tree, ast.unparse(base).partition("[")[0])
            for node in ast.walk(each):
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.ctx, ast.Store)
                    and ast.unparse(node.value) == "self"
                ):
                    found[node.attr] = node
            found |= {name: node for node in each.body for name in _defined(node)}
    return found


def _defined(node: ast.stmt) -> Iterator[str]:
    match node:
        case ast.ClassDef() | ast.FunctionDef():
            yield node.name
        case ast.ImportFrom() | ast.Import():
            yield from (each.asname or each.name for each in node.names)
        case ast.Assign():
            yield from (ast.unparse(each) for each in node.targets)
        case ast.AnnAssign():
            yield ast.unparse(node.target)


def parameters_of(function: ast.FunctionDef) -> tuple[str, ...]:
    """As ``kvbelt.vllm.versions.hooks_of`` has them."""
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args) if each.arg not in ("self", "cls")]
    names += ["*"] * (given.vararg is not None) + [each.arg for each in given.kwonlyargs]
    return (*names, *([given.kwarg.arg] if given.kwarg else []))
