"""Observations before a start: this machine, the files, the ports, the model."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from kvbelt import about
from kvbelt.errors import SettingsError, StartError
from kvbelt.ops.doctor import gpus
from kvbelt.ops.doctor.evidence import GpuSeen
from kvbelt.ops.doctor.nixl_measurement import NixlMeasurement
from kvbelt.ops.ports import PROXY_PORT, Ports, PortUse, bind_problem, seed_ports
from kvbelt.ops.processes import DeploymentSpec, cpu_cores, resolve_device, visible_gpus
from kvbelt.ops.start_checks import crowded, require_memory, weight_bytes
from kvbelt.ops.topology import Topology
from kvbelt.settings import BeltFile, load_belt_file
from kvbelt.wire.about import About

#: Loading NIXL may take many seconds on a cold disk; measuring takes less than one.
_PAIR_SECONDS = 90.0

RECEIVER_PORTS = ("pd_peer_init_port", "pd_peer_alloc_port", "pd_peer_liveness_port")

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class FileSeen:
    path: Path
    belt: BeltFile | None
    problem: str = ""  #: why it is unusable


@dataclass(frozen=True, slots=True)
class PortSeen:
    """A port of the planned deployment."""

    use: PortUse
    problem: str  #: why it cannot be bound; empty: it is free


@dataclass(frozen=True, slots=True)
class ModelSeen:
    """The size of a model's KV, from its config.json."""

    path: Path
    problem: str = ""
    bytes_per_token: int = 0
    context: int = 0


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether this machine holds the planned deployment, in the words of ``kvbelt up``'s own checks."""

    workers: int
    cores: int
    refused: str = ""  #: why kvbelt up would not start it
    short: str = ""  #: what it would warn of: memory
    crowded: str = ""  #: likewise: cores, or GPUs


@dataclass(frozen=True, slots=True)
class Preflight:
    """All observations."""

    here: About
    device: str  #: the device that ``auto`` selects here
    topology: Topology | None = None
    files: tuple[FileSeen, ...] = ()
    ports: tuple[PortSeen, ...] = ()
    model: ModelSeen | None = None
    measured: NixlMeasurement | None = None  #: None: not asked for, or NIXL is not installed
    gpus: tuple[GpuSeen, ...] | None = None
    max_model_len: int | None = None
    fit: Fit | None = None  #: None: no topology

    def sides(self) -> tuple[int, int]:
        """The planned numbers of prefill and decode workers."""
        if self.topology is not None:
            return self.topology.prefill, self.topology.decode
        roles = [file.belt.pd_role for file in self.files if file.belt is not None]
        return roles.count("sender"), roles.count("receiver")


@dataclass(frozen=True, slots=True)
class PreflightOptions:
    """What to observe."""

    topology: Topology | None = None
    files: Sequence[Path] = ()
    model: Path | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    port: int = PROXY_PORT
    measure: bool = True


async def inspect(options: PreflightOptions) -> Preflight:
    """Observe everything. Never raises."""
    device = resolve_device(options.device)
    files = tuple(_file(path) for path in options.files)
    measure = options.measure and "nixl" in about.versions()
    graphics, measured = await asyncio.gather(gpus.sample(1, 0.0), _measure(device) if measure else _nothing())
    return Preflight(
        here=about.of_this_process("doctor"),
        device=device,
        topology=options.topology,
        files=files,
        ports=tuple(_ports(options, files)),
        model=_model(options.model, options.dtype, device) if options.model is not None else None,
        measured=measured,
        gpus=graphics,
        max_model_len=options.max_model_len,
        fit=_fit(options, device) if options.topology is not None else None,
    )


async def _nothing() -> None:
    return None


def _file(path: Path) -> FileSeen:
    try:
        return FileSeen(path, load_belt_file(path))
    except SettingsError as error:
        return FileSeen(path, None, str(error))


def _ports(options: PreflightOptions, files: Sequence[FileSeen]) -> list[PortSeen]:
    uses: list[PortUse] = []
    if options.topology is not None:
        ports: Ports = seed_ports(options.topology, proxy=options.port)
        uses += ports.uses("127.0.0.1")
    for file in files:
        belt = file.belt
        if belt is None or belt.pd_role != "receiver" or belt.pd_peer_host is None:
            continue
        for key in RECEIVER_PORTS:
            given = getattr(belt, key)
            uses += [
                PortUse(port, f"{file.path}: {key}", key, belt.pd_peer_host)
                for port in (given if isinstance(given, list) else [given])
                if port is not None
            ]
    return [PortSeen(use, bind_problem(use.host, use.port) or "") for use in uses]


def _fit(options: PreflightOptions, device: str) -> Fit:
    assert options.topology is not None
    dtype = "float32" if options.dtype == "auto" and device == "cpu" else options.dtype
    spec = DeploymentSpec(options.topology, options.model or Path(), dtype=dtype, device=device)
    fit = Fit(options.topology.workers, cpu_cores(), crowded=crowded(spec) or "")
    weights = 0 if options.model is None else weight_bytes(options.model, dtype)
    try:
        return replace(fit, short=require_memory(spec, weights) or "")
    except StartError as error:
        return replace(fit, refused=str(error))


def _model(path: Path, dtype: str, device: str) -> ModelSeen:
    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config = raw.get("text_config", raw)
        heads = int(config["num_attention_heads"])
        head_dim = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        stored = str(config.get("dtype") or config.get("torch_dtype") or raw.get("torch_dtype") or "float32")
        if dtype == "auto":
            dtype = stored if device != "cpu" else "float32"
        size = _DTYPE_BYTES.get(dtype, 2)
        per_token = int(config["num_hidden_layers"]) * kv_heads * head_dim * 2 * size
        return ModelSeen(path, "", per_token, int(config.get("max_position_embeddings") or 0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        return ModelSeen(path, f"config.json does not describe its KV: {error!r}")


async def _measure(device: str) -> NixlMeasurement:
    """Measure with two processes in this environment."""
    ends = [device]
    if device == "cuda":
        count = len(visible_gpus())
        ends = ["cuda:0", "cuda:1"] if count > 1 else ["cuda:0"]
    command = [sys.executable, "-m", "kvbelt.ops.doctor.nixl_pair", *ends]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=dict(os.environ)
    )
    try:
        async with asyncio.timeout(_PAIR_SECONDS):
            out, err = await process.communicate()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        return NixlMeasurement(device=device, error=f"nothing was measured within {_PAIR_SECONDS:g} s")
    try:
        # NIXL may have printed something before.
        return msgspec.json.decode(out.strip().rpartition(b"\n")[2], type=NixlMeasurement)
    except msgspec.MsgspecError:
        said = err.decode(errors="replace").strip().splitlines() or ["no output"]
        return NixlMeasurement(
            device=device, error=f"the measuring process ended with status {process.returncode}: {said[-1]}"
        )
