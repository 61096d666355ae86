"""A drafter's layers: which they are, and between which servers they travel."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from kvbelt.vllm.drafter import drafts, drops_a_block, parted
from kvbelt.vllm.pages import Pages, pages_of, with_drafter
from kvbelt.vllm.step_messages import Load, StepCommands, Written
from tests.channels.memory import MemoryNetwork
from tests.vllm.belts import BLOCK, LAYERS, BeltServer, claim, loaded, send


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.attn", False),
        ("language_model.model.layers.3.self_attn.attn", False),
        ("model.layers.4.self_attn.attn", True),  # EAGLE, and MTP as DeepSeek has it
        ("draft_model.model.layers.0.self_attn.attn", True),
        ("mtp.layers.0.self_attn.attn", True),
    ],
)
def test_a_drafter_s_layers_are_known_by_their_names(name: str, expected: bool) -> None:
    """Beside a model of four layers."""
    assert drafts(name, 4) == expected


@pytest.mark.parametrize(("method", "number"), [("eagle", 1), ("ngram", 0), (None, 0)])
def test_layers_are_parted_where_there_is_a_drafter(method: str | None, number: int) -> None:
    """Without one all are the model's, whatever their names."""
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(method=method) if method else None,
        model_config=SimpleNamespace(get_num_layers=lambda _: 1),
        parallel_config=None,
    )
    of_model, of_drafter = parted({"model.layers.0.attn": 0, "model.layers.1.attn": 1}, config)
    assert (len(of_model), len(of_drafter)) == (2 - number, number)


def test_vllm_says_whether_it_computes_a_held_block_again() -> None:
    """In 0.32 there is a setting for it; before, every drafter of hidden states did."""
    assert not drops_a_block(None)
    assert drops_a_block(SimpleNamespace(use_eagle=lambda: True))
    assert not drops_a_block(SimpleNamespace(use_eagle=lambda: True, use_eagle_block_drop=lambda: False))


def layer(heads: int = 2) -> torch.Tensor:
    """One layer's KV."""
    return torch.randn(6, heads, BLOCK, 8)


def pages(target: torch.Tensor, drafter: torch.Tensor) -> Pages:
    """Of a model with one layer, and a drafter."""
    found = pages_of({"model.layers.0.attn": target}, 6, 2 * BLOCK * 8 * 4, "test", 2)
    return with_drafter(found, {"draft_model.layers.0.attn": drafter}, 6, "test", 2)


def test_a_drafter_s_layers_follow_the_model_s() -> None:
    found = pages(layer(), layer())
    assert (len(found.rows), found.draft_layers) == (2, 1)
    assert found.layer_of == {"model.layers.0.attn": 0, "draft_model.layers.0.attn": 1}


def test_a_drafter_with_other_blocks_stays() -> None:
    """Their bytes differ: drafts are worse, and answers as ever."""
    found = pages(layer(), layer(heads=1))
    assert (len(found.rows), found.draft_layers, found.layer_of) == (1, 0, {"model.layers.0.attn": 0})


def test_a_drafter_may_use_the_model_s_kv() -> None:
    """It adds no row."""
    target = layer()
    found = pages(target, target)
    assert (len(found.rows), found.draft_layers) == (1, 0)
    assert found.layer_of == {"model.layers.0.attn": 0, "draft_model.layers.0.attn": 0}


def move(prefill: BeltServer, decode: BeltServer) -> None:
    """A prompt of 30 tokens from blocks 1 and 2 to blocks 5 and 4, in two steps."""
    prefill.step(StepCommands(sends=(send(decode, "a", 30),), written=(Written("a", 0, (1,), False),)))
    prefill.step(StepCommands(written=(Written("a", 1, (2,), True),)))
    decode.step(StepCommands(claims=(claim("a"),), loads=(Load("a", 0, (5, 4), 30),)))
    assert loaded(decode) == {"a"}
    assert decode.side.take_report().received == {"a": ""}


@pytest.fixture
def between(network: MemoryNetwork) -> Callable[[str, str], tuple[BeltServer, BeltServer]]:
    """A prefill and a decode server with these drafters."""
    servers: list[BeltServer] = []

    def make(prefill: str, decode: str) -> tuple[BeltServer, BeltServer]:
        servers.extend((BeltServer("prefill", network, drafter=prefill), BeltServer("decode", network, drafter=decode)))
        return servers[0], servers[1]

    yield make
    for server in servers:
        server.close()


def test_the_layers_of_a_common_drafter_arrive(
    between: Callable[[str, str], tuple[BeltServer, BeltServer]],
) -> None:
    """As the model's do."""
    prefill, decode = between("d", "d")
    move(prefill, decode)
    for name, ours in decode.kv.items():
        assert torch.equal(ours[[5, 4]], prefill.kv[name][[1, 2]])


@pytest.mark.parametrize(("ours", "theirs"), [("", "d"), ("d", ""), ("d", "e")])
def test_other_drafters_keep_what_they_have(
    between: Callable[[str, str], tuple[BeltServer, BeltServer]], ours: str, theirs: str
) -> None:
    """The model's layers arrive; nothing is written into the drafter's."""
    prefill, decode = between(ours, theirs)
    before = {name: kv.clone() for name, kv in decode.kv.items()}
    move(prefill, decode)
    for number, (name, kv) in enumerate(decode.kv.items()):
        assert torch.equal(kv[[5, 4]], prefill.kv[name][[1, 2]] if number < LAYERS else before[name][[5, 4]])
