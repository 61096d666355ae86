"""``KVBeltConnector``: translates vLLM's hooks into calls of the scheduler's side and of the worker's side.

vLLM makes one instance in its scheduler's process and one in each worker's. The order of its calls on a worker:
bind_connector_metadata, then for each layer wait_for_layer_load and save_kv_layer, wait_for_save, get_finished,
get_block_ids_with_load_errors, build_connector_worker_meta. When start_load_kv comes differs by version, so nothing
depends on it.
"""

import logging
import time
from collections.abc import Container, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import msgspec
import torch
from vllm.config.vllm import get_current_vllm_config_or_none
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)

from kvbelt.belt_setup import BeltOptions
from kvbelt.errors import StartError
from kvbelt.vllm.adapters import adapter_of
from kvbelt.vllm.answer_defaults import answer_defaults
from kvbelt.vllm.chunk_limit import ChunkLimit
from kvbelt.vllm.figures import figures_of, host_families
from kvbelt.vllm.groups import Groups, groups_of
from kvbelt.vllm.identity import RankIdentity, ServerFacts, describe, together
from kvbelt.vllm.loading import Loading
from kvbelt.vllm.pacing import Pacing, StepLimits
from kvbelt.vllm.pipeline import first_layers, rank_here
from kvbelt.vllm.prometheus import BeltProm, BeltStats
from kvbelt.vllm.prompts import has_media, tokens_of
from kvbelt.vllm.rank import RankProcess, start_rank, without_belt
from kvbelt.vllm.reasoning import ReasoningOfPrompts, keeps_special_tokens
from kvbelt.vllm.refusals import (
    drafts_problem,
    engines_problem,
    is_alone,
    policy_problem,
    stages_problem,
    store_problem,
)
from kvbelt.vllm.requests import PromptTokens
from kvbelt.vllm.scheduler_side import SchedulerSide
from kvbelt.vllm.settings import load_settings
from kvbelt.vllm.step_messages import ScheduledPrompt, StepCommands, StepReport
from kvbelt.vllm.versions import hit_source, layout_problem, transfer_results, wanted_layout
from kvbelt.wire.handoff import HandoffState
from kvbelt.wire.ids import EngineId

log = logging.getLogger("kvbelt.vllm")

#: Of this process. With one tensor-parallel rank, vLLM's scheduler lives in the worker's process, on the same thread.
_LOADINGS: WeakValueDictionary[EngineId, Loading] = WeakValueDictionary()


@dataclass(frozen=True)
class StepMetadata(KVConnectorMetadata):
    commands: StepCommands


@dataclass(frozen=True)
class ReportMetadata(KVConnectorWorkerMetadata):
    report: StepReport

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "ReportMetadata":
        assert isinstance(other, ReportMetadata)
        return ReportMetadata(self.report.plus(other.report))


@dataclass(frozen=True)
class RankMetadata(KVConnectorHandshakeMetadata):
    """From a worker to the scheduler, once, when its belt runs."""

    identity: RankIdentity
    alone: bool = True  #: no other connector stores what this one loads


