"""Workers that were measured."""

from dataclasses import dataclass

from kvbelt.pacing.costs import StepCosts
from kvbelt.simulate.model import EngineModel
from kvbelt.simulate.world import Network


@dataclass(frozen=True, slots=True)
class Profile:
    engine: EngineModel
    network: Network


#: Two NVIDIA H200 of one host, vLLM 0.26.0 with CUDA graphs, the Llama-3.1-8B architecture in bf16, prefix caching off.
#: Fitted to 27 loads of 7,500 tokens in and 200 out, measured on 2026-11-30 (``tests/simulate/test_fidelity.py``). How
#: the cost of a decode divides into ``decode`` and ``kv_token`` is the memory's bandwidth: all loads had one length.
H200_LLAMA_8B = Profile(
    EngineModel(
        StepCosts(
            base=4.82e-3,
            prefill=6e-3,
            token=20.7e-6,
            token_context=0.256e-9,
            decode=0.053e-3,
            kv_token=28.6e-9,
            sigma=0.015,
            samples=1000,
        ),
        kv_capacity=780_000,
        overlap=0.6,
        launch=3.6e-6,
        jitter=1.6e-3,
    ),
    Network(reach=7.5e-3, reply=3e-3, proxy=0.5e-3, handover=9.6e-3),
)

PROFILES = {"h200-llama-8b": H200_LLAMA_8B}
