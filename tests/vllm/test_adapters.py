"""LoRA adapters: told apart by their weights, not by their names."""

import json
import os
import struct
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvbelt.vllm.adapters import UNKNOWN, adapter_of, salt_of
from kvbelt.vllm.identity import ServerFacts, describe
from kvbelt.vllm.requests import Loadable
from kvbelt.vllm.scheduler_side import SchedulerSide
from kvbelt.wire.block_hash import block_hashes
from kvbelt.wire.handoff import DecodeOutcome
from kvbelt.wire.health import Role
from kvbelt.wire.ids import TransferId
from tests.vllm.belts import BLOCK, TO_LOAD, Clock, pacing


def written(folder: Path, weights: bytes) -> SimpleNamespace:
    """An adapter in its own folder, as a request names it."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"r": 1}')
    header = json.dumps({"a": {"dtype": "U8", "shape": [len(weights)], "data_offsets": [0, len(weights)]}}).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + weights)
    return SimpleNamespace(lora_path=str(folder))


def test_equal_weights_are_one_adapter(tmp_path: Path) -> None:
    """Wherever they lie."""
    one, copy, other = (written(tmp_path / name, text) for name, text in (("a", b"x"), ("b", b"x"), ("c", b"y")))
    assert adapter_of(one) == adapter_of(copy) != adapter_of(other)
    assert adapter_of(None) == ""


def test_an_adapter_that_is_replaced_in_its_place_is_another_one(tmp_path: Path) -> None:
    before = adapter_of(written(tmp_path / "a", b"x"))
    replaced = written(tmp_path / "a", b"y")
    os.utime(tmp_path / "a" / "adapter_model.safetensors", (9, 9))
    os.utime(tmp_path / "a" / "adapter_config.json", (9, 9))
    assert adapter_of(replaced) != before


def test_an_adapter_of_a_hub_is_unknown() -> None:
    assert adapter_of(SimpleNamespace(lora_path="someone/adapter")) == UNKNOWN


def test_blocks_of_different_adapters_have_different_hashes() -> None:
    """And the salt of a tenant still counts."""
    salts = [salt_of(salt, adapter) for salt in ("", "tenant") for adapter in ("", "a", "b")]
    assert len({block_hashes(range(BLOCK), BLOCK, salt) for salt in salts}) == len(salts)
    assert salt_of("tenant", "") == "tenant"


@pytest.fixture
def side() -> SchedulerSide:
    """The scheduler's side of a decode server."""
    return SchedulerSide(BLOCK, partial(describe, ServerFacts(Role.DECODE, "m", 2048)), pacing(), Clock())


@pytest.mark.parametrize("own", ["", "another"])
def test_kv_of_another_adapter_is_not_read(side: SchedulerSide, own: str) -> None:
    """It is computed here, and the proxy hears why."""
    side.on_new_request("a", TO_LOAD | {"adapter": "one"}, 33, adapter=own)
    assert side.loadable("a", 0) == Loadable(0)
    side.on_allocated("a", [1, 2, 3], 0)
    _, outcome = side.on_finished("a")
    assert outcome == DecodeOutcome(TransferId(TO_LOAD["transfer_id"]), "recomputed", "adapter_differs")


def test_kv_of_the_same_adapter_is_loaded(side: SchedulerSide) -> None:
    side.on_new_request("a", TO_LOAD | {"adapter": "one"}, 33, adapter="one")
    assert side.loadable("a", 0) == Loadable(32)
