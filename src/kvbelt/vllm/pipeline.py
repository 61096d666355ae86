"""The stages of a server's pipeline, and this process's place among all ranks."""

from typing import Any

from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.distributed.utils import get_pp_indices

from kvbelt.vllm.identity import Rank


def first_layers(vllm_config: Any) -> tuple[int, ...]:
    """Of each stage."""
    layers = vllm_config.model_config.get_total_num_hidden_layers()
    number = vllm_config.parallel_config.pipeline_parallel_size
    return tuple(get_pp_indices(layers, stage, number)[0] for stage in range(number))


def rank_here(vllm_config: Any) -> Rank:
    """Of a worker's process."""
    number, size = get_tensor_model_parallel_rank(), vllm_config.parallel_config.tensor_parallel_size
    stages = first_layers(vllm_config)
    if len(stages) == 1:
        return Rank(number, size)
    layers = vllm_config.model_config.get_total_num_hidden_layers()
    return Rank(number, size, get_pp_group().rank_in_group, stages, layers)
