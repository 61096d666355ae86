"""``KVBeltConnector``: what vLLM calls, passed on to the side that knows.

vLLM makes one instance in its scheduler's process and one in each worker's. The order of its calls on a worker:
bind_connector_metadata, then for each layer wait_for_layer_load and save_kv_layer, wait_for_save, get_finished,
get_block_ids_with_load_errors, build_connector_worker_meta. When start_load_kv comes differs by version, so nothing
depends on it.
"""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
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
from kvbelt.vllm.belt_setup import make_belt, model_fingerprint
from kvbelt.vllm.compute import CpuCompute, CudaCompute
from kvbelt.vllm.orders import News, Orders
from kvbelt.vllm.pages import Pages, pages_of
from kvbelt.vllm.scheduler_side import ScheduledPrompt, SchedulerSide
from kvbelt.vllm.settings import ConnectorSettings, load_settings
from kvbelt.vllm.versions import require_supported
from kvbelt.vllm.worker_side import WorkerSide
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.layout import KVLayout

require_supported(vllm.__version__)

log = logging.getLogger("kvbelt.vllm")


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

    engine_id: str
    receiver: ReceiverAddress | None


class KVBeltConnector(KVConnectorBase_V1):
    """Sends the KV of prompts to decode servers, and takes it from prefill servers, over the belt."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _log_like_vllm()
        transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
        for what in ("pipeline_parallel_size", "tensor_parallel_size"):
            if getattr(parallel, what) != 1:
                raise StartError(f"{what} is {getattr(parallel, what)}; KVBeltConnector runs with 1 for now")
        if vllm_config.speculative_config is not None:
            raise StartError("speculative decoding with KVBeltConnector has not been tried; leave it out")
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise StartError(
                f"this model has {len(kv_cache_config.kv_cache_groups)} kinds of KV cache; KVBeltConnector moves one "
                "(--disable-hybrid-kv-cache-manager may make one of them)"
            )
        device = vllm_config.device_config.device_type
        self._settings: ConnectorSettings = load_settings(transfer.kv_role, transfer.kv_connector_extra_config, device)
        self._block_size: int = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._belt: Belt | None = None
        self._compute: CpuCompute | CudaCompute | None = None
        self._pages: Pages | None = None
        self._who: WhoIAm | None = None
        if role is KVConnectorRole.SCHEDULER:
            # KV that does not come is computed here. vLLM's other policy fails the request.
            transfer.kv_load_failure_policy = "recompute"
            self._scheduler = SchedulerSide(self._block_size, self._describe, time.monotonic)

    def _describe(self) -> dict[str, Any]:
        """What the proxy is told that asks who this server is."""
        model = self._vllm_config.model_config
        names = model.served_model_name
        return {
            "engine_id": self._who.engine_id if self._who else None,
            "role": self._settings.role,
            "model": names[0] if isinstance(names, list) else names,
            "max_model_len": model.max_model_len,
            "receiver": msgspec.to_builtins(self._who.receiver) if self._who and self._who.receiver else None,
        }

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
        belt = make_belt(self._settings, layout, pages, engine_id, self._describe()["model"], print_of_model)
        belt.start()
        device = first.device
        self._compute = CudaCompute(device) if device.type == "cuda" else CpuCompute()
        self._belt, self._pages = belt, pages
        self._worker = WorkerSide(belt, len(pages.rows), self._compute)
        self._who = WhoIAm(engine_id, belt.receiver_address())
        log.info(
            "the belt runs as %s: %s, staging %d bytes", self._settings.role, self._who, self._settings.buffer_bytes
        )

    def _backend(self, layer_name: str) -> str:
        layer = self._vllm_config.compilation_config.static_forward_context.get(layer_name)
        backend = getattr(layer, "attn_backend", None)
        return str(backend.get_name()) if backend is not None else "unknown"

    def get_handshake_metadata(self) -> WhoIAm | None:
        """For the scheduler's side."""
        return self._who

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """A step begins."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMetadata)
        if self._worker is not None:
            self._worker.begin_step(connector_metadata.orders)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loads have begun with the step, and run beside it."""

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

    def shutdown(self) -> None:
        """The process ends."""
        if self._belt is not None:
            self._belt.close()
        if self._worker is not None:
            self._worker.close()
        if self._compute is not None:
            self._compute.close()

    # The scheduler's process.

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """The worker's belt runs."""
        who = metadata.get(0)
        assert who is None or isinstance(who, WhoIAm)
        self._who = who

    def on_new_request(self, request: Any) -> None:
        """A request has come."""
        self._side.on_new_request(request.request_id, request.kv_transfer_params, request.num_prompt_tokens)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How much of the prompt can be loaded; always beside the running batch, never before it."""
        tokens = self._side.loadable_tokens(request.request_id, num_computed_tokens)
        return tokens, bool(tokens)

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

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:  # noqa: ARG002
        """A request is over, or aborted."""
        return self._side.on_finished(request.request_id)

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


def _log_like_vllm() -> None:
    """Our events belong into vLLM's log. Where somebody has set up ours, it stays as it is."""
    ours = logging.getLogger("kvbelt")
    if not ours.handlers:
        theirs = logging.getLogger("vllm")
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level or logging.INFO)
        ours.propagate = False
