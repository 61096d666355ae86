"""Who a server is: the identity of each tensor-parallel rank, and what the whole server tells the proxy."""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from kvbelt.belt_facts import BeltView, with_views
from kvbelt.errors import StartError
from kvbelt.fingerprint import fingerprint
from kvbelt.wire.about import About
from kvbelt.wire.handoff import RankAddress, ReceiverAddress
from kvbelt.wire.health import NO_DEFAULTS, AnswerDefaults, Role, ServerDescription
from kvbelt.wire.ids import EngineId
from kvbelt.wire.shards import ONE_STAGE, Ranks
from kvbelt.wire.steps import StepsNow


@dataclass(frozen=True, slots=True)
class Rank:
    """A parallel rank. Each has its own belt, over its own part of every block of its own layers."""

    number: int = 0  #: tensor-parallel, in its stage
    size: int = 1
    stage: int = 0  #: of its pipeline
    stages: tuple[int, ...] = ONE_STAGE  #: the first layer of each stage
    model_layers: int = 0  #: 0: there is one stage

    @property
    def count(self) -> int:
        """Of the server's ranks."""
        return self.size * len(self.stages)

    @property
    def num_layers(self) -> int:
        """Of its stage, where there are several."""
        return len(Ranks(self.size, self.stages).layers_of(self.stage, self.model_layers))


@dataclass(frozen=True, slots=True)
class RankIdentity:
    """One rank, once its belt runs."""

    engine_id: EngineId
    receiver: ReceiverAddress | None
    host_places: int  #: blocks that fit into its host memory; 0: it keeps none there
    about: About  #: the facts about its process and belt that do not change


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What vLLM's configuration says of the server."""

    role: Role
    model: str
    max_model_len: int
    defaults: AnswerDefaults = NO_DEFAULTS


def kv_heads_of(on_rank: int, num_ranks: int, of_model: int) -> int:
    """The model's KV heads, if they are dealt to the ranks in order, as vLLM does; 0: they are not.

    Layers of one model may differ, so what vLLM says of the model must fit what the rank has.
    """
    return of_model if on_rank == max(1, of_model // num_ranks) else 0


def together(ranks: Sequence[RankIdentity], stages: tuple[int, ...] = ONE_STAGE) -> RankIdentity:
    """The whole server, under the name of its rank 0; ``stages``: the first layer of each.

    Raises:
        StartError: some ranks receive and others do not.
    """
    first = ranks[0]
    others = [rank.receiver for rank in ranks[1:] if rank.receiver is not None]
    if len(others) != (len(ranks) - 1 if first.receiver is not None else 0):
        raise StartError(f"of {len(ranks)} ranks only some receive: {ranks}")
    receiver = first.receiver
    if receiver is not None:
        addresses = tuple(RankAddress(other.engine_id, other.init_port, other.alloc_port) for other in others)
        receiver = msgspec.structs.replace(receiver, ranks=addresses, stages=stages)
    # A block lies at the same place on every rank.
    return RankIdentity(first.engine_id, receiver, min(rank.host_places for rank in ranks), first.about)


def describe(
    facts: ServerFacts, server: RankIdentity | None, views: Mapping[int, BeltView], steps: StepsNow
) -> ServerDescription:
    """The server's answer to ``wire.handoff.Describe``; ``server`` is None until its belts run."""
    about = None
    if server is not None:
        # Sizes are those of the first rank, as in the settings.
        of_now = msgspec.structs.replace(server.about, unix_time=time.time(), max_model_len=facts.max_model_len)
        about = with_views(of_now, [view for _, view in sorted(views.items())])
    return ServerDescription(
        role=facts.role,
        model=facts.model,
        engine_id=server.engine_id if server is not None else None,
        max_model_len=facts.max_model_len,
        engine="vllm",
        hash_seed=os.environ.get("PYTHONHASHSEED", "random"),
        receiver=server.receiver if server is not None else None,
        about=about,
        steps=steps,
        defaults=facts.defaults,
    )


def model_fingerprint(model: str, revision: str | None, load_format: str, config: Mapping[str, Any]) -> str:
    """Equal for equal weights: by content where the model is a folder, by name and revision where vLLM fetched it."""
    folder = Path(model)
    contents = fingerprint(folder) if folder.is_dir() else f"{model}@{revision}"
    digest = hashlib.sha256(json.dumps([contents, load_format, dict(config)], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]
