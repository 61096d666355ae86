"""Models with several groups of layers, in real vLLM servers, against one plain server: the same answers.

``KVBELT_VLLM_GROUPS`` says what the model is: ``windows`` or ``states`` of tests/random_model.py.
"""

import os
import uuid
from typing import Any

import pytest

from tests.e2e.prompts import TWENTY
from tests.random_model import WINDOW
from tests.vllm.asking import all_free, ask, decode_leg, prefill_leg
from tests.vllm.belts import RECEIVER
from tests.vllm.conftest import Deployment, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

KIND = os.environ.get("KVBELT_VLLM_GROUPS", "")
WINDOWS = pytest.mark.skipif(KIND != "windows", reason="no model with windows")
STATES = pytest.mark.skipif(KIND != "states", reason="no model with states")

BLOCK = 32

#: From one block's end past the next, behind the window.
LENGTHS = range(256, 256 + BLOCK + 2)


def ids(count: int, start: int) -> list[int]:
    """Tokens that no other prompt begins with."""
    return [100 + (start + number) * 37 % 9000 for number in range(count)]


@WINDOWS
@pytest.mark.parametrize("asked", [{}, {"logprobs": 1}], ids=["first-token", "re-derive"])
def test_prompts_of_every_length(deployment: Deployment, asked: dict[str, Any]) -> None:
    """KV crosses on both paths, but where the last token is computed again and its window begins a block earlier."""
    for number in LENGTHS:
        body = {"prompt": ids(number, len(asked) * 10_000 + number * 300), **asked}
        way, _, got = ask(deployment.proxy, body)
        assert got == ask(deployment.plain, body)[2]
        if asked and (number - WINDOW + 1) % BLOCK == 0:
            assert way == "local; reason=window_edge"
        else:
            assert way.startswith(
                "re-derive; reason=" if asked else ("first-token", "re-derive; reason=incomplete_text")
            )


@WINDOWS
def test_a_prefix_that_both_have_is_used(deployment: Deployment) -> None:
    """Both sides find its blocks in their prefix caches, and the rest crosses."""
    shared = ids(400, 700_000)
    for more in range(3):
        body = {"prompt": shared + ids(70 + more, 800_000 + more * 1000)}
        way, _, got = ask(deployment.proxy, body)
        assert got == ask(deployment.plain, body)[2]
        assert way.startswith(("first-token", "re-derive; reason=incomplete_text"))
    wait_until(lambda: all_free(deployment))


@STATES
def test_twenty_prompts_are_answered_whole(deployment: Deployment) -> None:
    """By the decode server, which says why in its log; the header says that it takes no KV."""
    for body in TWENTY:
        way, _, got = ask(deployment.proxy, body)
        assert got == ask(deployment.plain, body)[2]
        assert way == "local; reason=decode_has_no_receiver"
    for server in (*deployment.prefill, *deployment.decode):
        assert "this server takes and sends no KV" in server.log.read_text(errors="replace")


@STATES
def test_both_sides_compute_what_they_are_asked_to_send(deployment: Deployment) -> None:
    """Their answers say why, and no block stays in use."""
    prompt, transfer_id = "Tell me about rivers.", uuid.uuid4().hex
    first = prefill_leg(deployment, prompt, transfer_id, RECEIVER)
    assert first["kv_transfer_params"]["reason"] == "kv_groups"
    choice = first["choices"][0]
    rest = decode_leg(deployment, choice["prompt_token_ids"] + choice["token_ids"], transfer_id)
    assert rest["kv_transfer_params"] == {"transfer_id": transfer_id, "kv": "recomputed", "reason": "kv_groups"}
    _, _, (_, _, expected) = ask(deployment.plain, {"prompt": prompt})
    assert choice["token_ids"] + rest["choices"][0]["token_ids"] == expected[3]
    wait_until(lambda: all_free(deployment))
