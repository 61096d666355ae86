"""``KVBeltConnector``: what vLLM calls, passed on to the side that knows.

vLLM makes one instance in its scheduler's process and one in each worker's. The order of its calls on a worker:
bind_connector_metadata, then for each layer wait_for_layer_load and save_kv_layer, wait_for_save, get_finished,
get_block_ids_with_load_errors, build_connector_worker_meta. When start_load_kv comes differs by version, so nothing
depends on it.
"""

import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import msgspec
import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)

import vllm
from kvbelt.errors import StartError
from kvbelt.security.keys import new_engine_id
from kvbelt.transfer.belt import Belt
from kvbelt.vllm.about import BeltLook, Looks, about_rank, about_server, look_at
from kvbelt.vllm.belt_setup import Rank, channel_for, families_of, make_belt, model_fingerprint
from kvbelt.vllm.compute import CpuCompute, CudaCompute
from kvbelt.vllm.figures import BeltWatch, figures_of, host_families
from kvbelt.vllm.held_prefixes import HeldPrefixes, PrefixLedger
from kvbelt.vllm.host_memory import host_memory
from kvbelt.vllm.host_scheduler import HostScheduler
from kvbelt.vllm.host_worker import HostWorker
from kvbelt.vllm.identity import RankIdentity, together
from kvbelt.vllm.orders import News, Orders, ScheduledPrompt
from kvbelt.vllm.pages import Pages, pages_of
from kvbelt.vllm.prometheus import BeltProm, BeltStats
from kvbelt.vllm.scheduler_side import PromptTokens, SchedulerSide
from kvbelt.vllm.settings import ConnectorSettings, load_settings
from kvbelt.vllm.versions import require_supported
from kvbelt.vllm.worker_side import WorkerSide
from kvbelt.wire.ids import EngineId
from kvbelt.wire.layout import KVLayout

require_supported(vllm.__version__)

log = logging.getLogger("kvbelt.vllm")

#: Of this process. With one tensor-parallel rank vLLM's scheduler lives in the worker's, on the same thread.
_WORKERS: WeakValueDictionary[EngineId, WorkerSide] = WeakValueDictionary()


@dataclass(frozen=True)
class StepMetadata(KVConnectorMetadata):
    """To the workers, with a step."""

    orders: Orders


@dataclass(frozen=True)
class StepNews(KVConnectorWorkerMetadata):
    """From a worker, with a step's output."""

    news: News

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "StepNews":
        """Of several ranks."""
        assert isinstance(other, StepNews)
        return StepNews(self.news.plus(other.news))


@dataclass(frozen=True)
class WhoIAm(KVConnectorHandshakeMetadata):
    """From a worker to the scheduler's side, once, when its belt runs."""

    identity: RankIdentity


