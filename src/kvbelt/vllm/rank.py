"""What one rank's process has, built once vLLM has allocated its KV memory."""

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kvbelt import about
from kvbelt.belt_facts import view_of, with_belt
from kvbelt.belt_setup import BeltOptions, channel_for, make_belt
from kvbelt.errors import StartError
from kvbelt.security.keys import new_engine_id
from kvbelt.transfer.belt import Belt
from kvbelt.transfer.settings import BeltIdentity
from kvbelt.vllm import drafter
from kvbelt.vllm.background import Background
from kvbelt.vllm.compute import CpuCompute, CudaCompute
from kvbelt.vllm.figures import REPORT_SECONDS, Figure, families_of, figures_of
from kvbelt.vllm.groups import Groups
from kvbelt.vllm.held_prefixes import HeldPrefixes
from kvbelt.vllm.host_memory import host_memory
from kvbelt.vllm.host_worker import HostWorker
from kvbelt.vllm.identity import Rank, RankIdentity, kv_heads_of, model_fingerprint
from kvbelt.vllm.pages import Pages, pages_of, with_drafter
from kvbelt.vllm.proof import prove
from kvbelt.vllm.worker_side import WorkerSide
from kvbelt.wire.layout import KVLayout

log = logging.getLogger("kvbelt.vllm")


@dataclass(frozen=True, slots=True)
class RankProcess:
    """A running belt over vLLM's KV memory, and what drives it."""

    worker: WorkerSide
    layer_of: dict[str, int]  #: vLLM's name of a layer to its row in a block
    group_of: dict[str, int]  #: and to its group
    identity: RankIdentity
    source: str  #: of its figures
    figures: Background[list[Figure]]
    belt: Belt
    compute: CpuCompute | CudaCompute

    def close(self) -> None:
        self.figures.close()
        self.belt.close()
        self.worker.close()
        self.compute.close()


def start_rank(  # noqa: PLR0917 -- what vLLM knows, and what we do
    vllm_config: Any,
    kv_cache_config: Any,
    kv_caches: dict[str, torch.Tensor],
    settings: BeltOptions,
    model_name: str,
    rank: Rank,
    groups: Groups,
) -> RankProcess:
    """Start the belt of this rank.

    Raises:
        StartError: a port is taken, or the memory cannot be moved as it is.
        SettingsError: the staging buffer is too small.
    """
    spec = groups.lead(kv_cache_config.kv_cache_groups).kv_cache_spec
    group_of = {
        layer: number for number, group in enumerate(kv_cache_config.kv_cache_groups) for layer in group.layer_names
    }
    model, speculative = vllm_config.model_config, vllm_config.speculative_config
    of_model, of_drafter = drafter.parted(kv_caches, vllm_config)
    name, first = next(iter(of_model.items()))
    spec = getattr(spec, "kv_cache_specs", {}).get(name, spec)  # of layers of unequal size each has one
    num_blocks, num_kv_heads = kv_cache_config.num_blocks, getattr(spec, "num_kv_heads", 1)
    pages = pages_of(of_model, num_blocks, spec.page_size_bytes, _backend(vllm_config, name), num_kv_heads)
    if of_drafter:
        pages = with_drafter(pages, of_drafter, num_blocks, _backend(vllm_config, min(of_drafter)), num_kv_heads)
    with torch.inference_mode():  # so that the memory may be written, however vLLM has allocated it
        prove(kv_caches, pages)
    layout = KVLayout(
        num_layers=len(pages.rows),
        num_kv_heads=num_kv_heads,
        head_dim=getattr(spec, "head_size", 0),
        block_size=spec.block_size,
        dtype=str(first.dtype).removeprefix("torch."),
        order=pages.order,
        block_bytes=spec.page_size_bytes,
        windows=groups.windows,
        head_runs=pages.head_runs,
        tokens_outside=pages.tokens_outside,
        draft_layers=pages.draft_layers,
        drafter=_drafter(vllm_config, pages),
    )
    weights = model_fingerprint(
        model.model,
        model.revision,
        str(vllm_config.load_config.load_format),
        {"quantization": model.quantization, "dtype": model.dtype},
    )
    engine_id = new_engine_id(settings.keys)
    device, held = first.device, HeldPrefixes(unused=int(drafter.drops_a_block(speculative)))
    channel = channel_for(settings, engine_id, device)
    kv_heads = kv_heads_of(layout.num_kv_heads, rank.size, 1 if model.use_mla else model.get_total_num_kv_heads())
    if rank.model_layers and len(pages.rows) != rank.num_layers:
        raise StartError(
            f"pipeline stage {rank.stage} has {rank.num_layers} layers and KV of {len(pages.rows)}; in a pipeline each "
            "must have KV of its own: leave out --pipeline-parallel-size"
        )
    who = BeltIdentity(
        engine_id,
        settings.role,
        model_name,
        weights,
        layout,
        rank.number,
        rank.size,
        kv_heads,
        model_layers=rank.model_layers,
        stages=rank.stages,
        stage=rank.stage,
    )
    belt = make_belt(settings, who, channel, pages.rows, held)
    belt.start()
    host = None
    if settings.host_bytes:
        host = HostWorker(host_memory(pages.rows, settings.host_bytes // rank.count))
    compute = CudaCompute(device) if device.type == "cuda" else CpuCompute()
    views = Background(partial(view_of, belt, channel))
    facts = about.of_this_process(settings.role, "vllm", device=str(device))
    identity = RankIdentity(
        engine_id,
        belt.receiver_address(),
        host.num_places if host is not None else 0,
        with_belt(facts, belt, channel, settings.buffer_device, settings.buffer_bytes),
    )
    log.info(
        "the belt runs as %s, %s: %s, %s, staging %d bytes",
        settings.role,
        rank,
        engine_id,
        identity.receiver,
        settings.buffer_bytes,
    )
    return RankProcess(
        WorkerSide(belt, compute, host, held, views, pages.sharing(group_of)),
        pages.layer_of,
        group_of,
        identity,
        f"rank {who.rank}",
        Background(lambda: figures_of(families_of(belt, channel)), REPORT_SECONDS),
        belt,
        compute,
    )


def without_belt(settings: BeltOptions, device: str) -> RankIdentity:
    """Of a server whose KV stays where it is."""
    facts = about.of_this_process(settings.role, "vllm", device=device)
    return RankIdentity(new_engine_id(settings.keys), None, 0, facts)


def _backend(vllm_config: Any, layer_name: str) -> str:
    layer = vllm_config.compilation_config.static_forward_context.get(layer_name)
    backend = getattr(layer, "attn_backend", None)
    return str(backend.get_name()) if backend is not None else "unknown"


def _drafter(vllm_config: Any, pages: Pages) -> str:
    if not pages.draft_layers:
        return ""
    load_format = str(vllm_config.load_config.load_format)
    return f"{drafter.fingerprint_of(vllm_config.speculative_config, load_format)} {pages.draft_order}"
