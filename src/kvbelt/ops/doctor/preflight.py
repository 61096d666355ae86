"""Looks before a start: this machine, the files, the ports, the model."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kvbelt import about
from kvbelt.errors import SettingsError
from kvbelt.ops.doctor import gpus
from kvbelt.ops.doctor.evidence import GpuSeen
from kvbelt.ops.doctor.measured import Measured
from kvbelt.ops.ports import PROXY_PORT, Claim, Ports, problem, seed_ports
from kvbelt.ops.processes import resolve_device, visible_gpus
from kvbelt.ops.topology import Topology
from kvbelt.settings import BeltFile, load_belt_file
from kvbelt.wire.about import About

#: NIXL loads for some seconds where it is cold, and measures for less than one.
_PAIR_SECONDS = 90.0

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class FileSeen:
    """One worker's YAML file."""

    path: Path
    belt: BeltFile | None
    problem: str = ""  #: why it cannot be used


@dataclass(frozen=True, slots=True)
class PortSeen:
    """One port that will be needed."""

    claim: Claim
    problem: str  #: why nobody can listen there; empty: it is free


@dataclass(frozen=True, slots=True)
class ModelSeen:
    """What a model's config.json says of its KV."""

    path: Path
    problem: str = ""
    bytes_per_token: int = 0
    context: int = 0


@dataclass(frozen=True, slots=True)
class Before:
    """Everything."""

    here: About
    device: str  #: what ``auto`` means here
    topology: Topology | None = None
    files: tuple[FileSeen, ...] = ()
    ports: tuple[PortSeen, ...] = ()
    model: ModelSeen | None = None
    measured: Measured | None = None  #: None: not asked for
    gpus: tuple[GpuSeen, ...] | None = None
    max_model_len: int | None = None

    def sides(self) -> tuple[int, int]:
        """How many prefill and decode workers are meant."""
        if self.topology is not None:
            return self.topology.prefill, self.topology.decode
        roles = [file.belt.pd_role for file in self.files if file.belt is not None]
        return roles.count("sender"), roles.count("receiver")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be looked at."""

    topology: Topology | None = None
    files: Sequence[Path] = ()
    model: Path | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    port: int = PROXY_PORT
    measure: bool = True


async def look(wanted: Wanted) -> Before:
    """Everything. Never raises."""
    device = resolve_device(wanted.device)
    files = tuple(_file(path) for path in wanted.files)
    graphics, measured = await asyncio.gather(gpus.look(1, 0.0), _measure(device) if wanted.measure else _nothing())
    return Before(
        here=about.of_this_process("doctor"),
        device=device,
        topology=wanted.topology,
        files=files,
        ports=tuple(_ports(wanted, files)),
        model=_model(wanted.model, wanted.dtype, device) if wanted.model is not None else None,
        measured=measured,
        gpus=graphics,
        max_model_len=wanted.max_model_len,
    )


async def _nothing() -> None:
    return None


def _file(path: Path) -> FileSeen:
    try:
        return FileSeen(path, load_belt_file(path))
    except SettingsError as error:
        return FileSeen(path, None, str(error))


def _ports(wanted: Wanted, files: Sequence[FileSeen]) -> list[PortSeen]:
    claims: list[Claim] = []
    if wanted.topology is not None:
        ports: Ports = seed_ports(wanted.topology, proxy=wanted.port)
        claims += ports.claims("127.0.0.1")
    for file in files:
        belt = file.belt
        if belt is None or belt.pd_role != "receiver" or belt.pd_peer_host is None:
            continue
        for key in ("pd_peer_init_port", "pd_peer_alloc_port"):
            given = getattr(belt, key)
            claims += [
                Claim(port, f"{file.path}: {key}", key, belt.pd_peer_host)
                for port in (given if isinstance(given, list) else [given])
                if port is not None
            ]
    return [PortSeen(claim, problem(claim.host, claim.port) or "") for claim in claims]


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
        return ModelSeen(path, f"config.json says nothing of its KV: {error!r}")


async def _measure(device: str) -> Measured:
    """A pair of processes with this environment."""
    ends = [device]
    if device == "cuda":
        count = len(visible_gpus())
        ends = ["cuda:0", "cuda:1"] if count > 1 else ["cuda:0"]
    command = [sys.executable, "-m", "kvbelt.ops.doctor.pair", *ends]
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
        return Measured(device=device, error=f"nothing was measured within {_PAIR_SECONDS:g} s")
    try:
        # NIXL may have said something before.
        return msgspec.json.decode(out.strip().rpartition(b"\n")[2], type=Measured)
    except msgspec.MsgspecError:
        said = err.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        return Measured(
            device=device, error=f"the measuring process ended with status {process.returncode}: {said[-1]}"
        )