class KVBeltConnector(KVConnectorBase_V1):
    """Sends the KV of prompts to decode servers, and takes it from prefill servers, over the belt."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _log_like_vllm()
        transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
        if parallel.pipeline_parallel_size != 1:
            raise StartError(
                f"pipeline_parallel_size is {parallel.pipeline_parallel_size}; KVBeltConnector runs with 1 for now"
            )
        if vllm_config.speculative_config is not None:
            raise StartError("speculative decoding with KVBeltConnector has not been tried; leave it out")
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise StartError(
                f"this model has {len(kv_cache_config.kv_cache_groups)} kinds of KV cache; KVBeltConnector moves one "
                "(--disable-hybrid-kv-cache-manager may make one of them)"
            )
        device = vllm_config.device_config.device_type
        self._num_ranks: int = parallel.tensor_parallel_size
        self._settings: ConnectorSettings = load_settings(
            transfer.kv_role, transfer.kv_connector_extra_config, device, num_ranks=self._num_ranks
        )
        self._block_size: int = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._belt: Belt | None = None
        self._compute: CpuCompute | CudaCompute | None = None
        self._pages: Pages | None = None
        self._who: RankIdentity | None = None  # the worker's own; the scheduler's is of all ranks together
        self._watch: BeltWatch | None = None
        self._source = "scheduler"
        if role is KVConnectorRole.SCHEDULER:
            # KV that does not come is computed here. vLLM's other policy fails the request.
            transfer.kv_load_failure_policy = "recompute"
            self._scheduler = SchedulerSide(self._block_size, self._describe, time.monotonic)

    def _describe(self, looks: Mapping[int, BeltLook]) -> dict[str, Any]:
        """What the proxy is told that asks who this server is."""
        model = self._vllm_config.model_config
        return {
            "engine_id": self._who.engine_id if self._who else None,
            "role": self._settings.role,
            "model": self._model_name(),
            "max_model_len": model.max_model_len,
            "engine": "vllm",
            "hash_seed": os.environ.get("PYTHONHASHSEED", "random"),
            "about": self._about(looks, model.max_model_len),
            "receiver": msgspec.to_builtins(self._who.receiver) if self._who and self._who.receiver else None,
        }

    def _about(self, looks: Mapping[int, BeltLook], max_model_len: int) -> dict[str, Any] | None:
        """What ``kvbelt doctor`` is told."""
        if self._who is None:
            return None
        said: dict[str, Any] = msgspec.to_builtins(about_server(self._who.about, looks, max_model_len, time.time()))
        return said

    def _model_name(self) -> str:
        names = self._vllm_config.model_config.served_model_name
        return str(names[0] if isinstance(names, list) else names)

    # The worker's process.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The KV memory is there: start the belt over it.

        Raises:
            StartError: a port is taken, or the memory cannot be moved as it is.
            SettingsError: the staging buffer is too small.
        """
        config = self._kv_cache_config
        spec = config.kv_cache_groups[0].kv_cache_spec
        name = next(iter(kv_caches))
        pages = pages_of(kv_caches, config.num_blocks, spec.page_size_bytes, self._backend(name))
        first = kv_caches[name]
        layout = KVLayout(
            num_layers=len(pages.rows),
            num_kv_heads=getattr(spec, "num_kv_heads", 1),
            head_dim=getattr(spec, "head_size", 0),
            block_size=spec.block_size,
            dtype=str(first.dtype).removeprefix("torch."),
            order=pages.order,
            block_bytes=spec.page_size_bytes,
        )
        model = self._vllm_config.model_config
        load_format = str(self._vllm_config.load_config.load_format)
        print_of_model = model_fingerprint(
            model.model, model.revision, load_format, {"quantization": model.quantization, "dtype": model.dtype}
        )
        engine_id = new_engine_id(self._settings.keys)
        rank = Rank(get_tensor_model_parallel_rank(), self._num_ranks)
        device, held = first.device, HeldPrefixes()
        channel = channel_for(self._settings, engine_id, device)
        shown = self._model_name()
        belt = make_belt(self._settings, channel, layout, pages, engine_id, shown, print_of_model, rank, held)
        belt.start()
        self._compute = CudaCompute(device) if device.type == "cuda" else CpuCompute()
        self._belt, self._pages = belt, pages
        self._watch = BeltWatch(partial(families_of, belt, channel), time.monotonic)
        self._source = f"rank {rank.number}"
        host = None
        if self._settings.host_bytes:
            host = HostWorker(host_memory(pages.rows, self._settings.host_bytes // rank.size))
        looks = Looks(partial(look_at, belt, channel))
        self._worker = WorkerSide(belt, len(pages.rows), self._compute, host, held, rank.number, looks)
        _WORKERS[engine_id] = self._worker
        self._who = RankIdentity(
            engine_id,
            belt.receiver_address(),
            host.num_places if host is not None else 0,
            about_rank(self._settings, belt, channel, str(device)),
        )
        log.info(
            "the belt runs as %s, %s: %s, %s, staging %d bytes",
            self._settings.role,
            rank,
            engine_id,
            self._who.receiver,
            self._settings.buffer_bytes,
        )

    def _backend(self, layer_name: str) -> str:
        layer = self._vllm_config.compilation_config.static_forward_context.get(layer_name)
        backend = getattr(layer, "attn_backend", None)
        return str(backend.get_name()) if backend is not None else "unknown"

    def get_handshake_metadata(self) -> WhoIAm | None:
        """For the scheduler's side."""
        return WhoIAm(self._who) if self._who is not None else None

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """A step begins."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMetadata)
        if self._worker is not None:
            self._worker.begin_step(connector_metadata.orders)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loads have begun with the step: what was at hand is in place, the others run beside it."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing that a forward pass reads is still being loaded."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,  # noqa: ARG002 -- known since register_kv_caches
        attn_metadata: Any,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """A layer's keys and values have been queued on the device."""
        if self._worker is not None and self._pages is not None:
            self._worker.layer_written(self._pages.layer_of[layer_name])

    def wait_for_save(self) -> None:
        """The forward pass is over, or queued. Nothing is waited for: blocks are kept until they have been read."""
        if self._worker is not None:
            self._worker.end_step()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose blocks are free, and requests whose KV is there or lost."""
        if self._worker is None:
            return None, None
        sent, loaded = self._worker.finished(finished_req_ids)
        return sent or None, loaded or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """To be computed after all."""
        return self._worker.take_bad_blocks() if self._worker is not None else set()

    def build_connector_worker_meta(self) -> StepNews | None:
        """What the scheduler's side should know."""
        news = self._worker.take_news() if self._worker is not None else News()
        return StepNews(news) if news else None

    def get_kv_connector_stats(self) -> BeltStats | None:
        """What is counted on this side, if there is anything new."""
        if self._watch is not None:
            figures = self._watch.take()
            return BeltStats.of(self._source, figures) if figures is not None else None
        if self._scheduler is not None and self._scheduler.host is not None:
            return BeltStats.of(self._source, figures_of(host_families(self._scheduler.host)))
        return None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> BeltStats:
        """In vLLM's HTTP process: what ``get_kv_connector_stats`` has made."""
        return BeltStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *arguments: Any) -> BeltProm:
        """In vLLM's HTTP process: our figures in its ``/metrics``."""
        return BeltProm(*arguments)

    def shutdown(self) -> None:
        """The process ends."""
        if self._watch is not None:
            self._watch.close()
        if self._belt is not None:
            self._belt.close()
        if self._worker is not None:
            self._worker.close()
        if self._compute is not None:
            self._compute.close()

    # The scheduler's process.

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """The workers' belts run."""
        ranks = [who.identity for _, who in sorted(metadata.items()) if isinstance(who, WhoIAm)]
        self._who = together(ranks) if ranks else None
        if len(ranks) == 1 and self._settings.receives and self._buffer_is_near:
            self._side.worker = _WORKERS.get(ranks[0].engine_id)
        if self._who is not None and self._who.host_places:
            self._side.host = HostScheduler(self._block_size, self._who.host_places)
            log.info("%d blocks of %d tokens fit into host memory", self._who.host_places, self._block_size)

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """What vLLM's prefix cache holds can be seen from now on."""
        if self._settings.receives and self._vllm_config.cache_config.enable_prefix_caching:
            self._side.ledger = PrefixLedger(lambda block_id: gpu_block_pool.blocks[block_id].block_hash)

    def on_new_request(self, request: Any) -> None:
        """A request has come."""
        params, num_tokens = request.kv_transfer_params, request.num_prompt_tokens
        self._side.on_new_request(request.request_id, params, num_tokens, _tokens_of(request))

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How much of the prompt can be loaded, and whether beside the running batch; else before it, being at hand."""
        tokens = self._side.loadable_tokens(request.request_id, num_computed_tokens)
        return tokens, bool(tokens) and not self._side.loads_now(request.request_id)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The request has its blocks."""
        self._side.on_allocated(request.request_id, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """What the worker does in this step."""
        preempted = scheduler_output.preempted_req_ids or ()
        return StepMetadata(self._side.orders(_scheduled(scheduler_output), preempted))

    def update_connector_output(self, connector_output: Any) -> None:
        """What came back."""
        meta = connector_output.kv_connector_worker_meta
        news = meta.news if isinstance(meta, StepNews) else News()
        self._side.on_news(news, connector_output.finished_recving or ())

    def reset_cache(self) -> bool:
        """Forget what is kept in host memory, as vLLM forgets its prefix cache."""
        if self._scheduler is not None and self._scheduler.host is not None:
            self._scheduler.host.index.clear()
        return True

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request is over, or aborted."""
        tokens = _tokens_of(request)
        if self._side.ledger is not None and tokens is not None:
            computed = request.all_token_ids[: request.num_computed_tokens]
            self._side.on_computed(PromptTokens(computed, tokens.salt), block_ids)
        return self._side.on_finished(request.request_id)

    @property
    def _buffer_is_near(self) -> bool:
        """Whether received KV lies in the model's own memory, where copying it takes a step no longer than it must."""
        settings = self._settings
        return settings.buffer_device == self._vllm_config.device_config.device_type and not settings.overflow_bytes

    @property
    def _side(self) -> SchedulerSide:
        assert self._scheduler is not None, "a hook of the scheduler was called on a worker"
        return self._scheduler


def _scheduled(output: Any) -> Iterable[ScheduledPrompt]:
    tokens = output.num_scheduled_tokens
    for new in output.scheduled_new_reqs:
        yield ScheduledPrompt(new.req_id, new.block_ids[0], new.num_computed_tokens, tokens[new.req_id])
    cached = output.scheduled_cached_reqs
    for request_id, blocks, computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        yield ScheduledPrompt(request_id, blocks[0] if blocks else (), computed, tokens[request_id])


def _tokens_of(request: Any) -> PromptTokens | None:
    """Of a request whose KV comes from tokens and nothing else, and may be taken from a cache."""
    if request.lora_request is not None or request.mm_features or request.prompt_embeds is not None:
        return None
    if request.prompt_token_ids is None or request.skip_reading_prefix_cache:
        return None
    return PromptTokens(request.prompt_token_ids, request.cache_salt or "")


def _log_like_vllm() -> None:
    """Our events belong into vLLM's log. Where somebody has set up ours, it stays as it is."""
    ours = logging.getLogger("kvbelt")
    if not ours.handlers:
        theirs = logging.getLogger("vllm")
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level or logging.INFO)
        ours.propagate = False