class KVBeltConnector(KVConnectorBase_V1):
    """Sends the KV of prompts to decode servers, and takes it from prefill servers, over the belt."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _log_like_vllm()
        self._groups = groups_of(kv_cache_config)
        _require_possible(vllm_config, kv_cache_config, self._groups)
        transfer, model = vllm_config.kv_transfer_config, vllm_config.model_config
        self._tp_size: int = vllm_config.parallel_config.tensor_parallel_size
        self._stages = first_layers(vllm_config)
        self._settings: BeltOptions = load_settings(
            transfer.kv_role,
            transfer.kv_connector_extra_config,
            vllm_config.device_config.device_type,
            num_ranks=self._tp_size * len(self._stages),
        )
        if problem := store_problem(self._groups, self._settings.host_bytes):
            raise StartError(problem)
        names = model.served_model_name
        self._model_name = str(names[0] if isinstance(names, list) else names)
        self._scheduler: SchedulerSide | None = None
        self._local: Loading | None = None  # the scheduler's: of the worker in this process, if it is the only one
        self._rank: RankProcess | None = None
        self._identity: RankIdentity | None = None
        # Only where vLLM makes the worker's side does it tell the whole server's configuration.
        server = get_current_vllm_config_or_none() if role is KVConnectorRole.WORKER else None
        outer = server.kv_transfer_config if server is not None else None
        self._alone = is_alone(transfer, outer)
        self._cache_hit_source = hit_source(receives=self._settings.receives, keeps=bool(self._settings.host_bytes))
        if role is KVConnectorRole.SCHEDULER:
            # KV that does not come is computed here. vLLM's other policy fails the request.
            transfer.kv_load_failure_policy = "recompute"
            block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
            facts = ServerFacts(self._settings.role, self._model_name, model.max_model_len, answer_defaults(model))
            config = vllm_config.scheduler_config
            self._chunks = ChunkLimit(config)
            self._reasoning = ReasoningOfPrompts(vllm_config)
            self._uncut: set[str] = set()  # requests during which no prompt is cut
            # All groups share the blocks.
            kv_tokens = kv_cache_config.num_blocks * block_size // len(kv_cache_config.kv_cache_groups)
            limits = StepLimits(block_size, config.max_num_batched_tokens, config.max_num_seqs, kv_tokens)
            pacing = Pacing(limits, time.monotonic)
            self._scheduler = SchedulerSide(block_size, partial(describe, facts), pacing, time.monotonic, self._groups)
            if self._groups.problem:
                log.warning("this server takes and sends no KV, and answers whole requests: %s", self._groups.problem)
        elif (self._settings.receives or self._settings.host_bytes) and (problem := policy_problem(transfer, outer)):
            raise StartError(problem)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        return wanted_layout(vllm_config.device_config.device_type)

    # The worker's process.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._groups.problem:
            self._identity = without_belt(self._settings, self._vllm_config.device_config.device_type)
            return
        rank = rank_here(self._vllm_config)
        self._rank = start_rank(
            self._vllm_config, self._kv_cache_config, kv_caches, self._settings, self._model_name, rank, self._groups
        )
        self._identity = self._rank.identity
        _LOADINGS[self._rank.identity.engine_id] = self._rank.worker.loading

    def get_handshake_metadata(self) -> RankMetadata | None:
        return RankMetadata(self._identity, self._alone) if self._identity is not None else None

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMetadata)
        if self._rank is not None:
            self._rank.worker.begin_step(connector_metadata.commands)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing: loads begin with the step. What had arrived is in place, and the others run beside the step."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: the forward pass reads no block that is still being loaded."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,  # noqa: ARG002 -- known since register_kv_caches
        attn_metadata: Any,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        layer = self._rank.layer_of.get(layer_name) if self._rank is not None else None
        if self._rank is not None and layer is not None:  # a drafter's layer may stay
            self._rank.worker.layer_written(layer, self._rank.group_of.get(layer_name, 0))

    def wait_for_save(self) -> None:
        """End the step. Nothing is waited for: blocks are kept until they have been read."""
        if self._rank is not None:
            self._rank.worker.end_step()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose blocks are free, and requests whose loads have ended, well or not."""
        if self._rank is None:
            return None, None
        sent, loaded = self._rank.worker.finished(finished_req_ids)
        return sent or None, loaded or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Likewise, with the requests that vLLM has to compute from their beginning."""
        sent, loaded = self.get_finished(finished_req_ids)
        failed = self._rank.worker.take_failed() if self._rank is not None else set()
        return transfer_results(sent or set(), loaded or set(), failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._rank.worker.take_bad_blocks() if self._rank is not None else set()

    def build_connector_worker_meta(self) -> ReportMetadata | None:
        report = self._rank.worker.take_report() if self._rank is not None else StepReport()
        return ReportMetadata(report) if report else None

    def get_kv_connector_stats(self) -> BeltStats | None:
        """What is counted on this side, if there is anything new."""
        if self._rank is not None:
            figures = self._rank.figures.take()
            return BeltStats.of(self._rank.source, figures) if figures is not None else None
        if self._scheduler is None:
            return None
        # The one hook of the scheduler that vLLM calls with every output, once and in the order of the steps.
        self._scheduler.pacing.on_output()
        host = self._scheduler.host
        return BeltStats.of("scheduler", figures_of(host_families(host))) if host is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> BeltStats:
        """In vLLM's HTTP process: what ``get_kv_connector_stats`` has made."""
        return BeltStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *arguments: Any) -> BeltProm:
        """In vLLM's HTTP process: our figures in its ``/metrics``."""
        return BeltProm(*arguments)

    def shutdown(self) -> None:
        if self._rank is not None:
            self._rank.close()

    # The scheduler's process.

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        found = [rank for _, rank in sorted(metadata.items()) if isinstance(rank, RankMetadata)]
        if not found:
            return
        server = together([rank.identity for rank in found], self._stages)
        settings = self._settings
        # Received KV must lie in the memory where the model runs, so that a step may wait for its copy.
        near = settings.buffer_device == self._vllm_config.device_config.device_type and not settings.overflow_bytes
        # A step cannot take back a request of several groups, nor what another connector has stored of its blocks.
        alone = found[0].alone and not self._groups.several
        if len(found) == 1 and settings.receives and near and alone:
            self._local = _LOADINGS.get(server.engine_id)
        if server.host_places:
            log.info("%d blocks fit into host memory", server.host_places)
        self._side.on_workers_ready(server)

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        # What a prefix cache holds of several groups is no beginning of what would travel.
        one = not (self._groups.several or self._groups.problem)
        if one and self._settings.receives and self._vllm_config.cache_config.enable_prefix_caching:
            self._side.watch_prefix_cache(lambda block_id: gpu_block_pool.blocks[block_id].block_hash)

    def on_new_request(self, request: Any) -> None:
        params, num_tokens = request.kv_transfer_params, request.num_prompt_tokens
        generates = request.max_tokens > 1
        adapter = adapter_of(request.lora_request)
        self._side.on_new_request(
            request.request_id, params, num_tokens, tokens_of(request), generates=generates, adapter=adapter
        )
        # vLLM 0.32 on a CPU ends when a prompt of several steps has a seed.
        if _has_seed(request) and self._vllm_config.device_config.device_type == "cpu":
            self._uncut.add(request.request_id)
        self._cut_prompts()
        self._tell_local()

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How much of the prompt can be loaded, and whether beside the running batch; else before its next step."""
        request_id, arrived = request.request_id, None
        if self._local is not None:
            wait = self._side.arrival_wait(request_id, num_computed_tokens)
            arrived = self._local.arrived(request_id, wait) if wait is not None else None
        loadable = self._side.loadable(request_id, num_computed_tokens, arrived)
        return loadable.tokens, bool(loadable.tokens) and not loadable.now

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        block_ids, groups = blocks.get_block_ids(), self._groups
        others = groups.others(block_ids)
        self._side.on_allocated(request.request_id, groups.lead(block_ids), num_external_tokens, others)
        self._tell_local()

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        side, cached = self._side, scheduler_output.scheduled_cached_reqs
        began = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        tokens = scheduler_output.num_scheduled_tokens
        if drafts := scheduler_output.scheduled_spec_decode_tokens:  # a decode is one, however much it drafts
            tokens = {request_id: count - len(drafts.get(request_id, ())) for request_id, count in tokens.items()}
        side.pacing.on_scheduled(tokens, began, cached.req_ids, cached.num_computed_tokens)
        self._cut_prompts()
        scheduled = _scheduled(scheduler_output, side.followed, self._groups)
        return StepMetadata(side.take_step(scheduled, scheduler_output.preempted_req_ids or ()))

    def update_connector_output(self, connector_output: Any) -> None:
        meta = connector_output.kv_connector_worker_meta
        report = meta.report if isinstance(meta, ReportMetadata) else StepReport()
        self._side.on_report(report, connector_output.finished_recving or ())

    def reset_cache(self) -> bool:
        """Forget what is kept in host memory, as vLLM forgets its prefix cache."""
        if self._scheduler is not None and self._scheduler.host is not None:
            self._scheduler.host.index.clear()
        return True

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Whether the request's blocks are still read, and the ``kv_transfer_params`` of its answer."""
        computed = tokens_of(request) if self._side.remembers else None
        if computed is not None:
            # The last token's KV is certain only with the next step; scheduled ahead, it may be counted already.
            certain = min(request.num_computed_tokens, len(request.all_token_ids) - 1)
            computed = PromptTokens(request.all_token_ids[:certain], computed.salt)
        read, answer = self._side.on_finished(request.request_id, computed, block_ids)
        if isinstance(answer, HandoffState):
            answer = msgspec.structs.replace(
                answer,
                adapter=adapter_of(request.lora_request),
                reasoning=self._reasoning.of(request.prompt_token_ids),
                tp_size=self._tp_size,
                stages=self._stages,
                special_tokens=keeps_special_tokens(request.sampling_params),
                media=has_media(request),
            )
        self._uncut.discard(request.request_id)
        self._tell_local()
        return read, msgspec.to_builtins(answer)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Likewise, in a vLLM that lets a connector have several groups."""
        return self.request_finished(request, self._groups.lead(block_ids))

    def _cut_prompts(self) -> None:
        self._chunks.set(0 if self._uncut else self._side.pacing.chunk_tokens())

    def _tell_local(self) -> None:
        """Claims and drops need not wait for the next step, which a server without work does not take."""
        if self._local is not None:
            self._local.obey(self._side.take_claims())

    @property
    def _side(self) -> SchedulerSide:
        assert self._scheduler is not None, "a hook of the scheduler was called on a worker"
        return self._scheduler


def _require_possible(vllm_config: Any, kv_cache_config: Any, groups: Groups) -> None:
    if problem := stages_problem(vllm_config.parallel_config.pipeline_parallel_size, groups):
        raise StartError(problem)
    if problem := drafts_problem(vllm_config.speculative_config):
        raise StartError(problem)
    transfer = vllm_config.kv_transfer_config
    if problem := engines_problem(vllm_config.parallel_config, transfer.engine_id):
        raise StartError(problem)
    if not kv_cache_config.kv_cache_groups:
        raise StartError("this model has no KV cache, so there is nothing to send; serve it without KVBeltConnector")
    if not groups.problem and (problem := layout_problem(kv_cache_config)):
        raise StartError(problem)
    if vllm_config.model_config.enable_sleep_mode:
        # The staging buffers lie in the memory that sleep gives back, and other servers go on writing there.
        raise StartError("a server with KVBeltConnector cannot sleep: leave out --enable-sleep-mode")


def _scheduled(output: Any, followed: Container[str], groups: Groups) -> Iterable[ScheduledPrompt]:
    """The requests of a step that are new, are given blocks, or are ``followed``."""
    tokens = output.num_scheduled_tokens
    for new in output.scheduled_new_reqs:
        lead, others = groups.lead(new.block_ids), groups.others(new.block_ids)
        yield ScheduledPrompt(new.req_id, lead, new.num_computed_tokens, tokens[new.req_id], others)
    cached = output.scheduled_cached_reqs
    for request_id, blocks, computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        if blocks or request_id in followed:
            lead, others = (groups.lead(blocks), groups.others(blocks)) if blocks else ((), ())
            yield ScheduledPrompt(request_id, lead, computed, tokens[request_id], others)


def _has_seed(request: Any) -> bool:
    return request.sampling_params is not None and request.sampling_params.seed is not None


def _log_like_vllm() -> None:
    """Send our events to vLLM's log, unless our logger has been set up already."""
    ours = logging.getLogger("kvbelt")
    if not ours.handlers:
        theirs = logging.getLogger("vllm")
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level or logging.INFO)
        ours.propagate = False
